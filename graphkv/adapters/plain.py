"""Policies as plain values that JSON can hold, and back, without running what the values name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from .. import adapters
from ..core.errors import ArgumentError
from ..core.policy import GraphKV, Policy

__all__ = ["from_plain", "is_known", "to_plain"]

# Every policy that graphkv exports, by the name of its class; a name that is not here makes nothing.
KNOWN: dict[str, type[Policy]] = {"GraphKV": GraphKV} | {name: getattr(adapters, name) for name in adapters.__all__}
# The keys of a class's name, which can be no options: of a policy in that table, and of anything else.
KIND, FOREIGN = "class", "foreign class"


def to_plain(value: Any, /) -> Any:
    """Write a policy, or an option of one, as mappings, lists, strings, numbers, bools and None.

    Parameters
    ----------
    value : Policy, or any type that policies have as an option

    Returns
    -------
    dict, list, str, int, float, bool or None
        Policies are dicts of the class's name and all options. Options of other types, which only policies of the
        user's own have, are written as the name of their type.
    """
    if isinstance(value, Policy):
        kind = type(value)
        name = {KIND: kind.__name__} if KNOWN.get(kind.__name__) is kind else {FOREIGN: kind.__qualname__}
        return name | {each.name: to_plain(getattr(value, each.name)) for each in fields(value) if each.init}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Sequence):
        return [to_plain(each) for each in value]
    return {FOREIGN: type(value).__qualname__}


def is_known(plain: Any, /) -> bool:
    """Say whether `from_plain` can make what was written, by the names in it."""
    if isinstance(plain, Mapping):
        return KIND in plain and all(is_known(each) for each in plain.values())
    return all(is_known(each) for each in plain) if isinstance(plain, list) else True


def from_plain(plain: Any, /) -> Any:
    """Make the policy, or the option, that `to_plain` wrote.

    Parameters
    ----------
    plain : dict, list, str, int, float, bool or None
        Need not come from `to_plain`: anything may stand in a file.

    Returns
    -------
    Policy, tuple, str, int, float, bool or None
        Lists become tuples.

    Raises
    ------
    ArgumentError
        If a policy is unknown, or an option unknown, missing or wrong.
    """
    if isinstance(plain, list):
        return tuple(from_plain(each) for each in plain)
    if not isinstance(plain, Mapping):
        return plain
    name = plain.get(KIND)
    if not isinstance(name, str) or name not in KNOWN:
        raise ArgumentError(f"policy must be one of {', '.join(sorted(KNOWN))}; got {plain.get(FOREIGN, name)!r}")
    kind = KNOWN[name]
    options = {key: from_plain(value) for key, value in plain.items() if key != KIND}
    unknown = set(options) - {each.name for each in fields(kind) if each.init}
    if unknown:
        raise ArgumentError(f"options of {name} must be its own; it has no {', '.join(sorted(unknown))}")
    try:
        return kind(**options)
    # ArgumentError and ArgumentTypeError are among them; the others are for values that no caller would think of.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(f"options of {name} must be right; {error}") from error
