"""The decision what one layer keeps: for all rows together, or row by row where rows differ in budget or padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from ...core.backend import Backend
from ...core.errors import ArgumentError
from ...core.eviction import Eviction, evict, evict_layers, observe, wants
from ...core.layer import Layer, Memory, Probe
from ...core.policy import Assessment, Policy, Requirements, Wrapper
from ...core.precision import Precision
from . import rotary
from .handover import from_backend, to_backend
from .pinned import check_room, with_pinned
from .queries import Queries
from .slots import FILLS, Slots, gathered, in_line, padding_first

__all__ = ["LEVELS", "Decider", "Part", "are_ragged", "evict_together", "parted", "precision_of"]

# Not the name of anything that a policy remembers.
LEVELS = "levels of the tokens"


@dataclass(frozen=True, kw_only=True)
class Part:
    """The subject of one decision: some rows, and of a row with holes its last tokens once padding comes first.

    Attributes
    ----------
    rows : slice
        All rows of the batch, or one.
    num_seen : int
        Tokens that budgets are shares of.
    num_tokens, num_summed : int or None
        Of a row with holes: its tokens, and the first ones of them that running sums know.
    num_queries : int or None
        Queries that are those of tokens and not of padding; None if all may count.
    budget : int or None
        Instead of the policy's own.
    num_pinned : int
        Tokens of the prompt that must not go, in the row and head with most of them.
    is_at_rest : bool
        Whether nothing new has come in this row, so that all of it stays.
    """

    rows: slice
    num_seen: int
    num_tokens: int | None = None
    num_summed: int | None = None
    num_queries: int | None = None
    budget: int | None = None
    num_pinned: int = 0
    is_at_rest: bool = False

    def of(self, slots: Slots, order: torch.Tensor | None) -> Slots:
        """Return the slots of this part."""
        own = slots.rows(lambda x: x[self.rows])
        if order is None or self.num_tokens is None:
            return own
        own = own.take(order[self.rows]).last(self.num_tokens)
        return own.having(state={name: sums[:, :, : self.num_summed] for name, sums in own.state.items()})


def parted(
    slots: Slots,
    seen: Sequence[int],
    *,
    queries: Queries | None,
    budgets: Sequence[int] | None,
    has_holes: bool,
    num_new: int | None,
    pinned: Sequence[int],
) -> tuple[list[Part], torch.Tensor | None]:
    """Compute what is decided together, and an order of the slots that puts padding first where rows have holes.

    All rows together, unless they have budgets or prompts of their own; or holes: then each row is what it would be
    alone.

    Parameters
    ----------
    slots : Slots
        `valid` only where the next token can see it.
    seen : sequence of int
        Tokens that each row has seen.
    queries : Queries or None
    budgets : sequence of int or None
        One per row, instead of the policy's.
    has_holes : bool
        Whether padding has followed a token in any row.
    num_new : int or None
        A row without a token among that many newest slots is at rest. None: no row is.
    pinned : sequence of int
        Tokens of the prompt that each row must keep.

    Returns
    -------
    tuple of list of Part and torch.Tensor (batch, kv_heads, stored) or None
    """
    has_holes = has_holes and slots.valid is not None
    if not has_holes and budgets is None and len(set(pinned)) < 2:
        return [Part(rows=slice(None), num_seen=max(seen, default=0), num_pinned=max(pinned, default=0))], None
    parts = [
        Part(
            rows=slice(row, row + 1),
            num_seen=count,
            budget=None if budgets is None else budgets[row],
            num_pinned=pinned[row],
        )
        for row, count in enumerate(seen)
    ]
    if slots.valid is None or not has_holes:
        return parts, None
    asked = None if queries is None else queries.asked
    # Heads differ in what they have dropped, not in what is new.
    num_old = next((sums.shape[2] for sums in slots.state.values()), 0)
    split = [_without_padding(part, slots.valid, asked, num_old=num_old, num_new=num_new) for part in parts]
    return split, padding_first(slots.valid)


def _without_padding(
    part: Part, valid: torch.Tensor, asked: torch.Tensor | None, *, num_old: int, num_new: int | None
) -> Part:
    """Reduce a part to the tokens and queries of its only row."""
    row = part.rows.start
    num_tokens = max(1, int(valid[row].sum(dim=-1).max()))
    # Alone, a row without new tokens would not have been evicted.
    is_at_rest = part.budget is None and num_new is not None and not bool(valid[row, 0, -num_new:].any())
    return replace(
        part,
        num_seen=max(num_tokens, part.num_seen),
        num_tokens=num_tokens,
        num_summed=num_tokens - int(valid[row, 0, num_old:].sum()),
        num_queries=None if asked is None else int((asked[row] >= 0).sum()),
        budget=num_tokens if is_at_rest else part.budget,
        is_at_rest=is_at_rest,
    )


@dataclass(frozen=True)
class AtRest(Wrapper):
    """A policy over a row that all of stays, even where the policy would find a budget itself."""

    def needs(self) -> Requirements:
        """Return the needs of the base, which does not look for a budget now."""
        return replace(super().needs(), automatic=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decider:
    """One layer as a policy sees it.

    Attributes
    ----------
    slots : Slots
        `valid` only where the next token can see it.
    layer_state : mapping of str to torch.Tensor, shape (batch, ...)
        What the policy remembers of the layer as a whole.
    queries : Queries or None
    probes : sequence of Probe
        Of torch tensors; what each is about has the order of the slots.
    rotation : Rotation or None
    parts, order
        See `parted`.
    layer, num_layers : int
    backend : Backend
    number : int
        Evictions of the layer before this one.
    """

    slots: Slots
    layer_state: Mapping[str, torch.Tensor]
    queries: Queries | None
    probes: Sequence[Probe]
    rotation: rotary.Rotation | None
    parts: Sequence[Part]
    order: torch.Tensor | None
    layer: int
    num_layers: int
    backend: Backend
    number: int

    def evict(self, policy: Policy) -> tuple[Eviction, ...]:
        """Let the policy choose what each part keeps."""
        decisions = tuple(
            evict(self.policy_of(policy, part), keys, **facts)
            for part, (keys, facts) in zip(self.parts, self.given(policy), strict=True)
        )
        for part, decision in zip(self.parts, decisions, strict=True):
            _check(policy, decision)
            check_room(part.num_pinned, decision.budget, self.layer)
            self._check_pinned(policy, part, decision)
        return decisions

    def _check_pinned(self, policy: Policy, part: Part, decision: Eviction) -> None:
        """Refuse the choice of a policy that does not keep to what is protected."""
        slots = part.of(self.slots, self.order) if part.num_pinned else Slots()
        if slots.pinned is None:
            return
        marks = slots.pinned if slots.valid is None else slots.pinned & slots.valid
        kept = from_backend(decision.kept, self.backend, marks.device).to(torch.int64)
        found = marks.gather(2, kept.clamp(min=0)) & (kept >= 0)
        lost = int((marks.sum(dim=-1) - found.sum(dim=-1)).max())
        if lost:
            raise ArgumentError(
                f"policy must keep the prompt with protect_prompt=True; {type(policy).__name__} dropped {lost} of its "
                f"tokens in layer {self.layer}"
            )

    def policy_of(self, policy: Policy, part: Part) -> Policy:
        """Return the policy that decides this part of this eviction."""
        policy = policy.with_base(lambda base: base.renewed(self.number))
        marks = part.of(self.slots, self.order).pinned if part.num_pinned else None
        if marks is not None:
            policy = with_pinned(policy, to_backend(marks, self.backend), part.num_pinned)
        return AtRest(policy) if part.is_at_rest else policy

    def given(self, policy: Policy) -> list[tuple[Any, dict[str, Any]]]:
        """Collect the keys and the other arguments of `evict` for each part."""
        needs_unrotated = policy.needs().unrotated_keys
        rotation = rotary.check(self.rotation, self.slots.places) if needs_unrotated else None
        return [self._given(policy, part, rotation) for part in self.parts]

    def _given(self, policy: Policy, part: Part, rotation: rotary.Rotation | None) -> tuple[Any, dict[str, Any]]:
        slots = part.of(self.slots, self.order)
        unrotated = None if rotation is None else rotary.rotate(slots.keys, rotation, slots.places)
        return to_backend(slots.keys, self.backend), {
            **self._facts(policy, part, slots),
            "budget": part.budget,
            "tokens_seen": part.num_seen,
            "unrotated_keys": None if unrotated is None else to_backend(unrotated, self.backend),
        }

    def observe(self, policy: Policy) -> tuple[Memory, ...]:
        """Return what the policy remembers of each part, without evicting anything."""
        found = []
        for part in self.parts:
            slots = part.of(self.slots, self.order)
            memory = observe(policy, to_backend(slots.keys, self.backend), **self._facts(policy, part, slots))
            found.append(memory or Memory())
        return tuple(found)

    def chosen_by_importance(self, policy: Policy, decisions: Sequence[Eviction]) -> tuple[Any, ...]:
        """Let the policy choose from each part once more by its importance, as if no stage had re-scored it.

        Parameters
        ----------
        policy : Policy
        decisions : sequence of Eviction
            Of the same policy, one per part.

        Returns
        -------
        tuple of array (batch, kv_heads, b) or None
            What it would have kept, in arrays of the backend. None for a part where nothing was scored.
        """
        found: list[Any] = []
        for part, decision in zip(self.parts, decisions, strict=True):
            if decision.importance is None:
                found.append(None)
                continue
            slots = part.of(self.slots, self.order)
            facts = self._facts(policy, part, slots)
            facts.pop("state")
            layer = Layer(to_backend(slots.keys, self.backend), **facts)
            as_found = Assessment(
                importance=decision.importance,
                scores=decision.importance,
                protected=decision.protected,
                counts=decision.counts,
            )
            with layer.backend.guarded(layer.keys):
                choice = policy.at(self.layer, self.num_layers).choose(
                    as_found, layer, min(decision.budget, layer.num_tokens)
                )
            found.append(choice.kept)
        return tuple(found)

    def wants(self, policy: Policy) -> list[float]:
        """Return how much each row of this layer wants, see `Policy.wants`."""
        result: list[float] = []
        for part in self.parts:
            slots = part.of(self.slots, self.order)
            keys = to_backend(slots.keys, self.backend)
            found = wants(policy, keys, **self._facts(policy, part, slots))
            if found is None:
                raise ArgumentError(f"wants of {type(policy).__name__} must return a number per row; got None")
            result += [float(x) for x in self.backend.to_numpy(found)]
        return result

    def _facts(self, policy: Policy, part: Part, slots: Slots) -> dict[str, Any]:
        """Collect the arguments that `evict`, `observe` and `wants` share, besides the keys."""
        needs = policy.needs()
        wanted = min(policy.num_queries(slots.count), slots.count)
        if part.num_queries is not None:
            wanted = min(wanted, part.num_queries)
        arrays = {"values": slots.values if needs.values else None, "valid": slots.valid, "mass": slots.mass}
        if self.queries is not None and wanted:
            arrays["queries"] = self.queries.queries[part.rows, :, -wanted:]
        given = {name: to_backend(each, self.backend) for name, each in arrays.items() if each is not None}
        tokens = {name: to_backend(sums, self.backend) for name, sums in slots.state.items()}
        layer = {name: to_backend(x[part.rows], self.backend) for name, x in self.layer_state.items()}
        state = Memory(tokens=tokens, layer=layer) if tokens or layer else None
        if needs.probes:
            given["probes"] = [self._probe(probe, part) for probe in self.probes]
        return given | {"layer": self.layer, "num_layers": self.num_layers, "state": state, "backend": self.backend}

    def _probe(self, probe: Probe, part: Part) -> Probe:
        """Return a probe of some rows, in arrays of the backend."""
        arrays = {}
        for name in ("queries", "keys", "valid", "about", "before"):
            tensor = getattr(probe, name)
            if tensor is not None and name in ("about", "before"):
                tensor = self.in_order(tensor)
                tensor = tensor if part.num_tokens is None else tensor[..., tensor.shape[-1] - part.num_tokens :]
            arrays[name] = None if tensor is None else to_backend(tensor[part.rows], self.backend)
        return replace(probe, **arrays)

    def in_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor (batch, kv_heads, stored, ...) with padding first where rows have holes."""
        return tensor if self.order is None else gathered(tensor, self.order)

    def kept(self, decisions: Sequence[Eviction]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return kept slots (batch, kv_heads, b), -1 at the front of shorter rows, and their arrays that are new.

        These are the state; after a merge, keys, values, mass and absorbed, see `Slots`; and `LEVELS` where
        some tokens are demoted.
        """
        device, valid = self.slots.keys.device, self.slots.valid
        kept = _below([each.kept for each in decisions], self.backend, device, -1).to(torch.int64)
        others: dict[str, Any] = {"state": self.of_tokens([each.state for each in decisions])}
        if any(each.merge is not None for each in decisions):
            others |= self._merged(decisions)
        if any(each.levels is not None for each in decisions):
            # A row at rest has no levels: what it demoted before stays so.
            levels = [
                each.backend.xp.zeros_like(each.kept) if each.levels is None else each.levels for each in decisions
            ]
            others[LEVELS] = _below(levels, self.backend, device, 0).to(torch.uint8)
        if are_ragged(decisions):
            # The newest tokens of all rows are aligned at the end.
            kept, others = in_line(kept, others)
        if self.order is None or valid is None:
            return kept, others
        first = torch.tensor([self.slots.count - decision.num_tokens for decision in decisions], device=device)
        index = self.order.gather(2, kept.clamp(min=0) + first[:, None, None])
        return in_line(torch.where((kept >= 0) & valid.gather(2, index), index, -1), others)

    def _merged(self, decisions: Sequence[Eviction]) -> dict[str, torch.Tensor]:
        """Return what the kept slots hold after a merge, the parts below each other."""
        device = self.slots.keys.device
        found: dict[str, list[Any]] = {name: [] for name in ("keys", "values", "mass", "absorbed")}
        for part, decision in zip(self.parts, decisions, strict=True):
            slots = part.of(self.slots, self.order)
            given = (to_backend(slots.keys, self.backend), to_backend(slots.values, self.backend))
            keys, values = decision.compress(*given)
            mass = torch.ones(tuple(decision.kept.shape), device=device)
            if decision.mass is not None:
                # Slots that a row does not use count as none, and have no logarithm.
                given_mass = from_backend(decision.mass, self.backend, device)
                mass = torch.where(given_mass > 0, given_mass, mass)
            found["keys"].append(from_backend(keys, self.backend, device).to(slots.keys.dtype))
            found["values"].append(from_backend(values, self.backend, device).to(slots.values.dtype))
            found["mass"].append(mass.float())
            found["absorbed"].append(_absorbed(decision, slots, self.backend))
        return {name: _put_below(each, FILLS[name]) for name, each in found.items()}

    def of_tokens(self, memories: Sequence[Memory | None]) -> dict[str, torch.Tensor]:
        """Put what is remembered of each part's tokens below each other."""
        device, found = self.slots.keys.device, [{} if each is None else each.tokens for each in memories]
        return {name: _below([each[name] for each in found], self.backend, device, 0) for name in found[0]}

    def of_layer(self, memories: Sequence[Memory | None]) -> dict[str, torch.Tensor]:
        """Put what is remembered of the layer in each part below each other; a row at rest keeps what it had."""
        device, found = self.slots.keys.device, [{} if each is None else each.layer for each in memories]
        return {
            name: torch.cat([
                self.layer_state[name][part.rows]
                if part.is_at_rest and name in self.layer_state
                else from_backend(each[name], self.backend, device)
                for part, each in zip(self.parts, found, strict=True)
            ])
            for name in found[0]
        }  # fmt: skip


def evict_together(policy: Policy, deciders: Sequence[Decider]) -> list[tuple[Eviction, ...]]:
    """Let the policy choose what several layers keep; for each layer a decision per part.

    Raises
    ------
    ArgumentError
        If the cache cannot store a decision, or layers that share what they keep have different rows.
    """
    given = [decider.given(policy) for decider in deciders]
    if len({len(parts) for parts in given}) > 1:
        raise ArgumentError(f"layers must be decided for the same rows; got {[len(parts) for parts in given]} of them")
    if any(part.num_pinned for decider in deciders for part in decider.parts):
        raise ArgumentError(f"policy must decide for each layer alone to protect a prompt; got {policy}")
    by_part = [
        evict_layers(deciders[0].policy_of(policy, part), [{"keys": keys, **facts} for keys, facts in layers])
        for part, *layers in zip(deciders[0].parts, *given, strict=True)
    ]
    for decision in (each for decisions in by_part for each in decisions):
        _check(policy, decision)
    return list(zip(*by_part, strict=True))


def _check(policy: Policy, decision: Eviction) -> None:
    """Refuse what a cache cannot store."""
    name = type(policy).__name__
    if decision.merge is not None and decision.levels is not None:
        raise ArgumentError(f"policy must either merge tokens or demote them in a model's cache; {name} does both")
    if decision.levels is not None and len(decision.choice.precisions) != 1:
        raise ArgumentError(
            f"policy must demote tokens to one precision in a model's cache; {name} has "
            f"{len(decision.choice.precisions)}"
        )


def precision_of(decisions: Sequence[Eviction]) -> Precision | None:
    """Return how demoted tokens are stored; None where none is demoted."""
    return next((each.choice.precisions[0] for each in decisions if each.levels is not None), None)


def are_ragged(decisions: Sequence[Eviction]) -> bool:
    """Return whether heads or rows may keep different numbers of tokens."""
    return len(decisions) > 1 or decisions[0].counts is not None


def _below(arrays: Sequence[Any], backend: Backend, device: torch.device, fill: int) -> torch.Tensor:
    """Put arrays of the backend below each other; shorter rows are filled up at the front."""
    return _put_below([from_backend(each, backend, device) for each in arrays], fill)


def _put_below(rows: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Put tensors below each other; shorter rows are filled up at the front."""
    width = max(row.shape[2] for row in rows)
    sides = (0, 0) * (rows[0].ndim - 3)
    return torch.cat([pad(row, (*sides, 0, width - row.shape[2]), value=fill) for row in rows])


def _absorbed(decision: Eviction, slots: Slots, backend: Backend) -> torch.Tensor:
    """Count the dropped tokens in each kept slot (batch, kv_heads, b): those of now, and those of earlier evictions."""
    device = slots.keys.device
    kept = from_backend(decision.kept, backend, device).to(torch.int64)
    earlier = kept.new_zeros(slots.keys.shape[:3]) if slots.absorbed is None else slots.absorbed.to(torch.int64)
    counted = kept.new_zeros(kept.shape)
    if decision.merge is None:
        return torch.where(kept >= 0, earlier.gather(2, kept.clamp(min=0)), counted).to(torch.int32)
    into = from_backend(decision.merge.into, backend, device).to(torch.int64)
    # One place more, for the fills.
    is_kept = kept.new_zeros((*into.shape[:2], into.shape[2] + 1)).scatter(2, kept.where(kept >= 0, into.shape[2]), 1)
    tokens = torch.where(into >= 0, earlier + 1 - is_kept[:, :, :-1], 0)
    return counted.scatter_add(2, into.clamp(min=0), tokens).to(torch.int32)
