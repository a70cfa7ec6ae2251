"""The list of all names: what a policy is, what it needs, and where it is from."""

from __future__ import annotations

from typing import NamedTuple

from ..adapters.catalog import ENTRIES
from ..core.policy import Requirements
from .names import FULL
from .policies import SIGNALS

__all__ = ["Line", "list_policies", "policy_names"]


class Line(NamedTuple):
    """What the list says of one name."""

    name: str
    paper: str
    needs: str
    what: str


def list_policies() -> list[Line]:
    """List every base and wrapper that has a name.

    Returns
    -------
    list of Line
        The bases first; names of wrappers begin with ``+``. A policy without a paper has ``-`` in its place.

    Examples
    --------
    >>> list_policies()[1]
    Line(name='snapkv', paper='2404.14469', needs='keys, queries', what='attention from the window, pooled; ≥ 0')
    """
    lines = [Line(FULL, "-", "nothing", "the whole cache, to compare with")]
    wrappers: list[Line] = []
    for entry in ENTRIES:
        if not entry.name:
            continue
        what = entry.importance.replace("`", "")
        if entry.name in SIGNALS:
            continue
        line = Line(entry.name, entry.paper or "-", _needs(entry.policy.requirements, entry.is_wrapper), what)
        (wrappers if entry.is_wrapper else lines).append(line._replace(name="+" * entry.is_wrapper + line.name))
    for name, signal in SIGNALS.items():
        what = (signal.__doc__ or "").strip().splitlines()[0].replace("`", "")
        lines.append(Line(f"+{name}", "2509.00388" if name == "graphkv" else "-", "as its base", what))
    return lines + wrappers


def policy_names(incomplete: str = "") -> list[str]:
    """List the names that a beginning can become: bases, and after a ``+`` the wrappers.

    Parameters
    ----------
    incomplete : str

    Examples
    --------
    >>> policy_names("snap"), policy_names("h2o+pa")
    (['snapkv'], ['h2o+pagerank'])
    """
    base, plus, rest = incomplete.rpartition("+")
    names = [line.name.lstrip("+") for line in list_policies() if line.name.startswith("+") == bool(plus)]
    return [base + plus + name for name in names if name.startswith(rest)]


def _needs(own: Requirements, is_wrapper: bool) -> str:
    """Name what a policy reads, in the order of the arguments of `evict`."""
    found = ["as its base" if is_wrapper else "keys"]
    found += ["values"] * own.values
    if own.queries != "none":
        found.append("all queries" if own.queries in ("all", "new") else "queries")
    found += ["running sums"] * bool(own.state) + ["all layers"] * own.wants
    return ", ".join(found)
