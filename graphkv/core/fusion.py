"""The degree signal: importance fused with how much a key resembles all the others."""

from __future__ import annotations

from collections.abc import Callable

from . import checks, primitives
from .backend import Backend, DegreeStep, DistanceStep, FuseStep, resolve
from .errors import ArgumentError
from .graph import normalize
from .types import Array, Namespace

__all__ = ["EXPONENT", "FUSIONS", "degree", "distance", "fuse", "portable_degree", "portable_distance", "portable_fuse"]

# A lower bound, so that duplicates of everything else keep their order by importance; an upper one, so that 0 stays 0.
SMALLEST_POWER, LARGEST_POWER = 1e-24, 1e24
EXPONENT = 8


def degree(keys: Array, /, *, valid: Array | None = None, backend: Backend | str | None = None) -> Array:
    r"""Return the mean cosine of every key with all the keys of its row.

    This is the degree of a token in the complete similarity graph, its own loop included, as a share of the largest
    possible degree. With :math:`\hat k = k / \lVert k \rVert` and the mean direction
    :math:`m = \frac{1}{N} \sum_i \hat k_i` of the valid tokens,

    .. math:: c_j = \frac{1}{N} \sum_i \cos(k_j, k_i) = \hat k_j \cdot m,

    at a cost linear in N: no edge is ever stored.

    Parameters
    ----------
    keys : array, shape (..., N, D)
        Cached keys. A key whose length is zero, infinite or NaN in the arithmetic of the call has no direction: its
        cosine with any key is 0.
    valid : array, shape (..., N), bool, optional
        False for padding, which is excluded from the mean. Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., N)
        float32 or wider, in [-1, 1]; 0 where `valid` is False.

    Raises
    ------
    ArgumentError
        If shapes disagree.
    ArgumentTypeError
        If `keys` is not real or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Notes
    -----
    KeyDiff also divides by the length of m, which does not change the order within a row. It is left out here: where
    the keys have no common direction, every degree is near 0, and the quotient would consist of rounding errors.
    GraphKV's paper has no such signal.

    References
    ----------
    .. [1] Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
       Resource-Constrained Environments", arXiv:2504.15364, for the anchor in place of all pairs.

    Examples
    --------
    Three keys point right, one up, so the mean direction is (3/4, 1/4):

    >>> import numpy as np
    >>> from graphkv import degree
    >>> degree(np.asarray([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    array([0.75, 0.75, 0.25, 0.75])
    """
    backend, valid = _checked(keys, valid, backend)
    step: DegreeStep = backend.degree or portable_degree
    with backend.guarded(keys):
        return step(primitives.widen(keys, xp=backend.xp), valid, backend=backend)


def portable_degree(keys: Array, valid: Array, /, *, backend: Backend) -> Array:
    """Compare keys with their mean: the specification of `degree`, with arguments checked and widened."""
    xp = backend.xp
    directions, mean, _ = _mean_direction(keys, valid, xp=xp)
    # Not a matrix product: equal keys must have equal degrees, whatever their position.
    found = xp.sum(directions * mean[..., None, :], axis=-1)
    return xp.minimum(xp.maximum(found, xp.full_like(found, -1.0)), xp.ones_like(found))


def distance(keys: Array, /, *, valid: Array | None = None, backend: Backend | str | None = None) -> Array:
    r"""Compute the mean distance of every key from all keys, one minus the cosine, without forming a pair.

    One minus the `degree`, to the last digits of a small number as well: with the mean direction :math:`m` and
    :math:`\hat k = k / \lVert k \rVert`,

    .. math:: d_j = \tfrac{1}{2} \lVert \hat k_j - m \rVert^2
              + \tfrac{1}{2} \frac{1}{n} \sum_i \lVert \hat k_i - m \rVert^2

    Parameters
    ----------
    keys : array, shape (..., N, D)
        Half precision and integers are widened to float32.
    valid : array, shape (..., N), bool, optional
        False for padding. Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., N), float32 or wider
        d, in [0, 2]. 1 for padding, and for keys without a direction.

    Raises
    ------
    ArgumentError
        If shapes disagree.
    ArgumentTypeError
        If `keys` is not real or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import distance
    >>> distance(np.asarray([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    array([0.25, 0.25, 0.75, 0.25])
    """
    backend, valid = _checked(keys, valid, backend)
    step: DistanceStep = backend.distance or portable_distance
    with backend.guarded(keys):
        return step(primitives.widen(keys, xp=backend.xp), valid, backend=backend)


def portable_distance(keys: Array, valid: Array, /, *, backend: Backend) -> Array:
    """Compare keys with their mean: the specification of `distance`, with arguments checked and widened."""
    xp = backend.xp
    directions, mean, num_valid = _mean_direction(keys, valid, xp=xp)
    has_direction = xp.any(directions != 0, axis=-1)
    counted = xp.astype(valid, keys.dtype)
    # One minus the cosine would cancel where all keys are nearly the same. And not a matrix product: equal keys must
    # have equal distances, whatever their position.
    apart = directions - mean[..., None, :]
    square = xp.sum(apart * apart, axis=-1)
    spread = xp.sum(square * counted, axis=-1, keepdims=True) / num_valid
    without = xp.sum(xp.astype(valid & ~has_direction, keys.dtype), axis=-1, keepdims=True) / num_valid
    found = xp.where(has_direction, (square + (spread + without)) / 2, xp.ones_like(square))
    return xp.minimum(found, xp.full_like(found, 2.0))


def _checked(keys: Array, valid: Array | None, backend: Backend | str | None, /) -> tuple[Backend, Array]:
    """Check the arguments of `degree` and `distance`, and make a mask where there is none."""
    backend = resolve(backend, keys=keys, valid=valid)
    *leading, num_tokens, _ = checks.numeric("keys", keys, "(..., N, D)", backend=backend)
    shape = (*leading, num_tokens)
    if valid is None:
        valid = backend.xp.ones(shape, dtype=backend.xp.bool, device=primitives.device_of(keys))
    checks.mask("valid", valid, shape, "the tokens of keys", backend=backend)
    return backend, valid


def _mean_direction(keys: Array, valid: Array, /, *, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return directions, zero for padding, their mean (..., D) over the valid tokens, and how many these are."""
    directions = normalize(keys, xp=xp)
    directions = xp.where(valid[..., None], directions, xp.zeros_like(directions))
    num_valid = xp.sum(xp.astype(valid, keys.dtype), axis=-1, keepdims=True)
    num_valid = xp.maximum(num_valid, xp.ones_like(num_valid))
    return directions, xp.sum(directions, axis=-2) / num_valid, num_valid


def fuse(
    importance: Array,
    degree: Array | None = None,
    /,
    *,
    distance: Array | None = None,
    fusion: str = "power",
    exponent: int = EXPONENT,
    valid: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    r"""Score tokens by their importance and by their distance from the others, :math:`d_j = 1 - c_j`.

    ``"power"``
        :math:`s_j^{\prime} = (s_j - \min(0, \min_i s_i))\, d_j^p`. Importance that is nowhere negative is left
        unchanged; otherwise the lowest of the row becomes 0. The minimum is over finite importance, and the power is
        bounded by 1e-24 and 1e24.
    ``"max_rank"``
        the higher of two ranks: of the importance, and of :math:`d`. So the best by either are kept.
    ``"mean_rank"``
        the mean of the two.

    Ranks run from 1, the worst valid token of the row, to the number of valid tokens, the best. They follow the order
    used everywhere: the higher value is better, of equal values the one with the lower token index, and NaN is worse
    than every number. So no two tokens have the same rank, and ranks are the same on every backend.

    Parameters
    ----------
    importance : array, shape (..., N)
        Score per token, higher = keep. Half precision and integers are widened to float32. Infinite and NaN scores stay
        as they are under ``"power"``.
    degree : array, shape (..., N), optional
        c, from `degree`. Clipped to [-1, 1]; NaN counts as 0.
    distance : array, shape (..., N), optional
        d, from `distance`, in place of the degree: with all its digits where the keys are nearly the same. Clipped to
        [0, 2]; NaN counts as 1.
    fusion : str
        ``"power"``, ``"max_rank"`` or ``"mean_rank"``.
    exponent : int
        p, at least 1, for ``"power"``; ignored for ranks.
    valid : array, shape (..., N), bool, optional
        The tokens among which to rank. The others are excluded from minima and ranks, and keep their importance.
        Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., N)
        Scores, as wide as the wider of the two inputs.

    Raises
    ------
    ArgumentError
        If shapes disagree, an option is unknown or out of range, or there is not one of `degree` and `distance`.
    ArgumentTypeError
        If `exponent` is not an integer, an array not real or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Notes
    -----
    The power is computed first, by repeated multiplication. In float32 ranks and their means are exact for rows of up
    to 8 million tokens. This step is not in GraphKV's paper.

    Examples
    --------
    The three most important tokens resemble each other:

    >>> import numpy as np
    >>> from graphkv import fuse
    >>> importance, degree = np.asarray([8.0, 6.0, 4.0, 2.0]), np.asarray([0.5, 0.5, 0.5, 0.0])
    >>> fuse(importance, degree, exponent=2)
    array([2. , 1.5, 1. , 2. ])
    >>> fuse(importance, degree, fusion="max_rank")
    array([4., 3., 2., 4.])
    >>> fuse(importance, degree, fusion="mean_rank")
    array([3.5, 2.5, 1.5, 2.5])
    """
    backend = resolve(backend, importance=importance, degree=degree, distance=distance, valid=valid)
    shape = checks.numeric("importance", importance, "(..., N)", backend=backend)
    if (degree is None) == (distance is None):
        raise ArgumentError(f"degree or distance must be given; got {'neither' if degree is None else 'both'}")
    name, given, least = ("degree", degree, -1.0) if distance is None else ("distance", distance, 0.0)
    checks.same_leading(name, checks.numeric(name, given, "(..., N)", backend=backend), shape, "importance")
    fusion = checks.choice("fusion", fusion, FUSIONS)
    exponent = checks.count("exponent", exponent, minimum=1)
    xp = backend.xp
    if valid is None:
        valid = xp.ones(shape, dtype=xp.bool, device=primitives.device_of(importance))
    checks.mask("valid", valid, shape, "importance", backend=backend)
    step: FuseStep = backend.fuse or portable_fuse
    with backend.guarded(importance):
        score, found = primitives.widen(importance, xp=xp), primitives.widen(given, xp=xp)
        # Before the subtraction, which rounds.
        found = xp.astype(found, xp.result_type(score.dtype, found.dtype))
        found = xp.where(xp.isnan(found), xp.full_like(found, least + 1), found)
        found = xp.minimum(xp.maximum(found, xp.full_like(found, least)), xp.full_like(found, least + 2))
        return step(
            score,
            1 - found if distance is None else found,
            valid,
            fusion=fusion,
            exponent=exponent,
            backend=backend,
        )


def portable_fuse(
    importance: Array, distance: Array, valid: Array, /, *, fusion: str, exponent: int, backend: Backend
) -> Array:
    """Fuse importance and distance: the specification of `fuse`, with arguments checked, widened and clipped."""
    xp = backend.xp
    dtype = xp.result_type(importance.dtype, distance.dtype)
    importance, distance = xp.astype(importance, dtype), xp.astype(distance, dtype)
    scores = FUSIONS[fusion](importance, distance, valid, exponent=exponent, backend=backend)
    return xp.where(valid, scores, importance)


def power(importance: Array, distance: Array, valid: Array, /, *, exponent: int, backend: Backend) -> Array:
    """Multiply the shifted importance by a power of the distance."""
    xp = backend.xp
    smallest, largest = xp.full_like(distance, SMALLEST_POWER), xp.full_like(distance, LARGEST_POWER)
    factor = distance
    for number in range(1, exponent + 1):
        if number > 1:
            factor = factor * distance
        # A power that has passed a bound stays beyond it, and of distances up to 2 none overflows between two looks.
        if number % 32 == 0 or number == exponent:
            factor = xp.minimum(xp.maximum(factor, smallest), largest)
    # Zeros may replace the others, because the minimum includes 0 anyway.
    number = xp.where(valid & xp.isfinite(importance), importance, xp.zeros_like(importance))
    lowest = xp.min(number, axis=-1, keepdims=True) if number.shape[-1] else number
    return (importance - xp.minimum(lowest, xp.zeros_like(lowest))) * factor


def max_rank(importance: Array, distance: Array, valid: Array, /, *, exponent: int, backend: Backend) -> Array:
    """Return the higher rank."""
    return backend.xp.maximum(_rank(importance, valid, backend), _rank(distance, valid, backend))


def mean_rank(importance: Array, distance: Array, valid: Array, /, *, exponent: int, backend: Backend) -> Array:
    """Return the mean of the ranks."""
    return (_rank(importance, valid, backend) + _rank(distance, valid, backend)) / 2


FUSIONS: dict[str, Callable[..., Array]] = {"power": power, "max_rank": max_rank, "mean_rank": mean_rank}


def _rank(values: Array, valid: Array, backend: Backend, /) -> Array:
    """Rank the valid tokens of every row, from 1 for the worst."""
    xp = backend.xp
    place = xp.argsort(primitives.top_k(values, values.shape[-1], ~valid, backend=backend), axis=-1)
    num_valid = xp.sum(xp.astype(valid, place.dtype), axis=-1, keepdims=True)
    return xp.astype(num_valid - place, values.dtype)
