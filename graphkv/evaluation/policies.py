"""Policies by name: ``snapkv``, ``snapkv+graphkv``, ``h2o(num_recent=32)+graphkv(neighbors=4)``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from ..adapters import (
    CAKE,
    H2O,
    SAGEKV,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    PyramidKV,
    Random,
    RoCo,
    SnapKV,
    StreamingLLM,
)
from ..adapters.attention import first_tokens
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.eviction import evict
from ..core.policy import GraphKV, LayerInputs, Policy, Wrapper
from ..core.types import Array
from ..integrations.transformers import EvictingCache

__all__ = ["BASES", "Sinks", "make_policy", "running_states"]

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
PART = re.compile(r"\s*([a-z0-9-]+)\s*(?:\((.*)\))?\s*")


@dataclass(frozen=True)
class Sinks(Wrapper):
    """Any policy, with the first tokens kept as well: for bases that have no sinks of their own.

    Parameters
    ----------
    base : Policy
    num_sinks : int
        First tokens, padding not counted, that are kept before all others.
    """

    num_sinks: int

    def num_protected(self, budget: int, /) -> int:
        """Count the sinks too."""
        return self.base.num_protected(budget) + self.num_sinks

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect the sinks too."""
        protected, sinks = self.base.protect(inputs), first_tokens(inputs.valid, self.num_sinks, xp=inputs.xp)
        return sinks if protected is None else protected | sinks

    def assess(self, inputs: LayerInputs, /) -> Any:
        """Let the base score."""
        return replace(self.base.assess(inputs), protected=self.protect(inputs))


def make_policy(name: str, budget: int | float, *, sinks: int | None = None, seed: int = 0) -> Policy | None:
    """Make the policy of a name; None for ``full``.

    Parameters
    ----------
    name : str
        ``full``, or a base with options in parentheses, and on top of it ``+graphkv`` with options, or
        ``+graphkv-paper``.
    budget : int or float
        Tokens to keep per KV head, or their share.
    sinks : int, optional
        First tokens to keep in any case. Default: what the base does by itself.
    seed : int
        Of the random policy.

    Raises
    ------
    ArgumentError
        If the name or an option is unknown.

    Examples
    --------
    >>> make_policy("snapkv(window=8)+graphkv(neighbors=4)", 512).neighbors
    4
    """
    if name == "full":
        return None
    base, plus, graph = name.partition("+")
    made = _make_base(base, name, budget, sinks, seed)
    if not plus:
        return made
    kind, options = _parse(graph, name)
    if kind not in GRAPHS:
        raise _unknown(name)
    result: Policy = _call(GRAPHS[kind], name, made, **options)
    return result


def _make_base(base: str, name: str, budget: int | float, sinks: int | None, seed: int) -> Policy:
    kind, options = _parse(base, name)
    if kind not in BASES:
        raise _unknown(name)
    if kind == "random":
        options = {"seed": seed} | options
    made: Policy = _call(BASES[kind], name, budget=budget, **options)
    if sinks is None:
        return made
    if hasattr(made, "num_sinks"):
        return cast("Policy", replace(cast("Any", made), num_sinks=sinks))
    return Sinks(made, sinks) if sinks else made


def _parse(part: str, name: str) -> tuple[str, dict[str, Any]]:
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


def _call(make: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
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
        f"--policy must be one of {known}, or one of them with +graphkv or +graphkv-paper; got {name!r}"
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
        One per layer.
    """
    states = []
    for number, layer in enumerate(cache.layers):
        num_new = layer.num_seen - (0 if before is None else next(iter(before[number].values())).shape[2])
        everything = evict(
            # A budget of everything: nothing is chosen, so the state is that of all tokens.
            replace(base, budget=layer.num_seen),
            layer.keys,
            queries=None if layer.queries is None else layer.queries[:, :, -num_new:],
            layer=number,
            num_layers=len(cache.layers),
            state=None if before is None else before[number],
        )
        states.append(everything.state or {})
    return states
