"""The forward passes that demo, benchmarks and evaluation have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.policy import Policy
from ..integrations.transformers import EvictingCache, RepeatPrompt, ask_to_repeat
from ..integrations.transformers.versions import with_cache

__all__ = ["ask", "next_logits", "read", "teacher_forced_logits"]


def read(model: Any, ids: torch.Tensor, cache: EvictingCache, /) -> None:
    """Read tokens (batch, N) into a cache."""
    next_logits(model, ids, cache)


def ask(model: Any, tokenizer: Any, ids: torch.Tensor, cache: EvictingCache, policies: Sequence[Policy], /) -> None:
    """Ask a model to repeat what it has read (batch, N), where a policy needs that."""
    if any(policy.needs().probes for policy in policies):
        ask_to_repeat(model, cache, ids, RepeatPrompt.of(tokenizer))


def next_logits(model: Any, ids: torch.Tensor, cache: EvictingCache, /, *, places: int = 1) -> torch.Tensor:
    """Read tokens (batch, N) into a cache; return the logits (batch, places, vocabulary) after the last ones."""
    logits: torch.Tensor = model(ids, **with_cache(model, cache), logits_to_keep=places).logits
    return logits


def teacher_forced_logits(
    model: Any, cache: EvictingCache, before: Sequence[int], answer: Sequence[int], /
) -> torch.Tensor:
    """Read some tokens and the right answer into a cache of any batch size, the same for each row.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    cache : EvictingCache
    before : sequence of int
        Tokens between the cached ones and the answer. At least one.
    answer : sequence of int
        At least one.

    Returns
    -------
    torch.Tensor, shape (batch, answer tokens, vocabulary)
        The logits that predict each token of the answer.
    """
    rows = cache.attention_layers[0].keys.shape[0]
    ids = torch.tensor([[*before, *answer[:-1]]], device=model.device).expand(rows, -1)
    return next_logits(model, ids, cache, places=len(answer))
