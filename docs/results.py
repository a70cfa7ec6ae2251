"""Write the tables of results/index.md from the records that lie beside it.

``python docs/results.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections import Counter
from math import sqrt
from pathlib import Path

from marked import renew

from graphkv.evaluation.records import Record, read_records
from graphkv.evaluation.statistics import Comparison, Interval, compare

HERE = Path(__file__).parent / "results"
BASES = {"snapkv": "SnapKV", "pyramidkv": "PyramidKV", "h2o": "H2O", "knorm": "KNorm"}
PARTS = {("needle", "aware"): "aware", ("needle", "agnostic"): "agnostic", ("continuation", "agnostic"): "continuation"}
KINDS = {
    "degree over base": {f"{base}+degree": base for base in BASES},
    "paper's setting over base": {f"{base}+graphkv": base for base in BASES},
    "degree over KeyDiff": {f"{base}+degree": "keydiff" for base in BASES},
}
FUSIONS = {
    "exponent=8": "power 8",
    "exponent=12": "power 12",
    "exponent=16": "power 16",
    "exponent=32": "power 32",
    "exponent=4,unrotated=True": "power 4, unrotated",
    "exponent=8,unrotated=True": "power 8, unrotated",
    "exponent=16,unrotated=True": "power 16, unrotated",
    "exponent=32,unrotated=True": "power 32, unrotated",
    "fusion='max_rank'": "max_rank",
    "fusion='max_rank',unrotated=True": "max_rank, unrotated",
    "fusion='mean_rank',unrotated=True": "mean_rank, unrotated",
}


def records(packed: str) -> list[Record]:
    """Read records that are stored compressed."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "records.jsonl").write_bytes(gzip.decompress((HERE / packed).read_bytes()))
        return read_records(Path(scratch))


def part_of(found: Comparison) -> str:
    """Name the part of the results that a comparison belongs to."""
    return PARTS[found.cell.task, found.cell.mode]


def signed(text: str) -> str:
    """Give numbers true minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def number(found: Interval) -> str:
    """Render a mean with its interval, in bold where that excludes zero."""
    text = signed(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
    return f"**{text}**" if found.excludes_zero() else text


def rows(head: list[str], body: list[list[str]]) -> str:
    """Render a table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def counts(comparisons: dict[str, list[Comparison]]) -> str:
    """Count cells that are better, open and worse."""
    body = []
    for kind, found in comparisons.items():
        for base, name in BASES.items():
            body.append([kind, name])
            for part in PARTS.values():
                seen = Counter(one.verdict for one in found if one.policy.startswith(base) and part_of(one) == part)
                body[-1].append(f"{seen['better']} / {seen['open']} / {seen['worse']}")
    return rows(["", "base", *PARTS.values()], body)


def gains(comparisons: list[Comparison], part: str) -> str:
    """Show what the degree changes, cell by cell."""
    shown = {(one.cell.length, one.cell.budget, one.baseline): one for one in comparisons if part_of(one) == part}
    body = []
    for length, budget in sorted({key[:2] for key in shown}):
        found = [shown[length, budget, base].difference for base in BASES]
        body.append([str(length), str(budget), str(found[0].count), *map(number, found)])
    return rows(["length", "budget", "prompts", *BASES.values()], body)


def tuning(read: list[Record]) -> str:
    """Show what every fusion changes on the tuning split, with standard errors."""
    body = []
    for base, name in BASES.items():
        names = {f"{base}+degree({options})": fusion for options, fusion in FUSIONS.items()}
        for policy, fusion in {**names, "keydiff": "KeyDiff alone"}.items():
            found = {(part_of(one), one.cell.budget): one for one in compare(read, "nll", {policy: base})}
            if found:
                cells = [found[part, budget] for part in PARTS.values() for budget in (128, 256, 512)]
                errors = [one.deviation / sqrt(one.difference.count) for one in cells]
                means = [one.difference.mean for one in cells]
                body.append(
                    [name, fusion, *(signed(f"{x:+.2f}") + f" ± {e:.2f}" for x, e in zip(means, errors, strict=True))]
                )
    return rows(["base", "fusion", *(f"{part}, {size}" for part in PARTS.values() for size in (128, 256, 512))], body)


def main() -> int:
    """Rewrite the page, or check it."""
    read = records("standard/records.jsonl.gz")
    comparisons = {kind: compare(read, "nll", pairs) for kind, pairs in KINDS.items()}
    tables = {"counts": counts(comparisons)}
    tables |= {part: gains(comparisons["degree over base"], part) for part in PARTS.values()}
    tables |= {f"tuning {name}": tuning(records(f"tuning/{name}.jsonl.gz")) for name in ("smollm2", "gemma3")}
    return renew(HERE / "index.md", tables)


if __name__ == "__main__":
    sys.exit(main())
