"""Tokens that are taken back: by crop, by assisted decoding, by an edited history."""

import copy

import pytest
import torch

from graphkv import CAKE, H2O, AdaKV, ArgumentError, KNorm, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import FAMILIES, tiny_gemma3, tiny_llama

SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = [SNAPKV, H2O(budget=12), CAKE(budget=14, window=6, kernel_size=3), AdaKV(SNAPKV)]
MODELS = {
    "full": lambda: tiny_llama(num_hidden_layers=2),
    "mixed": lambda: tiny_gemma3(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]),
    "sliding": FAMILIES["mistral-sliding"],
}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(1))


def read(model, cache, ids):
    with torch.inference_mode():
        return model(ids, **with_cache(model, cache)).logits


def greedy(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=96, **options)


@pytest.mark.parametrize("name", MODELS)
def test_crop_is_exact_once_evictions_wait_for_it(name, ids):
    model = MODELS[name]()
    with observing(model):
        cache = EvictingCache(KNorm(budget=20))
        read(model, cache, ids[:, :40])
        expected = read(model, cache.copy(), ids[:, 46:51])
        cache.activate_past_recording()
        assert all(layer.is_croppable for layer in cache.layers)
        for _ in range(2):
            read(model, cache, ids[:, 40:46])
            cache.crop(-6)
        assert torch.equal(read(model, cache, ids[:, 46:51]), expected)


def test_crop_of_a_sliding_layer_that_has_moved_on_is_refused(ids):
    model = MODELS["mixed"]()
    with observing(model):
        cache = EvictingCache(KNorm(budget=20))
        read(model, cache, ids[:, :46])
        before = [layer.keys for layer in cache.layers]
        with pytest.raises(ArgumentError, match="crop must leave layer 0 the 11 tokens of its sliding window"):
            cache.crop(-6)
        assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=["snapkv", "h2o", "cake", "adakv"])
@pytest.mark.parametrize("name", ["full", "mixed"])
def test_prompt_lookup_gives_what_plain_decoding_gives(policy, name):
    model, prompt = MODELS[name](), torch.tensor([[5, 6, 7, 8, 9] * 8])
    with evicting(model, policy):
        expected = greedy(model, prompt)
        assert greedy(model, prompt, prompt_lookup_num_tokens=3).tolist() == expected.tolist()


def test_a_draft_that_is_right_until_the_eviction_changes_nothing(ids):
    model = MODELS["full"]()
    with observing(model):
        plain, assisted = EvictingCache(KNorm(budget=16)), EvictingCache(KNorm(budget=16))
        expected = greedy(model, ids[:, :48], **with_cache(model, plain))
        found = greedy(model, ids[:, :48], **with_cache(model, assisted), assistant_model=copy.deepcopy(model))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("change", [lambda text: text.index_fill(1, torch.tensor([5]), 1), lambda text: text.flip(1)])
def test_an_edited_history_is_noticed(ids, change):
    model = MODELS["full"]()
    with evicting(model, SNAPKV, every=8):
        cache = EvictingCache(SNAPKV, every=8)
        answer = greedy(model, ids[:, :40], **with_cache(model, cache))
        text = torch.cat([answer, ids[:, 40:45]], dim=1)
        with pytest.raises(ArgumentError, match="input_ids must begin with the 48 tokens"):
            greedy(model, change(text), **with_cache(model, cache))
        assert greedy(model, text, **with_cache(model, cache)).shape[1] == text.shape[1] + 9
