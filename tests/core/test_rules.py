"""The rules of order, shape and width, in examples small enough to check by hand."""

import numpy as np
import pytest

from graphkv import Degree, Graph, GraphKV, Random, build_graph, evict, fuse, propagate, select
from tests.support.arrays import each_backend, make

NAN, INF = np.nan, np.inf


@each_backend
@pytest.mark.parametrize(
    ("scores", "budget", "kept"),
    [
        ([1, 1, 1, 1], 2, [0, 1]),
        ([0.0, -0.0, 0.0], 2, [0, 1]),
        ([NAN, -INF, NAN, -5], 2, [1, 3]),
        ([NAN, -INF, NAN], 2, [0, 1]),
        ([-INF, INF, 0], 1, [1]),
        ([3, 1, 2], 0, []),
        ([3, 1, 2], 3, [0, 1, 2]),
        ([3, 1, 2], 4, [0, 1, 2]),
    ],
)
def test_select_orders_by_score_then_position(backend, scores, budget, kept):
    result = select(make(backend, scores), budget, backend=backend)

    assert backend.to_numpy(result).tolist() == kept
    assert backend.to_numpy(result).dtype == np.int64


@each_backend
def test_protected_tokens_come_first_and_invalid_ones_last(backend):
    scores = make(backend, [9, 8, 7, 6, 5, 4])
    protected = make(backend, [False, False, False, True, True, True], bool)
    valid = make(backend, [False, True, True, True, True, False], bool)

    def kept(budget):
        return backend.to_numpy(select(scores, budget, protected=protected, valid=valid, backend=backend)).tolist()

    assert [kept(budget) for budget in range(7)] == [
        [],
        [3],
        [3, 4],
        [1, 3, 4],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


@each_backend
def test_neighbors_are_neither_sources_nor_padding(backend):
    keys = make(backend, [[1, 0], [1, 0], [1, 0], [0, 1], [1, 0]])
    valid = make(backend, [True, True, False, True, True], bool)

    graph = build_graph(
        keys, make(backend, [5, 4, 9, 1, 1]), num_sources=2, num_neighbors=2, valid=valid, backend=backend
    )

    assert backend.to_numpy(graph.sources).tolist() == [0, 1]
    assert backend.to_numpy(graph.neighbors).tolist() == [[4, 3], [4, 3]]
    assert backend.to_numpy(graph.weights).tolist() == [[1, 0], [1, 0]]


@each_backend
def test_counts_are_clipped_and_filled_with_weight_zero(backend):
    keys, importance = make(backend, np.eye(3)), make(backend, [1, 2, 3])
    valid = make(backend, [True, True, False], bool)

    everything = build_graph(keys, importance, num_sources=9, num_neighbors=9, backend=backend)
    filled = build_graph(keys, importance, num_sources=2, num_neighbors=1, valid=valid, backend=backend)

    assert everything.weights.shape == (3, 0)
    assert backend.to_numpy(filled.weights).tolist() == [[0], [0]]


@each_backend
def test_opposite_and_zero_keys_are_no_edges(backend):
    keys = make(backend, [[1, 0], [-1, 0], [0, 0], [2, 0]])

    graph = build_graph(keys, make(backend, [9, 1, 1, 1]), num_sources=1, num_neighbors=3, backend=backend)

    assert backend.to_numpy(graph.neighbors).tolist() == [[3, 1, 2]]
    assert backend.to_numpy(graph.weights).tolist() == [[1, 0, 0]]


@each_backend
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
def test_chunks_do_not_change_the_graph(backend, chunk_size):
    rng = np.random.default_rng(0)
    # Every coordinate is 1 or -1: a quarter of the squared norm 16 makes all cosines exact.
    keys = make(backend, rng.choice([-1.0, 1.0], (2, 3, 40, 16)))
    importance = make(backend, rng.choice([0.0, 1.0, 2.0], (2, 3, 40)))

    whole = build_graph(keys, importance, num_sources=5, num_neighbors=4, backend=backend)
    parts = build_graph(keys, importance, num_sources=5, num_neighbors=4, chunk_size=chunk_size, backend=backend)

    for name in ("sources", "neighbors", "weights"):
        expected, actual = (backend.to_numpy(getattr(graph, name)) for graph in (whole, parts))
        np.testing.assert_array_equal(actual, expected)


def one_edge(backend, weight, num_tokens=3):
    return Graph(
        sources=make(backend, [0], np.int64),
        neighbors=make(backend, [[1]], np.int64),
        weights=make(backend, [[weight]]),
        num_tokens=num_tokens,
    )


@each_backend
@pytest.mark.parametrize(
    ("signal", "expected"),
    [("decay", {4: 1, -4: -7}), ("enhance", {4: 7, -4: -1}), ("evict", {4: -INF, -4: -INF})],
)
@pytest.mark.parametrize("score", [4, -4])
def test_signals_point_the_same_way_for_either_sign(backend, signal, expected, score):
    scores = propagate(make(backend, [9, score, 5]), one_edge(backend, 0.75), signal=signal, backend=backend)

    assert backend.to_numpy(scores).tolist() == [9, expected[score], 5]


@each_backend
def test_an_exact_duplicate_keeps_a_positive_score(backend):
    scores = propagate(make(backend, [9, 4, 5]), one_edge(backend, 1), backend=backend)

    assert 0 < backend.to_numpy(scores)[1] == pytest.approx(4e-6)


@each_backend
@pytest.mark.parametrize("signal", ["decay", "enhance"])
def test_infinite_zero_and_nan_scores_stay(backend, signal):
    graph = Graph(
        sources=make(backend, [0], np.int64),
        neighbors=make(backend, [[1, 2, 3, 4]], np.int64),
        weights=make(backend, [[1, 1, 1, 1]]),
        num_tokens=5,
    )

    scores = backend.to_numpy(
        propagate(make(backend, [9, INF, -INF, 0, NAN]), graph, signal=signal, rounds=40, backend=backend)
    )

    np.testing.assert_array_equal(scores, [9, INF, -INF, 0, NAN])


@each_backend
@pytest.mark.parametrize("options", [{"rounds": 0}, {"strength": 0}])
@pytest.mark.parametrize("signal", ["decay", "enhance", "evict"])
def test_no_rounds_or_no_strength_return_the_importance(backend, options, signal):
    importance = make(backend, [0.1, -0.0, NAN])

    scores = propagate(importance, one_edge(backend, 0.5), signal=signal, backend=backend, **options)

    assert backend.to_numpy(scores).tobytes() == backend.to_numpy(importance).tobytes()


@each_backend
def test_empty_rows_and_no_tokens_are_legal(backend):
    for shape in [(0, 2, 5), (2, 3, 0), (0,)]:
        keys, importance = make(backend, np.ones((*shape, 4))), make(backend, np.ones(shape))
        graph = build_graph(keys, importance, num_sources=2, num_neighbors=2, backend=backend)
        scores = propagate(importance, graph, backend=backend)
        assert tuple(select(scores, 3, backend=backend).shape) == (*shape[:-1], min(3, shape[-1]))


@each_backend
def test_float64_stays_and_integers_become_float32(backend):
    graph = one_edge(backend, 0.5)

    assert "float64" in str(propagate(make(backend, [1, 2, 3], np.float64), graph, backend=backend).dtype)
    assert "float32" in str(propagate(make(backend, [1, 2, 3], np.int64), graph, backend=backend).dtype)
    assert "float32" in str(propagate(make(backend, [1, 2, 3], np.float16), graph, backend=backend).dtype)


def test_bfloat16_is_widened_before_anything_is_computed():
    torch = pytest.importorskip("torch")
    keys = torch.randn(1, 2, 30, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    importance = torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(1)).bfloat16()

    narrow = build_graph(keys, importance, num_sources=3, num_neighbors=4)
    wide = build_graph(keys.float(), importance.float(), num_sources=3, num_neighbors=4)

    assert narrow.weights.dtype == torch.float32
    assert torch.equal(narrow.weights, wide.weights)
    assert torch.equal(narrow.neighbors, wide.neighbors)


@each_backend
def test_a_distance_serves_in_place_of_the_degree(backend):
    importance, near = make(backend, [4.0, 3.0, 2.0, 1.0]), make(backend, [0.5, 0.25, -0.5, float("nan")])
    apart = make(backend, [0.5, 0.75, 1.5, float("nan")])

    for fusion in ("power", "max_rank", "mean_rank"):
        by_degree = fuse(importance, near, fusion=fusion, exponent=3, backend=backend)
        by_distance = fuse(importance, distance=apart, fusion=fusion, exponent=3, backend=backend)
        assert backend.to_numpy(by_degree).tolist() == backend.to_numpy(by_distance).tolist()


@each_backend
def test_nearly_equal_keys_are_told_apart(backend):
    """One minus a cosine near 1 is rounding noise in float32, by which half of the kept tokens were others."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(1, 1, 1, 16)) + 1e-3 * random.normal(size=(1, 1, 400, 16))
    policy = GraphKV(Random(budget=100, num_sinks=0), Degree(exponent=1))

    found = evict(policy, make(backend, keys.astype(np.float32)), backend=backend)

    wanted = evict(policy, keys.astype(np.float32).astype(np.float64)).kept
    assert len(set(backend.to_numpy(found.kept).ravel()) & set(wanted.ravel())) >= 99
