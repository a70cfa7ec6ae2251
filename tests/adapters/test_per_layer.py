"""Budgets in given proportions, and policies that take turns."""

import numpy as np
import pytest

from graphkv import (
    H2O,
    ArgumentError,
    ArgumentTypeError,
    Decay,
    GraphKV,
    KNorm,
    LayerBudgets,
    LayerShares,
    PerLayer,
    SnapKV,
    evict,
)

RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(1, 2, 40, 8)).astype(np.float32)
QUERIES = RNG.normal(size=(1, 4, 40, 8)).astype(np.float32)


def budgets(policy, num_tokens, num_layers):
    return [policy.layer_budget(num_tokens, layer, num_layers) for layer in range(num_layers)]


@pytest.mark.parametrize("budget", [1, 7, 64, 0.33, 99])
@pytest.mark.parametrize("shares", [(1, 2, 3, 4, 5), (0.1, 9, 0.1, 0.1, 2.5), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0)])
def test_shares_add_up_exactly_and_stay_within_the_tokens(budget, shares):
    found = budgets(LayerShares(KNorm(budget=budget), shares=shares), 100, 5)

    assert sum(found) == 5 * KNorm(budget=budget).layer_budget(100, 0, 5)
    assert all(0 <= tokens <= 100 for tokens in found)


def test_shares_are_proportions():
    policy = LayerShares(KNorm(budget=30), shares=(3, 2, 1))

    assert budgets(policy, 1000, 3) == [45, 30, 15]
    assert budgets(LayerShares(KNorm(budget=0.03), shares=(0.3, 0.2, 0.1)), 1000, 3) == [45, 30, 15]


def test_integers_of_the_right_sum_are_the_budgets():
    wanted = (17, 83, 41, 3, 56)

    assert budgets(LayerShares(KNorm(budget=40), shares=wanted), 100, 5) == list(wanted)


def test_no_layer_gets_less_than_is_protected_or_more_than_there_is():
    policy = LayerShares(SnapKV(budget=20, window=8, num_sinks=2), shares=(0, 1, 100))

    assert budgets(policy, 100, 3) == [10, 10, 40]
    assert budgets(policy, 30, 3) == [10, 20, 30]
    # Less than the window itself: everybody alike.
    assert budgets(LayerShares(SnapKV(budget=5, window=8), shares=(0, 1, 100)), 100, 3) == [5, 5, 5]


def test_shares_evict_like_budgets():
    base = SnapKV(budget=12, window=4)
    for layer in range(2):
        options = {"queries": QUERIES[:, :, -4:], "layer": layer, "num_layers": 2}
        ours = evict(LayerShares(base, shares=(2, 1)), KEYS, **options)
        theirs = evict(LayerBudgets(base, budgets=(16, 8)), KEYS, **options)
        assert np.array_equal(ours.kept, theirs.kept)


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ((1, -1), ArgumentError, r"shares\[1\]"),
        ((1, float("nan")), ArgumentError, r"shares\[1\]"),
        ((1, "2"), ArgumentTypeError, r"shares\[1\]"),
        ("12", ArgumentTypeError, "shares must be a sequence of numbers; got str"),
        (1, ArgumentTypeError, "shares must be a sequence of numbers; got int"),
    ],
)
def test_wrong_shares_are_refused(shares, error, message):
    with pytest.raises(error, match=message):
        LayerShares(KNorm(budget=4), shares=shares)


def test_shares_for_another_model_are_refused():
    with pytest.raises(ArgumentError, match="shares must have one entry for each of 3 layers; got 2"):
        LayerShares(KNorm(budget=4), shares=(1, 2)).layer_budget(10, 0, 3)


@pytest.mark.parametrize("base", [SnapKV(budget=12, window=4), H2O(budget=12), KNorm(budget=12)])
def test_layers_go_by_the_policy_of_their_group(base):
    graph = GraphKV(base, Decay(neighbors=3, source_ratio=0.5))
    policy = PerLayer(base, policies=[base, graph])
    differ = 0
    for layer in range(5):
        own = base if layer < 3 else graph
        options = {"queries": QUERIES, "layer": layer, "num_layers": 5}
        found, expected = (evict(each, KEYS, **options) for each in (policy, own))
        assert np.array_equal(found.kept, expected.kept)
        assert (found.graph is None) == (layer < 3)
        differ += not np.array_equal(found.kept, evict(base, KEYS, **options).kept)
    assert differ == 2


def test_groups_are_as_equal_as_whole_layers_can_be():
    policies = [KNorm(budget=4), GraphKV(KNorm(budget=4)), GraphKV(KNorm(budget=4), Decay(neighbors=1, rounds=2))]
    chosen = [number * 3 // 30 for number in range(30)]
    taken = []
    for layer in range(30):
        taken.append(policies.index(PerLayer(KNorm(budget=4), policies=policies).at(layer, 30)))
    assert taken == chosen == [0] * 10 + [1] * 10 + [2] * 10


def test_the_base_speaks_for_all_layers_and_wrappers_add_their_needs():
    base = SnapKV(budget=12, window=4)
    policy = PerLayer(base, policies=[base, GraphKV(base)])

    assert (policy.budget, policy.protection(12).count, policy.num_queries(40)) == (12, base.protection(12).count, 4)
    assert policy.needs().queries == "window"
    assert policy.layer_budget(40, 1, 2) == 12


def test_policies_over_another_base_are_refused():
    base = KNorm(budget=12)
    with pytest.raises(ArgumentError, match=r"policies\[1\] must be base or a wrapper around it"):
        PerLayer(base, policies=[base, GraphKV(KNorm(budget=13))])
    with pytest.raises(ArgumentTypeError, match=r"policies\[0\]"):
        PerLayer(base, policies=["knorm"])
    with pytest.raises(ArgumentError, match="at least one policy"):
        PerLayer(base, policies=[])
    with pytest.raises(ArgumentTypeError, match="must be a sequence of policies; got KNorm"):
        PerLayer(base, policies=base)
