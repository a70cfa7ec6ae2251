"""Policies by name: ``snapkv``, ``snapkv+graphkv``, ``h2o(num_recent=32)+graphkv(exponent=4)``, ``preset.toml``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters import (
    CAKE,
    H2O,
    SAGEKV,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    LayerShares,
    PerLayer,
    PyramidKV,
    Random,
    RoCo,
    SnapKV,
    StreamingLLM,
)
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.eviction import evict
from ..core.policy import GraphKV, Policy, Wrapper
from ..core.types import Array
from ..integrations.transformers import EvictingCache
from .presets import SUFFIX, Preset, load_preset

__all__ = ["BASES", "base_of", "call", "make_policy", "make_preset", "parse", "running_states"]

BASES: dict[str, Callable[..., Policy]] = {
    "random": Random,
    "streaming-llm": StreamingLLM,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "h2o": H2O,
    "tova": TOVA,
    "cake": CAKE,
    "roco": RoCo,
    "sagekv": SAGEKV,
    "expected-attention": ExpectedAttention,
    "knorm": KNorm,
    "keydiff": KeyDiff,
}
GRAPHS: dict[str, Callable[..., GraphKV]] = {"graphkv": GraphKV, "graphkv-paper": GraphKV.paper}
PART = re.compile(r"\s*([A-Za-z0-9-]+)\s*(?:\((.*)\))?\s*")


def make_policy(name: str, budget: int | float, *, sinks: int | None = None, seed: int = 0) -> Policy | None:
    """Make the policy of a name; None for ``full``.

    Parameters
    ----------
    name : str
        ``full``, or a base with options in parentheses, and on top of it ``+graphkv`` with options, or
        ``+graphkv-paper``; or the path of a preset, which ends in ``.toml``, see `graphkv.evaluation.presets`.
    budget : int or float
        Tokens to keep per KV head, or their share.
    sinks : int, optional
        First tokens to keep in any case. Default: what the base does by itself.
    seed : int
        Of the random policy.

    Raises
    ------
    ArgumentError
        If the name or an option is unknown, or a preset is none.

    Examples
    --------
    >>> make_policy("snapkv(window=8)+graphkv(signal='decay', neighbors=4)", 512).neighbors
    4
    """
    if name == "full":
        return None
    if name.endswith(SUFFIX):
        return make_preset(load_preset(Path(name)), budget, sinks=sinks, seed=seed, name=name)
    base, plus, graph = name.partition("+")
    made = _make_base(base, name, budget, sinks, seed)
    if not plus:
        return made
    kind, options = parse(graph, name)
    if kind not in GRAPHS:
        raise _unknown(name)
    result: Policy = call(GRAPHS[kind], name, made, **options)
    return result


def _make_base(base: str, name: str, budget: int | float, sinks: int | None, seed: int) -> Policy:
    kind, options = parse(base, name)
    return _call_base(kind, options, name, budget, sinks, seed)


def _call_base(
    kind: str, options: dict[str, Any], name: str, budget: int | float, sinks: int | None, seed: int
) -> Policy:
    if kind not in BASES:
        raise _unknown(name)
    if kind == "random":
        options = {"seed": seed} | options
    if sinks is not None:
        options = {"num_sinks": sinks} | options
    made: Policy = call(BASES[kind], name, budget=budget, **options)
    return made


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
        If the base or an option is unknown or wrong.
    """
    if preset.base not in BASES:
        raise ArgumentError(f"--policy {name}: base must be one of {', '.join(BASES)}; got {preset.base!r}")
    sinks = preset.sinks if sinks is None else sinks
    policy = base = _call_base(preset.base, dict(preset.options), f"{name}, options", budget, sinks, seed)
    graphs = [call(GraphKV, f"{name}, graph[{number}]", base, **each) for number, each in enumerate(preset.graph)]
    if graphs:
        policy = graphs[0] if len(graphs) == 1 else PerLayer(base, graphs)
    return LayerShares(policy, preset.layer_budgets) if preset.layer_budgets else policy


def parse(part: str, name: str) -> tuple[str, dict[str, Any]]:
    """Take ``snapkv(window=8, pooling=max)`` apart."""
    match = PART.fullmatch(part)
    if match is None:
        raise _unknown(name)
    options = {}
    for option in filter(None, (match[2] or "").split(",")):
        key, equals, value = (word.strip() for word in option.partition("="))
        if not (equals and key and value):
            raise ArgumentError(f"--policy must have options like window=8 in its parentheses; got {name!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return match[1], options


def call(make: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Make a policy, or say in an ArgumentError which of its options is wrong."""
    try:
        return make(*args, **options)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"--policy {name}: {error}") from error
    except TypeError as error:
        # Python's own words name the option: unexpected keyword argument 'windows'.
        raise ArgumentError(f"--policy {name}: {str(error).split('() ', 1)[-1]}") from error


def _unknown(name: str) -> ArgumentError:
    known = ", ".join(["full", *BASES])
    return ArgumentError(
        f"--policy must be one of {known}, or one of them with +graphkv or +graphkv-paper, or a preset.toml; "
        f"got {name!r}"
    )


def base_of(policy: Policy) -> Policy:
    """Give the policy under all wrappers."""
    while isinstance(policy, Wrapper):
        policy = policy.base
    return policy


def running_states(
    base: Policy, cache: EvictingCache, before: Sequence[Mapping[str, Array]] | None = None
) -> list[Mapping[str, Array]]:
    """Work out what a policy with running sums knows after the prompt, once for all budgets.

    Parameters
    ----------
    base : Policy
        One that needs a state.
    cache : EvictingCache
        Not evicted, with the queries of all positions, or of those after `before`.
    before : sequence of mapping, optional
        What it knew after the first part of the prompt.

    Returns
    -------
    list of mapping
        One per layer; empty where a sliding layer of a model that has others too is left alone.
    """
    states: list[Mapping[str, Array]] = []
    for number, layer in enumerate(cache.evicting_layers):
        if not layer.evicts:
            states.append({})
            continue
        num_new = layer.num_seen - (0 if before is None else next(iter(before[number].values())).shape[2])
        everything = evict(
            # A budget of everything: nothing is chosen, so the state is that of all tokens.
            replace(base, budget=layer.num_seen),
            layer.keys,
            queries=None if layer.queries is None else layer.queries[:, :, -num_new:],
            layer=layer.index,
            num_layers=layer.num_layers,
            state=None if before is None else before[number],
        )
        states.append(everything.state or {})
    return states
