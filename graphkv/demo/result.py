"""The demo's result of one policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Result"]


@dataclass(kw_only=True)
class Result:
    """The cache that one policy left, and the answer from it.

    `kept` and `suppressed` are bool arrays of shape (layers, kv_heads, N) on the host; a token is suppressed where the
    base policy alone would have kept it and the graph dropped it.
    """

    policy: str
    tokens_kept_per_layer: list[int]
    kv_bytes_before: int
    kv_bytes_after: int
    answer: str
    answer_is_correct: bool | None
    expected_answer_nll: float | None
    decode_tokens_per_second: float
    eviction_seconds: float
    kept: Any = field(repr=False)
    suppressed: Any = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return everything that is not an array."""
        return {name: value for name, value in vars(self).items() if name not in ("kept", "suppressed")}
