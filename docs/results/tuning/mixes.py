"""Mixes of two ranks beyond those of the library, that were tried and left: see docs/results/choice.md.

``PYTHONPATH=docs/results/tuning graphkv eval --config docs/results/tuning/mixes.toml`` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphkv import Backend, GraphKV, Signal, SnapKV, distance


@dataclass(frozen=True, kw_only=True)
class Mix(Signal):
    """Fuse the base's scores with the distance from all other keys, by rank.

    Parameters
    ----------
    kind : str
        ``"share"``: `amount` of the kept are the base's best, the others the most distant. ``"lean"``: half of each,
        but the second half by a mean of the ranks in which the base's weighs `amount`. ``"three"``: the highest of
        base, distance and that mean. ``"mass"``: the base's best until they hold `amount` of its scores, but from a
        quarter to three quarters of the open slots, then the most distant.
    amount : float
        A share, above 0 and below 1.
    """

    kind: str
    amount: float

    def rescore(
        self, scores: Any, keys: Any, /, *, valid: Any, candidates: Any, open_tokens: int, backend: Backend
    ) -> tuple[Any, None]:
        """Rank, and mix the ranks."""
        xp = backend.xp
        apart = distance(keys, valid=valid, backend=backend)
        mine, other = (self._rank(each, candidates, backend) for each in (scores, apart))
        count = xp.sum(xp.astype(candidates, mine.dtype), axis=-1, keepdims=True)
        if self.kind == "share":
            mixed = -xp.minimum((count - mine) / self.amount, (count - other) / (1 - self.amount))
        elif self.kind == "mass":
            positive = xp.where(candidates, xp.maximum(scores, xp.zeros_like(scores)), xp.zeros_like(scores))
            order = xp.argsort(xp.where(candidates, -mine, xp.ones_like(mine)), axis=-1, stable=True)
            shares = xp.cumulative_sum(xp.take_along_axis(positive, order, axis=-1), axis=-1)
            shares = shares / xp.maximum(shares[..., -1:], xp.full_like(shares[..., -1:], 1e-20))
            reserved = xp.sum(xp.astype(shares < self.amount, mine.dtype), axis=-1, keepdims=True) + 1
            reserved = xp.minimum(xp.maximum(reserved, open_tokens / 4), open_tokens * 3 / 4)
            mixed = xp.where(count - mine < reserved, count + mine, other)
        else:
            leaning = self._rank(self.amount * mine + (1 - self.amount) * other, candidates, backend)
            mixed = xp.maximum(mine, leaning if self.kind == "lean" else xp.maximum(leaning, other))
        return xp.where(candidates, xp.astype(mixed, scores.dtype), scores), None

    @staticmethod
    def _rank(values: Any, candidates: Any, backend: Backend) -> Any:
        """Rank the candidates from 1, the worst."""
        xp = backend.xp
        held = xp.where(candidates, values, xp.full_like(values, -float("inf")))
        place = xp.argsort(xp.argsort(held, axis=-1, descending=True, stable=True), axis=-1)
        count = xp.sum(xp.astype(candidates, place.dtype), axis=-1, keepdims=True)
        return xp.astype(count - place, values.dtype)


def snapkv(budget: int, kind: str, amount: float) -> GraphKV:
    """Make SnapKV with a mix over unrotated keys."""
    return GraphKV(SnapKV(budget=budget, num_sinks=4), Mix(kind=kind, amount=amount), unrotated=True)
