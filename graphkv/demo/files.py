"""Where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ArgumentError
from ..core.files import write_whole

__all__ = ["check_folder", "write_files"]


def check_folder(output: Path) -> None:
    """Refuse a file where a folder is to be, before the first slow step."""
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder; {output} is a file")


def write_files(output: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write some files into a folder, each whole or not at all."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write_whole(output / name, write)
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be written: {error.strerror or error}") from error
