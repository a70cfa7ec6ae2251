"""TOVA against a loop."""

from math import exp, sqrt

import numpy as np
import pytest

from graphkv import TOVA, ArgumentError, ArgumentTypeError, Decay, GraphKV, evict
from tests.support.arrays import each_backend, make

RNG = np.random.default_rng(8)
KEYS = RNG.normal(size=(2, 2, 14, 4))
QUERIES = RNG.normal(size=(2, 6, 3, 4))


def tova_by_loops(keys, queries):
    """Mean attention of the last query; keys (H, N, D), queries (G H, Q, D)."""
    groups, tokens = len(queries) // len(keys), len(keys[0])
    total = [0.0] * tokens
    for head, rows in enumerate(queries):
        own = keys[head // groups]
        weights = [exp(sum(a * b for a, b in zip(rows[-1], key, strict=True)) / sqrt(len(key))) for key in own]
        for token in range(tokens):
            total[token] += weights[token] / sum(weights) / len(queries)
    return total


@each_backend
def test_importance_is_the_mean_over_all_query_heads(backend):
    done = evict(
        TOVA(budget=5), make(backend, KEYS, np.float64), queries=make(backend, QUERIES, np.float64), backend=backend
    )

    expected = [[tova_by_loops(KEYS[row].tolist(), QUERIES[row].tolist())] * 2 for row in range(2)]
    np.testing.assert_allclose(backend.to_numpy(done.importance), expected, rtol=1e-12)
    kept = backend.to_numpy(done.kept)
    assert kept[:, 0].tolist() == kept[:, 1].tolist()
    assert kept[0, 0].tolist() != kept[1, 0].tolist()


@each_backend
def test_the_newest_token_is_kept_unless_it_competes_as_in_the_official_code(backend):
    rows = np.asarray([[[[0.3, 0.1, 0.4, 0.2, 0.0]]]])
    keys = make(backend, np.ones((1, 1, 5, 2)))

    def kept(policy):
        done = evict(policy, keys, attention=make(backend, rows), backend=backend)
        return backend.to_numpy(done.kept).tolist()

    assert kept(TOVA(budget=2)) == [[[2, 4]]]
    assert kept(TOVA(budget=1)) == [[[4]]]
    assert kept(TOVA.official(2)) == [[[0, 2]]]
    assert TOVA.official(2) == TOVA(budget=2, protect_newest=False) != TOVA(budget=2)


@each_backend
def test_equal_attention_goes_by_position(backend):
    rows = make(backend, np.asarray([[[[0.1, 0.2, 0.2, 0.2, 0.3]], [[0.1, 0.2, 0.2, 0.2, 0.3]]]]))
    done = evict(TOVA(budget=3), make(backend, np.ones((1, 1, 5, 2))), attention=rows, backend=backend)

    assert backend.to_numpy(done.kept).tolist() == [[[1, 2, 4]]]


def test_only_the_last_row_of_the_attention_counts():
    rows = np.random.default_rng(0).random((1, 2, 3, 5))
    one = evict(TOVA(budget=3), np.ones((1, 1, 5, 2)), attention=rows).scores
    other = evict(TOVA(budget=3), np.ones((1, 1, 5, 2)), attention=rows[:, :, 2:]).scores

    assert one.tolist() == other.tolist()


def test_under_a_graph_the_heads_may_part():
    kept = evict(GraphKV(TOVA(budget=8), Decay(neighbors=4)), KEYS, queries=QUERIES).kept

    assert kept[:, 0].tolist() != kept[:, 1].tolist()


def test_missing_queries_and_wrong_options_are_named():
    with pytest.raises(ArgumentError, match="queries must hold the last position for TOVA; got none"):
        evict(TOVA(budget=3), KEYS)
    with pytest.raises(ArgumentTypeError, match="protect_newest"):
        TOVA(budget=3, protect_newest=1)
