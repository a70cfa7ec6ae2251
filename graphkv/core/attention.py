"""Plain attention: the probabilities of the last positions, and what every token receives of them."""

from __future__ import annotations

from math import sqrt

from . import primitives
from .backend import Backend, ReceivedAttention
from .types import Array, Namespace

__all__ = ["portable_received_attention", "received_attention", "window_attention"]


def window_attention(queries: Array, keys: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Compute the softmax attention of the last W positions to all N keys, causal inside the window.

    Query heads are folded into the rows of one product per KV head, so no key is repeated.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, W, D)
        The last W positions.
    keys : array, shape (batch, kv_heads, N, D)
    valid : array, shape (batch, kv_heads, N), bool
        Padding receives no attention, and a padded query gives none. Keys and queries that hold an infinity or NaN
        count as padding.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, W, N)
        Probabilities.
    """
    queries, gives = primitives.finite_rows(queries, xp=xp)
    keys, receives = primitives.finite_rows(keys, xp=xp)
    batch, query_heads, window, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    groups = query_heads // kv_heads
    rows = xp.reshape(queries, (batch, kv_heads, groups * window, head_size))
    logits = rows @ xp.matrix_transpose(keys) / sqrt(max(head_size, 1))
    logits = xp.reshape(logits, (batch, kv_heads, groups, window, num_tokens))

    device = primitives.device_of(keys)
    query_position = xp.arange(num_tokens - window, num_tokens, dtype=xp.int64, device=device)[:, None]
    causal = xp.arange(num_tokens, dtype=xp.int64, device=device)[None, :] <= query_position
    gives = xp.reshape(gives, (batch, kv_heads, groups, window, 1))
    sees = (
        causal[None, None, None, :, :]
        & (valid & receives)[:, :, None, None, :]
        & valid[:, :, None, num_tokens - window :, None]
        & gives
    )
    lowest = xp.full_like(logits, -xp.inf)
    logits = xp.where(sees, logits, lowest)
    highest = xp.max(logits, axis=-1, keepdims=True)
    # A padded query sees nothing: its row is all minus infinity, and stays all zero.
    highest = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weight = xp.exp(logits - highest)
    total = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(total > 0, total, xp.ones_like(total))


def received_attention(queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend) -> Array:
    """Sum the attention that each token receives from the last Q positions: the columns of `window_attention`.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, Q, D)
        The last Q positions.
    keys : array, shape (batch, kv_heads, N, D)
    valid : array, shape (batch, kv_heads, N), bool
        As for `window_attention`.
    block_size : int
        Queries per head processed at once. Affects rounding only.
    backend : Backend

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)
    """
    step: ReceivedAttention = backend.received_attention or portable_received_attention
    return step(queries, keys, valid, block_size=block_size, backend=backend)


def portable_received_attention(
    queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend
) -> Array:
    """Sum block by block, so that the rows never exist all at once: the specification of `received_attention`.

    A row needs only the keys up to its own position, and all of them are given, so its softmax needs no second pass.
    """
    xp = backend.xp
    batch, query_heads, num_queries, _ = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    shape = (batch, kv_heads, query_heads // kv_heads, num_tokens)
    total = xp.zeros(shape, dtype=keys.dtype, device=primitives.device_of(keys))
    for start in range(0, num_queries, block_size):
        stop = min(start + block_size, num_queries)
        end = num_tokens - num_queries + stop
        rows = window_attention(queries[:, :, start:stop, :], keys[:, :, :end, :], valid[:, :, :end], xp=xp)
        total = xp.concat([total[..., :end] + xp.sum(rows, axis=-2), total[..., end:]], axis=-1)
    return total
