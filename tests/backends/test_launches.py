"""What a device would be asked to do, counted on torch's meta device, and the device's forms checked on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphkv import H2O, GraphKV, build_graph, evict
from graphkv.backends import streamed
from graphkv.backends import torch as backend_module
from graphkv.core import graph as graph_module
from graphkv.core.attention import portable_received_attention
from graphkv.core.backend import load

TORCH = load("torch")
PORTABLE = replace(TORCH, build_graph=None)
# They touch no element.
VIEWS = {
    "alias", "as_strided", "detach", "empty", "expand", "new_empty", "permute", "select", "slice", "split", "squeeze",
    "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Count operations, and measure the largest array that none of the inputs holds."""

    def __init__(self, *inputs):
        super().__init__()
        self.number, self.largest = 0, 0
        self.inputs = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.number += function.overloadpacket.__name__ not in VIEWS
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.inputs:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return found


def shapeless(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_sources"),
    [(1, 8_192, 150), (1, 32_768, 600), (1, 131_072, 1200), (8, 8_192, 150), (64, 4_096, 300)],
)
def test_a_graph_takes_few_launches_and_no_large_array(batch, num_tokens, num_sources):
    keys, importance = shapeless(batch, 8, num_tokens, 128), shapeless(batch, 8, num_tokens)
    counts = {}
    for backend in (TORCH, PORTABLE):
        with Launches(keys, importance) as seen:
            build_graph(keys, importance, num_sources=num_sources, num_neighbors=8, backend=backend)
        counts[backend] = seen.number
        assert seen.largest <= 256 * 2**20

    assert 50 < counts[TORCH] < 1000


@pytest.mark.parametrize("num_tokens", [8_192, 32_768])
def test_attention_of_a_whole_prompt_takes_few_launches(num_tokens):
    keys, queries = shapeless(1, 8, num_tokens, 128), shapeless(1, 32, num_tokens, 128)

    with Launches(keys, queries) as seen:
        evict(H2O(budget=512), keys, values=keys, queries=queries)

    assert 50 < seen.number < 1000
    assert seen.largest <= 640 * 2**20


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(backend_module, "_is_launched", lambda x: True)
    monkeypatch.setattr(streamed, "NARROWEST", 32)


@pytest.mark.parametrize("buffer_size", [1, 900, 20_000, 1 << 26])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_the_graph_of_a_device_is_the_graph(as_on_a_device, monkeypatch, buffer_size, chunk_size):
    monkeypatch.setattr(streamed, "DEVICE_BUFFER_SIZE", buffer_size)
    random = np.random.default_rng(buffer_size)
    keys = torch.from_numpy(random.choice([-1.0, 1.0], (2, 3, 333, 16)).astype(np.float32))
    importance = torch.from_numpy(random.normal(size=(2, 3, 333)).astype(np.float32))
    counts = {"num_sources": 9, "num_neighbors": 5, "chunk_size": chunk_size}

    found = build_graph(keys, importance, **counts, backend=TORCH)

    wanted = build_graph(keys, importance, **counts, backend=PORTABLE)
    for name in ("sources", "neighbors", "weights"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("largest", [1, 700, 5_000, 5 << 25])
@pytest.mark.parametrize("num_queries", [1, 70, 90])
def test_the_attention_of_a_device_is_the_attention(as_on_a_device, monkeypatch, largest, num_queries):
    monkeypatch.setattr(backend_module, "DEVICE_ATTENTION_SIZE", largest)
    make = torch.Generator().manual_seed(largest)
    keys, queries = torch.randn((2, 3, 90, 8), generator=make), torch.randn((2, 6, num_queries, 8), generator=make)
    valid = torch.rand((2, 3, 90), generator=make) < 0.8

    found = TORCH.received_attention(queries, keys, valid, block_size=16, backend=TORCH)

    wanted = portable_received_attention(queries, keys, valid, block_size=90, backend=TORCH)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("largest", [1, 3_000])
def test_rows_apart_are_rows_together(monkeypatch, largest):
    random = np.random.default_rng(2)
    # Of length 4, so that cosines are exact whichever product a library takes for so many rows.
    keys = torch.from_numpy(random.choice([-1.0, 1.0], (2, 3, 60, 16)).astype(np.float32))
    importance = torch.from_numpy(random.normal(size=(2, 3, 60)).astype(np.float32))
    valid = torch.from_numpy(random.random((2, 3, 60)) < 0.9)
    options = {"num_sources": 7, "num_neighbors": 5, "valid": valid, "backend": PORTABLE}
    together = build_graph(keys, importance, **options)
    monkeypatch.setattr(graph_module, "LARGEST", largest)

    apart = build_graph(keys, importance, **options)

    for name in ("sources", "neighbors", "weights"):
        assert torch.equal(getattr(apart, name), getattr(together, name))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_the_forms_of_a_device_compile(as_on_a_device):
    make = torch.Generator().manual_seed(1)
    keys, queries = torch.randn((1, 2, 40, 8), generator=make), torch.randn((1, 4, 40, 8), generator=make)
    policy = GraphKV(H2O(budget=12))

    def kept(keys, queries):
        return evict(policy, keys, values=keys, queries=queries).kept

    assert torch.equal(torch.compile(kept, backend="eager", fullgraph=True)(keys, queries), kept(keys, queries))
