"""Write the tables of results/decoding.md from the records and timings beside it.

``python docs/decoding.py`` rewrites the tables between their marks, ``--check`` only says whether they are current. The
page must say how many prompts there were.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from claims import missing, signed
from marked import renew
from reports import RESULTS, records
from systems import without_last_wrapper

from graphkv.evaluation.records import TIMINGS, Record, Timing, read_timings
from graphkv.evaluation.statistics import Interval, compare
from graphkv.naming.names import FULL, base_name

PAGE = RESULTS / "decoding.md"
# Runs whose answers are compared, each of one mode; and the one that is about time, of one answer after the other.
RUNS, SPEED = ("aware", "protected"), "speed"
HEAD = ("policy", "MB", "NLL", "over the full cache", "over random", "over its base")
HEAD_LINES = ("lines", "lines over its base", "whole")
SPEED_HEAD = ("policy", "tokens written", "tokens/s", "of the full cache's", "MB", "of the full cache's")


def answers(run: str) -> list[Record]:
    """Read the records of a mode: of one run, or of several that asked the same prompts of other policies.

    Every policy comes after its base.
    """
    places = sorted((RESULTS / "decoding").glob(f"{run}*/records.jsonl.gz"))
    # The full cache is in all of them.
    found = {one.key: one for place in places for one in records(place.relative_to(RESULTS).as_posix())}
    bases = list(dict.fromkeys(base_name(one.policy) for one in found.values()))
    return sorted(found.values(), key=lambda one: bases.index(base_name(one.policy)))


def timings(run: str) -> dict[str, Timing]:
    """Read timings that are stored compressed."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = (RESULTS / "decoding" / run / f"{TIMINGS}.gz").read_bytes()
        (Path(scratch) / TIMINGS).write_bytes(gzip.decompress(packed))
        return read_timings(scratch)


def table(read: Sequence[Record]) -> str:
    """Render a row per policy, over the prompts of all tasks: size, likelihood and right lines, with differences."""
    pooled = [replace(record, task="all") for record in read]
    names = list(dict.fromkeys(record.policy for record in read))
    over_full = _differences(pooled, "nll", {name: FULL for name in names if name != FULL})
    over_random = _differences(pooled, "nll", {name: "random" for name in names if name not in (FULL, "random")})
    bases = without_last_wrapper(names)
    over_base, lines_over_base = (_differences(pooled, metric, bases) for metric in ("nll", "score"))
    lines = [[*HEAD, *HEAD_LINES]]
    for name in names:
        own = [record for record in read if record.policy == name]
        lines.append([
            _shown(name),
            f"{_megabytes(own):.1f}",
            f"{fmean(record.nll for record in own):.2f}",
            over_full.get(name, "-"),
            over_random.get(name, "-") if name != FULL else "-",
            over_base.get(name, "-"),
            f"{fmean(record.score or 0 for record in own):.2f}",
            lines_over_base.get(name, "-"),
            f"{sum(record.match for record in own)} of {len(own)}",
        ])  # fmt: skip
    return _rows(lines)


def by_task(read: Sequence[Record]) -> str:
    """Render the share of right lines, and the likelihood, of every policy in every task."""
    tasks = list(dict.fromkeys(record.task for record in read))
    lines = [["policy", *(f"{task}: {what}" for task in tasks for what in ("lines", "NLL"))]]
    for name in dict.fromkeys(record.policy for record in read):
        row = [_shown(name)]
        for task in tasks:
            own = [record for record in read if (record.policy, record.task) == (name, task)]
            row += [f"{fmean(record.score or 0 for record in own):.2f}", f"{fmean(record.nll for record in own):.2f}"]
        lines.append(row)
    return _rows(lines)


def speeds(read: Sequence[Record], timed: Mapping[str, Timing]) -> str:
    """Render tokens per second and the most that keys and values took, alone and as shares of the full cache's."""
    by_name: dict[str, list[Record]] = {}
    for record in read:
        by_name.setdefault(record.policy, []).append(record)
    full = _speed([timed[record.key] for record in by_name[FULL]]), _megabytes(by_name[FULL])
    lines = [list(SPEED_HEAD)]
    for name, own in by_name.items():
        times = [timed[record.key] for record in own]
        speed, size = _speed(times), _megabytes(own)
        of_full = [f"{found / most:.2f}" for found, most in zip((speed, size), full, strict=True)]
        lines.append([
            _shown(name), f"{sum(each.tokens for each in times)}", f"{speed:.1f}", of_full[0], f"{size:.1f}", of_full[1]
        ])  # fmt: skip
    return _rows(lines)


def at(read: Iterable[Record], budget: int | float) -> list[Record]:
    """Select the full cache and what was evicted to a budget."""
    return [record for record in read if record.budget in (None, budget)]


def budgets(read: Iterable[Record]) -> list[int]:
    """List the budgets, ascending."""
    return sorted({int(record.budget) for record in read if record.budget is not None})


def _speed(times: Sequence[Timing]) -> float:
    return sum(each.tokens for each in times) / sum(each.seconds for each in times)


def _megabytes(read: Iterable[Record]) -> float:
    return max(record.cache_bytes or 0 for record in read) / 1e6


def _differences(read: Sequence[Record], metric: str, pairs: Mapping[str, str]) -> dict[str, str]:
    return {one.policy: _number(one.difference) for one in compare(read, metric, pairs)}


def _number(found: Interval) -> str:
    text = signed(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
    return f"**{text}**" if found.excludes_zero() else text


def _shown(name: str) -> str:
    return "the full cache" if name == FULL else f"`{name}`"


def _rows(lines: Sequence[Sequence[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _said(runs: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """Make the sentences in numbers that the page must hold."""
    for run, read in runs.items():
        prompts, sizes = len({record.prompt for record in read}), ", ".join(map(str, budgets(read)))
        yield f"`{run}`: {prompts} prompts of {len({record.task for record in read})} tasks, budgets of {sizes}"


def main() -> int:
    """Rewrite the page, or check it."""
    runs = {run: read for run in RUNS if (read := answers(run))}
    tables = {f"{run} {size}": table(at(read, size)) for run, read in runs.items() for size in budgets(read)}
    # One budget shows how tasks differ.
    tables |= {f"{run} by task": by_task(at(read, budgets(read)[-1])) for run, read in runs.items()}
    if (RESULTS / "decoding" / SPEED).is_dir():
        tables[SPEED] = speeds(records(f"decoding/{SPEED}/records.jsonl.gz"), timings(SPEED))
    outdated = renew(PAGE, tables)
    for sentence in (unsaid := missing(PAGE.read_text(encoding="utf-8"), _said(runs))):
        print(f"{PAGE.name} does not say what the records say: {sentence}")
    return int(outdated or bool(unsaid))


if __name__ == "__main__":
    sys.exit(main())
