"""What the papers' scorers share, written in the array API standard."""

from __future__ import annotations

from math import sqrt

from ..core import primitives
from ..core.types import Array, Namespace

__all__ = ["group_heads", "pool", "token_rank", "window_attention"]


def window_attention(queries: Array, keys: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Softmax attention of the last W positions to all N keys, causal inside the window.

    Query heads are folded into the rows of one product per KV head, so no key is repeated.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, W, D)
        The last W positions.
    keys : array, shape (batch, kv_heads, N, D)
    valid : array, shape (batch, kv_heads, N), bool
        Padding receives no attention, and a padded query gives none.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, W, N)
        Probabilities.
    """
    batch, query_heads, window, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    groups = query_heads // kv_heads
    rows = xp.reshape(queries, (batch, kv_heads, groups * window, head_size))
    logits = rows @ xp.matrix_transpose(keys) / sqrt(head_size)
    logits = xp.reshape(logits, (batch, kv_heads, groups, window, num_tokens))

    device = primitives.device_of(keys)
    query_position = xp.arange(num_tokens - window, num_tokens, dtype=xp.int64, device=device)[:, None]
    causal = xp.arange(num_tokens, dtype=xp.int64, device=device)[None, :] <= query_position
    sees = causal & valid[:, :, None, None, :] & valid[:, :, None, num_tokens - window :, None]
    lowest = xp.full_like(logits, -xp.inf)
    logits = xp.where(sees, logits, lowest)
    highest = xp.max(logits, axis=-1, keepdims=True)
    # A padded query sees nothing: its row is all minus infinity, and stays all zero.
    highest = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weight = xp.exp(logits - highest)
    total = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(total > 0, total, xp.ones_like(total))


def group_heads(x: Array, reduction: str, /, *, xp: Namespace) -> Array:
    """Reduce the query heads of each KV head: (batch, kv_heads, groups, ...) to (batch, kv_heads, ...)."""
    reduce = {"mean": xp.mean, "max": xp.max, "sum": xp.sum}[reduction]
    return reduce(x, axis=2)


def pool(x: Array, kernel_size: int, kind: str, /, *, xp: Namespace) -> Array:
    """Smooth along the last axis with an odd kernel and stride 1, keeping the length.

    As in the papers' code, an average at the edge still divides by the whole kernel; a maximum ignores what is outside.
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


def token_rank(valid: Array, /, *, xp: Namespace) -> Array:
    """Count valid tokens before each token: its place in the row once padding is taken away."""
    return xp.cumulative_sum(xp.astype(valid, xp.int64), axis=-1) - 1
