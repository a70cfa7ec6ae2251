"""`build_graph` for speed, on libraries that write into arrays; the kit holds it to the portable body.

Per pair of tokens nothing is computed but the matrix product. While a chunk of similarities is in the cache it is read
once more, for the maximum of every block; only the M best blocks of a source are looked at closer. That is exact: were
one of the M best tokens in another block, each of the M chosen blocks would hold a better one. Ties too: blocks stand
in the order of their tokens, and are ranked like tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ..core import primitives
from ..core.backend import Backend
from ..core.graph import _build_graph, clip_weights
from ..core.types import Array, Graph, Namespace

__all__ = ["build_graph"]

# Tokens per block: the fewer, the more maxima to rank; the more, the more candidates.
BLOCK_SIZE = 32
# Similarities that exist at a time, over all rows: 16 MB in float32, which a last-level cache holds.
BUFFER_SIZE = 1 << 22


def build_graph(
    keys: Array,
    importance: Array,
    valid: Array,
    /,
    *,
    num_sources: int,
    num_neighbors: int,
    chunk_size: int,
    backend: Backend,
    normalise: Callable[[Array], Array],
) -> Graph:
    """Build the graph without any array of K x N, and without a normalised copy of all keys.

    Parameters
    ----------
    keys, importance, valid, num_sources, num_neighbors, chunk_size, backend
        As for the portable body. The backend's arrays can be written to, and its ``matmul`` takes ``out=``.
    normalise : callable
        `graphkv.core.graph.normalise` in few passes.

    Returns
    -------
    Graph
    """
    *leading, num_tokens, head_size = keys.shape
    num_rows = prod(leading)
    if num_rows * num_sources * num_neighbors * head_size == 0:
        return _build_graph(
            keys,
            importance,
            valid,
            num_sources=num_sources,
            num_neighbors=num_neighbors,
            chunk_size=chunk_size,
            backend=backend,
        )
    xp, top_k, device = backend.xp, backend.top_k or primitives.top_k, primitives.device_of(keys)
    keys = xp.reshape(keys, (num_rows, num_tokens, head_size))
    is_padding = xp.reshape(~valid, (num_rows, num_tokens))
    sources = top_k(xp.reshape(importance, (num_rows, num_tokens)), num_sources, is_padding, xp=xp)
    sources = xp.sort(sources, axis=-1)

    neighbors = xp.empty((num_rows, num_sources, num_neighbors), dtype=sources.dtype, device=device)
    similarities = xp.empty(neighbors.shape, dtype=keys.dtype, device=device)
    width = min(chunk_size, num_tokens, max(BLOCK_SIZE, BUFFER_SIZE // num_sources))
    height = max(1, BUFFER_SIZE // (num_sources * width))
    for first in range(0, num_rows, height):
        rows = slice(first, first + height)
        neighbors[rows, ...], similarities[rows, ...] = _nearest(
            keys[rows, ...],
            sources[rows, ...],
            is_padding[rows, ...],
            num_neighbors=num_neighbors,
            width=width,
            backend=backend,
            normalise=normalise,
        )
    shape = (*leading, num_sources)
    return Graph(
        sources=xp.reshape(sources, shape),
        neighbors=xp.reshape(neighbors, (*shape, num_neighbors)),
        weights=clip_weights(xp.reshape(similarities, (*shape, num_neighbors)), xp=xp),
        num_tokens=num_tokens,
    )


def _nearest(
    keys: Array,
    sources: Array,
    is_padding: Array,
    /,
    *,
    num_neighbors: int,
    width: int,
    backend: Backend,
    normalise: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """Find the neighbors of the sources in some rows, reading `width` tokens at a time.

    Parameters
    ----------
    keys : array, shape (R, N, D)
    sources : array, shape (R, K), int64
    is_padding : array, shape (R, N), bool

    Returns
    -------
    neighbors : array, shape (R, K, M), int64
    similarities : array, shape (R, K, M)
        Minus infinity for tokens that may not be neighbors and fill a row.
    """
    xp, top_k, device = backend.xp, backend.top_k or primitives.top_k, primitives.device_of(keys)
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    from_padding = xp.take_along_axis(is_padding, sources, axis=-1)[..., None]
    of = normalise(primitives.take_rows(keys, sources, xp=xp))
    of = xp.where(from_padding, xp.zeros_like(of), of)
    block = min(BLOCK_SIZE, width)
    width -= width % block
    bias = _bias(sources, is_padding, num_tokens + block, dtype=keys.dtype, xp=xp)
    buffer = xp.empty((num_rows * num_sources * width,), dtype=keys.dtype, device=device)

    # The best M so far; every chunk competes with them.
    neighbors = xp.zeros((*sources.shape, 0), dtype=sources.dtype, device=device)
    similarities = xp.zeros(neighbors.shape, dtype=keys.dtype, device=device)
    for start in range(0, num_tokens, width):
        to = normalise(keys[:, start : start + width, :])
        if missing := -to.shape[1] % block:
            nothing = xp.zeros((num_rows, missing, head_size), dtype=keys.dtype, device=device)
            to = xp.concat([to, nothing], axis=1)
        size = to.shape[1]
        # Columns such that a block's tokens lie above each other: (..., block, size / block).
        to = xp.reshape(xp.moveaxis(xp.reshape(to, (num_rows, -1, block, head_size)), 1, 2), to.shape)
        column_bias = xp.moveaxis(xp.reshape(bias[:, start : start + size], (num_rows, -1, block)), 1, 2)
        found = xp.reshape(buffer[: num_rows * num_sources * size], (num_rows, num_sources, size))
        xp.matmul(of, xp.matrix_transpose(to), out=found)
        found += xp.reshape(column_bias, (num_rows, 1, size))
        found = xp.reshape(found, (num_rows, num_sources, block, size // block))

        highest = _rankable(xp.max(found, axis=-2), xp=xp)
        # Ascending, so that candidates stand in the order of their tokens.
        best = xp.sort(top_k(highest, min(num_neighbors, size // block), xp=xp), axis=-1)
        near = xp.matrix_transpose(xp.take_along_axis(found, best[..., None, :], axis=-1))
        tokens = start + best[..., None] * block + xp.arange(block, dtype=sources.dtype, device=device)
        shape = (num_rows, num_sources, -1)
        similarities = xp.concat([similarities, _rankable(xp.reshape(near, shape), xp=xp)], axis=-1)
        neighbors = xp.concat([neighbors, xp.reshape(tokens, shape)], axis=-1)
        best = top_k(similarities, min(num_neighbors, similarities.shape[-1]), xp=xp)
        similarities = xp.take_along_axis(similarities, best, axis=-1)
        neighbors = xp.take_along_axis(neighbors, best, axis=-1)
    return neighbors, similarities


def _bias(sources: Array, is_padding: Array, num_columns: int, /, *, dtype: Any, xp: Namespace) -> Array:
    """Give what to add to similarities: 0, or minus infinity where a token may not be a neighbor or does not exist."""
    num_rows, num_tokens = is_padding.shape
    device = primitives.device_of(sources)
    bias = xp.full((num_rows, num_columns), -xp.inf, dtype=dtype, device=device)
    bias[:, :num_tokens] = xp.where(is_padding, bias[:, :num_tokens], xp.zeros_like(bias[:, :num_tokens]))
    first = xp.arange(num_rows, dtype=sources.dtype, device=device)[:, None] * num_columns
    xp.reshape(bias, (-1,))[xp.reshape(first + sources, (-1,))] = -xp.inf
    return bias


def _rankable(similarity: Array, /, *, xp: Namespace) -> Array:
    """Clip to weights, which makes ties of what is equal as a weight; minus infinity stays behind them all."""
    return xp.where(similarity < -2, similarity, clip_weights(similarity, xp=xp))
