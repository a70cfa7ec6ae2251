"""Write the tables of results/choice.md from the records in results/choice, results/standard and results/tuning.

``python docs/choice.py`` rewrites the tables between their marks, ``--check`` only says whether they are current. The
page must say how many prompts there were.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from claims import missing
from marked import renew
from reports import RESULTS, records
from results import BASES as STANDARD
from results import PARTS, counts, number, part_of, rows, with_error

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, compare
from graphkv.naming.names import FULL

PAGE = RESULTS / "choice.md"
BUDGETS = (128, 256, 512)
RANKS = "degree(fusion='max_rank',unrotated=True)"
NEEDLES, TEXT = ("aware", "agnostic"), "continuation"
# What each policy is compared with on held-out prompts, beside KeyDiff.
BASES = {
    "snapkv+degree": "snapkv",
    f"snapkv+{RANKS}": "snapkv",
    "keydiff": "snapkv",
    "knorm": "snapkv",
    "random": "snapkv",
}
# On the tuning split of a second model.
SECOND = {
    "snapkv+degree": "snapkv",
    f"snapkv+{RANKS}": "snapkv",
    f"snapkv+chunkkv+{RANKS}": "snapkv",
    "keydiff": "snapkv",
}
RIVALS = ("snapkv", "snapkv+degree", f"snapkv+{RANKS}")


def table(read: Sequence[Record], pairs: Mapping[str, str], show: Callable[[Comparison], str]) -> str:
    """Show what policies change against their baselines, a row for each."""
    parts = [(part, size) for part in PARTS.values() for size in BUDGETS]
    body = []
    for policy, baseline in pairs.items():
        found = _cells(read, policy, baseline)
        body.append([f"`{policy}`", f"`{baseline}`", *(show(found[place]) for place in parts)])
    return rows(["policy", "against", *(f"{part}, {size}" for part, size in parts)], body)


def goals(read: Sequence[Record]) -> str:
    """Count at how many budgets the degree by rank over SnapKV reaches what was asked of it."""
    base, keydiff = (_cells(read, f"snapkv+{RANKS}", name) for name in ("snapkv", "keydiff"))
    body = []
    for asked, found in (("better than SnapKV", base), ("not worse than KeyDiff", keydiff)):
        for mode in NEEDLES:
            seen = Counter(found[mode, size].verdict for size in BUDGETS)
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(seen.items()))
            body.append([f"{mode}: {asked}", verdicts])
    within = [size for size in BUDGETS if base[TEXT, size].difference.mean <= 0.01]
    body.append(["continuation: at most .01 above SnapKV", f"at {', '.join(map(str, within)) or 'none'}"])
    return rows(["asked", f"found at budgets of {BUDGETS[0]}, {BUDGETS[1]} and {BUDGETS[2]}"], body)


def _cells(read: Sequence[Record], policy: str, baseline: str) -> dict[tuple[str, int | float | None], Comparison]:
    return {(part_of(one), one.cell.budget): one for one in compare(read, "nll", {policy: baseline})}


def held_out(standard: Sequence[Record]) -> list[Record]:
    """Join the records of the choice and those of the standard run about the same prompts."""
    new = records("choice/records.jsonl.gz")
    prompts = {record.prompt for record in new}
    # The full cache is in both runs.
    others = [one for one in standard if one.policy != FULL and one.prompt in prompts and one.budget in BUDGETS]
    return [*new, *others]


def standard_suite(standard: Sequence[Record]) -> str:
    """Count the cells of the standard suite in which ranks are better, open and worse."""
    read = [*records("choice/ranks.jsonl.gz"), *(one for one in standard if one.policy != FULL)]
    ours = {base: f"{base}+{RANKS}" for base in STANDARD}
    found = {
        "ranks over base": {name: base for base, name in ours.items()},
        "ranks over the power 8": {name: f"{base}+degree" for base, name in ours.items()},
        "ranks over KeyDiff": dict.fromkeys(ours.values(), "keydiff"),
    }
    return counts({kind: compare(read, "nll", pairs) for kind, pairs in found.items()})


def chunks(standard: Sequence[Record]) -> str:
    """Show what chunks under the ranks change, on the tuning split and on prompts that nothing was chosen by."""
    pairs = [(f"snapkv+chunkkv+{RANKS}", base) for base in ("snapkv", "snapkv+chunkkv", f"snapkv+{RANKS}")]
    pairs.append(("snapkv+chunkkv", "snapkv"))
    new = records("choice/chunks.jsonl.gz")
    prompts = {record.prompt for record in new}
    known = [*records("choice/ranks.jsonl.gz"), *standard]
    others = [one for one in known if one.policy != FULL and one.prompt in prompts and one.budget in BUDGETS]
    body = []
    for split, read in (("tuning", records("choice/chunks-tuning.jsonl.gz")), ("held-out", [*new, *others])):
        for policy, base in pairs:
            found = _cells(read, policy, base)
            cells = [found[part, size] for part in PARTS.values() for size in BUDGETS]
            body.append([split, f"`{policy}`", f"`{base}`", *map(with_error, cells)])
    return rows(
        ["split", "policy", "against", *(f"{part}, {size}" for part in PARTS.values() for size in BUDGETS)], body
    )


def main() -> int:
    """Rewrite the page, or check it."""
    standard = records("standard/records.jsonl.gz")
    held, mixed = held_out(standard), records("tuning/mixes.jsonl.gz")
    gemma = records("choice/gemma3.jsonl.gz")
    prompts = {record.prompt for record in held}
    mixes = dict.fromkeys(record.policy for record in mixed if record.policy not in (FULL, "snapkv"))
    tables = {
        "goals": goals(held),
        "mixes": table(mixed, dict.fromkeys(mixes, "snapkv"), with_error),
        "held-out": table(held, BASES, lambda one: number(one.difference)),
        "standard": standard_suite(standard),
        "chunks": chunks(standard),
        "tuning gemma3": table(records("choice/gemma3-tuning.jsonl.gz"), SECOND, with_error),
        "held-out gemma3": table(gemma, BASES, lambda one: number(one.difference)),
        "keydiff": table(held, dict.fromkeys(RIVALS, "keydiff"), lambda one: number(one.difference)),
    }
    outdated = renew(PAGE, tables)
    unsaid = missing(PAGE.read_text(encoding="utf-8"), [f"the first {len(prompts)} prompts of 1,024 tokens"])
    for sentence in unsaid:
        print(f"{PAGE.name} does not say what the records say: {sentence}")
    return int(outdated or bool(unsaid))


if __name__ == "__main__":
    sys.exit(main())
