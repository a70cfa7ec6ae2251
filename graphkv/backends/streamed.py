"""`build_graph` for speed, on libraries whose arrays can be written to; the kit holds it to the portable body.

Per pair of tokens nothing is computed but the matrix product. While a chunk of similarities is in the cache it is read
once more, for the maximum of every block of tokens; only the M best blocks of a source are looked at closer. That is
exact: were one of the M best tokens in another block, each of the M chosen blocks would hold a better one. So are ties:
blocks follow each other like their tokens, and are ranked like tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from ..core import primitives
from ..core.backend import Backend
from ..core.graph import _build_graph, clip_weights
from ..core.types import Array, Graph, Namespace

__all__ = ["Native", "build_graph"]

# Tokens per block: the fewer, the more maxima to rank; the more, the more candidates.
BLOCK_SIZE = 32
# Similarities that exist at a time, over all rows: 16 MB in float32, which a last-level cache holds.
BUFFER_SIZE = 1 << 22
# Stands below every cosine.
EXCLUDED = -4.0


@dataclass(frozen=True, kw_only=True)
class Native:
    """What streaming takes from a library beyond the array API; its ``matmul`` must also know ``out=``.

    Attributes
    ----------
    normalise : callable
        ``normalise(keys, out)`` writes what `graphkv.core.graph.normalise` gives.
    smallest : callable
        As for `graphkv.core.primitives.packed_top_k`.
    take_along_axis : callable
        ``take_along_axis(x, indices, axis)``, which broadcasts the other axes of `indices`.
    """

    normalise: Callable[[Array, Array], Any]
    smallest: Callable[[Array, int], Array]
    take_along_axis: Callable[[Array, Array, int], Array]


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
    native: Native,
) -> Graph:
    """Build the graph without any array of K x N, and without a normalised copy of all keys.

    Parameters
    ----------
    keys, importance, valid, num_sources, num_neighbors, chunk_size, backend
        As for the portable body.
    native : Native

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
        similarities[rows, ...], neighbors[rows, ...] = _nearest(
            keys[rows, ...],
            sources[rows, ...],
            is_padding[rows, ...],
            num_neighbors=num_neighbors,
            width=width,
            native=native,
            xp=xp,
        )
    shape = (*leading, num_sources)
    return Graph(
        sources=xp.reshape(sources, shape),
        neighbors=xp.reshape(neighbors, (*shape, num_neighbors)),
        weights=clip_weights(xp.reshape(similarities, (*shape, num_neighbors)), xp=xp),
        num_tokens=num_tokens,
    )


def _nearest(
    keys: Array, sources: Array, is_padding: Array, /, *, num_neighbors: int, width: int, native: Native, xp: Namespace
) -> tuple[Array, Array]:
    """Find the neighbors of the sources in some rows, reading `width` tokens at a time.

    Parameters
    ----------
    keys : array, shape (R, N, D)
    sources : array, shape (R, K), int64
    is_padding : array, shape (R, N), bool

    Returns
    -------
    similarities : array, shape (R, K, M)
        `EXCLUDED` for tokens that may not be neighbors and only fill a row.
    neighbors : array, shape (R, K, M), int64
    """
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    device, block = primitives.device_of(keys), min(BLOCK_SIZE, width)
    width -= width % block
    of = xp.empty((num_rows, num_sources, head_size), dtype=keys.dtype, device=device)
    native.normalise(native.take_along_axis(keys, sources[..., None], 1), of)
    from_padding = native.take_along_axis(is_padding, sources, -1)[..., None]
    of = xp.where(from_padding, xp.zeros_like(of), of)
    bias = _bias(sources, is_padding, num_tokens + block, dtype=keys.dtype, xp=xp)
    directions = xp.empty((num_rows * width * head_size,), dtype=keys.dtype, device=device)
    products = xp.empty((num_rows * num_sources * width,), dtype=keys.dtype, device=device)

    # The best M so far; every chunk competes with them.
    similarities = xp.empty((num_rows, num_sources, 0), dtype=keys.dtype, device=device)
    neighbors = xp.empty((num_rows, num_sources, 0), dtype=sources.dtype, device=device)
    for start in range(0, num_tokens, width):
        chunk = keys[:, start : start + width, :]
        if missing := -chunk.shape[1] % block:
            nothing = xp.zeros((num_rows, missing, head_size), dtype=keys.dtype, device=device)
            chunk = xp.concat([chunk, nothing], axis=1)
        size = chunk.shape[1]
        # A block's tokens stand above each other, so that its maximum is one of whole rows.
        shape = (num_rows, block, size // block)
        chunk = xp.moveaxis(xp.reshape(chunk, (num_rows, -1, block, head_size)), 1, 2)
        to = xp.reshape(directions[: num_rows * size * head_size], (*shape, head_size))
        native.normalise(chunk, to)
        to = xp.reshape(to, (num_rows, size, head_size))
        column_bias = xp.moveaxis(xp.reshape(bias[:, start : start + size], (num_rows, -1, block)), 1, 2)
        found = xp.reshape(products[: num_rows * num_sources * size], (num_rows, num_sources, size))
        xp.matmul(of, xp.matrix_transpose(to), out=found)
        found += xp.reshape(column_bias, (num_rows, 1, size))
        found = xp.reshape(found, (num_rows, num_sources, block, size // block))

        blocks = xp.arange(size // block, dtype=sources.dtype, device=device)
        _, best = _best(xp.max(found, axis=-2), blocks, num_neighbors, native=native, xp=xp)
        near = xp.matrix_transpose(native.take_along_axis(found, best[..., None, :], -1))
        tokens = start + best[..., None] * block + xp.arange(block, dtype=sources.dtype, device=device)
        similarities, neighbors = _best(
            xp.concat([similarities, xp.reshape(near, (num_rows, num_sources, -1))], axis=-1),
            xp.concat([neighbors, xp.reshape(tokens, (num_rows, num_sources, -1))], axis=-1),
            num_neighbors,
            native=native,
            xp=xp,
        )
    return similarities, neighbors


def _bias(sources: Array, is_padding: Array, num_columns: int, /, *, dtype: Any, xp: Namespace) -> Array:
    """Give what to add to similarities: 0, or minus infinity where a token may not be a neighbor or does not exist."""
    num_rows, num_tokens = is_padding.shape
    device = primitives.device_of(sources)
    bias = xp.full((num_rows, num_columns), -xp.inf, dtype=dtype, device=device)
    bias[:, :num_tokens] = xp.where(is_padding, bias[:, :num_tokens], xp.zeros_like(bias[:, :num_tokens]))
    first = xp.arange(num_rows, dtype=sources.dtype, device=device)[:, None] * num_columns
    xp.reshape(bias, (-1,))[xp.reshape(first + sources, (-1,))] = -xp.inf
    return bias


def _best(
    similarity: Array, places: Array, count: int, /, *, native: Native, xp: Namespace
) -> tuple[Array, Array]:
    """Take the best `count`: by edge weight, then what may be a neighbor before what may not, then by place.

    Returns
    -------
    similarity : array, shape (..., min(count, n))
        Clipped to a weight, or `EXCLUDED`.
    places : array, shape (..., min(count, n))
    """
    weight = xp.where(similarity < -2, xp.full_like(similarity, EXCLUDED), clip_weights(similarity, xp=xp))
    count = min(count, weight.shape[-1])
    if weight.dtype == xp.float32:
        # The bits of weights, read as integers, are in the order of the weights; `EXCLUDED` comes below.
        order = -xp.astype(weight.view(xp.int32), xp.int64)
        best = native.smallest((order << 32) | places, count)
        return xp.astype(-(best >> 32), xp.int32).view(xp.float32), best & 0xFFFFFFFF
    # Stable, so equal weights must stand in the order of their places.
    places = xp.broadcast_to(places, weight.shape)
    by_place = xp.argsort(places, axis=-1)
    weight, places = (native.take_along_axis(x, by_place, -1) for x in (weight, places))
    best = primitives.top_k(weight, count, xp=xp)
    return native.take_along_axis(weight, best, -1), native.take_along_axis(places, best, -1)
