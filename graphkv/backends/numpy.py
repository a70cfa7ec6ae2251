"""NumPy, and the graph as a SciPy sparse matrix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from scipy.sparse import csc_array, csr_array

from ..core import primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.selection import portable_select
from ..core.types import Array, Graph
from . import host, streamed

__all__ = ["BACKEND", "SPARSE", "to_csr"]


def _smallest(keys: Array, k: int, /) -> Array:
    best = np.partition(keys, k - 1, axis=-1)[..., :k]
    best.sort(axis=-1)
    return best


top_k = partial(primitives.packed_top_k, bits=lambda x: x.view(np.int32), smallest=_smallest)


def select(scores: Array, budget: int, protected: Array | None, valid: Array | None, /, *, backend: Backend) -> Array:
    """Select by one partial sort where nothing ranks before the scores, as is the case for the sources of a graph."""
    *leading, num_tokens = scores.shape
    has_tiers = protected is not None or not (valid is None or valid.all())
    if has_tiers or scores.size * budget == 0 or np.isnan(scores).any():
        return portable_select(scores, budget, protected, valid, backend=backend)
    return host.best(scores.reshape(-1, num_tokens), budget)[0].reshape(*leading, budget)


def _multiply(of: Array, to: Array, buffer: Array, /) -> Array:
    # OpenBLAS takes a quarter less than for all tokens of one source after the other.
    return np.matmul(to, of.swapaxes(1, 2), out=buffer.reshape(*to.shape[:2], -1))


def _highest(products: Array, size: int, /) -> Array:
    num_rows, _, num_sources = products.shape
    return products.reshape(num_rows, -1, size, num_sources).max(axis=2).swapaxes(1, 2)


def _take(products: Array, blocks: Array, size: int, /) -> Array:
    num_rows, num_tokens, num_sources = products.shape
    first = np.arange(num_rows)[:, None] * (num_tokens * num_sources) + np.arange(num_sources)
    places = blocks * (size * num_sources) + first[..., None]
    return products.reshape(-1).take(places[..., None] + np.arange(0, size * num_sources, num_sources))


PASSES = host.Passes(
    length=lambda keys: np.sqrt(np.vecdot(keys, keys)),
    divide=np.divide,
    multiply=_multiply,
    highest=_highest,
    take=_take,
)
_nearest = partial(host.nearest, passes=PASSES)
build_graph = partial(streamed.build_graph, nearest=_nearest, block_size=32)


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
    select=select,
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
