"""The versions of LMCache that were tested."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from ...core.errors import ArgumentError

__all__ = ["check_version"]

TESTED = ("0.5.6", "0.5.7")


def check_version() -> None:
    """Refuse to edit under an LMCache that was not tested: what its tensors hold may have changed."""
    if "lmcache" not in sys.modules:
        return
    try:
        found = version("lmcache")
    except PackageNotFoundError:
        return
    if not found.startswith(TESTED):
        raise ArgumentError(f"lmcache must be of version {' or '.join(TESTED)}, which were tested; got {found}")
