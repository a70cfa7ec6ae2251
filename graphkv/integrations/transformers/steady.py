"""Decoding that evicts after every token: one comes and one goes, in place, and scores are kept and not made anew.

A layer that holds its budget needs no copy of its keys to take in one token: it has one slot more than its budget, and
the token that comes overwrites the one that went. What the window's queries attend to, the sums of H2O and the sum of
all directions change by one token as well. The scores are those of the policies to rounding, and the tokens too.

Slots are in no order here. Whoever looks at the layer finds them in order: `Steady.settled` makes the ordinary
form, and the layer goes on in that until it has been calm for some steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from ...adapters.h2o import H2O
from ...adapters.snapkv import SnapKV
from ...core.backend import Backend, load
from ...core.fusion import LARGEST_POWER, SMALLEST_POWER
from ...core.graphkv import GraphKV
from ...core.policy import Policy
from ...core.signals import Degree, Signal
from .queries import Queries
from .slots import Slots

__all__ = ["Steady"]

# A row of the window whose attention to what is left has come down to this is made anew: its digits are gone.
SMALLEST_TOTAL = 1e-9


class Votes:
    """What `SnapKV` counts: the attention of the window's queries, before each is divided by its total.

    A query comes with its row, and goes W steps later, so that no error of a total outlives it.
    """

    def __init__(self, policy: SnapKV, keys: torch.Tensor, queries: torch.Tensor) -> None:
        rows, num_slots, head_size = keys.shape
        # (rows, groups, W, D)
        self.policy, self.scale = policy, 1 / sqrt(head_size)
        self.queries = queries.reshape(rows, -1, *queries.shape[2:]).clone()
        groups, window = self.queries.shape[1:3]
        logits = self.queries.float().flatten(1, 2) @ keys.mT * self.scale
        # The last slot is for the token that comes next, which none of these sees; they are the newest of the others.
        place = torch.arange(num_slots) - torch.arange(num_slots - 1 - window, num_slots - 1)[:, None]
        logits = logits.view(rows, groups, window, num_slots).masked_fill(place > 0, -torch.inf)
        self.weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_().view(rows * groups, window, num_slots)
        self.oldest, self.logits = 0, torch.empty(0)

    def ask(self, query: torch.Tensor, logits: torch.Tensor) -> None:
        """Replace the oldest query (rows, groups, D) and its logits (rows, groups, slots) by new ones."""
        self.queries[:, :, self.oldest] = query
        self.weights[:, self.oldest] = (logits - logits.amax(dim=-1, keepdim=True)).exp_().flatten(0, 1)
        self.oldest = (self.oldest + 1) % self.weights.shape[1]

    def free(self, hole: torch.Tensor) -> None:
        """Let nobody look at the slot (rows, 1), where a token comes that the queries so far do not see."""
        groups = self.queries.shape[1]
        where = hole.repeat_interleave(groups, dim=0)[:, :, None].expand(-1, self.weights.shape[1], 1)
        self.weights.scatter_(2, where, 0.0)

    def importance(self, order: torch.Tensor) -> torch.Tensor | None:
        """Return the importance (rows, N - W) before the window, oldest first; None where digits are gone."""
        total = self.weights.sum(dim=-1, keepdim=True)
        if not float(total.min()) > SMALLEST_TOTAL:
            return None
        received = torch.bmm(total.reciprocal_().mT, self.weights)
        received = received.view(len(order), -1, received.shape[-1])
        reduction = self.policy.group_reduction
        votes = received.amax(dim=1) if reduction == "max" else received.sum(dim=1)
        if reduction == "mean":
            votes /= received.shape[1]
        votes = votes.gather(1, order[:, : order.shape[1] - self.weights.shape[1]])
        size = self.policy.kernel_size
        pool = avg_pool1d if self.policy.pooling == "avg" else max_pool1d
        return pool(votes, size, stride=1, padding=size // 2)

    def held(self, query: torch.Tensor | None, batch: int) -> Queries:
        """Return the window's queries in their order; `query` (rows, groups, D) has not been asked yet."""
        queries = self.queries.roll(-self.oldest, dims=2)
        if query is not None:
            queries = torch.cat([queries[:, :, 1:], query[:, :, None]], dim=2)
        return Queries(queries=queries.reshape(batch, -1, *queries.shape[2:]))

    def state(self, order: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
        """Return running sums of the policy: none."""
        return {}


class Received:
    """What `H2O` sums up: the attention that every token has received so far."""

    def __init__(self, policy: H2O, state: dict[str, torch.Tensor], num_slots: int) -> None:
        self.policy = policy
        total, count = (state[name].flatten(0, 1) for name in ("attention", "queries"))
        missing = num_slots - count.shape[1]
        # (rows, groups, slots) and (rows, slots)
        self.total = torch.nn.functional.pad(total.mT, (0, missing))
        self.count = torch.nn.functional.pad(count, (0, missing))

    def ask(self, query: torch.Tensor, logits: torch.Tensor) -> None:
        """Add what a query attends to, of logits (rows, groups, slots)."""
        self.total += logits.softmax(dim=-1)
        self.count += 1

    def free(self, hole: torch.Tensor) -> None:
        """Begin anew in a slot (rows, 1)."""
        self.total.scatter_(2, hole[:, None].expand(-1, self.total.shape[1], 1), 0.0)
        self.count.scatter_(1, hole, 0.0)

    def importance(self, order: torch.Tensor) -> torch.Tensor | None:
        """Return the importance (rows, N) of all tokens, oldest first."""
        reduction = self.policy.group_reduction
        received = self.total.amax(dim=1) if reduction == "max" else self.total.sum(dim=1)
        if reduction == "mean":
            received /= self.total.shape[1]
        if self.policy.age_normalized:
            received = received / self.count.clamp(min=1)
        return received.gather(1, order)

    def held(self, query: torch.Tensor | None, batch: int) -> Queries | None:
        """Return the queries that are not summed up yet, one (rows, groups, D) or none."""
        return None if query is None else Queries(queries=query.reshape(batch, -1, 1, query.shape[-1]))

    def state(self, order: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
        """Return the sums of the tokens in their order (rows, S)."""
        total = self.total.gather(2, order[:, None].expand(-1, self.total.shape[1], -1)).mT
        count = self.count.gather(1, order)
        return {name: x.reshape(batch, -1, *x.shape[1:]) for name, x in (("attention", total), ("queries", count))}


class Apart:
    """How far every key is from the mean direction, for `Degree`: the sum of the directions changes by one token.

    It is in float64, so that some millions of changes leave it what a new sum would be in float32.
    """

    def __init__(self, signal: Degree, keys: torch.Tensor) -> None:
        self.exponent = signal.exponent
        self.scale = _scale(keys)
        self.total = (keys * self.scale).sum(dim=1, dtype=torch.float64)

    def free(self, key: torch.Tensor, hole: torch.Tensor, new: torch.Tensor) -> bool:
        """Put a new key into a slot where the old one was, both (rows, 1, D); return whether it has a direction."""
        where = hole[:, :, None]
        old, scale = key * self.scale.gather(1, where), _scale(new)
        self.total += (new * scale)[:, 0]
        self.total -= old[:, 0]
        self.scale.scatter_(1, where, scale)
        return bool((scale > 0).all())

    def fuse(self, importance: torch.Tensor, keys: torch.Tensor, order: torch.Tensor, first: int) -> torch.Tensor:
        """Return new scores for the importance (rows, n) of the tokens after the first ones, oldest first."""
        mean = (self.total / keys.shape[1]).float()[:, None]
        apart = torch.addcmul(-mean, keys, self.scale)
        square = apart.mul_(apart).sum(dim=-1)
        distance = square.add_(square.mean(dim=-1, keepdim=True)).mul_(0.5)
        distance = distance.gather(1, order[:, first : first + importance.shape[1]]).clamp_(max=2.0)
        return importance * distance.pow_(self.exponent).clamp_(SMALLEST_POWER, LARGEST_POWER)


@dataclass(kw_only=True)
class Steady:
    """A layer with one slot more than its budget, of which one is free, or holds what came last.

    Attributes
    ----------
    policy : Policy
    keys, values : torch.Tensor, shape (batch, kv_heads, slots, D)
        Written into.
    positions : torch.Tensor, shape (rows, slots), int64
        True positions, by slot.
    order : torch.Tensor, shape (rows, slots), int64
        The slots of the tokens, oldest first, and last the slot that is free or holds the newest token.
    base : Votes or Received
    apart : Apart or None
    signal : Signal or None
        One that needs everything anew.
    first, last : int
        Tokens that are protected at both ends.
    query : torch.Tensor, shape (rows, groups, D), or None
        Of the token that came last.
    is_full : bool
        Whether the token that came last is still to be made room for.
    """

    policy: Policy
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    order: torch.Tensor
    base: Votes | Received
    apart: Apart | None
    signal: Signal | None
    first: int
    last: int
    query: torch.Tensor | None = None
    is_full: bool = False

    @classmethod
    def of(cls, policy: Policy, slots: Slots, held: Queries | None, backend: Backend | None) -> Steady | None:
        """Make the steady form of slots that hold a budget; None where there is none.

        There is one for `SnapKV` and `H2O`, under any signal of `GraphKV`, on CPUs, without padding and merges.
        """
        base: Any = policy
        signal: Signal | None = None
        if type(policy) is GraphKV and not policy.unrotated:
            base, signal = policy.base, policy.signal
        protection, count = policy.protection(slots.count), slots.count
        if not (
            type(base) in (SnapKV, H2O)
            and base.budget == count
            and protection.count <= count
            and (backend is None or backend is load("torch"))
            and type(slots) is Slots
            and slots.positions is not None
            and all(x is None for x in (slots.places, slots.valid, slots.mass, slots.absorbed, slots.pinned))
            and _is_plain(slots.keys)
            and slots.keys.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and _is_plain(slots.values)
            and (held is None or held.asked is None)
        ):
            return None
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (slots.keys, slots.values))
        positions = torch.nn.functional.pad(slots.positions, (0, 1)).flatten(0, 1)
        flat, degree = keys.flatten(0, 1).float(), None
        scorer: Votes | Received
        if type(base) is SnapKV:
            if slots.state or held is None or held.num_queries != base.window:
                return None
            scorer = Votes(base, flat, held.queries)
        else:
            if held is not None or any(
                name not in slots.state or slots.state[name].shape[2] != count for name in ("attention", "queries")
            ):
                return None
            scorer = Received(base, slots.state, count + 1)
        if type(signal) is Degree and signal.fusion == "power":
            degree, signal = Apart(signal, flat), None
            # Only the free slot may be without a direction.
            if not bool((degree.scale[:, :-1] > 0).all()):
                return None
        order = torch.arange(count + 1).repeat(flat.shape[0], 1)
        return cls(
            policy=policy,
            keys=keys,
            values=values,
            positions=positions,
            order=order,
            base=scorer,
            apart=degree,
            signal=signal,
            first=protection.first,
            last=protection.newest,
        )

    @property
    def count(self) -> int:
        """Slots in use."""
        return self.keys.shape[2] - (not self.is_full)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: keys and values, their places, and what the scores are made of."""
        parts = [vars(part) for part in (self, self.base, self.apart) if part is not None]
        return sum(x.nbytes for part in parts for x in part.values() if isinstance(x, torch.Tensor))

    def fits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Return whether new keys and values are those of one more token of the same kind."""
        return (
            not self.is_full
            and keys.shape[2] == 1
            and keys.shape[:2] == self.keys.shape[:2]
            and keys.dtype == self.keys.dtype
            and _is_plain(keys)
            and _is_plain(values)
            # What was made in inference mode can be written into there only.
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> bool:
        """Put a token into the free slot; return False, with nothing stored, if its key has no direction."""
        hole = self.order[:, -1:]
        if self.apart is not None:
            where = hole[:, :, None].expand(-1, -1, keys.shape[3])
            old = self.keys.flatten(0, 1).gather(1, where)
            if not self.apart.free(old.float(), hole, keys.flatten(0, 1).float()):
                return False
        where = hole.view(*keys.shape[:2], 1, 1)
        self.keys.scatter_(2, where.expand(keys.shape), keys)
        self.values.scatter_(2, where.expand(values.shape), values)
        self.positions.scatter_(1, hole, position)
        self.base.free(hole)
        self.is_full = True
        return True

    def ask(self, queries: torch.Tensor) -> None:
        """Note the queries (batch, query_heads, 1, D) of the token that came last."""
        self.query = queries.reshape(len(self.order), -1, queries.shape[3])

    def drop(self) -> bool:
        """Make the slot of the lowest score free; return False, with nothing gone, if that cannot be found so."""
        with load("torch").guarded(self.keys):
            return self.query is not None and self._dropped(self.query)

    def _dropped(self, query: torch.Tensor) -> bool:
        keys = self.keys.flatten(0, 1).float()
        logits = query.float() @ keys.mT * (1 / sqrt(keys.shape[2]))
        # Infinities and NaN are not attended to, and hide nothing.
        if not isfinite(float(logits.sum())):
            return False
        self.base.ask(query, logits)
        self.query = None
        importance = self.base.importance(self.order)
        if importance is None:
            return False
        end = self.order.shape[1] - self.last
        if self.apart is not None:
            scores = self.apart.fuse(importance[:, self.first : end], keys, self.order, self.first)
        else:
            scores = (importance if self.signal is None else self._rescored(importance, keys))[:, self.first : end]
        # Of equal scores the last one goes, and NaN before all others.
        place = end - 1 - scores.flip(-1).argmin(dim=-1, keepdim=True)
        rank = torch.arange(self.order.shape[1])
        self.order = self.order.gather(1, torch.where(rank == rank[-1], place, rank + (rank >= place)))
        self.is_full = False
        return True

    def _rescored(self, importance: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Let a signal see all tokens in their order."""
        assert self.signal is not None
        rows, count = self.order.shape
        place = torch.arange(count)
        candidates = ((place >= self.first) & (place < count - self.last)).expand(1, rows, -1)
        keys = keys.gather(1, self.order[:, :, None].expand_as(keys))
        importance = torch.nn.functional.pad(importance, (0, count - importance.shape[1]))
        scores, _ = self.signal.rescore(
            importance[None],
            keys[None],
            valid=torch.ones_like(candidates),
            candidates=candidates,
            open_tokens=count - 1 - self.first - self.last,
            backend=load("torch"),
        )
        fresh: torch.Tensor = scores[0]
        return fresh

    @property
    def positions_by_slot(self) -> torch.Tensor:
        """True positions of the slots as they are handed out, shape (batch, kv_heads, slots)."""
        return self.positions.view(self.keys.shape[:3])

    def by_slot(self, array: torch.Tensor) -> torch.Tensor:
        """Return an array (batch, kv_heads, slots) in the order of the tokens as it is by slot."""
        order = self.order.view(array.shape)
        return torch.empty_like(array).scatter_(2, order, array)

    def settled(self) -> tuple[Slots, Queries | None]:
        """Return what is held in its order, as if it had never been otherwise."""
        batch, order = len(self.keys), self.order[:, : self.count]
        index = order.reshape(*self.keys.shape[:2], -1)
        # Nothing is summed up of what is still to be made room for.
        known = order[:, : self.count - self.is_full]
        slots = Slots(
            keys=self.keys.gather(2, index[..., None].expand(*index.shape, self.keys.shape[3])),
            values=self.values.gather(2, index[..., None].expand(*index.shape, self.values.shape[3])),
            positions=self.positions_by_slot.gather(2, index),
            state=self.base.state(known, batch),
        )
        return slots, self.base.held(self.query, batch)


def _is_plain(x: torch.Tensor) -> bool:
    """Return whether a tensor may be copied into another in memory."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not x.requires_grad


def _scale(keys: torch.Tensor) -> torch.Tensor:
    """Return what makes a direction of each key (..., D), shape (..., 1); 0 where it has none."""
    square = (keys * keys).sum(dim=-1, keepdim=True)
    scale = square.rsqrt()
    return scale.masked_fill_((square == 0) | ~torch.isfinite(square), 0.0)
