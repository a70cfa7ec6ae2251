"""Caches in safetensors files, with everything that is not a tensor as JSON in the header. Nothing is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar

import torch
from transformers import cache_utils

import graphkv

from ...adapters.plain import from_plain, is_known, to_plain
from ...core import checks
from ...core.backend import BUILT_IN, Backend, is_found_by_name
from ...core.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from ...core.files import write_whole
from ...core.needs import name_of
from ...core.policy import Policy
from ...core.precision import Precision
from . import fingerprint, rotary
from .history import History
from .hybrid import HybridEvictingLayer
from .layer import EvictingLayer
from .queries import Queries
from .settings import Settings
from .slots import Slots
from .source import Source
from .tiers import TieredSlots, Tiers

__all__ = ["load_cache", "save_cache"]

# Raised with every change that an older graphkv would misread.
VERSION = 1
# The header's name in the metadata of the file.
HEADER = "graphkv_cache"

# What is saved of a cache. Tests fail when an attribute is in none of these tables, or one is gone.
CACHE: dict[str, tuple[type, ...]] = {
    "num_seen": (int,),
    "num_guessed": (int,),
    "num_given": (int,),
    "seen_before": (int,),
    "_opened_by": (int,),
    "is_waiting": (bool,),
    "_has_warned": (bool,),
}
# Kinds of layers; no other class is made. The last two are transformers' own, and not in all releases.
LAYERS = ("EvictingLayer", "HybridEvictingLayer", "LinearAttentionLayer", "DummyLayer")

# What is saved of a layer.
# Tensors, by their axes: the same word is the same length, that of the batch in all layers. Running sums are many.
FIELDS = {each.name: each.metadata for each in fields(Slots) if each.name != "state"}
TENSORS: dict[str, tuple[str, ...]] = {name: each["axes"] for name, each in FIELDS.items()} | {
    "queries": ("batch", "query_heads", "num_queries", "head_size"),
    "asked": ("batch", "num_queries"),
    "query_peaks": ("batch", "kv_heads", "head_size"),
    "num_hidden": ("batch",),
    "budgets_found": ("batch",),
}
COUNTS = ("num_hidden", "budgets_found")
DTYPES = {name: each["dtype"] for name, each in FIELDS.items()} | dict.fromkeys(("asked", *COUNTS), torch.int64)
# Numbers, by their types.
VALUES: dict[str, tuple[type, ...]] = {
    "num_seen": (int,),
    "num_new": (int,),
    "budget": (int, NoneType),
    "num_evictions": (int,),
    "num_dropped": (int,),
    "bytes_freed": (int,),
    "seconds": (float,),
    "sliding_window": (int, NoneType),
    "evicts": (bool,),
    "is_apart": (bool,),
    "has_holes": (bool,),
    "certain": (int,),
    "due_at": (int, NoneType),
    "record_past": (bool,),
}
# Each has lines of its own below.
OTHERS = {"_slots", "layer_state", "_held", "row_budgets", "shared_by", "answering", "source", "rotation"}
# The record holds arrays of any library; probes are as large as a text and can be asked again; the cache has the
# settings; the rest follows from keys and a finished call.
NOT_SAVED = {"record", "probes", "settings", "awaits_queries", "is_initialized", "dtype", "device"}
NOT_SAVED |= {"steady", "num_calm"}

# Of each state of linear attention; a layer has dicts of them by number. What is initialized follows from the tensors.
LINEAR: dict[str, tuple[type, ...]] = {"has_previous_state": (bool,), "conv_kernel_size": (int, NoneType)}
LINEAR_TENSORS = ("conv_states", "recurrent_states")
LINEAR_OTHERS = {"number_of_states", "record_past"}
LINEAR_NOT_SAVED = {"is_conv_states_initialized", "is_recurrent_states_initialized", "device", "dtype"}

SETTINGS: dict[str, tuple[type, ...]] = {
    "every": (int, NoneType),
    "protect_prompt": (bool,),
    "rerotate": (bool,),
    "record": (bool,),
    "num_queries": (int,),
}
# With the kinds of all layers, which are written once for all.
SOURCE: dict[str, tuple[type, ...]] = {"index": (int,), "has_all_heads": (bool,), "has_whole_groups": (bool,)}


class Storable(Protocol):
    """What a cache must have to be saved and loaded, besides the values of `CACHE`; an `EvictingCache`."""

    settings: Settings
    layers: list[Any]
    history: History
    num_seen: int

    def check_finished(self) -> None:
        """Refuse to go on from a forward pass that broke off."""

    def activate_past_recording(self) -> None:
        """Let evictions wait for a crop."""


AnyCache = TypeVar("AnyCache", bound=Storable)


def save_cache(cache: Storable, path: str | os.PathLike[str], /) -> None:
    """Write a cache into a file, see `EvictingCache.save`."""
    where, library = _path(path), _safetensors()
    cache.check_finished()
    settings, sources = cache.settings, [source for source in map(_source_of, cache.layers) if source is not None]
    header = {
        "version": VERSION,
        "graphkv": graphkv.__version__,
        "policy": to_plain(settings.policy),
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "backend": _backend_name(settings),
        "values": {name: getattr(cache, name) for name in CACHE},
        "num_summed": cache.history.num_summed,
        "model": fingerprint.describe_model(sources[0]) if sources else None,
        "layers": [_layer_header(layer, settings) for layer in cache.layers],
    }
    # Copies: no memory in common, no gaps.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in _all_tensors(cache)
    }
    metadata = {HEADER: json.dumps(header | {"tensors": sorted(tensors)})}
    try:
        write_whole(where, lambda scratch: library.torch.save_file(tensors, scratch, metadata=metadata))
    except (OSError, ValueError, library.SafetensorError) as error:
        raise ArgumentError(f"path {where} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def load_cache(
    make: Callable[..., AnyCache],
    path: str | os.PathLike[str],
    /,
    *,
    model: torch.nn.Module | None,
    policy: Policy | None,
    backend: Backend | str | None,
    device: torch.device | str | None,
) -> AnyCache:
    """Read a cache from a file, see `EvictingCache.load`; `make` is the class."""
    if model is not None:
        checks.instance("model", model, torch.nn.Module)
    if policy is not None:
        checks.instance("policy", policy, Policy)
    where = _path(path)
    try:
        header, tensors = _read(where)
        cache = make(
            _policy(header, policy),
            backend=_backend(header, backend),
            **_fields(header["settings"], SETTINGS, "settings"),
        )
        _fill(cache, header, tensors, model, device)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"path {where} cannot be loaded: {error}") from error
    except RecursionError as error:
        raise ArgumentError(f"path {where} cannot be loaded: its header is nested too deeply") from error
    return cache


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise ArgumentTypeError(f"path must be a path; got {type(path).__name__}") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415 - only who saves and loads needs it
    except ImportError as error:
        raise BackendUnavailableError(f"cache files need safetensors: pip install safetensors ({error})") from error
    return safetensors


# ------------------------------------------------------------------------------------------------------------ writing


def _source_of(layer: Any) -> Source | None:
    return layer.source if isinstance(layer, EvictingLayer) else None


def _all_tensors(cache: Storable) -> Iterator[tuple[str, torch.Tensor]]:
    """List what tensors a cache has, by the names that they get in the file."""
    if cache.history.sums is not None:
        yield "history.sums", cache.history.sums
    for number, ids in enumerate(cache.history.recent):
        yield f"history.recent.{number}", ids
    for number, layer in enumerate(cache.layers):
        for name, tensor in (*_tensors_of(layer), *_linear_tensors_of(layer)):
            yield f"layers.{number}.{name}", tensor


def _linear_tensors_of(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name in LINEAR_TENSORS:
        for state, tensor in getattr(layer, name, {}).items():
            if tensor is not None:
                yield f"{name}.{state}", tensor


def _tensors_of(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(layer, EvictingLayer) or not layer.is_initialized:
        return
    counts = {name: getattr(layer, name) for name in COUNTS}
    found = vars(layer.slots) | ({} if layer.held is None else layer.held._asdict()) | counts
    found["query_peaks"] = layer.query_peaks
    for name in TENSORS:
        if found.get(name) is not None:
            yield name, found[name]
    if isinstance(layer.slots, TieredSlots):
        for name, tensor in layer.slots.tiers.tensors().items():
            yield f"tiers.{name}", tensor
    for name, sums in layer.slots.state.items():
        yield f"state.{name}", sums
    for name, tensor in layer.layer_state.items():
        yield f"layer_state.{name}", tensor


def _layer_header(layer: Any, settings: Settings) -> dict[str, Any]:
    """Write what is no tensor of a layer; the parts that its kind does not have are None."""
    kind = type(layer).__name__
    if kind not in LAYERS:
        raise ArgumentError(f"layers must be {', '.join(LAYERS)} for a cache to be saved; got {kind}")
    linear = None
    if hasattr(layer, "conv_states"):
        linear = {
            "record_past": layer.record_past,
            "states": [{name: getattr(layer, name)[each] for name in LINEAR} for each in range(layer.number_of_states)],
        }
    return {
        "kind": kind,
        "attention": _attention_header(layer, settings) if isinstance(layer, EvictingLayer) else None,
        "linear": linear,
    }


def _attention_header(layer: EvictingLayer, settings: Settings) -> dict[str, Any]:
    tiers = layer.slots.tiers if isinstance(layer.slots, TieredSlots) else None
    shared_by = to_plain(layer.shared_by)
    if not is_known(shared_by) and layer.shared_by != settings.policy:
        raise ArgumentError(
            "a cache whose budgets were shared out by a policy of your own, other than the cache's, cannot be saved; "
            f"got {layer.shared_by}"
        )
    if layer.answering is not None and layer.answering != settings.policy:
        raise ArgumentError(
            f"a cache that another policy than its own answers for cannot be saved; got {name_of(layer.answering)}"
        )
    return {
        "values": {name: getattr(layer, name) for name in VALUES},
        "row_budgets": None if layer.row_budgets is None else layer.row_budgets.tolist(),
        "shared_by": shared_by,
        "source": None if layer.source is None else {name: getattr(layer.source, name) for name in SOURCE},
        "rotation": None if layer.rotation is None else asdict(layer.rotation),
        "tiers": None if tiers is None else asdict(tiers.precision) | {"num_appended": tiers.num_appended},
    }


def _backend_name(settings: Settings) -> str | None:
    backend = settings.backend
    if backend is None or (backend.name in BUILT_IN and is_found_by_name(backend)):
        return None if backend is None else backend.name
    return f"{backend.name} (not built in)"


# ------------------------------------------------------------------------------------------------------------ reading


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a whole file, and check the top level of its header."""
    library = _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise ArgumentError("it must be a cache that graphkv saved; it is another safetensors file")
            header = _header(text)
            # Copies: what is mapped from the file would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except OSError as error:
        raise ArgumentError(error.strerror or str(error)) from error
    except library.SafetensorError as error:
        raise ArgumentError(f"it must be a whole safetensors file; {error}") from error
    return header, tensors


def _header(text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ArgumentError(f"its header must be JSON; {error}") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != VERSION:
        raise ArgumentError(
            f"its format must be version {VERSION}, which graphkv {graphkv.__version__} reads; got {version!r}"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "version": (int,),
        "graphkv": (str,),
        "policy": (dict, NoneType),
        "settings": (dict,),
        "backend": (str, NoneType),
        "values": (dict,),
        "num_summed": (int,),
        "model": (dict, NoneType),
        "layers": (list,),
        "tensors": (list,),
    }
    return _fields(header, kinds, "header")


def _fields(given: Any, kinds: Mapping[str, tuple[type, ...]], name: str) -> dict[str, Any]:
    """Return a mapping of exactly these names, with values of these types; numbers are counts."""
    if not isinstance(given, dict) or set(given) != set(kinds):
        got = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise ArgumentError(f"its {name} must hold {', '.join(sorted(kinds))}; got {got}")
    for key, value in given.items():
        if type(value) not in kinds[key] or (type(value) in (int, float) and not value >= 0):
            kind = " or ".join(each.__name__ for each in kinds[key])
            raise ArgumentError(f"its {name} must have {key} of type {kind}, not below 0; got {str(value)[:80]!r}")
    return given


def _policy(header: Mapping[str, Any], policy: Policy | None) -> Policy | None:
    """Make the policy of a file, or check the one that is given for it."""
    plain = header["policy"]
    if policy is not None:
        if json.loads(json.dumps(to_plain(policy))) != plain:
            raise ArgumentError(f"policy must be the one that it was saved with, {plain}; got {policy}")
        return policy
    if not is_known(plain):
        raise ArgumentError(f"policy must be given, because it was saved with one that graphkv does not know: {plain}")
    made = from_plain(plain)
    if made is not None:
        checks.instance("policy", made, Policy)
    return made  # type: ignore[no-any-return]


def _backend(header: Mapping[str, Any], backend: Backend | str | None) -> Backend | str | None:
    name: str | None = header["backend"]
    # Not from entry points: a file is not to choose what is imported.
    if backend is None and name is not None and name not in BUILT_IN:
        raise ArgumentError(f"backend must be given, because it was saved with another than graphkv's own; got {name}")
    return name if backend is None else backend


def _fill(
    cache: Storable,
    header: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    model: torch.nn.Module | None,
    device: torch.device | str | None,
) -> None:
    """Fill an empty cache with the layers of a file."""
    if header["tensors"] != sorted(tensors):
        different = {str(name) for name in header["tensors"]} ^ set(tensors)
        raise ArgumentError(
            f"it must hold the tensors that its header names; missing or surplus {sorted(different)[:5]}"
        )
    description = header["model"]
    if description is not None:
        fingerprint.check_description(description)
    modules = {} if model is None or description is None else fingerprint.attention_of(model, description)
    values = _fields(header["values"], CACHE, "values")
    if values["is_waiting"]:
        cache.activate_past_recording()
    batch: dict[str, int] = {}
    for number, each in enumerate(header["layers"]):
        name, own = f"layers.{number}", {}
        for key in [key for key in tensors if key.startswith(f"layers.{number}.")]:
            own[key.removeprefix(f"{name}.")] = tensors.pop(key)
        kinds: dict[str, tuple[type, ...]] = {"kind": (str,), "attention": (dict, NoneType), "linear": (dict, NoneType)}
        given = _fields(each, kinds, name)
        module = modules.get(number) or next(iter(modules.values()), None)
        where = device or fingerprint.device_of(module)
        layer = _new_layer(given, name, cache.settings)
        if given["linear"] is not None:
            _fill_linear(layer, given["linear"], name, own, batch, where)
        if given["attention"] is not None:
            _fill_attention(layer, given["attention"], name, own, batch, where)
            source = given["attention"]["source"]
            if source is not None:
                source = _fields(source, SOURCE, f"{name}.source")
                layer.source = fingerprint.make_source(source, number, description, module)
            if number in modules and layer.source is not None and layer.source.has_all_heads:
                fingerprint.check_heads(layer, name, modules[number])
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        cache.layers.append(layer)
    for key, value in values.items():
        setattr(cache, key, value)
    _fill_history(cache, header["num_summed"], tensors, device or "cpu", batch)
    if tensors:
        raise ArgumentError(f"it must hold no more tensors than a cache has; got {sorted(tensors)[:5]}")
    cache.check_finished()


def _new_layer(given: Mapping[str, Any], name: str, settings: Settings) -> Any:
    """Make an empty layer of a kind that is known, with the parts that it has."""
    kind, linear = given["kind"], given["linear"]
    parts = {
        "EvictingLayer": (True, False),
        "HybridEvictingLayer": (True, True),
        "LinearAttentionLayer": (False, True),
        "DummyLayer": (False, False),
    }
    if parts.get(kind) != (given["attention"] is not None, linear is not None):
        raise ArgumentError(f"its {name} must be {', '.join(LAYERS)}, with the parts of its kind; got {kind!r}")
    if kind == "EvictingLayer":
        return EvictingLayer(settings)
    theirs = getattr(cache_utils, kind.replace("HybridEvictingLayer", "LinearAttentionLayer"), None)
    if theirs is None:
        raise ArgumentError(f"its {name} must be of a kind that this release of transformers has; got {kind}")
    options = {} if linear is None else {"number_of_states": len(_linear(linear, name)["states"])}
    fresh = theirs(**options)
    return HybridEvictingLayer(settings, fresh) if kind == "HybridEvictingLayer" else fresh


def _linear(given: Any, name: str) -> dict[str, Any]:
    return _fields(given, {"record_past": (bool,), "states": (list,)}, f"{name}.linear")


def _fill_linear(
    layer: Any,
    given: Any,
    name: str,
    tensors: dict[str, torch.Tensor],
    batch: dict[str, int],
    device: torch.device | str,
) -> None:
    """Restore what a layer's linear attention remembers."""
    layer.record_past = given["record_past"]
    for number, each in enumerate(given["states"]):
        for key, value in _fields(each, LINEAR, f"{name}.linear.states").items():
            getattr(layer, key)[number] = value
        for key in LINEAR_TENSORS:
            tensor = tensors.pop(f"{key}.{number}", None)
            if tensor is None:
                continue
            rows = batch.setdefault("batch", tensor.shape[0] if tensor.ndim else 0)
            if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[0] != rows:
                raise ArgumentError(
                    f"its {name}.{key}.{number} must be floats of {rows} rows; got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
            tensor = tensor.to(device)
            getattr(layer, key)[number] = tensor
            getattr(layer, f"is_{key}_initialized")[number] = True
            layer.dtype, layer.device = tensor.dtype, tensor.device


def _fill_attention(
    layer: EvictingLayer,
    given: Any,
    name: str,
    tensors: dict[str, torch.Tensor],
    batch: dict[str, int],
    device: torch.device | str,
) -> None:
    """Restore all of a layer but its source."""
    kinds: dict[str, tuple[type, ...]] = {
        "values": (dict,),
        "row_budgets": (list, NoneType),
        "shared_by": (dict, NoneType),
        "source": (dict, NoneType),
        "rotation": (dict, NoneType),
        "tiers": (dict, NoneType),
    }
    _fields(given, kinds, f"{name}.attention")
    for key, value in _fields(given["values"], VALUES, f"{name}.values").items():
        setattr(layer, key, value)
    found = {key: tensors.pop(key) for key in TENSORS if key in tensors}
    tiers = None if given["tiers"] is None else _tiers(given["tiers"], _taken_out(tensors, "tiers."), f"{name}.tiers")
    if tiers is not None:
        # Checked as any others, as they read.
        found |= {key: tiers.read(key) for key in ("keys", "values")}
    state, layer_state = _taken_out(tensors, "state."), _taken_out(tensors, "layer_state.")
    if found or state or layer_state or layer.num_seen:
        # What is not the text's, such as keys of a picture, may have rows of its own.
        _check_tensors(found, state, layer_state, name, {} if layer.is_apart else batch)
        if not layer.is_apart:
            _check_positions(found, layer, name)
        _check_mass(found, name)
        # As if the first tokens came: what transformers notes then differs from release to release.
        found = {key: tensor.to(device) for key, tensor in found.items()}
        layer.lazy_initialization(found["keys"], found["values"])
        stored = {each.name: found[each.name] for each in fields(Slots) if each.name in found}
        layer.slots = Slots(**stored, state={key: sums.to(device) for key, sums in state.items()})
        if tiers is not None:
            layer.slots = TieredSlots.of(layer.slots, tiers.each(lambda x: x.to(device)))
        layer.layer_state = {key: tensor.to(device) for key, tensor in layer_state.items()}
        policy = layer.settings.policy
        layer.answering = policy if layer_state and policy is not None and policy.needs().answers else None
        layer.num_hidden, layer.budgets_found = (found.get(key) for key in COUNTS)
        layer.query_peaks = found.get("query_peaks")
        if "queries" in found:
            layer.held = Queries(queries=found["queries"], asked=found.get("asked"))
    size = found["keys"].shape[-1] if found else 0
    layer.rotation = rotary.from_plain(given["rotation"], f"{name}.rotation", size)
    axes = 0 if layer.rotation is None else len(layer.rotation.frequencies)
    if "places" in found and found["places"].shape[-1] != axes:
        raise ArgumentError(
            f"its {name}.places must have the {axes} axes of its rotation; got {found['places'].shape[-1]}"
        )
    if given["row_budgets"] is not None:
        budgets = given["row_budgets"]
        if len(budgets) != batch.get("batch") or any(type(each) is not int or each < 0 for each in budgets):
            raise ArgumentError(f"its {name}.row_budgets must be a count for each row; got {str(budgets)[:80]}")
        layer.row_budgets = torch.tensor(budgets)
    # One that is not known is the cache's own, see `_attention_header`.
    layer.shared_by = from_plain(given["shared_by"]) if is_known(given["shared_by"]) else layer.settings.policy


def _tiers(given: Mapping[str, Any], tensors: dict[str, torch.Tensor], name: str) -> Tiers:
    """Restore what is packed of a layer."""
    kinds: dict[str, tuple[type, ...]] = {"bits": (int,), "group": (int,), "balanced": (bool,), "num_appended": (int,)}
    num_appended = _fields(dict(given), kinds, name)["num_appended"]
    precision = Precision(**{key: value for key, value in given.items() if key != "num_appended"})
    return Tiers.of_tensors(tensors, precision, num_appended, name)


def _taken_out(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Take out the tensors whose names begin so; return them by the rest of their names."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _fill_history(
    cache: Storable,
    num_summed: int,
    tensors: dict[str, torch.Tensor],
    device: torch.device | str,
    batch: Mapping[str, int],
) -> None:
    """Restore the ids that a cache remembers."""
    history = cache.history
    history.num_summed = num_summed
    if "history.sums" in tensors:
        history.sums = tensors.pop("history.sums").to(device)
    while (name := f"history.recent.{len(history.recent)}") in tensors:
        history.recent.append(tensors.pop(name).to(device))
    history.num_recent = sum(ids.shape[-1] for ids in history.recent if ids.ndim)
    rows = batch.get("batch", 0)
    sums_fit = history.sums is None or (history.sums.dtype == torch.int64 and tuple(history.sums.shape) == (rows,))
    ids_fit = all(
        ids.ndim == 2 and ids.shape[0] == rows and not ids.is_floating_point() and not ids.is_complex()
        for ids in history.recent
    )
    if not sums_fit or not ids_fit or (history.sums is None) != (num_summed == 0) or len(history) > cache.num_seen:
        raise ArgumentError(f"its history must hold integers for each of {rows} rows, of no more tokens than were seen")


def _check_tensors(
    found: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    layer_state: Mapping[str, torch.Tensor],
    name: str,
    lengths: dict[str, int],
) -> None:
    """Check that the tensors of a layer fit to each other, and their batch to that of other layers."""
    if not {"keys", "values"} <= set(found):
        raise ArgumentError(f"its {name} must have keys and values; got {sorted(found)}")
    if "asked" in found and "queries" not in found:
        raise ArgumentError(f"its {name} must have queries with its asked; got {sorted(found)}")
    own: dict[str, int] = {key: length for key, length in lengths.items() if key == "batch"}
    for key, tensor in found.items():
        axes, dtype = TENSORS[key], DTYPES.get(key)
        if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
            raise ArgumentError(f"its {name}.{key} must be of dtype {dtype or 'float'}; got {tensor.dtype}")
        expected = tuple(own.get(axis, axis) for axis in axes)
        fits = tensor.ndim == len(axes) and all(
            own.setdefault(axis, length) == length for axis, length in zip(axes, tensor.shape, strict=True)
        )
        if not fits:
            shape = f"({', '.join(map(str, expected))})"
            raise ArgumentError(f"its {name}.{key} must have shape {shape}; got {tuple(tensor.shape)}")
    if own.get("query_heads", 0) % max(own["kv_heads"], 1):
        raise ArgumentError(f"its {name} must have as many query heads for each of {own['kv_heads']} KV heads")
    rows = (own["batch"], own["kv_heads"])
    for key, sums in state.items():
        if (
            not sums.is_floating_point()
            or sums.ndim < 3
            or tuple(sums.shape[:2]) != rows
            or sums.shape[2] > own["stored"]
        ):
            raise ArgumentError(
                f"its {name}.state.{key} must be sums of at most {own['stored']} tokens in (batch, kv_heads)={rows}; "
                f"got {sums.dtype} of shape {tuple(sums.shape)}"
            )
    for key, tensor in layer_state.items():
        if tensor.is_complex() or tuple(tensor.shape[:1]) != rows[:1]:
            raise ArgumentError(
                f"its {name}.layer_state.{key} must be numbers of {rows[0]} rows; got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    lengths["batch"] = own["batch"]


def _check_mass(found: Mapping[str, torch.Tensor], name: str) -> None:
    """Check that every slot counts as something: attention takes the logarithm."""
    mass = found.get("mass")
    if mass is not None and not bool((mass.isfinite() & (mass > 0)).all()):
        raise ArgumentError(f"its {name}.mass must be finite and above 0; it is not")


def _check_positions(found: Mapping[str, torch.Tensor], layer: EvictingLayer, name: str) -> None:
    """Check that what is stored is a part of what was seen."""
    stored, seen, positions = found["keys"].shape[2], layer.num_seen, found.get("positions")
    if positions is None:
        # A sliding layer next to full ones has the last tokens; others have all until they are evicted.
        if stored > seen or (stored < seen and layer.evicts):
            raise ArgumentError(f"its {name} must store {seen} tokens, or say where they stood; it stores {stored}")
        return
    used = positions >= 0
    ascend = positions[..., 1:] > positions[..., :-1]
    is_right = bool((positions < seen).all() and (ascend | ~used[..., :-1]).all())
    if not is_right or ("valid" not in found and not bool(used.all())):
        raise ArgumentError(f"its {name}.positions must ascend below num_seen={seen}; they do not")
