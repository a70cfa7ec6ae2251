"""The method figure of the paper, from keys to the kept tokens."""

import numpy as np
import pytest

from graphkv import Graph, build_graph, propagate, select
from tests.support.arrays import each_backend, make

# Importance, cosines of tokens 0..6 to the two sources 3 and 6, and what the figure makes of them.
IMPORTANCE = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]
COSINES = {
    3: {0: 0.10, 1: 0.21, 2: 0.16, 4: 0.40, 5: 0.50},
    6: {0: 0.05, 1: 0.03, 2: 0.70, 4: 0.23, 5: 0.60},
}
SCORES = {
    "sum": [0.1, 0.6, 0.09, 1.2, 0.18, -0.07, 1.1],
    "product": [0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1],
}


def keys_with_those_cosines():
    """Sources are two axes; every other token has its cosines along them and the rest along an axis of its own."""
    keys = np.zeros((7, 7))
    keys[3, 3] = keys[6, 6] = 1
    for token in (0, 1, 2, 4, 5):
        keys[token, 3], keys[token, 6] = COSINES[3][token], COSINES[6][token]
        keys[token, token] = np.sqrt(1 - COSINES[3][token] ** 2 - COSINES[6][token] ** 2)
    # Cosines do not know about lengths.
    return keys * np.arange(1, 8)[:, None]


@pytest.fixture
def graph(request):
    backend = request.getfixturevalue("backend")
    keys, importance = make(backend, keys_with_those_cosines()), make(backend, IMPORTANCE)
    return build_graph(keys, importance, num_sources=2, num_neighbors=2, backend=backend)


@each_backend
def test_graph_has_the_active_edges_of_the_figure(backend, graph):
    assert backend.to_numpy(graph.sources).tolist() == [3, 6]
    assert backend.to_numpy(graph.neighbors).tolist() == [[5, 4], [2, 5]]
    np.testing.assert_allclose(backend.to_numpy(graph.weights), [[0.5, 0.4], [0.7, 0.6]], rtol=1e-6)


@each_backend
@pytest.mark.parametrize("accumulation", ["sum", "product"])
def test_scores_and_kept_tokens_are_those_of_the_figure(backend, graph, accumulation):
    scores = propagate(make(backend, IMPORTANCE), graph, accumulation=accumulation, backend=backend)

    np.testing.assert_allclose(backend.to_numpy(scores), SCORES[accumulation], rtol=1e-5, atol=1e-7)
    assert backend.to_numpy(select(scores, 3, backend=backend)).tolist() == [1, 3, 6]


@each_backend
def test_the_base_alone_keeps_the_near_duplicate(backend):
    assert backend.to_numpy(select(make(backend, IMPORTANCE), 3, backend=backend)).tolist() == [3, 5, 6]


@each_backend
def test_more_rounds_sharpen_the_product(backend, graph):
    scores = propagate(make(backend, IMPORTANCE), graph, rounds=2, backend=backend)

    np.testing.assert_allclose(backend.to_numpy(scores), [0.1, 0.6, 0.027, 1.2, 0.108, 0.028, 1.1], rtol=1e-5)


@each_backend
def test_a_graph_shows_its_shape(backend, graph):
    assert (graph.num_sources, graph.num_neighbors, graph.num_tokens) == (2, 2, 7)
    assert "(2, 2)" in repr(graph)
    assert isinstance(graph, Graph)
