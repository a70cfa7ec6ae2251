"""Expected Attention against loops, a quadrature, and the published form with an average rotation."""

from math import exp, log, sqrt

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, ExpectedAttention, evict
from graphkv.adapters.expected_attention import expected_logits, moments
from tests.adapters.loops import dot, mean, softmax
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(23)
KEYS, VALUES = RNG.normal(size=(2, 2, 20, 4)), RNG.normal(size=(2, 2, 20, 3))
QUERIES = 1 + RNG.normal(size=(2, 6, 20, 4))
VALID = np.arange(20) >= np.asarray([0, 5])[:, None]


def run(policy, backend, **change):
    arrays = {"values": VALUES, "queries": QUERIES, **change}
    arrays = {name: make(backend, x, np.float64) for name, x in arrays.items() if x is not None}
    return evict(policy, make(backend, KEYS, np.float64), valid=make(backend, VALID, bool), backend=backend, **arrays)


def importance_by_loops(keys, queries, norms, first, num_sinks, epsilon):
    """One KV head: keys (N, D), queries of its group (G, Q, D) for the last Q positions, padding before `first`."""
    number, size = len(keys), len(keys[0])
    past_sinks = range(first + num_sinks, number)
    expected = []
    for rows in queries:
        used = [rows[j - (number - len(rows))] for j in past_sinks if j >= number - len(rows)]
        mu = [mean([query[d] for query in used]) for d in range(size)]
        sigma = [
            [mean([(query[a] - mu[a]) * (query[b] - mu[b]) for query in used]) for b in range(size)]
            for a in range(size)
        ]
        z = [
            dot(mu, keys[j]) / sqrt(size) + dot(keys[j], [dot(line, keys[j]) for line in sigma]) / (2 * size)
            for j in past_sinks
        ]
        expected.append(softmax(z))
    return [
        (mean(members) + epsilon) * norms[j] for j, members in zip(past_sinks, zip(*expected, strict=True), strict=True)
    ]


@each_library
@pytest.mark.parametrize("num_sinks", [0, 2])
@pytest.mark.parametrize("num_queries", [20, 9])
@pytest.mark.parametrize("with_values", [True, False])
def test_the_score_equals_loops(backend, num_sinks, num_queries, with_values):
    decision = run(
        ExpectedAttention(budget=8, num_sinks=num_sinks, epsilon=0.03, value_norm=with_values),
        backend,
        queries=QUERIES[:, :, 20 - num_queries :],
        values=VALUES if with_values else None,
    )

    for batch, head in np.ndindex(2, 2):
        first = 5 * batch
        norms = np.linalg.norm(VALUES[batch, head], axis=-1) if with_values else np.ones(20)
        expected = importance_by_loops(
            KEYS[batch, head].tolist(),
            QUERIES[batch, 3 * head : 3 * head + 3, 20 - num_queries :].tolist(),
            norms.tolist(),
            first,
            num_sinks,
            0.03,
        )
        found = backend.to_numpy(decision.importance)[batch, head]
        np.testing.assert_allclose(found[first + num_sinks :], expected, rtol=1e-10)
        assert (found[: first + num_sinks] == 0).all()


def test_the_logit_is_the_logarithm_of_an_expected_exponential():
    mean_query, deviation, key = 0.7, 1.3, 0.9
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    found = expected_logits(
        np.full((1, 1, 1, 1), mean_query),
        np.full((1, 1, 1, 1, 1), deviation**2),
        np.full((1, 1, 1, 1), key),
        xp=NUMPY.xp,
    )

    queries = mean_query + deviation * nodes
    expected = log(sum(w * exp(q * key) for w, q in zip(weights, queries, strict=True)) / weights.sum())
    np.testing.assert_allclose(found.item(), expected, rtol=1e-12)


def test_queries_times_the_average_rotation_give_the_papers_moments():
    raw = RNG.normal(size=(50, 4)) @ RNG.normal(size=(4, 4)) + 1
    angles = np.arange(50, 50 + 16)[:, None] * np.asarray([1.0, 0.1])
    cos, sin = np.cos(angles).mean(axis=0), np.sin(angles).mean(axis=0)
    rotation = np.block([[np.diag(cos), -np.diag(sin)], [np.diag(sin), np.diag(cos)]])

    mean_query, covariance = moments(raw @ rotation.T, np.ones(50, bool), xp=NUMPY.xp)

    np.testing.assert_allclose(mean_query, rotation @ raw.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, rotation @ np.cov(raw.T, bias=True) @ rotation.T, rtol=1e-10)
    # The average of rotations is no rotation: it forgets what turns quickly.
    assert np.linalg.norm(rotation @ [1, 0, 0, 0]) < 0.3


@each_library
def test_queries_of_padding_may_hold_anything(backend):
    spoiled = QUERIES.copy()
    spoiled[1, :, :5] = np.nan

    found = run(ExpectedAttention(budget=8), backend, queries=spoiled)

    np.testing.assert_array_equal(
        backend.to_numpy(found.importance), backend.to_numpy(run(ExpectedAttention(budget=8), backend).importance)
    )


def test_official_differs_in_epsilon_alone():
    official, default = ExpectedAttention.official(8), ExpectedAttention(budget=8)

    assert official == ExpectedAttention(budget=8, num_sinks=4, epsilon=0.0)
    assert (default.num_sinks, default.epsilon) == (4, 0.02)
    # A long value that nobody is expected to attend to: 0.02 is enough to keep it.
    keys = np.asarray([0.0] * 4 + [3.0, -9.0, 2.0])[None, None, :, None]
    values = np.asarray([0.0] * 4 + [1.0, 50.0, 1.0])[None, None, :, None]
    queries = np.ones((1, 1, 7, 1))
    kept = [
        evict(policy, keys, values=values, queries=queries).kept[0, 0, -1]
        for policy in (ExpectedAttention.official(5), ExpectedAttention(budget=5))
    ]
    assert kept == [4, 5]


@each_library
def test_ties_go_to_the_lower_position(backend):
    keys = make(backend, np.ones((1, 1, 12, 2)))

    decision = evict(ExpectedAttention(budget=4, num_sinks=1), keys, values=keys, queries=keys, backend=backend)

    assert backend.to_numpy(decision.kept).tolist() == [[[0, 1, 2, 3]]]


def test_a_budget_below_the_sinks_keeps_the_first_of_them():
    found = evict(ExpectedAttention(budget=2), KEYS, values=VALUES, queries=QUERIES)

    assert found.kept.tolist() == [[[0, 1]] * 2] * 2


def test_large_keys_overflow_nothing():
    policy = ExpectedAttention(budget=8, value_norm=False)
    found = evict(policy, 1e4 * KEYS.astype("f4"), queries=QUERIES.astype("f4"))

    assert np.isfinite(found.importance).all()


@pytest.mark.parametrize("arguments", [{}, {"attention": np.ones((2, 6, 20, 20))}, {"queries": QUERIES[:, :, :0]}])
def test_queries_must_be_there(arguments):
    with pytest.raises(ArgumentError, match="queries must hold the last position for ExpectedAttention; got none"):
        evict(ExpectedAttention(budget=8), KEYS, values=VALUES, **arguments)


def test_values_must_be_there_unless_their_norm_is_left_out():
    with pytest.raises(ArgumentError, match="values must be given for ExpectedAttention; got None"):
        evict(ExpectedAttention(budget=8), KEYS, queries=QUERIES)
    evict(ExpectedAttention(budget=8, value_norm=False), KEYS, queries=QUERIES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_sinks": -1}, ArgumentError, "num_sinks must be at least 0"),
        ({"epsilon": -0.1}, ArgumentError, "epsilon must lie in"),
        ({"epsilon": "small"}, ArgumentTypeError, "epsilon must be a real number"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ExpectedAttention(budget=8, **options)
