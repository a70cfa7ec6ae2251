"""The model that filled a cache: described in its file, and found again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ...core.errors import ArgumentError
from . import versions
from .layer import EvictingLayer
from .source import Source

__all__ = ["attention_of", "check_description", "check_heads", "describe_model", "device_of", "make_source"]

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


def describe_model(source: Source) -> dict[str, Any]:
    """Describe the model that a layer's keys come from."""
    if source.kind is None:
        # Read from a file, without a model.
        return dict(vars(source.config))
    return _described(source.kind, source.config)


def _described(kind: type, config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in MODEL}
    found |= {"attention": kind.__name__, "layer_kinds": versions.layer_kinds(config)}
    described: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return described


def check_description(description: Mapping[str, Any]) -> None:
    """Refuse what `describe_model` cannot have returned."""
    kinds = description.get("layer_kinds")
    is_right = type(description.get("num_hidden_layers")) is int and isinstance(kinds, list)
    if set(description) != {"attention", "layer_kinds", *MODEL} or not is_right:
        raise ArgumentError(f"its model must be described by attention, {', '.join(MODEL)}; got {sorted(description)}")


def make_source(
    given: Mapping[str, Any], number: int, description: Mapping[str, Any] | None, module: torch.nn.Module | None
) -> Source:
    """Restore where the keys come from; without a model, what is known of it without running anything."""
    if description is None:
        raise ArgumentError(f"its model must be described, because layers.{number} has a source; got None")
    if given["index"] != number:
        raise ArgumentError(f"its layers.{number} must have itself as index; got {given['index']}")
    options = {**given, "layer_kinds": tuple(map(str, description["layer_kinds"]))}
    if module is None:
        return Source(kind=None, config=SimpleNamespace(**description), **options)
    return Source(kind=type(module), config=module.config, **options)


def attention_of(model: torch.nn.Module, description: Mapping[str, Any]) -> dict[int, torch.nn.Module]:
    """Return the attention of every layer in a model, or raise with what makes it another model than the cache's."""
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


def check_heads(layer: EvictingLayer, name: str, module: torch.nn.Module) -> None:
    """Compare what is stored with what the model will append, where the width of its projections shows that."""
    for key, projection in (("keys", "k_proj"), ("values", "v_proj")):
        width, tensor = getattr(getattr(module, projection, None), "out_features", None), getattr(layer.slots, key)
        if layer.is_initialized and width is not None and width != tensor.shape[1] * tensor.shape[-1]:
            raise ArgumentError(
                f"its {name}.{key} must have {width} numbers per token, as the model's {projection}; "
                f"got {tensor.shape[1]} heads of {tensor.shape[-1]}"
            )


def device_of(module: torch.nn.Module | None) -> torch.device | str:
    """Return where a layer's keys will be; the host where that cannot be seen."""
    parameter = None if module is None else next(module.parameters(), None)
    return "cpu" if parameter is None or parameter.device.type == "meta" else parameter.device
