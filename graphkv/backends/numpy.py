"""NumPy, and the graph as a SciPy sparse matrix."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from scipy.sparse import csc_array, csr_array

from ..core import primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.types import Array, Graph
from . import streamed

__all__ = ["BACKEND", "SPARSE", "to_csr"]


def _smallest(keys: Array, k: int, /) -> Array:
    best = np.partition(keys, k - 1, axis=-1)[..., :k]
    best.sort(axis=-1)
    return best


top_k = partial(primitives.packed_top_k, bits=lambda x: x.view(np.int32), smallest=_smallest)


class _Scratch(threading.local):
    """Memory that every thread keeps for its next graph: allocating it anew costs more than the matrix product."""

    def __init__(self) -> None:
        self.buffers: dict[str, Array] = {}

    def take(self, name: str, size: int, dtype: Any, /) -> Array:
        found = self.buffers.get(name)
        if found is None or found.dtype != dtype or found.size < size:
            found = self.buffers[name] = np.empty(size, dtype)
        return found[:size]


_scratch = _Scratch()


def _normalize(keys: Array, /, *, out: Array) -> None:
    length = np.sqrt(np.vecdot(keys, keys))
    usable = (length > 0) & np.isfinite(length)
    if not usable.all():
        keys, length = np.where(usable[..., None], keys, 0), np.where(usable, length, 1)
    np.divide(keys, length[..., None], out=out)


def _rankable(similarity: Array, /) -> Array:
    """Clip cosines to weights, and keep what may not be a neighbor below them."""
    weights = np.clip(similarity, 0, 1)
    weights[similarity < streamed.EXCLUDED / 2] = streamed.EXCLUDED
    return weights


def _best(values: Array, count: int, /) -> tuple[Array, Array]:
    """Return the places of the highest values of every row, ascending, and the rows where equal values were left out.

    Of equal values the first are taken.
    """
    num_rows, size = values.shape
    if count == size:
        return np.tile(np.arange(size), (num_rows, 1)), np.zeros(num_rows, dtype=bool)
    lowest = np.partition(values, size - count, axis=-1)[:, size - count, None]
    is_best = values >= lowest
    surplus = np.count_nonzero(is_best, axis=-1) - count
    is_tied = surplus > 0
    if is_tied.any():
        equal = values[is_tied] == lowest[is_tied]
        left = np.count_nonzero(equal, axis=-1) - surplus[is_tied]
        is_best[is_tied] &= ~equal | (np.cumsum(equal, axis=-1) <= left[:, None])
    places = np.flatnonzero(is_best).reshape(num_rows, count)
    places %= size
    return places, is_tied


def _best_in_blocks(similarity: Array, count: int, block: int, /) -> Array:
    """Return what `_best` finds in all clipped similarities, by ranking only the best blocks.

    Block b holds the tokens b, b + B, b + 2 B, ... of B blocks: so the maxima of all blocks come from comparing halves
    of rows, which is as fast as reading them. Blocks with equal maxima have no order, so their rows are ranked whole.
    """
    num_rows, size = similarity.shape
    num_blocks = size // block
    if size % block or num_blocks <= count:
        return _best(_rankable(similarity), count)[0]
    half = size // 2
    highest = _scratch.take("highest", num_rows * half, similarity.dtype).reshape(num_rows, half)
    np.maximum(similarity[:, :half], similarity[:, half:], out=highest)
    while half > num_blocks:
        half //= 2
        np.maximum(highest[:, :half], highest[:, half : 2 * half], out=highest[:, :half])
    chosen, is_tied = _best(_rankable(highest[:, :half]), count)
    candidates = (np.arange(0, size, num_blocks)[:, None] + chosen[:, None, :]).reshape(num_rows, -1)
    near = similarity.reshape(-1).take(candidates + np.arange(0, similarity.size, size)[:, None])
    places = np.take_along_axis(candidates, _best(_rankable(near), count)[0], -1)
    if is_tied.any():
        places[is_tied] = _best(_rankable(similarity[is_tied]), count)[0]
    return places


def _nearest(
    keys: Array, sources: Array, is_padding: Array, /, *, num_neighbors: int, width: int, height: int, block: int
) -> tuple[Array, Array]:
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    neighbors = np.empty((num_rows, num_sources, num_neighbors), dtype=np.int64)
    similarities = np.empty(neighbors.shape, dtype=keys.dtype)
    # One more entry of every direction excludes what may not be a neighbor: the product adds it.
    bias = np.full((num_rows, num_tokens + -num_tokens % width), streamed.EXCLUDED, dtype=keys.dtype)
    bias[:, :num_tokens][~is_padding] = 0
    np.put_along_axis(bias, sources, streamed.EXCLUDED, 1)
    of = np.empty((num_rows, num_sources, head_size + 1), dtype=keys.dtype)
    _normalize(np.take_along_axis(keys, sources[..., None], 1), out=of[..., :-1])
    of[..., -1] = 1

    for first in range(0, num_rows, height):
        rows = slice(first, min(first + height, num_rows))
        num = rows.stop - first
        places = np.empty((num * num_sources, 0), dtype=np.int64)
        weights = np.empty(places.shape, dtype=keys.dtype)
        for start in range(0, num_tokens, width):
            size = min(width, num_tokens - start)
            to = _scratch.take("directions", num * width * (head_size + 1), keys.dtype).reshape(num, width, -1)
            _normalize(keys[rows, start : start + size], out=to[:, :size, :-1])
            to[:, size:, :-1] = 0
            to[..., -1] = bias[rows, start : start + width]
            found = _scratch.take("products", num * num_sources * width, keys.dtype).reshape(num, num_sources, width)
            np.matmul(of[rows], to.swapaxes(1, 2), out=found)

            found = found.reshape(-1, width)
            near = _best_in_blocks(found, min(num_neighbors, width), block)
            places = np.concatenate([places, near + start], axis=-1)
            weights = np.concatenate([weights, _rankable(np.take_along_axis(found, near, -1))], axis=-1)
            if places.shape[-1] > num_neighbors:
                # Earlier tokens come first, so the lower one is kept among equals.
                best, _ = _best(weights, num_neighbors)
                places, weights = np.take_along_axis(places, best, -1), np.take_along_axis(weights, best, -1)
        order = np.argsort(-weights, axis=-1, kind="stable")
        neighbors[rows] = np.take_along_axis(places, order, -1).reshape(num, num_sources, -1)
        similarities[rows] = np.take_along_axis(weights, order, -1).reshape(num, num_sources, -1)
    return neighbors, similarities


build_graph = partial(streamed.build_graph, nearest=_nearest, block_size=16)


def segment_product(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Multiply in order of the edges."""
    return _segment_reduce(np.multiply, 1, values, index, num_segments)


def segment_sum(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Add in order of the edges."""
    return _segment_reduce(np.add, 0, values, index, num_segments)


def _segment_reduce(ufunc: np.ufunc, identity: int, values: Array, index: Array, num_segments: int) -> Array:
    rows = values.reshape(-1, values.shape[-1]) if values.size else values.reshape(0, 0)
    result = np.full((*values.shape[:-1], num_segments), identity, dtype=values.dtype)
    flat = result.reshape(-1)
    first = np.arange(rows.shape[0])[:, None] * num_segments
    ufunc.at(flat, (index.reshape(rows.shape) + first).reshape(-1), rows.reshape(-1))
    return result


def sum_rows(rows: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Add in order of the rows: a product with a sparse matrix, in which each has a 1 in the place of its slot."""
    *leading, num_rows, size = rows.shape
    shape = (*leading, num_slots, size)
    if 0 in shape or num_rows == 0:
        return np.zeros(shape, dtype=rows.dtype)
    into = into.reshape(-1, num_rows)
    goes_somewhere = into >= 0
    slot = (into + np.arange(into.shape[0])[:, None] * num_slots)[goes_somewhere]
    start = np.concatenate([[0], np.cumsum(goes_somewhere)])
    table = csc_array((np.ones(slot.size, rows.dtype), slot, start), shape=(into.shape[0] * num_slots, into.size))
    result: Array = (table @ rows.reshape(-1, size)).reshape(shape)
    return result


def to_csr(graph: Graph, /, row: tuple[int, ...] = ()) -> Any:
    """Return one row's graph as a sparse matrix, to draw or inspect it.

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
    ufunc: np.ufunc, identity: int, values: Array, index: Array, num_segments: int, /, *, backend: Backend
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


def guard(array: Array, /) -> Any:
    """Return a context in which NumPy does not warn about values: infinities and zeros are valid ones."""
    return np.errstate(all="ignore")


def refuse(array: Array, /) -> str:
    """Return the kind of an array whose operators have a different meaning, or an empty string."""
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array"
    return "a matrix" if isinstance(array, np.matrix) else ""


BACKEND = Backend(
    name="numpy",
    xp=xp,
    to_numpy=np.asarray,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
    sum_rows=sum_rows,
    build_graph=build_graph,
    guard=guard,
    refuse=refuse,
)

# NumPy arrays, propagated through SciPy's compressed columns: ``propagate(importance, graph, backend=SPARSE)``. A
# second implementation to check the dense one against, and to read next to `to_csr`.
SPARSE = replace(
    BACKEND,
    name="scipy",
    library="numpy",
    segment_product=partial(_sparse_reduce, np.multiply, 1),
    segment_sum=partial(_sparse_reduce, np.add, 0),
)
