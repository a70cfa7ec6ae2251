"""LagKV: tokens that do not fit into the range of the tokens after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks, primitives
from ..core.backend import Backend
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection, token_rank
from ..core.types import Array, Namespace
from .protection import SinkPolicy

__all__ = ["LagKV", "lag_scores", "valid_first"]


def valid_first(valid: Array, /, *, xp: Namespace) -> Array:
    """Return the places of the tokens of each row, those that are not padding first, each kind in its order.

    Parameters
    ----------
    valid : array, shape (..., N), bool

    Returns
    -------
    array, shape (..., N), int64
    """
    return xp.argsort(xp.astype(~valid, xp.int32), axis=-1, stable=True)


def lag_scores(states: Array, /, *, xp: Namespace) -> Array:
    r"""Compute equations (7) to (10): how unevenly a token's channels lie in the range of the next part.

    With :math:`\bar z = (z - \min) / (\max - \min)`, minimum and maximum over the tokens of the next part, channel by
    channel, this is the softmax over the tokens of a part of the standard deviation of :math:`\bar z` over the
    channels. A channel that is constant in the next part counts as 0.

    Parameters
    ----------
    states : array, shape (..., P, L, D)
        Keys or values of P >= 2 parts of L tokens.

    Returns
    -------
    array, shape (..., P - 1, L)
        At least 0, with sum 1 over each part.
    """
    head_size = states.shape[-1]
    lowest, highest = xp.min(states, axis=-2, keepdims=True), xp.max(states, axis=-2, keepdims=True)
    lowest, extent = lowest[..., 1:, :, :], (highest - lowest)[..., 1:, :, :]
    scaled = (states[..., :-1, :, :] - lowest) / xp.where(extent > 0, extent, xp.ones_like(extent))
    scaled = xp.where(extent > 0, scaled, xp.zeros_like(scaled))
    apart = scaled - xp.mean(scaled, axis=-1, keepdims=True)
    deviation = xp.sqrt(xp.sum(apart * apart, axis=-1) / max(head_size - 1, 1))
    weight = xp.exp(deviation - xp.max(deviation, axis=-1, keepdims=True))
    return weight / xp.sum(weight, axis=-1, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class LagKV(SinkPolicy):
    r"""Keep the tokens of each part that fit least into the range of the part after it, and the last part.

    After the sinks, the tokens are cut into parts of `lag` tokens. Keys and values of a part are scaled, channel by
    channel, such that those of the next part fill [0, 1]; the standard deviation over the channels, softmaxed over the
    part, is a token's score, the key's and the value's added. The last whole part and what is left over have no next
    part: that is the window. No attention and no queries are needed.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and window included; a float is a share of the tokens.
    lag : int
        L, tokens per part.
    across : bool
        Compare scores between parts. False, the paper: their ranks within each part, so that every part keeps the same
        number of tokens, the first parts one more where the budget does not divide.
    num_sinks : int
        S, the first tokens, which are always kept.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting without values.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is in [0, 1) for the tokens that are scored, a rank over L (with `across`, in [0, 2], a sum of two
    softmaxes), in (2, 3] in the window, where newer is higher, and 4 for sinks. The last L tokens are protected, the
    rest of the window ranks above all that is scored. A row of less than S + 2 L tokens is all window.

    The paper keeps a share r of each part, so the length follows (equation 12); here the budget is exact, and r
    follows. While decoding, the paper leaves alone what it has compressed once and compresses each new part once, so
    its cache grows; here every call cuts up what is stored and comes out at the budget.

    The standard deviation is the unbiased one, as in the public code, in which a constant channel makes all scores of a
    part NaN. That code has parts of 1024 tokens (`official`); the paper has 128 on RULER, and from 128 to 1024 in
    its ablations. In kvpress, of equal scores either may rank first.

    References
    ----------
    .. [1] Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
       arXiv:2504.04704, equations (7) to (12).

    Examples
    --------
    Parts of two tokens with two channels, no sinks. The channels of the second part range over [0, 1] and [0, 2], so
    the first part's keys scale to (0, 0), with deviation 0, and (1, 0); its values are all 0. So token 1 stays:

    >>> import numpy as np
    >>> from graphkv import LagKV, evict
    >>> keys = np.asarray([[[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 2.0]]]])
    >>> done = evict(LagKV(budget=3, lag=2, num_sinks=0), keys, values=np.zeros((1, 1, 4, 1)))
    >>> done.importance, done.kept
    (array([[[0.  , 0.5 , 2.75, 3.  ]]]), array([[[1, 2, 3]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(values=True)

    num_sinks: int = 16
    lag: int = 128
    across: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("lag", self.lag, minimum=1)
        checks.flag("across", self.across)

    @classmethod
    def official(cls, budget: int | float, /) -> LagKV:
        """Return the sizes of the public code: 16 sinks, parts of 1024 tokens.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head, or their share. That code has a share of each part.

        Returns
        -------
        LagKV
        """
        return cls(budget=budget, num_sinks=16, lag=1024)

    def protection(self, budget: int, /) -> Protection:
        """Protect the sinks and the last part."""
        return Protection(first=self.num_sinks, last=self.lag)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Score every part by the next one."""
        xp, valid = layer.xp, layer.valid
        number = xp.sum(xp.astype(valid, xp.int64), axis=-1, keepdims=True)
        rank = xp.maximum(token_rank(valid, xp=xp), xp.zeros_like(number))
        dtype = layer.keys.dtype
        newer = 2 + xp.astype(rank + 1, dtype) / xp.astype(xp.maximum(number, xp.ones_like(number)), dtype)
        # A budget below sinks and window keeps the sinks, which everything attends to.
        others = xp.where(rank < self.num_sinks, xp.full_like(newer, 4), newer)
        parts = (layer.num_tokens - self.num_sinks) // self.lag
        if parts < 2:
            return others
        found = self._scored(layer, parts)
        # Which part a row's padding cuts short is in the data, so all are scored and those without a next are replaced.
        place = rank - self.num_sinks
        is_scored = (place >= 0) & (place // self.lag < (number - self.num_sinks) // self.lag - 1)
        place = xp.where(is_scored, place, xp.zeros_like(place))
        return xp.where(is_scored, xp.take_along_axis(found, place, axis=-1), others)

    def _scored(self, layer: Layer, parts: int, /) -> Array:
        """Score the tokens of all parts but the last, in a row without padding: (batch, kv_heads, (parts - 1) L)."""
        xp, backend, lag = layer.xp, layer.backend, self.lag
        order = valid_first(layer.valid, xp=xp)[..., self.num_sinks : self.num_sinks + parts * lag]

        def scored(states: Array) -> Array:
            finite, _ = primitives.finite_rows(states, xp=xp)
            rows = primitives.take_rows(finite, order, xp=xp)
            return lag_scores(xp.reshape(rows, (*rows.shape[:2], parts, lag, rows.shape[-1])), xp=xp)

        total = scored(layer.keys) + scored(layer.values)
        if not self.across:
            total = _ranked(total, backend=backend) / lag
        return xp.reshape(total, (*total.shape[:2], (parts - 1) * lag))

    def cost(self, shape: LayerShape, /) -> Cost:
        """Find the range (2), scale (2) and deviate (4) every entry of keys and values. In memory: places of one."""
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        return Cost(16 * entries, 8 * entries)


def _ranked(scores: Array, /, *, backend: Backend) -> Array:
    """Rank along the last axis, 0 for the lowest; of equals the lower index is higher."""
    xp, number = backend.xp, scores.shape[-1]
    place = xp.argsort(primitives.top_k(scores, number, backend=backend), axis=-1)
    return xp.astype(number - 1 - place, scores.dtype)
