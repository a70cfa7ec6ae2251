"""A model whose layers are on two devices, one of them torch's meta device: nothing of a layer is on another's."""

import pytest
import torch

from graphkv.integrations.transformers import EvictingCache, observing
from tests.integrations.tiny import tiny_llama
from tests.support.policies import every_policy

# Steps in place, states, merges, fewer bits, shared choices. All policies passed on 2026-11-27, but those that share a
# budget: they ask for values, which the meta device has not.
NAMES = ("graphkv-snapkv", "degree-snapkv", "pagerank-h2o", "absorb-snapkv", "mikv-snapkv", "shared-snapkv", "random")
POLICIES = {name: policy for name, policy in every_policy(20).items() if name in NAMES}


def put(module, device):
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device), requires_grad=False)


def moved(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return tuple(map(moved, value)) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def model():
    """The first layer on the CPU, what comes after it on the meta device, and inputs moved there as accelerate does."""
    model = tiny_llama()
    for part in (*model.model.layers[1:], model.model.norm, model.lm_head):
        put(part, "meta")
        part.register_forward_pre_hook(
            lambda _, args, options: (moved(args), {name: moved(x) for name, x in options.items()}), with_kwargs=True
        )
    return model


@pytest.mark.parametrize("name", POLICIES)
def test_each_layer_is_evicted_where_it_is(model, name):
    cache = EvictingCache(POLICIES[name], every=1)

    with observing(model), torch.no_grad():
        for number in (40, 1, 1):
            model(torch.ones((1, number), dtype=torch.int64), past_key_values=cache)

    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta", "meta"]
    widths = {int(layer.keys.shape[-2]) for layer in cache.layers}
    assert max(widths) < 40
