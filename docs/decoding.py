"""Write the tables of results/decoding.md from the records and timings beside it.

``python docs/decoding.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from claims import signed
from marked import renew
from reports import RESULTS, records
from systems import without_last_wrapper

from graphkv.evaluation.records import TIMINGS, Record, Timing, read_timings
from graphkv.evaluation.statistics import Interval, compare
from graphkv.naming.names import FULL

HEAD = ["policy", "tokens", "MB", "tokens/s", "NLL", "over the full cache", "over its base", "lines", "whole"]


def timings() -> dict[str, Timing]:
    """Read timings that are stored compressed."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = (RESULTS / "decoding" / f"{TIMINGS}.gz").read_bytes()
        (Path(scratch) / TIMINGS).write_bytes(gzip.decompress(packed))
        return read_timings(scratch)


def table(read: Sequence[Record], timed: Mapping[str, Timing]) -> str:
    """Render a row per policy, over the prompts of all tasks: sizes, speed, likelihood with differences, and lines."""
    pooled = [replace(record, task="all") for record in read]
    names = list(dict.fromkeys(record.policy for record in read))
    over_full = _differences(pooled, {name: FULL for name in names if name != FULL})
    over_base = _differences(pooled, without_last_wrapper(names))
    lines = [HEAD, ["---"] * len(HEAD)]
    for name in names:
        own = [record for record in read if record.policy == name]
        times = [timed[record.key] for record in own]
        lines.append([
            "the full cache" if name == FULL else f"`{name}`",
            f"{fmean(record.tokens_kept or 0 for record in own):.0f}",
            f"{max(record.cache_bytes or 0 for record in own) / 1e6:.1f}",
            f"{_speed(times):.1f}" + ", alone" * (name == FULL),
            f"{fmean(record.nll for record in own):.2f}",
            over_full.get(name, "-"),
            over_base.get(name, "-"),
            f"{fmean(record.score or 0 for record in own):.2f}",
            f"{sum(record.match for record in own)} of {len(own)}",
        ])  # fmt: skip
    return _rows(lines)


def by_task(read: Sequence[Record]) -> str:
    """Render the share of right lines, and the likelihood, of every policy in every task."""
    tasks = list(dict.fromkeys(record.task for record in read))
    lines = [["policy", *(f"{task}: {what}" for task in tasks for what in ("lines", "NLL"))]]
    lines.append(["---"] * len(lines[0]))
    for name in dict.fromkeys(record.policy for record in read):
        row = ["the full cache" if name == FULL else f"`{name}`"]
        for task in tasks:
            own = [record for record in read if (record.policy, record.task) == (name, task)]
            row += [f"{fmean(record.score or 0 for record in own):.2f}", f"{fmean(record.nll for record in own):.2f}"]
        lines.append(row)
    return _rows(lines)


def _speed(times: Sequence[Timing]) -> float:
    return sum(each.tokens for each in times) / sum(each.seconds for each in times)


def _differences(read: Sequence[Record], pairs: Mapping[str, str]) -> dict[str, str]:
    return {one.policy: _number(one.difference) for one in compare(read, "nll", pairs)}


def _number(found: Interval) -> str:
    text = signed(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]")
    return f"**{text}**" if found.excludes_zero() else text


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Rewrite the page, or check it."""
    read = records("decoding/records.jsonl.gz")
    return renew(RESULTS / "decoding.md", {"decoding": table(read, timings()), "by task": by_task(read)})


if __name__ == "__main__":
    sys.exit(main())
