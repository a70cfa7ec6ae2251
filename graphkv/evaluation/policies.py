"""Policies by name: ``snapkv``, ``snapkv+graphkv``, ``h2o(num_recent=32)+degree(exponent=4)``, ``preset.toml``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    AdaKV,
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
from ..core.eviction import observe
from ..core.graphkv import GraphKV
from ..core.layer import Memory
from ..core.policy import Policy, Wrapper
from ..core.signals import Bar, Decay, Degree, Enhance, PageRank, Signal
from ..core.types import Array
from ..integrations.transformers import EvictingCache
from .names import parse
from .presets import SUFFIX, Preset, load_preset

__all__ = ["BASES", "WRAPPERS", "base_of", "call", "make_policy", "make_preset", "running_states"]

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
# ``+graphkv`` is ``GraphKV(base)``, with the options of the paper's signal.
SIGNALS: dict[str, type[Signal]] = {
    "graphkv": Decay,
    "enhance": Enhance,
    "bar": Bar,
    "degree": Degree,
    "pagerank": PageRank,
}


def _graph(signal: type[Signal], base: Policy, /, *, unrotated: bool = False, **options: Any) -> GraphKV:
    return GraphKV(base, signal(**options), unrotated)


WRAPPERS: dict[str, Callable[..., Policy]] = {
    **{name: partial(_graph, signal) for name, signal in SIGNALS.items()},
    "adakv": AdaKV,
    "caote": CAOTE,
}


def make_policy(name: str, budget: int | float, *, sinks: int | None = None, seed: int = 0) -> Policy | None:
    """Make the policy of a name; None for ``full``.

    Parameters
    ----------
    name : str
        ``full``; or a base with any number of wrappers, each with options in parentheses, see
        `graphkv.evaluation.names`; or the path of a preset, which ends in ``.toml``, see `graphkv.evaluation.presets`.
        Wrappers are ``+graphkv`` (the paper's setting), ``+enhance``, ``+bar``, ``+degree``, ``+pagerank``, with the
        options of their signal and ``unrotated``; ``+adakv`` and ``+caote``.
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
    >>> make_policy("snapkv(window=8)+graphkv(neighbors=4)", 512).signal.neighbors
    4
    """
    if name == "full":
        return None
    if name.endswith(SUFFIX):
        return make_preset(load_preset(Path(name)), budget, sinks=sinks, seed=seed, name=name)
    (kind, options), *wrappers = parse(name)
    if kind not in BASES or any(wrapper not in WRAPPERS for wrapper, _ in wrappers):
        raise ArgumentError(
            f"--policy must be one of {', '.join(['full', *BASES])}, all but full with any of "
            f"+{', +'.join(WRAPPERS)}, or a preset.toml; got {name!r}"
        )
    return _wrap(_make_base(kind, options, name, budget, sinks, seed), wrappers, name)


def _make_base(
    kind: str, options: Mapping[str, Any], name: str, budget: int | float, sinks: int | None, seed: int
) -> Policy:
    if kind == "random":
        options = {"seed": seed, **options}
    if sinks is not None:
        options = {"num_sinks": sinks, **options}
    made: Policy = call(BASES[kind], name, budget=budget, **options)
    return made


def _wrap(policy: Policy, wrappers: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> Policy:
    """Put wrappers on top, the innermost first."""
    for kind, options in wrappers:
        policy = call(WRAPPERS[kind], name, policy, **options)
    return policy


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
    if kind not in BASES or inner:
        raise ArgumentError(f"--policy {name}: base must be one of {', '.join(BASES)}; got {preset.base!r}")
    sinks = preset.sinks if sinks is None else sinks
    base = _make_base(kind, options, f"{name}, base", budget, sinks, seed)
    groups = []
    for number, wrapper in enumerate(preset.graph):
        wrappers = parse(wrapper) if wrapper else []
        if any(kind not in WRAPPERS for kind, _ in wrappers):
            raise ArgumentError(
                f"--policy {name}: graph[{number}] must be wrappers such as {', '.join(WRAPPERS)}, joined by +; "
                f"got {wrapper!r}"
            )
        groups.append(_wrap(base, wrappers, f"{name}, graph[{number}]"))
    policy = PerLayer(base, groups) if len(groups) > 1 else [base, *groups][-1]
    return LayerShares(policy, preset.layer_budgets) if preset.layer_budgets else policy


def call(make: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Make a policy, or say in an ArgumentError which of its options is wrong."""
    try:
        return make(*args, **options)
    except (ArgumentError, ArgumentTypeError) as error:
        raise ArgumentError(f"--policy {name}: {error}") from error
    except TypeError as error:
        # Python's own words name the option: unexpected keyword argument 'windows'.
        raise ArgumentError(f"--policy {name}: {str(error).split('() ', 1)[-1]}") from error


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
    for number, layer in enumerate(cache.attention_layers):
        if not layer.evicts:
            states.append({})
            continue
        num_new = layer.num_seen - (0 if before is None else next(iter(before[number].values())).shape[2])
        memory = observe(
            base,
            layer.keys,
            queries=None if layer.queries is None else layer.queries[:, :, -num_new:],
            layer=layer.index,
            num_layers=layer.num_layers,
            state=None if before is None else Memory(before[number]),
        )
        states.append({} if memory is None else memory.tokens)
    return states
