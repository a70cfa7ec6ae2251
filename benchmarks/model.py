"""End to end on SmolLM2-135M: what eviction costs next to the prefill, and what decoding gains."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from graphkv import Degree, GraphKV, KeyDiff, Policy, SnapKV
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.workbench.forward import next_logits, read
from graphkv.workbench.model import DEFAULT_MODEL, load_model
from graphkv.workbench.text import language_reference

from .measure import Row

__all__ = ["rows"]

BUDGET = 512
NAME, POLICY = "SnapKV and the degree", GraphKV(SnapKV(budget=BUDGET), Degree())
# What other policies cost after the longest prefill.
OTHERS = {
    "SnapKV": SnapKV(budget=BUDGET),
    "SnapKV and the paper's graph": GraphKV(SnapKV(budget=BUDGET)),
    "KeyDiff": KeyDiff(budget=BUDGET),
}
DECODED = 16


def _prompt(tokenizer: Any, num_tokens: int) -> Any:
    """Take real English, because the cache of random tokens is like no other."""
    text = "\n\n".join(language_reference().paragraphs)
    return tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]


def _prefill(model: Any, prompt: Any) -> tuple[EvictingCache, float]:
    """Read the prompt; return its full cache and the seconds."""
    cache = EvictingCache(num_queries=POLICY.num_queries(prompt.shape[1]))
    with observing(model):
        start = time.perf_counter()
        read(model, prompt, cache)
        return cache, time.perf_counter() - start


def _decode(model: Any, cache: EvictingCache, first: Any) -> float:
    """Return the seconds of `DECODED` greedy tokens."""
    token = first
    with observing(model):
        start = time.perf_counter()
        for _ in range(DECODED):
            token = next_logits(model, token, cache).argmax(dim=-1)
        return time.perf_counter() - start


@torch.inference_mode()
def rows(rounds: int, *, contexts: tuple[int, ...] = (1024, 4096), long_context: int = 8000) -> list[Row]:
    """Measure eviction as a share of prefill, then decoding and KV bytes."""
    model, tokenizer = load_model(None, lambda message: None)
    found = []
    for num_tokens in contexts:
        prompt = _prompt(tokenizer, num_tokens)
        _prefill(model, prompt[:, :256])
        evictions, prefills = [], []
        for _ in range(max(1, rounds // 4)):
            cache, seconds = _prefill(model, prompt)
            prefills.append(seconds)
            for _ in range(4):
                twin, start = cache.copy(), time.perf_counter()
                twin.evict(POLICY)
                evictions.append(time.perf_counter() - start)
        share = median(evictions) / median(prefills)
        found.append(
            Row(
                name=f"eviction by {NAME} after a prefill, {DEFAULT_MODEL}: {num_tokens} tokens, budget {BUDGET}",
                of="eviction of all layers",
                to="prefill",
                seconds=median(evictions),
                seconds_to=median(prefills),
                ratio=100 * share,
                unit="%",
                target="at most 2 %" if num_tokens == 4096 else "",
                met=share <= 0.02 if num_tokens == 4096 else None,
            )
        )
        if num_tokens == max(contexts):
            found += [_share(name, policy, cache, median(prefills), rounds) for name, policy in OTHERS.items()]
    found.append(_decoding(model, _prompt(tokenizer, long_context), rounds))
    return found


def _share(name: str, policy: Policy, cache: EvictingCache, prefill: float, rounds: int) -> Row:
    """Measure the eviction of a cache by one more policy as a share of its prefill."""
    seconds = []
    for _ in range(max(1, rounds // 2)):
        twin, start = cache.copy(), time.perf_counter()
        twin.evict(policy)
        seconds.append(time.perf_counter() - start)
    return Row(
        name=f"eviction by {name} after a prefill, {DEFAULT_MODEL}: {cache.num_seen} tokens, budget {BUDGET}",
        of="eviction of all layers",
        to="prefill",
        seconds=median(seconds),
        seconds_to=prefill,
        ratio=100 * median(seconds) / prefill,
        unit="%",
    )


def _decoding(model: Any, prompt: Any, rounds: int) -> Row:
    full, _ = _prefill(model, prompt)
    small = full.copy()
    small.evict(POLICY)
    first = prompt[:, -1:]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(1, rounds // 2)):
        for cache, taken in zip((full, small), seconds, strict=True):
            # A copy shares its tensors, so every turn starts from the same context.
            taken.append(_decode(model, cache.copy(), first))
    ratio = median(whole / evicted for whole, evicted in zip(*seconds, strict=True))
    tokens = [DECODED / median(each) for each in seconds]
    return Row(
        name=f"decoding, {DEFAULT_MODEL}: {prompt.shape[1]} tokens of context",
        of="full cache",
        to=f"budget {BUDGET}",
        seconds=median(seconds[0]) / DECODED,
        seconds_to=median(seconds[1]) / DECODED,
        ratio=ratio,
        target="at least 1.5 x",
        met=ratio >= 1.5,
        memory=full.nbytes / 1e6,
        memory_to=small.nbytes / 1e6,
        note=f"{tokens[0]:.1f} and {tokens[1]:.1f} tokens per second; memory is that of keys and values",
    )
