"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


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
