"""The settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.backend import Backend
from ...core.policy import Policy

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that all layers of a cache share, see `EvictingCache`.

    With `is_probing`, every layer keeps the queries of the last call as they came, and nothing else of it matters.
    """

    policy: Policy | None
    every: int | None
    protect_prompt: bool
    rerotate: bool
    record: bool
    num_queries: int
    backend: Backend | None
    is_probing: bool = False
