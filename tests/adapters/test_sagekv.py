"""SAGE-KV against loops."""

from math import sqrt

import numpy as np
import pytest

from graphkv import SAGEKV, ArgumentError, ArgumentTypeError, evict
from graphkv.adapters.sagekv import summed_logits
from tests.adapters.loops import best, dot
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(19)
KEYS, QUERIES = RNG.normal(size=(2, 2, 30, 4)), RNG.normal(size=(2, 6, 3, 4))


def logits_by_loops(keys, queries):
    """Keys (H, N, D), queries (G H, Q, D)."""
    groups = len(queries) // len(keys)
    return [
        [
            sum(dot(queries[head * groups + member][-1], key) / sqrt(len(key)) for member in range(groups))
            for key in keys[head]
        ]
        for head in range(len(keys))
    ]


@each_library
@pytest.mark.parametrize(
    ("options", "num_sinks", "num_recent"), [({}, 4, 4), ({"num_sinks": 0}, 0, 6), ({"num_recent": 0}, 4, 0)]
)
def test_sinks_recents_and_the_highest_summed_logits_stay(backend, options, num_sinks, num_recent):
    decision = evict(
        SAGEKV(budget=12, **options),
        make(backend, KEYS, np.float64),
        queries=make(backend, QUERIES, np.float64),
        backend=backend,
    )

    for batch in range(2):
        logits = logits_by_loops(KEYS[batch].tolist(), QUERIES[batch].tolist())
        np.testing.assert_allclose(backend.to_numpy(decision.importance)[batch], logits, rtol=1e-10)
        for head in range(2):
            always = [*range(num_sinks), *range(30 - num_recent, 30)]
            rest = best(logits[head], 12 - len(always), set(range(30)) - set(always))
            assert backend.to_numpy(decision.kept)[batch, head].tolist() == sorted(always + rest)


def test_the_sum_of_logits_is_not_the_sum_of_probabilities():
    # One head is sure of token 0, the other slightly prefers token 1 and abhors token 0.
    query = np.asarray([[[6.0, 0.0], [0.0, 1.0]]])
    keys = np.asarray([[[[1.0, -4.0], [0.5, 0.0], [0.0, 0.0]]]])

    logits = summed_logits(query, keys, xp=NUMPY.xp)[0, 0]

    weights = np.exp(query[0] @ keys[0, 0].T / sqrt(2))
    probabilities = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=0)
    assert logits.argmax() == 1
    assert probabilities.argmax() == 0


def test_the_papers_setting_is_not_the_default_split():
    official, default = SAGEKV.official(), SAGEKV(budget=8192)

    assert (official.budget, official.num_sinks, official.num_recent) == (8192, 4, 7676)
    assert (official.protection(8192).count, default.protection(8192).count) == (7680, 4 + 4094)
    assert SAGEKV.official(window_length=20, num_chosen=6).num_recent == 10
    kept = [
        evict(policy, KEYS, queries=QUERIES).kept.tolist()
        for policy in (SAGEKV.official(window_length=20, num_chosen=6), SAGEKV(budget=20))
    ]
    assert kept[0] != kept[1]


@each_library
def test_ties_go_to_the_lower_position(backend):
    keys = make(backend, np.ones((1, 1, 12, 2)))

    decision = evict(SAGEKV(budget=6, num_sinks=1, num_recent=2), keys, queries=keys, backend=backend)

    assert backend.to_numpy(decision.kept).tolist() == [[[0, 1, 2, 3, 10, 11]]]


def test_a_budget_below_sinks_and_recents_keeps_the_highest_of_them():
    keys = np.asarray([[[[5.0], [1.0], [9.0], [3.0], [4.0]]]])

    decision = evict(SAGEKV(budget=2, num_sinks=2, num_recent=2), keys, queries=np.ones((1, 1, 1, 1)))

    assert decision.kept.tolist() == [[[0, 4]]]


@pytest.mark.parametrize("arguments", [{}, {"attention": np.ones((2, 6, 1, 30))}, {"queries": QUERIES[:, :, :0]}])
def test_the_last_query_must_be_there(arguments):
    with pytest.raises(ArgumentError, match="queries must hold the last position for SAGEKV; got none"):
        evict(SAGEKV(budget=9), KEYS, **arguments)


@pytest.mark.parametrize(
    ("make_policy", "error", "message"),
    [
        (lambda: SAGEKV(budget=9, num_sinks=-1), ArgumentError, "num_sinks must be at least 0"),
        (lambda: SAGEKV(budget=9, num_recent=0.5), ArgumentTypeError, "num_recent must be an integer"),
        (lambda: SAGEKV.official(window_length=20, num_chosen=17), ArgumentError, "window_length must be at least 21"),
    ],
)
def test_bad_options_are_named(make_policy, error, message):
    with pytest.raises(error, match=message):
        make_policy()
