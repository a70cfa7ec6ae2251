"""Whether a release of transformers evicts at all: no argument, attribute or output is named that it could rename."""

import pytest
import torch
from transformers import Cache

from graphkv import GraphKV, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_llama

N, BUDGET = 40, 12
POLICY = GraphKV(SnapKV(budget=BUDGET, window=4))


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_llama(attn_implementation=request.param)


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, N), generator=torch.Generator().manual_seed(1))


def generate(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options
    )


def stored(output):
    """How many tokens each layer of the output's one cache holds, by its keys."""
    (cache,) = (value for value in output.values() if isinstance(value, Cache))
    return [layer.keys.shape[2] for layer in cache.layers]


def test_without_us_everything_is_stored(model, ids):
    """Else what follows would show nothing."""
    assert stored(generate(model, ids)) == [N + 5] * 3


def test_generate_is_evicted(model, ids):
    with evicting(model, POLICY):
        assert stored(generate(model, ids)) == [BUDGET + 5] * 3


def test_generate_is_evicted_again_and_again(model, ids):
    with evicting(model, POLICY, every=2):
        assert stored(generate(model, ids)) == [BUDGET + 1] * 3


@torch.inference_mode()
def test_a_forward_pass_is_evicted(model, ids):
    with evicting(model, POLICY):
        assert stored(model(ids)) == [BUDGET] * 3
        assert stored(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)) == [BUDGET] * 3


def test_a_cache_of_ones_own_is_evicted(model, ids):
    """Read by a forward pass and by generate, and evicted by hand."""
    read, generated, listening = EvictingCache(POLICY), EvictingCache(POLICY), EvictingCache(num_queries=4)
    with observing(model), torch.inference_mode():
        model(ids, **with_cache(model, read))
        generate(model, ids, **with_cache(model, generated))
        model(ids, **with_cache(model, listening))

    assert [layer.num_stored for layer in read.layers] == [BUDGET] * 3
    assert [layer.num_stored for layer in generated.layers] == [BUDGET + 5] * 3
    assert [layer.num_stored for layer in listening.layers] == [N] * 3
    listening.evict(POLICY)
    assert [layer.num_stored for layer in listening.layers] == [BUDGET] * 3
