"""A smaller model that reads a prompt in full and says what a larger one keeps of it: SmallKV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...adapters.smallkv import SmallKV, match_heads
from ...core import checks
from ...core.attention import received_attention
from ...core.backend import load
from ...core.errors import ArgumentError
from .cache import EvictingCache
from .models import observing
from .versions import with_cache

__all__ = ["SmallerModel"]

BLOCK = 64


@dataclass(frozen=True, eq=False)
class SmallerModel:
    """A smaller model of the same family, whose attention decides what a larger one keeps.

    The small model reads the prompt with a full cache, and each KV head of the large one keeps what the head of the
    small one attends to that looks at the same tokens (`matched`).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The small one, as for `evicting`; of the same tokenizer as the large one.
    heads : sequence of (sequence of int, or None)
        For each layer of the large model, for each of its KV heads: a head of the small one, counted through its layers
        from the first. None for a layer that is never evicted.

    Notes
    -----
    The cost is one prefill of the small model per prompt, and its cache for as long as that takes. Attention is that of
    KV heads, the mean over their query heads, summed over the queries in blocks.

    References
    ----------
    .. [1] Zhao et al., "SmallKV: Small Model Assisted Compensation of KV Cache Compression for Efficient LLM
       Inference", arXiv:2508.02751.

    Examples
    --------
    ::

        smaller = SmallerModel.matched(small, large, some_text.input_ids)  # once, on 100 to 200 tokens
        with evicting(large, smaller.policy(inputs.input_ids, budget=512)):
            output = large.generate(**inputs, max_new_tokens=64)
    """

    model: Any
    heads: Sequence[Sequence[int] | None]

    @classmethod
    def matched(
        cls,
        model: Any,
        large: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        num_tokens: int | None = None,
    ) -> SmallerModel:
        """Match the heads of both models on some text, which both read.

        Parameters
        ----------
        model, large : transformers.PreTrainedModel
            The small model and the large one.
        input_ids : torch.Tensor, shape (batch, N), int64
            100 to 200 tokens, in the paper.
        attention_mask : torch.Tensor, shape (batch, N), optional
            0 for padding, which stands first.
        num_tokens : int, optional
            Tokens by which heads are compared, see `match_heads`. Default: a fifth of N, at least 1.

        Returns
        -------
        SmallerModel

        Raises
        ------
        ArgumentError
            If the models have vocabularies of different sizes, padding follows a token, or a model cannot be observed.
        """
        sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (large, model)]
        if sizes[0] != sizes[1]:
            raise ArgumentError(f"model must have the vocabulary of large, of size {sizes[0]}; got {sizes[1]}")
        ours, theirs = received_by(large, input_ids, attention_mask), received_by(model, input_ids, attention_mask)
        wanted = max(1, input_ids.shape[1] // 5) if num_tokens is None else num_tokens
        stacked = [torch.cat([each for each in found if each is not None], dim=1) for found in (ours, theirs)]
        valid = None if attention_mask is None else attention_mask.to(device=stacked[0].device, dtype=torch.bool)
        flat = match_heads(stacked[0], stacked[1].to(stacked[0].device), num_tokens=wanted, valid=valid).tolist()
        heads: list[list[int] | None] = []
        for each in ours:
            heads.append(None if each is None else [flat.pop(0) for _ in range(each.shape[1])])
        return cls(model, heads)

    def policy(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        budget: int | float,
        num_recent: int | None = None,
    ) -> SmallKV:
        """Read a prompt and return what to evict it from the large model with.

        Parameters
        ----------
        input_ids : torch.Tensor, shape (batch, N), int64
            The very tokens that the large model will read.
        attention_mask : torch.Tensor, shape (batch, N), optional
            0 for padding, which stands first.
        budget, num_recent
            As for `SmallKV`.

        Returns
        -------
        SmallKV
            For this prompt, after the prompt.

        Raises
        ------
        ArgumentError
            If padding follows a token, or `heads` names a head that the small model does not have.
        """
        found = [each for each in received_by(self.model, input_ids, attention_mask) if each is not None]
        stacked = torch.cat(found, dim=1)
        for number, layer in enumerate(self.heads):
            for head in layer or ():
                if checks.count(f"heads[{number}]", head) >= stacked.shape[1]:
                    raise ArgumentError(
                        f"heads[{number}] must name one of the {stacked.shape[1]} heads of the model; got {head}"
                    )
        importance = [None if layer is None else stacked[:, list(layer)] for layer in self.heads]
        return SmallKV(budget=budget, importance=importance, num_recent=num_recent)


def received_by(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Let a model read a text with a full cache; return what each KV head's tokens received of its attention.

    Returns
    -------
    list of torch.Tensor, shape (batch, kv_heads, N), float32 or wider, or None
        One per layer; None where `evicting` leaves a layer alone.
    """
    checks.instance("input_ids", input_ids, torch.Tensor)
    if attention_mask is not None and bool((attention_mask[:, :-1] > attention_mask[:, 1:]).any()):
        raise ArgumentError("attention_mask must have all padding of a row first; padding follows a token")
    backend, mask = load("torch"), {} if attention_mask is None else {"attention_mask": attention_mask}
    with observing(model), torch.inference_mode():
        cache = EvictingCache(num_queries=input_ids.shape[1])
        model(input_ids, **mask, **with_cache(model, cache), logits_to_keep=1)
    result: list[torch.Tensor | None] = []
    for layer in cache.attention_layers:
        if not layer.evicts or layer.queries is None:
            result.append(None)
            continue
        keys = layer.keys.clone()
        valid = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device) if layer.valid is None else layer.valid
        keys, queries = (each if each.dtype == torch.float64 else each.float() for each in (keys, layer.queries))
        result.append(received_attention(queries, keys, valid, block_size=BLOCK, backend=backend).mean(dim=2))
    return result
