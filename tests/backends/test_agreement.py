"""Every library against NumPy: equal graphs and choices where the arithmetic is exact, and within the cut elsewhere."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphkv import (
    Bar,
    Decay,
    Degree,
    Enhance,
    GraphKV,
    KNorm,
    Random,
    SnapKV,
    StreamingLLM,
    build_graph,
    evict,
    propagate,
    select,
)

FAST = hypothesis.settings(deadline=None, derandomize=True, max_examples=30)

# Directions whose cosines are exact: all in {0, 1/2, 1} up to sign, whatever the order of the sum.
DIRECTIONS = np.asarray([[0, 0, 0, 0], [2, 0, 0, 0], [0, 4, 0, 0], [1, 1, 1, 1], [1, 1, -1, -1], [-2, 0, 0, 0]])
SCORES = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0, 0.25, 0.5, 1.0, 3.0, -2.0])


@st.composite
def problems(draw):
    # Few shapes, because JAX compiles anew for each.
    rows, num_tokens, num_sources, num_neighbors, budget = draw(
        st.sampled_from([(1, 0, 2, 1, 3), (1, 1, 1, 1, 1), (2, 12, 4, 3, 5), (1, 12, 2, 13, 12), (2, 9, 0, 2, 0)])
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys = DIRECTIONS[random.integers(0, len(DIRECTIONS), size=(rows, num_tokens))].astype(np.float32)
    importance = SCORES[random.integers(0, len(SCORES), size=(rows, num_tokens))].astype(np.float32)
    valid = random.uniform(size=(rows, num_tokens)) < 0.8
    return keys, importance, valid, num_sources, num_neighbors, budget


def run(library, problem, signal, rounds, accumulation):
    keys, importance, valid, num_sources, num_neighbors, budget = problem
    make, backend = library.make, library.backend
    graph = build_graph(
        make(keys),
        make(importance),
        num_sources=num_sources,
        num_neighbors=num_neighbors,
        valid=make(valid),
        chunk_size=5,
        backend=backend,
    )
    with np.errstate(invalid="ignore"):  # infinite scores make a NaN that is then not used
        scores = propagate(
            make(importance),
            graph,
            signal=signal,
            rounds=rounds,
            accumulation=accumulation,
            strength=0.5,
            backend=backend,
        )
    kept = select(scores, budget, protected=make(importance == 1), valid=make(valid), backend=backend)
    return [library.host(x) for x in (graph.sources, graph.neighbors, graph.weights, scores, kept)]


@pytest.mark.parametrize("signal", ["decay", "enhance", "evict"])
@pytest.mark.parametrize(("rounds", "accumulation"), [(1, "product"), (2, "product"), (1, "sum")])
@FAST
@given(problem=problems())
def test_the_three_steps_are_equal_on_exact_numbers(library, numpy_library, signal, rounds, accumulation, problem):
    found = run(library, problem, signal, rounds, accumulation)
    expected = run(numpy_library, problem, signal, rounds, accumulation)

    for each, other in zip(found, expected, strict=True):
        assert each.shape == other.shape
        np.testing.assert_array_equal(each, other)


POLICIES = {
    "snapkv": SnapKV(budget=24, window=8),
    "snapkv-max": SnapKV(budget=0.4, window=8, pooling="max", group_reduction="max", num_sinks=2),
    "streaming": StreamingLLM(budget=9),
    "random": Random(budget=20, seed=3),
    "graphkv": GraphKV(SnapKV(budget=24, window=8)),
    "graphkv-rounds": GraphKV(Random(budget=20), Decay(neighbors=0.2, rounds=3, strength=0.7)),
    "graphkv-recompute": GraphKV(SnapKV(budget=24, window=8), Decay(neighbors=1, rounds=2, recompute_sources=True)),
    "graphkv-enhance-sum": GraphKV(StreamingLLM(budget=24), Enhance(neighbors=1, accumulation="sum")),
    "graphkv-evict": GraphKV(SnapKV(budget=24, window=8), Bar(neighbors=3)),
    "graphkv-degree": GraphKV(SnapKV(budget=24, window=8), Degree()),
    "graphkv-degree-negative": GraphKV(KNorm(budget=24), Degree(exponent=3)),
}


def layer(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    keys, queries = random.normal(size=(2, 2, 60, 8)), random.normal(size=(2, 4, 16, 8))
    keys[:, :, 11] = keys[:, :, 5]  # a duplicate
    valid = np.ones((2, 60), dtype=bool)
    valid[1, :7] = False
    return keys.astype(dtype), queries.astype(dtype), valid


def assert_same_choice(found: np.ndarray, expected: np.ndarray, scores: np.ndarray) -> None:
    """Equal but for tokens whose scores lie at the cut within what two matrix products may differ by."""
    assert found.shape == expected.shape
    for row in np.ndindex(found.shape[:-1]):
        odd = sorted(set(found[row].tolist()) ^ set(expected[row].tolist()))
        values = scores[row][odd]
        assert not odd or np.ptp(values) <= 1e-3 * np.max(np.abs(values)), f"row {row} differs in {odd}: {values}"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_evict_keeps_the_same_tokens(library, numpy_library, policy, dtype):
    if library.backend.name == "strict" and dtype == "float16":
        pytest.skip("the standard has no float16")
    keys, queries, valid = layer(dtype)
    expected = evict(policy, keys, queries=queries, valid=valid, layer=1, num_layers=4)

    found = evict(
        policy,
        library.make(keys),
        queries=library.make(queries),
        valid=library.make(valid),
        layer=1,
        num_layers=4,
        backend=library.backend,
    )

    assert found.kept.dtype == library.backend.xp.int64
    assert_same_choice(library.host(found.kept), numpy_library.host(expected.kept), expected.scores)
    np.testing.assert_allclose(library.host(found.scores), expected.scores, rtol=1e-3, atol=1e-5)
    kept = library.host(found.kept)
    np.testing.assert_array_equal(
        library.host(found.apply(library.make(keys))), np.take_along_axis(keys, kept[..., None], axis=2)
    )


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "cupy", "mlx"])
def test_the_library_is_inferred_from_its_arrays(name, request):
    library = request.getfixturevalue("libraries")(name)

    kept = select(library.make(np.asarray([1.0, 3.0, 2.0], dtype=np.float32)), 2)

    assert type(kept) is type(library.make(np.zeros(1)))
    assert library.host(kept).tolist() == [1, 2]
