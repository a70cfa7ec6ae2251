"""KVMerger: runs of neighbors with similar keys become one slot each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import budgets, checks, primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.graph import normalize
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.merging import Merge, add_up, shares, slots
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.selection import Choice
from ..core.types import Array
from .h2o import H2O
from .merging import at_slots, masses, of_kept

__all__ = ["KVMerger", "joined", "pivots_of"]


def joined(keys: Array, is_open: Array, unions: Array, /, *, threshold: float, backend: Backend) -> Array:
    """Mark the tokens that join the set of the token before: the most similar pairs of neighbors.

    Parameters
    ----------
    keys : array, shape (..., N, D)
    is_open : array, shape (..., N), bool
        Tokens that may be in a set with others.
    unions : array, shape (..., 1), integer
        How many pairs to join, where there are as many.
    threshold : float
        Only pairs of a higher cosine are joined.
    backend : Backend

    Returns
    -------
    array, shape (..., N), bool
        Of equal cosines the earlier pair joins.
    """
    xp, num_tokens = backend.xp, keys.shape[-2]
    directions = normalize(keys, xp=xp)
    before = xp.concat([xp.zeros_like(directions[..., :1, :]), directions[..., : num_tokens - 1, :]], axis=-2)
    cosine = xp.sum(directions * before, axis=-1)
    after_open = xp.concat([xp.zeros_like(is_open[..., :1]), is_open[..., : num_tokens - 1]], axis=-1)
    may_join = is_open & after_open & (cosine > threshold)
    place = xp.argsort(primitives.top_k(cosine, num_tokens, ~may_join, backend=backend), axis=-1)
    return may_join & (xp.astype(place, unions.dtype) < unions)


def pivots_of(joins: Array, scores: Array, /, *, backend: Backend) -> Array:
    """Return for every token the one of its set that scores highest, the earlier one of equals.

    Parameters
    ----------
    joins : array, shape (..., N), bool
        As `joined` returns them: sets are runs.
    scores : array, shape (..., N)

    Returns
    -------
    array, shape (..., N), int64
    """
    xp, num_tokens = backend.xp, scores.shape[-1]
    order = primitives.top_k(scores, num_tokens, None, backend=backend)
    number = xp.cumulative_sum(xp.astype(~joins, order.dtype), axis=-1, dtype=order.dtype) - 1
    # Best first within each set, and sets are runs: a set's best token now stands at the place of its first one.
    by_set = xp.argsort(xp.take_along_axis(number, order, axis=-1), axis=-1, stable=True)
    best = xp.take_along_axis(order, by_set, axis=-1)
    sizes = add_up(xp.ones(scores.shape, dtype=scores.dtype, device=primitives.device_of(scores)), number, num_tokens,
                   backend=backend)  # fmt: skip
    sizes = xp.astype(sizes, order.dtype)
    first = xp.cumulative_sum(sizes, axis=-1, dtype=order.dtype) - sizes
    return xp.take_along_axis(best, xp.take_along_axis(first, number, axis=-1), axis=-1)


@dataclass(frozen=True)
class KVMerger(Wrapper):
    r"""Any policy, with runs of neighbors merged until the budget is met, in place of tokens dropped.

    Pairs of neighbors are joined from the most similar keys on, until as many sets are left as the budget has room for.
    The token of a set :math:`S` with the highest score is its pivot :math:`p`, whose place the slot has:

    .. math:: g_i = e^{-\lVert k_p - k_i \rVert^2 / (2 \sigma^2)}, \qquad
              k = \frac{\sum_S g_i k_i}{\sum_S g_i}, \qquad v = \frac{\sum_S g_i v_i}{\sum_S g_i} .

    Protected tokens and the highest-scoring others stay as they are. Where too few pairs may be joined, the sets with
    the lowest-scoring pivots are gone.

    Parameters
    ----------
    base : Policy
        Where scores, protection and the budget come from.
    heavy : int or float
        Tokens of the highest scores that stay as they are, or their share of the tokens; never more than the budget.
    threshold : float
        In [-1, 1]. Only neighbors whose keys have a higher cosine are joined. Default: no condition.
    sigma : float, optional
        Width of the Gaussian. Default: the mean distance of the set's keys from its pivot, over the root of 2.
    mass : str
        ``"count"``: a slot counts as the tokens in it. ``"values"``: its value is multiplied by their number, and it
        counts as one, as in the paper. ``"one"``: neither.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Joining the most similar pairs until n are left is the paper's scan with its threshold at the similarity of the last
    pair, so that the size is exact; the paper lets its threshold decide. Sets are chains: their ends may differ.

    The paper prints :math:`\sigma = \sum g / (\sqrt 2 |S|)`, which is below .71 and merges next to nothing, but reports
    widths near 5: read with distances in place of :math:`g`, the default here gives those. It prints shares of recent
    and heavy tokens in per cent that only add up as fractions. Layers that it leaves alone are `PerLayer`'s affair.
    There is no public code. Neighbors are neighbors in the cache: after an eviction, what lay between them may be gone.

    References
    ----------
    .. [1] Wang et al., "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks",
       arXiv:2407.08454.

    Examples
    --------
    Tokens 0 and 1 are joined; token 1 scores higher and is the pivot:

    >>> import numpy as np
    >>> from graphkv import Given, KVMerger, evict
    >>> keys = np.asarray([[[[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]])
    >>> base = Given(budget=2, importance=np.asarray([[[1.0, 3.0, 2.0]]]))
    >>> done = evict(KVMerger(base, heavy=0), keys)
    >>> done.kept, done.merge.into, done.mass
    (array([[[1, 2]]]), array([[[0, 0, 1]]]), array([[[2., 1.]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(merges=True)

    heavy: int | float = 0.02
    threshold: float = -1.0
    sigma: float | None = None
    mass: str = "count"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ratio_or_count("heavy", self.heavy)
        checks.cosine("threshold", self.threshold)
        if self.sigma is not None and checks.finite_weight("sigma", self.sigma) == 0:
            raise ArgumentError(f"sigma must be above 0; got {self.sigma}")
        checks.choice("mass", self.mass, ("count", "one", "values"))

    @classmethod
    def paper(cls, budget: int, /, *, heavy: float = 0.12, num_recent: int = 0) -> KVMerger:
        """Return the paper's choices: attention summed over all queries, a width of 5, values times the number.

        Parameters
        ----------
        budget : int
            Tokens to keep per KV head.
        heavy : float
            0.12 of the tokens at half of them, 0.02 at 35 percent.
        num_recent : int
            0.17 and 0.08 of the tokens.

        Returns
        -------
        KVMerger
        """
        base = H2O(budget=budget, num_recent=num_recent, group_reduction="sum")
        return cls(base, heavy=heavy, threshold=0.75, sigma=5.0, mass="values")

    def needs(self) -> Requirements:
        """Return the needs of the base; no masses unless tokens are counted."""
        return replace(self.requirements, masses=self.mass == "count").joined(self.base.needs())

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Find the sets, and rank all but their pivots last."""
        xp, backend, found = layer.xp, layer.backend, self.base.rescore(found, layer, budget)
        scores, is_open = found.scores, layer.valid
        if found.protected is not None:
            is_open = is_open & ~found.protected
        room = max(0, budget - self.base.protection(budget).count)
        heavy = min(budgets.count_of(self.heavy, layer.num_tokens), room)
        best = primitives.top_k(scores, heavy, ~is_open, backend=backend)
        ones = xp.ones(best.shape, dtype=scores.dtype, device=primitives.device_of(scores))
        is_heavy = primitives.segment_sum(ones, best, layer.num_tokens, backend=backend) > 0
        unions = xp.sum(xp.astype(layer.valid, best.dtype), axis=-1, keepdims=True, dtype=best.dtype) - budget
        joins = joined(layer.keys, is_open & ~is_heavy, unions, threshold=self.threshold, backend=backend)
        pivots = pivots_of(joins, scores, backend=backend)
        place = xp.arange(layer.num_tokens, dtype=pivots.dtype, device=primitives.device_of(scores))
        is_pivot = pivots == xp.broadcast_to(place, pivots.shape)
        return replace(found, scores=xp.where(is_pivot, scores, xp.full_like(scores, -xp.inf)), pivots=pivots)

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge | None:
        """Send each token to the pivot of its set, if that stays."""
        if found.pivots is None:
            return None
        xp, backend, num_slots = layer.xp, layer.backend, choice.kept.shape[-1]
        own = slots(choice.kept, layer.num_tokens, backend=backend)
        into = xp.where(own >= 0, own, xp.take_along_axis(own, found.pivots, axis=-1))
        into = xp.where(layer.valid | (own >= 0), into, xp.full_like(into, -1))
        keys = xp.where(layer.valid[..., None], layer.keys, xp.zeros_like(layer.keys))
        away = keys - primitives.take_rows(keys, found.pivots, xp=xp)
        square, count = xp.sum(away * away, axis=-1), masses(layer)
        if self.sigma is None:
            distance = add_up(xp.sqrt(square), into, num_slots, backend=backend)
            number = add_up(xp.ones_like(square), into, num_slots, backend=backend)
            # Twice the square of sigma is the square of the mean distance.
            width = at_slots(distance / xp.maximum(number, xp.ones_like(number)), into, layer) ** 2
        else:
            width = xp.full_like(square, 2 * self.sigma**2)
        gauss = xp.exp(-square / xp.where(width > 0, width, xp.ones_like(width)))
        part = shares(count * gauss, into, num_slots, backend=backend)
        total, mass = add_up(count, into, num_slots, backend=backend), of_kept(count, own, num_slots, layer)
        times = xp.ones_like(count)
        if self.mass == "values":
            times = at_slots(total / xp.where(mass > 0, mass, xp.ones_like(mass)), into, layer)
        return Merge(
            into=into, key_weights=part, value_weights=part * times, mass=total if self.mass == "count" else mass
        )

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compare neighbors, and every token with its pivot: 10 D. In memory: places of the pivots' keys."""
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        return self.base.cost(shape).then(Cost(10 * entries, 8 * entries))
