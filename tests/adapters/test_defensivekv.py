"""DefensiveKV against loops, and what distinguishes it from SnapKV."""

from math import exp, sqrt

import numpy as np
import pytest

from graphkv import AdaKV, ArgumentError, Decay, DefensiveKV, GraphKV, SnapKV, evict
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(17)
KEYS, QUERIES = RNG.normal(size=(2, 2, 21, 4)), RNG.normal(size=(2, 6, 21, 4))


def by_loops(keys, queries, valid, window, kernel_size):
    """Its importance of the past of one row, one number at a time; keys (H, N, D), queries (G H, N, D), valid (N,)."""
    heads, tokens, size = len(keys), len(keys[0]), len(keys[0][0])
    groups = len(queries) // heads
    past = tokens - window
    result = []
    for head in range(heads):
        risk = [0.0] * past
        for member in range(groups):
            for place in range(past, tokens):
                if not valid[place]:
                    continue
                query = queries[head * groups + member][place]
                weights = [
                    exp(sum(a * b for a, b in zip(query, keys[head][j], strict=True)) / sqrt(size)) if valid[j] else 0.0
                    for j in range(place + 1)
                ]
                row = [weight / sum(weights) for weight in weights[:past]]
                for j in range(past):
                    near = [row[i] for i in range(j - kernel_size // 2, j + kernel_size // 2 + 1) if 0 <= i < past]
                    risk[j] = max(risk[j], sum(near) / kernel_size)
        real = [value for value, is_real in zip(risk, valid[:past], strict=True) if is_real]
        floor = sum(real) / len(real) if real else 0.0
        result.append([max(value, floor) for value in risk])
    return result


@each_library
@pytest.mark.parametrize("pads", [0, 1, 9])
@pytest.mark.parametrize(("window", "kernel_size"), [(4, 1), (4, 5), (1, 3), (6, 41)])
def test_importance_equals_loops(backend, window, kernel_size, pads):
    policy = DefensiveKV(budget=9, window=window, kernel_size=kernel_size)
    valid = np.arange(21) >= np.asarray([[0], [pads]])

    done = evict(
        policy,
        make(backend, KEYS, np.float64),
        queries=make(backend, QUERIES, np.float64),
        valid=make(backend, valid, bool),
        backend=backend,
    )

    importance = backend.to_numpy(done.importance)
    for row in range(2):
        expected = by_loops(KEYS[row].tolist(), QUERIES[row].tolist(), valid[row].tolist(), window, kernel_size)
        real = valid[row, : 21 - window]
        np.testing.assert_allclose(
            importance[row, :, : 21 - window][:, real], np.asarray(expected)[:, real], rtol=1e-12
        )


@each_library
def test_attention_rows_serve_instead_of_queries(backend):
    logits = np.einsum("bhgqd,bhnd->bhgqn", QUERIES[:, :, -4:].reshape(2, 2, 3, 4, 4), KEYS) / 2
    logits = np.where(np.arange(21) <= np.arange(17, 21)[:, None], logits, -np.inf)
    rows = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).reshape(2, 6, 4, 21)
    policy = DefensiveKV(budget=9, window=4)

    by_rows = evict(policy, make(backend, KEYS), attention=make(backend, rows), backend=backend)
    by_queries = evict(policy, make(backend, KEYS), queries=make(backend, QUERIES[:, :, -4:]), backend=backend)

    np.testing.assert_allclose(backend.to_numpy(by_rows.scores), backend.to_numpy(by_queries.scores), rtol=1e-5)


def rows_of(*members):
    """Attention rows of one KV head, one query head a member: shares of the past, the rest to the window's first."""
    past = np.asarray(members, dtype=float)
    window = np.zeros((*past.shape[:2], past.shape[1]))
    window[..., 0] = 1 - past.sum(-1)
    return np.concatenate([past, window], axis=-1)[None]


def test_one_query_head_and_one_query_are_enough():
    """SnapKV averages a peak away, over the window and over the group."""
    steady = [0.0, 0.3, 0.0, 0.0]
    rows = rows_of([[0.5, 0.3, 0.0, 0.0], steady], [steady, steady])
    keys = np.ones((1, 1, 6, 2))

    kept = {
        policy: evict(policy, keys, attention=rows).kept.tolist()
        for policy in (SnapKV(budget=3, window=2, kernel_size=1), DefensiveKV(budget=3, window=2, kernel_size=1))
    }

    assert list(kept.values()) == [[[[1, 4, 5]]], [[[0, 4, 5]]]]


@each_library
def test_tokens_below_the_mean_tie_and_the_first_of_them_stay(backend):
    rows = make(backend, rows_of([[0.125, 0.0625, 0.5, 0.0, 0.1875, 0.125]]), np.float64)
    keys = make(backend, np.ones((1, 1, 7, 2)))

    done = [
        evict(DefensiveKV(budget=b, window=1, kernel_size=1), keys, attention=rows, backend=backend) for b in (3, 5)
    ]

    # Risks .125 .0625 .5 0 .1875 .125 have the mean 1/6.
    importance = backend.to_numpy(done[0].importance)[0, 0, :6]
    np.testing.assert_allclose(importance, [1 / 6, 1 / 6, 0.5, 1 / 6, 0.1875, 1 / 6], rtol=1e-15)
    assert [backend.to_numpy(each.kept).tolist() for each in done] == [[[[2, 4, 6]]], [[[0, 1, 2, 4, 6]]]]


def test_what_is_in_the_padding_does_not_matter():
    valid = np.arange(21) >= np.asarray([[0], [5]])
    keys, queries = KEYS.copy(), QUERIES.copy()
    keys[1, :, :5], queries[1, :, :5] = np.nan, np.inf
    policy = DefensiveKV(budget=8, window=4)

    together = evict(policy, keys, queries=queries, valid=valid)
    alone = evict(policy, KEYS[1:, :, 5:], queries=QUERIES[1:, :, 5:])

    np.testing.assert_array_equal(together.kept[1:] - 5, alone.kept)
    np.testing.assert_allclose(together.scores[1:, :, 5:], alone.scores, rtol=1e-12)


@each_library
def test_a_graph_on_top_lowers_neighbors_and_heads_can_share_their_budget(backend):
    policy = DefensiveKV(budget=9, window=4)
    keys, queries = make(backend, KEYS, np.float64), make(backend, QUERIES, np.float64)

    graph = evict(GraphKV(policy, Decay(neighbors=2)), keys, queries=queries, backend=backend)
    shared = evict(AdaKV(policy, floor=0.0), keys, queries=queries, backend=backend)

    importance, scores = backend.to_numpy(graph.importance), backend.to_numpy(graph.scores)
    np.testing.assert_array_equal(importance, backend.to_numpy(shared.importance))
    assert (scores <= importance).all()
    assert (scores < importance).any()
    assert (backend.to_numpy(shared.counts).sum(-1) == 2 * 9).all()


def test_options_are_checked():
    assert DefensiveKV(budget=9).kernel_size == 5
    assert DefensiveKV(budget=9).needs() == SnapKV(budget=9).needs()
    assert DefensiveKV(budget=9, num_sinks=2).protection(9).count == 34
    with pytest.raises(ArgumentError, match="kernel_size must be odd; got 4"):
        DefensiveKV(budget=9, kernel_size=4)
    with pytest.raises(ArgumentError, match="queries must hold the last 21 positions for DefensiveKV; got none"):
        evict(DefensiveKV(budget=9), NUMPY.xp.asarray(KEYS))
