"""Ada-KV: heads whose attention is spread out keep more tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import budgets, checks, primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape
from ..core.needs import name_of
from ..core.policy import Assessment, Policy, Requirements, Wrapper
from ..core.selection import Choice, select_per_head
from ..core.types import Array

__all__ = ["AdaKV", "code_head_budgets", "head_budgets"]


def head_budgets(
    scores: Array, budget: int, least: Array, protected: Array, valid: Array, /, *, backend: Backend
) -> Array:
    """Share a layer's budget out over its heads: to each its least, the rest to the best tokens of all heads.

    Parameters
    ----------
    scores : array, shape (batch, kv_heads, N), float32 or wider
        Comparable between heads.
    budget : int
        Tokens per head on average, at most N.
    least : array, shape (batch, kv_heads), integer in [0, budget]
        Tokens that a head always gets.
    protected, valid : array, shape (batch, kv_heads, N), bool
        Protected tokens come first and padding last.

    Returns
    -------
    array, shape (batch, kv_heads), int64
        The sum over the heads is exactly kv_heads x budget.
    """
    xp = backend.xp
    num_tokens = scores.shape[-1]
    # Order within a head: 0 protected, 1 others, 2 padding.
    tiers = xp.astype(~protected, xp.int32) + xp.astype(~valid, xp.int32)
    tiers = xp.where(valid, tiers, xp.full_like(tiers, 2))
    place = xp.argsort(primitives.top_k(scores, num_tokens, tiers, backend=backend), axis=-1)
    forced = place < xp.astype(least, place.dtype)[..., None]
    # Over all heads: 0 forced, 1 others; 2 and 3 the same among padding, so that filling up spreads over the heads.
    tiers = xp.astype(~forced, xp.int32) + 2 * xp.astype(~valid, xp.int32)
    return _count_best(scores, budget, tiers, backend=backend)


def code_head_budgets(
    scores: Array, budget: int, share: float, protected: Array, valid: Array, num_protected: int, /, *, backend: Backend
) -> Array:
    """Return the head budgets of the official code, whose sum may miss kv_heads x budget.

    With C the budget less the protected tokens, a head that has c of the best C x kv_heads tokens gets round(c (1 -
    share) + floor(share C)), ties to even, in addition to its protected tokens.

    Returns
    -------
    array, shape (batch, kv_heads), int64
    """
    xp = backend.xp
    past = max(0, budget - num_protected)
    tiers = xp.where(valid & ~protected, xp.zeros_like(scores), xp.ones_like(scores))
    counts = _count_best(scores, past, xp.astype(tiers, xp.int32), backend=backend)
    # float32, as in the official code.
    blended = xp.astype(counts, xp.float32) * (1 - share) + int(past * share)
    kept = xp.astype(xp.round(blended), xp.int64) + min(budget, num_protected)
    return xp.minimum(kept, xp.full_like(kept, scores.shape[-1]))


def _count_best(scores: Array, budget: int, tiers: Array, /, *, backend: Backend) -> Array:
    """Count each head's tokens among the best budget x kv_heads of the layer: ties by head, then by index."""
    xp = backend.xp
    batch, kv_heads, num_tokens = scores.shape
    flat = (batch, kv_heads * num_tokens)
    best = primitives.top_k(xp.reshape(scores, flat), kv_heads * budget, xp.reshape(tiers, flat), backend=backend)
    head = best // num_tokens
    return xp.stack([xp.sum(xp.astype(head == h, xp.int64), axis=-1) for h in range(kv_heads)], axis=-1)


@dataclass(frozen=True)
class AdaKV(Wrapper):
    r"""Any policy, with the layer's budget shared out over its KV heads.

    A head's budget is what it holds of the best tokens of all heads together, but not less than its protected tokens
    and a share of the rest. In every row the heads' budgets add up to exactly kv_heads x budget.

    Parameters
    ----------
    base : Policy
        Where importance, protection and the layer's budget come from.
    floor : float
        In [0, 1]. Of the tokens that an average head may choose, the share that every head chooses, rounded down. 1
        gives all heads the same.
    schedule : str
        ``"exact"``, or ``"code"``: budgets are a blend, rounded per head as in the official code, and may miss the sum
        by some tokens; of a layer with little to choose, they may even exceed N and are cut there.

    Raises
    ------
    ArgumentError
        If an option is out of range, or the base has a choice of its own, as `Shared` and `Lossless` do.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    `Eviction.kept` is padded with -1 to what one head may keep at most, min(N, kv_heads x budget), and
    `Eviction.counts` has shape (batch, kv_heads). Between equal scores the lower head wins, then the lower index.
    A head with fewer valid tokens than its least gives the rest to others, and padding fills what is left.

    Scores are compared between heads, so they should mean the same in each: sums of probabilities do, norms or logits
    do not. ``GraphKV(AdaKV(base))`` shares out by the base's scores, ``AdaKV(GraphKV(base))`` by those after
    propagation.

    The exact form forces every head's least first and fills up with the best of the rest. The paper and the official
    code blend: (1 - floor) times the count without a floor, plus the floor. Both favor the same heads; where a floor
    does not bind, the exact form is the optimum without a floor, and the blend is not. The official code's selection
    per query head (without its GQA option), its scaling of scores by head, and the uniform first layers of later
    versions are not expressed.

    References
    ----------
    .. [1] Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
       Inference", arXiv:2407.11550.

    Examples
    --------
    Two heads with a budget of 2 each. The best four scores are 9, 8, 7 and 6, all in the first head; half of 2 is the
    floor, so the second head keeps 1:

    >>> import numpy as np
    >>> from graphkv import AdaKV, KNorm, evict
    >>> norms = np.asarray([[[1.0, 4.0, 3.0, 2.0], [5.0, 7.0, 6.0, 8.0]]])
    >>> done = evict(AdaKV(KNorm(budget=2), floor=0.5), norms[..., None])
    >>> done.counts
    array([[3, 1]])
    >>> done.kept
    array([[[ 0,  2,  3, -1],
            [ 0, -1, -1, -1]]])
    """

    requirements: ClassVar[Requirements] = Requirements(couples_heads=True, head_counts=True)

    floor: float = 0.2
    schedule: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("floor", self.floor)
        checks.choice("schedule", self.schedule, ("exact", "code"))
        if self.base.chooses():
            raise ArgumentError(f"base must choose by its scores alone; {name_of(self.base)} has a choice of its own")

    @classmethod
    def official(cls, base: Policy, /) -> AdaKV:
        """Return the official code's choice: its blend with a floor of 0.2, rounded per head.

        The official base is ``SnapKV.official(budget)`` with a mean over the window, which orders tokens alike.

        Parameters
        ----------
        base : Policy
            Where importance, protection and the layer's budget come from.

        Returns
        -------
        AdaKV

        Raises
        ------
        ArgumentTypeError
            If `base` is not a Policy.
        """
        return cls(base, floor=0.2, schedule="code")

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Compare the heads by the base's scores."""
        found, xp = self.base.rescore(found, layer, budget), layer.xp
        protected = xp.zeros_like(layer.valid) if found.protected is None else found.protected & layer.valid
        num_protected = self.protection(budget).count
        if self.schedule == "code":
            counts = code_head_budgets(
                found.scores, budget, self.floor, protected, layer.valid, num_protected, backend=layer.backend
            )
            return replace(found, counts=counts)
        share = budgets.share_of(self.floor, max(0, budget - num_protected))
        least = xp.sum(xp.astype(protected, xp.int64), axis=-1) + share
        least = xp.minimum(least, xp.full_like(least, budget))
        counts = head_budgets(found.scores, budget, least, protected, layer.valid, backend=layer.backend)
        return replace(found, counts=counts)

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Fill the budget of every head, which may be all that the heads have together."""
        if found.counts is None:
            raise ArgumentError(f"counts must come from AdaKV.rescore; got none from {type(found).__name__}")
        width = min(layer.num_tokens, layer.keys.shape[1] * budget)
        kept = select_per_head(found.scores, found.counts, width, found.protected, layer.valid, backend=layer.backend)
        return Choice(kept=kept, counts=found.counts)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Rank all tokens of the layer by 64-bit indices."""
        return self.base.cost(shape).then(Cost(bytes=8 * shape.batch * shape.kv_heads * shape.num_tokens))
