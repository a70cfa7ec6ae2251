"""Files: read or refused in one line, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .extras import needs

__all__ = ["Content", "StoredArray", "read_file", "read_tensors", "read_toml", "write_file", "write_whole"]

# What goes into a file: text, bytes, or a function that fills the file of a path.
Content = str | bytes | Callable[[Path], Any]
# What safetensors begins its own messages with.
PREFIX = "Error while deserializing: "


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
    """Read the float32 arrays of a file in the safetensors format: nothing of it can be code.

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
    BackendUnavailableError
        If safetensors is not installed.
    """
    with needs(option, "learned"):
        import safetensors  # noqa: PLC0415 - only trained weights need it
    try:
        tensors = dict(safetensors.deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix(PREFIX)
        raise ArgumentError(f"{option} {path} must be in the safetensors format; {reason}") from error
    found = {}
    for name, tensor in tensors.items():
        if tensor["dtype"] != "F32":
            raise ArgumentError(f"{option} {path} must hold float32 arrays, of type F32; {name} is {tensor['dtype']}")
        data = array("f", bytes(tensor["data"]))
        if sys.byteorder == "big":
            data.byteswap()
        found[name] = StoredArray(shape=tuple(tensor["shape"]), data=data)
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
