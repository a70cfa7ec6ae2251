"""DefensiveKV: the most attention that any query of the window pays to a token, and never less than average."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.layer import Layer
from ..core.types import Array, Namespace
from . import attention
from .protection import WindowPolicy

__all__ = ["DefensiveKV", "risks"]


def risks(rows: Array, valid: Array, /, *, kernel_size: int, xp: Namespace) -> Array:
    r"""Compute the worst case of each past token over the window, floored at the mean of its head.

    .. math:: \tilde R_j = \max_{h, q} \operatorname{pool}_j(A_{hqj}), \qquad
              R_j = \max(\tilde R_j, \operatorname{mean}_i \tilde R_i)

    Parameters
    ----------
    rows : array, shape (batch, kv_heads, groups, W, N)
        Probabilities of the last W positions.
    valid : array, shape (batch, kv_heads, N), bool
        Padding is excluded from the mean.
    kernel_size : int
        Odd width of the average along the tokens.

    Returns
    -------
    array, shape (batch, kv_heads, N - W)
        At least 0.
    """
    window, num_tokens = rows.shape[-2:]
    past, valid = rows[..., : num_tokens - window], valid[..., : num_tokens - window]
    risk = xp.max(attention.pool(past, kernel_size, "avg", xp=xp), axis=(2, 3))
    # Pooling spreads attention into the padding beside a token.
    risk = xp.where(valid, risk, xp.zeros_like(risk))
    number = xp.sum(xp.astype(valid, risk.dtype), axis=-1, keepdims=True)
    mean = xp.sum(risk, axis=-1, keepdims=True) / xp.maximum(number, xp.ones_like(number))
    return xp.maximum(risk, mean)


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(WindowPolicy):
    r"""Keep the observation window, and the past tokens that any one of its queries attends to strongly.

    The importance of a past token is the largest attention that a query of the last `window` positions gives it, over
    all query heads of its KV head, each query's attention pooled along the tokens first. It is at least the mean of
    that over the head's past tokens, because a short window may have missed what a token is needed for. The window
    itself is always kept.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, window and sinks included; a float is a share of the tokens.
    window : int
        W, the observation window. A prompt shorter than that is all window.
    kernel_size : int
        Odd width of the average along the tokens, which divides by the whole kernel at the edges too.
    num_sinks : int
        First tokens that are kept as well.

    Raises
    ------
    ArgumentError
        If an option is out of range or `kernel_size` even.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is at least 0. All tokens below their head's mean have the same importance: once the budget reaches
    them, the first ones stay. ``CAOTE(DefensiveKV(...))`` ranks them by their values.

    This is the paper's aggregation, its algorithm 1. Paper and public code then weigh it with the norm of each value
    after the output projection, which a cache does not hold. The public code also rescales each pooled row to the
    attention that the row had before; forces in, as CriticalKV does, the tokens that hold most of a head's mean
    attention (0.9 of it less the window's share, but that share is read from the last tokens before the window); and
    lets the heads of a layer compete for one budget, which is ``AdaKV(DefensiveKV(...), floor=0.0)``.
    Layer-DefensiveKV, where layers compete as well, is not expressed.

    References
    ----------
    .. [1] Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv:2510.13334, algorithm 1.

    Examples
    --------
    Two queries in the window. Tokens 0 and 2 get .4 in sum, token 1 gets .3. The largest single shares are .4, .3 and
    .2, their mean is .3:

    >>> import numpy as np
    >>> from graphkv import DefensiveKV, SnapKV, evict
    >>> rows = np.asarray([[[[0.4, 0.0, 0.2, 0.4, 0.0], [0.0, 0.3, 0.2, 0.3, 0.2]]]])
    >>> keys = np.ones((1, 1, 5, 2))
    >>> evict(SnapKV(budget=4, window=2, kernel_size=1), keys, attention=rows).kept
    array([[[0, 2, 3, 4]]])
    >>> done = evict(DefensiveKV(budget=4, window=2, kernel_size=1), keys, attention=rows)
    >>> done.importance[0, 0, :3].round(3), done.kept
    (array([0.4, 0.3, 0.3]), array([[[0, 1, 3, 4]]]))
    """

    kernel_size: int = 5

    def score_past(self, layer: Layer, window: int, /) -> Array:
        """Return the worst case over the window."""
        rows = attention.last_rows(layer, window)
        return risks(rows, layer.valid, kernel_size=self.kernel_size, xp=layer.xp)
