"""MLX: nothing is read before its user asks, transformations, and what its arrays do in place. On the CPU build."""

from __future__ import annotations

import numpy as np
import pytest

from graphkv import BackendUnavailableError, build_graph, degree, evict, fuse, pagerank, propagate, select
from graphkv.core.backend import load
from graphkv.testing.policies import shipped

try:
    load("mlx")
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

import mlx.core as mx

POLICIES = shipped(8)


def arrays():
    random = np.random.default_rng(0)
    keys, queries = random.normal(size=(2, 2, 24, 8)), random.normal(size=(2, 4, 24, 8))
    return mx.array(keys.astype(np.float32)), mx.array(queries.astype(np.float32))


def kept(policy, keys, queries):
    unrotated = {"unrotated_keys": keys} if policy.needs().unrotated_keys else {}
    return evict(policy, keys, values=keys, queries=queries, probes=queries, layer=1, num_layers=4, **unrotated).kept


# What is compiled has no values while it is traced: to read one raises. Nothing is run, which takes a C++ compiler.
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_no_policy_reads_a_value(policy):
    keys, queries = arrays()

    found = mx.compile(lambda keys, queries: kept(policy, keys, queries))(keys, queries)

    assert found.shape == kept(policy, keys, queries).shape


def test_what_is_traced_cannot_be_read():
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: x * x.item())(mx.array(3.0))


STEPS = {
    "build_graph": lambda x: build_graph(x, x[..., 0], num_sources=3, num_neighbors=2).weights,
    "degree": degree,
    "fuse": lambda x: fuse(x[..., 0], x[..., 1]),
    "pagerank": lambda x: pagerank(x[..., 0], x),
    "propagate": lambda x: propagate(x[..., 0], build_graph(x, x[..., 1], num_sources=3, num_neighbors=2)),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_step_has_gradients_and_a_zero_key_spoils_none(step):
    keys = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    keys[3] = 0

    slope = np.asarray(mx.grad(lambda x: step(x).sum())(mx.array(keys)))

    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 0
    np.testing.assert_array_equal(slope[3, 2:], 0)


def test_an_array_changed_after_the_call_does_not_change_its_result():
    scores = mx.array([1.0, 2.0, 3.0])
    found = select(scores, 1)

    scores[0] = 9.0

    assert found.tolist() == [2]


def test_subnormal_scores_keep_their_order():
    scores = np.asarray([1e-42, 2e-42, -1e-42, 0.0, 3e-45, np.nan, 1.0, -np.inf, 1e-38], dtype=np.float32)

    for budget in range(10):
        assert select(mx.array(scores), budget).tolist() == select(scores, budget).tolist()


def test_half_precision_is_widened_and_stays_where_it_is_handed_out():
    keys, queries = arrays()
    half = keys.astype(mx.bfloat16)

    done = evict(POLICIES["GraphKV(SnapKV), decay"], half, queries=queries.astype(mx.bfloat16))

    assert done.scores.dtype == mx.float32
    assert done.apply(half).dtype == mx.bfloat16


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="MLX has float64 on the CPU only")
def test_exponentials_of_float64_have_all_their_digits():
    x = np.linspace(-700, 700, 1001)

    found = load("mlx").xp.exp(mx.array(x, dtype=mx.float64))

    np.testing.assert_allclose(np.asarray(found), np.exp(x), rtol=1e-13)
