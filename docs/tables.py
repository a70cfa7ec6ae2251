"""Write what we measured into the pages that give advice, from the records in results/.

``python docs/tables.py`` rewrites the tables between their marks on the landing page and in the guide, ``--check`` only
says whether they are current. Either way, the sentences that give numbers must be those of the records.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from choice import RANKS
from claims import missing
from marked import renew
from reports import records

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, compare, summarize
from graphkv.naming.names import FULL

__all__ = ["main"]

DOCS = Path(__file__).parent
BASES = ("snapkv", "pyramidkv", "h2o", "knorm")
NEEDLE, TEXT = "needle", "continuation"
NAMES = {"snapkv": "SnapKV", "pyramidkv": "PyramidKV", "h2o": "H2O", "knorm": "KNorm", "keydiff": "KeyDiff"}
LENGTH = 2048
SHOWN = {
    "full": "the full cache",
    "snapkv": "SnapKV",
    "snapkv+graphkv": "SnapKV, the paper's graph",
    "snapkv+degree": "SnapKV, our degree",
    f"snapkv+{RANKS}": "SnapKV, our degree by rank",
    "pyramidkv+degree": "PyramidKV, our degree",
    "h2o+degree": "H2O, our degree",
    "keydiff": "KeyDiff",
    "knorm": "KNorm",
    "knorm+degree": "KNorm, our degree",
    "random": "random",
}
PARTS = {"known": (NEEDLE, "aware"), "unknown": (NEEDLE, "agnostic"), "text": (TEXT, "agnostic")}


def count(found: Iterable[Comparison], task: str) -> str:
    """Count the cells of a task that are better, open and worse."""
    seen = Counter(one.verdict for one in found if one.cell.task == task)
    return f"{seen['better']} / {seen['open']} / {seen['worse']}"


def story(read: Sequence[Record]) -> str:
    """Render the one table of what is what."""
    found = {name: compare(read, "nll", {f"{base}+{name}": base for base in BASES}) for name in ("graphkv", "degree")}
    ranks = compare(read, "nll", {f"{base}+{RANKS}": base for base in BASES})
    rows = [
        ("", "policy", "command line", "use it", "needles", "continuation"),
        ("---",) * 6,
        (
            "the base alone",
            "`SnapKV(budget=512)`",
            "`snapkv`",
            "to compare with; where each copy counts",
            "-",
            "-",
        ),
        (
            "recommended: ours, by rank",
            '`GraphKV(SnapKV(budget=512), Degree(fusion="max_rank"), unrotated=True)`',
            "`snapkv+degree(fusion=max_rank,unrotated=True)`",
            "to find facts in what was read",
            count(ranks, NEEDLE),
            count(ranks, TEXT),
        ),
        (
            "the paper's method",
            "`GraphKV(SnapKV(budget=512))`",
            "`snapkv+graphkv`",
            "to reproduce the paper",
            count(found["graphkv"], NEEDLE),
            count(found["graphkv"], TEXT),
        ),
        (
            "ours, as a power",
            "`GraphKV(SnapKV(budget=512), Degree())`",
            "`snapkv+degree`",
            "for prose, code, a conversation to go on with",
            count(found["degree"], NEEDLE),
            count(found["degree"], TEXT),
        ),
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def means(read: Sequence[Record], task: str, mode: str) -> str:
    """Render mean NLL by policy and budget at one length."""
    cells = summarize(read, "nll")
    found: Mapping[int, Mapping[str, float]] = {
        cell.budget: {name: one.mean for name, one in policies.items()}
        for cell, policies in cells.items()
        if (cell.task, cell.mode, cell.length) == (task, mode, LENGTH) and cell.budget is not None
    }
    budgets = sorted(found)
    best = {budget: min(found[budget][name] for name in SHOWN if name != "full") for budget in budgets}
    rows = [["", *(f"{budget} tokens" for budget in budgets)], ["---"] * (1 + len(budgets))]
    for name, shown in SHOWN.items():
        values = [
            f"**{found[budget][name]:.2f}**" if found[budget][name] == best[budget] else f"{found[budget][name]:.2f}"
            for budget in budgets
        ]
        rows.append([shown, *values])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def sentences(read: Sequence[Record]) -> dict[str, list[str]]:
    """Make what the pages say in numbers."""
    half, quarter, eighth = LENGTH // 2, LENGTH // 4, LENGTH // 8
    cells = {
        metric: {
            (cell.task, cell.mode, cell.budget): found
            for cell, found in summarize(read, metric).items()
            if cell.length == LENGTH
        }
        for metric in ("nll", "match")
    }

    def value(part: str, budget: int, policy: str, metric: str = "nll") -> float:
        return cells[metric][(*PARTS[part], budget)][policy].mean

    def above(part: str, budget: int, policy: str) -> str:
        return f"{value(part, budget, policy) - value(part, budget, 'full'):.1f}".removeprefix("0")

    def best(part: str, budget: int) -> str:
        found = cells["nll"][(*PARTS[part], budget)]
        return above(part, budget, min(found.keys() - {"full"}, key=lambda policy: found[policy].mean))

    def both(part: str, budget: int, degree: str = "", keydiff: str = "") -> str:
        return f"{value(part, budget, 'snapkv+degree'):.2f}{degree}, {value(part, budget, 'keydiff'):.2f}{keydiff}"

    named = (" (SnapKV with `Degree()`)", " (KeyDiff)")
    degree = compare(read, "nll", {f"{base}+degree": base for base in BASES})
    paper = compare(read, "nll", {f"{base}+graphkv": base for base in BASES})
    knorm = Counter(one.verdict for one in degree if one.baseline == "knorm")
    snapkv = Counter(
        one.verdict for one in degree if (one.baseline, one.cell.task, one.cell.mode) == ("snapkv", *PARTS["known"])
    )
    needles = Counter(one.verdict for one in paper if one.cell.task == NEEDLE)
    close = {
        policy.partition("+")[0]
        for policy in cells["nll"][(*PARTS["known"], quarter)].keys() - {"full"}
        if value("known", quarter, policy) - value("known", quarter, "full") < 1
    }
    exact = [100 * value("known", quarter, policy, "match") for policy in ("snapkv+degree", "full")]
    return {
        "guide/choose.md": [
            f"made SnapKV better in {snapkv['better']} of {snapkv.total()} cells and worse in none",
            f"made it better in {knorm['better']} of {knorm.total()} cells",
            f"At {eighth} of {LENGTH:,} tokens SnapKV is {above('text', eighth, 'snapkv')} above the full cache",
            f"the best is {best('known', half)} above the full cache with the question known, "
            f"and {best('unknown', half)} with the question unknown",
            f"At a quarter only {' and '.join(NAMES[name] for name in sorted(close))} are within a nat",
        ],
        "guide/documents.md": [
            f"at a quarter of {LENGTH:,} tokens, full cache {value('known', half, 'full'):.2f} "
            f"| {both('known', quarter, *named)} | {both('unknown', quarter, *named)} |",
            f"| and at half | {both('known', half)} | {both('unknown', half)} |",
        ],
        "guide/limits.md": [
            f"at a quarter of {LENGTH:,} tokens SnapKV with the degree gives {exact[0]:.0f} % of the needles exactly, "
            f"the full cache {exact[1]:.0f} %",
            f"of {needles.total()} cells of retrieval {needles['better']} better, {needles['worse']} worse",
        ],
    }


def main() -> int:
    """Rewrite the pages, or check them."""
    read = records("standard/records.jsonl.gz")
    # The full cache is in both runs.
    both = [*read, *(one for one in records("choice/ranks.jsonl.gz") if one.policy != FULL)]
    told = story(both)
    wrong = renew(DOCS / "index.md", {"story": told})
    tables = {name: means(both, *part) for name, part in PARTS.items()}
    wrong |= renew(DOCS / "guide" / "choose.md", {"story": told, **tables})
    for page, said in sentences(both).items():
        for sentence in missing((DOCS / page).read_text(encoding="utf-8"), said):
            print(f"{page} does not say what the records say: {sentence}")
            wrong = 1
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for numbers in (row.split(" | ")[-2:] for row in told.splitlines()[3:]):
        if not all(f" {number.removesuffix(' |')} " in readme for number in numbers):
            print(f"README.md does not have the row of {', '.join(numbers)}")
            wrong = 1
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
