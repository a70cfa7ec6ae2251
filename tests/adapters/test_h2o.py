"""H2O against published choices, a step-by-step simulation with its own lists, and the dense column sums."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from graphkv import H2O, ArgumentError, ArgumentTypeError, Memory, evict
from graphkv.adapters.attention import window_attention
from tests.adapters.decoding import decode
from tests.adapters.loops import REDUCE, best, simulate
from tests.support.arrays import NUMPY, each_library, make

VECTORS = json.loads((Path(__file__).parent / "h2o_vectors.json").read_text())["cases"]
RNG = np.random.default_rng(11)
KEYS, QUERIES = 2 * RNG.normal(size=(1, 2, 40, 4)), 2 * RNG.normal(size=(1, 6, 40, 4))


@each_library
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"recent{case['recent']}")
def test_h2o_keeps_of_a_prompt_what_the_public_code_keeps(backend, case):
    policy = H2O(budget=case["budget"], num_recent=case["recent"], group_reduction=case["group_reduction"])

    decision = evict(policy, make(backend, case["keys"]), queries=make(backend, case["queries"]), backend=backend)

    assert backend.to_numpy(decision.kept).tolist() == case["kept"]


def test_there_are_two_vectors():
    assert [case["method"] for case in VECTORS] == ["h2o-prefill"] * 2


def keep_heavy(budget, num_recent, reduction, by_age):
    """The rule, on one head's lists: recents, then the most attention."""

    def decide(head):
        number = len(head.position)
        if number <= budget:
            return None
        scores = [REDUCE[reduction]([sum(x) / (len(x) if by_age else 1) for x in token]) for token in head.received]
        recent = range(max(0, number - num_recent), number)
        chosen = best(scores, budget, recent)
        return chosen + best(scores, budget - len(chosen), set(range(number)) - set(recent))

    return decide


@each_library
@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
@pytest.mark.parametrize(("num_recent", "by_age"), [(None, False), (None, True), (0, False), (0, True), (3, False)])
def test_every_decode_step_equals_a_simulation(backend, reduction, num_recent, by_age):
    policy = H2O(budget=9, num_recent=num_recent, group_reduction=reduction, age_normalized=by_age, block_size=5)
    expected = simulate(
        KEYS[0].tolist(),
        QUERIES[0].tolist(),
        14,
        keep_heavy(9, 4 if num_recent is None else num_recent, reduction, by_age),
    )

    steps = decode(policy, KEYS, QUERIES, 14, backend)

    assert [stored[0].tolist() for _, stored in steps] == expected
    assert len(expected) == 27


def test_the_simulation_tells_the_options_apart():
    def last(**options):
        return decode(H2O(budget=9, **options), KEYS, QUERIES, 14, NUMPY)[-1][1].tolist()

    found = [last(), last(num_recent=0), last(age_normalized=True), last(group_reduction="max")]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@each_library
def test_a_prompt_below_the_budget_is_counted_all_the_same(backend):
    expected = simulate(KEYS[0].tolist(), QUERIES[0].tolist(), 1, keep_heavy(9, 4, "mean", False))

    steps = decode(H2O(budget=9), KEYS, QUERIES, 5, backend)

    assert [stored[0].tolist() for _, stored in steps] == expected[4:]


@each_library
def test_a_prompt_in_chunks_has_the_sums_of_the_whole(backend):
    whole, _ = decode(H2O(budget=40), KEYS, QUERIES, 40, backend)[-1]
    chunked, _ = decode(H2O(budget=40), KEYS, QUERIES, 7, backend, chunk=6)[-1]

    assert set(whole.state.tokens) == {"attention", "queries"}
    for name, sums in whole.state.tokens.items():
        np.testing.assert_allclose(backend.to_numpy(chunked.state.tokens[name]), backend.to_numpy(sums), rtol=1e-12)
    assert backend.to_numpy(whole.state.tokens["queries"])[0, 0].tolist() == list(range(40, 0, -1))
    # Every row of attention sums to 1.
    np.testing.assert_allclose(backend.to_numpy(whole.state.tokens["attention"]).sum(axis=2), 40)


def test_more_queries_than_new_tokens_do_not_count_twice():
    first = evict(H2O(budget=20), KEYS[:, :, :12], queries=QUERIES[:, :, :12])

    exact = evict(H2O(budget=9), KEYS[:, :, :15], queries=QUERIES[:, :, 12:15], state=first.state)
    more = evict(H2O(budget=9), KEYS[:, :, :15], queries=QUERIES[:, :, 8:15], state=first.state)

    np.testing.assert_array_equal(more.importance, exact.importance)
    np.testing.assert_array_equal(more.state.tokens["queries"], exact.state.tokens["queries"])


@each_library
@pytest.mark.parametrize("block_size", [1, 7, 39, 40, 64])
def test_blocks_equal_the_dense_column_sums(backend, block_size):
    valid = np.arange(40) >= np.asarray([0, 3])[:, None]
    keys, queries = np.concatenate([KEYS, KEYS[..., ::-1]]), np.concatenate([QUERIES, QUERIES[..., ::-1]])
    dense = window_attention(queries, keys, np.broadcast_to(valid[:, None], (2, 2, 40)), xp=NUMPY.xp)
    policy = H2O(budget=10, block_size=block_size)

    decision = evict(
        policy,
        make(backend, keys, np.float64),
        queries=make(backend, queries, np.float64),
        valid=make(backend, valid, bool),
        backend=backend,
    )

    np.testing.assert_allclose(
        backend.to_numpy(decision.importance), dense.sum(axis=-2).mean(axis=2), rtol=1e-12, atol=1e-15
    )


def test_blocks_need_a_twentieth_of_the_dense_memory():
    rng = np.random.default_rng(1)
    keys = rng.normal(size=(1, 1, 4096, 4)).astype("f4")
    queries = rng.normal(size=(1, 2, 4096, 4)).astype("f4")

    def peak(compute):
        tracemalloc.start()
        try:
            return compute(), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def dense():
        everything = np.ones((1, 1, 4096), bool)
        # One query head at a time: half of what both at once would take.
        # Summed in float64: 4096 terms one by one in float32 would be off by more than the blocks are.
        each = [
            window_attention(queries[:, [h]], keys, everything, xp=NUMPY.xp).sum(axis=-2, dtype=np.float64)
            for h in (0, 1)
        ]
        return np.concatenate(each, axis=2).mean(axis=2)

    expected, dense_bytes = peak(dense)
    decision, block_bytes = peak(lambda: evict(H2O(budget=100), keys, queries=queries))

    np.testing.assert_allclose(decision.importance, expected, rtol=1e-6, atol=0)
    assert block_bytes * 20 < dense_bytes


@each_library
def test_given_attention_rows_replace_the_queries(backend):
    rows = window_attention(QUERIES, KEYS, np.ones((1, 2, 40), bool), xp=NUMPY.xp).reshape(1, 6, 40, 40)
    keys = make(backend, KEYS, np.float64)

    by_rows = evict(H2O(budget=9), keys, attention=make(backend, rows, np.float64), backend=backend)
    by_queries = evict(H2O(budget=9), keys, queries=make(backend, QUERIES, np.float64), backend=backend)

    np.testing.assert_allclose(
        backend.to_numpy(by_rows.importance), backend.to_numpy(by_queries.importance), rtol=1e-12
    )


def test_given_rows_of_padding_and_of_the_future_do_not_count():
    rows = np.full((1, 1, 4, 4), 0.25)
    valid = np.asarray([[False, True, True, True]])

    decision = evict(H2O(budget=2), np.ones((1, 1, 4, 2)), attention=rows, valid=valid)

    assert decision.importance.tolist() == [[[0, 0.75, 0.5, 0.25]]]
    assert decision.kept.tolist() == [[[1, 3]]]
    assert decision.state.tokens["queries"].tolist() == [[[3, 1]]]


def test_ties_go_to_the_lower_position():
    # Each token sees itself alone: all sums are 1.
    decision = evict(H2O(budget=5, num_recent=2), np.ones((1, 1, 9, 2)), attention=np.eye(9)[None, None])

    assert decision.kept.tolist() == [[[0, 1, 2, 7, 8]]]


def test_a_budget_below_the_recents_keeps_the_heaviest_of_them():
    rows = np.eye(6)[None, None].copy()
    rows[0, 0, 5, :] = [0.4, 0, 0, 0, 0.5, 0.1]

    decision = evict(H2O(budget=2, num_recent=3), np.ones((1, 1, 6, 2)), attention=rows)

    assert decision.kept.tolist() == [[[3, 4]]]


def test_the_official_sizes_are_not_the_default_split():
    official = H2O.official(6, 3)

    assert (official.budget, official.num_recent, official.group_reduction) == (9, 3, "sum")
    assert (H2O(budget=9).protection(9).count, official.protection(9).count) == (4, 3)
    kept = [evict(policy, KEYS, queries=QUERIES) for policy in (official, H2O(budget=9))]
    assert [decision.protected.sum() for decision in kept] == [2 * 3, 2 * 4]
    np.testing.assert_allclose(kept[0].importance, 3 * kept[1].importance)
    assert kept[0].kept.tolist() != kept[1].kept.tolist()


OTHERS = Memory({"sum": KEYS[..., 0]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "queries must hold all 40 new positions for H2O; got none"),
        ({"queries": QUERIES[:, :, 1:]}, "queries must hold all 40 new positions for H2O; got 39"),
        ({"attention": np.ones((1, 6, 3, 40))}, "attention must hold all 40 new positions for H2O; got 3"),
        (
            {
                "queries": QUERIES[:, :, -1:],
                "state": Memory({"attention": KEYS[:, :, :38, :3], "queries": KEYS[:, :, :38, 0]}),
            },
            "queries must hold all 2 new positions for H2O; got 1",
        ),
        (
            {"queries": QUERIES, "state": Memory({"sum": KEYS[..., 0]})},
            r"state must hold \['attention', 'queries'\] for H2O",
        ),
        (
            {"state": Memory({"sum": KEYS[..., 0]})},
            r"state must hold \['attention', 'queries'\] for H2O; got \['sum'\]",
        ),
    ],
)
def test_h2o_says_what_is_missing(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        evict(H2O(budget=9), KEYS, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_recent": -1}, ArgumentError, "num_recent must be at least 0"),
        ({"num_recent": 0.5}, ArgumentTypeError, "num_recent must be an integer"),
        ({"group_reduction": "median"}, ArgumentError, "group_reduction must be one of"),
        ({"age_normalized": 1}, ArgumentTypeError, "age_normalized must be True or False"),
        ({"block_size": 0}, ArgumentError, "block_size must be at least 1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        H2O(budget=9, **options)


def test_a_padded_query_between_others_gives_nothing():
    rows = np.tril(np.full((4, 4), 0.25))[None, None]
    valid = np.asarray([[True, False, True, True]])

    decision = evict(H2O(budget=2), np.ones((1, 1, 4, 2)), attention=rows, valid=valid)

    assert decision.importance.tolist() == [[[0.75, 0, 0.5, 0.25]]]
    assert decision.state.tokens["queries"].tolist() == [[[3, 1]]]
