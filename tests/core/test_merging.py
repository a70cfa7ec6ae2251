"""What merges mean: sums by slot, masses in attention, and that nothing changes where nothing is merged."""

import math
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphkv import (
    H2O,
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    Given,
    KNorm,
    Merge,
    SnapKV,
    evict,
    observe,
    wants,
)
from graphkv.core import Layer, merging, primitives
from graphkv.core.attention import received_attention, window_attention
from graphkv.core.merging import add_up, compressed, nearest, shares, slots
from tests.adapters import loops
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(3)
FEW = settings(deadline=None, derandomize=True, max_examples=25)


def summed(rows, into, num_slots):
    """The sum by loops, in the order of the tokens."""
    found = np.zeros((*into.shape[:-1], num_slots, rows.shape[-1]))
    for *row, j in np.ndindex(*into.shape):
        if into[(*row, j)] >= 0:
            found[(*row, into[(*row, j)])] += rows[(*row, j)]
    return found


@st.composite
def tables(draw):
    """Rows and their slots; sizes may be zero."""
    leading = draw(st.sampled_from([(), (2,), (2, 3)]))
    num_tokens, size, num_slots = draw(st.integers(0, 9)), draw(st.sampled_from([0, 1, 4])), draw(st.integers(0, 5))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    into = random.integers(-1, num_slots, (*leading, num_tokens))
    return random.normal(size=(*leading, num_tokens, size)), into, num_slots


@each_library
@FEW
@given(table=tables())
def test_rows_are_added_by_slot(backend, table):
    rows, into, num_slots = table
    found = primitives.sum_rows(make(backend, rows), make(backend, into, int), num_slots, backend=backend)

    assert tuple(found.shape) == (*into.shape[:-1], num_slots, rows.shape[-1])
    np.testing.assert_allclose(backend.to_numpy(found), summed(rows, into, num_slots), atol=1e-5)


@each_library
def test_sums_are_the_same_in_every_run_and_in_any_company(backend):
    rows, into = RNG.normal(size=(2, 200, 3)), RNG.integers(-1, 4, (2, 200))

    def run(rows, into):
        x = primitives.sum_rows(make(backend, rows), make(backend, into, int), 4, backend=backend)
        return backend.to_numpy(x)

    once = run(rows, into)
    assert np.array_equal(once, run(rows, into))
    # A row of the batch, and a slot, does not know of the others.
    assert np.array_equal(once[1], run(rows[1:], into[1:])[0])
    assert np.array_equal(once[:, 2], run(rows, np.where(into == 2, 2, -1))[:, 2])
    order = RNG.permutation(200)
    np.testing.assert_allclose(run(rows[:, order], into[:, order]), once, rtol=2e-5, atol=2e-5)


def kept_tokens(random, shape, num_tokens, ragged):
    """Random kept sets, ascending, with -1 at the end of some rows."""
    kept = np.full(shape, -1)
    for row in np.ndindex(*shape[:-1]):
        count = random.integers(0, shape[-1] + 1) if ragged else shape[-1]
        kept[row][:count] = np.sort(random.permutation(num_tokens)[:count])
    return kept


@each_library
@pytest.mark.parametrize("ragged", [False, True])
def test_slots_number_the_kept_tokens(backend, ragged):
    kept = kept_tokens(RNG, (2, 3, 5), 12, ragged)

    found = backend.to_numpy(slots(make(backend, kept, int), 12, backend=backend))

    for row in np.ndindex(2, 3):
        wanted = [-1] * 12
        for slot, j in enumerate(kept[row]):
            if j >= 0:
                wanted[j] = slot
        assert found[row].tolist() == wanted


def cosine(a, b):
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


@each_library
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_the_nearest_kept_token_is_found_in_chunks(backend, chunk_size):
    random = np.random.default_rng(8)
    # Exact cosines, many of them equal, and some keys without a direction.
    keys = random.choice([-1.0, 1.0], (2, 2, 14, 4)) * random.integers(0, 3, (2, 2, 14, 1))
    kept = kept_tokens(random, (2, 2, 5), 14, True)
    is_target = random.random((2, 2, 14)) < 0.7
    is_target[1, 1] = False

    slot, similarity = nearest(
        make(backend, keys), make(backend, kept, int), make(backend, is_target, bool), backend=backend,
        chunk_size=chunk_size,
    )  # fmt: skip

    slot, similarity = backend.to_numpy(slot), backend.to_numpy(similarity)
    for b, h, i in np.ndindex(2, 2, 14):
        row = (b, h)
        targets = [(s, j) for s, j in enumerate(kept[row]) if j >= 0 and is_target[row][j]]
        found = [(s, cosine(keys[row][i], keys[row][j])) for s, j in targets]
        if i in kept[row]:
            assert slot[row][i] == kept[row].tolist().index(i)
        elif found:
            best = max(value for _, value in found)
            assert similarity[row][i] == pytest.approx(best, abs=1e-6)
            assert slot[row][i] == min(s for s, value in found if value > best - 1e-6)
        else:
            assert similarity[row][i] == -np.inf


def test_similarities_with_all_kept_tokens_are_never_there_at_once(monkeypatch):
    """Neither of all tokens nor, where there are many rows, of as many tokens in each."""
    random = np.random.default_rng(5)
    for shape, num_slots, most in (((1, 1, 9000, 4), 4000, 1024 * 4000), ((8, 4, 1200, 4), 600, 2**20)):
        monkeypatch.setattr(merging, "LARGEST", most)
        keys = random.normal(size=shape).astype(np.float32)
        kept = np.broadcast_to(np.arange(num_slots), (*shape[:2], num_slots))
        tracemalloc.start()
        slot, _ = nearest(keys, kept, np.ones(shape[:3], bool), backend=NUMPY)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The last chunk is still there while the next one is computed.
        assert peak < 3 * 4 * most < 4 * math.prod(shape[:3]) * num_slots
        row, one = (
            slot[-1:, -1:],
            nearest(keys[-1:, -1:], kept[-1:, -1:], np.ones((1, 1, shape[2]), bool), backend=NUMPY),
        )
        assert np.array_equal(row, one[0])


def random_merge(random, kept, num_tokens, dtype):
    """Some dropped tokens go into any slot that has a token."""
    own = slots(kept, num_tokens, backend=NUMPY)
    counts = (kept >= 0).sum(-1, keepdims=True)
    guest = np.minimum(random.integers(-1, kept.shape[-1], own.shape), counts - 1)
    into = np.where(own >= 0, own, guest)
    return own, into, random.random(own.shape).astype(dtype)


@each_library
def test_a_slot_is_the_weighted_sum_of_its_tokens_and_alone_it_is_copied(backend):
    random = np.random.default_rng(4)
    kept = kept_tokens(random, (2, 3, 4), 15, True)
    own, into, weights = random_merge(random, kept, 15, np.float32)
    x = random.normal(size=(2, 3, 15, 5))
    x[..., 0] = -0.0
    weights = np.where(own >= 0, 1.0, np.where(random.random(own.shape) < 0.3, 0.0, weights))
    # What goes nowhere, or has no weight, may hold anything.
    x[(into < 0) | (weights == 0)] = np.nan
    gathered = np.where((kept >= 0)[..., None], np.take_along_axis(x, np.maximum(kept, 0)[..., None], axis=2), 0)

    made = [make(backend, array) for array in (x, gathered)]
    found = backend.to_numpy(
        compressed(*made, make(backend, kept, int), make(backend, into, int), make(backend, weights), backend=backend)
    )

    wanted = summed(np.nan_to_num(x) * weights[..., None], into, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    members = add_up(np.ones(into.shape, np.float32), into, 4, backend=NUMPY)
    alone = members <= 1
    assert set(alone.ravel()) == {False, True}
    assert found[alone].tobytes() == backend.to_numpy(made[1])[alone].tobytes()


@FEW
@given(seed=st.integers(0, 999), constant=st.sampled_from([0.0, 1.5, -3.25, 1e20]))
def test_shares_make_averages_and_constant_values_stay_constant(seed, constant):
    random = np.random.default_rng(seed)
    kept = kept_tokens(random, (2, 2, 4), 11, True)
    _, into, weights = random_merge(random, kept, 11, np.float64)

    part = shares(weights, into, 4, backend=NUMPY)
    total = add_up(part, into, 4, backend=NUMPY)

    assert (part >= 0).all()
    assert (part[into < 0] == 0).all()
    np.testing.assert_allclose(total, (kept >= 0).astype(float), atol=1e-12)
    values = np.full((2, 2, 11, 3), constant)
    gathered = np.full((2, 2, 4, 3), constant) * (kept >= 0)[..., None]
    np.testing.assert_allclose(compressed(values, gathered, kept, into, part, backend=NUMPY), gathered, rtol=1e-12)


def test_a_token_alone_has_exactly_all_of_its_slot():
    weights = np.asarray([0.1, 0.7, 3.0, 0.3])
    into = np.asarray([0, 1, -1, 1])

    assert shares(weights, into, 3, backend=NUMPY).tolist() == [1.0, 0.7, 0.0, 0.3]
    assert shares(0 * weights, into, 3, backend=NUMPY).tolist() == [0.0] * 4
    assert shares(weights, -np.ones(4, int), 0, backend=NUMPY).tolist() == [0.0] * 4


# ------------------------------------------------------------------------------------------------------ mass in a layer


KEYS = RNG.normal(size=(2, 2, 12, 4))
QUERIES = RNG.normal(size=(2, 4, 6, 4))
MASS = RNG.integers(1, 6, (2, 2, 12)).astype(float)
VALID = np.arange(12) >= np.asarray([0, 3])[:, None, None] + np.zeros((2, 2, 1))


def attended(head, query, position):
    """Attention of one query by loops, each key counted as often as its mass says."""
    b, h = head
    keys = [j for j in range(position + 1) if VALID[b, h, j]]
    logits = [loops.dot(query, KEYS[b, h, j]) / 2 for j in keys]
    weights = [MASS[b, h, j] * math.exp(z) for j, z in zip(keys, logits, strict=True)]
    row = np.zeros(12)
    row[keys] = np.asarray(weights) / sum(weights)
    return row


@each_library
def test_attention_counts_a_key_as_often_as_its_mass(backend):
    made = [make(backend, x) for x in (QUERIES, KEYS)] + [make(backend, VALID, bool)]
    rows = window_attention(*made, mass=make(backend, MASS), xp=backend.xp)
    sums = received_attention(*made, mass=make(backend, MASS), block_size=4, backend=backend)

    rows, sums = backend.to_numpy(rows), backend.to_numpy(sums)
    for b, h, i in np.ndindex(2, 4, 6):
        wanted = attended((b, h // 2), QUERIES[b, h, i], 6 + i)
        np.testing.assert_allclose(rows[b, h // 2, h % 2, i], wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(sums, rows.sum(axis=-2), rtol=2e-5, atol=1e-6)


@each_library
def test_what_has_no_mass_receives_nothing(backend):
    mass = MASS.copy()
    mass[:, :, 7] = 0
    made = [make(backend, x) for x in (QUERIES, KEYS)] + [make(backend, VALID, bool)]

    sums = backend.to_numpy(received_attention(*made, mass=make(backend, mass), block_size=64, backend=backend))
    padded = backend.to_numpy(window_attention(*made, mass=make(backend, mass), xp=backend.xp))

    assert (sums[..., 7] == 0).all()
    assert (padded[..., 7] == 0).all()
    np.testing.assert_allclose(padded.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("policy", [SnapKV(budget=6, window=3, kernel_size=1), H2O(budget=6, num_recent=2)], ids=repr)
def test_a_mass_is_what_that_many_equal_tokens_are(policy):
    """A token of mass 3 at the front is scored as three tokens of mass 1 are together."""
    mass = np.ones((2, 2, 12))
    mass[:, :, 0] = 3
    # H2O sums over all queries: those of the copies, which see fewer copies, are left out of both.
    queries = RNG.normal(size=(2, 4, 12, 4))
    copied = np.concatenate([KEYS[:, :, :1]] * 2 + [KEYS], axis=2)
    thrice = np.concatenate([queries[:, :, :1]] * 2 + [queries], axis=2)

    one = evict(policy, KEYS, queries=queries[:, :, 1:] if isinstance(policy, SnapKV) else queries, mass=mass)
    three = evict(policy, copied, queries=thrice)

    if isinstance(policy, SnapKV):
        np.testing.assert_allclose(one.scores[..., 0], three.scores[..., :3].sum(-1), rtol=1e-6)
    np.testing.assert_allclose(one.scores[..., 1:], three.scores[..., 3:], rtol=1e-6)


def test_masses_of_one_change_nothing_beyond_rounding_and_no_masses_nothing_at_all():
    policy = SnapKV(budget=6, window=3)
    plain, ones = (evict(policy, KEYS, queries=QUERIES, mass=mass) for mass in (None, np.ones((2, 2, 12))))

    np.testing.assert_allclose(plain.scores, ones.scores, rtol=1e-6)
    assert np.array_equal(plain.kept, ones.kept)
    assert (plain.mass, plain.log_mass()) == (None, None)
    assert ones.mass.tolist() == np.ones((2, 2, 6)).tolist()


def test_masses_travel_with_the_tokens_and_rows_that_are_given_hold_them_already():
    policy = KNorm(budget=5)
    done = evict(policy, KEYS, mass=MASS)

    assert np.array_equal(done.mass, np.take_along_axis(MASS, done.kept, axis=-1))
    np.testing.assert_allclose(done.log_mass(), np.log(done.mass))
    assert evict(policy, KEYS, mass=MASS, budget=12).mass is MASS
    rows = RNG.random(size=(2, 4, 3, 12))
    given = [evict(SnapKV(budget=5, window=3), KEYS, attention=rows, mass=mass) for mass in (None, MASS)]
    assert np.array_equal(given[0].scores, given[1].scores)
    state = observe(H2O(budget=5), KEYS, queries=RNG.normal(size=(2, 4, 12, 4)), mass=MASS)
    assert state.tokens["attention"].shape == (2, 2, 12, 2)
    assert wants(policy, KEYS, mass=MASS) is None


@pytest.mark.parametrize(
    ("mass", "error", "message"),
    [
        (np.ones((2, 2, 11)), ArgumentError, r"mass must have shape \(2, 2, 12\) like keys; got \(2, 2, 11\)"),
        (np.ones((2, 12)), ArgumentError, r"mass must have shape \(batch, kv_heads, N\); got \(2, 12\)"),
        (np.ones((2, 2, 12), bool), ArgumentTypeError, "mass must be real"),
        ([1.0], BackendError, "mass must be an array"),
    ],
)
def test_masses_are_checked_at_the_door(mass, error, message):
    with pytest.raises(error, match=message):
        evict(KNorm(budget=5), KEYS, mass=mass)


def test_integer_masses_are_counted_in_float32():
    assert Layer(KEYS, mass=MASS.astype(int)).mass.dtype == np.float32


# ------------------------------------------------------------------------------------------------------------ evictions


@dataclass(frozen=True, kw_only=True)
class Halving(Given):
    """Sends the last dropped token into the first slot, half each, and counts how often it was asked."""

    def merge(self, choice, found, layer, memory):
        own = slots(choice.kept, layer.num_tokens, backend=layer.backend)
        into, weights = own.copy(), (own >= 0) + 0.0
        last = max(j for j in range(layer.num_tokens) if own[0, 0, j] < 0)
        into[0, 0, last] = 0
        weights[0, 0, last] = weights[0, 0, choice.kept[0, 0, 0]] = 0.5
        mass = np.ones(choice.kept.shape)
        mass[0, 0, 0] = 2
        calls = 0 if memory is None else memory.layer["calls"]
        return Merge(
            into=into, key_weights=weights, value_weights=weights, mass=mass, memory={"calls": np.ones(1) + calls}
        )


def test_compress_merges_what_the_policy_says_and_remembers_what_it_learned():
    keys = np.arange(8.0).reshape(1, 1, 4, 2).astype(np.float16)
    done = evict(Halving(budget=2, importance=np.asarray([[[3.0, 1.0, 0.0, 2.0]]])), keys)

    assert done.kept.tolist() == [[[0, 3]]]
    merged, values = done.compress(keys, 2 * keys)
    assert merged.dtype == np.float16
    assert (merged.tolist(), values.tolist()) == ([[[[2.0, 3.0], [6.0, 7.0]]]], [[[[4.0, 6.0], [12.0, 14.0]]]])
    np.testing.assert_allclose(done.log_mass(), [[[math.log(2), 0]]])
    assert done.state.layer["calls"].tolist() == [1]
    assert np.array_equal(done.apply(keys), keys[:, :, [0, 3]])


def test_without_a_merge_compress_is_apply_bit_for_bit():
    for budget in (5, 12):
        done = evict(KNorm(budget=budget), KEYS)
        for found, x in zip(done.compress(KEYS, 2 * KEYS), (KEYS, 2 * KEYS), strict=True):
            assert found.tobytes() == done.apply(x).tobytes()
    with pytest.raises(ArgumentError, match="x must have shape"):
        done.compress(KEYS, KEYS[:, :, 1:])
    with pytest.raises(ArgumentError, match=r"values must have shape \(batch, kv_heads, N, D\); got \(2, 2, 12\)"):
        done.compress(KEYS, KEYS[..., 0])
    with pytest.raises(BackendError, match="x must be an array"):
        done.compress(KEYS, [1.0])
