"""Layers as models have them: shared keys, linear attention, other values, several kinds in one model."""

import pytest
import torch
import transformers
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, MllamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from graphkv import ArgumentError, KNorm, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)


def qwen3_next():
    sizes = {f"linear_{name}_head_dim": 8 for name in ("key", "value")} | {"moe_intermediate_size": 16}
    heads = {f"linear_num_{name}_heads": 2 for name in ("key", "value")} | {"shared_expert_intermediate_size": 16}
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "head_dim": 8}
    config, model = transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM
    return tiny(model, config, **SIZES, **sizes, **heads, **kinds, num_experts=2, num_experts_per_tok=1)


def gemma3n():
    sizes = {"laurel_rank": 8, "altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "head_dim": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
    options = SIZES | sizes | kinds | {"intermediate_size": [48] * 6, "activation_sparsity_pattern": [0.0] * 6}
    config, model = transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM
    return tiny(model, config, **options, num_hidden_layers=6, sliding_window=12, vocab_size_per_layer_input=97)


hybrids_go_through_the_cache = pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "LinearAttentionLayer"), reason="hybrids have caches of their own here"
)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def greedy(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10} | options
    return model.generate(ids, eos_token_id=None, **options)


def test_rows_of_shared_keys_evict_like_rows_alone(ids):
    """Readers see what the owner of the keys has kept, and change nothing of it."""
    model, shown = gemma3n(), torch.ones_like(ids)
    shown[1, :7] = 0
    with evicting(model, SNAPKV, every=4):
        batch = greedy(model, ids * shown, attention_mask=shown)
        assert batch[1, 40:].tolist() == greedy(model, ids[1:, 7:])[0, 33:].tolist()
    with observing(model), torch.inference_mode():
        cache = EvictingCache(SNAPKV)
        model(ids, **with_cache(model, cache))
    assert [(layer.index, layer.num_stored) for layer in cache.evicting_layers] == [(0, 11), (1, 14), (2, 11), (3, 14)]


@hybrids_go_through_the_cache
def test_layers_that_skip_the_cache_leave_it_whole(ids):
    """Cross-attention without a picture."""
    options = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = tiny(MllamaForCausalLM, MllamaTextConfig, **SIZES, **options, **rope)
    expected = greedy(model, ids)
    with evicting(model, KNorm(budget=1000), every=1):
        assert greedy(model, ids).tolist() == expected.tolist()


def test_keys_that_are_read_with_other_values_are_refused(ids):
    model = tiny(DiffLlamaForCausalLM, DiffLlamaConfig, **SIZES, num_hidden_layers=1)
    with (
        pytest.raises(ArgumentError, match=r"the values that were cached|interface"),
        evicting(model, KNorm(budget=20)),
    ):
        model(ids)


@hybrids_go_through_the_cache
def test_linear_layers_keep_their_state_and_full_ones_evict(ids):
    model = qwen3_next()
    with torch.inference_mode():
        plain = DynamicCache(config=model.config)
        model(ids, **with_cache(model, plain))
        with observing(model):
            cache = EvictingCache(SNAPKV)
            model(ids, **with_cache(model, cache))
            cache.evict(KNorm(budget=9))

    assert [layer.num_stored for layer in cache.evicting_layers] == [9, 9]
    for ours, its in list(zip(cache.layers, plain.layers, strict=True))[::2]:
        for name in ("conv_states", "recurrent_states"):
            one, other = getattr(ours, name), getattr(its, name)
            for key in one if isinstance(one, dict) else [None]:
                assert torch.equal(one[key], other[key]) if key is not None else torch.equal(one, other)
    expected = greedy(model, ids)
    with evicting(model, KNorm(budget=1000), every=1):
        assert greedy(model, ids).tolist() == expected.tolist()


@hybrids_go_through_the_cache
def test_linear_layers_need_a_configuration_and_say_so(ids):
    model = qwen3_next()
    model.set_attn_implementation("graphkv_sdpa")
    with pytest.raises(ArgumentError, match="config must be given for a model with layers of linear attention"):
        model(ids, **with_cache(model, EvictingCache(SNAPKV)))
    cache = EvictingCache(SNAPKV, config=model.config)
    with torch.inference_mode():
        model(ids, **with_cache(model, cache))
    assert [layer.num_stored for layer in cache.evicting_layers] == [14, 14]
