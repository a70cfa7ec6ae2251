"""What the papers' scorers share, written in the array API standard."""

from __future__ import annotations

from typing import Any

from ..core import primitives
from ..core.attention import received_attention, window_attention
from ..core.errors import ArgumentError
from ..core.policy import LayerInputs, LayerShape
from ..core.types import Array, Namespace

__all__ = [
    "first_tokens",
    "group_heads",
    "last_rows",
    "pool",
    "received",
    "token_rank",
    "window_bytes",
    "window_flops",
]


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


def first_tokens(valid: Array, num_sinks: int, /, *, xp: Namespace) -> Array:
    """Mark the first `num_sinks` tokens of each row that are not padding."""
    return valid & (token_rank(valid, xp=xp) < num_sinks)


def last_rows(inputs: LayerInputs, window: int, /, *, name: str) -> Array:
    """Take the attention of the last W positions as given, or compute it from their queries.

    Parameters
    ----------
    inputs : LayerInputs
    window : int
        W, at most N.
    name : str
        The policy that asks.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, W, N)
        Probabilities.

    Raises
    ------
    ArgumentError
        If neither queries nor attention of the last W positions are at hand.
    """
    rows = _last(inputs, window, name=name)
    if inputs.attention is None:
        return window_attention(rows, inputs.keys, inputs.valid, xp=inputs.xp)
    batch, query_heads, _, num_tokens = rows.shape
    kv_heads = inputs.keys.shape[1]
    return inputs.xp.reshape(rows, (batch, kv_heads, query_heads // kv_heads, window, num_tokens))


def received(inputs: LayerInputs, window: int, /, *, name: str) -> Array:
    """Sum what each token gets from the last W positions, as `last_rows` would give it row by row.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)
    """
    xp = inputs.xp
    if inputs.attention is not None:
        return xp.sum(last_rows(inputs, window, name=name), axis=-2)
    rows = _last(inputs, window, name=name)
    return received_attention(rows, inputs.keys, inputs.valid, block_size=window, backend=inputs.backend)


def _last(inputs: LayerInputs, window: int, /, *, name: str) -> Array:
    """Give the last W attention rows or queries, whichever are at hand."""
    rows = inputs.attention if inputs.attention is not None else inputs.queries
    argument = "attention" if inputs.attention is not None else "queries"
    if rows is None:
        raise ArgumentError(f"queries must be given for {name}: the last window={window} positions; got None")
    if rows.shape[2] < window:
        raise ArgumentError(f"{argument} must hold the last window={window} positions; got {rows.shape[2]}")
    return rows[:, :, rows.shape[2] - window :, :]


def window_flops(policy: Any, shape: LayerShape, /) -> int:
    """Attention of the last W positions: 2 D for a logit and 5 for its softmax, per query head."""
    rows = shape.batch * shape.query_heads * policy.num_queries(shape.num_tokens)
    return int(rows * shape.num_tokens * (2 * shape.head_size + 5))


def window_bytes(policy: Any, shape: LayerShape, /) -> int:
    """Hold the attention of the last W positions to all tokens."""
    return int(4 * shape.batch * shape.query_heads * policy.num_queries(shape.num_tokens) * shape.num_tokens)
