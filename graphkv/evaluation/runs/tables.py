"""The tables of a run in the terminal: policies x budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from ..records import Record
from ..statistics import Interval, summarize

__all__ = ["print_tables"]


def print_tables(records: Sequence[Record], console: Console, /) -> None:
    """Print NLL and score of every task, mode and length; sizes too where caches did not keep what the budget says."""
    metrics = {"nll": "NLL per answer token", "score": "score"}
    if any(record.is_off_budget for record in records):
        metrics["tokens_kept"] = "tokens kept per KV head"
    for metric, title in metrics.items():
        for table in _tables(records, metric, title):
            console.print(table)


def _tables(records: Sequence[Record], metric: str, title: str) -> Iterable[Table]:
    """Make one table per task, mode, length and number of sinks."""
    summary = summarize(records, metric)
    kinds = dict.fromkeys((cell.task, cell.mode, cell.length, cell.sinks) for cell in summary)
    for task, mode, length, sinks in kinds:
        cells = [
            cell for cell in summary if (cell.task, cell.mode, cell.length, cell.sinks) == (task, mode, length, sinks)
        ]
        table = Table(
            title=f"{task}, {mode}, {length or 'any'} tokens, {sinks} sinks: {title} with 95 % intervals",
            title_justify="left",
        )
        table.add_column("policy", no_wrap=True)
        for cell in cells:
            table.add_column(str(cell.budget), justify="right", no_wrap=True)
        for policy in summary[cells[0]]:
            table.add_row(policy, *(_shown(summary[cell].get(policy)) for cell in cells))
        yield table


def _shown(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" if found.count < 2 else f"{found.mean:.3f} ({found.low:.2f} to {found.high:.2f})"
