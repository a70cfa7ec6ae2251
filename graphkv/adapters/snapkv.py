"""SnapKV: the prompt's last queries vote for what to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.errors import ArgumentError
from ..core.policy import LayerInputs, Policy, Requirements
from ..core.types import Array, Namespace
from . import attention

__all__ = ["SnapKV", "votes"]


def votes(window_attention: Array, /, *, kernel_size: int, pooling: str, group_reduction: str, xp: Namespace) -> Array:
    """Sum the attention of the window's queries to each past token, reduce over query heads, then pool.

    Parameters
    ----------
    window_attention : array, shape (batch, kv_heads, groups, W, N)
        Probabilities of the last W positions.
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
    window, num_tokens = window_attention.shape[-2:]
    received = xp.sum(window_attention[..., : num_tokens - window], axis=-2)
    return attention.pool(attention.group_heads(received, group_reduction, xp=xp), kernel_size, pooling, xp=xp)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep the observation window, and of the past what its queries attend to.

    The importance of a past token is the attention that it gets from the last `window` queries, summed, reduced over
    the query heads of its KV head and pooled along the tokens. The window itself is always kept.

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

    requirements: ClassVar[Requirements] = Requirements(
        queries="window", flops=attention.window_flops, bytes=attention.window_bytes
    )

    window: int = 32
    kernel_size: int = 7
    pooling: str = "avg"
    group_reduction: str = "mean"
    num_sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("window", self.window, minimum=1)
        if checks.count("kernel_size", self.kernel_size, minimum=1) % 2 == 0:
            raise ArgumentError(f"kernel_size must be odd; got {self.kernel_size}")
        checks.choice("pooling", self.pooling, ("avg", "max"))
        checks.choice("group_reduction", self.group_reduction, ("mean", "max", "sum"))
        checks.count("num_sinks", self.num_sinks)

    def num_queries(self, num_tokens: int, /) -> int:
        """Ask for the window's queries."""
        return min(self.window, num_tokens)

    def num_protected(self, budget: int, /) -> int:
        """Count window and sinks."""
        return self.window + self.num_sinks

    def score(self, inputs: LayerInputs, /) -> Array:
        """Count the window's votes; inside the window, the place."""
        xp, window = inputs.xp, self.num_queries(inputs.num_tokens)
        past = votes(
            attention.last_rows(inputs, window, name=type(self).__name__),
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            group_reduction=self.group_reduction,
            xp=xp,
        )
        place = xp.arange(1, window + 1, dtype=past.dtype, device=past.device)
        return xp.concat([past, xp.broadcast_to(place, (*past.shape[:-1], window))], axis=-1)

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect the window and the first tokens."""
        xp, num_tokens = inputs.xp, inputs.num_tokens
        position = xp.arange(num_tokens, dtype=xp.int64, device=inputs.keys.device)
        in_window = position >= num_tokens - self.num_queries(num_tokens)
        return inputs.valid & (in_window | attention.first_tokens(inputs.valid, self.num_sinks, xp=xp))
