"""KeyDiff's anchor against all pairs."""

from math import sqrt

import numpy as np

from graphkv import KeyDiff, evict
from tests.support.arrays import each_backend, make

KEYS = np.random.default_rng(6).normal(size=(2, 2, 23, 5))


def mean_cosines(keys):
    """Minus the mean cosine of each key with all keys, one pair at a time."""

    def cosine(a, b):
        lengths = sqrt(sum(x * x for x in a)) * sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    return [-sum(cosine(key, other) for other in keys) / len(keys) for key in keys]


@each_backend
def test_the_anchor_gives_the_mean_cosine_of_all_pairs_and_so_their_order(backend):
    done = evict(KeyDiff(budget=7), make(backend, KEYS, np.float64), backend=backend)

    for row in np.ndindex(2, 2):
        expected = mean_cosines(KEYS[row].tolist())
        np.testing.assert_allclose(backend.to_numpy(done.importance)[row], expected, rtol=1e-12, atol=1e-14)
        best = sorted(range(23), key=lambda j: -expected[j])[:7]
        assert backend.to_numpy(done.kept)[row].tolist() == sorted(best)


@each_backend
def test_padding_has_no_part_in_the_anchor(backend):
    keys, valid = KEYS.copy(), np.arange(23) >= np.asarray([[0], [9]])
    keys[1, :, :9] = 1000.0

    done = evict(KeyDiff(budget=7), make(backend, keys, np.float64), valid=make(backend, valid, bool), backend=backend)

    for head in range(2):
        expected = mean_cosines(keys[1, head, 9:].tolist())
        np.testing.assert_allclose(backend.to_numpy(done.importance)[1, head, 9:], expected, rtol=1e-12, atol=1e-14)


@each_backend
def test_length_does_not_matter_and_a_key_without_direction_scores_zero(backend):
    keys = np.asarray([[1, 0], [100, 0], [0, 0], [0, 1], [3, 0.0]])[None, None]

    done = evict(KeyDiff(budget=2), make(backend, keys), backend=backend)

    np.testing.assert_allclose(backend.to_numpy(done.importance)[0, 0], [-0.6, -0.6, 0.0, -0.2, -0.6], rtol=1e-6)
    assert backend.to_numpy(done.kept).tolist() == [[[2, 3]]]
    kept = evict(KeyDiff(budget=3, num_sinks=1), make(backend, keys), backend=backend).kept
    assert backend.to_numpy(kept).tolist() == [[[0, 2, 3]]]


def test_a_wholly_padded_row_has_finite_scores():
    done = evict(KeyDiff(budget=2), KEYS, valid=np.zeros((2, 23), dtype=bool))

    assert np.isfinite(done.scores).all()
