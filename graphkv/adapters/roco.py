"""RoCo: evict what is attended to little on average, among the tokens whose attention hardly varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core import budgets, checks, primitives
from ..core.policy import LayerInputs, LayerShape, Policy, Requirements
from ..core.types import Array
from . import attention, running
from .protection import newest_tokens

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


def _flops(policy: Any, shape: LayerShape, /) -> int:
    """Attend once more: half of N x N logits of 2 D, their softmax, and per KV head two sums."""
    pairs = shape.batch * shape.num_tokens * (shape.num_tokens + 1) // 2
    return int(pairs * (shape.query_heads * (2 * shape.head_size + 6) + 3 * shape.kv_heads))


def _bytes(policy: Any, shape: LayerShape, /) -> int:
    """Hold one block of rows."""
    return int(4 * shape.batch * shape.query_heads * min(policy.block_size, shape.num_tokens) * shape.num_tokens)


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

    requirements: ClassVar[Requirements] = Requirements(queries="all", state=True, flops=_flops, bytes=_bytes)

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
        """Give the public code's decoding mode: no sinks, 10 recents, int(0.3 budget) + 1 outside the feasible set.

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

    def num_protected(self, budget: int, /) -> int:
        """Count the tokens outside the feasible set."""
        return max(budgets.count_of(self.num_varying, budget), self.num_sinks + self.num_recent)

    def num_queries(self, num_tokens: int, /) -> int:
        """Ask for all queries; after the first call those of the new positions are enough."""
        return num_tokens

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect sinks and recents, then the highest deviations."""
        xp, backend = inputs.xp, inputs.backend
        number = min(self.num_protected(inputs.budget), inputs.num_tokens)
        always = attention.first_tokens(inputs.valid, self.num_sinks, xp=xp)
        always = always | newest_tokens(inputs.valid, self.num_recent, xp=xp)
        tiers = xp.astype(~always, xp.int32) + xp.astype(~inputs.valid, xp.int32)
        spread = deviation(*self._moments(inputs), xp=xp)
        chosen = primitives.top_k(spread, number, tiers, backend=backend)
        ones = xp.ones(chosen.shape, dtype=spread.dtype, device=primitives.device_of(spread))
        return inputs.valid & (primitives.segment_sum(ones, chosen, inputs.num_tokens, backend=backend) > 0)

    def observe(self, inputs: LayerInputs, /) -> Mapping[str, Array]:
        """Add what the new positions give to every token, and its square."""
        xp = inputs.xp
        state = running.state_or_zeros(inputs, STATE, name="RoCo")
        total, squares = state["attention"], state["squares"]
        for rows in running.new_rows(inputs, self.block_size, name="RoCo"):
            row = attention.group_heads(rows, "mean", xp=xp)
            total = running.accumulate(total, row, xp=xp)
            squares = running.accumulate(squares, row * row, xp=xp)
        queries = state["queries"] + running.visible_queries(inputs)
        return {"attention": total, "queries": queries, "squares": squares}

    def score(self, inputs: LayerInputs, /) -> Array:
        """Give the mean attention."""
        return self._moments(inputs)[0]

    def _moments(self, inputs: LayerInputs, /) -> tuple[Array, Array]:
        """Give the mean and the mean square of the attention to each token so far."""
        xp = inputs.xp
        state = running.state_of(inputs, STATE, name="RoCo")
        queries = xp.where(state["queries"] > 0, state["queries"], xp.ones_like(state["queries"]))
        return state["attention"] / queries, state["squares"] / queries
