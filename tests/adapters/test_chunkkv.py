"""Chunks against loops, and choices that layers share."""

from math import fsum

import numpy as np
import pytest

from graphkv import (
    CAKE,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    ChunkKV,
    Given,
    GraphKV,
    KNorm,
    LayerBudgets,
    Shared,
    SnapKV,
    evict,
    evict_layers,
)
from tests.support.arrays import NUMPY, each_backend, make

RNG = np.random.default_rng(37)
KEYS = RNG.normal(size=(2, 3, 30, 6))
QUERIES = RNG.normal(size=(2, 6, 30, 6))
VALID = np.arange(30) >= np.asarray([[0], [11]])
SNAPKV = SnapKV(budget=12, window=4, kernel_size=1, num_sinks=1)


def kept_by_loops(scores, held, valid, budget, size):
    """Positions that one row keeps: what is held, whole chunks, the best tokens of the next one, padding."""
    real = [j for j, is_valid in enumerate(valid) if is_valid]
    chunks = []
    for start in range(0, len(real), size):
        tokens = [j for j in real[start : start + size] if not held[j]]
        if tokens:
            mean = fsum(scores[j] for j in tokens) / len(tokens)
            chunks.append((-mean, start, sorted(tokens, key=lambda j: (-scores[j], j))))
    first = sorted((j for j in real if held[j]), key=lambda j: (-scores[j], j))
    order = first + [j for _, _, tokens in sorted(chunks) for j in tokens]
    return sorted((order + [j for j in range(len(valid)) if not valid[j]])[:budget])


def run(policy, backend, **options):
    arrays = {"queries": make(backend, QUERIES), "valid": make(backend, VALID, bool), "backend": backend}
    return evict(policy, make(backend, KEYS), **arrays, **options)


@each_backend
@pytest.mark.parametrize("base", [SNAPKV, KNorm(budget=12), GraphKV(SNAPKV)], ids=["snapkv", "knorm", "graph"])
@pytest.mark.parametrize("chunk", [1, 4, 10, 40])
def test_the_kept_set_is_that_of_loops(backend, base, chunk):
    for budget in (0, 1, 4, 5, 12, 29):
        alone = run(base, backend, budget=budget)
        done = run(ChunkKV(base, chunk=chunk), backend, budget=budget)

        scores, protected = backend.to_numpy(alone.scores).astype(float), alone.protected
        held = np.zeros(scores.shape, dtype=bool) if protected is None else backend.to_numpy(protected)
        kept = backend.to_numpy(done.kept)
        for row, head in np.ndindex(2, 3):
            each = (scores[row, head].tolist(), held[row, head].tolist(), VALID[row].tolist())
            assert kept[row, head].tolist() == kept_by_loops(*each, budget, chunk)
    # Where the budget leaves none for padding.
    assert (chunk > 1) or kept[0].tolist() == backend.to_numpy(alone.kept)[0].tolist()


@each_backend
def test_equal_chunks_keep_their_order_and_are_not_mixed(backend):
    """Both chunks have the mean 2; by their own scores, tokens 0 and 2 would be first."""
    scores = make(backend, [[[3.0, 1.0, 3.0, 1.0, 0.0]]])

    done = evict(
        ChunkKV(Given(budget=3, importance=scores), chunk=2), make(backend, np.ones((1, 1, 5, 1))), backend=backend
    )

    assert backend.to_numpy(done.scores).tolist() == [[[4, 3, 2, 1, 0]]]
    assert backend.to_numpy(done.kept).tolist() == [[[0, 1, 2]]]


@each_backend
def test_every_row_of_a_batch_has_chunks_of_its_own(backend):
    """In kvpress, all rows get the chunks of the first."""
    both = evict(ChunkKV(SNAPKV, chunk=5), make(backend, KEYS), queries=make(backend, QUERIES), backend=backend)

    second = evict(
        ChunkKV(SNAPKV, chunk=5), make(backend, KEYS[1:]), queries=make(backend, QUERIES[1:]), backend=backend
    )

    kept = backend.to_numpy(both.kept)
    assert kept[1:].tolist() == backend.to_numpy(second.kept).tolist()
    assert kept[0].tolist() != kept[1].tolist()


def test_one_choice_for_all_heads_and_head_budgets():
    shared = evict(ChunkKV(Shared(SNAPKV), chunk=5), KEYS, queries=QUERIES)
    assert (shared.kept == shared.kept[:, :1]).all()
    for policy in (AdaKV(ChunkKV(SNAPKV, chunk=5)), ChunkKV(AdaKV(SNAPKV), chunk=5)):
        assert evict(policy, KEYS, queries=QUERIES).counts.sum(axis=-1).tolist() == [36, 36]


def layers_of(number, rng):
    return [{"keys": rng.normal(size=(2, 3, 30, 6)), "queries": rng.normal(size=(2, 6, 30, 6))} for _ in range(number)]


@pytest.mark.parametrize("reuse", [1, 2, 3, 9])
def test_successive_layers_keep_what_the_first_of_them_chooses(reuse):
    layers, policy = layers_of(5, np.random.default_rng(1)), ChunkKV(SNAPKV, chunk=4, reuse=reuse)

    done = evict_layers(policy, layers)

    alone = [evict(ChunkKV(SNAPKV, chunk=4), each["keys"], queries=each["queries"]) for each in layers]
    for place, each in enumerate(done):
        assert each.kept.tolist() == alone[place // reuse * reuse].kept.tolist()
        assert each.scores.tolist() == alone[place // reuse * reuse].scores.tolist()
    assert policy.needs().couples_layers is (reuse > 1)


def test_only_the_layers_that_choose_need_queries():
    layers = layers_of(4, np.random.default_rng(1))
    without = [each if place % 2 == 0 else {"keys": each["keys"]} for place, each in enumerate(layers)]
    policy = GraphKV(ChunkKV(SNAPKV, chunk=4, reuse=2))

    one, other = evict_layers(policy, layers), evict_layers(policy, without)

    assert [each.kept.tolist() for each in one] == [each.kept.tolist() for each in other]


def test_reuse_under_and_over_layers_that_share():
    layers = layers_of(4, np.random.default_rng(1))

    over = evict_layers(Shared(ChunkKV(SNAPKV, chunk=4, reuse=2), over="layers"), layers)
    firsts = evict_layers(Shared(ChunkKV(SNAPKV, chunk=4), over="layers"), layers[::2])
    under = evict_layers(ChunkKV(Shared(SNAPKV, over="layers"), chunk=4, reuse=2), layers)

    assert all(each.kept.tolist() == firsts[0].kept.tolist() for each in over)
    assert all(each.kept.tolist() == under[0].kept.tolist() for each in under)
    assert under[0].kept.tolist() != over[0].kept.tolist()


def test_wrong_options_and_single_layers_are_refused():
    for option in ("chunk", "reuse"):
        with pytest.raises(ArgumentError, match=f"{option} must be at least 1; got 0"):
            ChunkKV(SNAPKV, **{option: 0})
        with pytest.raises(ArgumentTypeError, match=f"{option} must be an integer"):
            ChunkKV(SNAPKV, **{option: 0.5})
    with pytest.raises(ArgumentError, match="reuse must be 1 with CAKE"):
        ChunkKV(CAKE(budget=12), reuse=2)
    assert ChunkKV(CAKE(budget=12)).needs().wants
    policy = ChunkKV(SNAPKV, chunk=4, reuse=2)
    assert evict(policy, KEYS, queries=QUERIES, layer=2, num_layers=4).kept.shape == (2, 3, 12)
    with pytest.raises(ArgumentError, match=r"with ChunkKV\(SnapKV\) layer 3 keeps what the layers \[2\] choose"):
        evict(policy, KEYS, queries=QUERIES, layer=3, num_layers=4)
    layers = layers_of(2, np.random.default_rng(1))
    with pytest.raises(ArgumentError, match=r"one budget .*; layers\[0\] has 12, layers\[1\] has 20"):
        evict_layers(LayerBudgets(policy, budgets=(12, 20)), layers, backend=NUMPY)
