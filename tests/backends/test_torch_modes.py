"""torch in its modes: autocast, compile, vmap, forward-mode gradients, tensors without memory, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graphkv import H2O, Graph, GraphKV, RoCo, SnapKV, build_graph, degree, evict, fuse, pagerank, propagate, select
from graphkv.backends.torch import BACKEND
from graphkv.core import backend as core_backend
from graphkv.testing import policies

POLICIES = policies.shipped(8)
# To compile takes a second each, and what a wrapper adds is the same over every base.
COMPILED = {name: policy for name, policy in POLICIES.items() if "(" not in name or "SnapKV" in name}


def arrays(num_tokens=24):
    make = torch.Generator().manual_seed(3)
    shape = (2, 2, num_tokens, 16)
    return {
        "keys": torch.randn(shape, generator=make),
        "values": torch.randn(shape, generator=make),
        "queries": torch.randn((2, 4, num_tokens, 16), generator=make),
    }


def evicted(policy, x):
    given = dict(x)
    if policy.needs().unrotated_keys:
        given["unrotated_keys"] = x["keys"]
    if policy.needs().probes:
        given["probes"] = x["queries"]
    return evict(policy, given.pop("keys"), **given, layer=1, num_layers=4)


def edges(importance):
    return Graph(
        sources=torch.tensor([[0, 1]]).expand(importance.shape[0], 2),
        neighbors=torch.tensor([[[2, 3], [3, 4]]]).expand(importance.shape[0], 2, 2),
        weights=torch.full((importance.shape[0], 2, 2), 0.3),
        num_tokens=importance.shape[-1],
    )


STEPS = {
    "build_graph": lambda x: build_graph(x, x[..., 0], num_sources=3, num_neighbors=2).weights,
    "degree": degree,
    "fuse": lambda x: fuse(x[..., 0], x[..., 1]),
    "pagerank": lambda x: pagerank(x[..., 0], x),
    "propagate": lambda x: propagate(x[..., 0], edges(x[..., 0])),
    "select": lambda x: select(x[..., 0], 4),
}


# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_autocast_changes_no_policy(policy):
    x = arrays()
    wanted = evicted(policy, x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evicted(policy, x)

    assert torch.equal(found.kept, wanted.kept)
    for name in ("importance", "scores"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_autocast_changes_no_step(step, needs_gradients):
    x = arrays()["keys"][0].requires_grad_(needs_gradients)
    wanted = step(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(x)

    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_autocast_is_as_it_was_after_a_call():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        degree(arrays()["keys"])
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_are_in_full_precision_whatever_is_set(device, precision):
    """What decides on a CPU and on CUDA, asked without a device."""
    products = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}[device]
    torch.set_float32_matmul_precision(precision)
    try:
        set_by_user = products.fp32_precision
        assert set_by_user in ("tf32", "bf16")
        with BACKEND.guard(SimpleNamespace(device=torch.device(device))):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == set_by_user
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(KeyError), BACKEND.guard(SimpleNamespace(device=torch.device(device))):
            raise KeyError
        assert products.fp32_precision == set_by_user
    finally:
        torch.set_float32_matmul_precision("highest")


def test_policies_run_in_full_precision_and_leave_the_setting(monkeypatch):
    seen = []

    def noticing(self, layer, window):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return score_past(self, layer, window)

    score_past = SnapKV.score_past
    monkeypatch.setattr(SnapKV, "score_past", noticing)
    x = arrays()
    torch.set_float32_matmul_precision("medium")
    try:
        evict(SnapKV(budget=8, window=4), x["keys"], queries=x["queries"])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")

    assert seen == ["ieee"]


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def compiled(monkeypatch):
    # The eager backend: what is asked here is whether the whole call is one graph.
    torch._dynamo.reset()
    # As at the very first call of a process, when no backend is loaded.
    monkeypatch.setattr(core_backend, "LOADED", {})
    yield lambda function: torch.compile(function, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_step_compiles_without_a_backend_by_name(compiled, step):
    x = arrays()["keys"][0]

    assert torch.equal(compiled(step)(x), step(x))


# The cache is array-api-compat's.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("policy", COMPILED.values(), ids=COMPILED.keys())
def test_every_policy_compiles(compiled, policy):
    x = arrays()

    found = compiled(lambda x: evicted(policy, x).kept)(x)

    assert torch.equal(found, evicted(policy, x).kept)


# -------------------------------------------------------------------------------------- vmap, jvp, tensors of no memory


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_a_step_can_be_mapped(step):
    x = arrays()["keys"]

    found = torch.func.vmap(step)(x)

    # Mapped products may differ in their last bits.
    torch.testing.assert_close(found, torch.stack([step(row) for row in x]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", [H2O(budget=8), GraphKV(SnapKV(budget=8, window=4))], ids=["h2o", "paper"])
def test_evictions_can_be_mapped(policy):
    x = arrays()

    def kept(keys, queries):
        return evict(policy, keys[None], queries=queries[None]).kept[0]

    found = torch.func.vmap(kept)(x["keys"], x["queries"])

    assert torch.equal(found, torch.stack([kept(*row) for row in zip(x["keys"], x["queries"], strict=True)]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["build_graph", "degree", "fuse", "pagerank", "propagate"])
def test_a_step_has_forward_mode_gradients(name):
    x = arrays()["keys"][0]
    tangent = torch.ones_like(x)

    value, found = torch.func.jvp(STEPS[name], (x,), (tangent,))

    small = 1e-3
    assert torch.allclose(value, STEPS[name](x), atol=1e-6)
    numeric = (STEPS[name](x.double() + small) - STEPS[name](x.double() - small)) / (2 * small)
    assert torch.allclose(found.double(), numeric, atol=1e-2)


@pytest.mark.parametrize("policy", [H2O(budget=8), GraphKV(SnapKV(budget=8, window=4))], ids=["h2o", "paper"])
def test_tensors_without_memory_pass(policy):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = {name: mode.from_tensor(each) for name, each in arrays().items()}
        found = evict(policy, x["keys"], queries=x["queries"])

        assert tuple(found.kept.shape) == (2, 2, 8)
        for step in STEPS.values():
            step(mode.from_tensor(arrays()["keys"][0]))


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["build_graph", "degree"])
def test_a_zero_key_has_no_gradient_and_spoils_none(name):
    x = arrays()["keys"][0].clone()
    x[:, 3] = 0
    x.requires_grad_()

    STEPS[name](x).sum().backward()

    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[:, 3, 2:], torch.zeros_like(x.grad[:, 3, 2:]))
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("policy", [H2O(budget=8), RoCo(budget=8), H2O(budget=100)], ids=["h2o", "roco", "fits"])
def test_state_records_no_gradients(policy):
    x = arrays()
    x["keys"].requires_grad_()

    found = evict(policy, x["keys"], queries=x["queries"])

    assert found.importance is None or found.importance.requires_grad
    assert all(sums.grad_fn is None and not sums.requires_grad for sums in found.state.tokens.values())


# --------------------------------------------------------------------------------------------------------- odd tensors


def test_a_tensor_that_is_negative_by_a_bit_is_read_right():
    flipped = torch.imag(torch.complex(torch.zeros(5), torch.arange(5.0)).conj())
    assert flipped.is_neg()

    assert select(flipped, 2).tolist() == [0, 1]


def test_infinite_keys_receive_nothing_and_spoil_none():
    x = arrays()
    x["keys"][0, 0, 5, 2] = np.inf
    x["keys"][0, 1, 7, 0] = np.nan
    x["queries"][1, 0, 20, 1] = -np.inf
    portable = policies.shipped(8)["H2O"]

    found = evict(portable, x["keys"], queries=x["queries"])
    numpy = evict(portable, x["keys"].numpy(), queries=x["queries"].numpy())

    assert not torch.isnan(found.importance).any()
    assert found.importance[0, 0, 5] == 0
    np.testing.assert_allclose(found.importance.numpy(), numpy.importance, rtol=1e-5)


def test_keys_without_entries_are_all_alike():
    keys, queries = torch.ones((1, 1, 9, 0)), torch.ones((1, 1, 9, 0))

    found = evict(H2O(budget=4, num_recent=1), keys, queries=queries)
    numpy = evict(H2O(budget=4, num_recent=1), keys.numpy(), queries=queries.numpy())

    assert found.kept.tolist() == numpy.kept.tolist() == [[[0, 1, 2, 8]]]
