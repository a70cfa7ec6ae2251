"""The cache of one attention layer: when it is evicted, and the account of what evictions did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ...core.backend import Backend, load
from ...core.errors import ArgumentError
from ...core.eviction import Eviction
from ...core.policy import Policy
from ...core.precision import Precision
from . import rotary, versions
from .decision import LEVELS, Decider, are_ragged, parted, precision_of
from .probes import HeldProbe
from .queries import Queries, check_window, num_held
from .record import EvictionRecord, redundancy
from .settings import Settings
from .slots import FILLS, OfSlots, Slots
from .source import Source
from .steady import Steady
from .tiers import TieredSlots, demoted, query_peaks

__all__ = ["EvictingLayer"]

# So many evictions of one token after each other, with nobody looking at the layer, make it worth to be steady.
CALM = 2

LOGGER = logging.getLogger(__name__)


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one attention layer, which knows what it has seen and what of it is left.

    Attributes
    ----------
    keys, values : torch.Tensor, shape (batch, kv_heads, stored, D)
        What is stored.
    num_seen : int
        Tokens that have passed through, evicted ones included.
    positions : torch.Tensor, shape (batch, kv_heads, stored), int64, or None
        True positions of the stored tokens, ascending; -1, at the front, in slots that a head with a smaller budget
        does not use. None as long as nothing was evicted.
    valid : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        False for padding and unused slots. None if there are none.
    rotation : Rotation or None
        How the model rotates the keys, in a cache that may have to rotate them.
    places : torch.Tensor, shape (batch, kv_heads, stored, axes), int64, or None
        The positions that the stored keys are rotated by, which may be the caller's own; None where nothing is rotated.
    queries : torch.Tensor, shape (batch, query_heads, Q, D), or None
        The last queries that a coming eviction needs, scaled such that q k / sqrt(D) is the attention logit.
    pinned : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        True for the tokens of the prompt, in a cache with ``protect_prompt=True``.
    state : dict of str to torch.Tensor, shape (batch, kv_heads, S, ...)
        Running sums per token of policies like H2O, for the first S stored tokens. Empty for others.
    mass : torch.Tensor, shape (batch, kv_heads, stored), float32, or None
        How many tokens each slot counts as, in attention and in the next eviction. None as long as nothing was merged.
    absorbed : torch.Tensor, shape (batch, kv_heads, stored), int32, or None
        How many dropped tokens went into each slot. None as long as nothing was merged.
    probes : tuple of HeldProbe
        What `EvictingCache.probe` has asked; until the next eviction, and as long as no token comes or goes.
    layer_state : mapping of str to torch.Tensor, shape (batch, ...)
        What a policy remembers of the layer as a whole, see `Memory.layer`. Empty for most.
    answering : Policy or None
        Answers queries in the place of the tokens that it has dropped, by what it remembers of the layer.
    query_peaks : torch.Tensor, shape (batch, kv_heads, D), or None
        The largest absolute query of every channel so far, where keys may be demoted and have to be balanced with them.
    budget : int or None
        Tokens per row that the last eviction aimed at, or found; the most of any row where rows differ.
    budgets_found : torch.Tensor, shape (batch,), int64, or None
        Tokens that each row kept at the last eviction, the most of any head, if the policy finds its budgets itself.
    num_evictions, num_dropped, bytes_freed : int
        Evictions that ran; tokens that they dropped per row, in the head that lost most; bytes that they freed.
    seconds : float
        Time that they took on the host.
    record : EvictionRecord or None
        The last eviction, in a cache with ``record=True``.
    is_apart : bool
        Whether the keys are not those of the text, but of a picture, for example. Such a layer is left alone.
    """

    keys = OfSlots[torch.Tensor]()
    values = OfSlots[torch.Tensor]()
    positions = OfSlots["torch.Tensor | None"]()
    places = OfSlots["torch.Tensor | None"]()
    valid = OfSlots["torch.Tensor | None"]()
    mass = OfSlots["torch.Tensor | None"]()
    absorbed = OfSlots["torch.Tensor | None"]()
    pinned = OfSlots["torch.Tensor | None"]()
    state = OfSlots[Mapping[str, torch.Tensor]]()
    is_initialized = False
    steady: Steady | None = None

    def __init__(self, settings: Settings, *, record_past: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.record_past = record_past
        self._reset()

    def _reset(self) -> None:
        self.is_initialized = False
        self.steady, self.num_calm = None, 0
        self.slots = Slots()
        self.layer_state: Mapping[str, torch.Tensor] = {}
        self.held = None
        self.probes: tuple[HeldProbe, ...] = ()
        self.num_seen = 0
        self.num_new = 0
        self.rotation: rotary.Rotation | None = None
        self.query_peaks: torch.Tensor | None = None
        self.row_budgets: torch.Tensor | None = None
        self.shared_by: Policy | None = None
        self.answering: Policy | None = None
        self.budget: int | None = None
        self.budgets_found: torch.Tensor | None = None
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
        # How many of the tokens seen were padding, shape (batch,); None as long as there was no padding.
        self.num_hidden: torch.Tensor | None = None
        self.awaits_queries = False
        self.certain = 0
        self.due_at: int | None = None

    @property
    def slots(self) -> Slots:
        """Everything per token in one value, in the order of the tokens: keys, values, positions, state and more."""
        self._settle()
        return self._slots

    @slots.setter
    def slots(self, slots: Slots) -> None:
        self._settle()
        self._slots = slots

    @property
    def held(self) -> Queries | None:
        """The last queries that a coming eviction needs."""
        self._settle()
        return self._held

    @held.setter
    def held(self, held: Queries | None) -> None:
        self._settle()
        self._held = held

    def _settle(self) -> None:
        """Return from the steady form, in which nothing is in order."""
        if self.steady is not None:
            steady, self.steady, self.num_calm = self.steady, None, 0
            self._slots, self._held = steady.settled()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for keys and values of these kinds."""
        self.slots = Slots.empty(key_states, value_states)
        # What transformers notes beside them differs from release to release.
        super().lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, num_pinned: int = 0, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens, the first `num_pinned` of them a prompt's, and return all that is stored."""
        self.awaits_queries = True
        if self.num_calm >= CALM and self._goes_steady(key_states, value_states):
            steady = self.steady
            assert steady is not None
            self.num_seen += 1
            self.num_new += 1
            # What is handed out is marked, and must not be so for ever.
            return steady.keys.detach(), steady.values.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        arrays: dict[str, Any] = {"keys": key_states, "values": value_states}
        if self.settings.protect_prompt:
            number = torch.arange(key_states.shape[2], device=key_states.device)
            arrays["pinned"] = (number < num_pinned).expand(key_states.shape[:3])
        self._append(arrays)
        return self.slots.keys, self.slots.values

    def _goes_steady(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Take one token into a steady layer, if it can be one."""
        policy = self.settings.policy
        if self.steady is None and policy is not None:
            self.steady = Steady.of(policy, self._slots, self._held, self.settings.backend)
            if self.steady is None:
                self.num_calm = 0
            else:
                # It has copies, and both would be twice the memory.
                self._slots, self._held = Slots(), None
        return (
            self.steady is not None
            and self.steady.fits(key_states, value_states)
            and self.steady.append(key_states, value_states, self.num_seen)
        )

    def _append(self, arrays: dict[str, Any]) -> None:
        """Append tokens, given by their arrays, at the next positions."""
        keys, start, slots = arrays["keys"], self.num_seen, self.slots
        self.num_seen = end = start + keys.shape[2]
        self.num_new += end - start
        self.probes = ()
        if slots.positions is not None:
            arrays["positions"] = torch.arange(start, end, device=keys.device).expand(keys.shape[:3])
        for name in ("valid", "mass", "absorbed"):
            held = getattr(slots, name)
            if held is not None and arrays.get(name) is None:
                arrays[name] = held.new_full(keys.shape[:3], FILLS[name])
        self.slots = slots.append(arrays)

    def note_padding(self, padding: torch.Tensor | None, num_new: int) -> None:
        """Note which tokens are padding, shape (batch, tokens seen or new tokens), before the attention."""
        if padding is None:
            return
        if padding.shape[1] not in (self.num_seen, num_new):
            raise ArgumentError(
                f"attention_mask must have one column for each of {self.num_seen} tokens seen so far; "
                f"got {padding.shape[1]}"
            )
        # Tokens seen before the mask begins.
        offset = self.num_seen - padding.shape[1]
        rows = torch.arange(padding.shape[0], device=padding.device)[:, None]
        where = self.true_positions - offset
        # What the mask does not cover stays as it is.
        valid = padding[rows[..., None], where.clamp(min=0)] | (where < 0)
        if self.slots.valid is not None:
            valid = self.slots.valid & valid
        self.slots = self.slots.having(valid=valid)
        hidden = (~padding).sum(dim=1)
        if self.num_hidden is not None and offset:
            hidden = hidden + self.num_hidden
        self.num_hidden = hidden
        if self.held is not None:
            asked = self.held.positions(self.num_seen - num_new)
            where = asked - offset
            asked = torch.where(padding[rows, where.clamp(min=0)] | (where < 0), asked, -1)
            self.held = self.held._replace(asked=asked)
        self.has_holes = self.has_holes or bool((valid[:, :, :-1] & ~valid[:, :, 1:]).any())

    def after_attention(
        self, source: Source, query: torch.Tensor, scaling: float | None, sliding_window: int | None
    ) -> None:
        """Note a finished attention, and of whether an eviction is due."""
        self.source, self.sliding_window = source, sliding_window
        # Where a model mixes sliding and full layers, the sliding ones are small already.
        self.evicts = not (source.is_mixed and sliding_window is not None)
        self.awaits_queries = False
        if self.evicts:
            self._buffer_queries(query, scaling)
            self.certain = self.num_seen
            self.schedule()
        elif not self.record_past:
            self.trim_window()

    def _buffer_queries(self, query: torch.Tensor, scaling: float | None) -> None:
        """Keep the queries that the next eviction will ask for, and no more."""
        settings = self.settings
        if self.steady is not None:
            self.steady.ask(Queries.of(query, scaling, None, self.num_seen).queries)
            return
        if settings.is_probing:
            self.held = Queries.of(query, scaling, None, self.num_seen)
            return
        if settings.policy is None:
            wanted = settings.num_queries
        elif self.num_evictions and settings.every is None:
            wanted = 0
        else:
            wanted = settings.policy.num_queries(self.num_stored)
        if not wanted:
            self.held = None
            return
        if self.record_past:
            wanted += query.shape[2]
        held = Queries.of(query, scaling, self.slots.valid, self.num_seen)
        self._note_peaks(held)
        if self.held is not None:
            held = self.held.append(held, self.num_seen - query.shape[2])
        self.held = (held.padding_first() if self.has_holes else held).last(wanted)

    def _note_peaks(self, new: Queries) -> None:
        """Keep the largest queries of every channel, until they have balanced the keys that are demoted."""
        policy = self.settings.policy
        if isinstance(self.slots, TieredSlots) or not (policy is None or policy.needs().demotes):
            return
        self.query_peaks = query_peaks(new.queries, new.asked, self.slots.keys.shape[1], self.query_peaks)

    def note_places(self, module: torch.nn.Module, num_new: int) -> None:
        """Note how the keys are rotated and where the new ones are, if they may have to be rotated."""
        policy = self.settings.policy
        may_rotate = self.settings.rerotate or policy is None or policy.needs().unrotated_keys
        if not (may_rotate and self.evicts) or self.settings.is_probing:
            return
        rows, heads = self.slots.keys.shape[:2]
        self.rotation, places = rotary.look(module, self.rotation, rows, self.num_seen - num_new, num_new)
        if places is not None:
            places = places.to(self.slots.keys.device)[:, None].expand(-1, heads, -1, -1)
            self.slots = self.slots.reaching("places", places)

    def trim_window(self) -> None:
        """Drop what has left the window of a sliding layer, once it will not be taken back."""
        if not self.evicts and self.sliding_window is not None and self.num_stored > self.sliding_window - 1:
            self.slots = self.slots.last(self.sliding_window - 1).clone()

    def schedule(self) -> None:
        """Compute whether an eviction is due, and over how many of the tokens seen."""
        every, is_first = self.settings.every, self.num_evictions == 0
        self.due_at = None
        if not self.evicts or self.settings.policy is None or not self.num_seen:
            return
        if is_first:
            self.due_at = min(self.certain, self.num_seen)
        elif every is not None and self.num_new >= every:
            self.due_at = min(max(self.certain, self.num_seen - self.num_new + every), self.num_seen)

    def split_off(self, count: int) -> Slots:
        """Take the newest tokens out, for `rejoin`: an eviction that waited does not take in later tokens."""
        newest = self.slots.last(count)
        self.remove_newest(count)
        return newest

    def rejoin(self, newest: Slots) -> None:
        """Append tokens that `split_off` took out."""
        if newest.count:
            self._append({**vars(newest)})

    def evict(self, policy: Policy, *, backend: Backend | None = None) -> tuple[Eviction, ...]:
        """Shrink to what the policy keeps.

        Parameters
        ----------
        policy : Policy
        backend : Backend, optional
            What decides. Default: the cache's; torch if it has none.

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
        if policy.needs().merges and isinstance(self.slots, TieredSlots):
            raise ArgumentError(f"policy must not merge tokens of which some are kept in fewer bits; got {policy}")
        self._check_answers(policy)
        decider = self.decider(policy, backend)
        decisions = decider.evict(policy)
        self.shrink(policy, decider, decisions, seconds=perf_counter() - started)
        return decisions

    def step(self, policy: Policy) -> bool:
        """Drop one token for the one that came, where the layer is steady; return whether that was all."""
        started, steady = perf_counter(), self.steady
        if steady is None or policy is not steady.policy or not steady.drop():
            return False
        nbytes = (steady.keys.nbytes + steady.values.nbytes) // steady.keys.shape[2]
        self.num_new, self.due_at = 0, None
        self.num_evictions += 1
        self.num_dropped += 1
        self.bytes_freed += nbytes
        seconds = perf_counter() - started
        self.seconds += seconds
        LOGGER.debug("layer %d: one token went for the one that came, in %.1f ms", self.index, seconds * 1e3)
        return True

    def _check_answers(self, policy: Policy) -> None:
        """Refuse a policy that would answer for tokens that no query is to see, or not where they were."""
        if not policy.needs().answers:
            return
        if self.sliding_window is not None:
            raise ArgumentError(
                f"policy must not answer for dropped tokens in a layer whose window leaves them behind; got {policy}"
            )
        if self.settings.rerotate:
            raise ArgumentError(f"rerotate must be False for a policy that answers for dropped tokens; got {policy}")

    def shrink(self, policy: Policy, decider: Decider, decisions: tuple[Eviction, ...], *, seconds: float) -> None:
        """Keep what was decided in so many seconds; see `evict`."""
        started = perf_counter()
        aimed_at = [each.budget for each, part in zip(decisions, decider.parts, strict=True) if not part.is_at_rest]
        budget = max(aimed_at, default=self.budget or 0)
        is_other = policy != self.settings.policy and not policy.needs().automatic
        if self.num_dropped and self.budget is not None and is_other and budget > self.budget:
            raise ArgumentError(
                f"policy must not ask for more tokens than the {self.budget} that an earlier eviction left; "
                f"got a budget of {budget}"
            )
        if self.settings.every is not None and not is_other and not policy.needs().automatic:
            check_window(policy, budget, self.settings.every)
        positions, num_before, freed_before = self.true_positions, self.num_stored, self.bytes_freed
        kept, others = decider.kept(decisions)
        if "mass" in others and isinstance(self.slots, TieredSlots):
            raise ArgumentError(
                f"policy must not merge tokens in a cache that holds some in fewer bits; {type(policy).__name__} does"
            )
        self._gather(kept, others, precision_of(decisions), is_ragged=are_ragged(decisions))
        self.layer_state = decider.of_layer([each.state for each in decisions])
        self.answering = policy if policy.needs().answers else None
        self.held = self._queries_after(policy, budget)
        self.budgets_found = None
        if policy.needs().automatic:
            self.budgets_found = (kept >= 0).sum(dim=-1).amax(dim=1)
            budget = int(self.budgets_found.max())
        self.probes = ()
        self._note_calm(policy, num_before)
        self.budget, self.num_new, self.due_at = budget, 0, None
        self.num_evictions += 1
        if self.settings.record:
            self.record = EvictionRecord.of(decider, policy, decisions, positions, self.redundancy)
        seconds += perf_counter() - started
        self.seconds += seconds
        LOGGER.debug(
            "layer %d: %s kept %d of %d stored tokens under a budget of %d, %d seen; %.2f MB freed in %.1f ms",
            self.index,
            type(policy).__name__,
            self.num_stored,
            num_before,
            budget,
            self.num_seen,
            (self.bytes_freed - freed_before) / 1e6,
            seconds * 1e3,
        )

    def _note_calm(self, policy: Policy, num_before: int) -> None:
        """Count the evictions in which one token has gone for one, under settings that a steady layer can keep to."""
        settings = self.settings
        is_calm = (
            settings.every == 1
            and self.num_new == 1
            and policy is settings.policy
            and num_before == self.num_stored + 1
            and not (settings.record or settings.rerotate or settings.protect_prompt or self.record_past)
            and self.row_budgets is None
            and self.sliding_window is None
            and self.source is not None
            and self.source.has_all_heads
            and not self.layer_state
        )
        self.num_calm = self.num_calm + 1 if is_calm else 0

    def wants(self, policy: Policy, *, backend: Backend | None = None) -> list[float]:
        """Return how much of the common budget each row of this layer wants, see `Policy.wants`."""
        return self.decider(policy, backend).wants(policy)

    def decider(self, policy: Policy, backend: Backend | None) -> Decider:
        """Return the layer as the policy sees it.

        Raises
        ------
        ArgumentError
            If the layer holds some of the heads only and the policy needs all.
        """
        if self.source is not None:
            self.source.check_policy(policy, self.num_stored)
        slots = self._visible()
        budgets = None if self.row_budgets is None or policy != self.shared_by else self.row_budgets.tolist()
        may_rest = self.num_evictions and policy == self.settings.policy
        parts, order = parted(
            slots,
            self.seen_by_row,
            queries=self.held,
            budgets=budgets,
            has_holes=self.has_holes,
            num_new=self.num_new or None if may_rest else None,
            pinned=_most_pinned(slots),
        )
        return Decider(
            slots=slots,
            layer_state=self.layer_state,
            queries=self.held,
            probes=[each.of(self.true_positions) for each in self.probes],
            rotation=self.rotation,
            parts=parts,
            order=order,
            layer=self.index,
            num_layers=self.num_layers,
            backend=backend or self.settings.backend or load("torch"),
            number=self.num_evictions,
        )

    def _visible(self) -> Slots:
        """Return the slots; what has left the sliding window is not valid."""
        if self.sliding_window is None:
            return self.slots
        in_window = self.true_positions > self.num_seen - self.sliding_window
        return self.slots.having(valid=in_window if self.slots.valid is None else self.slots.valid & in_window)

    @property
    def seen_by_row(self) -> list[int]:
        """Tokens that each row has seen: all, or in a batch with holes those that are not padding."""
        if not self.has_holes or self.num_hidden is None:
            return [self.num_seen] * self.slots.keys.shape[0]
        return [int(x) for x in (self.num_seen - self.num_hidden).tolist()]

    def _gather(
        self, kept: torch.Tensor, others: Mapping[str, Any], precision: Precision | None, *, is_ragged: bool
    ) -> None:
        """Gather what is kept, shape (batch, kv_heads, b); -1 at the front of the shorter rows of a ragged one.

        `others` are the arrays of the kept slots that the eviction made anew.
        """
        before, levels = self.slots, others.get(LEVELS)
        others = {name: each for name, each in others.items() if name != LEVELS}
        if kept.shape[-1] == before.count and not is_ragged:
            after = before
            if levels is not None:
                after = demoted(before, before, kept, levels, precision, self.query_peaks)
            self.bytes_freed += before.nbytes - after.nbytes
            self.slots = after.having(**others)
            return
        rotation = rotary.check(self.rotation, before.places) if self.settings.rerotate else None
        positions, num_dropped = self.true_positions, before.count - kept.shape[-1]
        after = before.having(positions=positions, state={}).take(kept, has_unused=is_ragged).having(**others)
        if is_ragged and after.positions is not None:
            # Reads numbers back from the device, which equal heads and rows never do.
            num_dropped = int(((positions >= 0).sum(dim=-1) - (after.positions >= 0).sum(dim=-1)).max())
        if rotation is not None and before.places is not None:
            # Contiguous up to the last token seen: new tokens go on at their true positions.
            to = rotary.contiguous(before.places, before.valid, after.count, after.valid)
            after = after.having(keys=rotary.rotate(after.keys, rotation, after.places, to), places=to)
        after = demoted(after, before, kept, levels, precision, self.query_peaks)
        self.num_dropped += num_dropped
        self.bytes_freed += before.nbytes - after.nbytes
        self.slots = after

    def _queries_after(self, policy: Policy, budget: int) -> Queries | None:
        """Return the queries of tokens that are kept for sure, for a window that reaches back across the eviction."""
        settings = self.settings
        over = settings.policy is not None and settings.every is None
        # What has been summed up is not asked again; a memory that no attention goes into sums nothing up.
        sums_up = bool(policy.needs().state) and policy.needs().queries != "window"
        if self.held is None or over or sums_up:
            return None
        return self.held.last(num_held(policy, budget))

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
        self.remove_newest(self.check_crop(argument))

    def remove_newest(self, count: int) -> None:
        """Forget the newest tokens."""
        if not count:
            return
        left, self.probes = self.num_stored - count, ()
        if self.held is not None:
            self.held = self.held.without_newest(count, self.num_seen - count, has_holes=self.has_holes)
        if self.num_hidden is not None and self.slots.valid is not None:
            self.num_hidden = self.num_hidden - (~self.slots.valid[:, 0, left:]).sum(dim=1)
        self.slots = self.slots.first(left)
        self.num_seen -= count
        self.num_new = max(0, self.num_new - count)
        self.schedule()

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
        at_hand = self.num_stored if self._is_whole else self.num_new
        if surplus > at_hand:
            raise ArgumentError(
                f"crop must remove at most the {at_hand} tokens since the last eviction; got {surplus}. After "
                "activate_past_recording() evictions wait for the crop, as assisted decoding needs it"
            )
        return surplus

    @property
    def _is_whole(self) -> bool:
        """Whether nothing was dropped and nothing summed up: as if there had been no eviction."""
        remembers = self.slots.state or self.layer_state or isinstance(self.slots, TieredSlots)
        return self.num_seen == self.num_stored and not self.num_dropped and not remembers

    @property
    def is_croppable(self) -> bool:
        """Whether the tokens of the next call can be taken back without a trace."""
        return self.record_past or (self._is_whole and self.settings.policy is None)

    def activate_past_recording(self) -> None:
        """Let evictions wait until `crop` has taken back what assisted decoding guessed wrong."""
        self._settle()
        self.record_past = True

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of tokens seen: what positions and `generate` count by."""
        return self.num_seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the stored length with the new tokens, and how many tokens are missing before it."""
        stored = self.num_stored
        return stored + versions.number_of(query_length), self.num_seen - stored

    @property
    def true_positions(self) -> torch.Tensor:
        """True positions of the stored tokens, shape (batch, kv_heads, stored)."""
        return self.slots.true_positions(self.num_seen)

    @property
    def queries(self) -> torch.Tensor | None:
        """The last queries that a coming eviction needs."""
        return None if self.held is None else self.held.queries

    @property
    def index(self) -> int:
        """Index of the layer."""
        return 0 if self.source is None else self.source.index

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return 1 if self.source is None else self.source.num_layers

    @property
    def num_stored(self) -> int:
        """Slots per row that are stored."""
        return self._slots.count if self.steady is None else self.steady.count

    @property
    def redundancy(self) -> torch.Tensor:
        """The mean cosine of two different stored keys, shape (batch, kv_heads), float32."""
        return redundancy(self.slots.keys, self.slots.valid)

    @property
    def nbytes(self) -> int:
        """Bytes of stored keys and values, of what answers in the place of others, and of sums for steps in place."""
        state = 0 if self.answering is None else sum(x.nbytes for x in self.layer_state.values())
        return int((self._slots if self.steady is None else self.steady).nbytes + state)

    def copy(self) -> EvictingLayer:
        """Return a layer that goes its own way from here. Tensors are shared: only steady layers write into theirs."""
        self._settle()
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self._reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow the beams, positions and sums included."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._change_rows(lambda x: x[indices.to(x.device)])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.slots = self.slots.rows(change)
        self.layer_state = {name: change(x) for name, x in self.layer_state.items()}
        self.held = None if self.held is None else self.held.rows(change)
        self.query_peaks = None if self.query_peaks is None else change(self.query_peaks)
        self.probes = tuple(each.rows(change) for each in self.probes)
        self.num_hidden = None if self.num_hidden is None else change(self.num_hidden)
        self.row_budgets = None if self.row_budgets is None else change(self.row_budgets)
        self.budgets_found = None if self.budgets_found is None else change(self.budgets_found)
        # It is about other rows.
        self.record = None


def _most_pinned(slots: Slots) -> list[int]:
    """Count the tokens of the prompt that each row can see, in the head that has most."""
    if slots.pinned is None:
        return [0] * slots.keys.shape[0]
    pinned = slots.pinned if slots.valid is None else slots.pinned & slots.valid
    found: list[int] = pinned.sum(dim=-1).amax(dim=-1).tolist()
    return found
