"""A tiny random Llama with grouped-query heads, and a reference that knows no cache."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphkv import evict


def tiny_llama(seed=0, **changes):
    """Float32, 3 layers, 6 query and 2 KV heads, weights large enough that attention is not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
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
        | changes
    )
    return LlamaForCausalLM(config).eval()


def rotate(x, positions):
    """Rotary embedding at explicit positions, from its definition; x (heads, tokens, D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@torch.inference_mode()
def reference_logits(model, ids, prompt_length, policy):
    """Logits of all tokens, where tokens after the prompt attend to what the policy kept and to each other.

    One pass without any cache: every layer attends under an explicit mask per KV head that says, for every query
    position, which positions are left for it.
    """
    config, inner = model.config, model.model
    kv_heads, size = config.num_key_value_heads, inner.layers[0].self_attn.head_dim
    groups = config.num_attention_heads // kv_heads
    count = len(ids)
    positions = torch.arange(count)
    hidden = inner.embed_tokens(ids)
    kept_by_layer = []
    for number, layer in enumerate(inner.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)

        def heads(projection, normed=normed):
            return projection(normed).view(count, -1, size).transpose(0, 1)

        query, key = rotate(heads(attention.q_proj), positions), rotate(heads(attention.k_proj), positions)
        value = heads(attention.v_proj)
        kept = evict(
            policy,
            key[None, :, :prompt_length].numpy(),
            values=value[None, :, :prompt_length].numpy(),
            queries=query[None, :, :prompt_length].numpy(),
            layer=number,
            num_layers=len(inner.layers),
        ).kept[0]
        kept_by_layer.append(torch.as_tensor(kept))
        # A head that keeps less than the widest is filled up with -1.
        index = torch.as_tensor(kept).where(torch.as_tensor(kept) >= 0, count)
        left = torch.zeros(kv_heads, count + 1, dtype=torch.bool).scatter(1, index, True)[:, :count]
        left[:, prompt_length:] = True
        is_later = (positions >= prompt_length)[None, :, None]
        visible = (positions[None, :] <= positions[:, None])[None] & (left[:, None, :] | ~is_later)

        out = torch.zeros_like(query)
        for head in range(config.num_attention_heads):
            logits = query[head] @ key[head // groups].T / size**0.5
            logits = logits.masked_fill(~visible[head // groups], -torch.inf)
            out[head] = logits.softmax(-1) @ value[head // groups]
        hidden = hidden + attention.o_proj(out.transpose(0, 1).reshape(count, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden)), kept_by_layer


def reference_generate(model, prompt, policy, num_new):
    """Greedy decoding by recomputing everything for every token."""
    ids = prompt
    for _ in range(num_new):
        logits, _ = reference_logits(model, ids, len(prompt), policy)
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    return ids
