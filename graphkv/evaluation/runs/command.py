"""The command ``graphkv eval``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ...workbench.progress import table_console
from ..records import read_records
from .config import Config
from .grid import run_grid
from .tables import print_tables

__all__ = ["main"]


def main(config: Config, *, output: Path, workers: int | None = None, threads: int | None = None) -> None:
    """Run an evaluation, or what is left of it, and print its tables; see `run_grid`."""
    run = run_grid(config, output=output, console=Console(stderr=True), workers=workers, threads=threads)
    print_tables(read_records(output), table_console())
    print(f"Records: {run.path}")
