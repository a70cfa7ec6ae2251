"""Tiny random models, made from configurations."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# 3 layers, 6 query and 2 KV heads, weights large enough that attention is not flat.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# Multi-head: every query head has keys of its own.
UNGROUPED = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}


def tiny_llama(seed=0, **changes):
    """Float32, with grouped query heads."""
    return tiny(LlamaForCausalLM, LlamaConfig, seed, **SIZES | changes)


def byte_tokenizer():
    """A tokenizer that knows bytes only, with a chat template of one line per message."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    return fast


def save_tiny_llama(folder, **changes):
    """Save a tiny Llama with its byte tokenizer; give the folder."""
    byte_tokenizer().save_pretrained(folder)
    tiny_llama(vocab_size=256, **changes).save_pretrained(folder)
    return folder


def tiny(kind, config, seed=0, **options):
    """A random model in float32, the same for the same seed."""
    torch.manual_seed(seed)
    return kind(config(**options)).eval()


def tiny_gemma3(**changes):
    """Sliding and full layers, and another scale of the logits than 1 / sqrt(head_dim), as the real ones have."""
    options = {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    return tiny(Gemma3ForCausalLM, Gemma3TextConfig, **SIZES | options | changes)


FAMILIES = {
    "llama": tiny_llama,
    "mistral-sliding": lambda: tiny(MistralForCausalLM, MistralConfig, **SIZES, sliding_window=24),
    "qwen2": lambda: tiny(Qwen2ForCausalLM, Qwen2Config, **SIZES),
    "qwen3": lambda: tiny(Qwen3ForCausalLM, Qwen3Config, **SIZES, head_dim=8),
    "gemma3-mixed": tiny_gemma3,
    "phi3": lambda: tiny(Phi3ForCausalLM, Phi3Config, **SIZES),
    "gpt-neox": lambda: tiny(GPTNeoXForCausalLM, GPTNeoXConfig, **UNGROUPED),
    "opt": lambda: tiny(OPTForCausalLM, OPTConfig, **UNGROUPED, ffn_dim=64, word_embed_proj_dim=48),
    "gpt2": lambda: tiny(
        GPT2LMHeadModel, GPT2Config, vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64,
        initializer_range=0.3, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip
