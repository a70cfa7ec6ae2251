"""Presets: a whole policy in a TOML file, which every ``--policy`` takes.

.. code-block:: toml

    base = "snapkv"
    sinks = 4                        # where the command does not say otherwise
    layer_budgets = [300, 260, 208]  # proportions: the command's budget is shared out exactly

    [options]                        # of the base
    window = 32

    [[graph]]                        # options of GraphKV for the lowest layers
    signal = "decay"
    source_ratio = 0.3
    neighbors = 2

    [[graph]]                        # for the layers above them; as many groups as there are tables
    signal = "decay"
    rounds = 0                       # no graph there

    [about]                          # where it comes from; nobody reads it
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core import checks
from ..core.errors import ArgumentError, ArgumentTypeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SUFFIX", "Preset", "load_preset", "write_preset"]

SUFFIX = ".toml"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A policy as a value: names and numbers only.

    Attributes
    ----------
    base : str
        Name of the policy under the graph.
    options : mapping of str to value
        Of the base.
    sinks : int or None
        First tokens that are always kept. None: what the base does by itself.
    graph : tuple of mapping of str to value
        Options of `GraphKV` for groups of successive layers, the lowest first. Empty: no graph.
    layer_budgets : tuple of int or float
        Proportions in which layers share the budget, one per layer. Empty: alike.
    about : mapping of str to value
        Where the preset comes from.

    Raises
    ------
    ArgumentError
        If a field has the wrong type or a number is out of range.
    """

    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sinks: int | None = None
    graph: tuple[Mapping[str, Any], ...] = ()
    layer_budgets: tuple[int | float, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("base", self.base, str, "a string")
        _check("options", self.options, Mapping, "a table")
        _check("about", self.about, Mapping, "a table")
        _check("graph", self.graph, (list, tuple), "an array of tables")
        _check("layer_budgets", self.layer_budgets, (list, tuple), "an array of numbers")
        for number, options in enumerate(self.graph):
            _check(f"graph[{number}]", options, Mapping, "a table")
        if self.sinks is not None:
            checks.count("sinks", self.sinks)
        for layer, share in enumerate(self.layer_budgets):
            checks.finite_weight(f"layer_budgets[{layer}]", share)
        object.__setattr__(self, "graph", tuple(self.graph))
        object.__setattr__(self, "layer_budgets", tuple(self.layer_budgets))

    @property
    def base_name(self) -> str:
        """The base as a policy's name, with its options."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.base}({options})" if options else self.base

    def as_toml(self) -> dict[str, Any]:
        """Give the fields that say something, as plain values."""
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
        If the file cannot be read, is no TOML, or has a field that is unknown, missing or wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ArgumentError(f"--policy {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--policy {path} must be TOML: {error}") from error
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

    scratch = path.with_suffix(".part")
    try:
        scratch.write_text(tomli_w.dumps(preset.as_toml()), encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror or error}") from error
