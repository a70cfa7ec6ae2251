"""Operations that the array API standard lacks, written in the standard.

`top_k`, `segment_product`, `segment_sum` and `sum_rows` are doors: they call the backend's own form where it brings
one, else the portable one. A backend's form is called like the portable one and must give the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import checks
from .backend import Backend, SegmentReduce, SumRows, TopK
from .types import Array, Namespace

__all__ = [
    "device_of",
    "finite_rows",
    "packed_top_k",
    "portable_segment_product",
    "portable_segment_sum",
    "portable_sum_rows",
    "portable_top_k",
    "segment_product",
    "segment_sum",
    "sum_rows",
    "take_rows",
    "top_k",
    "widen",
]

# A packed key holds, from high to low bits: tier (2), score (32), token index (29).
SCORE_BITS = 32
INDEX_BITS = 29
INDEX_MASK = (1 << INDEX_BITS) - 1


def widen(x: Array, /, *, xp: Namespace) -> Array:
    """Return float32 and float64 as they are, everything else (half precision, integers) as float32.

    Parameters
    ----------
    x : array, any shape, real
    xp : namespace

    Returns
    -------
    array, float32 or float64, of the shape of `x`
    """
    return x if x.dtype in (xp.float32, xp.float64) else xp.astype(x, xp.float32)


def device_of(x: Array, /) -> Any:
    """Return the device of an array, or None for a traced array without a device, as under ``jax.jit``."""
    return getattr(x, "device", None)


def top_k(scores: Array, k: int, /, tiers: Array | None = None, *, backend: Backend) -> Array:
    """Rank along the last axis and return the first k indices, best first.

    The order is total, so every library returns the same indices: lower tier first; then higher score; then lower
    index. NaN comes after every number of its tier, and -0.0 equals 0.0.

    Parameters
    ----------
    scores : array, shape (..., N), float32 or float64
    k : int
        At most N.
    tiers : array, shape (..., N), integer or bool, optional
        0, 1, 2 or 3. Default: all in one tier.
    backend : Backend

    Returns
    -------
    array, shape (..., k), int64
    """
    # Heads that share a budget are ranked as one row, which may be longer than the arrays that a door has checked.
    checks.places("scores", tuple(scores.shape), backend=backend)
    step: TopK = backend.top_k or portable_top_k
    return step(scores, k, tiers, backend=backend)


def portable_top_k(scores: Array, k: int, tiers: Array | None, /, *, backend: Backend) -> Array:
    """Rank by two stable sorts: the specification of `top_k`."""
    xp = backend.xp
    is_nan = xp.isnan(scores)
    # A NaN would sort first on some libraries and last on others.
    order = xp.argsort(xp.where(is_nan, xp.zeros_like(scores), scores), axis=-1, descending=True, stable=True)
    tier = xp.astype(is_nan, xp.int32)
    if tiers is not None:
        tier = tier + 2 * xp.astype(tiers, xp.int32)
    by_tier = xp.argsort(xp.take_along_axis(tier, order, axis=-1), axis=-1, stable=True)
    return xp.take_along_axis(order, by_tier, axis=-1)[..., :k]


def packed_top_k(
    scores: Array,
    k: int,
    tiers: Array | None,
    /,
    *,
    bits: Callable[[Array], Array],
    smallest: Callable[[Array, int], Array],
    backend: Backend,
) -> Array:
    """Compute `top_k` by a library's own partial selection, which need not be stable: all keys are different.

    Where the scores are not float32, or there are too many tokens for a key, the portable form is called.

    Parameters
    ----------
    scores, k, tiers, backend
        As for `top_k`.
    bits : callable
        Reads a float32 array as int32 without changing a bit, which the standard cannot.
    smallest : callable
        ``smallest(keys, k)`` returns the k smallest of int64 keys along the last axis, ascending; 0 < k <= N.

    Returns
    -------
    array, shape (..., k), int64
    """
    if scores.dtype != backend.xp.float32 or k == 0 or scores.shape[-1] > INDEX_MASK:
        return portable_top_k(scores, k, tiers, backend=backend)
    return smallest(_packed_keys(bits(scores), tiers, xp=backend.xp), k) & INDEX_MASK


def _packed_keys(bits: Array, tiers: Array | None, /, *, xp: Namespace) -> Array:
    """Pack tier, score and token index of every token into one int64, ascending from the best token."""
    # Only on the integers: compilers for GPUs may flush a subnormal float to zero, which would tie different scores.
    lowest = -(2**31)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    bits = xp.where(bits == lowest, xp.zeros_like(bits), bits)  # -0.0 equals 0.0
    bits = xp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # now in the order of the scores
    bits = xp.where(is_nan, xp.full_like(bits, lowest), bits)  # below minus infinity
    index = xp.arange(bits.shape[-1], dtype=xp.int64, device=device_of(bits))
    keys = ((2**31 - 1 - xp.astype(bits, xp.int64)) << INDEX_BITS) | index
    return keys if tiers is None else keys | (xp.astype(tiers, xp.int64) << (SCORE_BITS + INDEX_BITS))


def take_rows(x: Array, indices: Array, /, *, xp: Namespace) -> Array:
    """Gather ``x[..., indices, :]`` row by row of the leading axes.

    Parameters
    ----------
    x : array, shape (..., N, ...)
    indices : array, shape (..., B), integer
        Leading axes as those of `x`.

    Returns
    -------
    array, shape (..., B, ...)
    """
    axis = indices.ndim - 1
    rest = tuple(x.shape[axis + 1 :])
    index = xp.reshape(indices, (*indices.shape, *(1 for _ in rest)))
    return xp.take_along_axis(x, xp.broadcast_to(index, (*indices.shape, *rest)), axis=axis)


def finite_rows(x: Array, /, *, xp: Namespace) -> tuple[Array, Array]:
    """Set rows (..., D) that hold an infinity or NaN to zero, and mark the others."""
    is_finite = xp.all(xp.isfinite(x), axis=-1)
    return xp.where(is_finite[..., None], x, xp.zeros_like(x)), is_finite


def segment_product(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Multiply, row by row of the leading axes, the values that share an index; 1 where there are none.

    Parameters
    ----------
    values : array, shape (..., E), float32 or float64
    index : array, shape (..., E), integer in [0, num_segments)
    num_segments : int
    backend : Backend

    Returns
    -------
    array, shape (..., num_segments), dtype of `values`
        Entry t is the product of the values[..., e] with index[..., e] == t.
    """
    step: SegmentReduce = backend.segment_product or portable_segment_product
    return step(values, index, num_segments, backend=backend)


def portable_segment_product(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Multiply by a sort: the specification of `segment_product`."""
    return _segment_reduce(values, index, num_segments, backend.xp.multiply, 1, xp=backend.xp)


def segment_sum(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Add, row by row of the leading axes, the values that share an index; 0 where there are none.

    Parameters
    ----------
    values : array, shape (..., E), float32 or float64
    index : array, shape (..., E), integer in [0, num_segments)
    num_segments : int
    backend : Backend

    Returns
    -------
    array, shape (..., num_segments), dtype of `values`
        Entry t is the sum of the values[..., e] with index[..., e] == t.
    """
    step: SegmentReduce = backend.segment_sum or portable_segment_sum
    return step(values, index, num_segments, backend=backend)


def portable_segment_sum(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Add by a sort: the specification of `segment_sum`."""
    return _segment_reduce(values, index, num_segments, backend.xp.add, 0, xp=backend.xp)


def sum_rows(rows: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Add the rows that go into the same slot, row by row of the leading axes.

    No table of slots by rows exists, and the order of the additions does not change from run to run.

    Parameters
    ----------
    rows : array, shape (..., N, D), float32 or float64
    into : array, shape (..., N), integer in [-1, num_slots)
        The slot of each row; -1 for a row that goes nowhere, which may hold anything.
    num_slots : int
    backend : Backend

    Returns
    -------
    array, shape (..., num_slots, D), dtype of `rows`
        Zero where there are none, and a row alone in its slot is there bit for bit, but that -0.0 is 0.0.
    """
    step: SumRows = backend.sum_rows or portable_sum_rows
    return step(rows, into, num_slots, backend=backend)


def portable_sum_rows(rows: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Add by `segment_sum` of each column: the specification of `sum_rows`."""
    xp = backend.xp
    columns = xp.matrix_transpose(rows)
    index = xp.where(into >= 0, into, xp.full_like(into, num_slots))[..., None, :]
    total = segment_sum(columns, xp.broadcast_to(index, columns.shape), num_slots + 1, backend=backend)
    return xp.matrix_transpose(total[..., :num_slots])


def _segment_reduce(
    values: Array, index: Array, num_segments: int, combine: Callable[..., Array], identity: int, /, *, xp: Namespace
) -> Array:
    """Sort by segment, then combine equal neighbors at distances 1, 2, 4, ... until each segment's end holds all."""
    *leading, num_values = values.shape
    num_rows = 1
    for size in leading:
        num_rows *= size
    device = device_of(values)
    if num_rows * num_values * num_segments == 0:
        return xp.full((*leading, num_segments), identity, dtype=values.dtype, device=device)
    height = checks.most_places(xp) // max(num_values, num_segments)
    if num_rows > height:
        # Rows have nothing to do with each other, and places in all of them would not fit the widest integers of JAX.
        values, index = (xp.reshape(x, (num_rows, num_values)) for x in (values, index))
        blocks = [slice(first, first + height) for first in range(0, num_rows, height)]
        parts = [
            _segment_reduce(values[rows, :], index[rows, :], num_segments, combine, identity, xp=xp) for rows in blocks
        ]
        return xp.reshape(xp.concat(parts), (*leading, num_segments))
    # One flat problem: row r owns the segments r * num_segments ...
    index = xp.astype(xp.reshape(index, (num_rows, num_values)), xp.int64)
    first = xp.reshape(xp.arange(num_rows, dtype=xp.int64, device=device) * num_segments, (num_rows, 1))
    flat = xp.reshape(index + first, (-1,))
    order = xp.argsort(flat, stable=True)
    segment = xp.take(flat, order)
    result = xp.take(xp.reshape(values, (-1,)), order)
    neutral = xp.full(result.shape, identity, dtype=result.dtype, device=device)
    step = 1
    # A segment has at most all values of its own row, so no run is longer than num_values.
    while step < num_values:
        # Slices, not gathers: a third of the operations, each of which is a launch on a device.
        same = segment[step:] == segment[:-step]
        before = xp.where(same, result[:-step], neutral[step:])
        result = xp.concat([result[:step], combine(result[step:], before)])
        step *= 2
    wanted = xp.arange(num_rows * num_segments, dtype=xp.int64, device=device)
    last = xp.searchsorted(segment, wanted, side="right") - 1
    found = xp.where(last >= 0, last, xp.zeros_like(last))
    present = (last >= 0) & (xp.take(segment, found) == wanted)
    nothing = xp.full(wanted.shape, identity, dtype=result.dtype, device=device)
    return xp.reshape(xp.where(present, xp.take(result, found), nothing), (*leading, num_segments))
