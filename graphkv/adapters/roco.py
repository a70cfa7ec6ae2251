"""RoCo: evict what is attended to little on average, among the tokens whose attention hardly varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..core import budgets, checks, primitives
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Policy, Requirements
from ..core.protection import Protection
from ..core.types import Array
from . import attention, running

__all__ = ["RoCo", "deviation"]

STATE = ("attention", "queries", "squares")


def deviation(mean: Array, mean_square: Array, /, *, xp: Any) -> Array:
    """Standard deviation from the mean and the mean square, 0 where rounding leaves a negative variance.

    Parameters
    ----------
    mean, mean_square : array, shape (..., N)

    Returns
    -------
    array, shape (..., N)
    """
    variance = mean_square - mean * mean
    return xp.sqrt(xp.where(variance > 0, variance, xp.zeros_like(variance)))


def moments(memory: Memory | None, /, *, xp: Any) -> tuple[Array, Array]:
    """Return the mean and the mean square of the attention to each token so far."""
    sums = running.sums_of(memory)
    queries = xp.where(sums["queries"] > 0, sums["queries"], xp.ones_like(sums["queries"]))
    return sums["attention"] / queries, sums["squares"] / queries


@dataclass(frozen=True, kw_only=True)
class Varying(Protection):
    """Protection of the tokens whose attention varies most, besides sinks and recents.

    Parameters
    ----------
    varying : int
        Their number.
    """

    varying: int = 0

    @property
    def count(self) -> int:
        """Tokens that are protected in a row without padding."""
        return self.first + self.last + self.window + self.varying

    def mask(self, layer: Layer, memory: Memory | None = None, /) -> Array:
        """Mark sinks and recents, then the highest deviations."""
        xp = layer.xp
        always = super().mask(layer, memory)
        always = xp.zeros_like(layer.valid) if always is None else always
        tiers = xp.astype(~always, xp.int32) + xp.astype(~layer.valid, xp.int32)
        spread = deviation(*moments(memory, xp=xp), xp=xp)
        chosen = primitives.top_k(spread, min(self.count, layer.num_tokens), tiers, backend=layer.backend)
        ones = xp.ones(chosen.shape, dtype=spread.dtype, device=primitives.device_of(spread))
        marks = primitives.segment_sum(ones, chosen, layer.num_tokens, backend=layer.backend)
        return layer.valid & (marks > 0)


@dataclass(frozen=True, kw_only=True)
class RoCo(Policy):
    r"""Evict the tokens of lowest mean attention among those whose attention varies least.

    With :math:`a_{ij}` the attention of query :math:`i` to token :math:`j`, averaged over the query heads of the KV
    head, and :math:`c_j` the number of queries that could see the token,

    .. math::

        \mu_j = \frac{1}{c_j} \sum_i a_{ij}, \qquad
        \sigma_j = \sqrt{\max\left(0, \frac{1}{c_j} \sum_i a_{ij}^2 - \mu_j^2\right)}.

    The tokens of highest :math:`\sigma` are still in use and stay; the rest of the budget goes by :math:`\mu`, the
    importance. In the paper's words: the lowest :math:`\mu` is evicted inside the feasible set of lowest
    :math:`\sigma`. The two criteria do not need one number: who stays for its :math:`\sigma` is a mask of protected
    tokens, and selection ranks by :math:`\mu` below it.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, all others below included; a float is a share of the tokens.
    num_varying : int or float
        Tokens outside the feasible set, as a number or a share of the budget: sinks and recents first, then those of
        highest deviation. Never fewer than sinks and recents.
    num_sinks, num_recent : int
        First and newest tokens that are outside the feasible set, whatever their deviation.
    block_size : int
        Queries whose attention is in memory at a time. It changes nothing but rounding.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if fewer queries (or attention rows) than new positions are given,
        or no state and no queries, or the state of another policy.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    State: sums ``"attention"`` and ``"squares"`` and the count ``"queries"``, each (batch, kv_heads, N), three numbers
    per token. The first call wants the queries of the whole prompt, later calls those of the new positions. Importance
    is at least 0. A budget below `num_varying` keeps, of those tokens, the highest means; equal deviations go by
    position, the lower one first. The square of the mean is subtracted from the mean square, as in the paper, so
    deviations below about 3e-4 of the mean are noise in float32.

    The public code has one mode for decoding (the prompt is never evicted, recents are the last 10, and one token more
    than the share is outside the feasible set: `official`) and one for prompts, read in chunks (4 sinks, 4 recents, a
    share of 0.1). It does not guard the square root, and where the share is smaller than the recents, some recents fall
    into its feasible set; here they stay out.

    References
    ----------
    .. [1] Ren and Zhu, "On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model
       Inference", arXiv:2402.06262, robust cache omission (mean attention score, standard deviation).

    Examples
    --------
    Means are 0.7, 0.2, 0.25 and 0.1. Token 1 has had its moment (deviation 0.28, against 0.21 and 0.05), so it stays
    out of the feasible set like the newest token, and token 2 goes although its mean is higher:

    >>> import numpy as np
    >>> from graphkv import RoCo, evict
    >>> rows = [[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.7, 0, 0.3, 0], [0.7, 0, 0.2, 0.1]]
    >>> policy = RoCo(budget=3, num_varying=2, num_sinks=0, num_recent=1)
    >>> done = evict(policy, np.ones((1, 1, 4, 2)), attention=np.asarray([[rows]]))
    >>> done.importance.round(6), done.protected, done.kept
    (array([[[0.7 , 0.2 , 0.25, 0.1 ]]]), array([[[False,  True, False,  True]]]), array([[[0, 1, 3]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=STATE)

    num_varying: int | float = 0.3
    num_sinks: int = 4
    num_recent: int = 10
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ratio_or_count("num_varying", self.num_varying)
        checks.count("num_sinks", self.num_sinks)
        checks.count("num_recent", self.num_recent)
        checks.count("block_size", self.block_size, minimum=1)

    @classmethod
    def official(cls, budget: int, /) -> RoCo:
        """Return the public code's decoding mode: no sinks, 10 recents, int(0.3 budget) + 1 outside the feasible set.

        Parameters
        ----------
        budget : int
            Tokens to keep.

        Returns
        -------
        RoCo

        Raises
        ------
        ArgumentError
            If the budget is negative.
        ArgumentTypeError
            If the budget is not an integer.
        """
        budget = checks.count("budget", budget)
        # The float product, rounded down, is theirs: the code computes int(0.3 * budget).
        return cls(budget=budget, num_varying=int(0.3 * budget) + 1, num_sinks=0, num_recent=10)

    def protection(self, budget: int, /) -> Protection:
        """Protect sinks and recents, then the highest deviations."""
        number = max(budgets.count_of(self.num_varying, budget), self.num_sinks + self.num_recent)
        varying = number - self.num_sinks - self.num_recent
        return Varying(first=self.num_sinks, last=self.num_recent, varying=varying)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return N; after the first call the queries of the new positions are enough."""
        return num_tokens

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Add what every token receives from the new positions, and its square."""
        xp = layer.xp
        total, squares, queries = (running.grown(memory, layer, name) for name in ("attention", "squares", "queries"))
        for rows in running.new_rows(layer, self.block_size):
            row = attention.group_heads(rows, "mean", xp=xp)
            total = running.accumulate(total, row, xp=xp)
            squares = running.accumulate(squares, row * row, xp=xp)
        queries = queries + running.visible_queries(layer)
        return Memory(tokens={"attention": total, "queries": queries, "squares": squares})

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the mean attention."""
        return moments(memory, xp=layer.xp)[0]

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more: half of N x N logits of 2 D, their softmax, and per KV head two sums.

        In memory: one block of rows.
        """
        num_tokens = shape.num_tokens
        pairs = shape.batch * num_tokens * (num_tokens + 1) // 2
        flops = pairs * (shape.query_heads * (2 * shape.head_size + 6) + 3 * shape.kv_heads)
        block = min(self.block_size, num_tokens) * num_tokens
        return Cost(flops, 4 * shape.batch * shape.query_heads * block)
