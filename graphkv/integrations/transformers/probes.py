"""What a layer keeps of tokens that were read only to ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...core.layer import Probe

__all__ = ["HeldProbe"]


class HeldProbe(NamedTuple):
    """One probe of a layer, as an immutable value.

    Attributes
    ----------
    queries : torch.Tensor, shape (batch, query_heads, P, D)
        Scaled such that q k / sqrt(D) is the attention logit.
    keys : torch.Tensor, shape (batch, kv_heads, P, D)
    valid : torch.Tensor, shape (batch, P), bool, or None
        False for padding. None if there is none.
    about : tuple of int, or None
        The tokens seen, from the first to before the last, that it asks for. None: all.
    start : int
        Position of its first token.
    window : int or None
        How many of the newest tokens the layer can see at most.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    valid: torch.Tensor | None
    about: tuple[int, int] | None
    start: int
    window: int | None

    def of(self, positions: torch.Tensor) -> Probe:
        """Return the probe of slots at these true positions (batch, kv_heads, stored)."""
        about = None if self.about is None else (positions >= self.about[0]) & (positions < self.about[1])
        before = None if self.window is None else self.start - positions
        return Probe(
            queries=self.queries, keys=self.keys, valid=self.valid, about=about, window=self.window, before=before
        )

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HeldProbe:
        """Select, repeat or reorder rows of the batch."""
        valid = None if self.valid is None else change(self.valid)
        return self._replace(queries=change(self.queries), keys=change(self.keys), valid=valid)
