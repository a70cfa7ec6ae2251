"""Write the tables of index.md from the records of the standard suite, which lie beside it.

``python docs/results/tables.py`` rewrites the tables between their marks, ``--check`` only says if they are current.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from graphkv.evaluation.records import Record, read_records
from graphkv.evaluation.statistics import Comparison, Interval, compare

HERE = Path(__file__).parent
PAGE, RUN = HERE / "index.md", HERE / "standard"
BASES = {"snapkv": "SnapKV", "pyramidkv": "PyramidKV", "h2o": "H2O", "knorm": "KNorm"}
PARTS = {("needle", "aware"): "aware", ("needle", "agnostic"): "agnostic", ("continuation", "agnostic"): "continuation"}
KINDS = {
    "default over base": {f"{base}+graphkv": base for base in BASES},
    "paper's setting over base": {f"{base}+graphkv-paper": base for base in BASES},
    "default over KeyDiff": {f"{base}+graphkv": "keydiff" for base in BASES},
}


def records() -> list[Record]:
    """Read the records, which are stored compressed."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(RUN / "run.json", scratch)
        with gzip.open(RUN / "records.jsonl.gz") as packed, (Path(scratch) / "records.jsonl").open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        return read_records(Path(scratch))


def part_of(found: Comparison) -> str:
    """Name the part of the results that a comparison belongs to."""
    return PARTS[found.cell.task, found.cell.mode]


def number(found: Interval) -> str:
    """Render a mean with its interval, in bold where that excludes zero."""
    text = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if found.excludes_zero() else text


def counts(comparisons: dict[str, list[Comparison]]) -> str:
    """Count cells that are better, open and worse."""
    lines = ["| | base | " + " | ".join(PARTS.values()) + " |", "| --- " * (2 + len(PARTS)) + "|"]
    for kind, found in comparisons.items():
        for base, name in BASES.items():
            cells = []
            for part in PARTS.values():
                seen = Counter(one.verdict for one in found if one.policy.startswith(base) and part_of(one) == part)
                cells.append(f"{seen['better']} / {seen['open']} / {seen['worse']}")
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gains(comparisons: list[Comparison], part: str) -> str:
    """Show what the default changes, cell by cell."""
    shown = {(one.cell.length, one.cell.budget, one.baseline): one for one in comparisons if part_of(one) == part}
    lines = ["| length | budget | prompts | " + " | ".join(BASES.values()) + " |", "| --- " * (3 + len(BASES)) + "|"]
    for length, budget in sorted({key[:2] for key in shown}):
        row = [shown[length, budget, base].difference for base in BASES]
        lines.append(f"| {length} | {budget} | {row[0].count} | " + " | ".join(map(number, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the page, or check it."""
    text = current = PAGE.read_text(encoding="utf-8")
    read = records()
    comparisons = {kind: compare(read, "nll", pairs) for kind, pairs in KINDS.items()}
    tables = {"counts": counts(comparisons)}
    tables |= {part: gains(comparisons["default over base"], part) for part in PARTS.values()}
    for name, table in tables.items():
        head, rest = current.split(f"% {name}: begin\n")
        _, tail = rest.split(f"\n% {name}: end")
        current = f"{head}% {name}: begin\n\n{table}\n% {name}: end{tail}"
    if "--check" not in sys.argv:
        PAGE.write_text(current, encoding="utf-8")
        return 0
    if current != text:
        print(f"{PAGE.name} is not current: run python docs/results/tables.py")
    return int(current != text)


if __name__ == "__main__":
    sys.exit(main())
