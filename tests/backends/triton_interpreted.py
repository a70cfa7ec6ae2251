"""What `test_triton.py` runs in a process of its own, in which Triton interprets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphkv import GraphKV, SnapKV, build_graph, evict
from graphkv.backends import torch as plain
from graphkv.backends import triton as module
from graphkv.core.attention import portable_received_attention

PORTABLE = replace(plain.BACKEND, build_graph=None, received_attention=None)
FIELDS = ("sources", "neighbors", "weights")


@pytest.fixture(autouse=True)
def no_other_way(monkeypatch):
    """Let nothing pass because torch's own forms did the work."""
    for name in ("build_graph", "received_attention"):
        monkeypatch.setattr(plain, name, None)


def graphs(keys, importance, **options):
    return [build_graph(keys, importance, backend=each, **options) for each in (module.BACKEND, PORTABLE)]


@pytest.mark.parametrize(
    ("num_tokens", "num_sources", "num_neighbors", "head_size"),
    [(150, 70, 3, 24), (130, 5, 16, 33), (64, 40, 1, 16), (65, 1, 2, 16), (7, 2, 5, 19)],
)
def test_the_graph_is_the_portable_one_index_by_index(num_tokens, num_sources, num_neighbors, head_size):
    """Keys of ones and minus ones make cosines exact and nearly all of them ties; with padding and keys of no use."""
    rng = np.random.default_rng(num_tokens)
    keys = torch.from_numpy(rng.choice([-1.0, 1.0], (1, 2, num_tokens, 16)).astype("float32"))
    keys = torch.nn.functional.pad(keys, (0, head_size - 16))
    for token, value in zip(rng.integers(0, num_tokens, 4), (0.0, 1e30, np.inf, np.nan), strict=True):
        keys[:, 0, token] = value
    options = {"num_sources": num_sources, "num_neighbors": num_neighbors}
    options["valid"] = torch.from_numpy(rng.random((1, 2, num_tokens)) < 0.8)
    importance = torch.from_numpy(rng.choice([0.0, 1.0, 2.0], (1, 2, num_tokens)))

    ours, portable = graphs(keys, importance, **options)

    for field in FIELDS:
        np.testing.assert_array_equal(getattr(ours, field), getattr(portable, field), err_msg=field)


def test_weights_of_general_keys_in_any_layout_and_half_precision():
    keys = torch.randn((70, 40, 2), generator=torch.Generator().manual_seed(1)).permute(2, 0, 1)[..., ::2]
    for given in (keys, keys.to(torch.float16), keys.to(torch.bfloat16)):
        ours, portable = graphs(given, keys[..., 0], num_sources=3, num_neighbors=4)

        np.testing.assert_array_equal(ours.neighbors, portable.neighbors)
        np.testing.assert_allclose(ours.weights, portable.weights, rtol=1e-6)
        assert portable.weights.min() > 0.1


def test_the_room_for_candidates_changes_nothing(monkeypatch):
    keys = torch.randn((3, 70, 8), generator=torch.Generator().manual_seed(2))
    options = {"num_sources": 5, "num_neighbors": 2}
    wanted = build_graph(keys, keys[..., 0], backend=PORTABLE, **options)
    for room in (1, 9, 45):  # one source at a time; two; one row
        monkeypatch.setattr(module, "CANDIDATES", room)
        assert torch.equal(
            build_graph(keys, keys[..., 0], backend=module.BACKEND, **options).neighbors, wanted.neighbors
        )


@pytest.mark.parametrize(
    ("num_tokens", "num_queries", "head_size", "groups"),
    [(150, 8, 24, 2), (70, 70, 16, 1), (9, 1, 3, 3), (130, 3, 40, 1)],
)
@pytest.mark.parametrize("programs", [1, 1024])
def test_attention_is_the_portable_one(num_tokens, num_queries, head_size, groups, programs, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(num_tokens)
    keys = torch.randn((2, num_tokens, 1, head_size), generator=generator).transpose(1, 2)
    queries = 3 * torch.randn((2, groups, num_queries, head_size), generator=generator)
    valid = torch.rand((2, 1, num_tokens), generator=generator) < 0.8
    valid[..., -1] = True
    valid[1, :, : num_tokens // 2] = False
    keys[0, 0, num_tokens // 3, 0], keys[1, 0, -2, -1], queries[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf

    options = {"block_size": 64, "backend": PORTABLE}
    ours, wanted = (
        form(queries, keys, valid, **options) for form in (module.received_attention, portable_received_attention)
    )

    assert ours.shape == wanted.shape
    np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-6)
    assert ((ours == 0) == (wanted == 0)).all()


def test_a_policy_keeps_what_it_keeps_elsewhere():
    generator = torch.Generator().manual_seed(4)
    keys, queries = (torch.randn((1, heads, n, 16), generator=generator) for heads, n in ((2, 70), (4, 6)))
    policy = GraphKV(SnapKV(budget=20, window=6))

    ours, portable = (evict(policy, keys, queries=queries, backend=each) for each in (module.BACKEND, PORTABLE))

    np.testing.assert_array_equal(ours.kept, portable.kept)
    np.testing.assert_allclose(ours.scores, portable.scores, rtol=2e-5, atol=1e-7)
