"""kvpress's own presses on the same prompts: ``kvpress:SnapKVPress``, ``kvpress:KnormPress(...)``.

A press evicts while it reads, so each press and budget reads the prompt once more.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ...core.errors import ArgumentError, BackendUnavailableError
from ...integrations.transformers import EvictingCache
from ...integrations.transformers.versions import with_cache
from ...naming.names import parse
from ...naming.policies import call

__all__ = ["check_press", "fewest_tokens", "read_under_press"]


def check_press(name: str) -> None:
    """Refuse a name such as ``kvpress:SnapKVPress(window_size=32)`` that is not that of a press."""
    _make(name, 0.5)


def fewest_tokens(name: str) -> int:
    """Count the tokens that a prompt must have for a press to take it: more than its window and its sinks."""
    press = _make(name, 0.5)
    return 1 + max(int(getattr(press, setting, 0)) for setting in ("window_size", "n_sink"))


def read_under_press(model: Any, ids: torch.Tensor, name: str, budget: int, full: EvictingCache) -> EvictingCache:
    """Read a prompt under a press; return the cache that it leaves.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids : torch.Tensor, shape (1, N), int64
    name : str
    budget : int
        Tokens to keep per KV head.
    full : EvictingCache
        That has read the same prompt.

    Returns
    -------
    EvictingCache
        Positions are counted from 0, because a press does not tell which tokens it kept.
    """
    # kvpress keeps the integer part of N (1 - ratio): half a token more keeps rounding away from the next integer.
    press = _make(name, 1 - (budget + 0.5) / ids.shape[1])
    compressed = DynamicCache()
    with press(model):
        model(ids, **with_cache(model, compressed), logits_to_keep=1)
    return full.with_stored([(layer.keys, layer.values) for layer in compressed.layers])


def _make(name: str, ratio: float) -> Any:
    try:
        import kvpress  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise BackendUnavailableError(f"--policy {name} needs: pip install 'graphkv[kvpress]' ({error})") from error
    (kind, options), *wrappers = parse(name)
    if wrappers:
        raise ArgumentError(f"--policy {name} must be a press alone; wrappers need a policy of graphkv as their base")
    press = getattr(kvpress, kind.partition(":")[2], None)
    if not (isinstance(press, type) and issubclass(press, kvpress.ScorerPress)):
        raise ArgumentError(f"--policy {name} must name a ScorerPress of kvpress; {kind!r} is not one")
    return call(press, name, compression_ratio=ratio, **options)
