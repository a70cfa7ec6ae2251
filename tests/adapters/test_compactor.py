"""Compactor against loops and orthonormal bases, and what its two parts are for."""

from math import sqrt

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, Compactor, Decay, GraphKV, evict
from graphkv.adapters.compactor import _sketch, leverage
from tests.adapters.loops import dot, softmax
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(31)
KEYS = RNG.normal(size=(2, 2, 22, 6)) * np.arange(1, 7)
UNROTATED = RNG.normal(size=(2, 2, 22, 6))
VALUES = RNG.normal(size=(2, 2, 22, 3))
QUERIES = RNG.normal(size=(2, 6, 22, 6)) / 6


def attention_by_loops(keys, values, queries, policy):
    """Pooled attention of one head's tokens: keys (N, D), queries (G, Q, D), the last Q positions."""
    number, asked = len(keys), len(queries[0])
    divisor = sqrt(len(keys[0])) if policy.scaled else 1.0
    received = [0.0] * number
    for member in queries:
        for place in range(number - asked, number):
            start = place // policy.chunk * policy.chunk
            near = keys[start : start + policy.chunk]
            row = softmax([dot(member[place - number + asked], key) / divisor for key in near])
            for j, weight in enumerate(row, start):
                received[j] += weight / len(queries)
    if policy.value_norm:
        received = [x * sqrt(dot(value, value)) for x, value in zip(received, values, strict=True)]
    reach = policy.kernel_size // 2
    return [
        sum(received[i] for i in range(j - reach, j + reach + 1) if 0 <= i < number) / policy.kernel_size
        for j in range(number)
    ]


def leverage_by_basis(keys, policy):
    """Squared lengths of the rows of an orthonormal basis; with a ridge by rows appended for it."""
    keys = np.asarray(keys)
    if policy.centered:
        keys = keys - keys.mean(0)
    if policy.sketch is not None and policy.sketch < keys.shape[1]:
        keys = keys @ np.asarray(_sketch(policy.seed, keys.shape[1], policy.sketch))
    stacked = np.concatenate([keys, sqrt(policy.ridge) * np.eye(keys.shape[1])])
    basis, lengths, _ = np.linalg.svd(stacked, full_matrices=False)
    return (basis[: len(keys), lengths > 1e-9 * lengths.max()] ** 2).sum(-1)


def standardized(scores):
    scores = np.asarray(scores)
    return (scores - scores.mean()) / scores.std()


POLICIES = {
    "paper": Compactor(budget=9, chunk=8),
    "sketched": Compactor(budget=9, sketch=3, chunk=5, kernel_size=1, mix=2, seed=4),
    "official": Compactor.official(9),
    "kvpress": Compactor(budget=9, sketch=4, chunk=7, centered=True, ridge=0.01, value_norm=True, unrotated=True),
    "scaled": Compactor(budget=9, sketch=None, chunk=100, scaled=True, mix=0),
}


@each_library
@pytest.mark.parametrize("asked", [22, 12])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_importance_equals_loops(backend, policy, asked):
    valid = np.arange(22) >= np.asarray([[0], [5]])

    done = evict(
        policy,
        make(backend, KEYS, np.float64),
        values=make(backend, VALUES, np.float64),
        queries=make(backend, QUERIES[:, :, -asked:], np.float64),
        unrotated_keys=make(backend, UNROTATED, np.float64),
        valid=make(backend, valid, bool),
        backend=backend,
    )

    for row, pads in enumerate((0, 5)):
        for head in range(2):
            mine = slice(3 * head, 3 * head + 3)
            attended = attention_by_loops(
                KEYS[row, head, pads:].tolist(),
                VALUES[row, head, pads:].tolist(),
                QUERIES[row, mine, max(pads, 22 - asked) :].tolist(),
                policy,
            )
            outlying = leverage_by_basis((UNROTATED if policy.unrotated else KEYS)[row, head, pads:], policy)
            expected = standardized(attended) + policy.mix * standardized(outlying)
            np.testing.assert_allclose(
                backend.to_numpy(done.importance)[row, head, pads:], expected, rtol=1e-9, atol=1e-11
            )


@each_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leverage_is_that_of_the_space_whatever_its_rank(backend, dtype):
    """Columns that repeat or are zero, and fewer rows than columns."""
    tall = RNG.normal(size=(2, 30, 7))
    tall[0, :, 3] = 2 * tall[0, :, 1] - tall[0, :, 2]
    tall[1, :, 5] = 0
    wide = RNG.normal(size=(2, 4, 9))

    for keys, ranks in ((tall, [6, 6]), (wide, [4, 4])):
        found = backend.to_numpy(leverage(make(backend, keys, dtype), xp=backend.xp))
        assert ((found >= 0) & (found <= 1)).all()
        np.testing.assert_allclose(found.sum(-1), ranks, rtol=1e-4)
        for row in range(2):
            expected = leverage_by_basis(keys[row], Compactor(budget=1, sketch=None))
            np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-4)


@each_library
def test_the_only_key_of_a_direction_stays_however_short_it_is(backend):
    keys = RNG.normal(size=(1, 1, 22, 6))
    keys[..., 0] = 0
    keys[0, 0, 11, 0] = 1e-3
    policy = Compactor(budget=3, sketch=None, num_sinks=0, num_recent=0, mix=50)

    done = evict(policy, make(backend, keys), queries=make(backend, QUERIES[:1, :3]), backend=backend)

    assert backend.to_numpy(done.importance)[0, 0].argmax() == 11


def test_the_sketch_is_the_same_everywhere_and_nearly_exact():
    keys = RNG.normal(size=(1, 1, 300, 16)) * np.arange(1, 17)
    keys[0, 0, ::50] += 60 * RNG.normal(size=(6, 16))

    def found(sketch, seed):
        policy = Compactor(budget=9, sketch=sketch, seed=seed, num_sinks=0, num_recent=0, mix=1e6)
        return evict(policy, keys, queries=np.zeros((1, 1, 1, 16))).importance[0, 0]

    np.testing.assert_array_equal(found(12, 0), found(12, 0))
    assert (found(12, 0) != found(12, 1)).any()
    assert np.corrcoef(found(12, 0), found(None, 0))[0, 1] > 0.9


def test_what_is_in_the_padding_does_not_matter():
    valid = np.arange(22) >= np.asarray([[0], [5]])
    keys, queries = KEYS.copy(), QUERIES.copy()
    keys[1, :, :5], queries[1, :, :5] = np.nan, np.inf
    policy = POLICIES["sketched"]

    together = evict(policy, keys, queries=queries, valid=valid)
    alone = evict(policy, KEYS[1:, :, 5:], queries=QUERIES[1:, :, 5:])

    np.testing.assert_array_equal(together.kept[1:] - 5, alone.kept)
    np.testing.assert_allclose(together.scores[1:, :, 5:], alone.scores, rtol=1e-9)


def test_constant_scores_are_no_scores():
    """All keys alike: no attention and no leverage differs, but for rounding."""
    keys = np.broadcast_to(np.float32([0.1, 0.7, 0.3]), (1, 1, 16, 3))
    queries = RNG.normal(size=(1, 2, 16, 3)).astype(np.float32)

    done = evict(Compactor(budget=6, chunk=4, kernel_size=1), keys, queries=queries)

    assert (done.importance == 0).all()
    assert done.kept[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    # Fewer keys than channels: each of them is the only one of its direction, but for rounding.
    few = KEYS[:, :, :5].astype(np.float32), QUERIES[:, :, :5].astype(np.float32)
    weighed = [evict(Compactor(budget=3, mix=mix), few[0], queries=few[1]).importance for mix in (0, 1)]
    np.testing.assert_array_equal(*weighed)


def test_a_graph_on_top_lowers_neighbors():
    done = evict(GraphKV(Compactor(budget=15, num_sinks=1), Decay(neighbors=2)), KEYS, queries=QUERIES)

    assert (done.scores <= done.importance).all()
    assert (done.scores < done.importance).any()


def test_options_are_checked():
    assert Compactor(budget=9).protection(9).count == 12
    assert Compactor.official(9).needs().unrotated_keys
    assert not Compactor(budget=9).needs().values
    with pytest.raises(ArgumentError, match="kernel_size must be odd; got 2"):
        Compactor(budget=9, kernel_size=2)
    with pytest.raises(ArgumentError, match="sketch must be at least 1; got 0"):
        Compactor(budget=9, sketch=0)
    with pytest.raises(ArgumentError, match="mix"):
        Compactor(budget=9, mix=-1)
    with pytest.raises(ArgumentTypeError, match="scaled must be True or False"):
        Compactor(budget=9, scaled=1)
    keys = NUMPY.xp.asarray(KEYS)
    with pytest.raises(ArgumentError, match="queries must hold the last position for Compactor; got none"):
        evict(Compactor(budget=9), keys)
    with pytest.raises(ArgumentError, match="unrotated_keys must be given for Compactor; got None"):
        evict(Compactor.official(9), keys, queries=QUERIES)
