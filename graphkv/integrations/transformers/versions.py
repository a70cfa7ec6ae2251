"""Differences between the supported releases of transformers, 5.2 and later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, cache_utils

__all__ = [
    "ATTENTION_CACHE_ARGUMENTS",
    "CACHE_ARGUMENTS",
    "cache_argument",
    "is_checkpointed",
    "layer_kinds",
    "makes_other_layers",
    "number_of",
    "number_of_queries",
    "other_layer",
    "tokens_to_remove",
    "with_cache",
]

CACHE_ARGUMENTS = ("cache", "past_key_values")
# Some attention modules have names of their own.
ATTENTION_CACHE_ARGUMENTS = (*CACHE_ARGUMENTS, "past_key_value", "layer_past")


def number_of(queries: Any) -> int:
    """Read the argument of `get_mask_sizes`: a number of new tokens, or before 5.4 their positions."""
    return queries if isinstance(queries, int) else int(queries.shape[0])


def number_of_queries(mask_arguments: dict[str, Any]) -> int:
    """Read the number of new tokens from the arguments of a mask function."""
    if "q_length" in mask_arguments:
        return int(mask_arguments["q_length"])
    # Before 5.4.
    return int(mask_arguments["cache_position"].shape[0])


def tokens_to_remove(argument: int, seen: int) -> int:
    """Read the argument of `crop`: minus the tokens to remove; a positive one, of older releases, is what to leave."""
    return -argument if argument <= 0 else max(0, seen - argument)


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the argument by which a forward takes its cache: "cache", or before 5.24 "past_key_values".

    A forward that names neither and hands its keyword arguments on (a wrapper's) has the name that this release uses.
    """
    for function in (forward, GenerationMixin.prepare_inputs_for_generation):
        parameters = inspect.signature(function).parameters
        for name in CACHE_ARGUMENTS:
            if name in parameters:
                return name
    raise RuntimeError("this release of transformers has another name for the cache; `make test-newest` tells more")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a model: ``model(ids, **with_cache(model, cache))``."""
    return {cache_argument(model.forward): cache}


def is_checkpointed(model: Any) -> bool:
    """Return whether a model computes activations again in training, instead of keeping them."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Return what kind of cache each layer of a decoder needs, in transformers' own words.

    "dummy" is a layer that caches nothing, because it reads another layer's keys or has no attention.
    """
    if hasattr(cache_utils, "get_layer_types_and_kwargs"):
        try:
            return tuple(cache_utils.get_layer_types_and_kwargs(config)[0])
        except AttributeError:
            # A kind without the field that its cache needs.
            return tuple(config.layer_types)
    # Before 5.13 the rule was in the constructor of DynamicCache.
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        only = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            only = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            only = "chunked_attention"
        kinds = [only] * int(config.num_hidden_layers)
    if getattr(config, "index_topk", None) is not None:
        # Their masks are made from what is stored.
        kinds = ["indexed_attention"] * len(kinds)
    num_shared = getattr(config, "num_kv_shared_layers", None) or 0
    return tuple("dummy" if index >= len(kinds) - num_shared else kind for index, kind in enumerate(kinds))


def makes_other_layers() -> bool:
    """Return whether transformers' cache has layers of other kinds; before 5.13 models brought caches of their own."""
    return hasattr(cache_utils, "get_layer_types_and_kwargs")


def other_layer(config: Any, index: int) -> Any:
    """Build transformers' own cache layer, for a layer that stores no keys of its own."""
    kinds, options = cache_utils.get_layer_types_and_kwargs(config)
    return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[kinds[index]](**options[index])
