"""ReFreeKV (DBudgetKV): the smallest budget that leaves the last query's attention almost as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks, primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.layer import Layer
from ..core.needs import has_rows, name_of
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.selection import Choice, select_in_tiers, tiers_of
from ..core.types import Array, Namespace
from . import attention

__all__ = ["Lossless", "smallest_counts"]


def smallest_counts(rows: Array, order: Array, tolerance: float, /, *, backend: Backend) -> Array:
    r"""Count how many of the best tokens hold the norm of an attention row but for a tolerance.

    .. math:: \operatorname{mean}_h \lVert a_h \text{ of the first } c \text{ of } h \rVert_2 \ge
              (1 - T) \operatorname{mean}_h \lVert a_h \rVert_2

    Parameters
    ----------
    rows : array, shape (batch, kv_heads, groups, N), float32 or wider
        a, the attention of one query in each query head.
    order : array, shape (batch, kv_heads, N), integer
        The tokens of each KV head, the best first.
    tolerance : float
        T in [0, 1).

    Returns
    -------
    array, shape (batch,), int64
        The smallest c, one for all heads of a row; N if the row is 0 or NaN everywhere.
    """
    xp, num_tokens = backend.xp, rows.shape[-1]
    place = xp.broadcast_to(order[:, :, None, :], tuple(rows.shape))
    squares = xp.take_along_axis(rows * rows, place, axis=-1)
    # Entry c - 1: the norm of what the first c hold. One pass over the tokens, however many counts there are.
    norms = xp.mean(xp.sqrt(_sums_so_far(squares, xp=xp)), axis=(1, 2))
    whole = norms[:, -1:]
    is_enough = (norms >= (1 - tolerance) * whole) & (whole > 0)
    short = xp.sum(xp.astype(~is_enough, xp.int64), axis=-1)
    return xp.minimum(short + 1, xp.full_like(short, num_tokens))


def _sums_so_far(squares: Array, /, *, xp: Namespace) -> Array:
    """Add along the last axis in whole numbers: no sum falls, and none depends on a device's order of additions."""
    if xp.int64 == xp.int32:
        # The widest integers of JAX, by default. They are too narrow, and its sums have one order.
        return xp.cumulative_sum(squares, axis=-1)
    highest = xp.max(squares, axis=-1, keepdims=True)
    # Infinity and NaN are no whole numbers; a row with one of them is NaN.
    usable = xp.where((highest > 0) & xp.isfinite(highest), highest, xp.ones_like(highest))
    scale = 2.0 ** (62 - squares.shape[-1].bit_length())
    whole = xp.astype(xp.where(xp.isfinite(squares), squares / usable, xp.zeros_like(squares)) * scale, xp.int64)
    sums = xp.astype(xp.cumulative_sum(whole, axis=-1), squares.dtype) / scale * usable
    return xp.where(xp.isfinite(highest), sums, xp.full_like(sums, xp.nan))


@dataclass(frozen=True)
class Lossless(Wrapper):
    r"""Any policy, keeping only as many of its best tokens as the last query's attention needs.

    Tokens go in the order of the base's scores, the worst first, and the same number in every KV head, as long as the
    attention row of the newest query loses at most the share `tolerance` of its Euclidean norm:

    .. math:: 1 - \frac{\sum_h \lVert a_h \text{ of the tokens kept in } h \rVert_2}{\sum_h \lVert a_h \rVert_2}
              \le T

    So each row of a batch and each layer finds a budget of its own. That of the base is the most that any may keep; a
    budget of 1.0, a share, is no bound.

    Parameters
    ----------
    base : Policy
        Where the order, protection and the largest budget come from. ``Lossless(GraphKV(base))`` goes by the scores
        after propagation and measures by the attention itself.
    tolerance : float
        T in [0, 1). 0 lets only tokens go that get no attention.

    Raises
    ------
    ArgumentError
        If `tolerance` is outside [0, 1), or the base has a choice of its own, as `AdaKV` and `Shared` do. When
        evicting without the newest query or its attention.
    ArgumentTypeError
        If `base` is not a Policy or `tolerance` not a number.

    Notes
    -----
    `Eviction.counts` says how many tokens each row keeps, `Eviction.budget` how many it might have. Protected tokens
    are never fewer than the base protects. A row whose attention is 0 everywhere keeps all. In float32, attention whose
    square is lost in the sum counts as 0.

    Norms are averaged over the query heads. The public code also has a cut per head, other norms and a bisection; here
    the cumulative form of its rule for the last query is exact, and one cut serves a layer. The paper's own order is by
    position, ``Lossless(StreamingLLM(budget=1.0))``. It reports 1% as a tolerance for all tasks, the example of the
    code 5%.

    To keep one set for all heads, put `Shared` on top: ``Shared(Lossless(base))`` finds the budget for its order.

    References
    ----------
    .. [1] Ni et al., "DBudgetKV: Dynamic Budget in KV Cache Compression for Ensuring Optimal Performance" (later:
       "ReFreeKV"), arXiv:2502.16886.

    Examples
    --------
    The newest query gives .6, .0, .8 and .0 of a norm of 1. Without token 0 four fifths of it would be left, and a
    tolerance of .2 allows that:

    >>> import numpy as np
    >>> from graphkv import Given, Lossless, evict
    >>> row = np.asarray([[[[0.6, 0.0, 0.8, 0.0]]]])
    >>> base = Given(budget=1.0, importance=np.asarray([[[3.0, 2.0, 4.0, 1.0]]]))
    >>> for tolerance in (0.0, 0.19, 0.2):
    ...     evict(Lossless(base, tolerance), np.ones((1, 1, 4, 2)), attention=row).counts.tolist()
    [[2]]
    [[2]]
    [[1]]
    """

    requirements: ClassVar[Requirements] = Requirements(queries="window", couples_heads=True, automatic=True)

    tolerance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if checks.finite_weight("tolerance", self.tolerance) >= 1:
            raise ArgumentError(f"tolerance must lie in [0, 1); got {self.tolerance}")
        if self.base.chooses():
            raise ArgumentError(
                f"base must choose by its scores alone; {name_of(self.base)} has a choice of its own, put that on top"
            )

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base uses, and at least the newest."""
        return max(self.base.num_queries(num_tokens), min(1, num_tokens))

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Find each row's budget, and fill it."""
        if not has_rows(layer):
            # With a base that remembers, the door asks for the queries of new positions only.
            raise ArgumentError("queries must hold the last position for Lossless; got none")
        xp, backend = layer.xp, layer.backend
        tiers = tiers_of(found.scores, found.protected, layer.valid, xp=xp)
        order = primitives.top_k(found.scores, layer.num_tokens, tiers, backend=backend)
        rows = attention.last_rows(layer, 1)[..., 0, :]
        counts = smallest_counts(rows, order, self.tolerance, backend=backend)
        if found.protected is not None:
            held = xp.sum(xp.astype(found.protected & layer.valid, xp.int64), axis=-1)
            counts = xp.maximum(counts, xp.max(held, axis=-1))
        counts = xp.minimum(counts, xp.full_like(counts, budget))
        counts = xp.asarray(xp.broadcast_to(counts[:, None], tuple(layer.valid.shape[:2])), copy=True)
        return Choice(kept=select_in_tiers(found.scores, counts, budget, tiers, backend=backend), counts=counts)
