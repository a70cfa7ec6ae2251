"""The sparse forms: the graph as a SciPy matrix, and propagation through compressed columns."""

from __future__ import annotations

import numpy as np
import pytest

from graphkv import Graph, build_graph, propagate
from graphkv.backends.numpy import SPARSE, to_csr


def graphs(dtype: str) -> tuple[np.ndarray, Graph]:
    random = np.random.default_rng(5)
    keys = random.normal(size=(2, 3, 80, 4)).astype(dtype)
    importance = random.normal(size=(2, 3, 80)).astype(dtype)
    return importance, build_graph(keys, importance, num_sources=12, num_neighbors=9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("signal", ["decay", "enhance", "evict"])
@pytest.mark.parametrize(("rounds", "accumulation"), [(1, "product"), (3, "product"), (1, "sum")])
def test_sparse_propagation_agrees_with_dense(dtype, signal, rounds, accumulation):
    importance, graph = graphs(dtype)
    options = {"signal": signal, "rounds": rounds, "accumulation": accumulation, "strength": 0.8}

    sparse = propagate(importance, graph, backend=SPARSE, **options)

    dense = propagate(importance, graph, **options)
    assert sparse.dtype == dense.dtype
    np.testing.assert_allclose(sparse, dense, rtol=1e-6 if dtype == "float32" else 1e-14)
    assert np.any(dense != importance)


def test_a_repeated_neighbor_is_two_edges_and_never_their_sum():
    graph = Graph(
        sources=np.asarray([0]), neighbors=np.asarray([[1, 1, 2]]), weights=np.asarray([[0.75, 0.5, 0.0]]), num_tokens=3
    )
    importance = np.asarray([4.0, 2.0, 1.0])

    sparse = propagate(importance, graph, backend=SPARSE)

    assert sparse.tolist() == [4.0, 2.0 * 0.25 * 0.5, 1.0]
    assert sparse.tolist() == propagate(importance, graph).tolist()
    assert to_csr(graph).data.tolist() == [0.75, 0.5]


def test_propagation_is_one_minus_the_columns_of_the_matrix():
    """What the matrix form says: each token's score times the product down its column."""
    importance, graph = graphs("float64")

    scores = propagate(np.abs(importance), graph)

    for row in np.ndindex(2, 3):
        columns = 1 - to_csr(graph, row).toarray()
        np.testing.assert_allclose(scores[row], np.abs(importance[row]) * np.prod(columns, axis=0), rtol=1e-12)


def test_the_matrix_holds_every_edge_once_with_its_weight():
    _, graph = graphs("float32")

    csr = to_csr(graph, (1, 2))

    assert csr.shape == (12, 80)
    assert csr.nnz == np.count_nonzero(graph.weights[1, 2])
    for source in range(12):
        for token, weight in zip(graph.neighbors[1, 2, source], graph.weights[1, 2, source], strict=True):
            assert csr[source, token] == weight


def test_a_graph_without_edges_is_an_empty_matrix():
    graph = build_graph(np.ones((3, 2)), np.ones(3), num_sources=2, num_neighbors=0)

    assert to_csr(graph).nnz == 0
    assert propagate(np.ones(3), graph, backend=SPARSE).tolist() == [1.0, 1.0, 1.0]
