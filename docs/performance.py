"""Write the measured ratios into performance.md, from what ``make bench`` left in benchmarks/results*.json.

``python docs/performance.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from marked import renew

PAGE = Path(__file__).parent / "performance.md"
RESULTS = Path(__file__).parents[1] / "benchmarks"
TABLES = {"one thread": "results-1-thread.json", "two threads": "results.json"}


def cell(value: float | None, unit: str, digits: int = 1) -> str:
    """Render a number, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f} {unit}"


def target(row: dict[str, Any], text: str, met: str, busy: bool = False) -> str:
    """Render a target and whether it was met."""
    if not row[text]:
        return "-"
    return f"{row[text]}: {'not judged, machine busy' if busy else 'met' if row[met] else '**missed**'}"


def table(results: dict[str, Any]) -> str:
    """Render one file of results in Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    cores = int(results["machine"]["cpu"].split(" cores")[0].split()[-1])
    several = int(results["machine"]["threads"]) > 1
    lines = [
        f"{machine}.",
        "",
        "| measure | compared with | time | other | ratio | target | extra MB | other | target | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        cells = [
            row["name"] + (f" ({row['note']})" if row["note"] else ""),
            row["to"] or "-",
            cell(None if row["seconds"] is None else 1e3 * row["seconds"], "ms"),
            cell(None if row["seconds_to"] is None else 1e3 * row["seconds_to"], "ms"),
            cell(row["ratio"], row["unit"], 2),
            target(row, "target", "met", busy=several and row["load"] > cores + 1),
            cell(row["memory"], "MB", 0),
            cell(row["memory_to"], "MB", 0),
            target(row, "memory_target", "memory_met"),
            f"{row['load']:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the page, or check it."""
    results = {name: json.loads((RESULTS / file).read_text(encoding="utf-8")) for name, file in TABLES.items()}
    return renew(PAGE, {name: table(each) for name, each in results.items()})


if __name__ == "__main__":
    sys.exit(main())
