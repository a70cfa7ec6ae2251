"""Presets: a whole policy in a TOML file, which every ``--policy`` takes.

.. code-block:: toml

    base = "snapkv(window=32)"
    sinks = 4                        # unless the command names another number
    graph = [                        # wrappers over the base, as in the names of policies
        "graphkv(neighbors=2)",      # for the lowest layers
        "degree(exponent=8)",        # for the layers above them; as many groups as there are entries
        "",                          # none for the highest
    ]
    layer_budgets = [300, 260, 208]  # proportions: the command's budget is shared out exactly

    [about]                          # provenance; ignored when loading
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core import checks
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.files import read_toml, write_file

__all__ = ["Preset", "load_preset", "write_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A policy as names and numbers.

    Attributes
    ----------
    base : str
        Name of the policy under the wrappers, with its options; your own ``package.module:NAME`` too.
    sinks : int or None
        First tokens that are always kept. None: what the base does by itself.
    graph : tuple of str
        Wrappers over the base for groups of successive layers, the lowest first; empty: without. No groups: no
        wrappers.
    layer_budgets : tuple of int or float
        Proportions in which layers share the budget, one per layer. Empty: alike.
    about : mapping of str to value
        Provenance; ignored when loading.

    Raises
    ------
    ArgumentError
        If a field has the wrong type or a number is out of range.
    """

    base: str
    sinks: int | None = None
    graph: tuple[str, ...] = ()
    layer_budgets: tuple[int | float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("base", self.base, str, "a string")
        _check("about", self.about, Mapping, "a table")
        _check("graph", self.graph, (list, tuple), "an array of strings")
        _check("layer_budgets", self.layer_budgets, (list, tuple), "an array of numbers")
        for number, wrappers in enumerate(self.graph):
            _check(f"graph[{number}]", wrappers, str, "a string")
        if self.sinks is not None:
            checks.count("sinks", self.sinks)
        for layer, share in enumerate(self.layer_budgets):
            checks.finite_weight(f"layer_budgets[{layer}]", share)
        object.__setattr__(self, "graph", tuple(self.graph))
        object.__setattr__(self, "layer_budgets", tuple(self.layer_budgets))

    def as_toml(self) -> dict[str, Any]:
        """Return the fields that are not empty, as plain values."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in found.items()
            if value is not None and value not in ((), {})
        }


def _check(name: str, value: Any, kind: Any, wanted: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} must be {wanted}; got {value!r}")


def load_preset(path: Path, /) -> Preset:
    """Read a preset.

    Parameters
    ----------
    path : pathlib.Path

    Raises
    ------
    ArgumentError
        If the file cannot be read, is not TOML, or has a field that is unknown, missing or wrong.
    """
    values = read_toml(path, "--policy")
    known = [entry.name for entry in fields(Preset)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ArgumentError(f"--policy {path} has unknown fields: {', '.join(unknown)}; known: {', '.join(known)}")
    if "base" not in values:
        raise ArgumentError(f"--policy {path} must have the field base")
    try:
        return Preset(**values)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"--policy {path}: {error}") from error


def write_preset(path: Path, preset: Preset, /) -> None:
    """Write a preset, whole or not at all.

    Parameters
    ----------
    path : pathlib.Path
    preset : Preset

    Raises
    ------
    ArgumentError
        If the file cannot be written.
    """
    import tomli_w  # noqa: PLC0415 - reading a preset needs no writer

    try:
        write_file(path, tomli_w.dumps(preset.as_toml()))
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror or error}") from error
