"""PyTorch, on any of its devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import array_api_compat.torch as xp
import torch

from ..core import primitives
from ..core.backend import Backend
from ..core.graph import _build_graph
from ..core.types import Array, Graph, Namespace
from . import streamed

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


def _normalise(keys: Array, out: Array, /) -> None:
    length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    # Divided by infinity, everything becomes zero, infinity and NaN excepted.
    length.masked_fill_(length == 0, torch.inf)
    torch.div(keys, length, out=out).nan_to_num_(nan=0.0)


NATIVE = streamed.Native(normalise=_normalise, smallest=_smallest, take_along_axis=torch.take_along_dim)


def build_graph(keys: Array, importance: Array, valid: Array, /, **options: Any) -> Graph:
    """Stream the similarities. Nothing can be written to arrays that record gradients: they take the portable way."""
    if keys.requires_grad and torch.is_grad_enabled():
        return _build_graph(keys, importance, valid, **options)
    return streamed.build_graph(keys, importance, valid, native=NATIVE, **options)


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
    build_graph=build_graph,
)
