"""Tiny random models of the families that kvpress supports, and what a press leaves of their caches."""

from contextlib import nullcontext

import torch
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.integrations.tiny import SIZES, tiny, tiny_llama

FOUR = SIZES | {"num_hidden_layers": 4}
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "mistral": lambda: tiny(MistralForCausalLM, MistralConfig, **FOUR, sliding_window=None),
    # One matrix for queries, keys and values; half of each head is rotated.
    "phi3": lambda: tiny(Phi3ForCausalLM, Phi3Config, **FOUR, rope_parameters=PARTIAL_ROPE),
    # A bias on the projections.
    "qwen2": lambda: tiny(Qwen2ForCausalLM, Qwen2Config, **FOUR),
    # Normalized queries and keys, heads wider than hidden_size / heads.
    "qwen3": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, **FOUR, head_dim=16),
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def prompts(batch=3, length=40):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def prefill(model, ids, press=None, **inputs):
    """The cache of a prompt, evicted by the press."""
    inputs = {"past_key_values": None if inputs.get("use_cache") is False else DynamicCache()} | inputs
    with torch.inference_mode(), press(model) if press else nullcontext():
        model(ids, **inputs)
    return inputs["past_key_values"]


def lengths(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


def same(cache, keys_and_values):
    """Whether every layer holds exactly these keys and values, in this order."""
    return all(
        torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, keys_and_values, strict=True)
    )


def generate(model, ids, num_new=6, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, **options)


def num_hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]
