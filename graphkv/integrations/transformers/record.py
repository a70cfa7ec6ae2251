"""The record of an eviction, and the redundancy of stored keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from ...core.eviction import Eviction
from ...core.policy import Policy
from .decision import Decider

__all__ = ["EvictionRecord", "redundancy"]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvictionRecord:
    """What one eviction saw and did.

    Attributes
    ----------
    decisions : tuple of Eviction
        One for the whole batch, or one per row where rows have budgets of their own or holes. In a row with holes it
        is about the last `Eviction.num_tokens` of the N.
    by_importance : tuple of array (batch, kv_heads, b) or None
        What the policy would have kept by the importance alone, in arrays of the backend: one per decision.
    positions : torch.Tensor, shape (batch, kv_heads, N), int64
        True positions of the N tokens before the eviction; -1 for unused slots.
    valid : torch.Tensor, shape (batch, kv_heads, N), bool, or None
        False for padding and unused slots.
    redundancy_before, redundancy_after : torch.Tensor, shape (batch, kv_heads), float32
        Mean cosine between two different keys, before and after.
    """

    decisions: tuple[Eviction, ...]
    by_importance: tuple[Any, ...]
    positions: torch.Tensor
    valid: torch.Tensor | None
    redundancy_before: torch.Tensor
    redundancy_after: torch.Tensor

    @classmethod
    def of(
        cls,
        decider: Decider,
        policy: Policy,
        decisions: tuple[Eviction, ...],
        positions: torch.Tensor,
        redundancy_after: torch.Tensor,
    ) -> EvictionRecord:
        """Make the record of decisions; `positions` are those of the slots before, in their own order."""
        keys, valid = decider.in_order(decider.slots.keys), decider.slots.valid
        valid = None if valid is None else decider.in_order(valid)
        return cls(
            decisions=decisions,
            by_importance=decider.chosen_by_importance(policy, decisions),
            positions=decider.in_order(positions),
            valid=valid,
            redundancy_before=redundancy(keys, valid),
            redundancy_after=redundancy_after,
        )


def redundancy(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Compute the mean cosine of two different keys, shape (batch, kv_heads), from the length of the mean unit key."""
    keys = normalize(keys.float(), dim=-1)
    if valid is None:
        valid = keys.new_ones(keys.shape[:-1], dtype=torch.bool)
    keys = keys * valid[..., None]
    # Zero keys have no direction: their cosine with anything, themselves included, is 0.
    with_themselves = (keys * keys).sum(dim=(-1, -2))
    count = valid.sum(dim=-1)
    return ((keys.sum(dim=-2) ** 2).sum(dim=-1) - with_themselves) / (count * (count - 1)).clamp(min=1)
