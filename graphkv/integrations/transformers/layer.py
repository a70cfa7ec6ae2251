"""The cache of one attention layer: what it has seen, what of it is left, and where that stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize, pad
from transformers.cache_utils import DynamicLayer

from ...adapters import LayerBudgets
from ...core.backend import Backend, load
from ...core.errors import ArgumentError
from ...core.eviction import Eviction, evict, preference
from ...core.policy import Policy
from . import rotary, versions

__all__ = ["EvictingLayer", "EvictionRecord", "Settings", "Source"]

# Kinds of layers, in transformers' words, whose attention caches keys and values.
FULL = ("full_attention", "hybrid")
WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The attention module that a layer's keys come from: its class, its configuration and which layer it is.

    The module itself would make a copy of the cache a copy of the model.

    Attributes
    ----------
    kind : type or None
        None if the layer was loaded without a model; `config` then has no more than `storage` saves of it.
    layer_kinds : tuple of str
        What every layer of the model caches, see `versions.layer_kinds`.
    has_all_heads, has_whole_groups : bool
        Whether tensor parallelism leaves all heads of the layer in this process, and all query heads of each KV head.
    """

    kind: type | None
    config: Any
    index: int
    layer_kinds: tuple[str, ...] = ()
    has_all_heads: bool = True
    has_whole_groups: bool = True

    @property
    def layer_kind(self) -> str:
        """What this layer caches."""
        return self.layer_kinds[self.index] if self.index < len(self.layer_kinds) else FULL[0]

    @property
    def num_layers(self) -> int:
        """Layers of the model; some models run them more than once."""
        return max(int(self.config.num_hidden_layers), self.index + 1)

    @property
    def is_last(self) -> bool:
        """Whether no later layer caches keys."""
        return not any(kind in FULL + WINDOWED for kind in self.layer_kinds[self.index + 1 :])

    @property
    def is_mixed(self) -> bool:
        """Whether some layers of the model see everything and others a window."""
        return len({kind in FULL for kind in self.layer_kinds if kind in FULL + WINDOWED}) > 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all layers of a cache have in common, see `EvictingCache`."""

    policy: Policy | None
    every: int | None
    rerotate: bool
    record: bool
    num_queries: int
    backend: Backend | None


@dataclass(frozen=True, kw_only=True, eq=False)
class EvictionRecord:
    """What one eviction saw and did.

    Attributes
    ----------
    decisions : tuple of Eviction
        One for the whole batch, or one per row where rows have budgets of their own or holes. In a row with holes it
        speaks of the last `Eviction.num_tokens` of the N.
    positions : torch.Tensor, shape (batch, kv_heads, N), int64
        Where the N tokens before the eviction stood; -1 for unused slots.
    valid : torch.Tensor, shape (batch, kv_heads, N), bool, or None
        False for padding and unused slots.
    redundancy_before, redundancy_after : torch.Tensor, shape (batch, kv_heads), float32
        Mean cosine between two different keys, before and after.
    """

    decisions: tuple[Eviction, ...]
    positions: torch.Tensor
    valid: torch.Tensor | None
    redundancy_before: torch.Tensor
    redundancy_after: torch.Tensor


class Tail(NamedTuple):
    """The newest tokens of a layer, of shapes (batch, kv_heads, tokens, ...); `valid` and `places` may be None."""

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    places: torch.Tensor | None


class Part(NamedTuple):
    """What one decision is about.

    Attributes
    ----------
    policy : Policy
    rows : slice
        All rows of the batch, or one.
    num_seen : int
        Tokens that budgets are shares of.
    first, first_unsummed : int
        The first slot, in an order that puts padding first, and the first one that running sums do not know yet.
    num_queries : int or None
        Queries that are those of tokens and not of padding; None if all may count.
    is_at_rest : bool
        Whether nothing new has come in this row, so that all of it stays.
    """

    policy: Policy
    rows: slice
    num_seen: int
    first: int = 0
    first_unsummed: int = 0
    num_queries: int | None = None
    is_at_rest: bool = False

    def of(self, tensor: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """Take the part of a tensor (batch, kv_heads, stored, ...)."""
        return tensor[self.rows] if order is None else _gathered(tensor, order, self.rows)[:, :, self.first :]


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one attention layer, which knows what it has seen and what of it is left.

    Attributes
    ----------
    keys, values : torch.Tensor, shape (batch, kv_heads, stored, D)
        What is stored.
    num_seen : int
        Tokens that have passed through, evicted ones included.
    positions : torch.Tensor, shape (batch, kv_heads, stored), int64, or None
        Where the stored tokens stood, ascending; -1, at the front, in slots that a head with a smaller budget does not
        use. None as long as nothing was evicted.
    valid : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        False for padding and unused slots. None if there are none.
    rotation : Rotation or None
        How the model turns the keys, in a cache that may have to turn them.
    places : torch.Tensor, shape (batch, kv_heads, stored, axes), int64, or None
        The positions that the stored keys are turned by, which may be the caller's own; None where nothing is turned.
    queries : torch.Tensor, shape (batch, query_heads, Q, D), or None
        The last queries that a coming eviction needs, scaled such that q k / sqrt(D) is the attention logit.
    state : dict of str to torch.Tensor, shape (batch, kv_heads, S, ...)
        Running sums per token of policies like H2O, for the first S stored tokens. Empty for others.
    budget : int or None
        Tokens per row that the last eviction aimed at; the most of any row where rows differ.
    num_evictions, num_dropped, bytes_freed : int
        Evictions that ran; tokens that they dropped per row, in the head that lost most; bytes that they freed.
    seconds : float
        Time that they took on the host.
    record : EvictionRecord or None
        The last eviction, in a cache with ``record=True``.
    is_apart : bool
        Whether the keys are not those of the text, but of a picture, say. Such a layer is left to itself.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, settings: Settings, *, record_past: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.record_past = record_past
        self._forget()

    def _forget(self) -> None:
        self.num_seen = 0
        self.num_new = 0
        self.positions: torch.Tensor | None = None
        self.rotation: rotary.Rotation | None = None
        self.places: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None
        self.state: Mapping[str, torch.Tensor] = {}
        self.row_budgets: torch.Tensor | None = None
        self.shared_by: Policy | None = None
        self.budget: int | None = None
        self.num_evictions = 0
        self.num_dropped = 0
        self.bytes_freed = 0
        self.seconds = 0.0
        self.record: EvictionRecord | None = None
        self.source: Source | None = None
        self.sliding_window: int | None = None
        self.evicts = True
        self.is_apart = False
        # Whether padding has followed a token in any row, so that a row's last tokens are not those of the array.
        self.has_holes = False
        # How many of the tokens seen were padding, shape (batch,), and whose queries are held, shape (batch, Q), -1 for
        # padding; both None as long as there was no padding.
        self.num_hidden: torch.Tensor | None = None
        self.asked: torch.Tensor | None = None
        self.awaits_queries = False
        self.certain = 0
        self.due_at: int | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all that is stored."""
        self.awaits_queries = True
        return self._append(key_states, value_states)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_new = key_states.shape[-2]
        new = torch.arange(self.num_seen, self.num_seen + num_new, device=key_states.device)
        new = new.expand(*key_states.shape[:2], num_new)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, new], dim=-1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(new, dtype=torch.bool)], dim=-1)
        self.num_seen += num_new
        self.num_new += num_new
        return super().update(key_states, value_states)  # type: ignore[no-any-return]

    def admit(self, padding: torch.Tensor | None, num_new: int) -> None:
        """Take note of which tokens are padding, shape (batch, tokens seen or new tokens), before the attention."""
        if padding is None:
            return
        if padding.shape[1] not in (self.num_seen, num_new):
            raise ArgumentError(
                f"attention_mask must have one column for each of {self.num_seen} tokens seen so far; "
                f"got {padding.shape[1]}"
            )
        where = self.true_positions - (self.num_seen - padding.shape[1])
        rows = torch.arange(padding.shape[0], device=padding.device)[:, None, None]
        # What the mask does not speak of stays as it is.
        shown = padding[rows, where.clamp(min=0)] | (where < 0)
        self.valid = shown if self.valid is None else self.valid & shown
        hidden = (~padding).sum(dim=1)
        if self.num_hidden is not None and padding.shape[1] < self.num_seen:
            hidden = hidden + self.num_hidden
        self.num_hidden = hidden
        if self.queries is not None:
            asked = self._asked(self.queries.shape[2], self.num_seen - num_new)
            where = asked - (self.num_seen - padding.shape[1])
            self.asked = torch.where(padding[rows[:, 0], where.clamp(min=0)] | (where < 0), asked, -1)
        self.has_holes = self.has_holes or bool((self.valid[:, :, :-1] & ~self.valid[:, :, 1:]).any())

    def _asked(self, num_queries: int, end: int) -> torch.Tensor:
        """Return where the tokens of the held queries stood, the last ones before `end` if that is not kept."""
        if self.asked is not None:
            return self.asked
        return torch.arange(end - num_queries, end, device=self.keys.device).expand(self.keys.shape[0], -1)

    def observe(self, source: Source, query: torch.Tensor, scaling: float | None, sliding_window: int | None) -> None:
        """Take note of a finished attention, and of whether an eviction is due."""
        self.source, self.sliding_window = source, sliding_window
        # Where a model mixes sliding and full layers, the sliding ones are small already.
        self.evicts = not (source.is_mixed and sliding_window is not None)
        self.awaits_queries = False
        if self.evicts:
            self._hold(query, scaling)
            self.certain = self.num_seen
            self.settle_due()
        elif not self.record_past:
            self.settle()

    def settle_due(self) -> None:
        """Find out whether an eviction is due, and over how many of the tokens seen."""
        every, is_first = self.settings.every, self.num_evictions == 0
        self.due_at = None
        if not self.evicts or self.settings.policy is None or not self.num_seen:
            return
        if is_first:
            self.due_at = min(self.certain, self.num_seen)
        elif every is not None and self.num_new >= every:
            self.due_at = min(max(self.certain, self.num_seen - self.num_new + every), self.num_seen)

    def locate(self, module: torch.nn.Module, num_new: int) -> None:
        """Take note of how the keys are turned and where the new ones stand, if they may have to be turned."""
        policy = self.settings.policy
        may_turn = self.settings.rerotate or policy is None or policy.needs().unrotated_keys
        if not (may_turn and self.evicts):
            return
        rows, heads = self.keys.shape[:2]
        self.rotation, new = rotary.look(module, self.rotation, rows, self.num_seen - num_new, num_new)
        if new is not None:
            new = new.to(self.keys.device)[:, None].expand(-1, heads, -1, -1)
            before = new[:, :, :0] if self.places is None else self.places
            # Attention that was not ours may have passed by.
            if missing := self.num_stored - num_new - before.shape[2]:
                before = pad(before, (0, 0, 0, missing), value=rotary.UNKNOWN)
            self.places = torch.cat([before, new], dim=2)

    def _hold(self, query: torch.Tensor, scaling: float | None) -> None:
        """Keep the queries that the next eviction will ask for, and no more."""
        settings = self.settings
        if settings.policy is None:
            wanted = settings.num_queries
        elif self.num_evictions and settings.every is None:
            wanted = 0
        else:
            wanted = settings.policy.num_queries(self.num_stored)
        if wanted and self.record_past:
            wanted += query.shape[2]
        if not wanted:
            self.queries = self.asked = None
            return
        head_size = query.shape[-1]
        if scaling is not None and abs(scaling * head_size**0.5 - 1) > 1e-6:
            query = query * (scaling * head_size**0.5)
        asked = None
        if self.valid is not None:
            asked = torch.arange(self.num_seen - query.shape[2], self.num_seen, device=query.device)
            # Heads differ in what they have dropped, not in what is new.
            asked = torch.where(self.valid[:, 0, -query.shape[2] :], asked, -1)
        if self.queries is not None:
            if asked is not None:
                held = self._asked(self.queries.shape[2], self.num_seen - query.shape[2])
                asked = torch.cat([held, asked], dim=1)
            query = torch.cat([self.queries, query], dim=2)
        if self.has_holes and asked is not None:
            # Padding first, so that every row's last queries stand at the end.
            asked, order = asked.sort(dim=1, stable=True)
            query = _gathered(query, order[:, None].expand(*query.shape[:2], -1))
        # A copy, so that the rest is freed.
        self.queries = query if query.shape[2] <= wanted else query[:, :, -wanted:].clone()
        self.asked = None if asked is None else asked[:, -self.queries.shape[2] :]

    def settle(self) -> None:
        """Drop what has left the window of a sliding layer, once it will not be taken back."""
        surplus = 0 if self.evicts or self.sliding_window is None else self.num_stored - (self.sliding_window - 1)
        if surplus > 0:
            self.keys, self.values = self.keys[:, :, surplus:].clone(), self.values[:, :, surplus:].clone()
            self.valid = None if self.valid is None else self.valid[:, :, surplus:].clone()

    def evict(self, policy: Policy, *, backend: Backend | None = None) -> tuple[Eviction, ...]:
        """Shrink to what the policy keeps.

        Parameters
        ----------
        policy : Policy
        backend : Backend, optional
            Who decides. Default: the cache's; torch if it has none.

        Returns
        -------
        tuple of Eviction
            In arrays of the backend: one for the batch, or one per row where rows have budgets of their own.

        Raises
        ------
        ArgumentError
            If the layer has seen nothing, lacks the queries that the policy needs, has dropped tokens that a larger
            budget would want back, or holds some of the heads only and the policy needs all.
        """
        started = perf_counter()
        if self.source is None:
            raise ArgumentError("the cache must hold a prompt before it is evicted; a layer has seen nothing")
        if not self.evicts:
            return ()
        self._check_heads(policy)
        backend = backend or self.settings.backend or load("torch")
        parts, order = self._parts(policy)
        decisions = tuple(
            evict(
                part.policy,
                _give(part.of(self.keys, order), backend),
                layer=self.index,
                num_layers=self.num_layers,
                tokens_seen=part.num_seen,
                state=self._state(part, order, backend),
                unrotated_keys=_give(part.of(self._unrotated_keys(part.rows), order), backend)
                if part.policy.needs().unrotated_keys
                else None,
                **self._inputs(part, order, backend),
            )
            for part in parts
        )
        decided = [decision.budget for decision, part in zip(decisions, parts, strict=True) if not part.is_at_rest]
        budget = max(decided, default=self.budget or 0)
        if self.num_dropped and self.budget is not None and policy != self.settings.policy and budget > self.budget:
            raise ArgumentError(
                f"policy must not ask for more tokens than the {self.budget} that an earlier eviction left; "
                f"got a budget of {budget}"
            )
        valid, before = self._visible_from_now_on(), _gathered(self.true_positions, order)
        valid = None if valid is None else _gathered(valid, order)
        record = self.settings.record
        redundancy_before = _redundancy(_gathered(self.keys, order), valid) if record else None
        kept, self.state = self._taken(decisions, parts, order)
        self._keep(kept, self.true_positions, _are_ragged(decisions))
        self.queries = self._carried_over(policy, budget)
        if self.asked is not None:
            self.asked = None if self.queries is None else self.asked[:, -self.queries.shape[2] :]
        self.budget, self.num_new, self.due_at = budget, 0, None
        self.num_evictions += 1
        if redundancy_before is not None:
            self.record = EvictionRecord(
                decisions=decisions,
                positions=before,
                valid=valid,
                redundancy_before=redundancy_before,
                redundancy_after=_redundancy(self.keys, self.valid),
            )
        self.seconds += perf_counter() - started
        return decisions

    def part_with(self, surplus: int) -> Tail:
        """Take the newest tokens out, for `rejoin`: an eviction that waited does not take in later tokens."""
        left = self.num_stored - surplus
        valid = None if self.valid is None else self.valid[:, :, left:]
        places = None if self.places is None else self.places[:, :, left:]
        tail = Tail(self.keys[:, :, left:], self.values[:, :, left:], valid, places)
        self.take_back(surplus)
        return tail

    def rejoin(self, tail: Tail) -> None:
        """Append tokens that `part_with` took out."""
        num_later = tail.keys.shape[2]
        if not num_later:
            return
        self._append(tail.keys, tail.values)
        if tail.places is not None and self.places is not None:
            self.places = torch.cat([self.places, tail.places], dim=2)
        if tail.valid is not None:
            before = self.keys.new_ones(self.keys.shape[:-1], dtype=torch.bool) if self.valid is None else self.valid
            self.valid = torch.cat([before[:, :, :-num_later], tail.valid], dim=-1)

    def preference(self, policy: Policy, *, backend: Backend | None = None) -> list[float]:
        """Ask the policy how much each row of this layer wants, see `Policy.preference`."""
        self._check_heads(policy)
        backend = backend or self.settings.backend or load("torch")
        parts, order = self._parts(policy)
        wants: list[float] = []
        for part in parts:
            found = preference(
                policy,
                _give(part.of(self.keys, order), backend),
                layer=self.index,
                num_layers=self.num_layers,
                **self._inputs(part, order, backend),
            )
            if found is None:
                raise ArgumentError(f"{type(policy).__name__}.preference must give a number per row; got None")
            wants += [float(x) for x in backend.to_numpy(found)]
        return wants

    @property
    def seen_by_row(self) -> list[int]:
        """Tokens that each row has seen: all, or in a batch with holes those that are no padding."""
        if not self.has_holes or self.num_hidden is None:
            return [self.num_seen] * self.keys.shape[0]
        return [int(x) for x in (self.num_seen - self.num_hidden).tolist()]

    def _check_heads(self, policy: Policy) -> None:
        """Refuse a policy that would decide otherwise if all heads were in this process."""
        needs, source = policy.needs(), self.source
        if source is None or source.has_all_heads:
            return
        if needs.couples_heads or needs.preferences:
            raise ArgumentError(
                "policy must decide for each KV head alone when tensor parallelism shares heads out over processes; "
                f"got {policy}"
            )
        if not source.has_whole_groups and policy.num_queries(self.num_stored):
            raise ArgumentError(
                "policy must do without queries when tensor parallelism parts the query heads of a KV head; "
                f"got {policy}"
            )

    def _parts(self, policy: Policy) -> tuple[list[Part], torch.Tensor | None]:
        """Return what is decided together, and an order of the slots that puts padding first where rows have holes.

        All rows together, unless they have budgets of their own; or holes: then each row is what it would be alone.
        """
        visible = self._visible_from_now_on() if self.has_holes else None
        budgets = self.row_budgets if policy == self.shared_by else None
        if visible is None and budgets is None:
            return [Part(policy, slice(None), self.num_seen)], None
        policies = [policy] * self.keys.shape[0]
        if budgets is not None:
            policies = [LayerBudgets(policy, (budget,) * self.num_layers) for budget in budgets.tolist()]
        parts = [Part(each, slice(row, row + 1), self.num_seen) for row, each in enumerate(policies)]
        if visible is None:
            return parts, None
        return [self._without_padding(part, visible[part.rows]) for part in parts], _padding_first(visible)

    def _without_padding(self, part: Part, visible: torch.Tensor) -> Part:
        """Reduce a part to the tokens and queries of its only row, (1, kv_heads, stored)."""
        row, num_stored = part.rows.start, self.num_stored
        # Heads differ in what they have dropped, not in what is new.
        num_old = next((sums.shape[2] for sums in self.state.values()), 0)
        num_tokens = max(1, int(visible.sum(dim=-1).max()))
        num_unsummed = int(visible[0, 0, num_old:].sum())
        num_new = int(visible[0, 0, num_stored - min(self.num_new, num_stored) :].sum())
        policy, is_at_rest = part.policy, False
        if self.num_evictions and self.num_new and not num_new and policy == self.settings.policy:
            # Nothing new in this row: alone, it would not have been evicted.
            policy, is_at_rest = LayerBudgets(policy, (num_tokens,) * self.num_layers), True
        return Part(
            policy,
            part.rows,
            max(num_tokens, self.seen_by_row[row]),
            num_stored - num_tokens,
            num_stored - num_unsummed,
            None if self.asked is None else int((self.asked[row] >= 0).sum()),
            is_at_rest,
        )

    def _inputs(self, part: Part, order: torch.Tensor | None, backend: Backend) -> dict[str, Any]:
        """Collect what `evict` and `preference` look at besides the keys."""
        num_tokens, valid = self.num_stored - part.first, self._visible_from_now_on()
        wanted = min(part.policy.num_queries(num_tokens), num_tokens)
        if part.num_queries is not None:
            wanted = min(wanted, part.num_queries)
        held = None if self.queries is None or not wanted else self.queries[part.rows, :, -wanted:]
        return {
            "values": _give(part.of(self.values, order), backend),
            "queries": None if held is None else _give(held, backend),
            "valid": None if valid is None else _give(part.of(valid, order), backend),
            "backend": backend,
        }

    def _state(self, part: Part, order: torch.Tensor | None, backend: Backend) -> dict[str, Any] | None:
        """Collect the running sums of a part."""
        found = {}
        for name, sums in self.state.items():
            rows = sums[part.rows]
            if order is not None:
                sides = (0, 0) * (sums.ndim - 3)
                rows = pad(rows, (*sides, 0, self.num_stored - sums.shape[2]))
                rows = _gathered(rows, order, part.rows)[:, :, part.first : part.first_unsummed]
            found[name] = _give(rows, backend)
        return found or None

    def _taken(
        self, decisions: Sequence[Eviction], parts: Sequence[Part], order: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return kept slots (batch, kv_heads, b), -1 at the front of shorter rows, and the sums that go with them."""
        kept, state = _take(decisions, self.keys.device)
        visible = self._visible_from_now_on()
        if order is None or visible is None:
            return kept, state
        first = torch.tensor([part.first for part in parts], device=kept.device)[:, None, None]
        index = order.gather(2, (kept.clamp(min=0) + first))
        return _in_line(torch.where((kept >= 0) & visible.gather(2, index), index, -1), state)

    def _unrotated_keys(self, rows: slice) -> torch.Tensor:
        """Compute the keys as they were before the rotary embedding."""
        rotation = rotary.check(self.rotation, self.places)
        return rotary.turn(self.keys[rows], rotation, None if self.places is None else self.places[rows])

    def _visible_from_now_on(self) -> torch.Tensor | None:
        """Return `valid` without what has left the sliding window."""
        if self.sliding_window is None:
            return self.valid
        in_window = self.true_positions > self.num_seen - self.sliding_window
        return in_window if self.valid is None else self.valid & in_window

    def _keep(self, kept: torch.Tensor, before: torch.Tensor, is_ragged: bool) -> None:
        """Gather what is kept, shape (batch, kv_heads, b); -1 at the front of the shorter rows of a ragged one."""
        if kept.shape[-1] == self.num_stored and not is_ragged:
            return
        rotation = rotary.check(self.rotation, self.places) if self.settings.rerotate else None
        freed, num_dropped = self.nbytes, self.num_stored - kept.shape[-1]
        index, was_valid = kept.clamp(min=0), self.valid
        valid = None if self.valid is None else self.valid.gather(2, index)
        self.positions = before.gather(2, index)
        if is_ragged:
            # Reads numbers back from the device, which equal heads and rows never do.
            unused = kept < 0
            self.positions = self.positions.masked_fill(unused, -1)
            valid = ~unused if valid is None else valid & ~unused
            num_dropped = int(((before >= 0).sum(dim=-1) - (self.positions >= 0).sum(dim=-1)).max())
        self.valid = valid
        self.num_dropped += num_dropped
        self.keys = self.keys.gather(2, index[..., None].expand(*index.shape, self.keys.shape[-1]))
        self.values = self.values.gather(2, index[..., None].expand(*index.shape, self.values.shape[-1]))
        if self.places is not None:
            places = self.places
            self.places = places.gather(2, index[..., None].expand(*index.shape, places.shape[-1]))
            if rotation is not None:
                # Contiguous up to the last token seen: new tokens go on at their true positions.
                to = rotary.contiguous(places, was_valid, index.shape[-1], valid)
                self.keys, self.places = rotary.turn(self.keys, rotation, self.places, to), to
        self.bytes_freed += freed - self.nbytes

    def _carried_over(self, policy: Policy, budget: int) -> torch.Tensor | None:
        """Keep the queries of tokens that are kept for sure, for a window that reaches back across the eviction."""
        settings = self.settings
        over = settings.policy is not None and settings.every is None
        protected = policy.num_protected(budget)
        if self.queries is None or over or policy.needs().state or not 0 < protected <= budget:
            return None
        return self.queries[:, :, -protected:].clone()

    def crop(self, argument: int) -> None:
        """Take back the newest tokens, at most those that came since the last eviction.

        Parameters
        ----------
        argument : int
            Minus the number of tokens to remove, or a positive number of tokens to leave.

        Raises
        ------
        ArgumentError
            If an eviction has happened since those tokens came: what it dropped cannot be restored.
        """
        self.take_back(self.check_crop(argument))

    def take_back(self, surplus: int) -> None:
        """Forget the newest tokens."""
        if not surplus:
            return
        left = self.num_stored - surplus
        self._forget_queries(surplus)
        if self.num_hidden is not None and self.valid is not None:
            self.num_hidden = self.num_hidden - (~self.valid[:, 0, left:]).sum(dim=1)
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        for name in ("positions", "places", "valid"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[:, :, :left])
        self.num_seen -= surplus
        self.num_new = max(0, self.num_new - surplus)
        self.settle_due()

    def _forget_queries(self, surplus: int) -> None:
        if self.queries is None:
            return
        if not self.has_holes or self.asked is None:
            left = max(0, self.queries.shape[2] - surplus)
            self.queries = self.queries[:, :, :left]
            self.asked = None if self.asked is None else self.asked[:, :left]
            return
        asked = torch.where(self.asked < self.num_seen - surplus, self.asked, -1)
        self.asked, order = asked.sort(dim=1, stable=True)
        self.queries = _gathered(self.queries, order[:, None].expand(*self.queries.shape[:2], -1))

    def check_crop(self, argument: int) -> int:
        """Return the number of tokens that `crop` would remove, or raise if it cannot."""
        surplus = min(versions.tokens_to_remove(argument, self.num_seen), self.num_seen)
        if not self.evicts and self.sliding_window is not None:
            left = self.num_seen - surplus
            if surplus and self.num_stored - surplus < min(self.sliding_window - 1, left):
                raise ArgumentError(
                    f"crop must leave layer {self.index} the {self.sliding_window - 1} tokens of its sliding window; "
                    f"taking back {surplus} would leave {self.num_stored - surplus}, because older ones are gone. Call "
                    "activate_past_recording() before the tokens come that may be taken back"
                )
            return surplus
        # Nothing dropped and nothing summed up: as if there had been no eviction.
        is_whole = self.num_seen == self.num_stored and not self.num_dropped and not self.state
        at_hand = self.num_stored if is_whole else self.num_new
        if surplus > at_hand:
            raise ArgumentError(
                f"crop must remove at most the {at_hand} tokens since the last eviction; got {surplus}. After "
                "activate_past_recording() evictions wait for the crop, as assisted decoding needs it"
            )
        return surplus

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of tokens seen: what positions and `generate` count by."""
        return self.num_seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the stored length with the new tokens, and how many tokens are missing before it."""
        stored = self.num_stored
        return stored + versions.number_of(query_length), self.num_seen - stored

    @property
    def true_positions(self) -> torch.Tensor:
        """Where the stored tokens stood, shape (batch, kv_heads, stored)."""
        if self.positions is not None:
            return self.positions
        stored = torch.arange(self.num_seen - self.num_stored, self.num_seen, device=self.keys.device)
        return stored.expand(*self.keys.shape[:2], -1)

    @property
    def index(self) -> int:
        """Which layer this is."""
        return 0 if self.source is None else self.source.index

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return 1 if self.source is None else self.source.num_layers

    @property
    def is_croppable(self) -> bool:
        """Whether the tokens of the next call can be taken back without a trace."""
        is_whole = self.num_seen == self.num_stored and not self.num_dropped and not self.state
        return self.record_past or (is_whole and self.settings.policy is None)

    @property
    def num_stored(self) -> int:
        """Slots per row that are stored."""
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.numel() else 0

    @property
    def redundancy(self) -> torch.Tensor:
        """The mean cosine of two different stored keys, shape (batch, kv_heads), float32."""
        return _redundancy(self.keys, self.valid)

    @property
    def nbytes(self) -> int:
        """Bytes of stored keys and values."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0

    def copy(self) -> EvictingLayer:
        """Return a layer that goes its own way from here. Tensors are shared: no layer ever writes into one."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def activate_past_recording(self) -> None:
        """Let evictions wait until `crop` has said which of the new tokens stay, as assisted decoding needs it."""
        self.record_past = True

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow the beams, positions and sums included."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._each_row(lambda x: x[indices.to(x.device)])

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("keys", "values", "positions", "places", "valid", "queries", "asked", "num_hidden", "row_budgets"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                setattr(self, name, change(tensor))
        self.state = {name: change(sums) for name, sums in self.state.items()}
        # It speaks of other rows.
        self.record = None


def _padding_first(valid: torch.Tensor) -> torch.Tensor:
    """Return the order along the last axis that puts what is not valid first and changes nothing else."""
    return valid.to(torch.uint8).argsort(dim=-1, stable=True)


def _gathered(tensor: torch.Tensor, order: torch.Tensor | None, rows: slice = slice(None)) -> torch.Tensor:
    """Put slots, the third axis, in order; of some rows."""
    if order is None:
        return tensor
    index = order[rows].reshape(*order[rows].shape, *(1 for _ in tensor.shape[3:]))
    return (tensor if tensor.shape[0] == index.shape[0] else tensor[rows]).gather(
        2, index.expand(*index.shape[:3], *tensor.shape[3:])
    )


def _give(tensor: torch.Tensor, backend: Backend) -> Any:
    """Hand a tensor to the backend that decides."""
    tensor = tensor.detach()
    if backend.library == "torch":
        return tensor
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return backend.xp.asarray(tensor.cpu().numpy())


def _take(decisions: Sequence[Eviction], device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Get kept indices and running sums of all rows back from the backend.

    Shorter rows are filled up with -1 at the front, so that the newest tokens of all rows stand in line at the end.
    """

    def joined(arrays: Sequence[Any], fill: int) -> torch.Tensor:
        # A copy, because some libraries hand out memory that must not be written to.
        rows = [
            x if each.backend.library == "torch" else torch.tensor(each.backend.to_numpy(x), device=device)
            for each, x in zip(decisions, arrays, strict=True)
        ]
        width = max(row.shape[2] for row in rows)
        sides = (0, 0) * (rows[0].ndim - 3)
        return torch.cat([pad(row, (*sides, 0, width - row.shape[2]), value=fill) for row in rows])

    kept = joined([each.kept for each in decisions], -1).to(device=device, dtype=torch.int64)
    names = decisions[0].state or {}
    state = {name: joined([(each.state or {})[name] for each in decisions], 0).to(device) for name in names}
    if not _are_ragged(decisions):
        return kept, state
    return _in_line(kept, state)


def _in_line(kept: torch.Tensor, state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sort kept slots and what goes with them, and cut off the front where no row holds anything."""
    kept, order = kept.sort(dim=-1, stable=True)
    unused = kept.shape[-1] - int((kept >= 0).sum(dim=-1).max())
    return kept[..., unused:], {name: _gathered(sums, order)[:, :, unused:] for name, sums in state.items()}


def _are_ragged(decisions: Sequence[Eviction]) -> bool:
    """Return whether heads or rows may keep different numbers of tokens."""
    return len(decisions) > 1 or decisions[0].head_budgets is not None


def _redundancy(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Compute the mean cosine of two different keys, shape (batch, kv_heads), from the length of the mean unit key."""
    keys = normalize(keys.float(), dim=-1)
    if valid is None:
        valid = keys.new_ones(keys.shape[:-1], dtype=torch.bool)
    keys = keys * valid[..., None]
    # Zero keys have no direction: their cosine with anything, themselves included, is 0.
    with_themselves = (keys * keys).sum(dim=(-1, -2))
    count = valid.sum(dim=-1)
    return ((keys.sum(dim=-2) ** 2).sum(dim=-1) - with_themselves) / (count * (count - 1)).clamp(min=1)
