"""H2O: keep the tokens that have received the most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection
from ..core.types import Array
from . import attention, running
from .protection import SinkPolicy

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(SinkPolicy):
    r"""Keep the heavy hitters, the tokens with the most attention so far, and the newest tokens.

    The importance of token :math:`j` is the attention that it has received from every query :math:`i` so far,

    .. math:: s_j = \operatorname{reduce}_h \sum_{i \ge j} A_{hij},

    where the softmax of row :math:`i` is over the tokens that were still there. Greedy: a token that is gone gets
    nothing any more, and those that stay share its attention.

    The first call sums the columns of the prompt's causal attention, in blocks of `block_size` queries, so that memory
    grows with N and not with its square. Later calls add the rows of the new positions to the `Eviction.state` of the
    call before.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, recents and sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens that are kept as well.
    num_recent : int, optional
        Newest tokens that are always kept; 0 is allowed. Default: half the budget, rounded down.
    group_reduction : str
        ``"mean"``, ``"max"`` or ``"sum"`` over the query heads of a KV head, of their accumulated attention.
    age_normalized : bool
        Divide by the number of queries that could see the token, so that old tokens have no head start.
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
    Importance is a sum of probabilities, so it is at least 0. Sums are kept per query head, float32 or wider, so the
    maximum over a group is that of the accumulated sums: state ``"attention"`` has shape (batch, kv_heads, N, query
    heads per KV head), and ``"queries"`` (batch, kv_heads, N) counts who could see the token. A padded query gives
    nothing, and padding receives nothing. A budget below the recents keeps those of them with the highest importance.

    The public codes differ. Of those by the authors, one evicts for real (`official` describes its sizes; for grouped
    heads its mask does not fit, here groups are reduced), one masks, with an off-by-one that hides one more token for
    a single step and keeps everything when there are no recents, and one evicts nothing and sums columns of a
    non-causal attention. All of them sum scores over the batch or assume a batch of 1. A widely used benchmark code
    evicts the prompt only, keeps a short window instead of half the budget, and let queries see the future until 2026;
    `num_recent` expresses the window. Another library divides by age and keeps no recents: ``num_recent=0,
    age_normalized=True``.

    References
    ----------
    .. [1] Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
       arXiv:2306.14048, algorithm 1 (accumulated attention, one eviction per step).

    Examples
    --------
    Columns sum to 1.4, 1.8, 0.7 and 0.1; half of the budget of 2 goes to the newest token, half to the heaviest:

    >>> import numpy as np
    >>> from graphkv import H2O, evict
    >>> rows = [[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.4, 0.4, 0.1]]
    >>> first = evict(H2O(budget=2), np.ones((1, 1, 4, 2)), attention=np.asarray([[rows]]))
    >>> first.kept, first.importance.round(6)
    (array([[[1, 3]]]), array([[[1.4, 1.8, 0.7, 0.1]]]))

    One step later, two stored tokens and a new one: 1.8 + 0.1, 0.1 + 0.6, 0.3.

    >>> row = np.asarray([[[[0.1, 0.6, 0.3]]]])
    >>> then = evict(H2O(budget=2), np.ones((1, 1, 3, 2)), attention=row, state=first.state)
    >>> then.kept, then.importance.round(6)
    (array([[[0, 2]]]), array([[[1.9, 0.7, 0.3]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=("attention", "queries"))

    num_recent: int | None = None
    group_reduction: str = "mean"
    age_normalized: bool = False
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_recent is not None:
            checks.count("num_recent", self.num_recent)
        checks.choice("group_reduction", self.group_reduction, ("mean", "max", "sum"))
        checks.flag("age_normalized", self.age_normalized)
        checks.count("block_size", self.block_size, minimum=1)

    @classmethod
    def official(cls, heavy: int, recent: int, /) -> H2O:
        """Return the sizes of the authors' code that really evicts: heavy hitters, recents, and group sums.

        Parameters
        ----------
        heavy, recent : int
            Tokens of each kind. Its ratios are of the prompt's length, rounded down each; the default splits a budget.

        Returns
        -------
        H2O

        Raises
        ------
        ArgumentError
            If a size is negative.
        ArgumentTypeError
            If a size is not an integer.
        """
        heavy, recent = checks.count("heavy", heavy), checks.count("recent", recent)
        return cls(budget=heavy + recent, num_recent=recent, group_reduction="sum")

    def protection(self, budget: int, /) -> Protection:
        """Protect recents and sinks."""
        recents = budget // 2 if self.num_recent is None else self.num_recent
        return Protection(first=self.num_sinks, last=recents)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return N; after the first call the queries of the new positions are enough."""
        return num_tokens

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Add what every token receives from the new positions."""
        xp = layer.xp
        received = running.newly_received(layer, self.block_size)
        total = running.grown(memory, layer, "attention", per_query_head=True) + xp.matrix_transpose(received)
        queries = running.grown(memory, layer, "queries") + running.visible_queries(layer)
        return Memory(tokens={"attention": total, "queries": queries})

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Reduce the accumulated attention over the query heads."""
        sums, xp = running.sums_of(memory), layer.xp
        received = attention.group_heads(xp.matrix_transpose(sums["attention"]), self.group_reduction, xp=xp)
        if not self.age_normalized:
            return received
        seen_by = sums["queries"]
        return received / xp.where(seen_by > 0, seen_by, xp.ones_like(seen_by))

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more: half of N x N logits of 2 D, their softmax and sum. In memory: one block of rows."""
        heads, num_tokens = shape.batch * shape.query_heads, shape.num_tokens
        pairs = num_tokens * (num_tokens + 1) // 2
        block = min(self.block_size, num_tokens) * num_tokens
        return Cost(heads * pairs * (2 * shape.head_size + 6), 4 * heads * block)
