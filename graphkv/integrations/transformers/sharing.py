"""One reading of a prompt for many caches: rows put together, sums worked out once, keys from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from ...core import checks
from ...core.errors import ArgumentError
from ...core.layer import Memory
from ...core.needs import name_of
from ...core.policy import Policy
from .layer import EvictingLayer
from .slots import Slots

__all__ = ["caught_up", "running_state", "stacked", "with_state", "with_states_of", "with_stored"]

# What layers of linear attention remember, by the number of the state.
LINEAR = ("conv_states", "recurrent_states")


def stacked(layers: Sequence[EvictingLayer]) -> EvictingLayer:
    """Put the rows of layers below each other, see `EvictingCache.stacked`."""
    answering = {layer.answering for layer in layers}
    if len(answering) > 1:
        names = sorted("none" if each is None else name_of(each) for each in answering)
        raise ArgumentError(f"caches must have one policy that answers for dropped tokens, or none; got {names}")
    result, all_slots = layers[0].copy(), [layer.slots for layer in layers]
    if any(slots.positions is not None for slots in all_slots):
        all_slots = [layer.slots.having(positions=layer.true_positions) for layer in layers]
    result.slots = Slots.stack([slots.having(state={}) for slots in all_slots])
    if any(layer.num_hidden is not None for layer in layers):
        none = torch.zeros(1, dtype=torch.int64, device=result.slots.keys.device)
        result.num_hidden = torch.cat([
            none.expand(layer.slots.keys.shape[0]) if layer.num_hidden is None else layer.num_hidden for layer in layers
        ])  # fmt: skip
    result.has_holes = any(layer.has_holes for layer in layers)
    if result.answering is None:
        result.layer_state = {}
    else:
        states = [layer.layer_state for layer in layers]
        result.layer_state = {name: torch.cat([each[name] for each in states]) for name in states[0]}
    result.query_peaks = None
    result.held = result.row_budgets = result.budgets_found = result.shared_by = result.record = None
    result.probes = ()
    return result


def with_states_of(result: Any, layers: Sequence[Any]) -> None:
    """Put what the linear attention of all layers remembers into `result`, a copy of the first one."""
    for name in LINEAR:
        states: dict[int, Any] = getattr(result, name, {})
        for number, state in states.items():
            if state is not None:
                states[number] = torch.cat([getattr(layer, name)[number] for layer in layers])


def caught_up(layer: Any, together: Any, row: int, num_protected: int) -> Any:
    """Return a layer that has read what one row of stacked ones has read since, see `EvictingCache.caught_up`."""

    def of_row(x: torch.Tensor) -> torch.Tensor:
        return x[row : row + 1]

    twin = layer.copy() if isinstance(layer, EvictingLayer) else deepcopy(layer)
    for name in LINEAR:
        for number, state in getattr(together, name, {}).items():
            if state is not None:
                getattr(twin, name)[number] = of_row(state)
    if not isinstance(layer, EvictingLayer):
        return twin
    twin.rotation = together.rotation
    start, count = layer.num_seen, together.num_seen - layer.num_seen
    if not layer.evicts:
        twin.slots, twin.num_seen = together.slots.rows(of_row), together.num_seen
        return twin
    arrays = vars(together.slots.last(count).rows(of_row))
    # Positions go on by themselves, and no sums have been kept.
    arrays = {name: x for name, x in arrays.items() if x is not None and name not in ("pinned", "positions", "state")}
    if layer.settings.protect_prompt:
        is_read = torch.arange(start, start + count, device=arrays["keys"].device) < num_protected
        arrays["pinned"] = is_read.expand(arrays["keys"].shape[:3])
    twin._append(arrays)
    twin.certain = twin.num_seen
    if together.held is not None and twin.settings.policy is not None:
        new = together.held.rows(of_row)
        held = new if twin.held is None else twin.held.append(new, start)
        twin.held = held.last(twin.settings.policy.num_queries(twin.num_stored))
        if together.query_peaks is not None:
            peaks = of_row(together.query_peaks)
            twin.query_peaks = peaks if twin.query_peaks is None else torch.maximum(twin.query_peaks, peaks)
    twin.schedule()
    return twin


def with_stored(layer: EvictingLayer, keys: torch.Tensor, values: torch.Tensor) -> EvictingLayer:
    """Return a layer that stores these keys and values of the tokens seen, see `EvictingCache.with_stored`."""
    rows, stored = tuple(layer.slots.keys.shape[:2]), tuple(keys.shape[:3])
    if stored[:2] != rows or tuple(values.shape[:3]) != stored or stored[2] > layer.num_seen:
        raise ArgumentError(
            f"keys_and_values must have shape (batch, kv_heads, b, D) with {rows} and b <= {layer.num_seen}; "
            f"got {tuple(keys.shape)} and {tuple(values.shape)} for layer {layer.index}"
        )
    twin, positions = layer.copy(), torch.arange(stored[2], device=keys.device)
    twin.slots, twin.held = Slots(keys=keys, values=values, positions=positions.expand(stored)), None
    twin.probes = ()
    twin.layer_state, twin.query_peaks, twin.answering = {}, None, None
    return twin


def with_state(layer: EvictingLayer, state: Memory) -> EvictingLayer:
    """Return a layer that knows what a policy remembers of its first tokens, see `EvictingCache.with_states`."""
    checks.instance("states", state, Memory)
    twin, rows, num_stored = layer.copy(), tuple(layer.slots.keys.shape[:2]), layer.num_stored
    for name, sums in state.tokens.items():
        shape = tuple(sums.shape)
        if shape[:2] != rows or len(shape) < 3 or shape[2] > num_stored:
            raise ArgumentError(
                f"states must have shape (batch, kv_heads, S, ...) with {rows} and S <= {num_stored}; "
                f"got {shape} for {name} of layer {layer.index}"
            )
    for name, x in state.layer.items():
        if tuple(x.shape[:1]) != rows[:1]:
            raise ArgumentError(
                f"states must have shape (batch, ...) with {rows[0]} rows in what is remembered of a layer; "
                f"got {tuple(x.shape)} for {name} of layer {layer.index}"
            )
    if state.names:
        # What has been summed up cannot be taken back; all of it where only the layer is remembered.
        known = state.num_tokens if state.tokens else num_stored
        twin.num_new = min(twin.num_new, num_stored - known)
    twin.slots, twin.layer_state = twin.slots.having(state=dict(state.tokens)), dict(state.layer)
    if not set(layer.layer_state) <= set(twin.layer_state):
        twin.answering = None
    return twin


def running_state(layer: EvictingLayer, policy: Policy, state: Memory | None) -> Memory:
    """Compute what a policy remembers of all that is stored, see `EvictingCache.running_states`."""
    if not layer.evicts:
        return Memory()
    decider = (layer if state is None else with_state(layer, state)).decider(policy, None)
    if decider.order is not None:
        raise ArgumentError("running_states must have rows without padding between their tokens; a row has some")
    memories = decider.observe(policy)
    return Memory(tokens=decider.of_tokens(memories), layer=decider.of_layer(memories))
