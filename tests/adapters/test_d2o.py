"""D2O against loops: who goes where past a moving threshold, with which weights, and the budgets of layers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from graphkv import (
    CAKE,
    D2O,
    H2O,
    AdaKV,
    ArgumentError,
    Degree,
    Given,
    GraphKV,
    KNorm,
    LayerBudgets,
    SnapKV,
    evict,
    wants,
)
from tests.adapters import loops, merged

SNAPKV = SnapKV(budget=7, window=3, kernel_size=1, num_sinks=1)
BASES = {
    "snapkv": SNAPKV,
    "knorm": KNorm(budget=6),
    "h2o": H2O(budget=6, num_recent=2, num_sinks=1),
    "degree": GraphKV(SNAPKV, Degree()),
    "adakv": AdaKV(SNAPKV),
    "nothing": KNorm(budget=0),
}
OPTIONS = {
    "default": {},
    # Those of the presets, whose sinks, recents and layer budgets do not matter to a merge.
    "paper": {"own_weight": math.e, "statistic": "max", "momentum": 0.7, "targets": "not_sinks", "mass": "one"},
    "official": {"weights": "mean", "statistic": "mean", "momentum": 0.5, "targets": "all", "mass": "one"},
    "open": {"targets": "open", "own_weight": 0.1},
}


def by_loops(layer, row, kept, protected, policy, threshold):
    """What each slot becomes, and the threshold after it."""
    keys, values, valid = layer["keys"][row], layer["values"][row], layer["valid"][row[0]]
    mass = layer.get("mass", np.ones(layer["keys"].shape[:3]))[row]
    sinks = np.flatnonzero(valid)[: policy.protection(0).first]
    barred = {"all": [], "open": np.flatnonzero(protected), "not_sinks": sinks}[policy.targets]
    targets = [j for j in kept if valid[j] and j not in barred]
    dropped = [i for i in range(len(valid)) if valid[i] and i not in kept] if targets else []
    near = {i: merged.nearest(keys, i, targets) for i in dropped}
    if near:
        cosines = [u for _, u in near.values()]
        mean = sum(cosines) / len(cosines)
        new = max(cosines) if policy.statistic == "max" else mean
        threshold = mean if threshold is None else policy.momentum * new + (1 - policy.momentum) * threshold
    found = []
    for j in kept:
        members = {i: u for i, (best, u) in near.items() if best == j and u >= threshold}
        if policy.weights == "exponential":
            weights = {j: mass[j] * policy.own_weight} | {i: mass[i] * math.exp(u) for i, u in members.items()}
            total = sum(weights.values())
        else:
            weights = {j: mass[j]} | {i: mass[i] * u for i, u in members.items()}
            total = mass[j] + sum(mass[i] for i in members)
        count = mass[j] + (sum(mass[i] for i in members) if policy.mass == "count" else 0)
        found.append(
            (
                *(sum(weight * x[i] for i, weight in weights.items()) / total for x in (keys, values)),
                count,
                len(members),
            )
        )
    return found, threshold


def equals_loops(library, base, options, with_mass):
    """Two evictions: the second with the threshold of the first."""
    layer = merged.example()
    if with_mass:
        layer["mass"] = np.random.default_rng(1).integers(1, 5, (2, 2, 18)).astype(float)
    policy = D2O(BASES[base], layer_budgets="base", **OPTIONS[options])
    num_merged, thresholds = 0, {}
    state = None
    for call in range(2):
        done, keys, values = merged.run(library, policy, layer, state=state if base != "h2o" else None)
        state = done.state
        protected = np.zeros((2, 2, 18), bool) if done.protected is None else library.host(done.protected)
        for row in np.ndindex(2, 2):
            kept = merged.kept_of(done, library, row)
            old = thresholds.get(row) if base != "h2o" else None
            found, thresholds[row] = by_loops(layer, row, kept, protected[row], policy, old)
            ours = library.host(done.state.layer["threshold"])[row]
            np.testing.assert_allclose(ours, math.inf if thresholds[row] is None else thresholds[row], rtol=1e-5)
            for slot, (key, value, mass, number) in enumerate(found):
                np.testing.assert_allclose(keys[row][slot], key, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(values[row][slot], value, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(library.host(done.mass)[row][slot], mass, rtol=1e-5)
                num_merged += number
        layer = {**merged.example(seed=call + 1), **({"mass": layer["mass"]} if with_mass else {})}
    assert num_merged or base == "nothing"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("with_mass", [False, True])
def test_d2o_equals_loops(numpy_library, base, options, with_mass):
    equals_loops(numpy_library, base, options, with_mass)


@pytest.mark.parametrize("name", ["torch", "strict", "mlx"])
def test_d2o_equals_loops_on_other_libraries(libraries, name):
    # The kit compares them all with NumPy.
    equals_loops(libraries(name), "adakv", "default", with_mass=True)


def three_copies(**options):
    """One kept token and three dropped ones at a cosine of .8: the shares of the kept and of a dropped one."""
    keys = np.asarray([[[[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.8, 0.6]]]])
    base = Given(budget=1, importance=np.asarray([[[1.0, 0.0, 0.0, 0.0]]]))
    done = evict(D2O(base, layer_budgets="base", **options), keys)
    assert (done.merge.into >= 0).all()
    return done.merge.key_weights[0, 0, :2].tolist(), done.compress(keys, keys)


def test_the_published_weights_of_three_merged_tokens():
    np.testing.assert_allclose(three_copies(own_weight=0.1)[0], [0.0148, 0.3284], atol=5e-5)
    np.testing.assert_allclose(three_copies()[0], [0.2893, 0.2369], atol=5e-5)


def test_weights_of_the_paper_are_convex_and_those_of_the_code_are_not():
    keys = np.asarray([[[[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.8, 0.6]]]])
    ones = np.ones((1, 1, 4, 1))
    base = Given(budget=1, importance=np.asarray([[[1.0, 0.0, 0.0, 0.0]]]))
    for preset, wanted in ((D2O.paper(1), 1.0), (D2O.official(1), 0.85)):
        done = evict(replace(preset, base=base, layer_budgets="base"), keys)
        np.testing.assert_allclose(done.compress(keys, ones)[1], wanted)


def test_nothing_dropped_leaves_the_threshold_and_a_new_state_starts_anew():
    policy = D2O(KNorm(budget=5), layer_budgets="base")
    keys = merged.example()["keys"]
    first = evict(policy, keys)

    again = evict(policy, keys[:, :, :5], state=first.state)
    anew = evict(policy, keys)

    assert np.isfinite(first.state.layer["threshold"]).all()
    assert again.state.layer["threshold"].tolist() == first.state.layer["threshold"].tolist()
    assert anew.state.layer["threshold"].tolist() == first.state.layer["threshold"].tolist()


@pytest.mark.parametrize("variance", ["raw", "normalized"])
@pytest.mark.parametrize("base", ["h2o", "knorm"])
def test_a_layer_wants_by_the_variance_of_what_its_tokens_receive(library, base, variance):
    layer = merged.example()
    policy = D2O(BASES[base], variance=variance, window=5)
    arrays = {name: library.make(x.astype(np.float32) if x.dtype == float else x) for name, x in layer.items()}

    found = library.host(wants(policy, arrays.pop("keys"), **arrays, backend=library.backend))

    for b in range(2):
        valid = np.flatnonzero(layer["valid"][b])
        spreads = []
        for q in range(4):
            sums = np.zeros(18)
            for p in valid if base == "h2o" else valid[-5:]:
                seen = [j for j in valid if j <= p]
                sums[seen] += loops.row(layer["queries"][b, q, p], layer["keys"][b, q // 2][seen])
            spreads.append(np.var(sums[valid], ddof=1))
        if variance == "normalized":
            spreads = [(x - min(spreads)) / (max(spreads) - min(spreads) + 1e-6) for x in spreads]
        np.testing.assert_allclose(found[b], loops.mean(spreads), rtol=1e-3)


def test_exact_layer_budgets_have_the_sum_of_the_bases_and_lie_within_a_factor_of_e():
    policy, numbers = D2O(H2O(budget=200)), np.linspace(0, 1, 32).tolist()

    shares = policy.share_out(numbers, 1000)

    assert sum(shares) == 32 * 200
    assert shares == sorted(shares, reverse=True)
    assert shares[0] / shares[-1] == pytest.approx(math.e, rel=0.01)
    # A simulation with random numbers in [0, 1] spans .118 to .303; these are where 32 of them lie on average.
    drawn = policy.share_out([i / 33 for i in range(1, 33)], 1000)
    assert (drawn[-1], drawn[0]) == (pytest.approx(118, abs=6), pytest.approx(303, abs=6))
    assert policy.share_out([0.5], 1000) == [200]
    assert policy.share_out(numbers[:3], 150) == [200] * 3
    assert policy.share_out([], 150) == []
    raw = D2O(H2O(budget=20, num_sinks=4), variance="raw").share_out([0.0, 900.0, 900.0], 1000)
    assert raw == [40, 10, 10]
    assert D2O(KNorm(budget=20), layer_budgets="base").share_out([0.0, 1.0], 100) == [20, 20]


def test_official_layer_budgets_are_cut_down_and_leave_three_layers_whole():
    shares = D2O.official().share_out(np.linspace(0, 1, 32).tolist(), 1000)

    assert [shares[layer] for layer in (0, 1, 31)] == [1000] * 3
    weights = np.exp(-np.linspace(0, 1, 32))
    wanted = 2 * np.floor(1000 * (weights / weights.sum() * 32 * 0.2) / 2).astype(int)
    assert shares[2:31] == wanted[2:31].tolist()


def test_presets():
    paper, official = D2O.paper(40), D2O.official(0.2)

    base = H2O(budget=40, num_recent=10, num_sinks=4, group_reduction="sum")
    assert paper == D2O(base, **OPTIONS["paper"], layer_budgets="exact", variance="raw")
    base = H2O(budget=0.2, num_sinks=4, group_reduction="sum")
    assert official == D2O(base, **OPTIONS["official"], layer_budgets="code", variance="normalized")
    assert official.needs().wants
    assert not D2O(KNorm(budget=4), layer_budgets="base").needs().wants


def test_d2o_says_what_is_wrong():
    for options, message in (
        ({"weights": "sum"}, "weights must be one of"),
        ({"own_weight": 0}, "own_weight must be above 0; got 0"),
        ({"weights": "mean", "own_weight": 1.0}, "own_weight must be left out with weights 'mean'; got 1.0"),
        ({"statistic": "min"}, "statistic must be one of"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\]; got 2.0"),
        ({"targets": "none"}, "targets must be one of"),
        ({"mass": "attention"}, "mass must be one of"),
        ({"layer_budgets": "own"}, "layer_budgets must be one of"),
        ({"variance": "none"}, "variance must be one of"),
        ({"window": 0}, "window must be at least 1; got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            D2O(SNAPKV, **options)
    with pytest.raises(ArgumentError, match="layer_budgets must be 'base' over a LayerBudgets, whose"):
        D2O(LayerBudgets(SNAPKV, budgets=(3,)))
    assert D2O(CAKE(budget=9), layer_budgets="base").needs().wants
    with pytest.raises(ArgumentError, match=r"wants\[1\] must be finite and at least 0; got -1.0"):
        D2O(SNAPKV).share_out([0.0, -1.0], 100)
