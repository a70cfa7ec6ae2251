"""Parts that the methods share which merge dropped tokens into kept ones."""

from __future__ import annotations

from ..core import primitives
from ..core.layer import Layer
from ..core.merging import add_up
from ..core.types import Array

__all__ = ["at_slots", "masses", "of_kept"]


def masses(layer: Layer, /) -> Array:
    """Return how many tokens each entry stands for: (batch, kv_heads, N), dtype of the keys."""
    xp = layer.xp
    if layer.mass is None:
        return xp.ones_like(layer.keys[..., 0])
    return xp.astype(layer.mass, layer.keys.dtype)


def of_kept(x: Array, own: Array, num_slots: int, layer: Layer, /) -> Array:
    """Return what the kept tokens have of an array per token.

    Parameters
    ----------
    x : array, shape (batch, kv_heads, N)
    own : array, shape (batch, kv_heads, N), integer
        The slot of each kept token, -1 for others, as `graphkv.core.merging.slots` returns them.
    num_slots : int
        b.

    Returns
    -------
    array, shape (batch, kv_heads, b)
        0 where a row has no token.
    """
    return add_up(x, own, num_slots, backend=layer.backend)


def at_slots(x: Array, into: Array, layer: Layer, /) -> Array:
    """Return for every token what the slot has that it goes into.

    Parameters
    ----------
    x : array, shape (batch, kv_heads, b)
    into : array, shape (batch, kv_heads, N), integer
        -1 for a token that goes nowhere.

    Returns
    -------
    array, shape (batch, kv_heads, N)
        0 for tokens that go nowhere.
    """
    xp = layer.xp
    if x.shape[-1] == 0:
        return xp.zeros(into.shape, dtype=x.dtype, device=primitives.device_of(layer.keys))
    found = xp.take_along_axis(x, xp.where(into >= 0, into, xp.zeros_like(into)), axis=-1)
    return xp.where(into >= 0, found, xp.zeros_like(found))
