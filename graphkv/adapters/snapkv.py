"""SnapKV: the prompt's last queries vote for what to keep."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import checks
from ..core.layer import Layer
from ..core.types import Array, Namespace
from . import attention
from .protection import WindowPolicy
from .rocketkv import split

__all__ = ["SnapKV", "votes"]


def votes(received: Array, /, *, kernel_size: int, pooling: str, group_reduction: str, xp: Namespace) -> Array:
    """Reduce the attention that each past token receives over query heads, then pool.

    Parameters
    ----------
    received : array, shape (batch, kv_heads, groups, N - W)
        Sums of probabilities over the last W positions.
    kernel_size : int
        Odd.
    pooling : str
        ``"avg"`` or ``"max"``.
    group_reduction : str
        ``"mean"``, ``"max"`` or ``"sum"``.

    Returns
    -------
    array, shape (batch, kv_heads, N - W)
    """
    return attention.pool(attention.group_heads(received, group_reduction, xp=xp), kernel_size, pooling, xp=xp)


@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowPolicy):
    """Keep the observation window, and the past tokens that its queries attend to.

    The importance of a past token is the attention that it receives from the last `window` queries, summed, reduced
    over the query heads of its KV head and pooled along the tokens. The window itself is always kept.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, window and sinks included; a float is a share of the tokens.
    window : int
        W, the observation window. A prompt shorter than that is all window.
    kernel_size : int
        Odd width of the pooling.
    pooling : str
        ``"avg"`` (divides by the whole kernel at the edges too) or ``"max"``.
    group_reduction : str
        ``"mean"``, ``"max"`` or ``"sum"`` over the query heads of a KV head, before pooling.
    num_sinks : int
        First tokens that are kept as well. The paper keeps none on purpose.

    Raises
    ------
    ArgumentError
        If an option is out of range or `kernel_size` even.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is a sum of probabilities, so it is at least 0. A budget below the window keeps the newest tokens of the
    window: a window token gets no votes, its importance is its place in the window.

    The official code selects and stores per query head, on keys that are repeated first; here one selection serves all
    query heads of a KV head, and attention stays in float32. Even kernels, with which the official code shifts the
    scores by one, are refused.

    References
    ----------
    .. [1] Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469, listing 1.

    Examples
    --------
    A window of one query that looks straight at token 1:

    >>> import numpy as np
    >>> from graphkv import SnapKV, evict
    >>> keys = np.asarray([[[[0.0, 1.0], [9.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]])
    >>> query = np.asarray([[[[2.0, 0.0]]]])
    >>> evict(SnapKV(budget=2, window=1, kernel_size=1), keys, queries=query).kept
    array([[[1, 3]]])
    """

    pooling: str = "avg"
    group_reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("pooling", self.pooling, ("avg", "max"))
        checks.choice("group_reduction", self.group_reduction, ("mean", "max", "sum"))

    @classmethod
    def official(cls, budget: int | float, /) -> SnapKV:
        """Return the choices of the official code's LongBench runs: a window of 32, maximum pooling over 7 tokens.

        Selection per query head and scores in half precision are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head, window included.

        Returns
        -------
        SnapKV
        """
        return cls(budget=budget, window=32, kernel_size=7, pooling="max", group_reduction="mean", num_sinks=0)

    @classmethod
    def rocketkv(cls, budget: int, num_tokens: int, /, *, max_new_tokens: int = 0) -> SnapKV:
        """Return the first stage of RocketKV (arXiv:2502.14051): a window of 32, maximum pooling over 63 tokens.

        Its second stage, sparse attention at every step, is not here: this keeps `Split.first_stage` tokens, several
        times as many as a step is to read, see `graphkv.adapters.rocketkv.split`.

        Parameters
        ----------
        budget : int
            Tokens that a step of decoding may read in RocketKV.
        num_tokens : int
            Tokens of the prompt.
        max_new_tokens : int
            Twice as many tokens stay at least.

        Returns
        -------
        SnapKV
            Attention is summed over the query heads of a KV head.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If a number is out of range, or not an integer.

        Examples
        --------
        >>> from graphkv import SnapKV
        >>> SnapKV.rocketkv(512, 32768).budget
        3191
        """
        kept = split(num_tokens, budget, max_new_tokens=max_new_tokens).first_stage
        return cls(budget=kept, window=32, kernel_size=63, pooling="max", group_reduction="sum", num_sinks=0)

    def score_past(self, layer: Layer, window: int, /) -> Array:
        """Count the window's votes."""
        received = attention.received(layer, window)
        return votes(
            received[..., : layer.num_tokens - window],
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            group_reduction=self.group_reduction,
            xp=layer.xp,
        )
