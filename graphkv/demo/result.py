"""The demo's results: of one policy, and of all policies on one document."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .prompt import ChatPrompt

__all__ = ["Part", "Result"]


@dataclass(kw_only=True)
class Result:
    """The cache that one policy left, and the answer from it.

    `kept` is a bool array of shape (layers, kv_heads, N) on the host.
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

    def as_json(self) -> dict[str, Any]:
        """Return everything that is not an array."""
        return {name: value for name, value in vars(self).items() if name != "kept"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One document of the demo: what it is, its prompt, and what each policy made of it."""

    title: str
    budget: int | float
    prompt: ChatPrompt
    expected: str
    prefill_seconds: float
    results: list[Result]

    def as_json(self) -> dict[str, Any]:
        """Return everything that is not an array."""
        return {
            "title": self.title,
            "question": self.prompt.question,
            "prompt_tokens": self.prompt.token_ids.shape[1],
            "cached_tokens": self.prompt.token_ids.shape[1] - 1,
            "budget": self.budget,
            "expected_answer": self.expected,
            "must_contain": self.prompt.must_contain,
            "prefill_seconds": self.prefill_seconds,
            "results": [result.as_json() for result in self.results],
        }
