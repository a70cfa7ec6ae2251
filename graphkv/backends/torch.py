"""PyTorch, on any of its devices."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import torch

from ..core import primitives
from ..core.backend import Backend
from ..core.types import Array, Namespace

__all__ = ["BACKEND"]

# A packed key holds, from high to low bits: tier (2), score (32), token index (29).
INDEX_BITS = 29
INDEX_MASK = (1 << INDEX_BITS) - 1


def top_k(scores: Array, k: int, /, tiers: Array | None = None, *, xp: Namespace) -> Array:
    """Rank by unique integer keys: torch.topk gives no order among equal values (pytorch#27542)."""
    if scores.dtype != torch.float32 or k == 0 or scores.shape[-1] > INDEX_MASK:
        return primitives.top_k(scores, k, tiers, xp=xp)
    bits = (scores + 0.0).view(torch.int32)  # + 0 turns -0.0 into 0.0
    # Monotone in the score; NaN below minus infinity.
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(torch.isnan(scores), -(2**31))
    key = (2**31 - 1 - bits.to(torch.int64)) << INDEX_BITS | torch.arange(scores.shape[-1], device=scores.device)
    if tiers is not None:
        key = key | tiers.to(torch.int64) << (32 + INDEX_BITS)
    return torch.topk(key, k, dim=-1, largest=False, sorted=True).values & INDEX_MASK


def segment_product(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Multiply by torch's own scatter."""
    result = torch.ones((*values.shape[:-1], num_segments), dtype=values.dtype, device=values.device)
    return result.scatter_reduce_(-1, index, values, "prod")


def segment_sum(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Add by torch's own scatter."""
    result = torch.zeros((*values.shape[:-1], num_segments), dtype=values.dtype, device=values.device)
    return result.scatter_add_(-1, index, values)


def to_numpy(x: Array) -> Any:
    """Copy to the host."""
    return x.detach().cpu().numpy()


BACKEND = Backend(
    name="torch",
    xp=xp,
    to_numpy=to_numpy,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
)
