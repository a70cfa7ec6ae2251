"""Personalized PageRank: importance that flows between tokens whose keys resemble each other."""

from __future__ import annotations

from . import checks, primitives
from .backend import Backend, PageRankStep, resolve
from .graph import normalize
from .types import Array

__all__ = ["DAMPING", "ROUNDS", "pagerank", "portable_pagerank"]

DAMPING = 0.15
# Each round divides the error by about 1 / DAMPING: ten are enough for float32.
ROUNDS = 10


def pagerank(
    importance: Array,
    keys: Array,
    /,
    *,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
    valid: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    r"""Return the centrality of every token in the complete similarity graph, with teleports to the important ones.

    With the resemblance :math:`A_{ij} = \frac{1}{2}(1 + \cos(k_i, k_j))` of all pairs of valid tokens, their own
    included, and with the importance :math:`p`, shifted so that none is negative and scaled to the sum 1,

    .. math:: c \leftarrow d\, \frac{A c}{\sum_i (A c)_i} + (1 - d)\, p

    starting at :math:`c = p`, once per round. As :math:`A c` is
    :math:`\frac{1}{2}(\sum_i c_i + \hat k_j \cdot \sum_i c_i \hat k_i)` with :math:`\hat k = k / \lVert k \rVert`, a
    round costs what it takes to read the keys: no pair is ever stored.

    Parameters
    ----------
    importance : array, shape (..., N)
        Score per token, higher = keep. Half precision and integers are widened to float32. Infinite and NaN scores stay
        as they are, and their tokens are excluded.
    keys : array, shape (..., N, D)
        Cached keys. A key whose length is zero, infinite or NaN in the arithmetic of the call has no direction: its
        cosine with any key is 0.
    damping : float
        d, in [0, 1]: how much comes from the other tokens. 0 returns the importance.
    rounds : int
        The number of rounds. 0 returns the importance.
    valid : array, shape (..., N), bool, optional
        False for padding, which is excluded and keeps its importance. Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., N)
        c times the sum of the shifted importance, so that scores keep their size; as wide as the wider of the two
        inputs. Where all shifted importance is 0, p is the same for all valid tokens and the sum counts as 1.

    Raises
    ------
    ArgumentError
        If shapes disagree or an option is out of range.
    ArgumentTypeError
        If `rounds` is not an integer, `damping` not a number, an array not real or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Notes
    -----
    Decay lowers what resembles important tokens; PageRank raises it. Without the teleport (`damping` = 1) only the keys
    count. This step is not in GraphKV's paper.

    References
    ----------
    .. [1] Page, Brin, Motwani, Winograd, "The PageRank Citation Ranking: Bringing Order to the Web", Stanford, 1999.

    Examples
    --------
    The two keys that point right support each other; the one that points up is alone and loses:

    >>> import numpy as np
    >>> from graphkv import pagerank
    >>> keys = np.asarray([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    >>> pagerank(np.asarray([1.0, 1.0, 2.0]), keys, damping=0.5, rounds=1)
    array([1.16666667, 1.16666667, 1.66666667])
    """
    backend = resolve(backend, importance=importance, keys=keys, valid=valid)
    shape = checks.numeric("importance", importance, "(..., N)", backend=backend)
    *leading, num_tokens, _ = checks.numeric("keys", keys, "(..., N, D)", backend=backend)
    checks.same_leading("keys", (*leading, num_tokens), shape, "importance")
    damping = checks.fraction("damping", damping)
    rounds = checks.count("rounds", rounds)
    xp = backend.xp
    if valid is None:
        valid = xp.ones(shape, dtype=xp.bool, device=primitives.device_of(importance))
    checks.mask("valid", valid, shape, "importance", backend=backend)
    importance, keys = primitives.widen(importance, xp=xp), primitives.widen(keys, xp=xp)
    if damping == 0 or rounds == 0:
        return xp.astype(importance, xp.result_type(importance.dtype, keys.dtype))
    step: PageRankStep = backend.pagerank or portable_pagerank
    with backend.guarded(importance):
        return step(importance, keys, valid, damping=damping, rounds=rounds, backend=backend)


def portable_pagerank(
    importance: Array, keys: Array, valid: Array, /, *, damping: float, rounds: int, backend: Backend
) -> Array:
    """Let importance flow: the specification of `pagerank`, with arguments checked and at least one round."""
    xp = backend.xp
    dtype = xp.result_type(importance.dtype, keys.dtype)
    importance, directions = xp.astype(importance, dtype), normalize(xp.astype(keys, dtype), xp=xp)
    takes_part = valid & xp.isfinite(importance)
    mask = xp.astype(takes_part, dtype)
    directions = xp.where(takes_part[..., None], directions, xp.zeros_like(directions))

    # Of an eighth, the shift cannot overflow, nor its reciprocal, which XLA divides by, be subnormal; divided by the
    # largest, the sum cannot overflow.
    eighth = xp.where(takes_part, importance, xp.zeros_like(importance)) / 8
    lowest = xp.min(eighth, axis=-1, keepdims=True) if eighth.shape[-1] else eighth
    shifted = (eighth - xp.minimum(lowest, xp.zeros_like(lowest))) * mask
    largest = xp.max(shifted, axis=-1, keepdims=True) if shifted.shape[-1] else shifted
    is_flat = ~(largest > 0)
    teleport = xp.where(is_flat, mask, shifted / _or_one(largest, backend))
    total = xp.sum(teleport, axis=-1, keepdims=True)
    teleport = teleport / _or_one(total, backend)

    central = teleport
    for left in range(rounds, 0, -1):
        anchor = central[..., None, :] @ directions
        if left > 1:
            likeness = (directions @ xp.matrix_transpose(anchor))[..., 0]
        else:
            # No matrix product in the last round: equal tokens must come out equal, whatever their position.
            likeness = xp.sum(directions * anchor, axis=-1)
        near = xp.sum(central, axis=-1, keepdims=True) + likeness
        near = xp.maximum(near, xp.zeros_like(near)) * mask
        central = damping * (near / _or_one(xp.sum(near, axis=-1, keepdims=True), backend)) + (1 - damping) * teleport
    scores = xp.where(is_flat, central, central * total * largest * 8)
    return xp.where(takes_part, scores, importance)


def _or_one(divisor: Array, backend: Backend, /) -> Array:
    """Replace 0 by 1 in a divisor."""
    return backend.xp.where(divisor > 0, divisor, backend.xp.ones_like(divisor))
