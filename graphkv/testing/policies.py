"""One value of every policy that graphkv ships, for tests."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from ..core.graphkv import GraphKV
from ..core.policy import Policy
from ..core.signals import Degree

__all__ = ["shipped"]


def shipped(budget: int, /) -> dict[str, Policy]:
    """Return one value of every policy in graphkv's catalog, and GraphKV over every base.

    Parameters
    ----------
    budget : int
        Tokens to keep per row, of prompts of some tens of tokens in four layers.

    Returns
    -------
    dict of str to Policy
        Without `Given`, which holds arrays of one library.
    """
    # The kit imports nothing that it judges: the package has been imported by others, and is looked up.
    entries = [entry for entry in import_module("graphkv.adapters.catalog").ENTRIES if not entry.holds_arrays]
    bases: dict[str, Policy] = {
        entry.policy.__name__: entry.make(budget, **{**entry.small, "num_sinks": 1})
        for entry in entries
        if not entry.is_wrapper
    }
    wrappers: dict[str, Policy] = {
        f"{entry.policy.__name__}({base})": entry.make(bases[base], **entry.small)
        for entry in entries
        if entry.is_wrapper
        for base in ("SnapKV", "H2O")
    }
    # Half of an odd count is where a rounding shows.
    wrappers["AdaKV(SnapKV), code"] = replace(wrappers["AdaKV(SnapKV)"], floor=0.5, schedule="code")  # type: ignore[call-arg]
    graphs: dict[str, Policy] = {f"GraphKV({name}), decay": GraphKV(base) for name, base in bases.items()}
    for fusion in ("max_rank", "mean_rank"):
        graphs[f"GraphKV(SnapKV), {fusion}"] = GraphKV(bases["SnapKV"], Degree(fusion=fusion))
    return bases | wrappers | graphs
