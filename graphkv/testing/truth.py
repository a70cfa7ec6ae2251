"""The steps once more, whole arrays at a time in float64: the truth on rows too long for the loops of `oracle`.

Written from the specification like the oracle, in NumPy, and sharing no code with `graphkv.core`. Where inputs are
exact (such as keys of plus and minus one) it is exact as well, ties included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .oracle import FREE, LARGEST_POWER, SMALLEST_FACTOR, SMALLEST_POWER

__all__ = [
    "build_graph",
    "cosines",
    "degree",
    "distance",
    "fuse",
    "pagerank",
    "propagate",
    "received",
    "select",
    "top_k",
]

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


def top_k(scores: Floats, k: int, tiers: NDArray[Any] | None = None) -> Indices:
    """Rank tokens: lower tier, then numbers before NaN, then higher score, then lower index."""
    is_nan = np.isnan(scores)
    falling = -np.where(is_nan, 0, scores)
    tiers = np.zeros(scores.shape, np.int32) if tiers is None else tiers
    index = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    return np.lexsort((index, falling, is_nan, tiers), axis=-1)[..., :k].astype(np.int64)


def _directions(keys: Floats, dtype: str) -> NDArray[np.float64]:
    """Scale keys to length one; a key whose squares are not positive and finite in `dtype` has no direction."""
    with np.errstate(all="ignore"):
        narrow = keys.astype(dtype)
        square = np.sum(narrow * narrow, axis=-1, keepdims=True)
        wide = narrow.astype(np.float64)
        length = np.sqrt(np.sum(wide * wide, axis=-1, keepdims=True))
        return np.where((square > 0) & np.isfinite(square), wide / length, 0.0)


def cosines(keys: Floats, sources: Indices, dtype: str) -> NDArray[np.float64]:
    """Compare every source with every token of its row: (..., K, N)."""
    directions = _directions(keys, dtype)
    of = np.take_along_axis(directions, sources[..., None], axis=-2)
    return of @ np.swapaxes(directions, -1, -2)


def build_graph(
    keys: Floats,
    importance: Floats,
    *,
    num_sources: int,
    num_neighbors: int,
    valid: Mask | None = None,
    dtype: str = "float32",
) -> tuple[Indices, Indices, NDArray[np.float64]]:
    """Link the most important valid tokens to the valid tokens that resemble them most: sources, neighbors, weights."""
    num_tokens = importance.shape[-1]
    valid = np.ones(importance.shape, np.bool_) if valid is None else valid
    num_sources = min(num_sources, num_tokens)
    num_neighbors = min(num_neighbors, num_tokens - num_sources)
    sources = np.sort(top_k(importance, num_sources, ~valid), axis=-1)
    eligible = valid.copy()
    np.put_along_axis(eligible, sources, False, axis=-1)
    links = eligible[..., None, :] & np.take_along_axis(valid, sources, axis=-1)[..., None]
    weight = np.where(links, np.clip(cosines(keys, sources, dtype), 0, 1), -1)
    neighbors = np.argsort(-weight, axis=-1, kind="stable")[..., :num_neighbors]
    weights = np.take_along_axis(weight, neighbors, axis=-1)
    return sources, np.where(weights < 0, FREE, neighbors), np.maximum(weights, 0)


def propagate(
    importance: Floats,
    neighbors: Indices,
    weights: Floats,
    *,
    signal: str = "decay",
    rounds: int = 1,
    accumulation: str = "product",
    strength: float = 1.0,
    dtype: str = "float64",
) -> NDArray[np.float64]:
    """Send the sources' signal along every edge; a factor has the range of `dtype`, as in the specification."""
    score = importance.astype(np.float64)
    weights = np.clip(np.nan_to_num(weights.astype(np.float64), nan=0.0, posinf=1, neginf=0), 0, 1)
    factor, reached = np.ones(score.shape), np.zeros(score.shape, np.bool_)
    sign = +1 if signal == "enhance" else -1
    for row in np.ndindex(*score.shape[:-1]):
        at, w = neighbors[row].reshape(-1), weights[row].reshape(-1)
        if accumulation == "sum":
            np.add.at(factor[row], at, sign * strength * w)
        else:
            np.multiply.at(factor[row], at, np.maximum(1 + sign * strength * w, SMALLEST_FACTOR))
        np.logical_or.at(reached[row], at, w > 0)
    if signal == "evict":
        return np.where(reached, -np.inf, score)
    with np.errstate(all="ignore"):
        power = (factor**rounds).astype(dtype).astype(np.float64)
        scaled = np.where(score >= 0, score * power, score - np.abs(score) * (1 - power))
    return np.where(reached & np.isfinite(score) & (score != 0), scaled, score)


def degree(keys: Floats, *, valid: Mask | None = None, dtype: str = "float32") -> NDArray[np.float64]:
    """Compare every valid key with the mean direction of its row."""
    valid = np.ones(keys.shape[:-1], np.bool_) if valid is None else valid
    directions = np.where(valid[..., None], _directions(keys, dtype), 0)
    number = np.maximum(np.sum(valid, axis=-1, keepdims=True), 1)
    mean = np.sum(directions, axis=-2) / number
    return np.asarray(np.clip(np.sum(directions * mean[..., None, :], axis=-1), -1, 1))


def distance(keys: Floats, *, valid: Mask | None = None, dtype: str = "float32") -> NDArray[np.float64]:
    """One minus the degree, as half the mean of all squared differences, of keys that all have a direction."""
    valid = np.ones(keys.shape[:-1], np.bool_) if valid is None else valid
    directions = _directions(keys, dtype)
    number = np.maximum(np.sum(valid, axis=-1, keepdims=True), 1)
    result = np.ones(keys.shape[:-1])
    for token in range(keys.shape[-2]):
        apart = np.sum((directions - directions[..., token : token + 1, :]) ** 2, axis=-1)
        result[..., token] = np.sum(apart * valid, axis=-1) / number[..., 0] / 2
    return np.where(valid, result, 1)


def fuse(
    importance: Floats, degrees: Floats, *, fusion: str = "power", exponent: int = 1, valid: Mask | None = None
) -> NDArray[np.float64]:
    """Put importance and distance from the others together, among the valid tokens."""
    valid = np.ones(importance.shape, np.bool_) if valid is None else valid
    score = importance.astype(np.float64)
    distance = 1 - np.clip(np.nan_to_num(degrees.astype(np.float64), nan=0.0, posinf=1, neginf=-1), -1, 1)
    with np.errstate(all="ignore"):
        if fusion == "power":
            number = np.where(valid & np.isfinite(score), score, 0)
            lowest = np.min(number, axis=-1, keepdims=True, initial=0)
            fused = (score - lowest) * np.clip(distance**exponent, SMALLEST_POWER, LARGEST_POWER)
        else:
            number_valid = np.sum(valid, axis=-1, keepdims=True)
            # In the dtype of the call: what is equal there must be equal here.
            narrow = distance.astype(np.result_type(importance, degrees))
            order = [np.argsort(top_k(x, x.shape[-1], ~valid), axis=-1) for x in (importance, narrow)]
            ranks = [number_valid - place for place in order]
            fused = np.maximum(*ranks) if fusion == "max_rank" else (ranks[0] + ranks[1]) / 2
    return np.where(valid, fused, score)


def pagerank(
    importance: Floats,
    keys: Floats,
    *,
    damping: float = 0.15,
    rounds: int = 10,
    valid: Mask | None = None,
    dtype: str = "float32",
) -> NDArray[np.float64]:
    """Let importance flow between the tokens that take part, with teleports back to where it was."""
    score = importance.astype(np.float64)
    takes_part = np.isfinite(score) if valid is None else np.isfinite(score) & valid
    directions = np.where(takes_part[..., None], _directions(keys, dtype), 0)
    shifted = np.where(takes_part, score, 0)
    shifted = shifted - np.min(shifted, axis=-1, keepdims=True, initial=0)
    size = np.sum(shifted, axis=-1, keepdims=True, where=takes_part)
    central = teleport = _shares(np.where(takes_part, np.where(size > 0, shifted, 1.0), 0.0))
    for _ in range(rounds):
        anchor = np.sum(central[..., None] * directions, axis=-2)
        near = np.sum(central, axis=-1, keepdims=True) + np.sum(directions * anchor[..., None, :], axis=-1)
        central = damping * _shares(near * takes_part) + (1 - damping) * teleport
    return np.where(takes_part, central * np.where(size > 0, size, 1), score)


def _shares(x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.sum(x, axis=-1, keepdims=True)
    return x / np.where(total > 0, total, 1)


def select(scores: Floats, budget: int, *, protected: Mask | None = None, valid: Mask | None = None) -> Indices:
    """Keep the first `budget` of: protected valid tokens, other valid tokens, invalid tokens."""
    tiers = np.ones(scores.shape, np.int32) if protected is None else np.where(protected, 0, 1)
    tiers = tiers if valid is None else np.where(valid, tiers, 2)
    return np.sort(top_k(scores, budget, tiers), axis=-1)


def received(queries: Floats, keys: Floats, valid: Mask) -> NDArray[np.float64]:
    """Sum the columns of the causal softmax of the last positions: (batch, kv_heads, groups, N).

    Keys and queries with an infinity or NaN have no part in it, as padding has none.
    """
    batch, query_heads, num_queries, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1:3]
    grouped = queries.astype(np.float64).reshape(batch, kv_heads, query_heads // kv_heads, num_queries, head_size)
    gives, receives = np.all(np.isfinite(grouped), axis=-1), np.all(np.isfinite(keys), axis=-1)
    grouped = np.where(gives[..., None], grouped, 0)
    seen = np.where((valid & receives)[..., None], keys.astype(np.float64), 0)
    logits = grouped @ np.swapaxes(seen, -1, -2)[:, :, None] / np.sqrt(head_size)
    position = np.arange(num_tokens - num_queries, num_tokens)[:, None]
    sees = (np.arange(num_tokens) <= position) & (valid & receives)[:, :, None, None, :] & gives[..., None]
    sees = sees & valid[:, :, None, num_tokens - num_queries :, None]
    highest = np.max(np.where(sees, logits, -np.inf), axis=-1, keepdims=True, initial=-1e300)
    weight = np.where(sees, np.exp(np.where(sees, logits - highest, 0)), 0)
    total = np.sum(weight, axis=-1, keepdims=True)
    return np.asarray(np.sum(weight / np.where(total > 0, total, 1), axis=-2))
