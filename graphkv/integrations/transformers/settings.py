"""What all layers of a cache have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.backend import Backend
from ...core.policy import Policy

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all layers of a cache have in common, see `EvictingCache`."""

    policy: Policy | None
    every: int | None
    rerotate: bool
    record: bool
    num_queries: int
    backend: Backend | None
