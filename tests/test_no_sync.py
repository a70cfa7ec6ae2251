"""Values are never read on the host: a whole pass over arrays that have none, on torch's meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphkv import (
    Bar,
    Decay,
    Degree,
    Enhance,
    GraphKV,
    PageRank,
    Random,
    SnapKV,
    StreamingLLM,
    build_graph,
    degree,
    evict,
    fuse,
    pagerank,
    propagate,
    select,
)
from graphkv.core.backend import load
from graphkv.testing import label, variants
from tests.support import faults


def arrays():
    """Inputs without values: whoever reads one on the host, gets an error."""
    real = {"device": "meta", "dtype": torch.float32}
    return {
        "keys": torch.zeros((2, 3, 40, 8), **real),
        "queries": torch.zeros((2, 6, 40, 8), **real),
        "importance": torch.zeros((2, 3, 40), **real),
        "valid": torch.ones((2, 3, 40), device="meta", dtype=torch.bool),
        "protected": torch.zeros((2, 3, 40), device="meta", dtype=torch.bool),
    }


def run_without_values(backend, *, signal="decay", accumulation="product", chunk_size=None):
    """Run the three steps and `evict`. Gives every array that came out, by name."""
    x = arrays()
    found = {}
    graph = build_graph(
        x["keys"],
        x["importance"],
        num_sources=5,
        num_neighbors=4,
        valid=x["valid"],
        chunk_size=chunk_size,
        backend=backend,
    )
    found |= {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    found.pop("num_tokens")
    found["scores"] = propagate(x["importance"], graph, signal=signal, accumulation=accumulation, backend=backend)
    found["kept"] = select(found["scores"], 7, protected=x["protected"], valid=x["valid"], backend=backend)
    kind = Bar() if signal == "evict" else {"decay": Decay, "enhance": Enhance}[signal](accumulation=accumulation)
    for policy in (
        GraphKV(SnapKV(budget=20, window=4, num_sinks=2), kind),
        GraphKV(StreamingLLM(budget=20)),
        GraphKV(Random(budget=20), Decay(neighbors=1, recompute_sources=True, rounds=2)),
    ):
        eviction = evict(policy, x["keys"], queries=x["queries"], valid=x["valid"][:, 0], backend=backend)
        found[f"{type(policy.base).__name__} kept"] = eviction.kept
        found[f"{type(policy.base).__name__} gathered"] = eviction.apply(x["keys"])
    return found


@pytest.mark.parametrize("chunk_size", [None, 1, 16])
@pytest.mark.parametrize("accumulation", ["product", "sum"])
@pytest.mark.parametrize("signal", ["decay", "enhance", "evict"])
@pytest.mark.parametrize("subject", variants(load("torch")), ids=label)
def test_torch_reads_no_value_on_the_host(subject, signal, accumulation, chunk_size):
    found = run_without_values(subject, signal=signal, accumulation=accumulation, chunk_size=chunk_size)

    shapes = {name: (tuple(x.shape), str(x.dtype), x.device.type) for name, x in found.items()}
    assert shapes == {
        "sources": ((2, 3, 5), "torch.int64", "meta"),
        "neighbors": ((2, 3, 5, 4), "torch.int64", "meta"),
        "weights": ((2, 3, 5, 4), "torch.float32", "meta"),
        "scores": ((2, 3, 40), "torch.float32", "meta"),
        "kept": ((2, 3, 7), "torch.int64", "meta"),
    } | {
        f"{policy} {what}": (shape, dtype, "meta")
        for policy in ("SnapKV", "StreamingLLM", "Random")
        for what, shape, dtype in (
            ("kept", (2, 3, 20), "torch.int64"),
            ("gathered", (2, 3, 20, 8), "torch.float32"),
        )
    }


@pytest.mark.parametrize("fusion", ["power", "max_rank", "mean_rank"])
@pytest.mark.parametrize("subject", variants(load("torch")), ids=label)
def test_the_degree_signal_reads_no_value_on_the_host(subject, fusion):
    x = arrays()

    degrees = degree(x["keys"], valid=x["valid"], backend=subject)
    scores = fuse(x["importance"], degrees, fusion=fusion, valid=x["valid"], backend=subject)
    policy = GraphKV(SnapKV(budget=20, window=4, num_sinks=2), Degree(fusion=fusion))
    found = evict(policy, x["keys"], queries=x["queries"], valid=x["valid"][:, 0], backend=subject)

    for result, shape in ((degrees, (2, 3, 40)), (scores, (2, 3, 40)), (found.kept, (2, 3, 20))):
        assert (tuple(result.shape), result.device.type) == (shape, "meta")


@pytest.mark.parametrize("subject", variants(load("torch")), ids=label)
def test_pagerank_reads_no_value_on_the_host(subject):
    x = arrays()

    scores = pagerank(x["importance"], x["keys"], valid=x["valid"], backend=subject)
    policy = GraphKV(SnapKV(budget=20, window=4, num_sinks=2), PageRank())
    found = evict(policy, x["keys"], queries=x["queries"], valid=x["valid"][:, 0], backend=subject)

    for result, shape in ((scores, (2, 3, 40)), (found.kept, (2, 3, 20))):
        assert (tuple(result.shape), result.device.type) == (shape, "meta")


def test_a_hidden_synchronisation_is_caught():
    wrong = faults.replaced(load("torch"), select=faults.synchronising)

    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run_without_values(wrong)
