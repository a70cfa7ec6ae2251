"""LagKV against loops, and what parts, ranks and the window are for."""

from math import exp, sqrt

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, Decay, GraphKV, LagKV, evict
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(29)
KEYS = RNG.normal(size=(2, 2, 25, 3))
VALUES = RNG.normal(size=(2, 2, 25, 4))


def part_by_loops(part, after):
    """Equations (7) to (10): part and after are lists of tokens, each a list of channels."""
    low = [min(channel) for channel in zip(*after, strict=True)]
    high = [max(channel) for channel in zip(*after, strict=True)]
    deviations = []
    for token in part:
        scaled = [(x - a) / (b - a) if b > a else 0.0 for x, a, b in zip(token, low, high, strict=True)]
        middle = sum(scaled) / len(scaled)
        deviations.append(sqrt(sum((x - middle) ** 2 for x in scaled) / max(len(scaled) - 1, 1)))
    weights = [exp(x) for x in deviations]
    return [x / sum(weights) for x in weights]


def by_loops(keys, values, sinks, lag, across):
    """Scores of one head's tokens; None for those that have no next part to be compared with."""
    number = len(keys)
    result = [None] * number
    for part in range((number - sinks) // lag - 1):
        start = sinks + part * lag
        total = [
            k + v
            for k, v in zip(
                *(
                    part_by_loops(states[start : start + lag], states[start + lag : start + 2 * lag])
                    for states in (keys, values)
                ),
                strict=True,
            )
        ]
        best = sorted(range(lag), key=lambda j, total=total: (-total[j], j))
        for place in range(lag):
            result[start + place] = total[place] if across else (lag - 1 - best.index(place)) / lag
    return result


@each_library
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("sinks", "lag"), [(0, 4), (2, 5), (3, 11), (4, 1), (5, 30)])
def test_importance_equals_loops(backend, sinks, lag, across):
    valid = np.arange(25) >= np.asarray([[0], [6]])

    done = evict(
        LagKV(budget=9, lag=lag, num_sinks=sinks, across=across),
        make(backend, KEYS, np.float64),
        values=make(backend, VALUES, np.float64),
        valid=make(backend, valid, bool),
        backend=backend,
    )

    importance = backend.to_numpy(done.importance)
    for row, pads in enumerate((0, 6)):
        for head in range(2):
            found = importance[row, head, pads:]
            expected = by_loops(KEYS[row, head, pads:].tolist(), VALUES[row, head, pads:].tolist(), sinks, lag, across)
            is_scored = np.asarray([x is not None for x in expected])
            np.testing.assert_allclose(found[is_scored], [x for x in expected if x is not None], rtol=1e-12, atol=1e-15)
            assert is_scored.sum() == max(0, (25 - pads - sinks) // lag - 1) * lag
            assert (found[:sinks] == 4).all()
            # Everything else is the window, the newest first.
            window = found[sinks:][~is_scored[sinks:]]
            assert ((window > 2) & (window <= 3)).all()
            assert (np.diff(window) > 0).all()


@each_library
def test_every_part_keeps_as_many_and_the_first_ones_one_more(backend):
    """2 sinks, parts 2-6, 7-11, 12-16 and the window 17-24, of which 5 are its own and 3 are left over."""
    kept = [
        backend.to_numpy(
            evict(
                LagKV(budget=budget, lag=5, num_sinks=2),
                make(backend, KEYS),
                values=make(backend, VALUES),
                backend=backend,
            ).kept
        )
        for budget in (10, 13, 14, 15, 20)
    ]

    edges = [2, 7, 12, 17]
    counts = [np.diff(np.searchsorted(each[1, 0], edges)).tolist() for each in kept]
    assert counts == [[0, 0, 0], [1, 1, 1], [2, 1, 1], [2, 2, 1], [4, 3, 3]]
    assert all({0, 1, *range(17, 25)} <= set(each[1, 0].tolist()) for each in kept)


def test_a_short_row_keeps_its_sinks_and_its_newest_tokens():
    done = evict(LagKV(budget=9, lag=12, num_sinks=2), KEYS, values=VALUES)

    assert done.kept[0, 0].tolist() == [0, 1, *range(18, 25)]
    done = evict(LagKV(budget=15, lag=12, num_sinks=2), KEYS, values=VALUES)
    assert done.kept[0, 0].tolist() == [0, 1, *range(12, 25)]


@each_library
def test_a_constant_channel_of_the_next_part_is_left_out(backend):
    keys, values = KEYS.copy(), VALUES.copy()
    keys[:, :, 10:15, 1] = 7.0

    done = evict(
        LagKV(budget=9, lag=5, num_sinks=0, across=True),
        make(backend, keys, np.float64),
        values=make(backend, values, np.float64),
        backend=backend,
    )

    expected = by_loops(keys[1, 1].tolist(), values[1, 1].tolist(), 0, 5, True)
    np.testing.assert_allclose(backend.to_numpy(done.importance)[1, 1, :20], expected[:20], rtol=1e-12)


def test_what_is_in_the_padding_does_not_matter():
    valid = np.arange(25) >= np.asarray([[0], [6]])
    keys, values = KEYS.copy(), VALUES.copy()
    keys[1, :, :6], values[1, :, :6] = np.nan, np.inf
    policy = LagKV(budget=10, lag=4, num_sinks=1)

    together = evict(policy, keys, values=values, valid=valid)
    alone = evict(policy, KEYS[1:, :, 6:], values=VALUES[1:, :, 6:])

    np.testing.assert_array_equal(together.kept[1:] - 6, alone.kept)
    np.testing.assert_allclose(together.scores[1:, :, 6:], alone.scores, rtol=1e-12)


def test_a_graph_on_top_lowers_neighbors():
    done = evict(GraphKV(LagKV(budget=12, lag=4, num_sinks=1), Decay(neighbors=2)), KEYS, values=VALUES)

    assert (done.scores <= done.importance).all()
    assert (done.scores < done.importance).any()


def test_options_are_checked():
    assert LagKV.official(0.5) == LagKV(budget=0.5, num_sinks=16, lag=1024)
    assert LagKV(budget=9, num_sinks=2, lag=3).protection(9).count == 5
    with pytest.raises(ArgumentError, match="lag must be at least 1; got 0"):
        LagKV(budget=9, lag=0)
    with pytest.raises(ArgumentTypeError, match="across must be True or False; got 1"):
        LagKV(budget=9, across=1)
    with pytest.raises(ArgumentError, match="values must be given for LagKV; got None"):
        evict(LagKV(budget=9), KEYS)
