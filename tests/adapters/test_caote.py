"""CAOTE against the change of an attention output, found by removing tokens."""

from dataclasses import dataclass

import numpy as np
import pytest

from graphkv import CAOTE, H2O, ArgumentError, ArgumentTypeError, GraphKV, Policy, SnapKV, evict
from graphkv.adapters.attention import last_rows
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(17)
KEYS, VALUES = 2 * RNG.normal(size=(2, 2, 15, 4)), RNG.normal(size=(2, 2, 15, 3))
QUERIES = 2 * RNG.normal(size=(2, 6, 15, 4))
VALID = np.arange(15) >= np.asarray([0, 4])[:, None]


@dataclass(frozen=True, kw_only=True)
class LastRow(Policy):
    """The last query's attention, as it is; nothing is protected."""

    def score(self, layer, memory):
        return layer.xp.mean(last_rows(layer, 1)[:, :, :, 0, :], axis=2)


def run(policy, backend, **change):
    arrays = {"values": VALUES, "queries": QUERIES, **change}
    arrays = {name: make(backend, x, np.float64) for name, x in arrays.items() if x is not None}
    return evict(policy, make(backend, KEYS, np.float64), valid=make(backend, VALID, bool), backend=backend, **arrays)


def without(alpha, values, gone):
    """The output when some tokens are gone and the others share their attention."""
    left = [j for j in range(len(alpha)) if j not in gone]
    total = sum(alpha[j] for j in left)
    return [sum(alpha[j] / total * values[j][d] for j in left) for d in range(len(values[0]))]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


@each_library
@pytest.mark.parametrize("base", [LastRow(budget=6), SnapKV(budget=6, window=2, kernel_size=3), H2O(budget=6)])
def test_the_score_is_the_exact_change_of_the_output(backend, base):
    importance = np.array(backend.to_numpy(run(base, backend).importance))
    found = run(CAOTE(base), backend)
    scores, protected = backend.to_numpy(found.scores), found.protected
    protected = np.zeros_like(VALUES[..., 0], bool) if protected is None else backend.to_numpy(protected)

    for row in np.ndindex(2, 2):
        open_tokens = [j for j in range(15) if VALID[row[0], j] and not protected[row][j]]
        alpha = [importance[row][j] / sum(importance[row][i] for i in open_tokens) for j in open_tokens]
        values = [VALUES[row][j].tolist() for j in open_tokens]
        whole = without(alpha, values, ())
        changes = [distance(whole, without(alpha, values, (place,))) for place in range(len(open_tokens))]
        np.testing.assert_allclose(scores[row][open_tokens], changes, rtol=1e-10)
        # The removal that the score recommends is the least harmful one.
        assert np.argmin(scores[row][open_tokens]) == np.argmin(changes)
        np.testing.assert_array_equal(scores[row][protected[row]], importance[row][protected[row]])


@each_library
def test_fast_measures_from_the_mean_value(backend):
    importance = np.array(backend.to_numpy(run(LastRow(budget=6), backend).importance))
    scores = backend.to_numpy(run(CAOTE(LastRow(budget=6), fast=True), backend).scores)

    for row in np.ndindex(2, 2):
        tokens = np.flatnonzero(VALID[row[0]])
        middle = VALUES[row][tokens].mean(axis=0)
        expected = [a / (1 - a) * distance(middle, VALUES[row][j]) for j, a in enumerate(importance[row])]
        np.testing.assert_allclose(scores[row][tokens], np.asarray(expected)[tokens], rtol=1e-10)
    assert not np.allclose(scores[0], backend.to_numpy(run(CAOTE(LastRow(budget=6)), backend).scores)[0])


@each_library
def test_values_change_what_the_base_keeps_and_only_then(backend):
    base = LastRow(budget=6)
    alone, weighed = (backend.to_numpy(run(policy, backend).kept) for policy in (base, CAOTE(base)))

    assert (alone != weighed).any()
    # Equal values: no removal changes anything.
    equal = run(CAOTE(base), backend, values=np.zeros_like(VALUES))
    assert backend.to_numpy(equal.scores).max() == 0


@each_library
def test_one_token_with_all_the_attention_has_a_finite_score(backend):
    rows = np.zeros((1, 1, 1, 4))
    rows[..., 2] = 1

    decision = evict(
        CAOTE(LastRow(budget=2)),
        make(backend, np.ones((1, 1, 4, 2))),
        values=make(backend, np.arange(4.0)[None, None, :, None]),
        attention=make(backend, rows),
        backend=backend,
    )

    # x is its value, so nothing changes in the limit either: all scores are 0, and the lower positions stay.
    assert backend.to_numpy(decision.scores).tolist() == [[[0, 0, 0, 0]]]
    assert backend.to_numpy(decision.kept).tolist() == [[[0, 1]]]


@each_library
def test_the_remaining_attention_is_taken_as_at_least_a_millionth(backend):
    rows = np.asarray([[[[1.0, 1e-30]]]])

    found = evict(
        CAOTE(LastRow(budget=1), fast=True),
        make(backend, np.ones((1, 1, 2, 2)), np.float64),
        values=make(backend, [[[[0.0], [2.0]]]], np.float64),
        attention=make(backend, rows, np.float64),
        backend=backend,
    )

    # alpha is 1, the mean value 1 away.
    np.testing.assert_allclose(backend.to_numpy(found.scores)[0, 0, 0], 1e6)


def test_negative_and_nan_scores_are_no_attention_and_padding_may_hold_anything():
    @dataclass(frozen=True, kw_only=True)
    class Given(Policy):
        def score(self, layer, memory):
            return layer.keys[..., 0]

    keys = np.asarray([[[[np.nan], [3.0], [-5.0], [1.0], [np.nan]]]])
    values = np.asarray([[[[np.nan], [1.0], [7.0], [5.0], [9.0]]]])
    decision = evict(CAOTE(Given(budget=2)), keys, values=values, valid=np.asarray([[False, True, True, True, True]]))

    # alpha .75 and .25, x = 2: 3 * 1 and 1 / 3 * 3.
    np.testing.assert_allclose(decision.scores[0, 0, 1:], [3, 0, 1, 0])
    assert decision.kept.tolist() == [[[1, 3]]]


def test_graphs_above_and_below():
    base = SnapKV(budget=6, window=2, kernel_size=1)
    above = run(GraphKV(CAOTE(base)), NUMPY)
    below = run(CAOTE(GraphKV(base)), NUMPY)

    assert above.graph.num_neighbors == below.graph.num_neighbors == 2
    assert not np.array_equal(above.scores, below.scores)
    plain = run(CAOTE(base), NUMPY)
    np.testing.assert_array_equal(above.importance, plain.importance)
    assert (above.scores <= plain.scores).all()
    assert (above.scores < plain.scores).any()


def test_scores_of_a_wrapper_are_those_of_its_decision():
    found = evict(CAOTE(CAOTE(LastRow(budget=6))), KEYS, values=VALUES, queries=QUERIES)

    assert found.importance is not None
    np.testing.assert_array_equal(found.importance, found.scores)


def test_caote_says_what_is_wrong():
    with pytest.raises(ArgumentError, match="values must be given for CAOTE"):
        evict(CAOTE(LastRow(budget=6)), KEYS, queries=QUERIES)
    with pytest.raises(ArgumentTypeError, match="fast must be True or False"):
        CAOTE(LastRow(budget=6), fast=1)
    with pytest.raises(ArgumentTypeError, match="base must be a Policy"):
        CAOTE("h2o")
