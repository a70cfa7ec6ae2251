"""Drawn inputs: NumPy arrays, few tokens, ties and odd sizes on purpose.

`exact` inputs are chosen so that float32 makes no rounding error anywhere, whatever the order of operations: scores
are dyadic numbers, and keys are drawn from a pool in which every length is a power of two and every cosine a
multiple of 1/16. Results on them must be equal on all libraries, not merely close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

__all__ = [
    "EXACT_KEYS",
    "Edges",
    "Layer",
    "budgets",
    "distinct_scores",
    "edges",
    "exact",
    "exact_keys",
    "exact_weights",
    "general",
    "general_keys",
    "large_layers",
    "layers",
    "leading_shapes",
    "masks",
    "max_large_tokens",
    "scores",
    "special",
    "token_counts",
    "unit",
]

Floats = NDArray[np.float64]


def _exact_keys() -> NDArray[np.float64]:
    """Return keys of 16 integers with lengths 0, 1, 2, 4 and 8: zero, axes, and sign patterns over 4 or 16 entries."""
    pool = [np.zeros(16)]
    axes = np.eye(16)
    pool += [axes[0], axes[1], -axes[0], 2 * axes[0], 4 * axes[2]]
    random = np.random.default_rng(16)
    for _ in range(6):
        four = np.zeros(16)
        four[random.choice(16, 4, replace=False)] = random.choice([-1, 1], 4)
        pool += [four]
    ones = np.ones(16)
    pool += [ones, 2 * ones, -ones]
    for flips in (1, 2, 3, 4, 5, 6, 7, 8):
        # Flipping f of 16 signs gives the cosine 1 - f/8 with `ones`.
        sixteen = ones.copy()
        sixteen[random.choice(16, flips, replace=False)] = -1
        pool += [sixteen]
    return np.asarray(pool)


EXACT_KEYS = _exact_keys()
"""The pool (23, 16) of exact keys; the first is zero, and some are multiples of others."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Inputs of the three steps, as NumPy arrays.

    Attributes
    ----------
    keys : numpy.ndarray, shape (..., N, D)
    importance : numpy.ndarray, shape (..., N)
    valid, protected : numpy.ndarray, shape (..., N), bool, or None
    num_sources, num_neighbors : int
        May exceed N.
    budget : int
        May exceed N.
    chunk_size : int or None
    """

    keys: Floats
    importance: Floats
    valid: NDArray[np.bool_] | None
    protected: NDArray[np.bool_] | None
    num_sources: int
    num_neighbors: int
    budget: int
    chunk_size: int | None

    @property
    def leading(self) -> tuple[int, ...]:
        """Return the leading axes."""
        return self.importance.shape[:-1]

    @property
    def num_tokens(self) -> int:
        """Return N."""
        return int(self.importance.shape[-1])

    def take(self, rows: Any) -> Layer:
        """Index the leading axes of all arrays."""
        return replace(
            self,
            keys=self.keys[rows],
            importance=self.importance[rows],
            valid=None if self.valid is None else self.valid[rows],
            protected=None if self.protected is None else self.protected[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Fields of a `graphkv.Graph`, as NumPy arrays.

    Attributes
    ----------
    sources : numpy.ndarray, shape (..., K), int64
    neighbors : numpy.ndarray, shape (..., K, M), int64
    weights : numpy.ndarray, shape (..., K, M)
    num_tokens : int
    """

    sources: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    weights: Floats
    num_tokens: int


def token_counts(min_tokens: int = 0, max_tokens: int = 7) -> st.SearchStrategy[int]:
    """Draw N: rather more than few, because little happens among few."""
    return st.one_of(st.integers((min_tokens + max_tokens + 1) // 2, max_tokens), st.integers(min_tokens, max_tokens))


def leading_shapes(*, empty: bool = True) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw leading axes: none, some rows, batch and heads, and the empty batch."""
    shapes: list[tuple[int, ...]] = [(2, 2), (), (1, 1), (3,), (2, 1), (2,), (2, 3), (4,)]
    return st.sampled_from(shapes + [(0,), (2, 0)] * empty)


def exact() -> st.SearchStrategy[float]:
    """Draw dyadic numbers of 8 bits, from -2 to 2: exact even in bfloat16."""
    return st.integers(-128, 128).map(lambda i: i / 64)


def general() -> st.SearchStrategy[float]:
    """Draw any float32 of ordinary size, of either sign, or 0."""
    size = st.floats(2**-10, 8, width=32)
    return st.one_of(size, size.map(lambda x: -x), st.just(0.0))


def special() -> st.SearchStrategy[float]:
    """Draw NaN, infinities, zeros of both signs, and a few numbers."""
    return st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, -1.0])


def unit() -> st.SearchStrategy[float]:
    """Draw edge weights: any float32 in [0, 1], the ends more often."""
    return st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0]))


def exact_weights() -> st.SearchStrategy[float]:
    """Draw edge weights whose factors multiply without rounding; below 1, where decay is clipped."""
    return st.sampled_from([0.5, 0.25, 0.75, 0.5, 0.25, 0.75, 0.0])


def scores(shape: tuple[int, ...], /, *, elements: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Floats]:
    """Draw scores: dyadic, tied (three values), or with special ones among them, unless `elements` is given."""
    if elements is not None:
        return _floats(shape, elements)
    tied = st.sampled_from([1.0, 0.5, -0.5])
    return st.one_of(_floats(shape, exact()), _floats(shape, tied), _floats(shape, exact() | special()))


@st.composite
def distinct_scores(draw: st.DrawFn, shape: tuple[int, ...]) -> Floats:
    """Draw dyadic scores of which no two in a row are equal."""
    table = np.zeros(shape)
    for row in np.ndindex(*shape[:-1]):
        drawn = draw(st.lists(st.integers(-99, 99), min_size=shape[-1], max_size=shape[-1], unique=True))
        table[row] = np.asarray(drawn, dtype=np.float64) / 64
    return table


def masks(shape: tuple[int, ...], /) -> st.SearchStrategy[NDArray[np.bool_] | None]:
    """Draw a mask, all of one value at times, or none."""

    def drawn(flags: list[bool]) -> st.SearchStrategy[NDArray[np.bool_]]:
        return arrays(np.bool_, shape, elements=st.sampled_from(flags), fill=st.nothing())

    # Mostly mixed: the rules of masks meet each other only there.
    mixed = st.one_of(drawn([True, False]), drawn([True, True, True, False]), drawn([False, False, False, True]))
    return st.one_of(mixed, st.none(), st.sampled_from([False, True]).map(lambda flag: np.full(shape, flag)))


def budgets(num_tokens: int, /) -> st.SearchStrategy[int]:
    """Draw a budget from 0 to N + 1."""
    return st.integers(0, num_tokens + 1)


def exact_keys(shape: tuple[int, ...], /) -> st.SearchStrategy[Floats]:
    """Draw keys (..., 16) from the exact pool: duplicates, opposites and zero keys are common."""
    index = arrays(np.int64, shape, elements=st.integers(0, len(EXACT_KEYS) - 1), fill=st.nothing())
    return index.map(lambda i: EXACT_KEYS[i])


@st.composite
def general_keys(draw: st.DrawFn, shape: tuple[int, ...]) -> Floats:
    """Draw keys (..., D) of ordinary floats, D from 1 to 5."""
    return draw(_floats((*shape, draw(st.integers(1, 5))), general()))


@st.composite
def layers(
    draw: st.DrawFn,
    *,
    leading: st.SearchStrategy[tuple[int, ...]] | None = None,
    min_tokens: int = 0,
    max_tokens: int = 9,
    keys: Any = exact_keys,
    elements: st.SearchStrategy[float] | None = None,
) -> Layer:
    """Draw all inputs of the three steps.

    Parameters
    ----------
    leading : strategy of tuple of int, optional
        Leading axes. Default: `leading_shapes`.
    min_tokens, max_tokens : int
        Bounds of N.
    keys : callable
        `exact_keys` or `general_keys`.
    elements : strategy of float, optional
        Of the importance. Default: as in `scores`.
    """
    num_tokens = draw(token_counts(min_tokens, max_tokens))
    shape = (*draw(leading_shapes() if leading is None else leading), num_tokens)
    return Layer(
        keys=draw(keys(shape)),
        importance=draw(scores(shape, elements=elements)),
        valid=draw(masks(shape)),
        protected=draw(masks(shape)),
        num_sources=draw(st.integers(0, 3) | st.integers(0, num_tokens + 2)),
        num_neighbors=draw(st.integers(0, 4) | st.integers(0, num_tokens + 2)),
        budget=draw(budgets(num_tokens)),
        chunk_size=draw(st.none() | st.integers(1, num_tokens + 2)),
    )


@st.composite
def edges(
    draw: st.DrawFn,
    leading: Sequence[int],
    num_tokens: int,
    /,
    *,
    weights: st.SearchStrategy[float] | None = None,
    max_sources: int = 3,
    max_neighbors: int = 3,
) -> Edges:
    """Draw a graph as `build_graph` makes them; edges of weight 0 lead anywhere.

    Parameters
    ----------
    leading : sequence of int
        Leading axes.
    num_tokens : int
        N.
    weights : strategy of float, optional
        Default: `exact_weights`.
    max_sources, max_neighbors : int
        Bounds of K and M.
    """
    most = min(max_sources, num_tokens)
    num_sources = draw(st.just(most) | st.integers(0, most))
    most = min(max_neighbors, num_tokens - num_sources)
    num_neighbors = draw(st.just(most) | st.integers(0, most))
    shape = (*leading, num_sources, num_neighbors)
    sources = np.zeros(shape[:-1], dtype=np.int64)
    neighbors = np.zeros(shape, dtype=np.int64)
    for row in np.ndindex(*leading):
        order = draw(st.permutations(range(num_tokens)))
        sources[row] = np.sort(np.asarray(order[:num_sources], dtype=np.int64))
        for k in range(num_sources):
            # Sources share neighbors often: each takes a run of the same cycle.
            first = draw(st.integers(0, 1)) if num_neighbors else 0
            rest = order[num_sources:]
            neighbors[(*row, k)] = [rest[(first + m) % len(rest)] for m in range(num_neighbors)]
    weight = draw(_floats(shape, exact_weights() if weights is None else weights))
    if num_tokens:
        anywhere = draw(st.integers(0, num_tokens - 1))
        neighbors = np.where((weight == 0) & draw(st.booleans()), anywhere, neighbors)
    return Edges(sources=sources, neighbors=neighbors, weights=weight, num_tokens=num_tokens)


def max_large_tokens() -> int:
    """Return the most tokens of `large_layers`: 10^4 under a profile of 1,000 examples or more, else 400."""
    return 10_000 if settings.default and settings.default.max_examples >= 1000 else 400


@st.composite
def large_layers(draw: st.DrawFn) -> Layer:
    """Draw one row of many tokens with exact keys, from a seed: too many numbers to draw one by one."""
    num_tokens = draw(st.integers(1, max_large_tokens()))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_tokens,)
    return Layer(
        keys=EXACT_KEYS[random.integers(0, len(EXACT_KEYS), shape)],
        importance=random.integers(-128, 129, shape) / 64,
        valid=random.random(shape) < 0.9,
        protected=random.random(shape) < 0.1,
        num_sources=draw(st.integers(0, 5)),
        num_neighbors=draw(st.integers(0, 5)),
        budget=draw(budgets(num_tokens)),
        chunk_size=draw(st.none() | st.integers(1 + num_tokens // 8, num_tokens)),
    )


def _floats(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[Floats]:
    # Without `fill`, most elements of a larger array would be one and the same.
    return arrays(np.float64, shape, elements=elements, fill=st.nothing())
