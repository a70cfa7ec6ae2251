"""kvpress's SnapKV on given tensors. Imported only where kvpress is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import kvpress
import torch

from .measure import Call

__all__ = ["kvpress_snapkv"]


def kvpress_snapkv(keys: Any, queries: Any, budget: int, window: int) -> Call:
    """Return a call that scores with `SnapKVPress.score` and takes the best `budget` tokens.

    The press projects queries itself and rotates them; here the projection hands out the given ones and the rotation
    is by zero, so neither side is charged for making queries.
    """
    batch, query_heads, _, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1:3]
    flat = queries.transpose(1, 2).reshape(batch, window, query_heads * head_size)
    attention = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=query_heads, num_key_value_heads=kv_heads),
        head_dim=head_size,
        q_proj=lambda hidden: flat,
    )
    hidden = torch.empty(batch, num_tokens, 1, device=keys.device)
    no_rotation = (torch.ones(1, num_tokens, head_size, device=keys.device),) * 2
    no_rotation = (no_rotation[0], torch.zeros_like(no_rotation[1]))
    press = kvpress.SnapKVPress(window_size=window, kernel_size=5)

    def call() -> Any:
        scores = press.score(attention, hidden, keys, keys, None, {"position_embeddings": no_rotation})
        return scores.topk(budget, dim=-1).indices

    return call
