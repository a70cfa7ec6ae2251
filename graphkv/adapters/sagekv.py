"""SAGE-KV: the prompt's last query chooses once."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection
from ..core.types import Array, Namespace
from .protection import SinkPolicy

__all__ = ["SAGEKV", "summed_logits"]


def summed_logits(query: Array, keys: Array, /, *, xp: Namespace) -> Array:
    """Attention logits of one query, summed over the query heads of each KV head.

    The sum over heads is taken before the product, so a group costs no more than one head.

    Parameters
    ----------
    query : array, shape (batch, query_heads, D)
    keys : array, shape (batch, kv_heads, N, D)

    Returns
    -------
    array, shape (batch, kv_heads, N)
    """
    batch, query_heads, head_size = query.shape
    kv_heads = keys.shape[1]
    group = xp.sum(xp.reshape(query, (batch, kv_heads, query_heads // kv_heads, head_size)), axis=2)
    return (keys @ group[..., None])[..., 0] / sqrt(head_size)


@dataclass(frozen=True, kw_only=True)
class SAGEKV(SinkPolicy):
    r"""Keep the first tokens, the newest ones, and of the rest those with the highest logits for the last query.

    .. math:: s_j = \sum_{h \in \text{group}} q_h \cdot k_j / \sqrt{D}

    with :math:`q_h` the query of the last position, summed over the query heads of the KV head: logits, not
    probabilities, so that no softmax is needed.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and recents included; a float is a share of the tokens.
    num_sinks : int
        First tokens that are always kept.
    num_recent : int, optional
        Newest tokens that are always kept; 0 is allowed. Default: half of what the sinks leave, rounded down.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting without the last query.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is a logit and may be negative. For a single query head logits and probabilities rank alike; for a group
    the sum of logits is not the sum of probabilities. Attention rows cannot replace the query, because logits cannot be
    had from them. The last position given is the query, so padding belongs on the left. A budget below sinks and
    recents keeps those of them with the highest importance.

    The paper chooses once, after the prompt; while decoding only its recents slide. Here every call chooses anew from
    what is stored, by its newest query. The paper's setting is `official`: a window of 8192 of which 4 are sinks, 512
    are chosen and all others are recents. The half for recents is this library's own default.

    References
    ----------
    .. [1] "LLMs Know What to Drop: Self-Attention Guided KV Cache Eviction for Efficient Long-Context Inference",
       arXiv:2503.08879.

    Examples
    --------
    The query looks for tokens 2 and then 1; token 0 is the sink and token 4 the newest one:

    >>> import numpy as np
    >>> from graphkv import SAGEKV, evict
    >>> keys = np.asarray([[[[0.0], [2.0], [3.0], [1.0], [-1.0]]]])
    >>> done = evict(SAGEKV(budget=3, num_sinks=1, num_recent=1), keys, queries=np.asarray([[[[2.0]]]]))
    >>> done.importance, done.kept
    (array([[[ 0.,  4.,  6.,  2., -2.]]]), array([[[0, 2, 4]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="window", logits=True)

    num_sinks: int = 4
    num_recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_recent is not None:
            checks.count("num_recent", self.num_recent)

    @classmethod
    def official(cls, *, window_length: int = 8192, num_chosen: int = 512) -> SAGEKV:
        """Return the paper's setting: 4 sinks, the chosen tokens, and recents for the rest of the window.

        Parameters
        ----------
        window_length : int
            Tokens to keep in all.
        num_chosen : int
            Tokens that the last query chooses.

        Returns
        -------
        SAGEKV

        Raises
        ------
        ArgumentError
            If `window_length` has no room for sinks and chosen tokens.
        ArgumentTypeError
            If a number is not an integer.
        """
        num_chosen = checks.count("num_chosen", num_chosen)
        window_length = checks.count("window_length", window_length, minimum=4 + num_chosen)
        return cls(budget=window_length, num_sinks=4, num_recent=window_length - 4 - num_chosen)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return 1: the last query."""
        return min(1, num_tokens)

    def protection(self, budget: int, /) -> Protection:
        """Protect sinks and recents."""
        recents = max(0, budget - self.num_sinks) // 2 if self.num_recent is None else self.num_recent
        return Protection(first=self.num_sinks, last=recents)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the logits of the last query."""
        return summed_logits(layer.queries[:, :, -1, :], layer.keys, xp=layer.xp)  # type: ignore[index]

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compute one product per KV head."""
        return Cost(2 * shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size)
