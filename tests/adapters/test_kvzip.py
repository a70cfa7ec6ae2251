"""KVzip against loops over the formula of its public code, and what the choices do."""

import numpy as np
import pytest

from graphkv import AdaKV, ArgumentError, GraphKV, KVzip, Probe, evict
from tests.core.test_asking import in_library, most_by_loops, of_row
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(31)
KEYS = RNG.normal(size=(2, 2, 12, 4))
VALID = np.arange(12) >= np.asarray([[0], [3]])
HALVES = (np.arange(12) < 7, np.arange(12) >= 7)


def probes(count=2, **fields):
    made = []
    for number in range(count):
        queries, own = RNG.normal(size=(2, 4, 5, 4)) * 2, RNG.normal(size=(2, 2, 5, 4))
        about = np.broadcast_to(HALVES[number], (2, 2, 12))
        made.append(Probe(**{"queries": queries, "keys": own, "about": about, **fields}))
    return made


def by_loops(asked, row, num_sinks):
    """Its importance of one row: for each chunk the softmax over sinks, chunk and probe, then the maximum."""
    first = [j for j in range(12) if VALID[row, j]][:num_sinks]
    sinks = np.isin(np.arange(12), first)
    result = np.zeros((2, 12))
    for probe in asked:
        about = (np.ones((2, 12), bool) if probe.about is None else probe.about[row]) & VALID[row]
        found = most_by_loops(of_row(probe, row), KEYS[row], about | sinks, True)
        result = np.maximum(result, np.where(about, found, 0))
    return result


@each_library
@pytest.mark.parametrize("num_sinks", [0, 2])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_importance_equals_loops(backend, num_sinks, block_size):
    for asked in (probes(), probes(1, about=None), probes(1, keys=None), probes(2, valid=np.arange(5) < [[5], [3]])):
        policy = KVzip(budget=6, num_sinks=num_sinks, block_size=block_size)
        done = evict(
            policy,
            make(backend, KEYS, np.float64),
            valid=make(backend, VALID, bool),
            probes=[in_library(probe, backend) for probe in asked],
            backend=backend,
        )
        for row in range(2):
            np.testing.assert_allclose(
                backend.to_numpy(done.importance)[row], by_loops(asked, row, num_sinks), rtol=1e-12, atol=1e-15
            )


def test_sinks_take_their_share_of_every_softmax_and_stay():
    asked = probes()
    without, with_sinks = (evict(KVzip(budget=4, num_sinks=n), KEYS, probes=asked) for n in (0, 2))

    assert (with_sinks.importance[..., 7:] < without.importance[..., 7:]).all()
    np.testing.assert_array_equal(with_sinks.importance[..., :7], without.importance[..., :7])
    assert (with_sinks.kept[..., :2] == [0, 1]).all()


def test_what_nobody_asked_about_ranks_last_and_ties_by_index():
    asked = probes(1)
    done = evict(KVzip(budget=9), KEYS, probes=asked)

    assert (done.importance[..., 7:] == 0).all()
    assert (done.kept == np.arange(9)).all()


def test_the_highest_of_several_probes_counts():
    one, two = probes(1, about=None)[0], probes(1, about=None)[0]
    together = evict(KVzip(budget=4), KEYS, probes=[one, two]).importance
    alone = [evict(KVzip(budget=4), KEYS, probes=each).importance for each in (one, two)]

    np.testing.assert_array_equal(together, np.maximum(*alone))


@each_library
def test_heads_can_share_their_budget_and_a_graph_can_lower_neighbors(backend):
    asked = [in_library(probe, backend) for probe in probes()]
    keys, policy = make(backend, KEYS, np.float64), KVzip(budget=5)

    shared = evict(AdaKV(policy, floor=0.0), keys, probes=asked, backend=backend)
    graph = evict(GraphKV(policy), keys, probes=asked, backend=backend)

    importance = backend.to_numpy(shared.importance)
    for row, counts in enumerate(backend.to_numpy(shared.counts)):
        # The code's non-uniform budgets within a layer: what is above one threshold over all heads.
        threshold = np.sort(importance[row].ravel())[-10]
        assert counts.tolist() == (importance[row] >= threshold).sum(axis=-1).tolist()
    assert (backend.to_numpy(graph.scores) <= importance).all()


def test_options_are_checked():
    assert KVzip(budget=5).needs().probes
    assert AdaKV(KVzip(budget=5)).needs().probes
    assert KVzip(budget=5, num_sinks=3).protection(5).count == 3
    with pytest.raises(ArgumentError, match="block_size must be at least 1; got 0"):
        KVzip(budget=5, block_size=0)
    with pytest.raises(ArgumentError, match=r"probes must be given for AdaKV\(KVzip\); got None"):
        evict(AdaKV(KVzip(budget=5)), NUMPY.xp.asarray(KEYS))
