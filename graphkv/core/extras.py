"""Extras: packages that come with one, and how to install it, in one line where they are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from .errors import BackendUnavailableError

__all__ = ["install", "needs"]


def install(extra: str, /) -> str:
    """Return the command that installs an extra, with the folder or file that graphkv itself was installed from."""
    try:
        where = json.loads(distribution("graphkv").read_text("direct_url.json") or "{}").get("url")
    except (PackageNotFoundError, ValueError, AttributeError):
        where = None
    # Not every index has graphkv.
    again = f", or 'graphkv[{extra}] @ {where}', where this one came from" if where else ""
    return f"pip install 'graphkv[{extra}]'{again}"


@contextmanager
def needs(what: str, extra: str, /, *modules: str) -> Iterator[None]:
    """Name the extra that something needs where an import in the block fails, or one of some modules is missing.

    Parameters
    ----------
    what : str
        What needs it.
    extra : str
    *modules : str
        Looked for before the block, and not imported: what only a later step will import.

    Raises
    ------
    BackendUnavailableError
        In one line with the extra and the reason.
    """
    try:
        for module in modules:
            if not _is_there(module):
                raise ModuleNotFoundError(f"No module named {module!r}")
        yield
    except BackendUnavailableError:
        raise
    except ImportError as error:
        # A name that one of our own modules lacks is a mistake of ours, and no package brings it.
        if not isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "graphkv":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackendUnavailableError(f"{what} needs: {install(extra)} ({reason})") from error


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
