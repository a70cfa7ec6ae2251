"""`build_graph` for speed, on libraries whose arrays can be written to; the kit checks it against the portable body.

Per pair of tokens, nothing but the matrix product is computed. While a chunk of similarities is in the cache it is read
once more, for the maximum of every block of tokens; only the M best blocks of a source are ranked. That is exact: if
one of the M best tokens were in a different block, each of the M chosen blocks would hold a better one. Ties are exact
too, in a way of each library's own.

This module has what the libraries share: how rows and tokens are cut up. The inner loops are native to each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ..core import primitives
from ..core.backend import Backend
from ..core.graph import clip_weights, portable_build_graph
from ..core.types import Array, Graph

__all__ = ["EXCLUDED", "build_graph"]

# Similarities that exist at a time, and entries of directions: 8 MB each in float32, which a last-level cache holds.
BUFFER_SIZE = 1 << 21
# Many threads share four times as much, of which each has what its core's own cache holds.
TOTAL_SIZE, SMALLEST = 1 << 23, 1 << 18
# On a device every operation of a loop is a launch, and memory is plentiful: 256 MB.
DEVICE_BUFFER_SIZE = 1 << 26
# Fewer tokens at a time leave a product too small to fill a device, or to be worth a thread.
NARROWEST = 1024
# A place shares an integer with a similarity: half of its bits.
PLACES = 1 << 32
# Added to the similarity of what may not be a neighbor. Cosines are not always within [-1, 1]: where the squares of a
# key are subnormal, its length comes out far too short. None of them reaches half of this.
EXCLUDED = -(2.0**100)


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
    nearest: Callable[..., tuple[Array, Array]],
    block_size: int,
    on_device: bool = False,
    num_threads: int = 1,
) -> Graph:
    """Build the graph without any array of K x N, and without a normalized copy of all keys.

    Parameters
    ----------
    keys, importance, valid, num_sources, num_neighbors, chunk_size, backend
        As for the portable body.
    nearest : callable
        ``nearest(keys, sources, is_padding, num_neighbors=, width=, height=, block=)`` finds, for keys (R, N, D),
        sources (R, K) and padding (R, N), the neighbors (R, K, M) and their similarities. At a time it computes `width`
        of these per source, a multiple of `block`, for the sources of `height` rows; the last chunk is filled up. Of
        equal weights the lower place ranks first; padding, sources and what fills up rank last.
    block_size : int
        Tokens per block. Fewer mean more maxima to rank, more mean more candidates.
    on_device : bool
        Whether operations are launched on a device: then few large ones, of all rows where these fit.
    num_threads : int
        How many threads `nearest` gives parts to: each has buffers of its own, and there are as many parts where these
        are large enough.

    Returns
    -------
    Graph
    """
    *leading, num_tokens, head_size = keys.shape
    num_rows = prod(leading)
    if num_rows * num_sources * num_neighbors * head_size == 0 or num_tokens > PLACES:
        return portable_build_graph(
            keys,
            importance,
            valid,
            num_sources=num_sources,
            num_neighbors=num_neighbors,
            chunk_size=chunk_size,
            backend=backend,
        )
    xp = backend.xp
    keys = xp.reshape(keys, (num_rows, num_tokens, head_size))
    is_padding = xp.reshape(~valid, (num_rows, num_tokens))
    importance = xp.reshape(importance, (num_rows, num_tokens))
    if backend.select is None or on_device:
        sources = xp.sort(primitives.top_k(importance, num_sources, is_padding, backend=backend), axis=-1)
    else:
        sources = backend.select(importance, num_sources, None, ~is_padding, backend=backend)

    # Entries per token: its similarities, and its direction.
    per_token = max(num_sources, head_size + 1)
    buffer_size = DEVICE_BUFFER_SIZE if on_device else min(BUFFER_SIZE, max(SMALLEST, TOTAL_SIZE // num_threads))
    width = min(chunk_size, max(block_size, buffer_size // per_token))
    if on_device:
        width = min(width, max(block_size, NARROWEST, buffer_size // (per_token * num_rows)))
    block = min(block_size, width, num_tokens)
    width -= width % block
    # Chunks of one size, so that equal keys meet the same kernel of the product; the last is filled up.
    num_chunks = -(-num_tokens // width)
    if num_rows < num_threads:
        num_chunks = max(num_chunks, min(-(-num_threads // num_rows), num_tokens // NARROWEST))
    width = block * -(-num_tokens // (num_chunks * block))
    height = min(-(-num_rows // num_threads), max(1, buffer_size // (per_token * width)))
    neighbors, similarities = nearest(
        keys, sources, is_padding, num_neighbors=num_neighbors, width=width, height=height, block=block
    )
    shape = (*leading, num_sources)
    return Graph(
        sources=xp.reshape(sources, shape),
        neighbors=xp.reshape(neighbors, (*shape, num_neighbors)),
        weights=clip_weights(xp.reshape(similarities, (*shape, num_neighbors)), xp=xp),
        num_tokens=num_tokens,
    )
