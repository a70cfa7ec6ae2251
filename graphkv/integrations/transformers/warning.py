"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

from ...core.errors import GraphKVWarning

__all__ = ["warn"]

# What lies between a user's line and ours.
LIBRARIES = ("graphkv", "torch", "transformers", "contextlib", "accelerate", "kvpress", "peft")


def warn(message: str, /) -> None:
    """Warn with a `GraphKVWarning` at the innermost line that belongs to no library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GraphKVWarning, stacklevel=level)
