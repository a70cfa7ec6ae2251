"""Policies by name: ``snapkv``, ``h2o(num_recent=32)+degree+adakv``, ``mypackage.module:POLICY``, ``preset.toml``."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..adapters import LayerShares, PerLayer, catalog
from ..core import checks
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.graphkv import GraphKV
from ..core.policy import Policy, Wrapper
from ..core.signals import Bar, Decay, Degree, Enhance, PageRank, Signal
from .names import FULL, is_own, is_preset, is_press, parse
from .presets import Preset, load_preset

__all__ = [
    "BASES",
    "LOADED",
    "LOADED_WRAPPERS",
    "WRAPPERS",
    "base_of",
    "call",
    "make_policy",
    "make_preset",
    "own_module",
    "parse_budget",
    "policy_of",
    "with_budget",
]

BASES: dict[str, Callable[..., Policy]] = dict(catalog.BASES)
# Bases with weights of their own: attention-gate(path='gates.safetensors').
LOADED = catalog.LOADED
LOADED_WRAPPERS = catalog.LOADED_WRAPPERS
# ``+graphkv`` is ``GraphKV(base)``, with the options of the paper's signal.
SIGNALS: dict[str, type[Signal]] = {
    "graphkv": Decay,
    "enhance": Enhance,
    "bar": Bar,
    "degree": Degree,
    "pagerank": PageRank,
}
OWN = "package.module:NAME"


def _graph(signal: type[Signal], base: Policy, /, *, unrotated: bool = False, **options: Any) -> GraphKV:
    return GraphKV(base, signal(**options), unrotated)


# `GraphKV` is in the catalog too, under the name of the paper's signal.
WRAPPERS: dict[str, Callable[..., Policy]] = {
    **{name: partial(_graph, signal) for name, signal in SIGNALS.items()},
    **{name: wrapper for name, wrapper in catalog.WRAPPERS.items() if name not in SIGNALS},
}


def make_policy(name: str, budget: int | float, *, sinks: int | None = None, seed: int = 0) -> Policy | None:
    """Make the policy of a name; None for ``full``.

    Parameters
    ----------
    name : str
        ``full``; or a base with any number of wrappers, each with options in parentheses, see
        `graphkv.naming.names`; or the path of a preset, which ends in ``.toml``, see `graphkv.naming.presets`.
        Wrappers are ``+graphkv`` (the paper's setting), ``+enhance``, ``+bar``, ``+degree``, ``+pagerank``, with the
        options of their signal and ``unrotated``; ``+adakv`` and ``+caote``. A base of the user's own is
        ``package.module:NAME``: a `Policy`, whose budget is replaced, or a callable with a parameter `budget` that
        returns one.
    budget : int or float
        Tokens to keep per KV head, or their share.
    sinks : int, optional
        First tokens to keep before all others. Default: what the base does by itself, as one of the user's own always
        does.
    seed : int
        Of the random policy.

    Raises
    ------
    ArgumentError
        If the name or an option is unknown, a preset is not valid, or a module has no such policy.

    Examples
    --------
    >>> make_policy("snapkv(window=8)+graphkv(neighbors=4)", 512).signal.neighbors
    4
    >>> make_policy("graphkv.adapters:KNorm+adakv", 512)
    AdaKV(base=KNorm(budget=512, num_sinks=0), floor=0.2, schedule='exact')
    """
    if name == FULL:
        return None
    if is_preset(name):
        return make_preset(load_preset(Path(name)), budget, sinks=sinks, seed=seed, name=name)
    if is_press(name):
        raise ArgumentError(f"--policy must be a policy here; presses of kvpress are for graphkv eval; got {name!r}")
    (kind, options), *wrappers = parse(name)
    if not (kind in BASES or kind in LOADED or is_own(kind)) or not _are_wrappers(wrappers):
        raise ArgumentError(
            f"--policy must be one of {', '.join([FULL, *BASES, *LOADED])} or your own {OWN}, all but full with any of "
            f"+{', +'.join([*WRAPPERS, *LOADED_WRAPPERS])}, or a preset.toml; got {name!r}"
        )
    return _wrap(_make_base(kind, options, name, budget, sinks, seed), wrappers, name)


def policy_of(policy: Policy | str, budget: int | float | str | None = None, /) -> Policy:
    """Return a policy that is given as such, or by its name on the command line and a budget.

    Parameters
    ----------
    policy : Policy or str
    budget : int, float or str, optional
        With a name: tokens, a share, or a percentage.

    Raises
    ------
    ArgumentError
        If the name is unknown or evicts nothing, or a name has no budget, or a Policy two.
    ArgumentTypeError
        If `policy` is neither.

    Examples
    --------
    >>> policy_of("knorm", "25%")
    KNorm(budget=0.25, num_sinks=0)
    """
    if not isinstance(policy, str):
        checks.instance("policy", policy, Policy)
        if budget is not None:
            raise ArgumentError(f"budget must be left out where policy has one of its own; got {budget!r}")
        return policy
    if budget is None:
        raise ArgumentError(f"budget must be given with the name of a policy, {policy!r}")
    try:
        made = make_policy(policy, parse_budget(budget) if isinstance(budget, str) else budget)
    except ArgumentError as error:
        # Not an option of a command here.
        raise ArgumentError(str(error).replace("--", "")) from error
    if made is None:
        raise ArgumentError(f"policy must evict something; got {policy!r}")
    return made


def parse_budget(text: str, /) -> int | float:
    """Read ``512`` as tokens and ``25%`` as a share.

    >>> parse_budget("512"), parse_budget("25%"), parse_budget("12.5 %")
    (512, 0.25, 0.125)
    """
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match[2] and "." in match[1]):
        raise ArgumentError(f"--budget must be a number of tokens or a percentage like 25%; got {text!r}")
    if match[2]:
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise ArgumentError(f"--budget must lie above 0% and be at most 100%; got {text!r}")
        return share
    if int(match[1]) < 1:
        raise ArgumentError(f"--budget must be at least 1 token; got {text!r}")
    return int(match[1])


def _make_base(
    kind: str, options: Mapping[str, Any], name: str, budget: int | float, sinks: int | None, seed: int
) -> Policy:
    if is_own(kind):
        return _make_own(kind, options, name, budget)
    if kind == "random":
        options = {"seed": seed, **options}
    if sinks is not None:
        options = {"num_sinks": sinks, **options}
    made: Policy = call(BASES.get(kind) or LOADED[kind], name, budget=budget, **options)
    return made


def _make_own(kind: str, options: Mapping[str, Any], name: str, budget: int | float) -> Policy:
    """Make a policy out of what a module of the user's holds under a name."""
    found: Any = own_module(kind, name)
    for attribute in kind.partition(":")[2].split("."):
        if not hasattr(found, attribute):
            raise ArgumentError(f"--policy {name} must be {OWN}; there is no {attribute!r} in {kind.partition(':')[0]}")
        found = getattr(found, attribute)
    if isinstance(found, Policy):
        if options:
            raise ArgumentError(f"--policy {name} must have no options, because {kind} is a policy; got {[*options]}")
        return call(with_budget, name, found, budget)  # type: ignore[no-any-return]
    is_maker = callable(found) and _takes(found, "budget")
    made = call(found, name, budget=budget, **options) if is_maker else found
    if not isinstance(made, Policy):
        raise ArgumentError(
            f"--policy {name} must be a Policy, or a callable with a parameter budget that returns one; got "
            f"{'one that returns ' if is_maker else ''}{type(made).__name__}"
        )
    return made


def own_module(kind: str, name: str, /) -> ModuleType:
    """Import the module of ``package.module:NAME``, from the current folder too.

    Parameters
    ----------
    kind : str
    name : str
        The whole name, for the error.

    Raises
    ------
    ArgumentError
        If it cannot be imported, whatever goes wrong in it.
    """
    # As with `python -m`, and unlike in a script that an installer wrote. Workers get the path of their parent.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    module = kind.partition(":")[0]
    try:
        return import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArgumentError(f"--policy {name} must be {OWN}; {module} cannot be imported: {reason}") from error


def _wrap(policy: Policy, wrappers: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> Policy:
    """Put wrappers on top, the innermost first."""
    for kind, options in wrappers:
        policy = call(WRAPPERS.get(kind) or LOADED_WRAPPERS[kind], name, policy, **options)
    return policy


def _are_wrappers(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    return all(kind in WRAPPERS or kind in LOADED_WRAPPERS for kind, _ in parts)


def make_preset(
    preset: Preset, budget: int | float, *, sinks: int | None = None, seed: int = 0, name: str = "preset"
) -> Policy:
    """Make the policy of a preset.

    Parameters
    ----------
    preset : Preset
    budget : int or float
        Tokens to keep per KV head in the average layer, or their share.
    sinks : int, optional
        Instead of those of the preset.
    seed : int
        Of the random policy.
    name : str
        What errors call the preset.

    Raises
    ------
    ArgumentError
        If the base, a wrapper or an option is unknown or wrong.
    """
    (kind, options), *inner = parse(preset.base)
    if not (kind in BASES or kind in LOADED or is_own(kind)) or inner:
        raise ArgumentError(
            f"--policy {name}: base must be one of {', '.join([*BASES, *LOADED])} or your own {OWN}; "
            f"got {preset.base!r}"
        )
    sinks = preset.sinks if sinks is None else sinks
    base = _make_base(kind, options, f"{name}, base", budget, sinks, seed)
    groups = []
    for number, wrapper in enumerate(preset.graph):
        wrappers = parse(wrapper) if wrapper else []
        if not _are_wrappers(wrappers):
            raise ArgumentError(
                f"--policy {name}: graph[{number}] must be wrappers such as "
                f"{', '.join([*WRAPPERS, *LOADED_WRAPPERS])}, joined by +; got {wrapper!r}"
            )
        groups.append(_wrap(base, wrappers, f"{name}, graph[{number}]"))
    policy = PerLayer(base, groups) if len(groups) > 1 else [base, *groups][-1]
    return LayerShares(policy, preset.layer_budgets) if preset.layer_budgets else policy


def call(make: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Call what makes a policy or a press; raise an ArgumentError that names the option that is wrong."""
    try:
        return make(*args, **options)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"--policy {name}: {error}") from error
    except TypeError as error:
        # Python's own words name the option: unexpected keyword argument 'windows'.
        reason = str(error).split("() ", 1)[-1]
        if "unexpected keyword argument" in reason:
            reason += f"; there are {', '.join(_options(make)) or 'none'}"
        raise ArgumentError(f"--policy {name}: {reason}") from error


def _options(make: Callable[..., Any]) -> list[str]:
    """List the options that a user can give."""
    makers = (make.args[0], make) if isinstance(make, partial) and make.func is _graph else (make,)
    found = [each for maker in makers for each in _parameters(maker) or () if each.kind is not each.VAR_KEYWORD]
    return [each.name for each in found if each.name not in ("base", "budget")]


def _takes(make: Callable[..., Any], name: str) -> bool:
    """Return whether a callable takes a keyword argument, as far as it says what it takes."""
    found = _parameters(make)
    return found is None or any(each.kind is each.VAR_KEYWORD or each.name == name for each in found)


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # some that are written in C do not say
        return None


def base_of(policy: Policy) -> Policy:
    """Return the policy under all wrappers."""
    while isinstance(policy, Wrapper):
        policy = policy.base
    return policy


def with_budget(policy: Policy, budget: int | float) -> Policy:
    """Return a policy with another budget under all its wrappers; layers with budgets of their own keep them."""
    if not isinstance(policy, Wrapper):
        return replace(policy, budget=budget)
    held = {each.name: getattr(policy, each.name) for each in fields(policy) if each.init}
    changed = {name: _with_budget_in(value, budget) for name, value in held.items()}
    return replace(policy, **changed)


def _with_budget_in(value: Any, budget: int | float) -> Any:
    """Change the policies among a wrapper's fields."""
    if isinstance(value, tuple):
        return tuple(_with_budget_in(each, budget) for each in value)
    return with_budget(value, budget) if isinstance(value, Policy) else value
