"""Merges: dropped tokens that go into kept ones, and what the kept ones then count as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from . import primitives
from .backend import Backend
from .graph import normalize
from .types import Array

__all__ = ["Merge", "add_up", "chunk_for", "compressed", "nearest", "shares", "slots"]

# Similarities are computed for this many tokens at a time,
CHUNK_SIZE = 1024
# or for fewer, so that all rows together have at most as many: 64 MB.
LARGEST = 1 << 24
# Whole numbers that float32 holds.
EXACT = 1 << 24
# Added to the cosine with what may not be found. No cosine comes near it.
EXCLUDED = -(2.0**100)


@dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    r"""Where each token goes, and with which weight.

    A merge changes neither who is kept nor positions nor protection. A slot's key and value are sums,

    .. math:: k_s = \sum_{j \to s} w^k_j k_j, \qquad v_s = \sum_{j \to s} w^v_j v_j,

    over the tokens that go into it, the kept one among them; weights that add up to 1 in a slot make an average. With
    one token each, the masses add up to the tokens that are kept or absorbed.

    Attributes
    ----------
    into : array, shape (batch, kv_heads, N), integer
        The slot 0 .. b-1 that a token goes into, -1 for a token that is dropped. A kept token goes into its own slot.
    key_weights, value_weights : array, shape (batch, kv_heads, N), float32 or wider
        Weights of the sums that make a slot's key and value. What has weight 0 is not read.
    mass : array, shape (batch, kv_heads, b), float32 or wider
        Tokens that a slot counts as: attention adds its logarithm to the slot's logit. 0 where a row has no token.
    memory : mapping of str to array, shape (batch, ...)
        What the policy now remembers of the layer, in place of the arrays of those names in its `Memory`.
    """

    into: Array
    key_weights: Array
    value_weights: Array
    mass: Array
    memory: Mapping[str, Array] = field(default_factory=dict)


def slots(kept: Array, num_tokens: int, /, *, backend: Backend) -> Array:
    """Return the slot of every kept token, and -1 for all others.

    Parameters
    ----------
    kept : array, shape (..., b), integer
        Positions, ascending; -1 fills.
    num_tokens : int
        N.
    backend : Backend

    Returns
    -------
    array, shape (..., N), integer
    """
    xp, num_slots = backend.xp, kept.shape[-1]
    place = xp.arange(1, num_slots + 1, dtype=kept.dtype, device=primitives.device_of(kept))
    index = xp.where(kept >= 0, kept, xp.full_like(kept, num_tokens))

    def found(part: Array) -> Array:
        part = xp.broadcast_to(xp.astype(part, xp.float32), kept.shape)
        total = primitives.segment_sum(part, index, num_tokens + 1, backend=backend)
        return xp.astype(total[..., :num_tokens], kept.dtype)

    # Counted in float32, in which sums are: exact up to 16 million. More slots are counted by two digits.
    if num_slots < EXACT:
        return found(place) - 1
    return found(place // EXACT) * EXACT + found(place % EXACT) - 1


def compressed(x: Array, gathered: Array, kept: Array, into: Array, weights: Array, /, *, backend: Backend) -> Array:
    """Sum what goes into each slot, in float32 or wider.

    Parameters
    ----------
    x : array, shape (..., N, D)
    gathered : array, shape (..., b, D)
        The kept tokens of `x`. A slot that holds its own token, with weight 1 and nothing beside it, is that token bit
        for bit.
    kept : array, shape (..., b), integer
    into, weights : arrays, shape (..., N)
        As in `Merge`.

    Returns
    -------
    array, shape (..., b, D), dtype of `x`
    """
    xp, num_slots = backend.xp, kept.shape[-1]
    wide = primitives.widen(x, xp=xp)
    # What has no weight must not bring a NaN into a sum.
    is_used = (weights != 0)[..., None]
    parts = xp.where(is_used, wide, xp.zeros_like(wide)) * weights[..., None]
    total = primitives.sum_rows(parts, into, num_slots, backend=backend)
    own = (slots(kept, x.shape[-2], backend=backend) == into) & (into >= 0)
    change = xp.abs(weights - xp.astype(own, weights.dtype))
    is_changed = add_up(change, into, num_slots, backend=backend) > 0
    return xp.where(is_changed[..., None], xp.astype(total, x.dtype), gathered)


def chunk_for(rows: int, num_slots: int, /) -> int:
    """Return for how many tokens `nearest` computes similarities at a time, with b slots in each row."""
    return max(16, min(CHUNK_SIZE, LARGEST // max(1, rows * num_slots)))


def nearest(
    keys: Array, kept: Array, is_target: Array, /, *, backend: Backend, chunk_size: int | None = None
) -> tuple[Array, Array]:
    """Find, for every token that is not kept, the kept token whose key is most similar.

    Parameters
    ----------
    keys : array, shape (..., N, D), float32 or wider
        A key without a direction has cosine 0 with all others.
    kept : array, shape (..., b), integer
        Positions, ascending; -1 fills.
    is_target : array, shape (..., N), bool
        Which kept tokens may be found.
    backend : Backend
    chunk_size : int, optional
        At most b x `chunk_size` similarities exist per row at a time. Affects rounding only. Default: `chunk_for`.

    Returns
    -------
    slot : array, shape (..., N), integer
        Of equal cosines the lower slot. Kept tokens have their own.
    similarity : array, shape (..., N), dtype of `keys`
        The cosine; -infinity where there is no target.
    """
    xp, num_tokens, num_slots = backend.xp, keys.shape[-2], kept.shape[-1]
    own = slots(kept, num_tokens, backend=backend)
    nothing = xp.full(own.shape, -xp.inf, dtype=keys.dtype, device=primitives.device_of(keys))
    if num_slots == 0:
        return xp.zeros_like(own), nothing
    directions = normalize(keys, xp=xp)
    place = xp.where(kept >= 0, kept, xp.zeros_like(kept))
    may_be = (kept >= 0) & xp.take_along_axis(is_target, place, axis=-1)
    # One more entry of every direction excludes what may not be found: the product adds it.
    bias = xp.where(may_be, xp.zeros_like(nothing[..., :1]), xp.full_like(nothing[..., :1], EXCLUDED))
    targets = xp.concat([primitives.take_rows(directions, place, xp=xp), bias[..., None]], axis=-1)
    targets = xp.matrix_transpose(targets)
    directions = xp.concat([directions, xp.ones_like(directions[..., :1])], axis=-1)
    slot, similarity = [], []
    chunk_size = chunk_for(prod(keys.shape[:-2]), num_slots) if chunk_size is None else chunk_size
    for start in range(0, num_tokens, chunk_size):
        cosines = directions[..., start : min(start + chunk_size, num_tokens), :] @ targets
        best = xp.argmax(cosines, axis=-1, keepdims=True)
        slot.append(xp.astype(best[..., 0], kept.dtype))
        similarity.append(xp.take_along_axis(cosines, best, axis=-1)[..., 0])
    found = xp.concat(similarity, axis=-1)
    found = xp.where((own >= 0) | (found < EXCLUDED / 2), nothing, found)
    return xp.where(own >= 0, own, xp.concat(slot, axis=-1)), found


def add_up(weights: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Add the weights of what goes into each slot.

    Parameters
    ----------
    weights : array, shape (..., N), float32 or wider
    into : array, shape (..., N), integer in [-1, num_slots)
    num_slots : int

    Returns
    -------
    array, shape (..., num_slots)
    """
    xp = backend.xp
    index = xp.where(into >= 0, into, xp.full_like(into, num_slots))
    return primitives.segment_sum(weights, index, num_slots + 1, backend=backend)[..., :num_slots]


def shares(weights: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Divide weights by their sum in each slot.

    Parameters
    ----------
    weights : array, shape (..., N), float32 or wider
        At least 0.
    into : array, shape (..., N), integer in [-1, num_slots)
    num_slots : int

    Returns
    -------
    array, shape (..., N)
        Exactly 1 for a token alone in its slot; 0 for a token that goes nowhere, and where a slot has no weight.
    """
    xp = backend.xp
    if num_slots == 0:
        return xp.zeros_like(weights)
    total = add_up(weights, into, num_slots, backend=backend)
    total = xp.take_along_axis(total, xp.where(into >= 0, into, xp.zeros_like(into)), axis=-1)
    is_part = (into >= 0) & (total > 0)
    return xp.where(is_part, weights / xp.where(is_part, total, xp.ones_like(total)), xp.zeros_like(weights))
