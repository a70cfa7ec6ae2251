"""Write the tables of results/systems.md and results/merging.md from the records beside them.

``python docs/systems.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import fmean

from claims import signed
from marked import renew
from reports import RESULTS, records

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import compare
from graphkv.naming.names import FULL

PARTS = {
    "question known": ("needle", "aware"),
    "question unknown": ("needle", "agnostic"),
    "continuation": ("continuation", "agnostic"),
}
YARDSTICKS = ("snapkv", "keydiff", "random")


def table(read: Sequence[Record], pairs: Mapping[str, str], first: Sequence[str] = (), *, full: bool = True) -> str:
    """Render a row per policy: what it stored, its NLL, and the difference from its baseline with its interval.

    Parameters
    ----------
    read : sequence of Record
        Of one length and one number of sinks; policies of one budget each.
    pairs : mapping of str to str
        Policy to baseline; policies without one show their NLL alone.
    first : sequence of str
        Policies to begin with; the others follow in the order of the run.
    full : bool
        Whether to show the full cache.
    """
    names = dict.fromkeys([*([FULL] if full else []), *first, *(record.policy for record in read)])
    found = {}
    for policy, baseline in pairs.items():
        for one in compare(_as_one_budget(read), "nll", {policy: baseline}):
            found[policy, one.cell.task, one.cell.mode] = one.difference
    lines = [["policy", "tokens", "MB", *PARTS], ["---"] * (3 + len(PARTS))]
    for name in names:
        own = [record for record in read if record.policy == name]
        kept = [record.tokens_kept for record in own if record.tokens_kept is not None]
        size = [record.cache_bytes for record in own if record.cache_bytes is not None]
        row = [f"`{name}`" if name != FULL else "the full cache", _mean(kept, "{:.0f}")]
        row.append(_mean([each / 1e6 for each in size], "{:.2f}"))
        for task, mode in PARTS.values():
            values = [record.nll for record in own if (record.task, record.mode) == (task, mode)]
            cell, gap = _mean(values, "{:.2f}"), found.get((name, task, mode))
            if gap is not None and values:
                text = signed(f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]")
                cell += f"; **{text}**" if gap.excludes_zero() else f"; {text}"
            row.append(cell)
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(fmean(values)) if values else "-"


def _as_one_budget(read: Sequence[Record]) -> list[Record]:
    """Put all policies into one cell: budgets of automatic policies and of tiers are their own."""
    return [
        Record(**{**vars(record), "budget": None if record.policy == FULL else 0, "sinks": record.sinks and 0})
        for record in read
    ]


def without_last_wrapper(names: Sequence[str]) -> dict[str, str]:
    """Pair every policy of several parts with the one below its last wrapper, if that was measured too."""
    pairs = {name: name.rpartition("+")[0] for name in names if "+" in name}
    return {name: base for name, base in pairs.items() if base in names}


def main() -> int:
    """Rewrite the pages, or check them."""
    systems = records("systems/records.jsonl.gz")
    merging = records("merging/records.jsonl.gz")
    against = {record.policy: "snapkv" for record in systems if record.policy not in (FULL, "snapkv")}
    merged = without_last_wrapper(list(dict.fromkeys(record.policy for record in merging)))
    outdated = renew(RESULTS / "systems.md", {"systems": table(systems, against, YARDSTICKS)})
    return outdated | renew(RESULTS / "merging.md", {"merging": table(merging, merged)})


if __name__ == "__main__":
    sys.exit(main())
