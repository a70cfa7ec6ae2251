"""Attendre's eviction policies: the least recently and the least frequently attended token goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection
from ..core.types import Array
from . import attention, running
from .lazy_eviction import active_steps, recurrence, steps_cost
from .protection import SinkPolicy

__all__ = ["LFA", "LRA"]


@dataclass(frozen=True, kw_only=True)
class AttendedPolicy(SinkPolicy):
    """A policy that watches every query since the first, and may keep the newest tokens.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and recents included; a float is a share of the tokens.
    num_sinks, num_recent : int
        First and newest tokens that are always kept.
    block_size : int
        Queries whose attention is in memory at a time. It changes nothing but rounding.
    """

    num_recent: int = 0
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("num_recent", self.num_recent)
        checks.count("block_size", self.block_size, minimum=1)

    def protection(self, budget: int, /) -> Protection:
        """Protect sinks and recents."""
        return Protection(first=self.num_sinks, last=self.num_recent)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return N; after the first call the queries of the new positions are enough."""
        return num_tokens


@dataclass(frozen=True, kw_only=True)
class LRA(AttendedPolicy):
    r"""Evict the least recently attended token, as a cache of pages evicts the least recently used one.

    A token is attended to by a query that gives it at least `alpha`, from any query head of its KV head. With :math:`e`
    queries since the last one that did, its importance is :math:`1 / (1 + e)`: above 0, so that a graph can lower it.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and recents included; a float is a share of the tokens.
    alpha : float
        Above 0 and at most 1.
    num_sinks, num_recent : int
        First and newest tokens that are always kept.
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
    State ``"idle"``, (batch, kv_heads, N): queries since the last attention, padding left out; for a token that none
    attended to, all queries since it came. Many tokens share a number; of those the lower positions stay.

    Of the paper only the eviction policies are here. Its memory of queries, which wait until they are evicted before
    they attend, changes the model. No code of it is public, and what "attended" means in it is our reading, after
    LazyEviction's threshold.

    References
    ----------
    .. [1] Yang and Hua, "Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers for
       Long Context Processing", arXiv:2401.04881.

    Examples
    --------
    Token 1 was last seen two queries ago, tokens 0 and 2 one query ago, token 3 sees itself:

    >>> import numpy as np
    >>> from graphkv import LRA, evict
    >>> rows = [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.3, 0, 0.7, 0], [0, 0, 0, 1.0]]
    >>> done = evict(LRA(budget=2, alpha=0.1), np.ones((1, 1, 4, 2)), attention=np.asarray([[rows]]))
    >>> done.importance.round(3), done.kept
    (array([[[0.5  , 0.333, 0.5  , 1.   ]]]), array([[[0, 3]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=("idle",))

    alpha: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if checks.fraction("alpha", self.alpha) == 0:
            raise ArgumentError(f"alpha must be above 0; got {self.alpha}")

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Let the new positions pass, one step each."""
        xp, idle = layer.xp, running.grown(memory, layer, "idle")
        for is_active, asks in active_steps(layer, self.alpha, self.block_size):
            idle, _ = recurrence(idle, idle, is_active, asks, xp=xp)
        return Memory(tokens={"idle": idle})

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the inverse of the queries since a token was attended to."""
        return 1 / (1 + running.sums_of(memory)["idle"])

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more: half of N x N logits of 2 D, their softmax, and the steps. In memory: one block of rows."""
        return steps_cost(shape, self.block_size)


@dataclass(frozen=True, kw_only=True)
class LFA(AttendedPolicy):
    r"""Evict the least frequently attended token: the one with the least attention so far.

    The importance of token :math:`j` is :math:`\sum_{i \ge j} A_{ij}`, the attention that it has received from every
    query so far, averaged over the query heads of its KV head: that of `H2O`, without half of the budget for the newest
    tokens.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and recents included; a float is a share of the tokens.
    num_sinks, num_recent : int
        First and newest tokens that are always kept. Without recents a new token competes with the sums of old ones
        at once.
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
    State ``"attention"``, (batch, kv_heads, N): the sums, at least 0. As for `LRA`, only the eviction policy of the
    paper is here, and it is our reading: the paper's memory holds chunks, and no code of it is public.

    References
    ----------
    .. [1] Yang and Hua, "Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers for
       Long Context Processing", arXiv:2401.04881.

    Examples
    --------
    Columns sum to 1.4, 1.8, 0.7 and 0.1:

    >>> import numpy as np
    >>> from graphkv import LFA, evict
    >>> rows = [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.4, 0.4, 0.1]]
    >>> evict(LFA(budget=2), np.ones((1, 1, 4, 2)), attention=np.asarray([[rows]])).kept
    array([[[0, 1]]])
    """

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=("attention",))

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Add what every token receives from the new positions."""
        received = attention.group_heads(running.newly_received(layer, self.block_size), "mean", xp=layer.xp)
        return Memory(tokens={"attention": running.grown(memory, layer, "attention") + received})

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the accumulated attention."""
        return running.sums_of(memory)["attention"]

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more: half of N x N logits of 2 D, their softmax and sum. In memory: one block of rows."""
        return steps_cost(shape, self.block_size)
