"""What the standard lacks, against plain Python, bit for bit: the order of section 2 of the specification."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphkv.core import primitives

FAST = hypothesis.settings(deadline=None, derandomize=True, max_examples=100)
# Few shapes, because JAX compiles anew for each.
SHAPES = [(0, 4), (1, 0), (1, 1), (2, 7), (1, 33)]
AWKWARD = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 1.5, 3.0e38, -3.0e38]


def ranked(scores: list[float], tiers: list[int], k: int) -> list[int]:
    """Rank as the specification says it."""

    def key(token: int) -> tuple[int, bool, float, int]:
        score = scores[token]
        return tiers[token], math.isnan(score), 0.0 if math.isnan(score) else -score, token

    return sorted(range(len(scores)), key=key)[:k]


def rows(draw, elements, num_rows: int, num_columns: int) -> list:
    return [draw(st.lists(elements, min_size=num_columns, max_size=num_columns)) for _ in range(num_rows)]


@st.composite
def rankings(draw, dtypes: list[str]):
    dtype = draw(st.sampled_from(dtypes))
    num_rows, num_tokens = draw(st.sampled_from(SHAPES))
    floats = st.floats(width=32, allow_subnormal=False)
    scores = np.asarray(rows(draw, st.sampled_from(AWKWARD) | floats, num_rows, num_tokens), dtype=dtype)
    kind = draw(st.sampled_from([None, "bool", "int32", "int64"]))
    levels = st.integers(0, 1 if kind == "bool" else 3)
    tiers = np.asarray(rows(draw, levels, num_rows, num_tokens), dtype=kind or "int32")
    shape = (num_rows, num_tokens)
    return (
        scores.reshape(shape),
        None if kind is None else tiers.reshape(shape),
        draw(st.sampled_from(sorted({0, min(1, num_tokens), num_tokens // 2, num_tokens}))),
    )


@FAST
@given(data=st.data())
def test_top_k_is_the_ranking_of_the_specification(library, data):
    scores, tiers, k = data.draw(rankings(library.dtypes()))
    made = None if tiers is None else library.make(tiers)

    found = primitives.top_k(library.make(scores), k, made, backend=library.backend)

    tiers = np.zeros(scores.shape) if tiers is None else tiers
    expected = [ranked(row.tolist(), tier.tolist(), k) for row, tier in zip(scores, tiers, strict=True)]
    assert found.dtype == library.backend.xp.int64
    assert tuple(found.shape) == (scores.shape[0], k)
    assert library.host(found).tolist() == expected


def test_top_k_orders_many_tied_tokens_by_position(library):
    scores = np.tile(np.asarray([0.0, -0.0, 1.0, np.nan], dtype=np.float32), 1250)

    found = library.host(primitives.top_k(library.make(scores), 5000, backend=library.backend)).tolist()

    assert found == ranked(scores.tolist(), [0] * 5000, 5000)


def test_top_k_leaves_its_input_alone(library):
    scores = np.asarray([[-0.0, np.nan, 2.0]], dtype=np.float32)
    given_scores = library.make(scores)

    primitives.top_k(given_scores, 2, backend=library.backend)

    assert library.host(given_scores).tobytes() == scores.tobytes()


@st.composite
def segments(draw, dtypes: list[str], factors: list[float]):
    dtype = draw(st.sampled_from(dtypes))
    num_rows, num_values = draw(st.sampled_from(SHAPES))
    num_segments = draw(st.sampled_from([1, 4] if num_values else [0, 4]))
    values = np.asarray(rows(draw, st.sampled_from(factors), num_rows, num_values), dtype=dtype)
    index = np.asarray(rows(draw, st.integers(0, max(0, num_segments - 1)), num_rows, num_values), dtype=np.int64)
    return values.reshape(num_rows, num_values), index.reshape(num_rows, num_values), num_segments


# Powers of two and their sums: exact in whatever order they are combined.
@pytest.mark.parametrize("portable", [False, True], ids=["native", "portable"])
@pytest.mark.parametrize(
    ("name", "identity", "factors"),
    [("segment_product", 1.0, [0.0, 0.5, 1.0, 2.0, -1.0]), ("segment_sum", 0.0, [0.0, 0.25, 1.0, 3.5, -1.0])],
    ids=["product", "sum"],
)
@FAST
@given(data=st.data())
def test_segments_combine_all_that_share_an_index(library, name, identity, factors, portable, data):
    values, index, num_segments = data.draw(segments(library.dtypes(), factors))
    combine = getattr(primitives, f"portable_{name}" if portable else name)

    found = combine(library.make(values), library.make(index), num_segments, backend=library.backend)

    expected = np.full((values.shape[0], num_segments), identity, dtype=values.dtype)
    for row in range(values.shape[0]):
        for value, segment in zip(values[row], index[row], strict=True):
            if name == "segment_product":
                expected[row, segment] *= value
            else:
                expected[row, segment] += value
    assert str(found.dtype).endswith(values.dtype.name)
    assert library.host(found).tolist() == expected.tolist()


def test_segments_of_thousands_of_edges_agree_with_numpy(library):
    random = np.random.default_rng(0)
    values = random.uniform(0.5, 1.0, size=(2, 6000)).astype(np.float32)
    index = random.integers(0, 500, size=(2, 6000))

    made = library.make(values), library.make(index)
    found = library.host(primitives.segment_product(*made, 500, backend=library.backend))

    expected = np.ones((2, 500), dtype=np.float32)
    for row in range(2):
        np.multiply.at(expected[row], index[row], values[row])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
