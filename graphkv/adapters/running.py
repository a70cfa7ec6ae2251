"""Attention summed over time: what H2O and RoCo know of each token, folded in block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..core import primitives
from ..core.attention import received_attention, window_attention
from ..core.errors import ArgumentError
from ..core.policy import LayerInputs
from ..core.types import Array, Namespace

__all__ = ["accumulate", "new_rows", "newly_received", "state_of", "state_or_zeros", "visible_queries"]


def accumulate(total: Array, rows: Array, /, *, xp: Namespace) -> Array:
    """Add rows of queries to the sums of the tokens that they see.

    Parameters
    ----------
    total : array, shape (..., N)
    rows : array, shape (..., Q, E)
        What Q queries give to the first E <= N tokens.

    Returns
    -------
    array, shape (..., N)
        A new array.
    """
    end = rows.shape[-1]
    return xp.concat([total[..., :end] + xp.sum(rows, axis=-2), total[..., end:]], axis=-1)


def new_rows(inputs: LayerInputs, block_size: int, /, *, name: str) -> Iterator[Array]:
    """Give the attention of all new positions, a block of queries at a time, each row whole.

    A row needs the keys up to its own position only, and all of them are at hand, so its softmax needs no second pass
    and the N x N matrix never exists.

    Parameters
    ----------
    inputs : LayerInputs
        With queries, or attention rows.
    block_size : int
        Queries per block.
    name : str
        The policy that asks.

    Yields
    ------
    array, shape (batch, kv_heads, query_heads / kv_heads, block, E)
        Probabilities to the first E tokens, up to the block's last position. Zero for padding, either way.

    Raises
    ------
    ArgumentError
        If there are fewer rows than new positions.
    """
    xp = inputs.xp
    rows = _new_positions(inputs, name=name)
    num_new = rows.shape[2]
    for start in range(0, num_new, block_size):
        stop = min(start + block_size, num_new)
        end = inputs.num_seen + stop
        block, valid = rows[:, :, start:stop, :], inputs.valid[:, :, :end]
        if inputs.attention is None:
            yield window_attention(block, inputs.keys[:, :, :end, :], valid, xp=xp)
        else:
            yield _given_rows(block[..., :end], valid, xp=xp)


def newly_received(inputs: LayerInputs, block_size: int, /, *, name: str) -> Array:
    """Sum what `new_rows` gives each token, without the rows where queries are at hand.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)

    Raises
    ------
    ArgumentError
        If there are fewer rows than new positions.
    """
    xp, rows = inputs.xp, _new_positions(inputs, name=name)
    if inputs.attention is None:
        return received_attention(rows, inputs.keys, inputs.valid, block_size=block_size, backend=inputs.backend)
    batch, kv_heads, num_tokens = inputs.valid.shape
    shape = (batch, kv_heads, rows.shape[1] // kv_heads, num_tokens)
    total = xp.zeros(shape, dtype=rows.dtype, device=primitives.device_of(rows))
    for block in new_rows(inputs, block_size, name=name):
        total = accumulate(total, block, xp=xp)
    return total


def visible_queries(inputs: LayerInputs, /) -> Array:
    """Count, for every token, the new positions that can see it: its own and the later ones, padding left out.

    Returns
    -------
    array, shape (batch, kv_heads, N), dtype of the keys
    """
    xp = inputs.xp
    position = xp.arange(inputs.num_tokens, dtype=xp.int64, device=primitives.device_of(inputs.keys))
    asks = xp.astype(inputs.valid & (position[None, None, :] >= inputs.num_seen), xp.int64)
    later = xp.sum(asks, axis=-1, keepdims=True) - xp.cumulative_sum(asks, axis=-1)
    return xp.astype(xp.where(inputs.valid, later + asks, xp.zeros_like(asks)), inputs.keys.dtype)


def state_of(inputs: LayerInputs, names: tuple[str, ...], /, *, name: str) -> Mapping[str, Array]:
    """Give the running state, complete.

    Raises
    ------
    ArgumentError
        If there is none yet, or if it is another policy's.
    """
    if inputs.state is None:
        raise ArgumentError(
            f"queries must be given for {name}: all {inputs.num_tokens} positions, or those since state; got None"
        )
    if set(inputs.state) != set(names):
        raise ArgumentError(f"state must hold {sorted(names)} for {name}; got {sorted(inputs.state)}")
    return inputs.state


def state_or_zeros(
    inputs: LayerInputs, names: tuple[str, ...], /, *, per_query_head: tuple[str, ...] = (), name: str
) -> Mapping[str, Array]:
    """Give the running state to add to: zeros at the first call, with an axis more for sums of single query heads."""
    if inputs.state is not None:
        return state_of(inputs, names, name=name)
    given = inputs.attention if inputs.attention is not None else inputs.queries
    rows = tuple(inputs.valid.shape)
    groups = 1 if given is None else given.shape[1] // rows[1]
    like = {"dtype": inputs.keys.dtype, "device": primitives.device_of(inputs.keys)}
    return {each: inputs.xp.zeros((*rows, groups) if each in per_query_head else rows, **like) for each in names}


def _new_positions(inputs: LayerInputs, /, *, name: str) -> Array:
    """Give the attention rows or the queries, whichever are at hand, of the new positions."""
    rows = inputs.attention if inputs.attention is not None else inputs.queries
    argument = "attention" if inputs.attention is not None else "queries"
    num_new = inputs.num_tokens - inputs.num_seen
    num_given = 0 if rows is None else rows.shape[2]
    if rows is None or num_given < num_new:
        raise ArgumentError(f"{argument} must hold all {num_new} new positions for {name}; got {num_given}")
    return rows[:, :, num_given - num_new :, :]


def _given_rows(rows: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Share given rows out over the KV heads, and clear what a causal softmax over valid tokens leaves at zero."""
    batch, query_heads, block, end = rows.shape
    kv_heads = valid.shape[1]
    rows = xp.reshape(rows, (batch, kv_heads, query_heads // kv_heads, block, end))
    position = xp.arange(end, dtype=xp.int64, device=primitives.device_of(rows))
    sees = (position[None, :] <= position[end - block :, None]) & valid[:, :, None, None, :]
    return xp.where(sees & valid[:, :, None, end - block :, None], rows, xp.zeros_like(rows))
