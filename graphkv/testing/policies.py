"""Policies for tests: one whose importance is handed in, and one value of each that graphkv ships."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from ..core.graphkv import GraphKV
from ..core.policy import LayerInputs, Policy, Wrapper
from ..core.signals import Degree
from ..core.types import Array

__all__ = ["GivenImportance", "shipped"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImportance(Policy):
    """Rank by an importance that is known beforehand, so that a test can say what must come out.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per row.
    importance : array, shape (batch, kv_heads, N)
        What `score` gives.
    protected : array, shape (batch, kv_heads, N), bool, optional
        What `protect` gives.
    protected_count : int
        What `num_protected` gives.
    """

    importance: Array
    protected: Array | None = None
    protected_count: int = 0

    def score(self, inputs: LayerInputs, /) -> Array:
        """Give the importance."""
        return self.importance

    def protect(self, inputs: LayerInputs, /) -> Array | None:
        """Give the mask."""
        return self.protected

    def num_protected(self, budget: int, /) -> int:
        """Give the count."""
        return self.protected_count


# For prompts of some tens of tokens and four layers. A field that no policy of the table has stays at its default.
SMALL = {"window": 4, "kernel_size": 3, "num_sinks": 1, "num_recent": 2}
# Arguments without a default, other than budget and base.
NEEDED: dict[str, dict[str, Any]] = {
    "LayerBudgets": {"budgets": (9, 12, 14, 13)},
    "LayerShares": {"shares": (1, 2, 2, 1)},
}


def shipped(budget: int, /) -> dict[str, Policy]:
    """Give one value of every policy among graphkv's public names, and GraphKV over every base.

    A new policy is found by itself, unless it needs an argument beside budget and base: then it belongs in `NEEDED`.

    Parameters
    ----------
    budget : int
        Tokens to keep per row.

    Returns
    -------
    dict of str to Policy
    """
    import graphkv  # noqa: PLC0415 - the package imports this one's neighbors

    public = {name: getattr(graphkv, name) for name in graphkv.__all__}
    kinds = {name: kind for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, Policy)}
    concrete = {name: kind for name, kind in kinds.items() if not inspect.isabstract(kind) and kind is not Wrapper}
    bases = {
        name: kind(budget=budget, **_small(kind), **NEEDED.get(name, {}))
        for name, kind in concrete.items()
        if not issubclass(kind, Wrapper)
    }
    snapkv = bases["SnapKV"]
    NEEDED["PerLayer"] = {"policies": (snapkv, GraphKV(snapkv))}
    wrappers = {
        f"{name}({base})": kind(bases[base], **NEEDED.get(name, {}))
        for name, kind in concrete.items()
        if issubclass(kind, Wrapper)
        for base in ("SnapKV", "H2O")
        if name != "PerLayer" or base == "SnapKV"
    }
    # Half of an odd count is where a rounding shows.
    half: dict[str, Any] = {"floor": 0.5, "schedule": "code"}
    graphs: dict[str, Policy] = {"AdaKV(SnapKV), code": public["AdaKV"](snapkv, **half)}
    for name, base in bases.items():
        graphs[f"GraphKV({name}), decay"] = GraphKV(base)
    for fusion in ("max_rank", "mean_rank"):
        graphs[f"GraphKV(SnapKV), {fusion}"] = GraphKV(snapkv, Degree(fusion=fusion))
    return bases | wrappers | graphs


def _small(kind: type[Policy], /) -> dict[str, Any]:
    return {each.name: SMALL[each.name] for each in fields(kind) if each.name in SMALL}
