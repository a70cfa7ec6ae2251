"""What differs between the releases of transformers that we run on: 5.2 and later."""

from __future__ import annotations

from typing import Any

__all__ = ["CACHE_ARGUMENTS", "first_query", "number_of", "tokens_to_remove"]

# What attention modules call the cache that they are given.
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


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
