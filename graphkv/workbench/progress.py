"""Consoles and progress displays of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

__all__ = ["count_through", "print_table", "show_steps", "silence_transformers", "table_console"]


def silence_transformers() -> None:
    """Turn off transformers' own messages and progress bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table_console(width: int = 140) -> Console:
    """Return a console for tables: a file or a pipe has no width, and a table needs one.

    With ``NO_COLOR`` there is no style of any kind.
    """
    plain: dict[str, Any] = {"color_system": None} if os.environ.get("NO_COLOR") else {}
    return Console(width=None if sys.stdout.isatty() else width, **plain)


def print_table(console: Console, table: Any, /) -> None:
    """Print a table, or a text that is wrapped, without the spaces that fill up its lines."""
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")


@contextmanager
def show_steps(console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show the step at hand; yield a function that takes the description of each step.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where steps are kept as lines unless it is a terminal. Default: stderr, where they leave no trace on a terminal,
        and else a line each when they have ended: an error stays the only line of a step that is refused.
    """
    silence_transformers()
    own = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=own, transient=console is None) as bar:
        task = bar.add_task("Starting")
        before, begun = "", perf_counter()

        def end() -> None:
            if before and console is None and not own.is_terminal:
                own.print(f"{before}: {perf_counter() - begun:.1f} s", highlight=False, markup=False, soft_wrap=True)

        def show(step: str) -> None:
            nonlocal before, begun
            end()
            before, begun = step, perf_counter()
            bar.update(task, description=step)
            if console is not None and not console.is_terminal:
                console.print(step, highlight=False)

        yield show
        end()


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
