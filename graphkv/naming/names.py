"""The grammar of policy names: a base, then any number of wrappers, each with options in parentheses.

``snapkv``, ``snapkv(window=16)+degree(exponent=8)``, ``h2o+graphkv(neighbors=4)+adakv``. Words need no quotes. A base
may also be the user's own, ``package.module:NAME``. Three kinds of names take no wrapper: ``full``, the path of a
preset, which ends in ``.toml``, and a press of kvpress, ``kvpress:KnormPress``.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from ..core.errors import ArgumentError

__all__ = ["FULL", "base_name", "is_own", "is_preset", "is_press", "parse", "split"]

# The cache that nothing is evicted from.
FULL = "full"
PRESET = ".toml"
PRESS = "kvpress:"
PART = re.compile(r"\s*([A-Za-z0-9_-]+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)\s*(?:\((.*)\))?\s*")


def is_preset(name: str, /) -> bool:
    """Return whether a name is the path of a preset."""
    return name.endswith(PRESET)


def is_press(name: str, /) -> bool:
    """Return whether a name is that of a press of kvpress."""
    return name.startswith(PRESS)


def is_own(kind: str, /) -> bool:
    """Return whether a base is the user's own, ``package.module:NAME``."""
    return ":" in kind


def split(name: str, /) -> list[str]:
    """Split a name at the plus signs outside parentheses: the base, then the wrappers from the inside out."""
    if is_preset(name):
        return [name]
    parts, depth = [""], 0
    for character in name:
        depth += (character in "([{") - (character in ")]}")
        if character == "+" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def base_name(name: str, /) -> str:
    """Return what a name has before its wrappers: the name itself where there are none."""
    return split(name)[0]


def parse(name: str, /) -> list[tuple[str, dict[str, Any]]]:
    """Parse a name into the kind and the options of its base and of each wrapper.

    Parameters
    ----------
    name : str

    Returns
    -------
    list of tuple of str and dict
        The base first. Values are Python literals, or strings where they are words.

    Raises
    ------
    ArgumentError
        If a part is not a word, or a module and a name, with options in parentheses.

    Examples
    --------
    >>> parse("snapkv(window=8, pooling=max)+graphkv")
    [('snapkv', {'window': 8, 'pooling': 'max'}), ('graphkv', {})]
    >>> parse("mypackage.policies:MINE+adakv")
    [('mypackage.policies:MINE', {}), ('adakv', {})]
    """
    return [_part(part, name) for part in split(name)]


def _part(part: str, name: str) -> tuple[str, dict[str, Any]]:
    match = PART.fullmatch(part)
    if match is None:
        raise ArgumentError(
            f"--policy must be a base and its wrappers, such as snapkv(window=8)+graphkv; got {part!r} in {name!r}"
        )
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(option.arg is None for option in call.keywords):
            raise ValueError
        options = {str(option.arg): _value(option.value) for option in call.keywords}
        if len(options) < len(call.keywords):
            raise ValueError
    except (ValueError, SyntaxError):
        raise ArgumentError(f"--policy must have options like window=8 in its parentheses; got {name!r}") from None
    return match[1], options


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
