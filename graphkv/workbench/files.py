"""Text files: read or refused in one line, written whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ArgumentError
from ..core.files import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Content", "check_folder", "read_file", "read_toml", "write_file", "write_files"]

# What goes into a file: text, bytes, or a function that fills the file of a path.
Content = str | bytes | Callable[[Path], Any]


def read_file(path: Path, option: str, /) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Parameters
    ----------
    path : pathlib.Path
    option : str
        The option that named the file, for the error.

    Raises
    ------
    ArgumentError
        If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "not UTF-8 text"
        raise ArgumentError(f"{option} {path} cannot be read: {reason}") from error


def read_toml(path: Path, option: str, /) -> dict[str, Any]:
    """Read a file of TOML, as `read_file` does.

    Raises
    ------
    ArgumentError
        If it cannot be read, or is not TOML.
    """
    content = read_file(path, option)
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{option} {path} must be TOML: {error}") from error


def check_folder(output: Path, /) -> None:
    """Refuse a file where a folder is to be, before the first slow step."""
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder; {output} is a file")


def write_file(path: Path, content: Content, /) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """

    def write(scratch: Path) -> None:
        if isinstance(content, str):
            scratch.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            scratch.write_bytes(content)
        else:
            content(scratch)

    write_whole(path, write)


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
