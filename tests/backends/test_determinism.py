"""`torch.use_deterministic_algorithms`: no operation of ours is refused under it or open in its order on a GPU.

Asked on the meta device, where every branch is the one of a GPU, by torch's own list of such operations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphkv import Absorb, GraphKV, Lossless, SnapKV, build_graph, degree, fuse, pagerank, propagate, select
from graphkv.backends.torch import BACKEND
from graphkv.core import primitives
from tests.backends.test_torch_modes import arrays, evicted
from tests.support.policies import every_policy

# All operations that the documentation of the setting names, by the names of their kernels, but layers of networks;
# those that differ from run to run without the setting are in it as well as those that raise an error with it.
LISTED = {
    "bincount", "histc", "index_add", "index_copy", "index_put", "kthvalue", "median", "nanmedian", "put",
    "repeat_interleave", "resize", "scatter_add", "scatter_reduce",
}  # fmt: skip


def is_open(name, args, kwargs):
    """Return whether an operation may give other bits in the next run on a GPU, or is refused."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if name in ("cumsum", "cumprod"):
        return tensors[0].is_floating_point()
    if name == "scatter":  # of one number, every order is the same
        return len(tensors) > 2 or "reduce" in kwargs
    if name in ("sort", "argsort"):
        return not kwargs.get("stable")
    return name in LISTED


class Open(TorchDispatchMode):
    """Collect the open operations."""

    def __init__(self):
        super().__init__()
        self.names, self.number = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        self.number += 1
        if is_open(name, args, kwargs or {}):
            self.names.add(name)
        return function(*args, **(kwargs or {}))


def open_in(call):
    with Open() as seen:
        call()
    assert seen.number > 0
    return seen.names


def shapeless(*shape):
    return torch.empty(shape, device="meta")


POLICIES = every_policy(8)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_has_an_open_operation(policy):
    x = {"keys": shapeless(2, 2, 24, 16), "values": shapeless(2, 2, 24, 16), "queries": shapeless(2, 4, 24, 16)}

    assert open_in(lambda: evicted(policy, x)) == set()


def test_no_step_has_an_open_operation():
    keys, importance = shapeless(2, 24, 16), shapeless(2, 24)
    graph = build_graph(keys, importance, num_sources=3, num_neighbors=2)

    def steps():
        build_graph(keys, importance, num_sources=3, num_neighbors=2)
        degree(keys), fuse(importance, importance), pagerank(importance, keys), select(importance, 4)
        for accumulation in ("product", "sum"):
            propagate(importance, graph, accumulation=accumulation)
        primitives.sum_rows(keys, shapeless(2, 24).to(torch.int64), 4, backend=BACKEND)

    assert open_in(steps) == set()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, i: x.cumsum(-1),
        lambda x, i: x.scatter_add(-1, i, x),
        lambda x, i: x.scatter_(-1, i, x),
        lambda x, i: x.sort(),
        lambda x, i: x.index_add_(0, i, x),
    ],
)
def test_open_operations_are_seen(call):
    assert open_in(lambda: call(shapeless(5), shapeless(5).to(torch.int64)))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "make", [SnapKV, lambda **o: GraphKV(Absorb(SnapKV(**o))), lambda **o: Lossless(SnapKV(**o))], ids=range(3)
)
def test_results_are_the_same_under_the_setting(deterministic, make):
    x, policy = arrays(), make(budget=8, window=4)
    found = evicted(policy, x)
    torch.use_deterministic_algorithms(False)
    wanted = evicted(policy, x)

    np.testing.assert_array_equal(found.kept, wanted.kept)
    np.testing.assert_array_equal(found.scores, wanted.scores)
