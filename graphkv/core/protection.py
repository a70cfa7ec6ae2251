"""Tokens that are kept before all others: sinks, recents and observation windows."""

from __future__ import annotations

from dataclasses import dataclass

from . import primitives
from .layer import Layer, Memory
from .types import Array, Namespace

__all__ = ["Protection", "first_tokens", "newest_tokens", "token_rank"]


def token_rank(valid: Array, /, *, xp: Namespace) -> Array:
    """Count valid tokens before each token: its place in the row once padding is taken away."""
    return xp.cumulative_sum(xp.astype(valid, xp.int64), axis=-1) - 1


def first_tokens(valid: Array, number: int, /, *, xp: Namespace) -> Array:
    """Mark the first `number` tokens of each row that are not padding."""
    return valid & (token_rank(valid, xp=xp) < number)


def newest_tokens(valid: Array, number: int, /, *, xp: Namespace) -> Array:
    """Mark the last `number` tokens of each row that are not padding."""
    total = xp.sum(xp.astype(valid, xp.int64), axis=-1, keepdims=True)
    return valid & (token_rank(valid, xp=xp) >= total - number)


@dataclass(frozen=True, kw_only=True)
class Protection:
    """How many tokens are kept before all others, and which: one value for the mask and for its count.

    Parameters
    ----------
    first : int
        Sinks: the first tokens of every row that are not padding.
    last : int
        Recents: the newest tokens of every row that are not padding.
    window : int
        The last positions of the layer, padding included, whose queries vote.
    block : int
        Tokens are kept in whole blocks of that many.
    """

    first: int = 0
    last: int = 0
    window: int = 0
    block: int = 1

    @property
    def count(self) -> int:
        """Tokens that are protected in a row without padding. May be more than the budget, or than N."""
        return self.first + self.last + self.window

    @property
    def room(self) -> int:
        """Tokens that a budget must have room for, so that every protected one is kept for sure."""
        # The blocks at both ends may reach beyond what is protected.
        return self.count + 2 * (self.block - 1)

    @property
    def newest(self) -> int:
        """How many of them are the newest tokens."""
        return self.last + self.window

    def mask(self, layer: Layer, memory: Memory | None = None, /) -> Array | None:
        """Return who is protected.

        Parameters
        ----------
        layer : Layer
        memory : Memory, optional
            For protection that depends on what was seen.

        Returns
        -------
        array, shape (batch, kv_heads, N), bool, or None
            None where nothing is protected.
        """
        xp, marks = layer.xp, []
        if self.first:
            marks.append(first_tokens(layer.valid, self.first, xp=xp))
        if self.last:
            marks.append(newest_tokens(layer.valid, self.last, xp=xp))
        if self.window:
            position = xp.arange(layer.num_tokens, dtype=xp.int64, device=primitives.device_of(layer.keys))
            marks.append(layer.valid & (position >= layer.num_tokens - self.window)[None, None, :])
        if not marks:
            return None
        mask = marks[0]
        for each in marks[1:]:
            mask = mask | each
        return mask
