"""Write the tables of results/choice.md from the records in results/tuning.

``python docs/choice.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from marked import renew
from reports import RESULTS, records
from results import PARTS, part_of, rows, with_error

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, compare
from graphkv.naming.names import FULL

PAGE = RESULTS / "choice.md"
BUDGETS = (128, 256, 512)


def table(read: Sequence[Record], pairs: Mapping[str, str], show: Callable[[Comparison], str]) -> str:
    """Show what policies change against their baselines, a row for each."""
    parts = [(part, size) for part in PARTS.values() for size in BUDGETS]
    body = []
    for policy, baseline in pairs.items():
        found = _cells(read, policy, baseline)
        body.append([f"`{policy}`", f"`{baseline}`", *(show(found[place]) for place in parts)])
    return rows(["policy", "against", *(f"{part}, {size}" for part, size in parts)], body)


def _cells(read: Sequence[Record], policy: str, baseline: str) -> dict[tuple[str, int | float | None], Comparison]:
    return {(part_of(one), one.cell.budget): one for one in compare(read, "nll", {policy: baseline})}


def main() -> int:
    """Rewrite the page, or check it."""
    mixed = records("tuning/mixes.jsonl.gz")
    mixes = dict.fromkeys(record.policy for record in mixed if record.policy not in (FULL, "snapkv"))
    return renew(PAGE, {"mixes": table(mixed, dict.fromkeys(mixes, "snapkv"), with_error)})


if __name__ == "__main__":
    sys.exit(main())
