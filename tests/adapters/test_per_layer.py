"""Budgets in given proportions, and policies that take turns."""

from math import cos, pi

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
from graphkv.adapters.per_layer import key_similarity
from graphkv.core.budgets import cut_again
from tests.support.arrays import each_library, make

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


@pytest.mark.parametrize("least", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 32])
def test_pyramid_infer_cuts_every_layer_again(least, num_layers):
    shares = cut_again(num_layers, least)

    left = 1.0
    for layer, share in enumerate(shares):
        left *= least + (1 - least) * (1 + cos(pi * layer / num_layers)) / 2
        assert share == pytest.approx(left)
    found = budgets(LayerShares.pyramid_infer(KNorm(budget=40), num_layers, least=least), 100, num_layers)
    assert sum(found) == 40 * num_layers
    assert found == sorted(found, reverse=True)


def test_the_values_of_the_sheet():
    assert cut_again(32)[-1] == pytest.approx(0.1997, abs=5e-5)
    # The public code's other schedule is constant.
    assert pytest.approx(0.0343, abs=5e-5) == 0.9**32


def test_epicache_is_the_public_formula_but_for_the_total():
    similarities = RNG.uniform(0.6, 0.99, size=28).tolist()
    low, high = min(similarities), max(similarities)
    weights = [(1 - (x - low) / (high - low)) ** 1.1 for x in similarities]
    public = [max(int(w * 28 * 4096 / sum(weights)), 4096 // 4) for w in weights]

    found = budgets(LayerShares.epicache(KNorm(budget=4096), similarities), 10**6, 28)

    assert sum(found) == 28 * 4096 < sum(public)
    assert min(found) == 1024 == min(public)
    paid = sum(public) - 28 * 4096
    assert all(0 <= theirs - ours + 1 <= paid for ours, theirs in zip(found, public, strict=True))
    assert sorted(range(28), key=found.__getitem__) == sorted(range(28), key=public.__getitem__)


def test_epicache_with_equal_layers_or_no_power_is_uniform():
    for policy in (
        LayerShares.epicache(KNorm(budget=40), [0.7] * 5),
        LayerShares.epicache(KNorm(budget=40), [0.1, 0.4, 0.9, 0.2, 0.3], power=0),
    ):
        assert budgets(policy, 100, 5) == [40] * 5


def test_a_floor_is_paid_for_by_the_others():
    assert budgets(LayerShares(KNorm(budget=40), shares=(0, 1, 3), floor=0.25), 1000, 3) == [10, 28, 82]
    assert budgets(LayerShares(KNorm(budget=40), shares=(0, 1, 3)), 1000, 3) == [0, 30, 90]
    assert budgets(LayerShares(KNorm(budget=40), shares=(0, 1, 3), floor=1.0), 1000, 3) == [40] * 3


@each_library
def test_key_similarity_is_the_mean_cosine_of_windows(backend):
    keys, others = RNG.normal(size=(2, 3, 25, 4)), RNG.normal(size=(2, 3, 25, 4))
    others = 0.7 * keys + 0.3 * others
    others[0, 1, 10:20] = 0

    found = key_similarity(*(make(backend, x, np.float64) for x in (keys, others)), window=10, backend=backend)

    for row in (0, 1):
        cosines = []
        for head in range(3):
            for start in (0, 10, 20):
                a, b = (x[row, head, start : start + 10].ravel() for x in (keys, others))
                length = np.linalg.norm(a) * np.linalg.norm(b)
                cosines.append(a @ b / length if length else 0.0)
        assert backend.to_numpy(found)[row] == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LayerShares(KNorm(budget=9), shares=(1, 2), floor=1.5), ArgumentError, "floor must lie in"),
        (lambda: LayerShares.pyramid_infer(KNorm(budget=9), 0), ArgumentError, "num_layers must be at least 1"),
        (lambda: LayerShares.pyramid_infer(KNorm(budget=9), 3, least=2), ArgumentError, "least must lie in"),
        (lambda: LayerShares.epicache(KNorm(budget=9), [0.1, float("nan")]), ArgumentError, r"similarities\[1\]"),
        (lambda: LayerShares.epicache(KNorm(budget=9), [0.1, "x"]), ArgumentTypeError, r"similarities\[1\]"),
        (lambda: LayerShares.epicache(KNorm(budget=9), [0.1], power=-1), ArgumentError, "power"),
        (lambda: key_similarity(KEYS, KEYS[:, :, :9]), ArgumentError, "others must"),
        (lambda: key_similarity(KEYS[:, :, :0], KEYS[:, :, :0]), ArgumentError, "at least one token"),
        (lambda: key_similarity(KEYS, KEYS, window=0), ArgumentError, "window must be at least 1"),
    ],
)
def test_what_is_wrong_with_layer_budgets_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_another_base_keeps_the_wrappers_in_every_layer():
    policy = PerLayer(KNorm(budget=9), policies=(KNorm(budget=9), GraphKV(KNorm(budget=9))))

    found = GraphKV(policy).with_base(lambda base: H2O(budget=base.budget + 1))

    assert found == GraphKV(PerLayer(H2O(budget=10), policies=(H2O(budget=10), GraphKV(H2O(budget=10)))))
    assert found.budget == 10
