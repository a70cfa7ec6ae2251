"""JAX compiled as a whole gives what it gives call by call, and what NumPy gives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from graphkv import Eviction, Graph, build_graph, evict, propagate, select

from .test_agreement import POLICIES, assert_same_choice, layer

jax = pytest.importorskip("jax")


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_evict_under_jit_is_evict(policy):
    keys, queries, valid = layer()

    def kept_and_scores(keys, queries, valid):
        found = evict(policy, keys, queries=queries, valid=valid)
        return found.kept, found.scores

    kept, scores = jax.jit(kept_and_scores)(keys, queries, valid)

    expected = evict(policy, keys, queries=queries, valid=valid)
    assert_same_choice(np.asarray(kept), expected.kept, expected.scores)
    np.testing.assert_allclose(np.asarray(scores), expected.scores, rtol=1e-3, atol=1e-5)


def test_a_graph_and_an_eviction_go_in_and_out_of_jit():
    keys, _, _ = layer()
    importance = keys[..., 0] ** 2

    @jax.jit
    def build(keys, importance):
        return build_graph(keys, importance, num_sources=5, num_neighbors=3, chunk_size=16)

    graph = build(keys, importance)
    scores = jax.jit(propagate)(importance, graph)
    found = jax.jit(lambda keys: evict(POLICIES["streaming"], keys))(keys)

    expected = build_graph(keys, importance, num_sources=5, num_neighbors=3)
    assert isinstance(graph, Graph)
    assert graph.num_tokens == 60
    np.testing.assert_array_equal(graph.sources, expected.sources)
    np.testing.assert_array_equal(graph.neighbors, expected.neighbors)
    np.testing.assert_allclose(scores, propagate(importance, expected), rtol=1e-5)
    assert isinstance(found, Eviction)
    assert found.budget == 9
    assert found.apply(jax.numpy.asarray(keys)).shape == (2, 2, 9, 8)


def test_select_under_jit_takes_masks_and_batches_over_vmap():
    scores = np.asarray([[3.0, np.nan, -0.0, 0.0, 3.0], [1.0, 2.0, 2.0, np.inf, -np.inf]], dtype=np.float32)
    protected = np.asarray([[False, True, False, False, False], [False, False, False, False, True]])

    kept = jax.jit(lambda s, p: select(s, 3, protected=p))(scores, protected)
    row_by_row = jax.vmap(lambda s, p: select(s, 3, protected=p))(scores, protected)

    assert kept.tolist() == [[0, 1, 4], [1, 3, 4]]
    assert row_by_row.tolist() == kept.tolist()


def test_with_64_bits_indices_are_int64_and_float64_stays():
    code = """
        import jax, numpy as np, graphkv
        x = jax.numpy.asarray(np.asarray([0.0, 1e-300, -0.0, np.nan, 1e-300]))
        kept = graphkv.select(x, 2)
        graph = graphkv.build_graph(x[:, None] * 1e300, x, num_sources=1, num_neighbors=2)
        print(kept.dtype, kept.tolist(), graph.weights.dtype, graphkv.propagate(x, graph).dtype)
    """
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )

    assert done.stdout.split() == ["int64", "[1,", "4]", "float64", "float64"]
