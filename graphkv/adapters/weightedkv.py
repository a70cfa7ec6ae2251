"""WeightedKV: the values of dropped tokens go into their neighbors on the right, weighted by attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.merging import Merge, add_up, shares, slots
from ..core.policy import Assessment, Policy, Requirements, Wrapper
from ..core.selection import Choice
from ..core.types import Array
from . import attention, running
from .h2o import H2O
from .merging import at_slots, masses, of_kept

__all__ = ["WeightedKV", "neighbors"]


def neighbors(own: Array, layer: Layer, /) -> Array:
    """Return the slot of the next kept token on the right of every token, and of the last one where there is none.

    Parameters
    ----------
    own : array, shape (batch, kv_heads, N), integer
        The slot of each kept token, -1 for others.
    layer : Layer

    Returns
    -------
    array, shape (batch, kv_heads, N), integer
        -1 for padding that is not kept, and in a row that keeps nothing.
    """
    xp = layer.xp
    is_kept = xp.astype(own >= 0, own.dtype)
    last = xp.sum(is_kept, axis=-1, keepdims=True, dtype=own.dtype) - 1
    # As many kept tokens as come before.
    following = xp.minimum(xp.cumulative_sum(is_kept, axis=-1, dtype=own.dtype), last)
    return xp.where(own >= 0, own, xp.where(layer.valid, following, xp.full_like(own, -1)))


@dataclass(frozen=True)
class WeightedKV(Wrapper):
    r"""Any policy, with the values of dropped tokens averaged into their neighbors on the right.

    The value of a dropped token goes to the next kept token of its head, through others that are dropped too. With
    :math:`\bar a` the mean attention that a token received from the queries that could see it, the slot of the run
    :math:`S` of dropped tokens and their kept neighbor gets

    .. math:: v = \frac{\sum_{i \in S} \bar a_i v_i}{\sum_{i \in S} \bar a_i} .

    Its key and its place stay those of the kept token. Who stays is the base's choice.

    Parameters
    ----------
    base : Policy
        If it remembers the attention that tokens received (H2O, RoCo), its means are the weights; else those over the
        last `window` queries.
    mass : str
        ``"one"``: every slot counts as what its kept token counted, as in the paper. ``"attention"``: as
        :math:`\sum_S \bar a / \bar a_j` times that, with :math:`j` the kept token.
    window : int
        Queries that weights are taken from over a base that remembers none, fewer where fewer are given.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if queries are missing.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Listing 1 of the paper drops one token at a time: evicting after every new token (`evict` with ``state=``) is that,
    step by step, the neighbor keeping its own sums. After a prompt all dropped tokens go at once, in closed form. A run
    without a kept token on its right goes to the left, which is not in the paper, and so does a plain mean where nobody
    of a run has received attention. Neighbors may be protected tokens, as in the paper.

    References
    ----------
    .. [1] "WeightedKV: Attention Scores Weighted Key-Value Cache Merging for Large Language Models", arXiv:2503.01330,
       algorithm 1.

    Examples
    --------
    Token 1 received .1 on average and is dropped, token 2 received .5: the value becomes v1 / 6 + 5 v2 / 6.

    >>> import numpy as np
    >>> from graphkv import SnapKV, WeightedKV, evict
    >>> rows = np.asarray([[[[0.2, 0.1, 0.5, 0.2]]]])
    >>> values = np.asarray([[[[9.0], [0.0], [6.0], [9.0]]]])
    >>> policy = WeightedKV(SnapKV(budget=3, window=1, kernel_size=1), window=1)
    >>> done = evict(policy, np.ones((1, 1, 4, 2)), attention=rows)
    >>> done.kept, done.compress(values, values)[1].round(6).tolist()
    (array([[[0, 2, 3]]]), [[[[9.0], [5.0], [9.0]]]])
    """

    requirements: ClassVar[Requirements] = Requirements(merges=True)

    mass: str = "one"
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("mass", self.mass, ("one", "attention"))
        checks.count("window", self.window, minimum=1)

    @classmethod
    def paper(cls, budget: int, /, *, num_recent: int | None = None) -> WeightedKV:
        """Return the paper's method: the least mean attention goes, 4 sinks and about half of the budget are recents.

        Parameters
        ----------
        budget : int
            m, tokens to keep per KV head.
        num_recent : int, optional
            The paper has 508 of 1024 and 124 of 256. Default: half of the budget, less the sinks.

        Returns
        -------
        WeightedKV
        """
        recents = max(0, checks.count("budget", budget) // 2 - 4) if num_recent is None else num_recent
        return cls(H2O(budget=budget, num_sinks=4, num_recent=recents, age_normalized=True))

    def needs(self) -> Requirements:
        """Return the needs of the base, and the window's queries where it remembers no attention."""
        needs = replace(self.requirements, masses=self.mass != "one").joined(self.base.needs())
        return needs if remembers_attention(self.base) else replace(needs, queries="all")

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base and the weights use."""
        number = self.base.num_queries(num_tokens)
        return number if remembers_attention(self.base) else max(number, min(self.window, num_tokens))

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge:
        """Send each dropped token to the right."""
        xp, num_slots, backend = layer.xp, choice.kept.shape[-1], layer.backend
        own = slots(choice.kept, layer.num_tokens, backend=backend)
        into, count = neighbors(own, layer), masses(layer)
        received = (
            running.mean_attention(memory, layer)
            if remembers_attention(self.base)
            else attention.mean_received(layer, self.window)
        )
        # Where nobody received anything, or where the mass would be infinite, tokens are counted.
        of_kept_one = of_kept(received, own, num_slots, layer)
        basis = of_kept_one if self.mass == "attention" else add_up(received, into, num_slots, backend=backend)
        weights = xp.where(at_slots(basis, into, layer) > 0, received, count)
        mass = of_kept(count, own, num_slots, layer)
        if self.mass == "attention":
            alone = of_kept(weights, own, num_slots, layer)
            mass = mass * (
                add_up(weights, into, num_slots, backend=backend) / xp.where(alone > 0, alone, xp.ones_like(alone))
            )
        return Merge(
            into=into,
            key_weights=xp.astype(own >= 0, layer.keys.dtype),
            value_weights=shares(weights, into, num_slots, backend=backend),
            mass=mass,
        )

    def cost(self, shape: LayerShape, /) -> Cost:
        """Average the values: 2 D for each token. In memory: the weighted values."""
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        cost = self.base.cost(shape).then(Cost(2 * entries, 4 * entries))
        return cost if remembers_attention(self.base) else cost.then(attention.window_cost(shape, self.window))


def remembers_attention(policy: Policy, /) -> bool:
    """Return whether a policy's memory holds what each token received, and from how many queries."""
    return {"attention", "queries"} <= set(policy.needs().state)
