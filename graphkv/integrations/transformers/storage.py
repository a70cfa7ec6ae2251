"""Caches in files: a safetensors file, with what is no tensor as JSON in its header. Nothing in it is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import graphkv

from ...adapters.plain import from_plain, is_known, to_plain
from ...core import checks
from ...core.backend import BUILT_IN, Backend, is_found_by_name
from ...core.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from ...core.files import write_whole
from ...core.policy import Policy
from .layer import EvictingLayer, Settings, Source

if TYPE_CHECKING:
    from .cache import EvictingCache

__all__ = ["load_cache", "save_cache"]

# Raised with every change that an older graphkv would misread.
VERSION = 1
# Under this name the header stands in the metadata of the file.
HEADER = "graphkv_cache"

# What is saved of a layer. A test fails when an attribute stands in none of these tables, or one is gone.
# Tensors, by their axes: the same word is the same length, that of the batch in all layers.
TENSORS = {
    "keys": ("batch", "kv_heads", "stored", "head_size"),
    "values": ("batch", "kv_heads", "stored", "value_size"),
    "positions": ("batch", "kv_heads", "stored"),
    "places": ("batch", "kv_heads", "stored"),
    "valid": ("batch", "kv_heads", "stored"),
    "queries": ("batch", "query_heads", "num_queries", "head_size"),
}
DTYPES = {"positions": torch.int64, "places": torch.int64, "valid": torch.bool}
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
    "is_due": (bool,),
    "record_past": (bool,),
}
# Each has lines of its own below.
OTHERS = {"state", "row_budgets", "shared_by", "source"}
# The record holds arrays of any library; the cache has the settings; the rest follows from keys and a finished call.
NOT_SAVED = {"record", "settings", "awaits_queries", "is_initialized", "dtype", "device"}

SETTINGS: dict[str, tuple[type, ...]] = {
    "every": (int, NoneType),
    "rerotate": (bool,),
    "record": (bool,),
    "num_queries": (int,),
}
SOURCE: dict[str, tuple[type, ...]] = {"index": (int,), "has_all_heads": (bool,), "has_whole_groups": (bool,)}
# What two models must have in common for one to go on with the other's cache; their weights are not compared.
MODEL = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)


def save_cache(cache: EvictingCache, path: str | os.PathLike[str], /) -> None:
    """Write a cache into a file, see `EvictingCache.save`."""
    where, library = _path(path), _safetensors()
    cache._check_finished()
    settings, sources = cache.settings, [layer.source for layer in cache.layers if layer.source is not None]
    header = {
        "version": VERSION,
        "graphkv": graphkv.__version__,
        "policy": to_plain(settings.policy),
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "backend": _backend_name(settings),
        "has_warned": cache._has_warned,
        "model": _description(sources[0]) if sources else None,
        "layers": [_layer_header(layer, settings) for layer in cache.layers],
    }
    tensors = {
        # A copy: no memory in common, no gaps.
        f"layers.{number}.{name}": tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for number, layer in enumerate(cache.layers)
        for name, tensor in _tensors_of(layer)
    }
    metadata = {HEADER: json.dumps(header)}
    try:
        write_whole(where, lambda scratch: library.torch.save_file(tensors, scratch, metadata=metadata))
    except (OSError, ValueError, library.SafetensorError) as error:
        raise ArgumentError(f"path {where} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def load_cache(
    make: Callable[..., EvictingCache],
    path: str | os.PathLike[str],
    /,
    *,
    model: torch.nn.Module | None,
    policy: Policy | None,
    backend: Backend | str | None,
    device: torch.device | str | None,
) -> EvictingCache:
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


def _tensors_of(layer: EvictingLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """List what tensors a layer has, by the names that they get in the file behind that of the layer."""
    if not layer.is_initialized:
        return
    for name in TENSORS:
        if getattr(layer, name) is not None:
            yield name, getattr(layer, name)
    for name, sums in layer.state.items():
        yield f"state.{name}", sums


def _layer_header(layer: Any, settings: Settings) -> dict[str, Any]:
    if type(layer) is not EvictingLayer:
        raise ArgumentError(f"a cache can be saved whose layers are all EvictingLayers; got {type(layer).__name__}")
    shared_by = to_plain(layer.shared_by)
    if not is_known(shared_by) and layer.shared_by != settings.policy:
        raise ArgumentError(
            "a cache whose budgets were shared out by a policy of your own, other than the cache's, cannot be saved; "
            f"got {layer.shared_by}"
        )
    return {
        "values": {name: getattr(layer, name) for name in VALUES},
        "tensors": [name for name, _ in _tensors_of(layer)],
        "row_budgets": None if layer.row_budgets is None else layer.row_budgets.tolist(),
        "shared_by": shared_by,
        "source": None if layer.source is None else {name: getattr(layer.source, name) for name in SOURCE},
    }


def _description(source: Source) -> dict[str, Any]:
    """Describe the model that a layer's keys come from."""
    if source.kind is None:
        # Read from a file, without a model.
        return dict(vars(source.config))
    return _described(source.kind, source.config)


def _described(kind: type, config: Any) -> dict[str, Any]:
    found = {"attention": kind.__name__} | {name: getattr(config, name, None) for name in MODEL}
    described: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return described


def _backend_name(settings: Settings) -> str | None:
    backend = settings.backend
    if backend is None or (backend.name in BUILT_IN and is_found_by_name(backend)):
        return None if backend is None else backend.name
    return f"{backend.name} (not built in)"


# ------------------------------------------------------------------------------------------------------------ reading


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a whole file, and check of the header what stands at the top."""
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
        "has_warned": (bool,),
        "model": (dict, NoneType),
        "layers": (list,),
    }
    return _fields(header, kinds, "header")


def _fields(given: Any, kinds: Mapping[str, tuple[type, ...]], name: str) -> dict[str, Any]:
    """Give a mapping of exactly these names, with values of these types; numbers are counts."""
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
    cache: EvictingCache,
    header: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    model: torch.nn.Module | None,
    device: torch.device | str | None,
) -> None:
    """Give an empty cache the layers of a file."""
    description = header["model"]
    if description is not None:
        _check_description(description)
    modules = {} if model is None or description is None else _attention_of(model, description)
    lengths: dict[str, int] = {}
    for number, each in enumerate(header["layers"]):
        name = f"layers.{number}"
        layer = _layer(each, name, cache.settings, tensors, lengths)
        layer.source = _source(each["source"], name, description, modules)
        module = None if layer.source is None else modules.get(layer.source.index)
        if module is not None and layer.source is not None and layer.source.has_all_heads:
            _check_heads(layer, name, module)
        _move(layer, device or _device_of(module))
        cache.layers.append(layer)
    if tensors:
        raise ArgumentError(f"it must hold no more tensors than its layers have; got {sorted(tensors)[:5]}")
    if any(layer.record_past for layer in cache.layers):
        cache.activate_past_recording()
    cache._has_warned = header["has_warned"]
    cache._check_finished()


def _layer(
    given: Any, name: str, settings: Settings, tensors: dict[str, torch.Tensor], lengths: dict[str, int]
) -> EvictingLayer:
    """Make one layer, without its source, and take its tensors out of those of the file."""
    kinds: dict[str, tuple[type, ...]] = {
        "values": (dict,),
        "tensors": (list,),
        "row_budgets": (list, NoneType),
        "shared_by": (dict, NoneType),
        "source": (dict, NoneType),
    }
    given = _fields(given, kinds, name)
    layer = EvictingLayer(settings)
    for key, value in _fields(given["values"], VALUES, f"{name}.values").items():
        setattr(layer, key, value)
    found = _taken(given["tensors"], name, tensors)
    layer.state = {key.removeprefix("state."): found.pop(key) for key in list(found) if key.startswith("state.")}
    if found or layer.num_seen:
        _check_tensors(found, layer.state, name, lengths)
        _put(layer, found)
        _check_positions(layer, name)
    if given["row_budgets"] is not None:
        budgets = given["row_budgets"]
        if len(budgets) != lengths.get("batch") or any(type(each) is not int or each < 0 for each in budgets):
            raise ArgumentError(f"its {name}.row_budgets must be a count for each row; got {str(budgets)[:80]}")
        layer.row_budgets = torch.tensor(budgets)
    # One that is not known is the cache's own, see `_layer_header`.
    layer.shared_by = from_plain(given["shared_by"]) if is_known(given["shared_by"]) else settings.policy
    return layer


def _taken(names: list[Any], name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for each in names:
        if not isinstance(each, str) or (each not in TENSORS and not each.startswith("state.")):
            raise ArgumentError(f"its {name} must have tensors that a layer has; got {each!r}")
        if f"{name}.{each}" not in tensors:
            raise ArgumentError(f"it must hold the tensor {name}.{each}; it is missing or named twice")
    return {each: tensors.pop(f"{name}.{each}") for each in dict.fromkeys(names)}


def _check_tensors(
    found: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], name: str, lengths: dict[str, int]
) -> None:
    """Check that the tensors of a layer fit to each other, and their batch to that of other layers."""
    if not {"keys", "values"} <= set(found):
        raise ArgumentError(f"its {name} must have keys and values; got {sorted(found)}")
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
        if not sums.is_floating_point() or tuple(sums.shape[:2]) != rows or not 0 <= sums.shape[2] <= own["stored"]:
            raise ArgumentError(
                f"its {name}.state.{key} must be sums of at most {own['stored']} tokens in (batch, kv_heads)={rows}; "
                f"got {sums.dtype} of shape {tuple(sums.shape)}"
            )
    lengths["batch"] = own["batch"]


def _check_positions(layer: EvictingLayer, name: str) -> None:
    """Check that what is stored is a part of what was seen."""
    stored, seen = layer.num_stored, layer.num_seen
    if layer.positions is None:
        # A sliding layer next to full ones has the last tokens; others have all until they are evicted.
        if stored > seen or (stored < seen and layer.evicts):
            raise ArgumentError(f"its {name} must store {seen} tokens, or say where they stood; it stores {stored}")
        return
    used = layer.positions >= 0
    ascend = layer.positions[..., 1:] > layer.positions[..., :-1]
    is_right = bool((layer.positions < seen).all() and (ascend | ~used[..., :-1]).all())
    if not is_right or (layer.valid is None and not bool(used.all())):
        raise ArgumentError(f"its {name}.positions must ascend below num_seen={seen}; they do not")


def _check_description(description: Mapping[str, Any]) -> None:
    if set(description) != {"attention", *MODEL} or type(description["num_hidden_layers"]) is not int:
        raise ArgumentError(f"its model must be described by attention, {', '.join(MODEL)}; got {sorted(description)}")


def _source(
    given: Any, name: str, description: Mapping[str, Any] | None, modules: Mapping[int, torch.nn.Module]
) -> Source | None:
    """Say again where the keys come from; without a model, what is known of it without running anything."""
    if given is None or description is None:
        if given is not None:
            raise ArgumentError(f"its model must be described, because {name} has a source; got None")
        return None
    values = _fields(given, SOURCE, f"{name}.source")
    if values["index"] >= description["num_hidden_layers"]:
        raise ArgumentError(f"its {name} must be one of {description['num_hidden_layers']}; got {values['index']}")
    if not modules:
        return Source(kind=None, config=SimpleNamespace(**description), **values)
    if values["index"] not in modules:
        raise ArgumentError(f"model must have the attention of layer {values['index']}; got {sorted(modules)}")
    module = modules[values["index"]]
    return Source(kind=type(module), config=module.config, **values)


def _attention_of(model: torch.nn.Module, description: Mapping[str, Any]) -> dict[int, torch.nn.Module]:
    """Find the attention of every layer in a model, or say in what it is another model than that of the cache."""
    candidates = [
        each
        for each in model.modules()
        if type(each).__name__ == description["attention"] and hasattr(each, "config") and hasattr(each, "layer_idx")
    ]
    if not candidates:
        raise ArgumentError(
            f"model must be the one that the cache was filled by, with layers of {description['attention']}; "
            f"{type(model).__name__} has none"
        )
    found: dict[int, torch.nn.Module] = {}
    for module in candidates:
        described = _described(type(module), module.config)
        if described == description:
            found.setdefault(int(module.layer_idx), module)  # type: ignore[arg-type]
    if not found:
        different = {
            key: (description[key], described[key]) for key in description if description[key] != described[key]
        }
        words = ", ".join(f"{key}={mine!r} and not {its!r}" for key, (mine, its) in different.items())
        raise ArgumentError(f"model must be the one that the cache was filled by, with {words}")
    return found


def _check_heads(layer: EvictingLayer, name: str, module: torch.nn.Module) -> None:
    """Compare what is stored with what the model will append, where it says so by the width of its projections."""
    for key, projection in (("keys", "k_proj"), ("values", "v_proj")):
        width, tensor = getattr(getattr(module, projection, None), "out_features", None), getattr(layer, key)
        if layer.is_initialized and width is not None and width != tensor.shape[1] * tensor.shape[-1]:
            raise ArgumentError(
                f"its {name}.{key} must have {width} numbers per token, as the model's {projection}; "
                f"got {tensor.shape[1]} heads of {tensor.shape[-1]}"
            )


def _device_of(module: torch.nn.Module | None) -> torch.device | str:
    """Say where a layer's keys will come from; the host where that cannot be seen."""
    parameter = None if module is None else next(module.parameters(), None)
    return "cpu" if parameter is None or parameter.device.type == "meta" else parameter.device


def _move(layer: EvictingLayer, device: torch.device | str) -> None:
    if layer.is_initialized:
        found = {name: getattr(layer, name) for name in TENSORS}
        _put(layer, {name: tensor.to(device) for name, tensor in found.items() if tensor is not None})
        layer.state = {name: sums.to(device) for name, sums in layer.state.items()}


def _put(layer: EvictingLayer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a layer have these tensors, as if they had come by `update`."""
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
