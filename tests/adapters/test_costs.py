"""What a policy's cost says of memory is what the portable form takes, counted on torch's meta device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 - torch may be missing
from torch.utils._pytree import tree_leaves  # noqa: E402

from graphkv import Probe, evict  # noqa: E402
from graphkv.core.backend import load  # noqa: E402
from graphkv.core.layer import LayerShape  # noqa: E402
from graphkv.testing import variants  # noqa: E402
from tests.support.policies import every_policy  # noqa: E402

BUDGET = 512
SHAPE = LayerShape(num_tokens=4096, query_heads=32, kv_heads=8, head_size=64, budget=BUDGET)
# A graph on top of each base adds what it adds on one.
POLICIES = {
    name: policy
    for name, policy in every_policy(BUDGET).items()
    if not name.startswith("graphkv-") or name == "graphkv-knorm"
}


class Largest(TorchDispatchMode):
    """Remembers the most bytes of an array that no argument shares."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id_of(x) for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id_of(x) not in given:
                self.most = max(self.most, x.untyped_storage().nbytes())
        return result


def id_of(x):
    return x.untyped_storage()._cdata


@pytest.mark.parametrize("name", POLICIES)
def test_the_largest_array_is_what_the_cost_says(name):
    policy, portable = POLICIES[name], variants(load("torch"))[1]
    keys = torch.empty((1, SHAPE.kv_heads, SHAPE.num_tokens, SHAPE.head_size), device="meta")
    queries = torch.empty((1, SHAPE.query_heads, SHAPE.num_tokens, SHAPE.head_size), device="meta")

    with Largest() as found:
        # The last of four layers, which the most expensive one of `PerLayer` is.
        evict(
            policy,
            keys,
            values=keys,
            queries=queries,
            probes=Probe(queries=queries, keys=keys),
            layer=3,
            num_layers=4,
            backend=portable,
        )

    places = 8 * SHAPE.kv_heads * SHAPE.num_tokens
    assert 0.9 <= found.most / max(policy.cost(SHAPE).bytes, places) <= 1.1
