"""Write tables into performance.md: ratios that ``make bench`` left in benchmarks/results*.json, and what shapes save.

``python docs/performance.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marked import renew

PAGE = Path(__file__).parent / "performance.md"
RESULTS = Path(__file__).parents[1] / "benchmarks"
TABLES = {"one thread": "results-1-thread.json", "two threads": "results.json"}


# Bytes per second that a device reads: that of an A100 of 80 GB, rounded.
BANDWIDTH = 2e12
BUDGET = 2048
# Tokens of context, and prompts at a time.
CALLS = ((8192, 1), (32768, 1), (32768, 16), (131072, 1), (131072, 16))


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that has Llama 3's form, in two bytes per number."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int = 128_256

    @property
    def head_size(self) -> int:
        """Entries of a key."""
        return self.hidden // self.heads

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the table of the tokens that come in."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_heads * self.head_size
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return 2 * (self.layers * layer + self.hidden + self.vocabulary * self.hidden)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size * tokens


SHAPES = (
    Shape("1B", layers=16, hidden=2048, heads=32, kv_heads=8, inner=8192),
    Shape("8B", layers=32, hidden=4096, heads=32, kv_heads=8, inner=14336),
    Shape("70B", layers=80, hidden=8192, heads=64, kv_heads=8, inner=28672),
)


def savings() -> str:
    """Render what a budget saves of the cache, and how many tokens per second the bytes of a step allow."""
    lines = [
        f"| model | context | prompts | cache | of {BUDGET:,} tokens | saved | tokens per second | then | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        for tokens, batch in CALLS:
            whole, kept = (batch * shape.cache_bytes(each) for each in (tokens, BUDGET))
            speeds = [batch * BANDWIDTH / (shape.weight_bytes + each) for each in (whole, kept)]
            cells = [
                f"{shape.name}",
                f"{tokens:,}",
                f"{batch}",
                *(cell(each / 1e6, "MB", 0) for each in (whole, kept, whole - kept)),
                *(f"{each:,.0f}" for each in speeds),
                cell(speeds[1] / speeds[0], "x", 2),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    return renew(PAGE, {"savings": savings()} | {name: table(each) for name, each in results.items()})


if __name__ == "__main__":
    sys.exit(main())
