"""Write the tables of results/systems.md and results/merging.md from the records beside them.

``python docs/systems.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
Either way, what results/merging.md says of its thresholds must be what the records say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import sqrt
from statistics import fmean

from claims import missing, signed
from marked import renew
from reports import RESULTS, records

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, compare
from graphkv.naming.names import FULL

PARTS = {
    "question known": ("needle", "aware"),
    "question unknown": ("needle", "agnostic"),
    "continuation": ("continuation", "agnostic"),
}
YARDSTICKS = ("snapkv", "keydiff", "random")
TUNED = ("snapkv", "snapkv+degree", "keydiff")
THRESHOLDS = {
    (threshold, weights): f"absorb(threshold={threshold},weights='{weights}')"
    for threshold, weights in product((0.85, 0.9, 0.95), ("attention", "count"))
}


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


def thresholds(read: Sequence[Record], base: str) -> str:
    """Render what `Absorb` changes over a base at every threshold, with standard errors."""
    parts = [[one.nll for one in read if one.policy == base and _part(one) == part] for part in PARTS.values()]
    lines = [[f"`{base}`", *PARTS], ["---"] * (1 + len(PARTS)), ["alone", *(f"{fmean(part):.2f}" for part in parts)]]
    for (threshold, weights), found in _changes(read, base).items():
        cells = [f"{_gain(found[part])} ± {_error(found[part]):.3f}" for part in PARTS.values()]
        lines.append([f"{threshold} by {weights}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def said_of_thresholds(read: Sequence[Record]) -> Iterator[str]:
    """Make the sentences in numbers that the page must hold."""
    found = [
        (base, *option, name, changes[part])
        for base in TUNED
        for option, changes in _changes(read, base).items()
        for name, part in PARTS.items()
    ]
    if not any(one.difference.mean > _error(one) for _, threshold, _, _, one in found if threshold == 0.95):
        yield "At .95 no cell is worse by more than its standard error, by either kind of weights"
    worst = max((one for one in found if one[0] != "keydiff"), key=lambda one: one[-1].difference.mean)
    yield f"most by {worst[2]} and at {_short(worst[1])}: up to {_short(worst[-1].difference.mean)}"
    losses = [one for one in found if one[-1].difference.mean > 2 * _error(one[-1])]
    for base, threshold, weights, name, one in losses:
        yield f"over `{base}` at {_short(threshold)} by {weights}, {name}: {_gain(one)} ± {_error(one):.3f}"
    if len(losses) == 1:
        yield "The one loss of more than two standard errors"


def _changes(read: Sequence[Record], base: str) -> dict[tuple[float, str], dict[tuple[str, str], Comparison]]:
    """Compare every threshold with its base: by part."""
    return {
        option: {(one.cell.task, one.cell.mode): one for one in compare(read, "nll", {f"{base}+{name}": base})}
        for option, name in THRESHOLDS.items()
    }


def _part(record: Record) -> tuple[str, str]:
    return record.task, record.mode


def _gain(found: Comparison) -> str:
    return signed(f"{found.difference.mean:+.3f}")


def _error(found: Comparison) -> float:
    return found.deviation / sqrt(found.difference.count)


def _short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")


def main() -> int:
    """Rewrite the pages, or check them."""
    systems = records("systems/records.jsonl.gz")
    merging = records("merging/records.jsonl.gz")
    against = {record.policy: "snapkv" for record in systems if record.policy not in (FULL, "snapkv")}
    merged = without_last_wrapper(list(dict.fromkeys(record.policy for record in merging)))
    outdated = renew(RESULTS / "systems.md", {"systems": table(systems, against, YARDSTICKS)})
    tuned, page = records("tuning/absorb.jsonl.gz"), RESULTS / "merging.md"
    tables = {"merging": table(merging, merged), **{f"absorb {base}": thresholds(tuned, base) for base in TUNED}}
    outdated |= renew(page, tables)
    for sentence in (unsaid := missing(page.read_text(encoding="utf-8"), said_of_thresholds(tuned))):
        print(f"{page.name} does not say what the records say: {sentence}")
    return int(bool(outdated) or bool(unsaid))


if __name__ == "__main__":
    sys.exit(main())
