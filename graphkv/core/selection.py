"""Step 3: fill the budget from the scores."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks, primitives
from .backend import Backend, SelectStep, resolve
from .precision import Precision
from .types import Array, Namespace

__all__ = ["Choice", "select", "select_in_tiers", "select_per_head", "tiers_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Who stays.

    Attributes
    ----------
    kept : array, shape (batch, kv_heads, b), int64
        Positions of the kept tokens, ascending. Where rows keep different numbers, b is what the widest may keep and a
        row ends with -1.
    counts : array, shape (batch, kv_heads), integer, or None
        Number of kept tokens per row, where they differ.
    levels : array, shape (batch, kv_heads, b), integer, or None
        How far each kept token is demoted: 0 as it is, 1 and more in fewer bits. None: all as they are.
    precisions : tuple of Precision
        How tokens of level 1, 2 and so on are stored.
    """

    kept: Array
    counts: Array | None = None
    levels: Array | None = None
    precisions: tuple[Precision, ...] = ()


def select(
    scores: Array,
    budget: int,
    /,
    *,
    protected: Array | None = None,
    valid: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    """Select the tokens to keep: exactly `budget` per row.

    Protected valid tokens come first, then other valid tokens, then invalid ones. Within each group the higher score
    comes first, equal scores by lower token index, NaN last.

    Parameters
    ----------
    scores : array, shape (..., N)
        Higher = keep. Half precision and integers are widened to float32.
    budget : int
        B, tokens to keep per row. More than N keeps all N.
    protected : array, shape (..., N), bool, optional
        Tokens to keep before all others. Default: none.
    valid : array, shape (..., N), bool, optional
        False for padding. Default: all True.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., min(budget, N)), int64
        Positions of the kept tokens, ascending, without duplicates.

    Raises
    ------
    ArgumentError
        If shapes disagree or `budget` is negative.
    ArgumentTypeError
        If `budget` is not an integer, `scores` not real or a mask not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    References
    ----------
    .. [1] Li, Jin, Zhang, "GraphKV", arXiv:2509.00388, section on selection under the budget.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import select
    >>> select(np.asarray([0.5, 2.0, 2.0, 1.0]), 2, protected=np.asarray([True, False, False, False]))
    array([0, 1])
    """
    backend = resolve(backend, scores=scores, protected=protected, valid=valid)
    shape = checks.numeric("scores", scores, "(..., N)", backend=backend)
    budget = min(checks.count("budget", budget), shape[-1])
    xp = backend.xp
    if protected is not None:
        checks.mask("protected", protected, shape, "scores", backend=backend)
    if valid is not None:
        checks.mask("valid", valid, shape, "scores", backend=backend)
    step: SelectStep = backend.select or portable_select
    with backend.guarded(scores):
        return step(primitives.widen(scores, xp=xp), budget, protected, valid, backend=backend)


def portable_select(
    scores: Array, budget: int, protected: Array | None, valid: Array | None, /, *, backend: Backend
) -> Array:
    """Rank and sort: the specification of `select`, with arguments checked and widened, and at most N to keep."""
    tiers = tiers_of(scores, protected, valid, xp=backend.xp)
    return backend.xp.sort(primitives.top_k(scores, budget, tiers, backend=backend), axis=-1)


def select_per_head(
    scores: Array, budgets: Array, width: int, protected: Array | None, valid: Array | None, /, *, backend: Backend
) -> Array:
    """Select a different number of tokens in every row.

    Parameters
    ----------
    scores : array, shape (..., N), float32 or wider
    budgets : array, shape (...), integer in [0, width]
    width : int
        At most N. The most that a row may keep; shapes cannot depend on `budgets`.
    protected, valid : array, shape (..., N), bool, or None
        As in `select`.

    Returns
    -------
    array, shape (..., width), int64
        In each row the positions of its kept tokens, ascending, then -1.
    """
    return select_in_tiers(scores, budgets, width, tiers_of(scores, protected, valid, xp=backend.xp), backend=backend)


def select_in_tiers(scores: Array, counts: Array, width: int, tiers: Array, /, *, backend: Backend) -> Array:
    """Select a different number of tokens in every row, in the order of tiers and then of scores.

    Parameters
    ----------
    scores : array, shape (..., N), float32 or wider
    counts : array, shape (...), integer in [0, width]
    width : int
        At most N.
    tiers : array, shape (..., N), int32
        0, 1, 2 or 3, the lowest first.

    Returns
    -------
    array, shape (..., width), int64
        As of `select_per_head`.
    """
    xp = backend.xp
    ranked = primitives.top_k(scores, width, tiers, backend=backend)
    place = xp.arange(width, dtype=ranked.dtype, device=primitives.device_of(scores))
    place = xp.reshape(place, (*(1 for _ in counts.shape), -1))
    is_kept = place < xp.astype(counts, ranked.dtype)[..., None]
    # Unused slots sort behind every position.
    kept = xp.sort(xp.where(is_kept, ranked, xp.full_like(ranked, scores.shape[-1])), axis=-1)
    return xp.where(is_kept, kept, xp.full_like(kept, -1))


def tiers_of(scores: Array, protected: Array | None, valid: Array | None, /, *, xp: Namespace) -> Array:
    """Return the tiers, which rank before the scores: 0 protected, 1 others, 2 padding."""
    tiers = xp.ones(scores.shape, dtype=xp.int32, device=primitives.device_of(scores))
    if protected is not None:
        tiers = xp.where(protected, xp.zeros_like(tiers), tiers)
    if valid is not None:
        tiers = xp.where(valid, tiers, xp.full_like(tiers, 2))
    return tiers
