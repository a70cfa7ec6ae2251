"""The facts of one attention layer, and what a policy remembers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from . import checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError
from .types import Array, Namespace

__all__ = ["Cost", "Layer", "LayerFacts", "LayerShape", "Memory", "Probe"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Tokens that were read after the text only to ask it, and then forgotten: one prompt, as one layer saw it.

    Every query of a probe sees all N cached tokens, and the tokens of the probe up to its own.

    Attributes
    ----------
    queries : array, shape (batch, query_heads, P, D)
        Scaled such that q k / sqrt(D) is the model's attention logit.
    keys : array, shape (batch, kv_heads, P, D), or None
        Of the same tokens, for policies that count the attention which the probe gives to itself. None: it gives none.
    valid : array, shape (batch, P), bool, or None
        False for padding, which neither asks nor is seen. None: there is none.
    about : array, shape (batch, N) or (batch, kv_heads, N), bool, or None
        The cached tokens that it asks for, where several probes go through a text piece by piece. None: all.
    window : int or None
        In a layer with a sliding window: no query sees a token that stands `window` or more positions before it.
    before : array, shape (batch, kv_heads, N), integer, or None
        How many positions each cached token stands before the first of the probe; only a window asks. None: N to 1.
    """

    queries: Array
    keys: Array | None = None
    valid: Array | None = None
    about: Array | None = None
    window: int | None = None
    before: Array | None = None

    @property
    def num_queries(self) -> int:
        """P, the number of tokens."""
        return int(self.queries.shape[2])


@dataclass(frozen=True, eq=False, init=False)
class Layer:
    """What is known of one attention layer: checked when it is made, with floating-point arrays in float32 or wider.

    Neither a budget nor a policy's memory is a fact of a layer: those are arguments of the stages.

    Parameters
    ----------
    keys : array, shape (batch, kv_heads, N, D)
        Cached keys, after the rotary embedding.
    values : array, shape (batch, kv_heads, N, Dv), optional
    queries : array, shape (batch, query_heads, Q, D), optional
        The last Q <= N positions; query head h belongs to KV head h // (query_heads / kv_heads). Scaled such that
        q k / sqrt(D) is the model's attention logit.
    attention : array, shape (batch, query_heads, Q, N), optional
        Attention probabilities of the last Q positions.
    valid : array, shape (batch, N) or (batch, kv_heads, N), bool, optional
        False for padding. Default: all True.
    positions : array, shape (batch, kv_heads, N), integer, optional
        Where each token was in the text, for policies with a clock.
    unrotated_keys : array, shape (batch, kv_heads, N, D), optional
        The keys before the rotary embedding. Rotating all keys of a row by the same angle changes nothing.
    mass : array, shape (batch, kv_heads, N), optional
        How many tokens each entry stands for, where earlier evictions have merged some: attention adds its logarithm to
        the entry's logit. What has no mass receives no attention. Default: 1 each.
    probes : array, shape (batch, query_heads, P, D), or Probe, or sequence of Probe, optional
        What was read after the text only to ask it. An array is the queries of one probe.
    num_new : int, optional
        The last tokens whose queries no earlier call has seen. Default: N.
    layer, num_layers : int
        Which layer of how many.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Raises
    ------
    ArgumentError
        If shapes disagree or an integer is out of range.
    ArgumentTypeError
        If an array is not real, `valid` not bool or `positions` not integer.
    BackendError
        If the arrays are not all of the backend's library and on one device.
    """

    keys: Array
    values: Array | None
    queries: Array | None
    attention: Array | None
    valid: Array
    positions: Array | None
    unrotated_keys: Array | None
    mass: Array | None
    probes: tuple[Probe, ...]
    num_new: int
    layer: int
    num_layers: int
    backend: Backend

    def __init__(
        self,
        keys: Array,
        /,
        *,
        values: Array | None = None,
        queries: Array | None = None,
        attention: Array | None = None,
        valid: Array | None = None,
        positions: Array | None = None,
        unrotated_keys: Array | None = None,
        mass: Array | None = None,
        probes: Array | Probe | Sequence[Probe] | None = None,
        num_new: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        backend: Backend | str | None = None,
    ) -> None:
        arrays = {
            "keys": keys,
            "values": values,
            "queries": queries,
            "attention": attention,
            "valid": valid,
            "positions": positions,
            "unrotated_keys": unrotated_keys,
            "mass": mass,
        }
        asked = _listed(probes)
        backend = resolve(backend, **arrays, **_named(asked))
        axes = "(batch, kv_heads, N, D)"
        batch, kv_heads, num_tokens, head_size = checks.numeric("keys", keys, axes, ndim=4, backend=backend)
        rows = (batch, kv_heads, num_tokens)
        if values is not None:
            shape = checks.numeric("values", values, "(batch, kv_heads, N, Dv)", ndim=4, backend=backend)
            checks.same_leading("values", shape[:3], rows, "keys")
        for name, array, last, its_axes in (
            ("queries", queries, head_size, "(batch, query_heads, Q, D)"),
            ("attention", attention, num_tokens, "(batch, query_heads, Q, N)"),
        ):
            if array is not None:
                shape = checks.numeric(name, array, its_axes, ndim=4, backend=backend)
                checks.grouped_rows(name, shape, its_axes, batch, kv_heads, num_tokens, last)
        if unrotated_keys is not None:
            shape = checks.numeric("unrotated_keys", unrotated_keys, axes, ndim=4, backend=backend)
            checks.same_leading("unrotated_keys", shape, (*rows, head_size), "keys")
        if mass is not None:
            shape = checks.numeric("mass", mass, "(batch, kv_heads, N)", ndim=3, backend=backend)
            checks.same_leading("mass", shape, rows, "keys")
        if positions is not None:
            checks.integers("positions", positions, backend=backend)
            checks.same_leading("positions", tuple(positions.shape), rows, "keys")
        num_layers = checks.count("num_layers", num_layers, minimum=1)
        if checks.count("layer", layer) >= num_layers:
            raise ArgumentError(f"layer must be below num_layers={num_layers}; got {layer}")
        new = num_tokens if num_new is None else checks.count("num_new", num_new)
        if new > num_tokens:
            raise ArgumentError(f"num_new must be at most N={num_tokens}; got {new}")
        real = {name: x for name, x in arrays.items() if name not in ("valid", "positions")}
        facts = {
            **{name: None if x is None else primitives.widen(x, xp=backend.xp) for name, x in real.items()},
            "valid": _per_head("valid", valid, keys, rows, backend),
            "positions": positions,
            "probes": tuple(_checked(f"probes[{i}]", x, rows, head_size, keys, backend) for i, x in enumerate(asked)),
            "num_new": new,
            "layer": int(layer),
            "num_layers": num_layers,
            "backend": backend,
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

    @property
    def xp(self) -> Namespace:
        """The array API namespace of the arrays."""
        return self.backend.xp

    @property
    def num_tokens(self) -> int:
        """N, the number of cached tokens."""
        return int(self.keys.shape[-2])

    def having(self, **facts: Any) -> Layer:
        """Return a layer with some other facts, which are not checked: for stages that ask their base about one."""
        twin: Layer = object.__new__(Layer)
        twin.__dict__.update(self.__dict__, **facts)
        return twin


class LayerFacts(TypedDict, total=False):
    """The keyword arguments of `Layer` that the doors `observe` and `wants` hand on."""

    values: Array | None
    queries: Array | None
    attention: Array | None
    valid: Array | None
    positions: Array | None
    unrotated_keys: Array | None
    mass: Array | None
    probes: Array | Probe | Sequence[Probe] | None
    layer: int
    num_layers: int
    backend: Backend | str | None


@dataclass(frozen=True, eq=False)
class Memory:
    """What a policy remembers of a layer from call to call. No gradients flow through it.

    Attributes
    ----------
    tokens : mapping of str to array, shape (batch, kv_heads, S, ...)
        Travels with the tokens: what is evicted is forgotten.
    layer : mapping of str to array, shape (batch, ...)
        Stays with the layer.
    """

    tokens: Mapping[str, Array] = field(default_factory=dict)
    layer: Mapping[str, Array] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """S, the number of tokens that are remembered; 0 without an array per token."""
        return next((int(x.shape[2]) for x in self.tokens.values() if len(x.shape) > 2), 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arrays, sorted."""
        return tuple(sorted([*self.tokens, *self.layer]))


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one layer, for costs.

    Attributes
    ----------
    num_tokens : int
        N, the number of cached tokens.
    query_heads, kv_heads, head_size : int
        The layer's heads and D.
    budget : int
        Tokens to keep per row in this layer.
    batch : int
        Default: 1.
    """

    num_tokens: int
    query_heads: int
    kv_heads: int
    head_size: int
    budget: int
    batch: int = 1


@dataclass(frozen=True)
class Cost:
    """What a policy costs in one layer, on top of the model.

    Attributes
    ----------
    flops : int
        Floating-point operations, to leading order. Default: negligible.
    bytes : int
        Size of the largest temporary array of the portable form, with keys in float32 and places in int64. Default:
        none larger than the places of all tokens. Backends hold less, and on a GPU up to 640 MB of attention, if there
        is as much.
    """

    flops: int = 0
    bytes: int = 0

    def then(self, other: Cost, /) -> Cost:
        """Return the cost of both, one after the other."""
        return Cost(self.flops + other.flops, max(self.bytes, other.bytes))


def _listed(probes: Array | Probe | Sequence[Probe] | None, /) -> tuple[Probe, ...]:
    """Return probes one by one, before they are checked."""
    if probes is None:
        return ()
    if isinstance(probes, (list, tuple)):
        for number, probe in enumerate(probes):
            checks.instance(f"probes[{number}]", probe, Probe)
        return tuple(probes)
    return (probes,) if isinstance(probes, Probe) else (Probe(queries=probes),)


def _named(probes: tuple[Probe, ...], /) -> dict[str, Array | None]:
    """Return the arrays of all probes by the names that errors call them."""
    names = ("queries", "keys", "valid", "about", "before")
    return {f"probes[{i}].{name}": getattr(probe, name) for i, probe in enumerate(probes) for name in names}


def _checked(
    name: str, probe: Probe, rows: tuple[int, int, int], head_size: int, cached: Array, backend: Backend, /
) -> Probe:
    """Return a probe that fits the keys of the layer, with floating-point arrays in float32 or wider."""
    (batch, kv_heads, _), xp = rows, backend.xp
    axes = "(batch, query_heads, P, D)"
    shape = checks.numeric(f"{name}.queries", probe.queries, axes, ndim=4, backend=backend)
    number = shape[2]
    checks.grouped_rows(f"{name}.queries", shape, axes, batch, kv_heads, number, head_size)
    if not number:
        raise ArgumentError(f"{name}.queries must hold at least one query; got shape {shape}")
    keys, about = probe.keys, probe.about
    if keys is not None:
        shape = checks.numeric(f"{name}.keys", keys, "(batch, kv_heads, P, D)", ndim=4, backend=backend)
        checks.same_leading(f"{name}.keys", shape, (batch, kv_heads, number, head_size), "keys and queries")
        keys = primitives.widen(keys, xp=xp)
    if probe.valid is not None:
        checks.mask(f"{name}.valid", probe.valid, (batch, number), "(batch, P)", backend=backend)
    if about is not None:
        about = _per_head(f"{name}.about", about, cached, rows, backend)
    if probe.window is not None:
        checks.count(f"{name}.window", probe.window, minimum=1)
    if probe.before is not None:
        checks.integers(f"{name}.before", probe.before, backend=backend)
        checks.same_leading(f"{name}.before", tuple(probe.before.shape), rows, "keys")
    return replace(probe, queries=primitives.widen(probe.queries, xp=xp), keys=keys, about=about)


def _per_head(name: str, mask: Array | None, keys: Array, rows: tuple[int, ...], backend: Backend, /) -> Array:
    """Return a mask of tokens with one row per KV head."""
    xp, (batch, _, num_tokens) = backend.xp, rows
    if mask is None:
        return xp.ones(rows, dtype=xp.bool, device=primitives.device_of(keys))
    if mask.ndim == 2:
        checks.mask(name, mask, (batch, num_tokens), "(batch, N)", backend=backend)
        return xp.broadcast_to(mask[:, None, :], rows)
    checks.mask(name, mask, rows, "(batch, kv_heads, N)", backend=backend)
    return mask
