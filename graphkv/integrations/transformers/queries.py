"""The last queries of a layer, for the next eviction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...core.errors import ArgumentError
from ...core.needs import name_of
from ...core.policy import Policy
from .slots import gathered

__all__ = ["Queries", "check_window", "num_held"]


class Queries(NamedTuple):
    """The last queries of a layer, as an immutable value.

    Attributes
    ----------
    queries : torch.Tensor, shape (batch, query_heads, Q, D)
        Scaled such that q k / sqrt(D) is the attention logit.
    asked : torch.Tensor, shape (batch, Q), int64, or None
        Positions of the tokens that asked, -1 for padding. None as long as there was no padding.
    """

    queries: torch.Tensor
    asked: torch.Tensor | None = None

    @classmethod
    def of(cls, query: torch.Tensor, scaling: float | None, valid: torch.Tensor | None, end: int) -> Queries:
        """Make a buffer of the queries of the last tokens before `end`.

        Parameters
        ----------
        query : torch.Tensor, shape (batch, query_heads, Q, D)
            As they come to the attention, which multiplies the logits by `scaling`.
        valid : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        """
        count, head_size = query.shape[2:]
        if scaling is not None and abs(scaling * head_size**0.5 - 1) > 1e-6:
            query = query * (scaling * head_size**0.5)
        if valid is None:
            return cls(query)
        # Heads differ in what they have dropped, not in what is new.
        asked = torch.where(valid[:, 0, -count:], torch.arange(end - count, end, device=query.device), -1)
        return cls(query, asked)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.queries.shape[2]

    def positions(self, end: int) -> torch.Tensor:
        """Return the positions of the tokens that asked (batch, Q): the last ones before `end` if they are not held."""
        if self.asked is not None:
            return self.asked
        return torch.arange(end - self.num_queries, end, device=self.queries.device).expand(self.queries.shape[0], -1)

    def append(self, new: Queries, end: int) -> Queries:
        """Add the queries of tokens that came after `end`."""
        asked = None if new.asked is None else torch.cat([self.positions(end), new.asked], dim=1)
        return Queries(queries=torch.cat([self.queries, new.queries], dim=2), asked=asked)

    def last(self, count: int) -> Queries | None:
        """Return the newest queries."""
        if not count:
            return None
        if self.num_queries <= count:
            return self
        # A copy, so that the rest is freed.
        queries = self.queries[:, :, -count:].clone()
        return Queries(queries=queries, asked=None if self.asked is None else self.asked[:, -count:])

    def padding_first(self) -> Queries:
        """Put padding first, so that every row's last queries are at the end."""
        if self.asked is None:
            return self
        asked, order = self.asked.sort(dim=1, stable=True)
        queries = gathered(self.queries, order[:, None].expand(*self.queries.shape[:2], -1))
        return Queries(queries=queries, asked=asked)

    def without_newest(self, count: int, end: int, *, has_holes: bool) -> Queries:
        """Forget the queries of the newest tokens, those from `end` on."""
        if has_holes and self.asked is not None:
            return Queries(queries=self.queries, asked=torch.where(self.asked < end, self.asked, -1)).padding_first()
        left = max(0, self.num_queries - count)
        return Queries(queries=self.queries[:, :, :left], asked=None if self.asked is None else self.asked[:, :left])

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Queries:
        """Select, repeat or reorder rows of the batch."""
        return Queries(queries=change(self.queries), asked=None if self.asked is None else change(self.asked))


def num_held(policy: Policy, budget: int) -> int:
    """Count the newest tokens that an eviction keeps for sure: a window reaches back to their queries, across it."""
    protection = policy.protection(budget)
    return 0 if protection.room > budget else protection.newest


def check_window(policy: Policy, budget: int, every: int) -> None:
    """Refuse a window that evictions after every so many tokens cut: too few of its queries are held or come anew."""
    has_window = policy.needs().queries == "window"
    if not has_window or policy.num_queries(budget + every) <= num_held(policy, budget) + every:
        return
    protection = policy.protection(budget)
    raise ArgumentError(
        f"every must be at least {protection.newest}, or the budget at least {protection.room}, for window and sinks "
        f"of {name_of(policy)}; got {every} and {budget}"
    )
