"""Automatic budgets against brute force over all of them."""

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest

from graphkv import (
    H2O,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    ChunkKV,
    Given,
    GraphKV,
    KNorm,
    Lossless,
    Shared,
    SnapKV,
    StreamingLLM,
    evict,
    evict_layers,
)
from graphkv.adapters.attention import last_rows
from graphkv.adapters.lossless import smallest_counts
from graphkv.core import Layer
from tests.support.arrays import NUMPY, each_backend, each_library, make

RNG = np.random.default_rng(41)
KEYS = RNG.normal(size=(2, 3, 30, 6))
QUERIES = 2 * RNG.normal(size=(2, 6, 30, 6))
VALID = np.arange(30) >= np.asarray([[0], [11]])
SNAPKV = SnapKV(budget=1.0, window=4, kernel_size=3, num_sinks=1)
BASES = {"snapkv": SNAPKV, "knorm": KNorm(budget=1.0), "position": StreamingLLM(budget=1.0), "graph": GraphKV(SNAPKV)}


def norm_kept(rows, order, count):
    """The mean norm, over the query heads, of what the first tokens of each KV head hold: rows [kv][group][token]."""
    norms = [sqrt(sum(row[j] ** 2 for j in order[head][:count])) for head, group in enumerate(rows) for row in group]
    return sum(norms) / len(norms)


def smallest_by_loops(rows, order, tolerance, margin=0.0):
    """The fewest tokens whose loss is within the tolerance, trying one number after the other."""
    tokens = len(order[0])
    whole = norm_kept(rows, order, tokens)
    if not whole:
        return tokens
    return next(c for c in range(1, tokens + 1) if 1 - norm_kept(rows, order, c) / whole <= tolerance + margin)


def order_of(scores, protected, valid):
    tokens = range(len(valid))
    return sorted(tokens, key=lambda j: (not valid[j], not protected[j], -scores[j], j))


@each_backend
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_every_row_finds_the_budget_of_brute_force(backend, base, tolerance):
    keys, queries, valid = (make(backend, KEYS), make(backend, QUERIES), make(backend, VALID, bool))

    done = evict(Lossless(base, tolerance), keys, queries=queries, valid=valid, backend=backend)

    rows = backend.to_numpy(last_rows(Layer(keys, queries=queries, valid=valid, backend=backend), 1))[..., 0, :]
    scores = backend.to_numpy(done.scores).astype(float)
    protected = np.zeros(scores.shape, bool) if done.protected is None else backend.to_numpy(done.protected)
    counts, kept = backend.to_numpy(done.counts), backend.to_numpy(done.kept)
    for row in range(2):
        order = [order_of(scores[row, h], protected[row, h], VALID[row]) for h in range(3)]
        # What rounding of float32 allows, on both sides.
        few, many = (
            smallest_by_loops(rows[row].tolist(), order, tolerance, margin)
            for margin in (1e-6, -1e-6 * bool(tolerance))
        )
        held = int(protected[row].sum(axis=-1).max())
        assert max(few, held) <= counts[row, 0] <= max(many, held)
        assert counts[row].tolist() == [counts[row, 0]] * 3
        for head in range(3):
            expected = sorted(order[head][: counts[row, head]])
            assert kept[row, head].tolist() == expected + [-1] * (30 - len(expected))
    assert done.budget == 30
    if tolerance == 0.5:
        assert counts[0, 0] != counts[1, 0] < 30


def test_the_cumulative_form_equals_brute_force_in_a_thousand_cases():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        heads, groups, tokens = (int(x) for x in rng.integers(1, [4, 4, 9]))
        rows = rng.integers(0, 4, size=(1, heads, groups, tokens)).astype(float)
        order = np.argsort(rng.random((1, heads, tokens)), axis=-1)
        # Numbers whose norms tie now and then, and tolerances that no loss equals.
        tolerance = float(rng.choice([0.0, 0.0123, 0.1234, 0.3337, 0.71]))

        found = smallest_counts(rows, order, tolerance, backend=NUMPY)

        assert found.tolist() == [smallest_by_loops(rows[0].tolist(), order[0].tolist(), tolerance)]


@each_library
def test_no_tolerance_lets_only_tokens_go_that_get_nothing(backend):
    rows = make(backend, [[[[0.0, 0.5, 0.0, 0.5, 0.0]], [[0.25, 0.0, 0.75, 0.0, 0.0]]]])
    # The last two of the first head's order get nothing, and only the last one of the second head's.
    order = make(backend, [[[1, 2, 3, 0, 4], [0, 1, 4, 2, 3]]], np.int64)

    assert backend.to_numpy(smallest_counts(rows, order, 0.0, backend=backend)).tolist() == [4]
    nothing = make(backend, np.zeros((1, 2, 1, 5)))
    assert backend.to_numpy(smallest_counts(nothing, order, 0.5, backend=backend)).tolist() == [5]
    assert backend.to_numpy(smallest_counts(nothing + np.nan, order, 0.5, backend=backend)).tolist() == [5]


@each_backend
def test_the_budget_is_the_most_and_protection_the_least(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    def counts(policy, **options):
        done = evict(policy, keys, queries=queries, backend=backend, **options)
        assert done.kept.shape[-1] == min(30, done.budget)
        return backend.to_numpy(done.counts)[:, 0].tolist()

    free = counts(Lossless(SNAPKV, 0.2))
    assert 5 < min(free) <= max(free) < 28
    assert counts(Lossless(SNAPKV, 0.2), budget=max(free)) == free
    assert counts(Lossless(SNAPKV, 0.2), budget=5) == [5, 5]
    assert counts(Lossless(SNAPKV, 0.2), budget=3) == [3, 3]
    assert counts(Lossless(SNAPKV, 0.2), budget=0) == [0, 0]
    assert counts(Lossless(SNAPKV, 0.2), budget=99) == free
    assert counts(Lossless(SNAPKV, 0.99)) == [5, 5]


@each_backend
def test_a_higher_tolerance_never_keeps_more(backend):
    found = [
        backend.to_numpy(
            evict(Lossless(SNAPKV, t), make(backend, KEYS), queries=make(backend, QUERIES), backend=backend).counts
        )
        for t in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9)
    ]
    assert all((more >= fewer).all() for more, fewer in pairwise(found))
    assert (found[0] > found[-1]).all()


@each_backend
def test_a_padded_row_finds_what_it_finds_alone(backend):
    policy = Lossless(GraphKV(SNAPKV), 0.3)
    together = evict(
        policy, make(backend, KEYS), queries=make(backend, QUERIES), valid=make(backend, VALID, bool), backend=backend
    )
    alone = evict(policy, make(backend, KEYS[1:, :, 11:]), queries=make(backend, QUERIES[1:, :, 11:]), backend=backend)

    count = int(backend.to_numpy(alone.counts)[0, 0])
    assert backend.to_numpy(together.counts)[1].tolist() == [count] * 3
    assert (
        backend.to_numpy(together.kept)[1, :, :count].tolist()
        == (backend.to_numpy(alone.kept)[0, :, :count] + 11).tolist()
    )


@each_backend
def test_shared_sets_and_blocks_on_top_lose_no_more_than_the_tolerance(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)
    rows = backend.to_numpy(last_rows(Layer(keys, queries=queries, backend=backend), 1))[..., 0, :]
    for block in (1, 4):
        done = evict(Shared(Lossless(SNAPKV, 0.2), block=block), keys, queries=queries, backend=backend)
        kept, counts = backend.to_numpy(done.kept), backend.to_numpy(done.counts)

        assert (kept == kept[:, :1]).all()
        assert counts.max() < 30
        for row in range(2):
            order = [[j for j in head if j >= 0] for head in kept[row].tolist()]
            whole = norm_kept(rows[row].tolist(), [range(30)] * 3, 30)
            assert block > 1 or norm_kept(rows[row].tolist(), order, 30) >= 0.8 * whole - 1e-6
            # The last two tokens are the shorter block.
            assert block == 1 or all(count % 4 == 2 for count in counts[row])


def test_blocks_of_protected_tokens_stay_even_where_the_budget_found_is_smaller():
    """Six protected tokens lie in three blocks of four."""
    rng = np.random.default_rng(6)
    policy = Shared(Lossless(SnapKV(budget=1.0, window=5, kernel_size=3, num_sinks=1), 0.99), block=4)

    done = evict(policy, rng.normal(size=(1, 2, 32, 6)), queries=rng.normal(size=(1, 2, 5, 6)))

    assert done.kept[0, 0, :13].tolist() == [0, 1, 2, 3, *range(24, 32), -1]


def test_layers_that_reuse_a_choice_keep_its_size():
    rng = np.random.default_rng(5)
    layers = [{"keys": rng.normal(size=(2, 3, 30, 6)), "queries": rng.normal(size=(2, 6, 30, 6))} for _ in range(3)]
    for policy in (ChunkKV(Lossless(SNAPKV, 0.3), chunk=4, reuse=2), Lossless(ChunkKV(SNAPKV, chunk=4, reuse=2), 0.3)):
        first, second, third = evict_layers(policy, layers)
        assert first.counts.tolist() == second.counts.tolist() != third.counts.tolist()


def test_wrong_options_are_refused():
    for wrong in (1.0, -0.1, float("nan"), 2):
        with pytest.raises(ArgumentError, match="tolerance must"):
            Lossless(SNAPKV, wrong)
    with pytest.raises(ArgumentTypeError, match="tolerance must be a real number"):
        Lossless(SNAPKV, "1%")
    for base in (AdaKV(SNAPKV), GraphKV(Shared(SNAPKV)), Lossless(SNAPKV)):
        with pytest.raises(ArgumentError, match="base must choose by its scores alone"):
            Lossless(base)
    for base in (Lossless(SNAPKV), Shared(SNAPKV)):
        with pytest.raises(ArgumentError, match="base must choose by its scores alone"):
            AdaKV(base)
    with pytest.raises(ArgumentError, match="base must have one budget for all layers"):
        Shared(Lossless(SNAPKV), over="layers")
    with pytest.raises(ArgumentError, match=r"queries must hold the last position for Lossless\(KNorm\)"):
        evict(Lossless(KNorm(budget=1.0)), KEYS)
    rows = np.full((1, 1, 1, 4), 0.25)
    given = Given(budget=1.0, importance=np.ones((1, 1, 4)))
    assert evict(Lossless(given, 0.5), np.ones((1, 1, 4, 2)), attention=rows).counts.tolist() == [[1]]
    state = evict(Lossless(H2O(budget=20), 0.1), KEYS, queries=QUERIES)
    with pytest.raises(ArgumentError, match="queries must hold the last position for Lossless"):
        evict(Lossless(H2O(budget=20), 0.1), state.apply(KEYS), state=state.state)
