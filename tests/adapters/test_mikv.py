"""MiKV against loops: the rounding, the balance of keys, who is demoted and what it costs in bytes."""

from math import ceil, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphkv import (
    TOVA,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    Decay,
    Degree,
    Given,
    GraphKV,
    KNorm,
    LayerBudgets,
    MiKV,
    Precision,
    SnapKV,
    evict,
)
from graphkv.core.precision import Quantized, demote, dequantize, key_balance, peaks, quantize
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(29)
KEYS, QUERIES = RNG.normal(size=(2, 2, 21, 6)), RNG.normal(size=(2, 4, 21, 6))
SNAPKV = SnapKV(budget=9, window=3, kernel_size=3)
each_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def rounded(row, bits, group):
    """One row by the formula, a number at a time: codes, scales, offsets and what is read."""
    codes, scales, offsets, read = [], [], [], []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        scale, offset = (max(part) - min(part)) / (2**bits - 1), min(part)
        # Python rounds halves to even, as the standard does.
        own = [round((x - offset) / scale) if scale else 0 for x in part]
        codes, read = codes + own, read + [scale * code + offset for code in own]
        scales, offsets = [*scales, scale], [*offsets, offset]
    return codes, scales, offsets, read


@each_library
@each_bits
@pytest.mark.parametrize("group", [1, 2, 4, 6, 64])
def test_rounding_equals_loops(backend, bits, group):
    precision = Precision(bits=bits, group=group)
    x = RNG.normal(size=(2, 3, 6)) * [1, 1, 10, 1, 0, 1]

    found = quantize(make(backend, x, np.float64), precision, backend=backend)
    read = dequantize(found, precision, backend=backend)

    assert backend.to_numpy(found.codes).dtype == np.uint8
    assert tuple(found.scale.shape) == tuple(found.offset.shape) == (2, 3, ceil(6 / group))
    for row in np.ndindex(2, 3):
        loops = rounded(x[row].tolist(), bits, min(group, 6))
        for ours, theirs in zip((found.codes, found.scale, found.offset, read), loops, strict=True):
            np.testing.assert_allclose(backend.to_numpy(ours)[row], theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.integers(1, 9),
    size=st.integers(1, 8),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]),
)
def test_no_number_is_off_by_more_than_half_a_step_nor_outside_of_its_group(seed, bits, group, size, magnitude):
    precision, random = Precision(bits=bits, group=group), np.random.default_rng(seed)
    x = (random.normal(size=(5, size)) * magnitude).astype(np.float32)
    x[0] = x[0, 0]

    found = quantize(x, precision)
    read = dequantize(found, precision)

    owner = np.arange(size) // min(group, size)
    rounding = np.abs(x).max(-1, keepdims=True) * 1e-6
    assert (np.abs(read - x) <= found.scale[:, owner] / 2 + rounding).all()
    assert (found.codes < 2**bits).all()
    for number in set(owner.tolist()):
        part, back = x[:, owner == number], read[:, owner == number]
        assert (back >= part.min(-1, keepdims=True)).all()
        assert (back <= part.max(-1, keepdims=True) + rounding).all()
    # Equal numbers are exact, and what was rounded once stays.
    assert (read[0] == x[0]).all()
    again = quantize(read, precision)
    assert (again.codes == found.codes).all()
    np.testing.assert_allclose(dequantize(again, precision), read, rtol=1e-6, atol=rounding.max() * 1e-1)


@each_library
@pytest.mark.parametrize("shape", [(2, 0, 6), (2, 3, 0), (0,)])
def test_nothing_is_rounded_to_nothing(backend, shape):
    found = quantize(make(backend, np.zeros(shape)), Precision(group=4), backend=backend)

    assert tuple(found.codes.shape) == shape
    assert tuple(dequantize(found, Precision(group=4), backend=backend).shape) == shape


@each_library
def test_a_group_without_a_finite_step_spoils_no_other(backend):
    x, precision = np.asarray([[1.0, np.inf, 3.0, 5.0], [np.nan, 1.0, -1.0, 0.0]]), Precision(group=2)

    # Only the backend of NumPy silences NumPy's warnings.
    with np.errstate(invalid="ignore"):
        found = quantize(make(backend, x), precision, backend=backend)
        read = backend.to_numpy(dequantize(found, precision, backend=backend))

    assert np.isnan(read[:, :2]).all()
    np.testing.assert_allclose(read[:, 2:], x[:, 2:], atol=0.07)


@each_library
def test_half_precision_is_widened_and_integers_too(backend):
    if backend.library == "array_api_strict":
        pytest.skip("the standard has no half precision")
    half = make(backend, KEYS, np.float16)

    found = quantize(half, Precision(), backend=backend)

    assert backend.to_numpy(found.scale).dtype == np.float32
    assert backend.to_numpy(half).tolist() == KEYS.astype(np.float16).tolist()
    assert quantize(np.asarray([1, 4, 2]), Precision(bits=2)).codes.tolist() == [0, 3, 1]


@each_library
def test_the_balance_equals_loops(backend):
    xp, valid = backend.xp, np.arange(21) >= np.asarray([[0], [5]])[:, None]
    keys, queries = KEYS.copy(), QUERIES.copy()
    keys[:, :, 3, 2], keys[..., 4], queries[..., 5] = 400, 0, 1e-9
    # Padding does not count.
    keys[1, :, :5], queries[1, :, :5] = 1e9, 1e9
    mask = make(backend, np.broadcast_to(valid, (2, 2, 21)), bool)
    by_head = make(backend, queries.reshape(2, 2, 2 * 21, 6), np.float64)
    both = xp.concat([mask, mask], axis=-1)

    found = key_balance(peaks(by_head, both, xp=xp), peaks(make(backend, keys, np.float64), mask, xp=xp), xp=xp)

    for row, head, channel in np.ndindex(2, 2, 6):
        tokens = range(5 * row, 21)
        most = max(abs(keys[row, head, token, channel]) for token in tokens)
        asked = max(abs(queries[row, 2 * head + member, token, channel]) for token in tokens for member in (0, 1))
        expected = 1.0 if most == 0 else min(max(sqrt(asked / most), 0.01), 100)
        assert backend.to_numpy(found)[row, head, channel] == pytest.approx(expected, rel=1e-12)


def test_balanced_queries_and_keys_are_of_one_size_and_meet_at_the_same_logit():
    keys = KEYS * [1, 1, 40, 1, 0.2, 1]
    most_of_queries, most_of_keys = peaks(QUERIES[:, ::2], xp=np), peaks(keys, xp=np)

    balance = key_balance(most_of_queries, most_of_keys, xp=np)

    scaled_queries, scaled_keys = QUERIES[:, ::2] / balance[:, :, None], keys * balance[:, :, None]
    np.testing.assert_allclose(peaks(scaled_queries, xp=np), peaks(scaled_keys, xp=np))
    logits, before = (a @ b.swapaxes(-1, -2) for a, b in ((scaled_queries, scaled_keys), (QUERIES[:, ::2], keys)))
    np.testing.assert_allclose(logits, before, rtol=1e-12, atol=1e-12)


def test_the_balance_saves_logits_from_an_outlier_channel():
    """The paper's reason: one loud channel of the keys makes all steps wide."""
    keys, queries = KEYS * [1, 1, 60, 1, 1, 1], QUERIES[:, ::2] * [1, 1, 0.02, 1, 1, 1]
    levels = np.ones(keys.shape[:3], dtype=int)
    balance = key_balance(peaks(queries, xp=np), peaks(keys, xp=np), xp=np)

    errors = [
        np.abs(queries @ (demote(keys, levels, Precision(bits=3), balance=b) - keys).swapaxes(-1, -2)).mean()
        for b in (None, balance)
    ]

    assert errors[1] < errors[0] / 4


@each_library
def test_demoting_touches_only_the_demoted(backend):
    levels = RNG.integers(0, 2, size=KEYS.shape[:3])
    balance = np.abs(RNG.normal(size=(2, 2, 6))) + 0.5
    precision = Precision(bits=3, group=4)

    found = backend.to_numpy(
        demote(
            make(backend, KEYS, np.float64),
            make(backend, levels, np.int64),
            precision,
            balance=make(backend, balance, np.float64),
            backend=backend,
        )
    )

    assert (found[levels == 0] == KEYS[levels == 0]).all()
    for row in zip(*np.nonzero(levels), strict=True):
        factor = balance[row[:2]]
        read = rounded((KEYS[row] * factor).tolist(), 3, 4)[-1]
        np.testing.assert_allclose(found[row], np.asarray(read) / factor, rtol=1e-12)


def tiers_by_loops(done, high, low, valid):
    """Who stays as it is, and who is demoted after them, for one row of an eviction by the base at `high` tokens."""
    kept = [[token for token in row if token >= 0] for row in high.kept[0].tolist()]
    result = []
    for head, full in enumerate(kept):
        scores, held = done.scores[0, head], done.protected[0, head]
        others = [token for token in range(len(scores)) if token not in full]
        others.sort(key=lambda j: (not valid[j], not held[j], -scores[j], j))
        result.append((full, sorted(others if low is None else others[:low])))
    return result


@each_library
@pytest.mark.parametrize("high", [None, 0, 1, 4, 0.5, 8, 9, 50])
@pytest.mark.parametrize("wrap", [lambda base: base, AdaKV, lambda base: GraphKV(base, Degree())])
def test_the_best_stay_and_the_next_are_demoted(backend, high, wrap):
    base, valid = wrap(SNAPKV), np.arange(21) >= np.asarray([[0], [6]])
    policy = MiKV(base, high=high, balanced=False)
    num_high, num_low = policy.tiers(9, 6)
    facts = {"queries": make(backend, QUERIES), "valid": make(backend, valid, bool), "backend": backend}

    done = evict(policy, make(backend, KEYS), **facts)

    assert (num_high, num_low) == ({0.5: 5, None: 9}.get(high, min(9, high or 0)), num_low)
    assert (num_low is None) == (high is None)
    for row in range(2):
        own = slice(row, row + 1)
        alone = evict(base, KEYS[own], queries=QUERIES[own], valid=valid[own], budget=num_high)
        ours = evict(policy, KEYS[own], queries=QUERIES[own], valid=valid[own])
        for head, (full, demoted) in enumerate(tiers_by_loops(ours, alone, num_low, valid[row])):
            kept = backend.to_numpy(done.kept)[row, head]
            stays = kept[kept >= 0]
            assert stays.tolist() == sorted(full + demoted)
            if num_low == 0:
                assert done.levels is None
                continue
            levels = backend.to_numpy(done.levels)[row, head]
            assert kept[levels == 1].tolist() == demoted
            assert (levels[kept < 0] == 0).all()
            if done.counts is not None:
                assert backend.to_numpy(done.counts)[row, head] == len(stays)


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 9, 20])
@pytest.mark.parametrize("full_bits", [16, 32])
@pytest.mark.parametrize("balanced", [True, False])
def test_a_share_of_the_budget_never_takes_more_bytes_than_the_base(budget, full_bits, balanced):
    for high in (0, 1, 0.25, 0.5, 0.9, 1.0):
        for bits in (2, 3, 4, 8):
            policy = MiKV(KNorm(budget=budget), high=high, low_bits=bits, balanced=balanced, full_bits=full_bits)
            full, demoted = policy.tiers(budget, 24)
            row = policy.precision.row_bytes(24, full_bits=full_bits)
            used = 2 * full * 24 * full_bits // 8 + 2 * demoted * row + (24 * 4 if balanced else 0) * (demoted > 0)
            most = 2 * budget * 24 * full_bits // 8
            assert used <= most
            # To less than a token more.
            assert most - used < 2 * row + 24 * 4 or (high == 1.0 and not demoted)
    assert policy.tiers(budget, 24) == (budget, 0)


def test_a_row_counts_its_packed_bytes():
    assert [Precision(bits=bits, group=32).row_bytes(64) for bits in (2, 3, 4, 8)] == [16 + 8, 24 + 8, 32 + 8, 64 + 8]
    assert Precision(bits=4, group=64).row_bytes(64, full_bits=32) == 32 + 8
    # What is left of a byte or of a group is paid for.
    assert Precision(bits=3, group=4).row_bytes(9) == 6 + 12


def test_all_of_a_budget_is_the_base_bit_for_bit():
    for base in (SNAPKV, AdaKV(SNAPKV), GraphKV(SNAPKV)):
        alone, wrapped = (evict(policy, KEYS, queries=QUERIES) for policy in (base, MiKV(base, high=1.0)))
        assert wrapped.kept.tolist() == alone.kept.tolist()
        assert wrapped.scores.tolist() == alone.scores.tolist()
        assert wrapped.levels is None


def test_what_fits_is_not_demoted():
    assert evict(MiKV(KNorm(budget=21), high=2), KEYS).levels is None
    assert evict(MiKV(KNorm(budget=20), high=2, balanced=False), KEYS).levels is not None


def test_protected_tokens_come_first_in_both_tiers():
    """A window of 3 where 2 stay as they are: the third is the first to be demoted."""
    policy = MiKV(SnapKV(budget=4, window=3, kernel_size=1), high=2, balanced=False)

    done = evict(policy, KEYS, queries=QUERIES)

    assert (done.kept[..., -3:] == [18, 19, 20]).all()
    assert (done.levels[..., -3:].sum(axis=-1) == 1).all()
    # Whatever the scores of the protected are.
    scores, marks = np.asarray([[[5.0, 4.0, 3.0, 0.0, 1.0, 2.0]]]), np.asarray([[[False] * 3 + [True] * 3]])
    base = Given(budget=3, importance=scores, protected=marks, num_protected=3)
    done = evict(MiKV(base, high=2, balanced=False), np.ones((1, 1, 6, 8)))
    assert (done.kept.tolist(), done.levels.tolist()) == ([[[0, 3, 4, 5]]], [[[1, 1, 0, 0]]])


def test_wrappers_and_layers_hand_the_tiers_on():
    alone = evict(MiKV(SNAPKV), KEYS, queries=QUERIES)
    for policy in (LayerBudgets(MiKV(SNAPKV), budgets=(9,)), GraphKV(MiKV(SNAPKV), Decay(neighbors=0))):
        done = evict(policy, KEYS, queries=QUERIES)
        assert done.levels.tolist() == alone.levels.tolist()
        assert done.choice.precisions == (Precision(bits=4),)
        assert policy.needs().demotes
    assert not SNAPKV.needs().demotes


@each_library
def test_ties_are_broken_by_position_in_both_tiers(backend):
    done = evict(MiKV(KNorm(budget=8), high=2, balanced=False), make(backend, np.ones((1, 1, 21, 2))), backend=backend)

    num_low = MiKV(KNorm(budget=8), high=2, balanced=False).tiers(8, 2)[1]
    assert backend.to_numpy(done.kept)[0, 0].tolist() == list(range(2 + num_low))
    assert backend.to_numpy(done.levels)[0, 0].tolist() == [0, 0] + [1] * num_low


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"low_bits": 5}, ArgumentError, "bits must be 2, 3, 4 or 8; got 5"),
        ({"low_bits": 4.0}, ArgumentTypeError, "low_bits must be an integer"),
        ({"group": 0}, ArgumentError, "group must be at least 1; got 0"),
        ({"high": 1.5}, ArgumentError, r"high must lie in \[0, 1\]; got 1.5"),
        ({"high": -1}, ArgumentError, "high must be at least 0; got -1"),
        ({"high": "half"}, ArgumentTypeError, "high must be an integer or a float share"),
        ({"balanced": 1}, ArgumentTypeError, "balanced must be True or False"),
        ({"full_bits": 8}, ArgumentError, "full_bits must be 16 or 32; got 8"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MiKV(SNAPKV, **options)


def test_wrappers_that_choose_anew_are_refused_above():
    for wrap, name in ((MiKV, "MiKV"), (AdaKV, "AdaKV")):
        with pytest.raises(ArgumentError, match=f"base must not demote tokens below {name}, which chooses anew; got"):
            wrap(GraphKV(MiKV(TOVA(budget=4))))


def test_wrong_arrays_are_refused():
    with pytest.raises(BackendError, match="x must be an array; got list"):
        quantize([1.0], Precision())
    with pytest.raises(ArgumentTypeError, match="precision must be a Precision; got int"):
        quantize(KEYS, 4)
    with pytest.raises(ArgumentTypeError, match="quantized must be a Quantized; got"):
        dequantize(KEYS, Precision())
    assert isinstance(quantize(KEYS, Precision()), Quantized)
    levels = np.ones((2, 2, 21), dtype=int)
    for arguments, message in (
        ((KEYS, levels[:, :, 1:]), r"levels must have shape \(2, 2, 21\) like x; got \(2, 2, 20\)"),
        ((KEYS[0], levels), "x must have shape"),
    ):
        with pytest.raises(ArgumentError, match=message):
            demote(*arguments, Precision())
    with pytest.raises(ArgumentTypeError, match="levels must be an array of integers"):
        demote(KEYS, levels.astype(float), Precision())
    with pytest.raises(ArgumentError, match=r"balance must have shape \(2, 2, 6\) like x; got \(2, 2, 5\)"):
        demote(KEYS, levels, Precision(), balance=np.ones((2, 2, 5)))
