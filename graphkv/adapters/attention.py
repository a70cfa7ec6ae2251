"""Parts that the papers' scorers share, in the array API standard."""

from __future__ import annotations

from ..core import primitives
from ..core.attention import received_attention, window_attention
from ..core.layer import Cost, Layer, LayerShape
from ..core.types import Array, Namespace
from . import running

__all__ = ["group_heads", "last_rows", "mean_received", "pool", "received", "window_cost"]


def group_heads(x: Array, reduction: str, /, *, xp: Namespace) -> Array:
    """Reduce the query heads of each KV head: (batch, kv_heads, groups, ...) to (batch, kv_heads, ...)."""
    reduce = {"mean": xp.mean, "max": xp.max, "sum": xp.sum}[reduction]
    return reduce(x, axis=2)


def pool(x: Array, kernel_size: int, kind: str, /, *, xp: Namespace) -> Array:
    """Smooth along the last axis with stride 1, keeping the length.

    As in the papers' code, an average at the edge still divides by the whole kernel; a maximum ignores what is outside.
    An even kernel reaches one further back than ahead.
    """
    num_tokens, reach = x.shape[-1], kernel_size // 2
    outside = 0.0 if kind == "avg" else -xp.inf
    edge = xp.full((*x.shape[:-1], reach), outside, dtype=x.dtype, device=primitives.device_of(x))
    padded = xp.concat([edge, x, edge], axis=-1)
    pooled = padded[..., :num_tokens]
    for offset in range(1, kernel_size):
        shifted = padded[..., offset : offset + num_tokens]
        pooled = pooled + shifted if kind == "avg" else xp.maximum(pooled, shifted)
    return pooled / kernel_size if kind == "avg" else pooled


def last_rows(layer: Layer, window: int, /) -> Array:
    """Take the attention of the last W positions as given, or compute it from their queries.

    Parameters
    ----------
    layer : Layer
    window : int
        W, at most N.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, W, N)
        Probabilities.
    """
    rows = _last(layer, window)
    if layer.attention is None:
        return window_attention(rows, layer.keys, layer.valid, mass=layer.mass, xp=layer.xp)
    batch, query_heads, _, num_tokens = rows.shape
    kv_heads = layer.keys.shape[1]
    return layer.xp.reshape(rows, (batch, kv_heads, query_heads // kv_heads, window, num_tokens))


def received(layer: Layer, window: int, /) -> Array:
    """Sum the attention that each token receives from the last W positions, the rows of `last_rows`.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)
    """
    xp = layer.xp
    if layer.attention is not None:
        return xp.sum(last_rows(layer, window), axis=-2)
    rows = _last(layer, window)
    return received_attention(rows, layer.keys, layer.valid, mass=layer.mass, block_size=window, backend=layer.backend)


def _last(layer: Layer, window: int, /) -> Array:
    """Return the last W attention rows or queries, whichever were given."""
    rows: Array = layer.attention if layer.attention is not None else layer.queries
    return rows[:, :, rows.shape[2] - window :, :]


def window_cost(shape: LayerShape, window: int, /) -> Cost:
    """Return the cost of the attention of the last W positions: 2 D for a logit and 5 for its softmax, per query head.

    In memory: that attention to all tokens, or the keys without infinities and NaN where those are more.
    """
    entries = shape.batch * shape.query_heads * min(window, shape.num_tokens) * shape.num_tokens
    keys = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
    return Cost(entries * (2 * shape.head_size + 5), 4 * max(entries, keys))


def mean_received(layer: Layer, window: int, /) -> Array:
    """Return the mean attention that each token receives from those of the last positions that can see it.

    Parameters
    ----------
    layer : Layer
        With queries, or attention rows.
    window : int
        W, positions that count; fewer where fewer are given.

    Returns
    -------
    array, shape (batch, kv_heads, N)
        At least 0, averaged over the query heads of the KV head; 0 for padding.
    """
    xp, rows = layer.xp, layer.attention if layer.attention is not None else layer.queries
    window = min(window, rows.shape[2])  # type: ignore[union-attr]
    total = group_heads(received(layer, window), "mean", xp=xp)
    number = running.visible_queries(layer, window)
    mean = total / xp.where(number > 0, number, xp.ones_like(number))
    return xp.where(layer.valid & (mean > 0), mean, xp.zeros_like(mean))
