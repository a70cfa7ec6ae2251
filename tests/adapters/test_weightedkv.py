"""WeightedKV against loops: the closed form after a prompt, and the paper's listing step by step."""

import numpy as np
import pytest

from graphkv import H2O, AdaKV, ArgumentError, Degree, Given, GraphKV, KNorm, SnapKV, StreamingLLM, WeightedKV, evict
from tests.adapters import loops, merged

SNAPKV = SnapKV(budget=7, window=3, kernel_size=1, num_sinks=1)
BASES = {
    "snapkv": SNAPKV,
    "knorm": KNorm(budget=6),
    "h2o": H2O(budget=6, num_recent=2),
    "degree": GraphKV(SNAPKV, Degree()),
    "adakv": AdaKV(SNAPKV),
    "left": StreamingLLM(budget=3, num_sinks=3),
    "nothing": KNorm(budget=0),
}


def runs(kept, valid):
    """Each kept token with the dropped ones that go to it."""
    found = {j: [j] for j in kept}
    for i in range(len(valid)):
        if valid[i] and i not in found and kept:
            found[min((j for j in kept if j > i), default=kept[-1])].append(i)
    return found


def equals_loops(library, name, mass):
    layer = merged.example()
    base = BASES[name]

    done, keys, values = merged.run(library, WeightedKV(base, mass=mass, window=5), layer)
    alone, plain, _ = merged.run(library, base, layer)

    assert library.host(done.kept).tolist() == library.host(alone.kept).tolist()
    assert np.array_equal(keys, plain)
    for row in np.ndindex(2, 2):
        received = merged.window_attention(layer, row, 18 if name == "h2o" else 5)
        kept = merged.kept_of(done, library, row)
        for slot, (j, members) in enumerate(runs(kept, layer["valid"][row[0]]).items()):
            basis = received[j] if mass == "attention" else sum(received[members])
            weights = received if basis > 0 else np.ones(18)
            value = merged.average([layer["values"][row][i] for i in members], weights[members])
            np.testing.assert_allclose(values[row][slot], value, rtol=1e-4, atol=1e-5)
            wanted = sum(weights[members]) / weights[j] if mass == "attention" else 1
            np.testing.assert_allclose(library.host(done.mass)[row][slot], wanted, rtol=1e-4)


@pytest.mark.parametrize("mass", ["one", "attention"])
@pytest.mark.parametrize("name", BASES)
def test_weightedkv_equals_loops(numpy_library, name, mass):
    equals_loops(numpy_library, name, mass)


@pytest.mark.parametrize("name", ["torch", "strict", "mlx"])
def test_weightedkv_equals_loops_on_other_libraries(libraries, name):
    # The kit compares them all with NumPy.
    equals_loops(libraries(name), "adakv", "attention")


def listing(keys, values, queries, budget, num_sinks, num_recent):
    """Algorithm 1 of the paper for one head, token by token."""
    cache, found = [], []
    for t in range(len(keys)):
        cache.append({"at": t, "k": keys[t], "v": values[t], "a": 0.0, "c": 0})
        row = loops.row(queries[t], [token["k"] for token in cache])
        for token, weight in zip(cache, row, strict=True):
            token["a"] += weight
            token["c"] += 1
        if len(cache) > budget:
            open_places = range(num_sinks, len(cache) - num_recent)
            j = min(open_places, key=lambda place: (cache[place]["a"] / cache[place]["c"], -place))
            left, right = cache[j], cache[j + 1]
            weights = [token["a"] / token["c"] for token in (left, right)]
            right["v"] = merged.average([left["v"], right["v"]], weights)
            del cache[j]
        found.append(([token["at"] for token in cache], [token["v"] for token in cache]))
    return found


def test_decoding_is_the_papers_listing_step_by_step():
    random = np.random.default_rng(2)
    keys, queries, values = (random.normal(size=(1, 1, 14, size)) for size in (4, 4, 3))
    policy = WeightedKV(H2O(budget=8, num_sinks=2, num_recent=2, age_normalized=True))
    wanted = listing(keys[0, 0], values[0, 0], queries[0, 0], 8, 2, 2)

    cache_keys, cache_values, at, state = keys[:, :, :0], values[:, :, :0], np.zeros((1, 1, 0), int), None
    for t in range(14):
        new = slice(t, t + 1)
        cache_keys, cache_values = (
            np.concatenate([old, x[:, :, new]], axis=2) for old, x in ((cache_keys, keys), (cache_values, values))
        )
        at = np.concatenate([at, np.full((1, 1, 1), t)], axis=2)
        done = evict(policy, cache_keys, queries=queries[:, :, new], state=state)
        cache_keys, cache_values = done.compress(cache_keys, cache_values)
        at, state = done.apply(at), done.state
        assert at[0, 0].tolist() == wanted[t][0]
        np.testing.assert_allclose(cache_values[0, 0], wanted[t][1], rtol=1e-9)


def test_masses_make_the_order_of_the_merges_irrelevant():
    """Merged at once, or one token and then another with its mass: the same value and mass."""
    random = np.random.default_rng(6)
    keys, values = np.ones((1, 1, 4, 2)), random.normal(size=(1, 1, 4, 3))
    rows = np.asarray([[[[0.1, 0.2, 0.3, 0.4]]]])

    def step(importance, keys, values, rows, mass=None):
        base = Given(budget=keys.shape[2] - 1, importance=np.asarray([[importance]]))
        done = evict(WeightedKV(base, mass="attention", window=1), keys, attention=rows, mass=mass)
        # What attention to the slots is: that of their tokens together.
        into = done.merge.into[0, 0]
        together = np.asarray([[[[rows[0, 0, 0, into == slot].sum() for slot in range(done.kept.shape[-1])]]]])
        return *done.compress(keys, values), together, done.mass

    for first, then in (([0.0, 1, 2, 3], [0.0, 1, 2]), ([1.0, 0, 2, 3], [0.0, 1, 2])):
        _, found, _, mass = step(then, *step(first, keys, values, rows))
        wanted = merged.average(values[0, 0, :3], rows[0, 0, 0, :3])
        np.testing.assert_allclose(found[0, 0, 0], wanted)
        np.testing.assert_allclose(mass, [[[2.0, 1.0]]])


def test_the_papers_sizes():
    assert WeightedKV.paper(1024) == WeightedKV(H2O(budget=1024, num_sinks=4, num_recent=508, age_normalized=True))
    assert WeightedKV.paper(256).base.num_recent == 124


def test_the_toy_of_the_paper():
    rows = np.asarray([[[[0.2, 0.1, 0.5, 0.2]]]])
    done = evict(WeightedKV(SnapKV(budget=3, window=1, kernel_size=1), window=1), np.ones((1, 1, 4, 2)), attention=rows)

    np.testing.assert_allclose(done.merge.value_weights, [[[1, 1 / 6, 5 / 6, 1]]])


def test_weightedkv_says_what_is_wrong():
    with pytest.raises(ArgumentError, match=r"mass must be one of \['attention', 'one'\]; got 'count'"):
        WeightedKV(SNAPKV, mass="count")
    with pytest.raises(ArgumentError, match=r"queries must hold the last position for WeightedKV\(KNorm\); got none"):
        evict(WeightedKV(KNorm(budget=3)), np.ones((1, 1, 6, 2)))
    assert WeightedKV(H2O(budget=3)).needs().queries == "new"


@pytest.mark.parametrize("mass", ["one", "attention"])
def test_where_nobody_received_attention_the_mean_is_plain(mass):
    rows = np.asarray([[[[0.0, 0.0, 0.75, 0.25]]]])
    values = np.asarray([[[[1.0], [3.0], [5.0], [7.0]]]])
    base = Given(budget=3, importance=np.asarray([[[0.0, 3.0, 2.0, 1.0]]]))

    done = evict(WeightedKV(base, mass=mass, window=1), np.ones((1, 1, 4, 2)), attention=rows)

    assert done.compress(values, values)[1].tolist() == [[[[2.0], [5.0], [7.0]]]]
    assert done.mass.tolist() == [[[1.0 if mass == "one" else 2.0, 1.0, 1.0]]]
