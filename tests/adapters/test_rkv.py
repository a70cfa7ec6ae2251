"""R-KV against loops, against the public code's formula with all pairs at once, and what its parts are for."""

from math import exp

import numpy as np
import pytest

from graphkv import RKV, ArgumentError, ArgumentTypeError, Decay, GraphKV, evict
from tests.adapters.loops import dot, mean, softmax
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(23)
# Few directions, so that many keys are similar.
KEYS = RNG.normal(size=(2, 2, 19, 3))
QUERIES = RNG.normal(size=(2, 6, 19, 3))


def cosine(a, b):
    return dot(a, b) / (dot(a, a) ** 0.5 * dot(b, b) ** 0.5)


def attention_by_loops(keys, queries, policy):
    """Equations (1) to (4) of one KV head: keys (n, D), queries (G, W, D)."""
    width, size, rows = policy.kernel_size, len(keys[0]), []

    def pool(row):
        near = [range(j - width // 2, j + (width - 1) // 2 + 1) for j in range(len(row))]
        return [max(row[i] for i in places if 0 <= i < len(row)) for places in near]

    for place in range(len(queries[0])):
        logits = [max(dot(member[place], key) / size**0.5 for member in queries) for key in keys]
        rows.append(softmax(logits))
    if policy.pooled == "queries":
        return [mean(column) for column in zip(*map(pool, rows), strict=True)]
    return pool([mean(column) for column in zip(*rows, strict=True)])


def redundancy_by_loops(keys, policy):
    """Equations (5) and (6), pair by pair."""
    number = len(keys)
    links = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(number)] for i in range(number)]
    left_out = set()
    for i in range(number):
        similar = [j for j in range(number) if j != i and links[i][j] > policy.threshold]
        latest = similar[::-1][: policy.num_exempt]
        if not latest and policy.first_exempt and i:
            latest = [0]
        left_out |= {(i, j) if policy.exempt == "recent" else (j, i) for j in latest}
    means = [mean([0.0 if (i, j) in left_out else links[i][j] for i in range(number)]) for j in range(number)]
    return softmax(means)


def by_loops(keys, queries, policy):
    """Importance of one row's tokens before the window; keys (H, N, D), queries (G H, N, D), no padding."""
    groups, past = len(queries) // len(keys), len(keys[0]) - policy.window
    result = []
    for number, head in enumerate(keys):
        window = [query[past:] for query in queries[number * groups : (number + 1) * groups]]
        received = attention_by_loops(head[:past], window, policy)
        repeated = redundancy_by_loops(head if policy.with_window else head[:past], policy)
        result.append([policy.mix * a - (1 - policy.mix) * r for a, r in zip(received, repeated, strict=False)])
    return result


POLICIES = {
    "paper": RKV(budget=9, window=4),
    "even": RKV(budget=9, window=4, kernel_size=4, block_size=5),
    "official": RKV.official(9),
    "two": RKV(budget=9, window=3, kernel_size=1, num_exempt=2, mix=0.5, threshold=0.2, block_size=4),
    "own": RKV(budget=9, window=3, exempt="own", num_exempt=3, mix=0.0, block_size=4),
    "own, first": RKV(budget=9, window=3, exempt="own", first_exempt=True, threshold=0.9),
    "none": RKV(budget=9, window=3, num_exempt=0, mix=0.0),
}


@each_library
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_importance_equals_loops(backend, policy):
    valid = np.arange(19) >= np.asarray([[0], [6]])

    done = evict(
        policy,
        make(backend, KEYS, np.float64),
        queries=make(backend, QUERIES, np.float64),
        valid=make(backend, valid, bool),
        backend=backend,
    )

    importance = backend.to_numpy(done.importance)[..., : 19 - policy.window]
    for row, pads in enumerate((0, 6)):
        expected = by_loops(KEYS[row, :, pads:].tolist(), QUERIES[row, :, pads:].tolist(), policy)
        np.testing.assert_allclose(importance[row, :, pads:], expected, rtol=1e-10)


def test_the_official_choices_are_the_public_code_with_all_pairs():
    """Its formula as it stands, with every cosine at once: what a row's latest similar token gets is set to zero."""
    keys, queries = KEYS, QUERIES[:, :, -8:]
    unit = keys / (np.linalg.norm(keys, axis=-1, keepdims=True) + 1e-8)
    cosines = unit @ np.swapaxes(unit, -1, -2) * (1 - np.eye(19))
    latest = np.max(np.where(cosines > 0.5, np.arange(19), 0), axis=-1)
    np.put_along_axis(cosines, latest[..., None], 0.0, axis=-1)
    repeated = np.exp(cosines.mean(-2)) / np.exp(cosines.mean(-2)).sum(-1, keepdims=True)
    logits = np.einsum("bhgqd,bhnd->bhgqn", queries.reshape(2, 2, 3, 8, 3), keys[:, :, :-8]).max(2) / np.sqrt(3)
    received = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(-2)
    padded = np.pad(received, ((0, 0), (0, 0), (3, 3)), constant_values=-np.inf)
    pooled = np.max([padded[..., shift : shift + 11] for shift in range(7)], axis=0)

    done = evict(RKV.official(12), keys, queries=queries)

    np.testing.assert_allclose(done.importance[..., :11], 0.1 * pooled - 0.9 * repeated[..., :11], rtol=1e-6)


@each_library
def test_of_repetitions_the_latest_stays_and_of_equals_the_first(backend):
    """Three sentences said twice, then something new: the same importance for all that is said last."""
    keys = np.eye(4)[[0, 1, 2, 0, 1, 2, 3]][None, None]
    query = make(backend, np.zeros((1, 1, 1, 4)))

    done = [
        evict(RKV(budget=b, window=1, mix=0.0), make(backend, keys), queries=query, backend=backend) for b in (4, 3)
    ]

    # Everyone is the latest token that its repetition resembles, so nobody is left with a link: all tie.
    assert [backend.to_numpy(each.kept).tolist() for each in done] == [[[[0, 1, 2, 6]]], [[[0, 1, 6]]]]
    thrice = np.eye(4)[[0, 1, 0, 0, 1, 1, 2]][None, None]
    done = evict(RKV(budget=5, window=1, mix=0.0), make(backend, thrice), queries=query, backend=backend)
    # Of three, the first is spared nothing, the second one link, the third two.
    assert backend.to_numpy(done.kept).tolist() == [[[2, 3, 4, 5, 6]]]
    found = backend.to_numpy(done.importance)[0, 0, :6]
    weights = [exp(2 / 6), exp(2 / 6), exp(1 / 6), 1.0, exp(1 / 6), 1.0]
    np.testing.assert_allclose(-found, np.asarray(weights) / sum(weights), rtol=1e-6)


def test_blocks_change_nothing_but_rounding():
    runs = [evict(RKV(budget=9, window=4, block_size=size), KEYS, queries=QUERIES) for size in (1, 4, 15, 64)]

    for each in runs[1:]:
        np.testing.assert_allclose(each.scores, runs[0].scores, rtol=1e-12)
        assert each.kept.tolist() == runs[0].kept.tolist()


def test_what_is_in_the_padding_does_not_matter():
    valid = np.arange(19) >= np.asarray([[0], [5]])
    keys, queries = KEYS.copy(), QUERIES.copy()
    keys[1, :, :5], queries[1, :, :5] = np.nan, np.inf
    for policy in (POLICIES["paper"], POLICIES["official"]):
        together = evict(policy, keys, queries=queries, valid=valid)
        alone = evict(policy, KEYS[1:, :, 5:], queries=QUERIES[1:, :, 5:])

        np.testing.assert_array_equal(together.kept[1:] - 5, alone.kept)
        np.testing.assert_allclose(together.scores[1:, :, 5:], alone.scores, rtol=1e-12)


@each_library
def test_padding_inside_the_window_neither_asks_nor_counts(backend):
    valid, real = np.arange(19) != 17, np.delete(np.arange(19), 17)

    done = evict(
        POLICIES["paper"],
        make(backend, KEYS, np.float64),
        queries=make(backend, QUERIES, np.float64),
        valid=make(backend, np.stack([valid, valid]), bool),
        backend=backend,
    )

    for row in range(2):
        expected = by_loops(KEYS[row][:, real].tolist(), QUERIES[row][:, real].tolist(), RKV(budget=9, window=3))
        np.testing.assert_allclose(backend.to_numpy(done.importance)[row, :, :15], expected, rtol=1e-10)


@each_library
def test_a_graph_on_top_lowers_neighbors(backend):
    done = evict(
        GraphKV(POLICIES["paper"], Decay(neighbors=2)),
        make(backend, KEYS, np.float64),
        queries=make(backend, QUERIES, np.float64),
        backend=backend,
    )

    importance, scores = backend.to_numpy(done.importance), backend.to_numpy(done.scores)
    assert (scores <= importance).all()
    assert (scores < importance).any()


def test_options_are_checked():
    assert RKV(budget=9, num_sinks=2).protection(9).count == 10
    assert RKV(budget=9, mix=1).mix == 1.0
    with pytest.raises(ArgumentError, match=r"exempt must be one of \['own', 'recent'\]; got 'first'"):
        RKV(budget=9, exempt="first")
    with pytest.raises(ArgumentError, match="pooled"):
        RKV(budget=9, pooled="avg")
    with pytest.raises(ArgumentError, match="threshold"):
        RKV(budget=9, threshold=1.5)
    with pytest.raises(ArgumentTypeError, match="mix"):
        RKV(budget=9, mix=True)
    with pytest.raises(ArgumentError, match="first_exempt must be left out with num_exempt '0'; got True"):
        RKV(budget=9, num_exempt=0, first_exempt=True)
    with pytest.raises(ArgumentError, match="queries must hold the last 8 positions for RKV; got none"):
        evict(RKV(budget=9), NUMPY.xp.asarray(KEYS), attention=np.full((2, 6, 19, 19), 1 / 19))
