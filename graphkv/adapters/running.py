"""Attention summed over time: what H2O and RoCo know of each token, folded in block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..core import primitives
from ..core.attention import received_attention, window_attention
from ..core.layer import Layer, Memory
from ..core.types import Array, Namespace

__all__ = ["accumulate", "grown", "mean_attention", "new_rows", "newly_received", "sums_of", "visible_queries"]


def accumulate(total: Array, rows: Array, /, *, xp: Namespace) -> Array:
    """Add rows of queries to the sums of the tokens that they see.

    Parameters
    ----------
    total : array, shape (..., N)
    rows : array, shape (..., Q, E)
        Attention of Q queries to the first E <= N tokens.

    Returns
    -------
    array, shape (..., N)
        A new array.
    """
    end = rows.shape[-1]
    return xp.concat([total[..., :end] + xp.sum(rows, axis=-2), total[..., end:]], axis=-1)


def new_rows(layer: Layer, block_size: int, /) -> Iterator[Array]:
    """Yield the attention of all new positions, a block of queries at a time, each row whole.

    A row needs the keys up to its own position only, and all of them are there, so its softmax needs no second pass
    and the N x N matrix never exists.

    Parameters
    ----------
    layer : Layer
        With queries, or attention rows.
    block_size : int
        Queries per block.

    Yields
    ------
    array, shape (batch, kv_heads, query_heads / kv_heads, block, E)
        Probabilities to the first E tokens, up to the block's last position. Zero for padding, either way.

    """
    xp = layer.xp
    rows = _new_positions(layer)
    num_new = rows.shape[2]
    for start in range(0, num_new, block_size):
        stop = min(start + block_size, num_new)
        end = layer.num_tokens - num_new + stop
        block, valid = rows[:, :, start:stop, :], layer.valid[:, :, :end]
        if layer.attention is None:
            mass = None if layer.mass is None else layer.mass[:, :, :end]
            yield window_attention(block, layer.keys[:, :, :end, :], valid, mass=mass, xp=xp)
        else:
            yield _given_rows(block[..., :end], valid, xp=xp)


def newly_received(layer: Layer, block_size: int, /) -> Array:
    """Sum the attention of `new_rows` to each token; with queries, without holding the rows.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)
    """
    xp, rows = layer.xp, _new_positions(layer)
    if layer.attention is None:
        return received_attention(
            rows, layer.keys, layer.valid, mass=layer.mass, block_size=block_size, backend=layer.backend
        )
    batch, kv_heads, num_tokens = layer.valid.shape
    shape = (batch, kv_heads, rows.shape[1] // kv_heads, num_tokens)
    total = xp.zeros(shape, dtype=rows.dtype, device=primitives.device_of(rows))
    for block in new_rows(layer, block_size):
        total = accumulate(total, block, xp=xp)
    return total


def visible_queries(layer: Layer, number: int | None = None, /) -> Array:
    """Count, for every token, the last positions that can see it: its own and the later ones, padding left out.

    Parameters
    ----------
    layer : Layer
    number : int, optional
        How many of the last positions count. Default: those that are new.

    Returns
    -------
    array, shape (batch, kv_heads, N), dtype of the keys
    """
    xp = layer.xp
    number = layer.num_new if number is None else number
    position = xp.arange(layer.num_tokens, dtype=xp.int64, device=primitives.device_of(layer.keys))
    asks = xp.astype(layer.valid & (position[None, None, :] >= layer.num_tokens - number), xp.int64)
    later = xp.sum(asks, axis=-1, keepdims=True) - xp.cumulative_sum(asks, axis=-1)
    return xp.astype(xp.where(layer.valid, later + asks, xp.zeros_like(asks)), layer.keys.dtype)


def grown(memory: Memory | None, layer: Layer, name: str, /, *, per_query_head: bool = False) -> Array:
    """Return the sums to add to: zeros for tokens that are new, and for all of them at the first call.

    Parameters
    ----------
    memory : Memory or None
    layer : Layer
        With queries, or attention rows.
    name : str
        Of the array in the memory.
    per_query_head : bool
        Keep the query heads of a KV head apart, in a last axis.

    Returns
    -------
    array, shape (batch, kv_heads, N) or (batch, kv_heads, N, query_heads / kv_heads)
    """
    xp, (batch, kv_heads, num_tokens) = layer.xp, layer.valid.shape
    heads = (_new_positions(layer).shape[1] // kv_heads,) if per_query_head else ()
    if memory is None:
        shape = (batch, kv_heads, num_tokens, *heads)
        return xp.zeros(shape, dtype=layer.keys.dtype, device=primitives.device_of(layer.keys))
    old = memory.tokens[name]
    shape = (batch, kv_heads, num_tokens - old.shape[2], *heads)
    return xp.concat([old, xp.zeros(shape, dtype=old.dtype, device=primitives.device_of(old))], axis=2)


def sums_of(memory: Memory | None, /) -> Mapping[str, Array]:
    """Return the arrays per token, which `evict` has seen to."""
    return {} if memory is None else memory.tokens


def _new_positions(layer: Layer, /) -> Array:
    """Return the attention rows or the queries, whichever were given, of the new positions."""
    rows: Array = layer.attention if layer.attention is not None else layer.queries
    return rows[:, :, rows.shape[2] - layer.num_new :, :]


def _given_rows(rows: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Share given rows out over the KV heads, and clear what a causal softmax over valid tokens leaves at zero."""
    batch, query_heads, block, end = rows.shape
    kv_heads = valid.shape[1]
    rows = xp.reshape(rows, (batch, kv_heads, query_heads // kv_heads, block, end))
    position = xp.arange(end, dtype=xp.int64, device=primitives.device_of(rows))
    sees = (position[None, :] <= position[end - block :, None]) & valid[:, :, None, None, :]
    return xp.where(sees & valid[:, :, None, end - block :, None], rows, xp.zeros_like(rows))


def mean_attention(memory: Memory | None, layer: Layer, /) -> Array:
    """Return the mean attention that each token received so far from the queries that could see it.

    Parameters
    ----------
    memory : Memory or None
        With the arrays ``"attention"``, per query head or not, and ``"queries"``.
    layer : Layer

    Returns
    -------
    array, shape (batch, kv_heads, N)
        0 for padding, and where nothing is remembered.
    """
    xp, sums = layer.xp, sums_of(memory)
    if "attention" not in sums:
        return xp.zeros_like(layer.keys[..., 0])
    total, number = sums["attention"], sums["queries"]
    total = xp.mean(total, axis=-1) if total.ndim > number.ndim else total
    mean = total / xp.where(number > 0, number, xp.ones_like(number))
    return xp.where(layer.valid & (mean > 0), mean, xp.zeros_like(mean))
