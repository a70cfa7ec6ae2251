"""Absorb against loops, and what its masses are worth in attention."""

import numpy as np
import pytest

from graphkv import (
    H2O,
    Absorb,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Degree,
    Given,
    GraphKV,
    KNorm,
    SnapKV,
    StreamingLLM,
    evict,
)
from graphkv.core import LayerShape
from tests.adapters import merged

SNAPKV = SnapKV(budget=7, window=3, kernel_size=1, num_sinks=1)
BASES = {
    "snapkv": SNAPKV,
    "knorm": KNorm(budget=6),
    "h2o": H2O(budget=6, num_recent=2),
    "degree": GraphKV(SNAPKV, Degree()),
    "adakv": AdaKV(SNAPKV),
    "nothing": KNorm(budget=0),
}


def by_loops(layer, row, kept, protected, threshold, weights, window):
    """Who goes where, and each slot's value and mass."""
    (b, h), valid = row, layer["valid"][row[0]]
    mass = layer.get("mass", np.ones(layer["keys"].shape[:3]))[row]
    targets = [j for j in kept if valid[j] and not protected[j]]
    slots = {j: [j] for j in kept}
    for i in range(len(valid)):
        if valid[i] and i not in kept and targets:
            best, similarity = merged.nearest(layer["keys"][row], i, targets)
            if similarity >= threshold:
                slots[best].append(i)
    attention = merged.window_attention(layer, row, window)
    found = []
    for j, members in slots.items():
        a = attention if weights == "attention" and attention[j] > 0 else mass
        value = merged.average([layer["values"][b, h, i] for i in members], [a[i] for i in members])
        found.append((members, value, mass[j] * sum(a[i] for i in members) / a[j]))
    return found


def equals_loops(library, name, weights, with_mass):
    layer = merged.example()
    if with_mass:
        layer["mass"] = np.random.default_rng(1).integers(1, 5, (2, 2, 18)).astype(float)
    policy = Absorb(BASES[name], threshold=0.9, weights=weights, window=5)

    done, keys, values = merged.run(library, policy, layer)
    alone, plain, _ = merged.run(library, BASES[name], layer)

    assert library.host(done.kept).tolist() == library.host(alone.kept).tolist()
    # Keys stay those of the kept tokens, bit for bit.
    assert np.array_equal(keys, plain)
    into, masses = library.host(done.merge.into), library.host(done.mass)
    protected = np.zeros((2, 2, 18), bool) if done.protected is None else library.host(done.protected)
    absorbed = 0
    for row in np.ndindex(2, 2):
        kept = merged.kept_of(done, library, row)
        for slot, (members, value, mass) in enumerate(by_loops(layer, row, kept, protected[row], 0.9, weights, 5)):
            assert np.flatnonzero(into[row] == slot).tolist() == sorted(members)
            np.testing.assert_allclose(values[row][slot], value, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(masses[row][slot], mass, rtol=1e-4)
            absorbed += len(members) - 1
        assert (masses[row][len(kept) :] == 0).all()
    assert absorbed or name == "nothing"


@pytest.mark.parametrize("name", ["torch", "strict", "mlx"])
def test_absorb_equals_loops_on_other_libraries(libraries, name):
    # The kit compares them all with NumPy.
    equals_loops(libraries(name), "adakv", "attention", with_mass=True)


@pytest.mark.parametrize("weights", ["attention", "count"])
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("with_mass", [False, True])
def test_absorb_equals_loops(numpy_library, name, weights, with_mass):
    equals_loops(numpy_library, name, weights, with_mass)


def test_exact_duplicates_are_absorbed_without_error(numpy_library):
    """Attention to the slots, with log(mass), is attention to all tokens."""
    layer = merged.example(num_tokens=8, padding=0)
    layer = {name: np.concatenate([x, x], axis=1 if name == "valid" else 2) for name, x in layer.items()}
    layer["values"][:, :, 8:] += 1
    policy = Absorb(StreamingLLM(budget=8, num_sinks=0), threshold=0.999, weights="count")

    done, keys, values = merged.run(numpy_library, policy, layer)

    bias = numpy_library.host(done.log_mass())
    np.testing.assert_allclose(bias, np.log(2), rtol=1e-6)
    for b, h in np.ndindex(2, 2):
        query = layer["queries"][b, 2 * h, 0]
        whole = merged.output(query, layer["keys"][b, h], layer["values"][b, h], np.ones(16))
        ours = merged.output(query, keys[b, h], values[b, h], np.exp(bias[b, h]))
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-5)


def test_masses_of_counts_add_up_to_what_is_kept_or_absorbed():
    layer = merged.example()
    mass = np.random.default_rng(1).integers(1, 5, (2, 2, 18)).astype(float)

    done = evict(Absorb(KNorm(budget=6), threshold=0.5, weights="count"), layer["keys"], mass=mass)

    np.testing.assert_allclose(done.mass.sum(-1), (mass * (done.merge.into >= 0)).sum(-1))
    assert (done.merge.into >= 0).sum() > 4 * 6


def test_a_slot_that_is_merged_again_counts_with_its_mass():
    keys, values = np.ones((1, 1, 3, 2)), np.asarray([[[[3.0], [6.0], [9.0]]]])
    policy = Absorb(Given(budget=2, importance=np.asarray([[[2.0, 1.0, 0.0]]])), weights="count")
    first = evict(policy, keys)
    kept, merged_values = first.compress(keys, values)
    last = Absorb(Given(budget=1, importance=np.asarray([[[0.0, 1.0]]])), weights="count")
    then = evict(last, kept, mass=first.mass)

    assert (first.mass.tolist(), then.mass.tolist()) == ([[[2.0, 1.0]]], [[[3.0]]])
    # Token 2 went into token 0, the lower of equals.
    assert merged_values.tolist() == [[[[6.0], [6.0]]]]
    assert then.compress(kept, merged_values)[1].tolist() == [[[[6.0]]]]


def test_nothing_goes_into_protected_tokens_or_padding_and_nothing_comes_out_of_it():
    keys = np.ones((1, 1, 6, 2))
    keys[:, :, 1] = np.nan
    valid = np.asarray([[False, False, True, True, True, True]])
    base = StreamingLLM(budget=2, num_sinks=1)

    done = evict(Absorb(base, threshold=-1.0, weights="count"), keys, valid=valid)

    assert done.kept.tolist() == [[[2, 5]]]
    assert done.merge.into.tolist() == [[[-1, -1, 0, 1, 1, 1]]]
    for all_protected in (StreamingLLM(budget=2, num_sinks=2), SnapKV(budget=2, window=2)):
        done = evict(Absorb(all_protected, threshold=-1.0, weights="count"), keys, queries=keys, valid=valid)
        assert (done.merge.into >= 0).sum() == 2


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.0])
def test_the_threshold_is_the_least_cosine(threshold):
    layer = merged.example()
    done = evict(Absorb(KNorm(budget=6), threshold=threshold, weights="count"), layer["keys"])

    for b, h in np.ndindex(2, 2):
        kept, into = done.kept[b, h].tolist(), done.merge.into[b, h]
        for i in set(range(18)) - set(kept):
            similarity = merged.nearest(layer["keys"][b, h], i, kept)[1]
            assert (into[i] >= 0) == (similarity >= threshold)


def test_absorb_works_under_the_graph_and_above_it():
    layer = merged.example()
    above = Absorb(GraphKV(KNorm(budget=6)), weights="count")
    below = GraphKV(Absorb(KNorm(budget=6), weights="count"))

    one, other = (evict(policy, layer["keys"]) for policy in (above, below))

    assert np.array_equal(one.kept, other.kept)
    assert np.array_equal(one.merge.into, other.merge.into)
    assert one.graph is not None


def test_absorb_says_what_is_wrong():
    layer = merged.example()
    with pytest.raises(ArgumentError, match=r"threshold must lie in \[-1, 1\]; got 1.5"):
        Absorb(SNAPKV, threshold=1.5)
    with pytest.raises(ArgumentTypeError, match=r"threshold must be a real number in \[-1, 1\]; got 'high'"):
        Absorb(SNAPKV, threshold="high")
    with pytest.raises(ArgumentError, match=r"weights must be one of \['attention', 'count'\]; got 'mean'"):
        Absorb(SNAPKV, weights="mean")
    with pytest.raises(ArgumentError, match="window must be at least 1; got 0"):
        Absorb(SNAPKV, window=0)
    with pytest.raises(ArgumentError, match=r"queries must hold the last position for Absorb\(KNorm\); got none"):
        evict(Absorb(KNorm(budget=6)), layer["keys"])
    assert Absorb(KNorm(budget=6)).needs().merges
    assert not KNorm(budget=6).needs().merges


def test_absorb_costs_a_product_with_the_kept_tokens():
    shape = LayerShape(num_tokens=5000, query_heads=4, kv_heads=2, head_size=8, budget=100)

    cost = Absorb(KNorm(budget=100), weights="count").cost(shape)
    assert cost.flops == KNorm(budget=100).cost(shape).flops + 2 * 2 * 5000 * 100 * 8
    assert cost.bytes == 4 * 2 * 1024 * 100
    many = LayerShape(num_tokens=5000, query_heads=4, kv_heads=2, head_size=8, budget=2000, batch=64)
    assert Absorb(KNorm(budget=2000), weights="count").cost(many).bytes == 4 * 128 * 65 * 2000 <= 4 * 2**24


def test_a_kept_token_without_attention_absorbs_by_counts():
    rows = np.asarray([[[[0.0, 0.5, 0.25, 0.25]]]])
    values = np.asarray([[[[1.0], [3.0], [5.0], [7.0]]]])
    base = Given(budget=3, importance=np.asarray([[[3.0, 0.0, 2.0, 1.0]]]))
    keys = np.asarray([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]])

    done = evict(Absorb(base, window=1), keys, attention=rows)

    assert done.mass.tolist() == [[[2.0, 1.0, 1.0]]]
    assert done.compress(keys, values)[1].tolist() == [[[[2.0], [5.0], [7.0]]]]
