"""Triton's kernels against torch's own forms, on the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from graphkv import BackendUnavailableError, build_graph
from tests.gpu.conftest import REHEARSAL, torch_device

pytestmark = pytest.mark.gpu

# In a rehearsal the kernels are interpreted, which takes seconds for what takes a device no time.
TOKENS = 200 if REHEARSAL else 20_000


@pytest.fixture(scope="module")
def forms():
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    try:
        torch_device()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    from graphkv.backends import torch, triton

    if REHEARSAL and not triton.IS_INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is not set, and there is no device")
    return triton.BACKEND, replace(torch.BACKEND)


def arrays(*shape):
    import torch

    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return torch.from_numpy(values).to(torch_device())


@pytest.mark.parametrize("head_size", [16, 80])
def test_triton_finds_the_neighbors_that_torch_finds(forms, head_size):
    keys = arrays(1, 2, TOKENS, head_size)
    # Exact duplicates, in other tiles: they tie, and the lower token is first.
    keys[..., 100:180, :] = keys[..., :80, :]

    ours, plain = (
        build_graph(keys, keys[..., 0], num_sources=70, num_neighbors=3, backend=backend) for backend in forms
    )

    np.testing.assert_array_equal(ours.sources.cpu(), plain.sources.cpu())
    np.testing.assert_allclose(ours.weights.cpu(), plain.weights.cpu(), rtol=1e-5, atol=1e-6)
    assert (ours.neighbors == plain.neighbors).float().mean() > 0.99


@pytest.mark.parametrize("num_queries", [8, 130])
def test_triton_adds_up_the_attention_that_torch_adds_up(forms, num_queries):
    keys, queries = arrays(1, 2, TOKENS, 80), arrays(1, 4, num_queries, 80)
    valid = arrays(1, 2, TOKENS) < 1

    ours, plain = (
        backend.received_attention(queries, keys, valid, block_size=64, backend=backend) for backend in forms
    )

    np.testing.assert_allclose(ours.cpu(), plain.cpu(), rtol=1e-4, atol=1e-6)
