"""NumPy, and the graph as a SciPy sparse matrix."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from scipy.sparse import csr_array

from ..core import primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.types import Array, Graph, Namespace

__all__ = ["BACKEND", "to_csr"]

# A packed key holds, from high to low bits: tier (2), score (32), token index (29).
INDEX_BITS = 29
INDEX_MASK = (1 << INDEX_BITS) - 1


def top_k(scores: Array, k: int, /, tiers: Array | None = None, *, xp: Namespace) -> Array:
    """Rank by unique integer keys, so that an unstable partial sort is exact."""
    if scores.dtype != np.float32 or k == 0 or scores.shape[-1] > INDEX_MASK:
        return primitives.top_k(scores, k, tiers, xp=xp)
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0
    # Monotone in the score; NaN below minus infinity.
    bits = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    bits = np.where(np.isnan(scores), np.int32(-(2**31)), bits)
    key = (np.int64(2**31 - 1) - bits) << INDEX_BITS | np.arange(scores.shape[-1])
    if tiers is not None:
        key |= tiers.astype(np.int64) << (32 + INDEX_BITS)
    best = np.partition(key, k - 1, axis=-1)[..., :k]
    best.sort(axis=-1)
    return best & INDEX_MASK


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
    source, edge = np.nonzero(weights > 0)
    return csr_array(
        (weights[source, edge], (source, neighbors[source, edge])), shape=(weights.shape[0], graph.num_tokens)
    )


BACKEND = Backend(
    name="numpy",
    xp=xp,
    to_numpy=np.asarray,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
)
