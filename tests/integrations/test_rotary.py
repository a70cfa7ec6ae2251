"""Turned keys are what the model itself gives at the new positions, in every family; what cannot be turned is refused.

What they are compared with comes from the model alone: its attention module runs again on the hidden states that it
saw, with the position embeddings that the model makes when it is called with other positions.
"""

import copy
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from graphkv import ArgumentError, KNorm, Policy, StreamingLLM
from graphkv.core import Requirements
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import CACHE_ARGUMENTS, with_cache
from tests.integrations.tiny import SIZES, UNGROUPED, tiny

N, BUDGET = 40, 17
MIXED = ["sliding_attention", "full_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip

# By the names of their classes in transformers: the start of the model's, that of the configuration's, and options.
FAMILIES = {
    "llama": ("Llama", "Llama", {}),
    "llama, yarn": ("Llama", "Llama", {"rope_parameters": YARN}),
    "llama, frequencies of llama 3": ("Llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "heads not as wide as the model": ("Llama", "Llama", {"head_dim": 20}),
    "mistral": ("Mistral", "Mistral", {}),
    "qwen2": ("Qwen2", "Qwen2", {}),
    "qwen3": ("Qwen3", "Qwen3", {"head_dim": 8}),
    "olmo2": ("Olmo2", "Olmo2", {}),
    "granite": ("Granite", "Granite", {}),
    "starcoder2": ("Starcoder2", "Starcoder2", {}),
    "phi3": ("Phi3", "Phi3", {}),
    "phi3, half of a head": ("Phi3", "Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi": ("Phi", "Phi", {}),
    "stablelm": ("StableLm", "StableLm", {"head_dim": 16, "hidden_size": 96}),
    "persimmon": ("Persimmon", "Persimmon", {"hidden_size": 96}),
    "gpt-neox": ("GPTNeoX", "GPTNeoX", {}),
    "nemotron": ("Nemotron", "Nemotron", {}),
    "glm": ("Glm", "Glm", {"head_dim": 16}),
    "glm4": ("Glm4", "Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", "Cohere", {}),
    "ernie 4.5": ("Ernie4_5", "Ernie4_5", {"head_dim": 8}),
    "gpt-oss": ("GptOss", "GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": MIXED, "sliding_window": 16}),
    "gemma2": ("Gemma2", "Gemma2", {"head_dim": 8, "layer_types": MIXED, "sliding_window": 16}),
    "gemma3, two thetas": ("Gemma3", "Gemma3Text", {"head_dim": 8, "layer_types": MIXED, "sliding_window": 16}),
    "gemma4": ("Gemma4", "Gemma4Text", {"head_dim": 8, "global_head_dim": 16, "layer_types": MIXED, "sliding_window": 16, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}),
    "helium": ("Helium", "Helium", {"head_dim": 8}),
    "apertus": ("Apertus", "Apertus", {}),
    "hunyuan": ("HunYuanDenseV1", "HunYuanDenseV1", {"head_dim": 8}),
    "seed-oss": ("SeedOss", "SeedOss", {"head_dim": 8}),
    "arcee": ("Arcee", "Arcee", {}),
    "minimax-m2": ("MiniMaxM2", "MiniMaxM2", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "smollm3": ("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "cohere2": ("Cohere2", "Cohere2", {"layer_types": MIXED, "sliding_window": 16}),
    "afmoe": ("Afmoe", "Afmoe", {"head_dim": 8, "layer_types": MIXED, "sliding_window": 16, "num_dense_layers": 3}),
    "exaone4": ("Exaone4", "Exaone4", {"layer_types": MIXED, "sliding_window": 16}),
    "exaone4, full": ("Exaone4", "Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
}  # fmt: skip


def make(family):
    """The tiny random model of a family, or skip it where this release has none."""
    kind, config, options = FAMILIES[family]
    if not hasattr(transformers, f"{config}Config"):
        pytest.skip(f"no {kind} in transformers {transformers.__version__}")
    sizes = UNGROUPED if kind in ("GPTNeoX", "Phi", "Persimmon") else SIZES
    return tiny(
        getattr(transformers, f"{kind}ForCausalLM"), getattr(transformers, f"{config}Config"), **sizes | options
    )


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """Keep what KNorm keeps, and remember the keys that came."""

    requirements: ClassVar[Requirements] = Requirements(unrotated_keys=True)
    seen: dict = field(default_factory=dict, compare=False)

    def score(self, inputs):
        self.seen[inputs.layer] = inputs.unrotated_keys
        return KNorm(budget=self.budget).score(inputs)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(5))


def attentions(model):
    """The attention modules of the decoder, by their layers."""
    return {
        module.layer_idx: module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and name.rsplit(".", 1)[-1] in ("self_attn", "attention", "attn")
    }


@contextmanager
def listening(model):
    """Take note of what the attention modules are called with."""
    calls = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.__setitem__(
                module.layer_idx, kwargs | ({"hidden_states": args[0]} if args else {})
            ),
            with_kwargs=True,
        )
        for module in attentions(model).values()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def keys_at(model, calls, index, tokens, places):
    """The keys of some tokens of a layer, shape (kv_heads, tokens, D), as the model gives them at any places."""
    with listening(model) as other, torch.inference_mode():
        model(torch.ones(1, places.shape[-1], dtype=torch.int64), position_ids=places, use_cache=False)
    given = dict(calls[index])
    given["hidden_states"] = given["hidden_states"][:, tokens]
    given["position_embeddings"] = other[index]["position_embeddings"]
    cache = DynamicCache()
    for name in CACHE_ARGUMENTS:
        if name in given:
            given[name] = cache
    given |= {"attention_mask": None, "position_ids": places[:, :1] if places.ndim == 3 else places}
    given.pop("cache_position", None)
    with torch.inference_mode():
        attentions(model)[index](**given)
    return cache.layers[index].keys[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_keys_are_the_models_own_at_the_new_positions(family, ids):
    model = make(family)
    with listening(model) as calls, observing(model), torch.inference_mode():
        full, cache = EvictingCache(), EvictingCache(KNorm(budget=BUDGET), rerotate=True)
        model(ids, **with_cache(model, full))
        model(ids, **with_cache(model, cache))

    checked, moved = 0, False
    for index, layer in enumerate(cache.layers):
        if not layer.evicts:
            continue
        for head in range(layer.keys.shape[1]):
            tokens = layer.positions[0, head]
            wanted = keys_at(model, calls, index, tokens, torch.arange(N - BUDGET, N)[None])[head]
            torch.testing.assert_close(layer.keys[0, head], wanted, rtol=1e-4, atol=1e-4)
            stood = full.layers[index].keys[0, head, tokens]
            if not layer.rotation.first:
                assert torch.equal(layer.keys[0, head], stood)
                assert torch.equal(keys_at(model, calls, index, tokens, tokens[None])[head], wanted)
            moved |= not torch.allclose(layer.keys[0, head], stood, atol=1e-2)
            checked += 1
    assert checked
    assert moved or family in ("cohere2", "afmoe", "exaone4"), "nothing was turned, so nothing was tested"


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_are_the_models_own_at_position_zero(family, ids):
    model, policy = make(family), Watching(budget=BUDGET)
    with listening(model) as calls, observing(model), torch.inference_mode():
        cache = EvictingCache(policy)
        model(ids, **with_cache(model, cache))

    for index, keys in policy.seen.items():
        wanted = keys_at(model, calls, index, torch.arange(N), torch.zeros(1, N, dtype=torch.int64)).clone()
        # YaRN makes rotated keys longer; those before the rotary embedding are not.
        rotation = cache.layers[index].rotation
        wanted[..., [*rotation.first, *rotation.second]] /= rotation.scaling
        torch.testing.assert_close(keys[0], wanted, rtol=1e-4, atol=1e-4)
    assert policy.seen
