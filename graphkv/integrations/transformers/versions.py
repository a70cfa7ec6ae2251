"""What differs between the releases of transformers that we run on: 5.2 and later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

__all__ = ["cache_argument", "first_query", "number_of", "tokens_to_remove", "with_cache"]


def number_of(queries: Any) -> int:
    """Read the argument of `get_mask_sizes`: a number of new tokens, or before 5.4 their positions."""
    return queries if isinstance(queries, int) else int(queries.shape[0])


def first_query(mask_arguments: dict[str, Any]) -> int:
    """Read the position of the first new token from the arguments of a mask function."""
    if "q_offset" in mask_arguments:
        return int(mask_arguments["q_offset"])
    # Before 5.4.
    return int(mask_arguments["cache_position"][0])


def tokens_to_remove(argument: int, seen: int) -> int:
    """Read the argument of `crop`: minus the tokens to remove; a positive one, of older releases, is what to leave."""
    return -argument if argument <= 0 else max(0, seen - argument)


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the argument by which a forward takes its cache: "cache", or before 5.24 "past_key_values".

    A forward that names neither and hands its keyword arguments on (a wrapper's) has the name that this release uses.
    """
    for function in (forward, GenerationMixin.prepare_inputs_for_generation):
        parameters = inspect.signature(function).parameters
        for name in ("cache", "past_key_values"):
            if name in parameters:
                return name
    raise RuntimeError("this release of transformers has another name for the cache; `make test-newest` tells more")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands a cache to a model: ``model(ids, **with_cache(model, cache))``."""
    return {cache_argument(model.forward): cache}
