"""Step 1: link the most important tokens to the tokens whose keys resemble theirs."""

from __future__ import annotations

from math import prod

from . import checks, primitives
from .backend import Backend, BuildGraphStep, resolve
from .types import Array, Graph, Namespace

__all__ = ["build_graph", "clip_weights", "normalize", "portable_build_graph"]

# Similarities are computed for this many tokens at a time by default, and in no more than 16 chunks.
CHUNK_SIZE = 4096
# Entries of the largest array of the portable body: 256 MB of the widest kind, int64, whatever the batch.
LARGEST = 1 << 25


def default_chunk_size(num_tokens: int, /) -> int:
    """Return for how many tokens similarities are computed at a time by default."""
    return max(CHUNK_SIZE, -(-num_tokens // 16))


def build_graph(
    keys: Array,
    importance: Array,
    /,
    *,
    num_sources: int,
    num_neighbors: int,
    valid: Array | None = None,
    chunk_size: int | None = None,
    backend: Backend | str | None = None,
) -> Graph:
    r"""Link the most important tokens to the tokens whose keys are most similar.

    The sources are the K valid tokens of highest importance. The weight of the edge from source :math:`i` to token
    :math:`j` is

    .. math:: w_{ij} = \min(1, \max(0, \cos(k_i, k_j))),

    and the neighbors of a source are its M tokens of highest weight among the valid tokens that are not sources.
    Among equal values the lower token index comes first. NaN importance ranks below every number.

    Parameters
    ----------
    keys : array, shape (..., N, D)
        Cached keys. A key whose length is zero, infinite or NaN in the arithmetic of the call has only edges of
        weight 0.
    importance : array, shape (..., N)
        Score per token, higher = more important.
    num_sources : int
        K, clipped to N.
    num_neighbors : int
        M, clipped to N - K.
    valid : array, shape (..., N), bool, optional
        False for padding. Default: all True.
    chunk_size : int, optional
        At most K x `chunk_size` similarities exist per row at a time. The result does not depend on it. Default: 4096,
        or N / 16 where that is more.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    Graph
        On the device of `keys`, weights in float32 or wider. A row with fewer valid tokens than K, or fewer eligible
        tokens than M, is filled up with edges of weight 0.

    Raises
    ------
    ArgumentError
        If shapes disagree or a count is negative.
    ArgumentTypeError
        If a count is not an integer, an array is not real or `valid` is not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Notes
    -----
    Sources never decay each other: the method figure of the paper draws edges from sources to other tokens only, while
    its formula lets :math:`j` run over all tokens. Negative similarities are not edges. Both are our reading.

    References
    ----------
    .. [1] Li, Jin, Zhang, "GraphKV", arXiv:2509.00388, section on graph construction.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import build_graph
    >>> keys = np.asarray([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> graph = build_graph(keys, np.asarray([9.0, 1.0, 2.0]), num_sources=1, num_neighbors=1)
    >>> graph.sources, graph.neighbors, graph.weights
    (array([0]), array([[2]]), array([[0.6]]))
    """
    backend = resolve(backend, keys=keys, importance=importance, valid=valid)
    *leading, num_tokens, _ = checks.numeric("keys", keys, "(..., N, D)", backend=backend)
    shape = (*leading, num_tokens)
    checks.same_leading(
        "importance", checks.numeric("importance", importance, "(..., N)", backend=backend), shape, "keys"
    )
    if valid is not None:
        checks.mask("valid", valid, shape, "importance", backend=backend)
    num_sources = min(checks.count("num_sources", num_sources), num_tokens)
    num_neighbors = min(checks.count("num_neighbors", num_neighbors), num_tokens - num_sources)
    if chunk_size is None:
        chunk_size = default_chunk_size(num_tokens)
    chunk_size = checks.count("chunk_size", chunk_size, minimum=1)
    xp = backend.xp
    if valid is None:
        valid = xp.ones(shape, dtype=xp.bool, device=primitives.device_of(keys))
    step: BuildGraphStep = backend.build_graph or portable_build_graph
    with backend.guarded(keys):
        return step(
            primitives.widen(keys, xp=xp),
            primitives.widen(importance, xp=xp),
            valid,
            num_sources=num_sources,
            num_neighbors=num_neighbors,
            chunk_size=chunk_size,
            backend=backend,
        )


def portable_build_graph(
    keys: Array,
    importance: Array,
    valid: Array,
    /,
    *,
    num_sources: int,
    num_neighbors: int,
    chunk_size: int,
    backend: Backend,
) -> Graph:
    """Link tokens chunk by chunk: the specification of `build_graph`, with arguments checked, widened and clipped."""
    xp = backend.xp
    (*leading, num_tokens, head_size), num_rows = keys.shape, prod(keys.shape[:-2])
    per_row = max(num_sources * (min(chunk_size, num_tokens) + num_neighbors), num_tokens * head_size)
    height = max(1, LARGEST // max(1, per_row))
    if num_rows > height:
        # Rows have nothing to do with each other.
        keys = xp.reshape(keys, (num_rows, num_tokens, head_size))
        importance, valid = (xp.reshape(x, (num_rows, num_tokens)) for x in (importance, valid))
        graphs = [
            portable_build_graph(
                *(x[first : first + height, ...] for x in (keys, importance, valid)),
                num_sources=num_sources,
                num_neighbors=num_neighbors,
                chunk_size=chunk_size,
                backend=backend,
            )
            for first in range(0, num_rows, height)
        ]
        shape = (*leading, num_sources)
        return Graph(
            sources=xp.reshape(xp.concat([each.sources for each in graphs]), shape),
            neighbors=xp.reshape(xp.concat([each.neighbors for each in graphs]), (*shape, num_neighbors)),
            weights=xp.reshape(xp.concat([each.weights for each in graphs]), (*shape, num_neighbors)),
            num_tokens=num_tokens,
        )
    device = primitives.device_of(keys)

    sources = xp.sort(primitives.top_k(importance, num_sources, ~valid, backend=backend), axis=-1)
    directions = normalize(keys, xp=xp)
    source_directions = primitives.take_rows(directions, sources, xp=xp)
    is_valid_source = xp.take_along_axis(valid, sources, axis=-1)[..., None]

    # The best M neighbors so far; every chunk competes with them.
    neighbors = xp.zeros((*sources.shape, 0), dtype=sources.dtype, device=device)
    weights = xp.zeros(neighbors.shape, dtype=keys.dtype, device=device)
    excluded = xp.zeros(neighbors.shape, dtype=xp.bool, device=device)
    # Chunks of one size: then equal keys seldom meet another order of summation.
    width = -(-num_tokens // max(1, -(-num_tokens // chunk_size)))
    for start in range(0, num_tokens, max(1, width)):
        stop = min(start + width, num_tokens)
        tokens = xp.arange(start, stop, dtype=sources.dtype, device=device)
        # With as many axes as the sources: not every library adds axes by itself (jax_numpy_rank_promotion).
        is_source = xp.any(sources[..., None] == xp.reshape(tokens, (*(1 for _ in sources.shape), -1)), axis=-2)
        may_be_neighbor = (valid[..., start:stop] & ~is_source)[..., None, :]

        similarity = source_directions @ xp.matrix_transpose(directions[..., start:stop, :])
        edge = clip_weights(similarity, xp=xp)
        edge = xp.where(may_be_neighbor & is_valid_source, edge, xp.zeros_like(edge))

        # Earlier chunks come first, so a stable ranking keeps the lower token index among equals.
        neighbors = xp.concat([neighbors, xp.broadcast_to(tokens, edge.shape)], axis=-1)
        weights = xp.concat([weights, edge], axis=-1)
        excluded = xp.concat([excluded, xp.broadcast_to(~may_be_neighbor, edge.shape)], axis=-1)
        best = primitives.top_k(weights, min(num_neighbors, weights.shape[-1]), excluded, backend=backend)
        neighbors = xp.take_along_axis(neighbors, best, axis=-1)
        weights = xp.take_along_axis(weights, best, axis=-1)
        excluded = xp.take_along_axis(excluded, best, axis=-1)
    return Graph(sources=sources, neighbors=neighbors, weights=weights, num_tokens=num_tokens)


def clip_weights(similarity: Array, /, *, xp: Namespace) -> Array:
    """Clip cosines to edge weights in [0, 1]; NaN becomes 0."""
    zero, one = xp.zeros_like(similarity), xp.ones_like(similarity)
    return xp.where(similarity > 0, xp.minimum(similarity, one), zero)


def normalize(keys: Array, /, *, xp: Namespace) -> Array:
    """Scale every key to length one; a key without a direction becomes zero."""
    square = xp.sum(keys * keys, axis=-1, keepdims=True)
    # By the square: a compiler reduces the root of a single square to the number itself, whose range is different. And
    # a root has no slope at 0, so unusable squares are replaced before it is taken.
    usable = (square > 0) & xp.isfinite(square)
    length = xp.sqrt(xp.where(usable, square, xp.ones_like(square)))
    return xp.where(usable, keys / length, xp.zeros_like(keys))
