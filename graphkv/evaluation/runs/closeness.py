"""The distance between the attention of an evicted cache and that of the full one, layer by layer.

Every layer is asked by the queries of the full cache, so that what one layer lost is not counted again in the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.attention import window_attention
from ...core.backend import load
from ...integrations.transformers import EvictingCache, EvictingLayer

__all__ = ["Probe", "make_probe"]

# The last queries are enough: the rows of all layers stay in memory.
MOST_QUERIES = 16


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The full cache's attention to the last queries of a question with its answer.

    Attributes
    ----------
    weights : list of torch.Tensor, shape (kv_heads, groups, Q, N + T)
        One per layer that can be evicted: probabilities over N cached tokens and T that came after the eviction.
    queries : list of torch.Tensor, shape (query_heads, Q, D)
    keys, values : list of torch.Tensor, shape (kv_heads, N + T, D) or (kv_heads, N + T, Dv)
    num_cached : int
        N.
    """

    weights: list[torch.Tensor]
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    num_cached: int

    def compare(self, cache: EvictingCache) -> tuple[float, float]:
        """Compute the relative error of the attention outputs and the attention that is kept.

        Parameters
        ----------
        cache : EvictingCache
            Evicted, before it has read the question.

        Returns
        -------
        error : float
            Mean of |output of what is kept - full output| / |full output| over layers, heads and queries.
        mass : float
            Mean share of the attention on tokens that are still in the cache.
        """
        errors, masses = [], []
        layers = [layer for layer in cache.attention_layers if layer.evicts]
        for number, (weights, values, layer) in enumerate(zip(self.weights, self.values, layers, strict=True)):
            there = self._still_there(layer, weights.shape[-1])
            kept = weights * there[:, None, None, :]
            mass = kept.sum(-1, keepdim=True)
            full = weights @ values[:, None]
            if layer.mass is None:
                output = kept @ values[:, None] / mass.clamp(min=torch.finfo(mass.dtype).tiny)
            else:
                output = self._of_slots(layer, number)
            errors.append(((output - full).norm(dim=-1) / full.norm(dim=-1)).mean())
            masses.append(mass.mean())
        return round(float(torch.stack(errors).mean()), 6), round(float(torch.stack(masses).mean()), 6)

    def _of_slots(self, layer: EvictingLayer, number: int) -> torch.Tensor:
        """Compute the output over what merged slots hold, each as often as its mass says: (kv_heads, groups, Q, Dv)."""
        keys = torch.cat([layer.keys[0].float(), self.keys[number][:, self.num_cached :]], dim=1)
        values = torch.cat([layer.values[0].float(), self.values[number][:, self.num_cached :]], dim=1)
        mass, valid = keys.new_ones(keys.shape[:2]), torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        if layer.mass is not None:
            mass[:, : layer.num_stored] = layer.mass[0]
        if layer.valid is not None:
            valid[:, : layer.num_stored] = layer.valid[0]
        xp = load("torch").xp
        weights = window_attention(self.queries[number][None], keys[None], valid[None], mass=mass[None], xp=xp)[0]
        output: torch.Tensor = weights @ values[:, None]
        return output

    def _still_there(self, layer: EvictingLayer, num_tokens: int) -> torch.Tensor:
        """Mark the tokens that are kept and those that came later, shape (kv_heads, N + T)."""
        positions = layer.true_positions[0]
        there = torch.zeros(positions.shape[0], num_tokens + 1, dtype=torch.bool, device=positions.device)
        there[:, self.num_cached : num_tokens] = True
        # Unused slots are at -1, the extra column.
        return there.scatter(-1, positions % (num_tokens + 1), True)[:, :num_tokens]


def make_probe(cache: EvictingCache, num_cached: int, num_queries: int) -> Probe:
    """Take the attention of a full cache that has read question and answer.

    Parameters
    ----------
    cache : EvictingCache
        With the queries of the answer's places.
    num_cached : int
        N, tokens before them that an eviction may drop.
    num_queries : int
        Places of the answer.
    """
    xp = load("torch").xp
    weights, asked, keys, values = [], [], [], []
    for layer in cache.attention_layers:
        if not layer.evicts:
            continue
        if layer.queries is None:
            raise RuntimeError("the cache must keep queries to be compared with")
        queries = layer.queries[:, :, -min(num_queries, MOST_QUERIES) :].float()
        everything = torch.ones(layer.keys.shape[:3], dtype=torch.bool, device=layer.keys.device)
        weights.append(window_attention(queries, layer.keys.float(), everything, xp=xp)[0])
        asked.append(queries[0])
        keys.append(layer.keys[0].float())
        values.append(layer.values[0].float())
    return Probe(weights=weights, queries=asked, keys=keys, values=values, num_cached=num_cached)
