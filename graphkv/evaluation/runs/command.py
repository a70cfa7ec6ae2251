"""The command ``graphkv eval``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ...core.budgets import tokens_of
from ...naming.names import FULL, is_press
from ...naming.policies import make_policy
from ...workbench.progress import table_console
from ..records import read_records, read_timings
from ..shards import Shard
from .config import Config, budget_of
from .grid import run_grid
from .tables import print_speeds, print_tables

__all__ = ["main"]


def main(
    config: Config,
    *,
    output: Path,
    workers: int | None = None,
    threads: int | None = None,
    shard: Shard | None = None,
) -> None:
    """Run an evaluation, or what is left of it, and print its tables; see `run_grid`."""
    console = Console(stderr=True)
    for name, budget in _without_choice(config):
        console.print(
            f"Warning: sinks, recents and window of {name} take up the budget of {budget}: no score matters there",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    run = run_grid(config, output=output, console=console, workers=workers, threads=threads, shard=shard)
    records = read_records(output)
    print_tables(records, table_console())
    print_speeds(records, read_timings(output), table_console())
    print(f"Records: {run.path}")


def _without_choice(config: Config) -> Iterator[tuple[str, int]]:
    """Find the policies and budgets in tokens where all that is kept is protected."""
    lengths = (0,) if config.data else config.lengths
    budgets = dict.fromkeys(tokens_of(budget_of(budget), length) for length in lengths for budget in config.budgets)
    for name in config.policies:
        for budget in budgets:
            policy = None if name == FULL or is_press(name) else make_policy(name, budget, sinks=min(config.sinks))
            if policy is not None and budget <= policy.protection(budget).count:
                yield name, budget
