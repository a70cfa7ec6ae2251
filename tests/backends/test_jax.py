"""JAX compiled as a whole gives what it gives call by call, and what NumPy gives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from graphkv import ArgumentTypeError, Eviction, Graph, build_graph, degree, evict, propagate, select
from graphkv.testing.policies import shipped
from tests.support.policies import every_policy

from .test_agreement import POLICIES, assert_same_choice, layer

jax = pytest.importorskip("jax")

from jax.extend.core import jaxprs_in_params  # noqa: E402


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


def test_subnormal_scores_keep_their_order_when_compiled():
    # Compiled comparisons take subnormal numbers for zero.
    scores = np.asarray([1e-42, 2e-42, -1e-42, 0.0, 3e-45, np.nan, 1.0, -np.inf, 1e-38], dtype=np.float32)
    x = jax.numpy.asarray(scores)
    masks = {"valid": np.arange(9) != 6, "protected": np.arange(9) == 2}

    for budget in range(10):
        for some in ({}, masks):
            found = jax.jit(lambda x, some, budget=budget: select(x, budget, **some))(x, some)
            np.testing.assert_array_equal(found, select(scores, budget, **some))


def test_scores_that_no_edge_reaches_keep_every_bit():
    scores = np.asarray([1e-42, 1.0, -1e-42, 3e-45, 0.0], dtype=np.float32)
    edge = {"sources": np.asarray([0]), "neighbors": np.asarray([[1]]), "weights": np.asarray([[0.5]], np.float32)}
    graph = Graph(**{name: jax.numpy.asarray(x) for name, x in edge.items()}, num_tokens=5)

    for signal in ("decay", "enhance", "evict"):
        found = np.asarray(propagate(jax.numpy.asarray(scores), graph, signal=signal))
        np.testing.assert_array_equal(np.delete(found, 1), np.delete(scores, 1))


def products(program):
    """Yield the precision of every product of a program, those of the programs in it too."""
    for step in program.eqns:
        if step.primitive.name == "dot_general":
            yield step.params["precision"]
        for inner in jaxprs_in_params(step.params):
            yield from products(inner)


# One of every adapter that has products of its own, and the signals.
PRODUCTS = ["snapkv", "rkv", "h2o", "expected-attention", "compactor", "sagekv", "graphkv-knorm", "pagerank-knorm"]


@pytest.mark.parametrize("name", [*PRODUCTS, "caote-snapkv", "absorb-snapkv"])
def test_products_are_in_full_precision_whatever_is_set(name):
    """On a GPU, JAX takes TF32 for float32 where nobody asks; only the program shows it on a CPU."""
    keys = queries = layer()[0]
    policy = every_policy(8)[name]
    with jax.default_matmul_precision("tensorfloat32"):
        program = jax.make_jaxpr(lambda k, q: evict(policy, k, values=k, queries=q).kept)(keys, queries)

    found = list(products(program.jaxpr))

    assert found
    assert {each for pair in found for each in pair} == {jax.lax.Precision.HIGHEST}


def test_no_axis_is_added_silently():
    random = np.random.default_rng(0)
    keys = jax.numpy.asarray(random.normal(size=(2, 2, 24, 8)).astype(np.float32))
    queries = jax.numpy.asarray(random.normal(size=(2, 4, 24, 8)).astype(np.float32))
    valid = jax.numpy.arange(24)[None] >= jax.numpy.asarray([[0], [3]])

    with jax.numpy_rank_promotion("raise"):
        # The policies of `test_on_every_library` run in this mode there.
        for policy in (each for each in shipped(8).values() if each.needs().unrotated_keys):
            evict(policy, keys, values=keys, queries=queries, unrotated_keys=keys, valid=valid, layer=1, num_layers=4)


def test_a_zero_key_has_no_gradient_and_spoils_none():
    keys = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    keys[3] = 0

    def weights(keys):
        return build_graph(keys, keys[:, 0], num_sources=3, num_neighbors=2).weights.sum()

    for function in (weights, lambda keys: degree(keys).sum()):
        slope = np.asarray(jax.grad(function)(jax.numpy.asarray(keys)))
        assert np.isfinite(slope).all()
        assert np.abs(slope).max() > 0
        np.testing.assert_array_equal(slope[3], 0)


def test_random_keys_are_no_scores():
    with pytest.raises(ArgumentTypeError, match="scores must be a dense array; got an array of random keys"):
        select(jax.random.split(jax.random.key(0), 3), 1)


SHARDED = """
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from graphkv import H2O, BackendError, Degree, GraphKV, KNorm, SnapKV, build_graph, degree, evict, propagate

assert len(jax.devices()) == 4
mesh = Mesh(np.asarray(jax.devices()), ("x",))
random = np.random.default_rng(0)
keys = random.normal(size=(4, 4, 21, 8)).astype("float32")
queries = random.normal(size=(4, 8, 21, 8)).astype("float32")
snapkv = SnapKV(budget=8, window=4)
for axes in (("x",), (None, "x"), (None, None, None, "x")):
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes))) for x in (keys, queries)]
    for policy in (snapkv, H2O(budget=8), GraphKV(snapkv, Degree()), KNorm(budget=40), GraphKV(KNorm(budget=8))):
        found = evict(policy, spread[0], queries=spread[1])
        np.testing.assert_array_equal(found.kept, evict(policy, keys, queries=queries).kept)
    np.testing.assert_allclose(degree(spread[0]), degree(keys), atol=1e-6)

first, second = jax.devices()[:2]
anywhere, scores = jax.numpy.asarray(keys), jax.numpy.asarray(keys[..., 0])
for there in (second, NamedSharding(mesh, PartitionSpec("x"))):
    # What was put nowhere is moved to the others, whichever comes first.
    for own, other in ((jax.device_put(anywhere, there), scores), (anywhere, jax.device_put(scores, there))):
        graph = build_graph(own, other, num_sources=2, num_neighbors=2)
        assert graph.weights.devices() == jax.device_put(scores, there).devices()
        assert propagate(scores, graph).devices() == graph.weights.devices()
    try:
        build_graph(jax.device_put(anywhere, there), jax.device_put(scores, first), num_sources=2, num_neighbors=2)
    except BackendError as error:
        assert str(error).startswith("importance must be on the device of keys, "), error
        assert str(error).endswith(f"; got {first}"), error
    else:
        raise AssertionError("nothing was refused")
print("done")
"""


@pytest.mark.slow
def test_arrays_that_are_spread_over_devices_are_evicted():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True, check=False
    )

    assert run.stdout == "done\n", run.stderr[-2000:]
