"""Heads that match, against sets; and the policy that keeps what a smaller model attends to."""

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, GraphKV, SmallKV, evict
from graphkv.adapters.smallkv import match_heads
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(37)
LARGE, SMALL = RNG.random((3, 5, 20)), RNG.random((3, 4, 20))
KEYS = RNG.normal(size=(2, 2, 20, 4))
SCORES = RNG.random((2, 2, 20))


def by_sets(large, small, k, valid):
    """The head with the highest mean Jaccard index of the best k tokens."""

    def best(scores, real):
        return set(sorted(np.flatnonzero(real), key=lambda j: (-scores[j], j))[:k])

    found = []
    for head in range(large.shape[1]):
        means = []
        for other in range(small.shape[1]):
            pairs = [(best(a[head], r), best(b[other], r)) for a, b, r in zip(large, small, valid, strict=True)]
            means.append(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
        found.append(int(np.argmax(np.round(means, 9))))
    return found


@each_library
@pytest.mark.parametrize("k", [1, 4, 9, 20, 50])
def test_a_head_matches_the_one_that_looks_at_the_same_tokens(backend, k):
    valid = np.arange(20) >= np.asarray([[0], [7], [15]])

    found = match_heads(
        make(backend, LARGE), make(backend, SMALL), num_tokens=k, valid=make(backend, valid, bool), backend=backend
    )

    assert backend.to_numpy(found).tolist() == by_sets(LARGE, SMALL, k, valid)
    if k == 4:
        alone = match_heads(make(backend, LARGE), make(backend, SMALL), num_tokens=k, backend=backend)
        assert backend.to_numpy(alone).tolist() == by_sets(LARGE, SMALL, k, np.ones((3, 20), dtype=bool))


@each_library
def test_of_heads_that_match_alike_the_first_is_taken(backend):
    found = match_heads(
        make(backend, LARGE[:, :2]), make(backend, LARGE[:, [1, 0, 1, 0]]), num_tokens=5, backend=backend
    )

    assert backend.to_numpy(found).tolist() == [1, 0]


def test_one_row_that_matches_wholly_counts_more_than_two_that_match_in_part():
    """Jaccard's index is 3/5 and 2/6 for the first, 1 and 0 for the second; tokens in common are 5 and 4."""

    def marked(*rows):
        return np.asarray([[np.isin(np.arange(8), row)] for row in rows], dtype=float)

    both = marked([0, 1, 2, 3], [0, 1, 2, 3])
    small = np.concatenate([marked([0, 1, 2, 4], [0, 1, 4, 5]), marked([0, 1, 2, 3], [4, 5, 6, 7])], axis=1)

    assert match_heads(both, small, num_tokens=4).tolist() == [1]


@each_library
def test_every_layer_keeps_by_its_own_scores_and_the_newest(backend):
    scores = [None, make(backend, SCORES), make(backend, -SCORES)]

    for layer, sign in ((1, 1), (2, -1)):
        done = evict(
            SmallKV(budget=9, importance=scores), make(backend, KEYS), layer=layer, num_layers=3, backend=backend
        )
        for row in np.ndindex(2, 2):
            best = sorted(range(17), key=lambda j, row=row, sign=sign: (-sign * np.float32(SCORES[row][j]), j))[:6]
            assert backend.to_numpy(done.kept)[row].tolist() == sorted([*best, 17, 18, 19])
    graph = GraphKV(SmallKV(budget=9, importance=scores, num_recent=1))
    few = evict(graph, make(backend, KEYS), layer=1, num_layers=3, backend=backend)
    assert backend.to_numpy(few.kept).shape == (2, 2, 9)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: match_heads(LARGE, SMALL[:2], num_tokens=3), ArgumentError, "small must have shape"),
        (lambda: match_heads(LARGE, SMALL[:, :0], num_tokens=3), ArgumentError, "small must have a head and a token"),
        (lambda: match_heads(LARGE, SMALL, num_tokens=0), ArgumentError, "num_tokens must be at least 1; got 0"),
        (lambda: match_heads(LARGE, SMALL[0], num_tokens=3), ArgumentError, "small"),
        (lambda: SmallKV(budget=3, importance=SCORES), ArgumentTypeError, "importance must be a sequence"),
        (lambda: evict(SmallKV(budget=3, importance=[SCORES]), KEYS[:, :, :9]), ArgumentError, "importance must have"),
        (
            lambda: evict(SmallKV(budget=3, importance=[SCORES]), KEYS, layer=1, num_layers=2),
            ArgumentError,
            "importance must have one array for each of 2 layers; got 1",
        ),
        (lambda: evict(SmallKV(budget=3, importance=[None]), KEYS), ArgumentError, "for layer 0; got None"),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
