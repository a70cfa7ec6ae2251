"""Make the results from the records in results/: the tables and figures of its page, and the full reports.

``python docs/results.py`` rewrites the tables between their marks, the page's figures and the digests of the reports;
``--check`` only says whether they are current. Either way, the page's prose must give the numbers of the records.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from math import sqrt

from claims import claims, missing, signed
from marked import renew
from reports import RESULTS, VERSIONS, build, records

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, Interval, compare
from graphkv.naming.names import base_name

PAGE = RESULTS / "index.md"
DIGESTS = RESULTS / "reports.sha256"
BASES = {"snapkv": "SnapKV", "pyramidkv": "PyramidKV", "h2o": "H2O", "knorm": "KNorm"}
PARTS = {("needle", "aware"): "aware", ("needle", "agnostic"): "agnostic", ("continuation", "agnostic"): "continuation"}
# The figures of the page: what the caption in the report of the standard run says.
FIGURES = {part: f"{task}, query-{mode}, prompts of 2048 tokens" for (task, mode), part in PARTS.items()}
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


def part_of(found: Comparison) -> str:
    """Name the part of the results that a comparison belongs to."""
    return PARTS[found.cell.task, found.cell.mode]


def number(found: Interval) -> str:
    """Render a mean with its interval, in bold where that excludes zero."""
    text = signed(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
    return f"**{text}**" if found.excludes_zero() else text


def with_error(found: Comparison) -> str:
    """Render a mean with its standard error."""
    return signed(f"{found.difference.mean:+.2f}") + f" ± {found.deviation / sqrt(found.difference.count):.2f}"


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
                seen = Counter(one.verdict for one in found if base_name(one.policy) == base and part_of(one) == part)
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
                body.append([name, fusion, *map(with_error, cells)])
    return rows(["base", "fusion", *(f"{part}, {size}" for part in PARTS.values() for size in (128, 256, 512))], body)


def figures() -> dict[str, bytes]:
    """Select the figures that the page shows from the full report."""
    report = (RESULTS / "standard" / "report.md").read_text(encoding="utf-8")
    found = {}
    for name, where in FIGURES.items():
        (path,) = re.findall(rf"^!\[Gain in NLL [^\]]*: {re.escape(where)}\]\((.*)\)$", report, re.MULTILINE)
        found[f"{name}.svg"] = (RESULTS / "standard" / path).read_bytes()
    # The report begins with the figure that answers what it is for, and so does the page.
    first = re.findall(r"^!\[.* against budget: needle, .*\]\((.*)\)$", report, re.MULTILINE)[0]
    found["answer.svg"] = (RESULTS / "standard" / first).read_bytes()
    return found


def keep(digests: dict[str, str], shown: dict[str, bytes]) -> list[str]:
    """Write the digests of the reports and the figures of the page; with ``--check``, name what differs."""
    made_with, kept = f"# {VERSIONS}\n", DIGESTS.read_text(encoding="utf-8") if DIGESTS.is_file() else ""
    current = made_with + "".join(f"{digest}  {path}\n" for path, digest in digests.items())
    if "--check" not in sys.argv:
        DIGESTS.write_text(current, encoding="utf-8")
        for name, content in shown.items():
            (RESULTS / name).write_bytes(content)
        return []
    if not kept.startswith(made_with):
        # Other versions round and draw otherwise, and nothing is wrong with that.
        print(f"The reports are not compared: {DIGESTS.name} is of {kept.partition(chr(10))[0]}, here is {VERSIONS}")
        return []
    wrong = sorted({line.split()[-1] for line in set(current.splitlines()) ^ set(kept.splitlines())})
    return wrong + [name for name, content in shown.items() if (RESULTS / name).read_bytes() != content]


def main() -> int:
    """Rewrite the page, or check it."""
    read = records("standard/records.jsonl.gz")
    comparisons = {kind: compare(read, "nll", pairs) for kind, pairs in KINDS.items()}
    tuned = {name: records(f"tuning/{name}.jsonl.gz") for name in ("smollm2", "gemma3")}
    tables = {"counts": counts(comparisons)}
    tables |= {part: gains(comparisons["degree over base"], part) for part in PARTS.values()}
    tables |= {f"tuning {name}": tuning(each) for name, each in tuned.items()}
    outdated = renew(PAGE, tables)
    if wrong := keep(build(), figures()):
        print(f"The records make other files than {DIGESTS.name} has digests of: {', '.join(wrong)}")
    said = claims(read, comparisons, records("baselines/records.jsonl.gz"), tuned)
    for sentence in (unsaid := missing(PAGE.read_text(encoding="utf-8"), said)):
        print(f"{PAGE.name} does not say what the records say: {sentence}")
    return int(outdated or bool(wrong) or bool(unsaid))


if __name__ == "__main__":
    sys.exit(main())
