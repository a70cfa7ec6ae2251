"""What a run does with a cache beyond evicting it. All of it in one place, because it reaches into the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...core.eviction import evict
from ...core.policy import Policy
from ...core.types import Array
from ...integrations.transformers import EvictingCache
from ...workbench.policies import with_budget

__all__ = ["CacheSize", "keep_queries", "measure", "running_states", "stack", "with_states", "with_stored"]


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The measured size of a cache of one prompt.

    Attributes
    ----------
    tokens : float
        Mean over KV heads and over the layers that can be evicted.
    bytes : int
        Of all keys and values.
    """

    tokens: float
    bytes: int


def measure(cache: EvictingCache, /) -> CacheSize:
    """Measure a cache; slots that a shorter head leaves unused count as bytes and not as tokens."""
    # Sliding layers of a model that has others too are left alone by every policy.
    kept = [layer.true_positions >= 0 for layer in cache.attention_layers if layer.evicts]
    heads = sum(each.shape[0] * each.shape[1] for each in kept)
    return CacheSize(tokens=round(sum(int(each.sum()) for each in kept) / heads, 6), bytes=cache.nbytes)


def stack(caches: Sequence[EvictingCache], /) -> EvictingCache:
    """Put caches of one prompt that store equally many tokens in every layer into one batch.

    Parameters
    ----------
    caches : sequence of EvictingCache
        Each of a batch of 1.

    Returns
    -------
    EvictingCache
        Row i goes on as `caches` [i] would. It cannot be evicted.
    """
    result = caches[0].copy()
    for layer, rows in zip(result.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True):
        # The state of layers of linear attention, by number.
        for name in ("conv_states", "recurrent_states"):
            for number, state in getattr(layer, name, {}).items():
                if state is not None:
                    getattr(layer, name)[number] = torch.cat([getattr(row, name)[number] for row in rows])
        if layer not in result.attention_layers:
            continue
        layer.keys = torch.cat([row.keys for row in rows])
        layer.values = torch.cat([row.values for row in rows])
        if layer.positions is not None:
            layer.positions = torch.cat([row.true_positions for row in rows])
        if any(row.valid is not None for row in rows):
            layer.valid = layer.true_positions >= 0
        places = [row.places for row in rows if row.places is not None]
        layer.places = torch.cat(places) if len(places) == len(rows) else None
        layer.queries, layer.state = None, {}
    return result


def keep_queries(cache: EvictingCache, number: int, /) -> None:
    """Drop all but the last queries of a cache, and free the memory of the others."""
    for layer in cache.attention_layers:
        if layer.queries is not None:
            layer.queries = layer.queries[:, :, -number:].clone()


def with_states(cache: EvictingCache, states: Sequence[Mapping[str, Array]], /) -> EvictingCache:
    """Copy a cache, with running sums for each of its layers."""
    result = cache.copy()
    for layer, state in zip(result.attention_layers, states, strict=True):
        layer.state = state
    return result


def with_stored(cache: EvictingCache, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], /) -> EvictingCache:
    """Copy a cache that has read a prompt, with the keys and values that something else made of it.

    Parameters
    ----------
    cache : EvictingCache
    pairs : sequence of tuple of torch.Tensor
        Keys and values per layer.

    Returns
    -------
    EvictingCache
        Positions are places in the cache. It cannot be evicted.
    """
    result = cache.copy()
    for layer, (keys, values) in zip(result.attention_layers, pairs, strict=True):
        layer.keys, layer.values = keys, values
        layer.positions = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        layer.queries = layer.places = None
    return result


def running_states(
    cache: EvictingCache, policy: Policy, states: Sequence[Mapping[str, Array]] | None = None, /
) -> list[Mapping[str, Array]]:
    """Compute what a policy with running sums knows of all tokens of a cache; its budget does not matter.

    Parameters
    ----------
    cache : EvictingCache
        Not evicted, with the queries of all positions, or of those after `states`.
    policy : Policy
    states : sequence of mapping, optional
        What it knew after the first part of the prompt.

    Returns
    -------
    list of mapping
        One per layer; empty for sliding layers of a model that has others too.
    """
    found: list[Mapping[str, Array]] = []
    for number, layer in enumerate(cache.attention_layers):
        if not layer.evicts:
            found.append({})
            continue
        num_new = layer.num_seen - (0 if states is None else next(iter(states[number].values())).shape[2])
        everything = evict(
            # A budget of everything: nothing is chosen, so the state is that of all tokens.
            with_budget(policy, layer.num_seen),
            layer.keys,
            queries=None if layer.queries is None else layer.queries[:, :, -num_new:],
            layer=layer.index,
            num_layers=layer.num_layers,
            state=None if states is None else states[number],
        )
        found.append(everything.state or {})
    return found
