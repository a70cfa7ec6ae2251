"""A policy for tests: its importance is handed in."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.policy import LayerInputs, Policy
from ..core.types import Array

__all__ = ["GivenImportance"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImportance(Policy):
    """Rank by an importance that is known beforehand, so that a test can say what must come out.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per row.
    importance : array, shape (batch, kv_heads, N)
        What `score` gives.
    protected : array, shape (batch, kv_heads, N), bool, optional
        What `protect` gives.
    protected_count : int
        What `num_protected` gives.
    """

    importance: Array
    protected: Array | None = None
    protected_count: int = 0

    def score(self, inputs: LayerInputs, /) -> Array:
        """Give the importance."""
        return self.importance

    def protect(self, inputs: LayerInputs, /) -> Array | None:
        """Give the mask."""
        return self.protected

    def num_protected(self, budget: int, /) -> int:
        """Give the count."""
        return self.protected_count
