"""CAKE: indicators and preferences against loops."""

from math import exp, log, sqrt

import numpy as np
import pytest

from graphkv import CAKE, ArgumentError, ArgumentTypeError, GraphKV, LayerBudgets, evict
from graphkv.core import Layer
from tests.support.arrays import BACKENDS, each_backend, make

RNG = np.random.default_rng(12)
KEYS = RNG.normal(size=(2, 2, 17, 4))
QUERIES = RNG.normal(size=(2, 6, 5, 4))


def window_by_loops(keys, queries, window):
    """Attention of the last queries to the past, [query head][query][token]; keys (H, N, D), queries (G H, Q, D)."""
    groups, tokens = len(queries) // len(keys), len(keys[0])
    result = []
    for head, own in enumerate(queries):
        rows = []
        for w in range(window):
            query = own[len(own) - window + w]
            logits = [
                sum(a * b for a, b in zip(query, key, strict=True)) / sqrt(len(key))
                for key in keys[head // groups][: tokens - window + w + 1]
            ]
            total = sum(map(exp, logits))
            rows.append([exp(logit) / total for logit in logits[: tokens - window]])
        result.append(rows)
    return result


def variance(values):
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1) if len(values) > 1 else 0.0


def indicators_by_loops(keys, queries, window, kernel_size, gamma):
    attention = window_by_loops(keys, queries, window)
    groups, past = len(queries) // len(keys), len(keys[0]) - window
    result = []
    for head in range(len(keys)):
        members = []
        for rows in attention[head * groups : (head + 1) * groups]:
            columns = [[row[j] for row in rows] for j in range(past)]
            raw = [sum(column) / window + gamma * variance(column) for column in columns]
            reach = kernel_size // 2
            members.append([sum(raw[max(0, j - reach) : j + reach + 1]) / kernel_size for j in range(past)])
        result.append([sum(member[j] for member in members) / groups for j in range(past)])
    return result


def preference_by_loops(keys, queries, window, tau1, tau2):
    attention = window_by_loops(keys, queries, window)
    entropy = -sum(a * log(a + 1e-10) for rows in attention for row in rows for a in row)
    shift = sum(variance([row[j] for row in rows]) for rows in attention for j in range(len(rows[0])))
    return entropy ** (1 / tau1) * shift ** (1 / tau2)


def inputs_of(backend, keys, queries, valid=None):
    keys = make(backend, keys, np.float64)
    valid = np.ones(keys.shape[:3], dtype=bool) if valid is None else valid
    return Layer(keys, queries=make(backend, queries, np.float64), valid=make(backend, valid, bool), backend=backend)


@each_backend
@pytest.mark.parametrize(("window", "kernel_size", "gamma"), [(4, 5, 200.0), (1, 3, 200.0), (5, 1, 0.0), (3, 41, 7.0)])
def test_importance_is_mean_and_variance_of_the_window(backend, window, kernel_size, gamma):
    policy = CAKE(budget=9, window=window, kernel_size=kernel_size, gamma=gamma)

    done = evict(policy, make(backend, KEYS, np.float64), queries=make(backend, QUERIES, np.float64), backend=backend)

    for row in range(2):
        expected = indicators_by_loops(KEYS[row].tolist(), QUERIES[row].tolist(), window, kernel_size, gamma)
        importance = backend.to_numpy(done.importance)[row, :, : 17 - window]
        np.testing.assert_allclose(importance, expected, rtol=1e-11)
        order = [sorted(range(17 - window), key=lambda j, head=head: -head[j])[: 9 - window] for head in expected]
        kept = [sorted(best) + list(range(17 - window, 17)) for best in order]
        assert backend.to_numpy(done.kept)[row].tolist() == kept


@each_backend
@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4), (0.5, 2.0)])
def test_a_preference_is_entropy_times_variance_row_by_row(backend, tau1, tau2):
    policy = CAKE(budget=9, window=4, tau1=tau1, tau2=tau2)

    found = backend.to_numpy(policy.wants(inputs_of(backend, KEYS, QUERIES), None))

    expected = [preference_by_loops(KEYS[row].tolist(), QUERIES[row].tolist(), 4, tau1, tau2) for row in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@each_backend
def test_a_padded_row_has_the_preference_that_it_has_alone(backend):
    policy, valid = CAKE(budget=9, window=4), np.ones((2, 2, 17), dtype=bool)
    valid[1, :, :6] = False

    together = backend.to_numpy(policy.wants(inputs_of(backend, KEYS, QUERIES, valid), None))
    alone = backend.to_numpy(policy.wants(inputs_of(backend, KEYS[1:, :, 6:], QUERIES[1:]), None))

    np.testing.assert_allclose(together[1:], alone, rtol=1e-10)


def test_a_layer_that_looks_at_one_token_or_has_no_past_prefers_nothing():
    one = np.zeros((1, 2, 2, 6))
    one[..., 0] = 1.0
    for keys, window in ((np.ones((1, 1, 6, 2)), 2), (np.ones((1, 1, 2, 2)), 8)):
        rows = one[..., : keys.shape[2]]
        for tau1 in (1.0, 1.6):
            policy = CAKE(budget=1, window=window, tau1=tau1)
            found = policy.wants(Layer(keys, attention=rows), None)
            assert found.tolist() == [0.0]


def test_layer_budgets_add_up_and_are_applied():
    policy = CAKE(budget=10, window=4, kernel_size=3)
    budgets = policy.share_out([6.0, 3.0, 0.0], 17)

    # 18 tokens to choose, at most 13 in a layer: 12, 6 and none.
    assert budgets == [16, 10, 4]
    for wrapped in (LayerBudgets(policy, budgets=budgets), GraphKV(LayerBudgets(policy, budgets=budgets))):
        sizes = [evict(wrapped, KEYS, queries=QUERIES, layer=layer, num_layers=3).kept.shape[-1] for layer in range(3)]
        assert sizes == [16, 10, 4]
    assert CAKE(budget=10, window=4, num_sinks=2).share_out([6.0, 3.0, 0.0], 17) == [14, 10, 6]


@pytest.mark.parametrize(("budget", "tokens"), [(20, 17), (17, 17), (4, 17), (3, 17), (0, 17), (5, 0)])
@pytest.mark.parametrize("schedule", ["exact", "code"])
def test_layer_budgets_are_equal_where_nothing_is_to_choose(budget, tokens, schedule):
    policy = CAKE(budget=budget, window=4, schedule=schedule)

    assert policy.share_out([6.0, 3.0, 0.0], tokens) == [budget] * 3


def test_official_and_default_differ_in_the_rounding_of_layer_budgets():
    official, default = CAKE.official(10 + 22), CAKE(budget=10 + 22)
    assert (official.window, official.kernel_size, official.gamma) == (32, 5, 200.0)

    official, default = CAKE(budget=14, window=4, schedule="code"), CAKE(budget=14, window=4)
    # 40 tokens to choose, in the ratio of the claims, and 18 at most.
    assert default.share_out([60.0, 18.0, 2.0, 0.0], 22) == [22, 22, 8, 4]
    assert official.share_out([60.0, 18.0, 2.0, 0.0], 22) == [22, 17, 9, 8]
    assert sum(official.share_out([1.0, 0.0], 15)) <= 28 == sum(default.share_out([1.0, 0.0], 15))
    # The last 17 and 3 of 38, 16 and 3 get 9 each of the 18 that are clipped at 20: 25 is 5 more than there are.
    assert CAKE(budget=23, window=4, schedule="code").share_out([38.0, 16.0, 3.0], 24) == [24, 24, 16]
    assert default.share_out([38.0, 16.0, 3.0], 15) == [15, 15, 12]
    assert CAKE.official(64).schedule == "code"
    assert CAKE(budget=64).schedule == "exact"
    assert CAKE.official(64, tau1=1.6, tau2=0.6).tau2 == 0.6


def test_the_order_of_float32_is_the_same_on_every_library():
    kept = [
        backend.to_numpy(
            evict(CAKE(budget=9, window=4), make(backend, KEYS), queries=make(backend, QUERIES), backend=backend).kept
        ).tolist()
        for backend in BACKENDS.values()
    ]

    assert all(other == kept[0] for other in kept)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gamma": -1.0}, ArgumentError),
        ({"gamma": float("nan")}, ArgumentError),
        ({"gamma": "much"}, ArgumentTypeError),
        ({"tau1": 0.0}, ArgumentError),
        ({"tau2": float("inf")}, ArgumentError),
        ({"schedule": "linear"}, ArgumentError),
        ({"kernel_size": 4}, ArgumentError),
        ({"window": 0}, ArgumentError),
    ],
)
def test_options_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        CAKE(budget=9, **options)


def test_preferences_are_checked():
    with pytest.raises(ArgumentError, match=r"wants\[0\]"):
        CAKE(budget=9, window=4).share_out([-1.0], 20)
