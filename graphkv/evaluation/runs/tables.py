"""The tables of a run in the terminal: policies x budgets, and what the graph gains over its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from rich.console import Console
from rich.table import Table

from ...workbench.progress import print_table
from ..records import Record, Timing
from ..statistics import METRICS, Cell, Comparison, Interval, compare, gain_of, summarize

__all__ = ["print_speeds", "print_tables"]


def print_tables(records: Sequence[Record], console: Console, /) -> None:
    """Print NLL and score of every task, mode and length, and the gains of policies on top of others.

    Sizes too where caches did not keep what the budget says.
    """
    metrics = {"nll": "NLL per answer token", "score": "score"}
    if any(record.is_off_budget for record in records):
        metrics["tokens_kept"] = "tokens kept per KV head"
    for metric, title in metrics.items():
        gains = compare(records, metric) if metric != "tokens_kept" else []
        for where, table, gained in _tables(records, metric, gains):
            direction = "" if metric == "tokens_kept" else f" ({'higher' if METRICS[metric] else 'lower'} is better)"
            # Not as titles of tables, which fold to their width.
            _say(console, f"{where}: {title}{direction}, 95 % intervals")
            print_table(console, table)
            if gained.row_count:
                _say(console, "Gain over the base alone, prompt by prompt (above 0 is better)")
                print_table(console, gained)


def print_speeds(records: Sequence[Record], timings: Mapping[str, Timing], console: Console, /) -> None:
    """Print tokens per second and the most bytes stored, of the answers that a run evicted while it wrote them."""
    timed = [(record, timings[record.key]) for record in records if record.key in timings]
    if not timed:
        return
    cells = sorted({(record.mode, record.budget or 0) for record, _ in timed})
    table = Table()
    table.add_column("policy", no_wrap=True)
    for mode, budget in cells:
        table.add_column(f"{mode}, {f'budget {budget}' if budget else 'all'}", justify="right", no_wrap=True)
    for policy in dict.fromkeys(record.policy for record, _ in timed):
        row = []
        for cell in cells:
            found = [each for each in timed if (each[0].policy, (each[0].mode, each[0].budget or 0)) == (policy, cell)]
            seconds = sum(timing.seconds for _, timing in found)
            tokens = sum(timing.tokens for _, timing in found)
            most = max((record.cache_bytes or 0 for record, _ in found), default=0)
            row.append(f"{tokens / seconds:.1f} ({most / 1e6:.1f} MB)" if seconds else "")
        table.add_row(policy, *row)
    _say(console, "Tokens per second while answering, and the most that a cache took; rows of a batch share its time")
    print_table(console, table)


def _say(console: Console, text: str) -> None:
    console.print(f"\n{text}", highlight=False, markup=False, soft_wrap=True)


def _tables(records: Sequence[Record], metric: str, gains: Sequence[Comparison]) -> Iterable[tuple[str, Table, Table]]:
    """Make two tables per task, mode, length and number of sinks: means, and gains."""
    summary = summarize(records, metric)
    compared = {(found.cell, found.policy): found for found in gains}
    kinds = dict.fromkeys((cell.task, cell.mode, cell.length, cell.sinks) for cell in summary)
    for task, mode, length, sinks in kinds:
        cells = [
            cell for cell in summary if (cell.task, cell.mode, cell.length, cell.sinks) == (task, mode, length, sinks)
        ]
        cells.sort(key=lambda cell: cell.budget or 0)
        means, gained = _columns("policy", cells), _columns("policy", cells)
        for policy in summary[cells[0]]:
            means.add_row(policy, *(_shown(summary[cell].get(policy)) for cell in cells))
            found = [compared.get((cell, policy)) for cell in cells]
            if any(found):
                gained.add_row(policy, *map(_gain, found))
        yield f"{task}, {mode}, {length or 'any'} tokens, {sinks} sinks", means, gained


def _columns(first: str, cells: Sequence[Cell]) -> Table:
    """Make an empty table with a column for each budget."""
    table = Table()
    table.add_column(first, no_wrap=True)
    for cell in cells:
        table.add_column(f"budget {cell.budget}", justify="right", no_wrap=True)
    return table


def _shown(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" if found.count < 2 else f"{found.mean:.3f} ({found.low:.2f} to {found.high:.2f})"


def _gain(found: Comparison | None) -> str:
    """Write a gain with its interval, and in a word what it shows."""
    if found is None:
        return ""
    gain = gain_of(found)
    if not isfinite(gain.low):
        return f"{gain.mean:+.3f}"
    return f"{gain.mean:+.3f} ({gain.low:+.2f} to {gain.high:+.2f}) {found.verdict}"
