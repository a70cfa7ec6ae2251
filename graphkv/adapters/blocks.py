"""Blocks of consecutive tokens, which several choices rank as a whole."""

from __future__ import annotations

from ..core import primitives
from ..core.protection import token_rank
from ..core.types import Array, Namespace

__all__ = ["block_means", "block_of"]


def block_of(valid: Array, size: int, /, *, xp: Namespace) -> Array:
    """Return the number of each token's block: the first `size` tokens of a row that are not padding are block 0.

    Parameters
    ----------
    valid : array, shape (..., N), bool
    size : int
        At least 1. The last block of a row may be shorter.

    Returns
    -------
    array, shape (..., N), int64
        Padding counts as of the block before it.
    """
    rank = token_rank(valid, xp=xp)
    return xp.maximum(rank, xp.zeros_like(rank)) // size


def block_means(values: Array, valid: Array, size: int, /, counted: Array | None = None, *, xp: Namespace) -> Array:
    """Return for each token the mean of its block, see `block_of`.

    Parameters
    ----------
    values : array, shape (..., N), float32 or wider
    valid : array, shape (..., N), bool
    size : int
        At least 1.
    counted : array, shape (..., N), bool, optional
        Tokens that are part of a mean, none of them padding. Default: `valid`.

    Returns
    -------
    array, shape (..., N), dtype of `values`
        0 where nothing in the block is counted.

    Examples
    --------
    >>> import numpy as np
    >>> valid = np.asarray([False, True, True, True])
    >>> block_means(np.asarray([9.0, 1.0, 3.0, 5.0]), valid, 2, xp=np)
    array([2., 2., 2., 5.])
    """
    *leading, num_tokens = values.shape
    num_blocks = -(-num_tokens // size)
    counted = valid if counted is None else counted
    # The tokens first, so that a block is a row of an array: equal blocks have equal sums, in whatever order they come.
    order = xp.argsort(xp.astype(~valid, xp.int32), axis=-1, stable=True)
    end = xp.zeros((*leading, num_blocks * size - num_tokens), dtype=values.dtype, device=primitives.device_of(values))

    def sums(x: Array) -> Array:
        ordered = xp.concat([xp.take_along_axis(x, order, axis=-1), end], axis=-1)
        return xp.sum(xp.reshape(ordered, (*leading, num_blocks, size)), axis=-1)

    totals = sums(xp.where(counted, values, xp.zeros_like(values)))
    numbers = sums(xp.astype(counted, values.dtype))
    means = totals / xp.maximum(numbers, xp.ones_like(numbers))
    return xp.take_along_axis(means, block_of(valid, size, xp=xp), axis=-1)
