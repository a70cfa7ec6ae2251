"""PyTorch, on any of its devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import array_api_compat.torch as xp
import torch

from ..core import primitives
from ..core.backend import Backend
from ..core.types import Array, Namespace

__all__ = ["BACKEND"]


def _smallest(keys: Array, k: int, /) -> Array:
    return torch.topk(keys, k, dim=-1, largest=False, sorted=True).values


# Not torch.topk on the scores: it gives no order among equal values (pytorch#27542).
top_k = partial(primitives.packed_top_k, bits=lambda x: x.view(torch.int32), smallest=_smallest)


def segment_product(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Multiply by torch's own scatter where it has one order: on a GPU that changes from run to run."""
    if values.device.type != "cpu":
        return primitives.segment_product(values, index, num_segments, xp=xp)
    result = torch.ones((*values.shape[:-1], num_segments), dtype=values.dtype, device=values.device)
    return result.scatter_reduce_(-1, index, values, "prod")


def segment_sum(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Add by torch's own scatter where it has one order: on a GPU that changes from run to run."""
    if values.device.type != "cpu":
        return primitives.segment_sum(values, index, num_segments, xp=xp)
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
