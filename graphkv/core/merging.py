"""Merges: dropped tokens that go into kept ones."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Array

__all__ = ["Merge"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    """Where each token goes, and with which weight.

    A merge changes neither who is kept nor positions nor protection. With weights of 1 per token the masses add up to
    the tokens that are kept or absorbed.

    Attributes
    ----------
    into : array, shape (batch, kv_heads, N), integer
        The slot 0 .. b-1 that a token goes into, -1 for a token that is dropped.
    key_weights, value_weights : array, shape (batch, kv_heads, N), float32 or wider
        Weights of the sums that make a slot's key and value.
    mass : array, shape (batch, kv_heads, b), float32 or wider
        Tokens that a slot counts as: attention adds its logarithm to the slot's logit.
    """

    into: Array
    key_weights: Array
    value_weights: Array
    mass: Array
