"""Nearest neighbors in a CPU's memory: what NumPy and PyTorch share, which has no selection of NumPy's speed.

Rows and tokens come in parts, of which each can have a thread to itself. A library brings what is one pass over keys or
products; the rest is NumPy on the maxima of blocks and on the few tokens of the best of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..core.types import Array
from .streamed import EXCLUDED

__all__ = ["Passes", "best", "nearest", "scratch"]


class Passes(NamedTuple):
    """A library's passes over NumPy's arrays.

    Attributes
    ----------
    length : callable
        ``length(keys)``, the lengths of rows: (R, N, D) to (R, N).
    divide : callable
        ``divide(keys, by, out)``, whose `out` need not be contiguous.
    multiply : callable
        ``multiply(of, to, buffer)``, the products of all rows (R, K, D) with all rows (R, N, D), in the order of axes
        that suits the library, written to a buffer of their number.
    highest : callable
        ``highest(products, size)``, their maxima over blocks of `size` tokens: (R, K, B).
    take : callable
        ``take(products, blocks, size)``, those of the tokens of some blocks (R, K, C): (R, K, C, S).
    """

    length: Callable[[Array], Array]
    divide: Callable[[Array, Array, Array], Any]
    multiply: Callable[[Array, Array, Array], Array]
    highest: Callable[[Array, int], Array]
    take: Callable[[Array, Array, int], Array]


class _Scratch(threading.local):
    """Memory that every thread keeps for its next graph: allocating it anew costs more than the matrix product."""

    def __init__(self) -> None:
        self.buffers: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any, /) -> Array:
        found, size = self.buffers.get(name), prod(shape)
        if found is None or found.dtype != dtype or found.size < size:
            found = self.buffers[name] = np.empty(size, dtype)
        return found[:size].reshape(shape)


scratch = _Scratch()


def best(values: Array, count: int, /) -> tuple[Array, Array, bool]:
    """Return the places of the highest values of every row, ascending, the lowest of them, and whether it was a choice.

    Of equal values the first are taken; it was a choice where some were not.
    """
    num_rows, size = values.shape
    if count == size:
        return np.tile(np.arange(size), (num_rows, 1)), values.min(axis=-1, keepdims=True), False
    lowest = np.partition(values, size - count, axis=-1)[:, size - count, None]
    is_best = values >= lowest
    places = np.flatnonzero(is_best)
    is_choice = places.size > num_rows * count
    if is_choice:
        equal = values == lowest
        left = count - np.count_nonzero(values > lowest, axis=-1)
        is_best &= ~equal | (np.cumsum(equal, axis=-1) <= left[:, None])
        places = np.flatnonzero(is_best)
    return places.reshape(num_rows, count) % size, lowest, is_choice


def _above(values: Array, lowest: Array, count: int, /) -> tuple[Array, Array] | None:
    """Return places and values, of 1 at most, of the highest of every row, best first; None if many reach `lowest`."""
    num_rows, size = values.shape
    places = np.flatnonzero(values >= lowest)
    row = places // size
    numbers = np.bincount(row, minlength=num_rows)
    widest = int(numbers.max())
    if widest > 4 * count:
        return None
    # Rows of one length, filled up with what ranks last.
    into = np.arange(places.size) + np.repeat(
        np.arange(0, num_rows * widest, widest) - np.cumsum(numbers) + numbers, numbers
    )
    table = np.full(num_rows * widest, EXCLUDED, dtype=values.dtype)
    table[into] = np.minimum(values.reshape(-1)[places], 1)
    where = np.zeros(num_rows * widest, dtype=np.int64)
    where[into] = places % size
    return _ordered(where.reshape(num_rows, widest), table.reshape(num_rows, widest), count)


def _ordered(places: Array, values: Array, count: int, /) -> tuple[Array, Array]:
    """Sort the places, ascending, of some values by these, and keep the first."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    return _take(places, order), _take(values, order)


def _take(values: Array, places: Array, /) -> Array:
    """Take from every row: `numpy.take_along_axis`, in a third of its time."""
    rows = np.arange(0, values.size, values.shape[-1]).reshape(*values.shape[:-1], 1)
    return values.reshape(-1).take(places + rows)


def _ranked(products: Array, is_out: Array, count: int, passes: Passes, /) -> tuple[Array, Array]:
    """Rank the tokens of every source in the best blocks.

    `is_out` (R, B, S) marks what may not be a neighbor; its products are 0.
    """
    num_rows, num_blocks, size = is_out.shape
    highest = np.clip(passes.highest(products, size), 0, 1)
    num_sources = highest.shape[1]
    # Blocks of nothing but such tokens rank behind others of 0.
    np.copyto(highest, EXCLUDED, where=is_out.all(axis=-1)[:, None])
    chosen, lowest, is_choice = best(highest.reshape(-1, num_blocks), min(count, num_blocks))
    near = passes.take(products, chosen.reshape(num_rows, num_sources, -1), size).reshape(len(chosen), -1)
    found = None
    if not is_choice and chosen.shape[-1] == count and lowest.min() > 0:
        # All other blocks are below the lowest of these, so that whoever is not must be among the best.
        found = _above(near, lowest, count)
    if found is None:
        np.clip(near, 0, 1, out=near)
        row = np.repeat(np.arange(num_rows) * num_blocks, num_sources)[:, None]
        np.copyto(near, EXCLUDED, where=is_out.reshape(-1, size).take(row + chosen, axis=0).reshape(near.shape))
        places, _, _ = best(near, min(count, near.shape[-1]))
        found = _ordered(places, _take(near, places), count)
    places, values = found
    places = _take(chosen, places // size) * size + places % size
    return (x.reshape(num_rows, num_sources, -1) for x in (places, values))  # type: ignore[return-value]


def _in_turn(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    return [task() for task in tasks]


def nearest(
    keys: Array,
    sources: Array,
    is_padding: Array,
    /,
    *,
    num_neighbors: int,
    width: int,
    height: int,
    block: int,
    passes: Passes,
    run: Callable[[Sequence[Callable[[], Any]]], list[Any]] = _in_turn,
) -> tuple[Array, Array]:
    """Find neighbors as `streamed.build_graph` asks for them.

    What may not be a neighbor has no direction, so that no product must be masked: it is 0, and behind others of 0.

    Parameters
    ----------
    passes : Passes
    run : callable
        Calls functions, in any order or at a time, and lists what each returns.

    Returns
    -------
    tuple of array, (R, K, M) both
    """
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    # With what fills up the last chunk.
    is_out = np.ones((num_rows, num_tokens + -num_tokens % width), dtype=bool)
    is_out[:, :num_tokens] = is_padding
    np.put_along_axis(is_out, sources, True, axis=1)

    def directions(own: Array, is_out: Array | None, out: Array) -> Array:
        length = passes.length(own)
        is_finite = np.isfinite(length)
        is_usable = (length > 0) if is_out is None else (length > 0) & ~is_out
        # Divided by infinity, everything becomes zero, infinity and NaN excepted.
        passes.divide(own, np.where(is_usable, length, np.inf)[..., None], out)
        if not is_finite.all():
            out[~is_finite] = 0
        return out

    def part(top: int, start: int) -> tuple[Array, Array]:
        rows, stop = slice(top, min(top + height, num_rows)), min(start + width, num_tokens)
        num, size = rows.stop - top, stop - start
        to = scratch.take("directions", (num, width, head_size), keys.dtype)
        directions(keys[rows, start:stop], is_out[rows, start:stop], to[:, :size])
        to[:, size:] = 0
        of = keys[np.arange(top, rows.stop)[:, None], sources[rows]]
        buffer = scratch.take("products", (num * num_sources * width,), keys.dtype)
        found = passes.multiply(directions(of, None, of), to, buffer)
        in_blocks = is_out[rows, start : start + width].reshape(num, -1, block)
        places, values = _ranked(found, in_blocks, num_neighbors, passes)
        places += start
        return places, values

    tops, starts = range(0, num_rows, height), range(0, num_tokens, width)
    parts = run([partial(part, *at) for at in product(tops, starts)])
    found = []
    for first in range(0, len(parts), len(starts)):
        places, values = (np.concatenate(each, -1) for each in zip(*parts[first : first + len(starts)], strict=True))
        # Earlier tokens come first, so the lower one is kept among equals.
        found.append(_ordered(places, values, num_neighbors) if len(starts) > 1 else (places, values))
    neighbors, similarities = (np.concatenate(each) for each in zip(*found, strict=True))
    return neighbors, similarities
