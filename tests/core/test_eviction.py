"""`evict` and `GraphKV`: budgets, identity, padding, and how the steps hang together."""

from dataclasses import dataclass

import numpy as np
import pytest

from graphkv import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    Bar,
    Decay,
    Degree,
    GraphKV,
    PageRank,
    Policy,
    Random,
    Signal,
    SnapKV,
    StreamingLLM,
    build_graph,
    evict,
    propagate,
    select,
)
from graphkv.core.budgets import count_of, tokens_of
from tests.support.arrays import each_backend, make

RNG = np.random.default_rng(7)
KEYS = RNG.normal(size=(2, 3, 50, 8))
QUERIES = RNG.normal(size=(2, 6, 10, 8))
SNAPKV = SnapKV(budget=20, window=10, kernel_size=3)


@pytest.mark.parametrize(
    ("budget", "tokens", "expected"),
    [
        (0.9, 100, 90),
        (0.8, 100, 80),
        (0.1, 8000, 800),
        (0.145, 100, 15),
        (1.0, 7, 7),
        (0.5, 3, 2),
        (0.01, 10, 0),
        (7, 3, 7),
    ],
)
def test_budgets_are_exact(budget, tokens, expected):
    assert tokens_of(budget, tokens) == expected


@pytest.mark.parametrize(
    ("amount", "total", "expected"), [(0.3, 480, 144), (0.3, 10, 3), (0.01, 10, 1), (0.0, 9, 0), (4, 9, 4)]
)
def test_shares_are_floored_but_at_least_one(amount, total, expected):
    assert count_of(amount, total) == expected


@each_backend
@pytest.mark.parametrize("budget", [0, 1, 4, 10, 11, 12, 49, 50, 51, 0.5, 1.0])
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV])
def test_exactly_the_budget_is_kept_in_ascending_order(backend, budget, wrap):
    policies = [
        SnapKV(budget=budget, window=10, num_sinks=2),
        StreamingLLM(budget=budget),
        Random(budget=budget, seed=3),
    ]
    for base in policies:
        decision = evict(wrap(base), make(backend, KEYS), queries=make(backend, QUERIES), backend=backend)
        kept = backend.to_numpy(decision.kept)
        assert kept.shape == (2, 3, min(50, tokens_of(budget, 50)))
        assert (np.diff(kept, axis=-1) > 0).all()


@each_backend
def test_what_fits_is_kept_whole_and_untouched(backend):
    keys = make(backend, KEYS)

    decision = evict(SnapKV(budget=50, window=10), keys, backend=backend)

    assert backend.to_numpy(decision.kept).tolist() == np.broadcast_to(np.arange(50), (2, 3, 50)).tolist()
    assert decision.apply(keys) is keys
    assert decision.scores is None


@each_backend
def test_apply_gathers_any_array_of_the_tokens(backend):
    decision = evict(Random(budget=7), make(backend, KEYS), backend=backend)
    kept = backend.to_numpy(decision.kept)

    assert np.array_equal(
        backend.to_numpy(decision.apply(make(backend, KEYS))), np.take_along_axis(KEYS.astype("f4"), kept[..., None], 2)
    )
    positions = make(backend, np.broadcast_to(np.arange(50), (2, 3, 50)).copy(), np.int64)
    assert np.array_equal(backend.to_numpy(decision.apply(positions)), kept)
    with pytest.raises(ArgumentError, match=r"x must have shape .*\(2, 3, 50\)"):
        decision.apply(make(backend, KEYS[:, :2]))


@each_backend
def test_graphkv_is_the_three_steps_over_the_open_tokens(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)
    policy = GraphKV(SNAPKV, Decay(source_ratio=0.5, neighbors=4, rounds=2, strength=0.5))

    decision = evict(policy, keys, queries=queries, backend=backend)

    base = evict(SNAPKV, keys, queries=queries, backend=backend)
    window = np.broadcast_to(np.arange(50) >= 40, (2, 3, 50)).copy()
    graph = build_graph(
        keys, base.scores, num_sources=5, num_neighbors=4, valid=make(backend, ~window, bool), backend=backend
    )
    scores = propagate(base.scores, graph, rounds=2, strength=0.5, backend=backend)
    kept = select(scores, 20, protected=make(backend, window, bool), backend=backend)
    np.testing.assert_array_equal(backend.to_numpy(decision.kept), backend.to_numpy(kept))
    np.testing.assert_array_equal(backend.to_numpy(decision.scores), backend.to_numpy(scores))
    np.testing.assert_array_equal(backend.to_numpy(decision.importance), backend.to_numpy(base.importance))
    assert not np.array_equal(backend.to_numpy(base.kept), backend.to_numpy(decision.kept))


@each_backend
def test_recomputed_sources_are_a_loop_over_two_steps(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)
    policy = GraphKV(SNAPKV, Decay(source_ratio=0.5, neighbors=4, rounds=3, recompute_sources=True))

    decision = evict(policy, keys, queries=queries, backend=backend)

    scores = evict(SNAPKV, keys, queries=queries, backend=backend).scores
    candidates = make(backend, np.broadcast_to(np.arange(50) < 40, (2, 3, 50)).copy(), bool)
    for _ in range(3):
        graph = build_graph(keys, scores, num_sources=5, num_neighbors=4, valid=candidates, backend=backend)
        scores = propagate(scores, graph, backend=backend)
    np.testing.assert_array_equal(backend.to_numpy(decision.scores), backend.to_numpy(scores))


@each_backend
@pytest.mark.parametrize("options", [{"source_ratio": 0.0}, {"neighbors": 0}, {"rounds": 0}, {"strength": 0.0}])
def test_graphkv_without_edges_is_the_base(backend, options):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    alone = evict(SNAPKV, keys, queries=queries, backend=backend)
    graph = evict(GraphKV(SNAPKV, Decay(**options)), keys, queries=queries, backend=backend)

    np.testing.assert_array_equal(backend.to_numpy(graph.kept), backend.to_numpy(alone.kept))


def test_sources_are_counted_from_what_the_base_may_still_choose():
    decision = evict(GraphKV(SNAPKV, Decay(source_ratio=0.35, neighbors=0.2)), KEYS, queries=QUERIES)

    # Budget 20 less the window of 10 leaves P = 10: K = floor(3.5), M = 2.
    assert decision.graph.weights.shape == (2, 3, 3, 2)


def test_a_source_ratio_is_a_share_also_as_an_integer():
    decision = evict(GraphKV(SNAPKV, Decay(source_ratio=1, neighbors=1)), KEYS, queries=QUERIES)

    assert decision.graph.num_sources == 10


def test_a_budget_below_the_protected_tokens_leaves_no_room_for_a_graph():
    decision = evict(GraphKV(SnapKV(budget=8, window=10), Decay(neighbors=1)), KEYS, queries=QUERIES)

    assert decision.graph.weights.shape == (2, 3, 0, 0)
    # The newest of the window.
    assert decision.kept[0, 0].tolist() == list(range(42, 50))


@each_backend
@pytest.mark.parametrize(
    "base", [SnapKV(budget=12, window=5, kernel_size=3, num_sinks=1), StreamingLLM(budget=12), Random(budget=12)]
)
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV])
def test_a_left_padded_row_keeps_what_it_keeps_alone(backend, base, wrap):
    pads = 9
    valid = np.ones((2, 50), dtype=bool)
    valid[1, :pads] = False

    batch = evict(
        wrap(base),
        make(backend, KEYS),
        queries=make(backend, QUERIES),
        valid=make(backend, valid, bool),
        backend=backend,
    )
    alone = evict(wrap(base), make(backend, KEYS[1:, :, pads:]), queries=make(backend, QUERIES[1:]), backend=backend)

    np.testing.assert_array_equal(backend.to_numpy(batch.kept)[1] - pads, backend.to_numpy(alone.kept)[0])


def test_importance_is_float32_or_wider():
    assert evict(SNAPKV, KEYS.astype("f2"), queries=QUERIES.astype("f2")).scores.dtype == np.float32
    assert evict(SNAPKV, KEYS, queries=QUERIES).scores.dtype == np.float64


def test_inputs_are_not_written_to():
    keys, queries = KEYS.astype("f4"), QUERIES.astype("f4")
    keys.setflags(write=False)
    queries.setflags(write=False)

    evict(GraphKV(SNAPKV, Decay(neighbors=1, rounds=2)), keys, queries=queries)

    np.testing.assert_array_equal(keys, KEYS.astype("f4"))


def test_policies_are_immutable_values():
    assert GraphKV(SnapKV(budget=5)) == GraphKV(SnapKV(budget=5))
    assert hash(SnapKV(budget=5)) == hash(SnapKV(budget=5))
    with pytest.raises(AttributeError):
        SnapKV(budget=5).window = 3


@each_backend
@pytest.mark.parametrize("signal", [Decay(neighbors=3), Degree(), PageRank()], ids=["decay", "degree", "pagerank"])
def test_unrotated_keys_are_compared_in_place_of_the_cached_ones(backend, signal):
    # Scores by position, so keys are for comparison only.
    base, cached, unrotated = StreamingLLM(budget=20), make(backend, KEYS), make(backend, KEYS[..., ::-1] ** 3)

    found = evict(GraphKV(base, signal, unrotated=True), cached, unrotated_keys=unrotated, backend=backend)

    wanted = evict(GraphKV(base, signal), unrotated, backend=backend)
    other = evict(GraphKV(base, signal), cached, backend=backend)
    assert backend.to_numpy(found.scores).tolist() == backend.to_numpy(wanted.scores).tolist()
    assert backend.to_numpy(found.scores).tolist() != backend.to_numpy(other.scores).tolist()


def test_a_policy_says_that_it_needs_unrotated_keys():
    assert GraphKV(GraphKV(SNAPKV, unrotated=True)).needs().unrotated_keys
    assert not GraphKV(SNAPKV).needs().unrotated_keys


def test_the_default_is_the_papers_setting():
    paper = GraphKV(SNAPKV)

    assert paper.signal == Decay(source_ratio=0.3, neighbors=2, rounds=1, accumulation="product", strength=1.0)
    assert not paper.signal.recompute_sources
    assert not paper.unrotated
    assert paper.budget == 20
    assert isinstance(paper, Policy)


def test_a_signal_of_ones_own_needs_no_change_of_graphkv():
    @dataclass(frozen=True, kw_only=True)
    class Reversed(Signal):
        def rescore(self, scores, keys, /, *, valid, candidates, open_tokens, backend):
            assert open_tokens == 20 - 10
            return backend.xp.where(candidates, -scores, scores), None

    alone = evict(SNAPKV, KEYS, queries=QUERIES)
    found = evict(GraphKV(SNAPKV, Reversed()), KEYS, queries=QUERIES)

    np.testing.assert_array_equal(found.scores, np.where(found.protected, alone.scores, -alone.scores))
    assert not np.array_equal(found.kept, alone.kept)
    assert found.graph is None


@pytest.mark.parametrize(
    ("make_policy", "error", "message"),
    [
        (lambda: SnapKV(budget=-1), ArgumentError, "budget must be at least 0; got -1"),
        (lambda: SnapKV(budget=1.5), ArgumentError, "a share above 0 and at most 1; got 1.5"),
        (lambda: SnapKV(budget=0.0), ArgumentError, "a share above 0 and at most 1; got 0.0"),
        (lambda: SnapKV(budget=True), ArgumentTypeError, "budget must be an integer or a float share; got True"),
        (lambda: SnapKV(budget="512"), ArgumentTypeError, "budget must be an integer or a float share; got '512'"),
        (lambda: SnapKV(budget=9, kernel_size=4), ArgumentError, "kernel_size must be odd; got 4"),
        (lambda: SnapKV(budget=9, window=0), ArgumentError, "window must be at least 1; got 0"),
        (lambda: SnapKV(budget=9, pooling="mean"), ArgumentError, "pooling must be one of"),
        (lambda: SnapKV(budget=9, group_reduction="min"), ArgumentError, "group_reduction must be one of"),
        (lambda: StreamingLLM(budget=9, num_sinks=-1), ArgumentError, "num_sinks must be at least 0"),
        (lambda: Random(budget=9, seed=0.5), ArgumentTypeError, "seed must be an integer; got 0.5"),
        (lambda: GraphKV(4), ArgumentTypeError, "base must be a Policy; got int"),
        (lambda: GraphKV(SNAPKV, Decay(neighbors=1, source_ratio=2.0)), ArgumentError, "source_ratio must lie in"),
        (lambda: GraphKV(SNAPKV, Decay(neighbors=-1)), ArgumentError, "neighbors must be at least 0"),
        (lambda: GraphKV(SNAPKV, signal="decay"), ArgumentTypeError, "signal must be a Signal; got str"),
        (
            lambda: GraphKV(SNAPKV, Decay(neighbors=1, accumulation="sum", rounds=2)),
            ArgumentError,
            "rounds must be 1 with accumulation 'sum'",
        ),
        (
            lambda: GraphKV(SNAPKV, Decay(neighbors=1, recompute_sources=1)),
            ArgumentTypeError,
            "recompute_sources must be True or False",
        ),
        (lambda: Degree(neighbors=2), TypeError, "unexpected keyword argument 'neighbors'"),
        (lambda: Degree(source_ratio=0.1), TypeError, "unexpected keyword argument 'source_ratio'"),
        (lambda: Degree(rounds=2), TypeError, "unexpected keyword argument 'rounds'"),
        (lambda: Degree(accumulation="sum"), TypeError, "unexpected keyword argument 'accumulation'"),
        (lambda: Degree(strength=0.5), TypeError, "unexpected keyword argument 'strength'"),
        (lambda: Degree(recompute_sources=True), TypeError, "unexpected keyword argument 'recompute_sources'"),
        (lambda: Decay(fusion="max_rank"), TypeError, "unexpected keyword argument 'fusion'"),
        (lambda: Bar(exponent=2), TypeError, "unexpected keyword argument 'exponent'"),
        (lambda: Bar(rounds=2), TypeError, "unexpected keyword argument 'rounds'"),
        (lambda: Bar(strength=0.5), TypeError, "unexpected keyword argument 'strength'"),
        (lambda: PageRank(neighbors=2), TypeError, "unexpected keyword argument 'neighbors'"),
        (lambda: GraphKV(SNAPKV, neighbors=2), TypeError, "unexpected keyword argument 'neighbors'"),
        (lambda: GraphKV(SNAPKV, Degree), ArgumentTypeError, "signal must be a Signal; got"),
        (lambda: PageRank(damping=1.5), ArgumentError, r"damping must lie in \[0, 1\]; got 1.5"),
        (lambda: PageRank(damping="much"), ArgumentTypeError, "damping must be a real number"),
        (lambda: PageRank(rounds=-1), ArgumentError, "rounds must be at least 0; got -1"),
        (lambda: PageRank(rounds=1.0), ArgumentTypeError, "rounds must be an integer; got 1.0"),
        (
            lambda: GraphKV(SNAPKV, Degree(fusion="mean_rank", exponent=2)),
            ArgumentError,
            "exponent must be left out with fusion 'mean_rank'; got 2",
        ),
        (lambda: GraphKV(SNAPKV, Degree(fusion="sum")), ArgumentError, "fusion must be one of"),
        (lambda: GraphKV(SNAPKV, Degree(exponent=0)), ArgumentError, "exponent must be at least 1; got 0"),
        (
            lambda: GraphKV(SNAPKV, Degree(exponent=0.5)),
            ArgumentTypeError,
            "exponent must be an integer; got 0.5",
        ),
    ],
)
def test_a_bad_policy_says_what_is_wrong(make_policy, error, message):
    with pytest.raises(error, match=message):
        make_policy()


@each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": None}, ArgumentError, "queries must hold the last 10 positions for SnapKV; got none"),
        ({"queries": QUERIES[:, :, :4]}, ArgumentError, "queries must hold the last 10 positions for SnapKV; got 4"),
        ({"queries": QUERIES[:, :4]}, ArgumentError, "queries must have a multiple of the 3 KV heads of keys; got 4"),
        ({"queries": QUERIES[..., :4]}, ArgumentError, "queries must have shape"),
        ({"queries": np.ones((2, 6, 51, 8))}, ArgumentError, "queries must cover at most the N=50 positions"),
        ({"keys": KEYS[0]}, ArgumentError, r"keys must have shape \(batch, kv_heads, N, D\)"),
        ({"keys": KEYS > 0}, ArgumentTypeError, "keys must be real"),
        ({"valid": np.ones((2, 49), bool)}, ArgumentError, "valid must have the shape"),
        ({"valid": np.ones((2, 50))}, ArgumentTypeError, "valid must be bool"),
        ({"values": KEYS[:1]}, ArgumentError, "values must have shape"),
        ({"layer": 1}, ArgumentError, "layer must be below num_layers=1; got 1"),
        ({"policy": "snapkv"}, ArgumentTypeError, "policy must be a Policy; got str"),
    ],
)
def test_evict_refuses_bad_input(backend, change, error, message):
    arguments = {"policy": SNAPKV, "keys": KEYS, "queries": QUERIES, **change}
    arguments = {
        name: make(backend, value, None) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        evict(arguments.pop("policy"), arguments.pop("keys"), backend=backend, **arguments)


def test_mixed_libraries_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="keys: 'numpy', queries: 'torch'"):
        evict(SNAPKV, KEYS, queries=torch.as_tensor(QUERIES))
    with pytest.raises(BackendError, match="keys must be an array of 'torch' for backend 'torch'; got 'numpy'"):
        evict(SNAPKV, KEYS, queries=QUERIES, backend="torch")
    with pytest.raises(BackendError, match="keys must be an array; got list"):
        evict(SNAPKV, KEYS.tolist())
    with pytest.raises(BackendError, match=r"backend must be one of .* got 'tensorflow'"):
        evict(SNAPKV, KEYS, backend="tensorflow")
