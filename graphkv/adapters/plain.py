"""Policies as plain values that JSON can hold, and back, without running what the values name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from ..core import signals
from ..core.errors import ArgumentError
from ..core.policy import Policy
from ..core.signals import Signal
from .catalog import ENTRIES

__all__ = ["from_plain", "is_known", "to_plain"]

# Every policy and signal that graphkv exports, by the name of its class; a name that is not here makes nothing.
POLICIES: dict[str, type[Policy]] = {entry.policy.__name__: entry.policy for entry in ENTRIES}
SIGNALS: dict[str, type[Signal]] = {name: getattr(signals, name) for name in signals.__all__ if name != Signal.__name__}
KNOWN: dict[str, type[Policy | Signal]] = {**POLICIES, **SIGNALS}
# The keys of a class's name, which can be no options: of one in that table, and of anything else.
KIND, FOREIGN = "class", "foreign class"


def to_plain(value: Any, /) -> Any:
    """Write a policy, or an option of one, as mappings, lists, strings, numbers, bools and None.

    Parameters
    ----------
    value : Policy, Signal, or any type that policies have as an option

    Returns
    -------
    dict, list, str, int, float, bool or None
        Policies and signals are dicts of the class's name and all options. Options of other types, which only policies
        of the user's own have, are written as the name of their type.
    """
    if isinstance(value, (Policy, Signal)):
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
    """Return whether `from_plain` can make what was written, by the names in it."""
    if isinstance(plain, Mapping):
        return KIND in plain and all(is_known(each) for each in plain.values())
    return all(is_known(each) for each in plain) if isinstance(plain, list) else True


def from_plain(plain: Any, /) -> Any:
    """Make the policy, or the option, that `to_plain` wrote.

    Parameters
    ----------
    plain : dict, list, str, int, float, bool or None
        Need not be from `to_plain`: a file may hold anything.

    Returns
    -------
    Policy, Signal, tuple, str, int, float, bool or None
        Lists become tuples.

    Raises
    ------
    ArgumentError
        If a policy or signal is unknown, or an option unknown, missing or wrong.
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
