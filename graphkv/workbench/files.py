"""The folder of ``--output``: checked before the work, and filled after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..core.errors import ArgumentError
from ..core.files import Content, write_file

__all__ = ["check_folder", "write_files"]


def check_folder(output: Path, /) -> None:
    """Refuse a file where a folder is to be, before the first slow step."""
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder; {output} is a file")


def write_files(output: Path, contents: Mapping[str, Content], /) -> None:
    """Write files into the folder of ``--output``, each whole or not at all.

    Parameters
    ----------
    output : pathlib.Path
        Made if it does not exist, as are the folders of the files below it.
    contents : mapping of str to str, bytes or callable
        By the path of each file below the folder.

    Raises
    ------
    ArgumentError
        If a file cannot be written. Those before it remain.
    """
    try:
        for name, content in contents.items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be written: {error.strerror or error}") from error
