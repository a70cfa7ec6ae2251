"""Consoles and progress displays of the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

__all__ = ["count_through", "show_steps", "silence_transformers", "table_console"]


def silence_transformers() -> None:
    """Turn off transformers' own messages and progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table_console() -> Console:
    """Return a console for tables: a file has no width, and a table needs one."""
    return Console(width=None if sys.stdout.isatty() else 140)


@contextmanager
def show_steps(console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show the step at hand; yield a function that takes the description of each step.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where steps are kept as lines unless it is a terminal. Default: stderr, where they leave no trace.
    """
    silence_transformers()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=console is None) as bar:
        task = bar.add_task("Starting")

        def show(step: str) -> None:
            bar.update(task, description=step)
            if console is not None and not console.is_terminal:
                console.print(step, highlight=False)

        yield show


def count_through(done: Iterable[Any], sizes: Sequence[int], noun: str, console: Console) -> None:
    """Exhaust an iterable; show how much of it is done and how long the rest will take.

    Parameters
    ----------
    done : iterable
        Yields an item when it is done.
    sizes : sequence of int
        How long each item takes, in any unit.
    noun : str
        The plural of an item.
    console : rich.console.Console
    """
    columns = (
        TextColumn("{task.fields[count]} of " + f"{len(sizes)} {noun}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # Items take minutes, so the estimate looks back on all of them.
    with Progress(*columns, console=console, speed_estimate_period=86_400) as progress:
        bar = progress.add_task("", total=sum(sizes), count=0)
        for count, (_, size) in enumerate(zip(done, sizes, strict=True), start=1):
            progress.update(bar, advance=size, count=count)
            if not console.is_terminal:
                left = progress.tasks[bar].time_remaining
                rest = "" if left is None else f", about {left / 60:.0f} min left"
                console.print(f"{count} of {len(sizes)} {noun}{rest}", highlight=False)
