"""The ids that a cache has seen, to detect a history that is not its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["History"]

# Odd, so that every token counts in every bit of a sum that wraps around at 2^64.
FACTOR = 6364136223846793005


class History:
    """The ids that a cache has seen: a sum over all that cannot be taken back, and the others themselves.

    So memory does not grow with the text. Two histories of the same sum are taken for the same.
    """

    def __init__(self) -> None:
        self.num_summed = 0
        self.sums: torch.Tensor | None = None
        self.recent: list[torch.Tensor] = []
        self.num_recent = 0

    def __len__(self) -> int:
        # Asked at every step, so it must not go through all of them.
        return self.num_summed + self.num_recent

    def copy(self) -> History:
        """Return a history that goes its own way."""
        twin = History()
        twin.num_summed, twin.sums = self.num_summed, self.sums
        twin.recent, twin.num_recent = list(self.recent), self.num_recent
        return twin

    def append(self, ids: torch.Tensor, *, keep: int) -> None:
        """Go on with ids (batch, tokens); at least `keep` of the newest tokens can be taken back afterwards."""
        self.recent.append(ids.detach())
        self.num_recent += ids.shape[1]
        surplus = self.num_recent - keep
        while self.recent and self.recent[0].shape[1] <= surplus:
            ids = self.recent.pop(0)
            sums = _sums(ids, self.num_summed)
            self.sums = sums if self.sums is None else self.sums + sums.to(self.sums.device)
            self.num_summed += ids.shape[1]
            self.num_recent -= ids.shape[1]
            surplus -= ids.shape[1]

    def take_back(self, num_tokens: int) -> None:
        """Forget the newest tokens."""
        surplus = min(num_tokens, self.num_recent)
        self.num_recent -= surplus
        while surplus:
            ids = self.recent.pop()
            if surplus < ids.shape[1]:
                self.recent.append(ids[:, : ids.shape[1] - surplus])
            surplus -= min(surplus, ids.shape[1])

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or select rows of the batch."""
        self.sums = None if self.sums is None else change(self.sums)
        self.recent = [change(ids) for ids in self.recent]

    def begins(self, ids: torch.Tensor) -> bool:
        """Return whether ids (batch, tokens) begin with what was seen."""
        if ids.shape[1] < len(self):
            return False
        rows = next((each.shape[0] for each in (self.sums, *self.recent) if each is not None), ids.shape[0])
        if ids.shape[0] and rows % ids.shape[0] == 0:
            # For beams, `generate` repeats the rows of its ids later than those of the cache were.
            ids = ids.repeat_interleave(rows // ids.shape[0], dim=0)
        start = self.num_summed
        if self.sums is not None:
            if ids.shape[0] != self.sums.shape[0]:
                return False
            if bool((_sums(ids[:, :start], 0) != self.sums.to(ids.device)).any()):
                return False
        for known in self.recent:
            there = ids[:, start : start + known.shape[1]]
            if there.shape[0] != known.shape[0] or bool((there != known.to(ids.device)).any()):
                return False
            start += known.shape[1]
        return True


def _sums(ids: torch.Tensor, first: int) -> torch.Tensor:
    """Sum ids (batch, tokens), each times a factor for its place, int64 that wraps around."""
    powers = torch.full((ids.shape[1],), FACTOR, dtype=torch.int64, device=ids.device).cumprod(0)
    offset = pow(FACTOR, first, 1 << 64)
    signed = offset - (1 << 64) if offset >= 1 << 63 else offset
    # Plus one, so that padding with zeros is not the same as nothing.
    return ((ids.to(torch.int64) + 1) * (powers * signed)).sum(dim=1)
