"""NumPy, and the graph as a SciPy sparse matrix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from scipy.sparse import csr_array

from ..core import primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.types import Array, Graph, Namespace
from . import streamed

__all__ = ["BACKEND", "SPARSE", "to_csr"]


def _smallest(keys: Array, k: int, /) -> Array:
    best = np.partition(keys, k - 1, axis=-1)[..., :k]
    best.sort(axis=-1)
    return best


top_k = partial(primitives.packed_top_k, bits=lambda x: x.view(np.int32), smallest=_smallest)


def _normalised(keys: Array, /) -> Array:
    length = np.sqrt(np.vecdot(keys, keys))
    usable = (length > 0) & np.isfinite(length)
    directions = keys / np.where(usable, length, 1)[..., None]
    directions[~usable] = 0
    return directions


def _ranked(similarity: Array, places: Array, count: int, /) -> tuple[Array, Array]:
    """Take the best: by weight, then what may be a neighbor before what may not, then by place. Gives weights, places.

    Places may come in any order in float32, and must ascend among equal weights in float64.
    """
    is_excluded = similarity < -2
    weights = np.clip(similarity, 0, 1)
    if weights.dtype == np.float64:
        weights[is_excluded] = streamed.EXCLUDED
        best = np.argsort(-weights, axis=-1, kind="stable")[..., :count]
        places = np.broadcast_to(places, weights.shape)
        return np.take_along_axis(weights, best, -1), np.take_along_axis(places, best, -1)
    # The bits of numbers from 0 on, read as integers, are in the order of the numbers; those of -0.0 are negative.
    bits = np.maximum(weights.view(np.int32), 0)
    best = _smallest((np.subtract(is_excluded, bits, dtype=np.int64) << 32) | places, count)
    order = best >> 32
    weights = (-order).astype(np.int32).view(np.float32)
    return np.where(order > 0, np.float32(streamed.EXCLUDED), weights), best & 0xFFFFFFFF


def _nearest(
    keys: Array, sources: Array, is_padding: Array, /, *, num_neighbors: int, width: int, block: int
) -> tuple[Array, Array]:
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    of = _normalised(np.take_along_axis(keys, sources[..., None], 1))
    of[np.take_along_axis(is_padding, sources, 1)] = 0
    filling = -num_tokens % block
    bias = np.full((num_rows, num_tokens + filling), streamed.EXCLUDED, dtype=keys.dtype)
    bias[:, :num_tokens][~is_padding] = 0
    np.put_along_axis(bias, sources, streamed.EXCLUDED, 1)
    products = np.empty(num_rows * num_sources * width, dtype=keys.dtype)

    weights = np.empty((num_rows, num_sources, 0), dtype=keys.dtype)
    neighbors = np.empty(weights.shape, dtype=np.int64)
    for start in range(0, num_tokens, width):
        to = _normalised(keys[:, start : start + width])
        if to.shape[1] % block:
            to = np.pad(to, ((0, 0), (0, filling), (0, 0)))
        size = to.shape[1]
        # A block's tokens stand above each other: NumPy is slow at maxima along a short last axis.
        to = to.reshape(num_rows, -1, block, head_size).swapaxes(1, 2).reshape(num_rows, size, head_size)
        column_bias = bias[:, start : start + size].reshape(num_rows, -1, block).swapaxes(1, 2)
        found = products[: num_rows * num_sources * size].reshape(num_rows, num_sources, size)
        np.matmul(of, to.swapaxes(1, 2), out=found)
        found += column_bias.reshape(num_rows, 1, size)

        blocks = found.reshape(num_rows, num_sources, block, -1)
        num_blocks = blocks.shape[-1]
        _, chosen = _ranked(blocks.max(axis=-2), np.arange(num_blocks), min(num_neighbors, num_blocks))
        chosen.sort(axis=-1)
        near = np.take_along_axis(blocks, chosen[..., None, :], -1).swapaxes(2, 3)
        places = start + chosen[..., None] * block + np.arange(block)
        weights = np.concatenate([weights, near.reshape(num_rows, num_sources, -1)], axis=-1)
        neighbors = np.concatenate([neighbors, places.reshape(num_rows, num_sources, -1)], axis=-1)
        weights, neighbors = _ranked(weights, neighbors, min(num_neighbors, weights.shape[-1]))
    return neighbors, weights


build_graph = partial(streamed.build_graph, nearest=_nearest)


def segment_product(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Multiply in order of the edges."""
    return _segment_reduce(np.multiply, 1, values, index, num_segments)


def segment_sum(values: Array, index: Array, num_segments: int, /, *, xp: Namespace) -> Array:
    """Add in order of the edges."""
    return _segment_reduce(np.add, 0, values, index, num_segments)


def _segment_reduce(ufunc: np.ufunc, identity: int, values: Array, index: Array, num_segments: int) -> Array:
    rows = values.reshape(-1, values.shape[-1]) if values.size else values.reshape(0, 0)
    result = np.full((*values.shape[:-1], num_segments), identity, dtype=values.dtype)
    flat = result.reshape(-1)
    first = np.arange(rows.shape[0])[:, None] * num_segments
    ufunc.at(flat, (index.reshape(rows.shape) + first).reshape(-1), rows.reshape(-1))
    return result


def to_csr(graph: Graph, /, row: tuple[int, ...] = ()) -> Any:
    """Give one row's graph as a sparse matrix, to draw or inspect it.

    Parameters
    ----------
    graph : Graph
        Of NumPy arrays.
    row : tuple of int
        Index into the leading axes, such as ``(batch, head)``. Default: a graph without leading axes.

    Returns
    -------
    scipy.sparse.csr_array, shape (K, N)
        Row r holds the edges of token ``graph.sources[row][r]``. Edges of weight 0 are left out.

    Raises
    ------
    ArgumentError
        If `row` does not index all leading axes.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import build_graph
    >>> keys = np.asarray([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> to_csr(build_graph(keys, np.asarray([9.0, 1.0, 2.0]), num_sources=1, num_neighbors=2)).toarray()
    array([[0. , 0. , 0.6]])
    """
    if len(row) != graph.sources.ndim - 1:
        raise ArgumentError(f"row must index the leading axes {graph.sources.shape[:-1]}; got {row}")
    weights, neighbors = graph.weights[row], graph.neighbors[row]
    is_edge = weights > 0
    start = np.concatenate([[0], np.cumsum(np.sum(is_edge, axis=-1))])
    # Not from coordinates: SciPy would add the weights of a repeated neighbor, which may exceed 1.
    csr = csr_array((weights[is_edge], neighbors[is_edge], start), shape=(weights.shape[0], graph.num_tokens))
    csr.sort_indices()
    return csr


def _sparse_reduce(
    ufunc: np.ufunc, identity: int, values: Array, index: Array, num_segments: int, /, *, xp: Namespace
) -> Array:
    """Combine by column: one sparse row per row of the leading axes, turned into compressed columns."""
    result = np.full((*values.shape[:-1], num_segments), identity, dtype=values.dtype)
    if not values.size:
        return result
    num_values = values.shape[-1]
    num_rows = values.size // num_values
    start = np.arange(num_rows + 1) * num_values
    own_columns = np.arange(num_rows)[:, None] * num_segments
    csr = csr_array(
        (values.reshape(-1), (index.reshape(num_rows, num_values) + own_columns).reshape(-1), start),
        shape=(num_rows, num_rows * num_segments),
    )
    csc = csr.tocsc()  # keeps repeated entries apart
    used = np.flatnonzero(np.diff(csc.indptr))
    result.reshape(-1)[used] = ufunc.reduceat(csc.data, csc.indptr[used])
    return result


BACKEND = Backend(
    name="numpy",
    xp=xp,
    to_numpy=np.asarray,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
    build_graph=build_graph,
)

# NumPy arrays, propagated through SciPy's compressed columns: ``propagate(importance, graph, backend=SPARSE)``. A
# second writing to check the dense one against, and to read next to `to_csr`.
SPARSE = replace(
    BACKEND,
    name="scipy",
    library="numpy",
    segment_product=partial(_sparse_reduce, np.multiply, 1),
    segment_sum=partial(_sparse_reduce, np.add, 0),
)
