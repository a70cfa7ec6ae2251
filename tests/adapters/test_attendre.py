"""LRA and LFA against simulations with their own lists, and against their next of kin."""

import numpy as np
import pytest

from graphkv import H2O, LFA, LRA, ArgumentError, ArgumentTypeError, evict
from tests.adapters.decoding import decode
from tests.adapters.loops import best, mean, simulate
from tests.support.arrays import NUMPY, each_library

RNG = np.random.default_rng(19)
KEYS, QUERIES = 2 * RNG.normal(size=(1, 2, 40, 4)), 2 * RNG.normal(size=(1, 6, 40, 4))


def least_recent(alpha):
    """The inverse of the rows since any query head looked, or of all its rows if none ever did."""

    def score(token):
        since = 0
        for row in zip(*token, strict=True):
            since = 0 if max(row) >= alpha else since + 1
        return 1 / (1 + since)

    return score


def least_frequent(token):
    return mean([sum(member) for member in token])


def keep(score, budget, num_sinks, num_recent):
    def decide(head):
        number = len(head.position)
        if number <= budget:
            return None
        scores = [score(token) for token in head.received]
        always = {j for j in range(number) if j < num_sinks or j >= number - num_recent}
        chosen = best(scores, budget, always)
        return chosen + best(scores, budget - len(chosen), set(range(number)) - always)

    return decide


@each_library
@pytest.mark.parametrize(("num_sinks", "num_recent", "block_size"), [(0, 0, 64), (1, 3, 7)])
@pytest.mark.parametrize(
    ("policy", "score"),
    [(LRA(budget=9, alpha=0.1), least_recent(0.1)), (LFA(budget=9), least_frequent)],
    ids=["lra", "lfa"],
)
def test_every_decode_step_equals_a_simulation(backend, policy, score, num_sinks, num_recent, block_size):
    options = {"num_sinks": num_sinks, "num_recent": num_recent, "block_size": block_size}
    policy = type(policy)(**{**vars(policy), **options})
    expected = simulate(KEYS[0].tolist(), QUERIES[0].tolist(), 14, keep(score, 9, num_sinks, num_recent))

    steps = decode(policy, KEYS, QUERIES, 14, backend)

    assert [stored[0].tolist() for _, stored in steps] == expected
    assert len(expected) == 27


def test_they_keep_different_tokens():
    policies = [LRA(budget=9, alpha=0.1), LRA(budget=9, alpha=0.3), LFA(budget=9), LFA(budget=9, num_recent=4)]
    found = [decode(policy, KEYS, QUERIES, 14, NUMPY)[-1][1].tolist() for policy in policies]

    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_lfa_is_h2o_without_recents():
    ours = decode(LFA(budget=9), KEYS, QUERIES, 14, NUMPY)
    theirs = decode(H2O(budget=9, num_recent=0), KEYS, QUERIES, 14, NUMPY)

    for (done, stored), (other, expected) in zip(ours, theirs, strict=True):
        assert stored.tolist() == expected.tolist()
        np.testing.assert_allclose(done.importance, other.importance, rtol=1e-12)


def test_equal_numbers_go_to_the_lower_position():
    done = evict(LRA(budget=3, alpha=0.1), np.ones((1, 1, 6, 2)), attention=np.full((1, 1, 6, 6), 0.2))

    assert done.importance.tolist() == [[[1] * 6]]
    assert done.kept.tolist() == [[[0, 1, 2]]]


def test_padding_is_no_query():
    rows = np.zeros((1, 1, 4, 4))
    rows[0, 0, [0, 2, 3], [0, 2, 3]] = 1

    done = evict(
        LRA(budget=2, alpha=0.1),
        np.ones((1, 1, 4, 2)),
        attention=rows,
        valid=np.asarray([[True, False, True, True]]),
    )

    assert done.importance[0, 0, [0, 2, 3]].tolist() == pytest.approx([1 / 3, 1 / 2, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LRA(budget=9, alpha=0.0), ArgumentError, "alpha must be above 0; got 0"),
        (lambda: LRA(budget=9, alpha="all"), ArgumentTypeError, "alpha"),
        (lambda: LRA(budget=9, num_recent=-1), ArgumentError, "num_recent must be at least 0"),
        (lambda: LFA(budget=9, block_size=0), ArgumentError, "block_size must be at least 1"),
    ],
)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [LRA, LFA])
def test_what_is_missing_is_named(kind):
    with pytest.raises(ArgumentError, match=f"queries must hold all 40 new positions for {kind.__name__}; got none"):
        evict(kind(budget=9), KEYS)
