"""The folder of ``--output``: checked before the work, and filled after it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import ArgumentError
from ..core.files import Content, write_file

__all__ = ["check_folder", "write_files"]


def check_folder(output: Path, /) -> None:
    """Refuse a folder that cannot be written, before the first slow step. Nothing is made yet.

    Raises
    ------
    ArgumentError
        If there is a file in its place, or the folder, or the one to make it in, may not be written to.
    """
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder; {output} is a file")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ArgumentError(f"--output {output} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentError(f"--output {output} cannot be written: {there} may not be written to")


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
