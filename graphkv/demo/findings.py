"""The findings of ``graphkv inspect``: one prompt of an evicted cache, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ArgumentError
from ..integrations.transformers import EvictingCache, Fate, LayerStats, absorbers, fates, masses, scored

__all__ = ["Findings", "find"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """The fate of one prompt's tokens in a cache.

    Attributes
    ----------
    title, policy : str
    words : list of str
        The text of each of the N tokens.
    fates : numpy.ndarray, shape (layers, kv_heads, N), uint8
        A `Fate` each.
    importance, scores : numpy.ndarray, shape (layers, kv_heads, N), float64
        Before and after the graph; NaN where nothing was scored.
    absorbers : numpy.ndarray, shape (layers, kv_heads, N), int64
        The token that each one went into, -1 where it did not.
    masses : numpy.ndarray, shape (layers, kv_heads, N), float32
        As how many tokens each one counts; 0 where it is gone.
    stats : tuple of LayerStats
        As `EvictingCache.stats`, for the whole batch.
    row : int
        Which row of the batch this is.
    chosen : tuple of int
        Layer and head to look at first.
    fact : tuple of int or None
        First token, and the one after the last, of what should be marked.
    """

    title: str
    policy: str
    words: list[str]
    fates: Any
    importance: Any
    scores: Any
    absorbers: Any
    masses: Any
    stats: tuple[LayerStats, ...]
    row: int
    chosen: tuple[int, int]
    fact: tuple[int, int] | None

    @property
    def redundancy(self) -> Any:
        """Mean cosine of two keys before and after, over the heads: float64 (layers, 2); NaN without a record."""
        unknown = np.full(1, np.nan)
        pairs = [(each.redundancy_before, each.redundancy_after) for each in self.stats]
        return np.asarray([[(unknown if x is None else x[self.row]).mean() for x in pair] for pair in pairs])

    @property
    def competes(self) -> Any:
        """Tokens that were ranked by their scores, bool (layers, kv_heads, N): scored and not protected."""
        return ~np.isnan(self.importance) & (self.fates != Fate.PROTECTED)

    @property
    def kept_by_importance(self) -> Any:
        """Tokens that the base alone would keep with as many places in each head, bool (layers, kv_heads, N)."""
        kept, ranks = self.fates >= Fate.KEPT, self.ranks(self.importance)
        places = (kept & self.competes).sum(axis=-1, keepdims=True)
        return (kept & ~self.competes) | ((ranks > 0) & (ranks <= places))

    def ranks(self, scores: Any) -> Any:
        """Rank `importance` or `scores` from 1 among the tokens that compete; 0 for the others."""
        competes = self.competes
        order = np.argsort(np.where(competes, -scores, np.inf), axis=-1, kind="stable")
        ranks = np.empty(order.shape, dtype=np.int64)
        np.put_along_axis(ranks, order, np.arange(1, order.shape[-1] + 1), axis=-1)
        return np.where(competes, ranks, 0)


def find(
    cache: EvictingCache,
    words: list[str],
    *,
    title: str = "graphkv inspect",
    layer: int | None = None,
    head: int | None = None,
    fact: tuple[int, int] | None = None,
    row: int = 0,
) -> Findings:
    """Collect the fate of one prompt's tokens from a cache with ``record=True``.

    Parameters
    ----------
    cache : EvictingCache
    words : list of str
        The text of each token that the cache has seen.
    title : str
    layer, head : int, optional
        What to look at first. Default: where most was suppressed.
    fact : tuple of int, optional
        First token, and the one after the last, of what should be marked.
    row : int
        Which row of the batch.

    Returns
    -------
    Findings

    Raises
    ------
    ArgumentError
        If the cache is empty, has no such layer, head or row, or there is not one word per token.
    """
    stats = cache.stats()
    if not stats or not stats[0].num_seen:
        raise ArgumentError("cache must have read a prompt; it is empty")
    if len(words) != stats[0].num_seen:
        raise ArgumentError(f"words must be one for each of {stats[0].num_seen} tokens; got {len(words)}")
    num_rows, num_heads = cache.attention_layers[0].keys.shape[:2]
    for name, index, size in (("layer", layer, len(stats)), ("head", head, num_heads), ("row", row, num_rows)):
        if index is not None and not 0 <= index < size:
            raise ArgumentError(f"{name} must lie in [0, {size - 1}]; got {index}")
    found = np.stack([fates(each)[row] for each in cache.attention_layers])
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    counts = (found[layers, heads] == Fate.SUPPRESSED).sum(axis=-1)
    best_layer, best_head = np.unravel_index(counts.argmax(), counts.shape)
    scores = [scored(each) for each in cache.attention_layers]
    return Findings(
        title=title,
        policy=str(cache.policy),
        words=words,
        fates=found,
        importance=np.stack([importance[row] for importance, _ in scores]),
        scores=np.stack([final[row] for _, final in scores]),
        absorbers=np.stack([absorbers(each)[row] for each in cache.attention_layers]),
        masses=np.stack([masses(each)[row] for each in cache.attention_layers]),
        stats=stats,
        row=row,
        chosen=(int(best_layer) if layer is None else layer, int(best_head) if head is None else head),
        fact=fact,
    )
