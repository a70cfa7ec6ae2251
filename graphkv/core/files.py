"""Files: read or refused in one line, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import ArgumentError

__all__ = ["Content", "StoredArray", "read_file", "read_tensors", "read_toml", "write_file", "write_whole"]

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
    # Only here, because saving a cache takes this module too and must not need tomli.
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415
    else:
        import tomli as tomllib  # noqa: PLC0415
    content = read_file(path, option)
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{option} {path} must be TOML: {error}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredArray:
    """A float32 array of a file, which any array library can take over.

    Attributes
    ----------
    shape : tuple of int
    data : array.array of type ``f``
        Its entries, the last axis fastest.
    """

    shape: tuple[int, ...]
    data: array[float]


def read_tensors(path: Path, option: str, /) -> dict[str, StoredArray]:
    """Read the float32 arrays of a file in the safetensors format.

    The format is the length of a header in 8 bytes, the header in JSON, and the arrays: nothing of it can be code.

    Parameters
    ----------
    path : pathlib.Path
    option : str
        The option that named the file, for the error.

    Returns
    -------
    dict of str to StoredArray

    Raises
    ------
    ArgumentError
        If it cannot be read, is not in this format, or holds another type of numbers.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be read: {error.strerror or error}") from error
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        kinds = {name: each["dtype"] for name, each in header.items()}
        shapes = {name: tuple(int(length) for length in each["shape"]) for name, each in header.items()}
        ranges = {name: [start + int(x) for x in each["data_offsets"]] for name, each in header.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ArgumentError(f"{option} {path} must be in the safetensors format; its header is not") from error
    found = {}
    for name, kind in kinds.items():
        if kind != "F32":
            raise ArgumentError(f"{option} {path} must hold float32 arrays, of type F32; {name} is {kind}")
        begin, end = ranges[name] if len(ranges[name]) == 2 else (0, 0)
        if min(shapes[name], default=0) < 0 or begin < start or end - begin != 4 * prod(shapes[name]):
            raise ArgumentError(f"{option} {path} must be in the safetensors format; the size of {name} is not")
        data = array("f")
        data.frombytes(content[begin:end])
        if len(data) != prod(shapes[name]):
            raise ArgumentError(f"{option} {path} must be in the safetensors format; it ends before {name}")
        if sys.byteorder == "big":
            data.byteswap()
        found[name] = StoredArray(shape=shapes[name], data=data)
    return found


def write_whole(path: Path, write: Callable[[Path], Any], /) -> None:
    """Write a file under another name in the same folder, then give it its own.

    Parameters
    ----------
    path : Path
        What is there already stays until the new file is complete.
    write : callable
        ``write(scratch)`` fills an empty file whose name ends like `path`.

    Raises
    ------
    OSError
        If the folder or the disk does not let it be written. Nothing new is left then.
    """
    scratch = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    # Not tempfile: its files are for the owner only, whatever the umask says; so are those of some writers.
    os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = scratch.stat().st_mode
        write(scratch)
        scratch.chmod(mode)
        # On the disk before it has the name: after a power cut there is no half a file.
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


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
