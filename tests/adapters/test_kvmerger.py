"""KVMerger against loops: sets, pivots, Gaussian weights, and the exact size."""

import math

import numpy as np
import pytest

from graphkv import H2O, AdaKV, ArgumentError, Degree, Given, GraphKV, KNorm, KVMerger, SnapKV, evict
from tests.adapters import loops, merged

SNAPKV = SnapKV(budget=7, window=3, kernel_size=1, num_sinks=1)
BASES = {
    "snapkv": SNAPKV,
    "knorm": KNorm(budget=6),
    "h2o": H2O(budget=8, num_recent=2),
    "degree": GraphKV(SNAPKV, Degree()),
    "nothing": KNorm(budget=0),
    "most": KNorm(budget=17),
}
OPTIONS = {
    "default": {"heavy": 0.0},
    "paper": {"heavy": 2, "threshold": 0.9, "sigma": 1.5, "mass": "values"},
    "one": {"heavy": 0.2, "mass": "one"},
}


def sets_of(keys, is_open, number, threshold):
    """Join the most similar pairs of neighbors, a pair at a time, until `number` sets are left."""
    sets = [[i] for i in range(len(keys)) if is_open[i] is not None]
    pairs = [
        (-merged.cosine(keys[i - 1], keys[i]), i)
        for i in range(1, len(keys))
        if is_open[i] and is_open[i - 1] and merged.cosine(keys[i - 1], keys[i]) > threshold
    ]
    for _, i in sorted(pairs):
        if len(sets) <= number:
            break
        left, right = (next(s for s in sets if j in s) for j in (i - 1, i))
        sets.remove(right)
        left.extend(right)
    return sets


def by_loops(layer, row, scores, protected, policy, room):
    """Each kept pivot with what its slot becomes."""
    keys, values, valid = layer["keys"][row], layer["values"][row], layer["valid"][row[0]]
    mass = layer.get("mass", np.ones(layer["keys"].shape[:3]))[row]
    others = [j for j in np.flatnonzero(valid) if not protected[j]]
    heavy = policy.heavy if isinstance(policy.heavy, int) else math.floor(policy.heavy * len(valid) + 1e-9)
    heavy = loops.best(scores, min(heavy, room), others)
    is_open = [None if not valid[j] else j in others and j not in heavy for j in range(len(valid))]
    sets = sets_of(keys, is_open, policy.budget, policy.threshold)
    pivots = {loops.best(scores, 1, members)[0]: members for members in sets}
    ranked = sorted(pivots, key=lambda j: (not protected[j], -scores[j], j))[: policy.budget]
    found = {}
    for p in sorted(ranked):
        members = pivots[p]
        squares = [loops.dot(keys[p] - keys[i], keys[p] - keys[i]) for i in members]
        sigma = policy.sigma or loops.mean([math.sqrt(square) for square in squares]) / math.sqrt(2) or 1.0
        weights = [mass[i] * math.exp(-square / (2 * sigma**2)) for i, square in zip(members, squares, strict=True)]
        times = sum(mass[members]) / mass[p] if policy.mass == "values" else 1
        count = sum(mass[members]) if policy.mass == "count" else mass[p]
        found[p] = (merged.average(keys[members], weights), times * merged.average(values[members], weights), count)
    return found


def equals_loops(library, base, options, with_mass):
    layer = merged.example()
    if with_mass:
        layer["mass"] = np.random.default_rng(1).integers(1, 5, (2, 2, 18)).astype(float)
    policy = KVMerger(BASES[base], **OPTIONS[options])

    done, keys, values = merged.run(library, policy, layer)

    alone = merged.run(library, BASES[base], layer)[0]
    assert done.kept.shape == alone.kept.shape
    protected = np.zeros((2, 2, 18), bool) if done.protected is None else library.host(done.protected)
    room = max(0, policy.budget - policy.protection(policy.budget).count)
    for row in np.ndindex(2, 2):
        found = by_loops(layer, row, library.host(alone.scores)[row], protected[row], policy, room)
        # A row with less than the budget is filled up with padding.
        kept = [j for j in merged.kept_of(done, library, row) if layer["valid"][row[0], j]]
        assert kept == list(found)
        start = done.kept.shape[-1] - len(kept)
        for slot, (key, value, mass) in enumerate(found.values(), start):
            np.testing.assert_allclose(keys[row][slot], key, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(values[row][slot], value, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(library.host(done.mass)[row][slot], mass, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("with_mass", [False, True])
def test_kvmerger_equals_loops(numpy_library, base, options, with_mass):
    equals_loops(numpy_library, base, options, with_mass)


@pytest.mark.parametrize("name", ["torch", "strict", "mlx"])
def test_kvmerger_equals_loops_on_other_libraries(libraries, name):
    # The kit compares them all with NumPy.
    equals_loops(libraries(name), "snapkv", "default", with_mass=True)


def test_every_token_counts_where_all_pairs_may_join():
    layer = merged.example(padding=0)

    done = evict(KVMerger(KNorm(budget=4), heavy=0.0), layer["keys"])

    assert (done.merge.into >= 0).all()
    assert (done.mass.sum(-1) == 18).all()


def published(**options):
    """The weights of four keys at squared distances 40, 55, 60 and 70 from their pivot."""
    keys = np.zeros((1, 1, 5, 5))
    for place, square in enumerate((0, 40, 55, 60, 70)):
        keys[0, 0, place, place] = math.sqrt(square)
    importance = np.asarray([[[9.0, 1.0, 1.0, 1.0, 1.0]]])
    done = evict(KVMerger(Given(budget=1, importance=importance), heavy=0, **options), keys)
    assert done.kept.tolist() == [[[0]]]
    return done.merge.key_weights[0, 0].round(3).tolist()


def test_the_published_widths_and_weights():
    assert published() == [0.536, 0.175, 0.115, 0.1, 0.075]
    assert published(sigma=4.222) == published()
    assert published(sigma=5.0) == [0.429, 0.193, 0.143, 0.129, 0.106]


def test_the_printed_width_merges_nothing():
    width = math.sqrt(0.5)
    for _ in range(20):
        width = sum(math.exp(-square / (2 * width**2)) for square in (0, 40, 55, 60, 70)) / (math.sqrt(2) * 5)

    assert round(width, 4) == 0.1414
    assert published(sigma=width) == [1, 0, 0, 0, 0]


def test_the_exact_number_is_the_papers_scan_with_its_threshold_at_the_last_pair():
    keys = merged.example(padding=0)["keys"]
    for budget in (3, 7, 12, 17):
        done = evict(KVMerger(KNorm(budget=budget), heavy=0), keys)
        for row in np.ndindex(2, 2):
            cosines = [merged.cosine(keys[row][i], keys[row][i + 1]) for i in range(17)]
            threshold = sorted(cosines, reverse=True)[18 - budget - 1]
            # From the last token to the first: a token joins the set of its right neighbor, or starts a new one.
            found = [0]
            for i in range(16, -1, -1):
                found.append(found[-1] + (cosines[i] < threshold))
            assert done.merge.into[row].tolist() == [found[-1] - one for one in found[::-1]]


def test_a_mass_is_better_than_values_times_the_number_and_both_than_a_mean():
    """The median error of attention, with five near-duplicates among sixty-five tokens in one slot."""
    random = np.random.default_rng(3)
    errors = []
    for _ in range(40):
        query, (keys, values) = random.normal(size=16), random.normal(size=(2, 1, 1, 65, 16))
        keys[0, 0, :5] = keys[0, 0, 0] + 0.05 * random.normal(size=(5, 16))
        base = Given(budget=61, importance=np.arange(65.0)[None, None])
        made = [evict(KVMerger(base, heavy=0, sigma=9.0, mass=mass), keys) for mass in ("count", "values", "one")]
        assert all((done.merge.into[0, 0, :5] == 0).all() for done in made)
        slots = [(*done.compress(keys, values), np.exp(done.log_mass())[0, 0]) for done in made]
        slots.append((keys[..., 5:, :], values[..., 5:, :], np.ones(60)))
        whole, *others = (
            merged.output(query, k[0, 0], v[0, 0], m) for k, v, m in [(keys, values, np.ones(65)), *slots]
        )
        errors.append([np.linalg.norm(other - whole) / np.linalg.norm(whole) for other in others])

    mass, by_values, mean, dropped = np.median(errors, axis=0)
    assert mass < by_values < mean < dropped
    assert mass < 0.1 * dropped


def test_a_set_of_one_is_copied_bit_for_bit():
    layer = merged.example()
    done = evict(KVMerger(KNorm(budget=12)), layer["keys"])

    keys, values = done.compress(layer["keys"], layer["values"])

    alone = done.mass == 1
    assert set(alone.ravel()) == {False, True}
    assert keys[alone].tobytes() == done.apply(layer["keys"])[alone].tobytes()
    assert values[alone].tobytes() == done.apply(layer["values"])[alone].tobytes()


def test_wrappers_on_top_keep_sets_together():
    layer = merged.example()
    for wrap in (GraphKV, AdaKV, lambda base: GraphKV(base, Degree())):
        done = evict(wrap(KVMerger(KNorm(budget=6), heavy=0.0)), layer["keys"])
        assert (done.merge.into >= 0).sum() > 4 * 6


def test_kvmerger_says_what_is_wrong():
    for options, message in (
        ({"heavy": -1}, "heavy must be at least 0; got -1"),
        ({"threshold": 2.0}, r"threshold must lie in \[-1, 1\]; got 2.0"),
        ({"sigma": 0.0}, "sigma must be above 0; got 0.0"),
        ({"mass": "attention"}, "mass must be one of"),
    ):
        with pytest.raises(ArgumentError, match=message):
            KVMerger(SNAPKV, **options)
    paper = KVMerger.paper(100, num_recent=17)
    assert (paper.base.num_recent, paper.sigma, paper.threshold, paper.mass) == (17, 5.0, 0.75, "values")
