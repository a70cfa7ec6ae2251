"""One value of every policy that graphkv ships, for tests."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from ..core.graphkv import GraphKV
from ..core.policy import Policy, Wrapper
from ..core.signals import Degree

__all__ = ["shipped"]


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
    # `Given` holds arrays, which are of one library and of one layer.
    abstract = {"Given", *(name for name, kind in kinds.items() if inspect.isabstract(kind) or kind is Wrapper)}
    concrete = {name: kind for name, kind in kinds.items() if name not in abstract}
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
