"""Checks of a call against the needs of its policy, before anything is computed."""

from __future__ import annotations

from . import checks
from .backend import resolve
from .errors import ArgumentError
from .layer import Layer, Memory
from .policy import Policy, Wrapper

__all__ = ["check_needs", "check_state", "has_rows", "name_of"]


def check_state(policy: Policy, state: Memory | None, layer: Layer, /) -> None:
    """Refuse what another policy, or another layer, has left."""
    if state is None:
        return
    checks.instance("state", state, Memory)
    names = tuple(sorted(policy.needs().state))
    if not names:
        raise ArgumentError(
            f"state must be None for {name_of(policy)}, which remembers nothing; got {list(state.names)}"
        )
    if state.names != names:
        raise ArgumentError(f"state must hold {list(names)} for {name_of(policy)}; got {list(state.names)}")
    rows, lengths = tuple(layer.valid.shape), {}
    for name, x in state.tokens.items():
        resolve(layer.backend, keys=layer.keys, **{f"state.tokens[{name!r}]": x})
        shape = tuple(x.shape)
        if len(shape) < 3 or shape[:2] != rows[:2] or shape[2] > rows[2]:
            raise ArgumentError(
                f"state.tokens[{name!r}] must have shape (batch, kv_heads, S <= N, ...) = {rows}; got {shape}"
            )
        lengths[name] = shape[2]
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"state must hold arrays of one number of tokens S; got {lengths}")
    for name, x in state.layer.items():
        resolve(layer.backend, keys=layer.keys, **{f"state.layer[{name!r}]": x})
        if tuple(x.shape[:1]) != rows[:1]:
            raise ArgumentError(
                f"state.layer[{name!r}] must have shape (batch, ...) = {rows[:1]} + ...; got {tuple(x.shape)}"
            )


def check_needs(policy: Policy, layer: Layer, /, *, scores: bool) -> None:
    """Refuse a layer that lacks what the policy needs: always what it observes, and what it scores by if it scores."""
    needs = policy.needs()
    if scores and needs.values and layer.values is None:
        raise ArgumentError(f"values must be given for {name_of(policy)}; got None")
    if scores and needs.unrotated_keys and layer.unrotated_keys is None:
        raise ArgumentError(f"unrotated_keys must be given for {name_of(policy)}; got None")
    if scores and needs.probes and not layer.probes:
        raise ArgumentError(f"probes must be given for {name_of(policy)}; got None")
    # A memory that no attention goes into needs no more than the scores do.
    observes = bool(needs.state) and needs.queries != "window"
    if needs.queries == "none" or not (scores or observes):
        return
    has_rows = layer.attention is not None and not needs.logits
    rows, argument = (layer.attention, "attention") if has_rows else (layer.queries, "queries")
    given = 0 if rows is None else int(rows.shape[2])
    least = {"window": policy.num_queries(layer.num_tokens), "new": layer.num_new, "all": min(1, layer.num_tokens)}
    wanted = least[needs.queries]
    if observes:
        wanted = max(layer.num_new, wanted if scores and needs.queries != "new" else 0)
    if given < wanted:
        last = "the last position" if wanted == 1 else f"the last {wanted} positions"
        what = f"all {wanted} new positions" if observes else last
        raise ArgumentError(f"{argument} must hold {what} for {name_of(policy)}; got {given if given else 'none'}")


def name_of(policy: Policy, /) -> str:
    """Return the names of a policy's classes, as it is written: GraphKV(SnapKV)."""
    name = type(policy).__name__
    return f"{name}({name_of(policy.base)})" if isinstance(policy, Wrapper) else name


def has_rows(layer: Layer, /) -> bool:
    """Return whether any attention of the last positions is at hand."""
    return layer.queries is not None or layer.attention is not None
