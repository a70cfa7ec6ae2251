"""No step of graphkv waits for the device, and the log that says so can tell: mistakes are planted, and found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cupy as cp
import numpy as np
import pytest
import standin

from graphkv import (
    Bar,
    Decay,
    Enhance,
    GraphKV,
    Random,
    SnapKV,
    StreamingLLM,
    build_graph,
    degree,
    evict,
    fuse,
    propagate,
    select,
)
from graphkv.core import primitives
from graphkv.core.backend import load
from tests.support.policies import every_policy

CUPY = load("cupy")
PORTABLE = replace(CUPY, top_k=None, segment_product=None, segment_sum=None)

POLICIES = {
    "snapkv": SnapKV(budget=12, window=4, num_sinks=1),
    "snapkv-max": SnapKV(budget=12, window=4, pooling="max", group_reduction="max"),
    "streaming": StreamingLLM(budget=9),
    "random": Random(budget=9),
    "graphkv": GraphKV(SnapKV(budget=12, window=4)),
    "graphkv-rounds": GraphKV(Random(budget=12), Decay(neighbors=1, rounds=3, strength=0.5)),
    "graphkv-recompute": GraphKV(StreamingLLM(budget=12), Decay(neighbors=1, rounds=2, recompute_sources=True)),
    "graphkv-enhance": GraphKV(SnapKV(budget=12, window=4), Enhance(neighbors=1, accumulation="sum")),
    "graphkv-evict": GraphKV(SnapKV(budget=12, window=4), Bar(neighbors=1)),
    "everything fits": StreamingLLM(budget=99),
    **every_policy(9),
}


def layer():
    random = np.random.default_rng(1)
    shapes = ((2, 2, 30, 4), (2, 4, 30, 4))
    keys, queries = (cp.asarray(random.normal(size=shape).astype(np.float32)) for shape in shapes)
    return keys, queries, cp.asarray(random.uniform(size=(2, 30)) < 0.9)


@pytest.mark.parametrize("form", [CUPY, PORTABLE], ids=["cupy", "portable"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_waits(policy, form):
    keys, queries, valid = layer()
    standin.SYNCS.clear()

    given = {"values": keys, "queries": queries, "probes": queries, "valid": valid}
    found = evict(policy, keys, **given, layer=1, num_layers=4, backend=form)
    found.apply(keys)

    assert standin.SYNCS == []
    # A head may take what both have, unless the budget is found: then it is the most that any takes.
    takes_more = found.counts is not None and not policy.requirements.automatic
    width = 2 * found.budget if takes_more else found.budget
    assert found.kept.shape[-1] == min(width, 30)


def run_steps(backend=CUPY):
    keys, _, _ = layer()
    importance = keys[..., 0]
    mask = importance > 0
    graph = build_graph(keys, importance, num_sources=5, num_neighbors=3, chunk_size=8, valid=mask, backend=backend)
    scores = propagate(importance, graph, rounds=2, backend=backend)
    return select(scores, 9, protected=mask, valid=~mask, backend=backend)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_no_step_waits(dtype):
    keys = layer()[0].astype(dtype)
    standin.SYNCS.clear()

    graph = build_graph(keys, keys[..., 0], num_sources=5, num_neighbors=3)
    scores = propagate(keys[..., 0], graph, signal="decay")
    for fusion in ("power", "max_rank", "mean_rank"):
        scores = fuse(scores, degree(keys), fusion=fusion)
    select(scores, 9)

    assert standin.SYNCS == []


def ends_on_the_host(scores, k, tiers, /, *, backend):
    found = primitives.portable_top_k(scores, k, tiers, backend=backend)
    cp.max(found).item() if found.size else None
    return found


def masks(scores, k, tiers, /, *, backend):
    scores[backend.xp.isnan(scores)] = -backend.xp.inf
    return primitives.portable_top_k(scores, k, tiers, backend=backend)


def multiplies_at(values, index, num_segments, /, *, backend):
    result = backend.xp.ones((*values.shape[:-1], num_segments), dtype=values.dtype)
    cp.multiply.at(result, index, values)
    return result


def sorts_as_the_standard_does(scores, k, tiers, /, *, backend):
    return cp.argsort(-scores, axis=-1, stable=True)[..., :k]


def trusts_a_partition(scores, k, tiers, /, *, backend):
    order = cp.argpartition(-scores, k - 1, axis=-1)[..., :k]
    return cp.sort(order, axis=-1)


def takes_a_host_array(scores, k, tiers, /, *, backend):
    scores = scores + np.zeros(scores.shape, dtype=np.float32)
    return primitives.portable_top_k(scores, k, tiers, backend=backend)


def test_a_planted_wait_is_found():
    standin.SYNCS.clear()
    run_steps(replace(CUPY, top_k=ends_on_the_host))

    assert "item" in standin.SYNCS


def test_a_planted_boolean_index_is_found():
    standin.SYNCS.clear()
    run_steps(replace(CUPY, top_k=masks))

    assert "boolean index" in standin.SYNCS


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ({"segment_product": multiplies_at}, NotImplementedError),
        ({"top_k": sorts_as_the_standard_does}, TypeError),
        ({"top_k": takes_a_host_array}, TypeError),
    ],
    ids=["multiply.at", "argsort(stable=)", "a host array"],
)
def test_a_planted_call_that_cupy_lacks_is_found(mistake, error):
    with pytest.raises(error):
        run_steps(replace(CUPY, **mistake))


def test_a_planted_unstable_selection_is_found():
    ties = cp.zeros((4, 64), dtype=cp.float32)
    expected = [list(range(8))] * 4

    assert select(ties, 8).tolist() == expected
    assert select(ties, 8, backend=replace(CUPY, top_k=trusts_a_partition)).tolist() != expected


def test_a_planted_key_of_floats_is_found():
    """The scores of packed keys are read as integers, because kernels flush subnormal numbers."""
    flushed = partial(
        primitives.packed_top_k,
        bits=lambda x: (x + 0.0).view(cp.int32),
        smallest=lambda keys, k: cp.sort(keys, axis=-1)[..., :k],
    )
    scores = cp.asarray(np.asarray([0.0, 1e-40, 2e-40], dtype=np.float32))

    assert select(scores, 1).tolist() == [2]
    assert select(scores, 1, backend=replace(CUPY, top_k=flushed)).tolist() != [2]
