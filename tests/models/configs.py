"""A tiny random model of any class, from the configuration's own defaults with small numbers put in by name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

VOCABULARY = 97
# A few kinds of names suffice for hundreds of configurations: 4 query and 2 KV heads of size 16.
NAMES = {
    VOCABULARY: "audio_vocab_size decoder_vocab_size unpadded_vocab_size vocab_size vocab_size_per_layer_input",
    512: "context_length max_position_embeddings max_seq_len max_target_positions model_max_length n_ctx n_positions",
    32: "image_size max_source_positions",
    64: """
        adapter_in_dim adapter_input_size adapter_out_dim backbone_hidden_size d_inner d_model decoder_ffn_dim
        dense_intermediate_size depthwise_separable_out_channel dff dim dim_ff downsample_hidden_size emb_dim
        embed_dim embedding_dim embedding_size encoder_ffn_dim expert_ffn_hidden_size ext_pw_out_channel
        feed_forward_size ffn_dim ffn_hidden_size hidden_dim hidden_size hidden_size_global input_embedding_size
        input_size intermediate_size intermediate_size_mlp lru_width mlp_dim moe_intermediate_size
        moe_shared_expert_intermediate_size n_embd n_inner nemo_conv_channels out_hidden_size output_embedding_size
        ple_embed_dim projection_dim projector_hidden_size projector_input_dim projector_output_dim
        pronunciation_embed_dim router_hidden_size shape_embed_dim shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size text_hidden_size vision_output_dim
        word_embed_proj_dim
    """,
    128: "mamba_d_ssm",
    24: "attention_window_size keep_window_size local_attention sliding_window sliding_window_size",
    16: """
        adapter_rank attention_chunk_size attention_head_size centroid_intermediate_top_k chunk_size codebook_dim
        d_head d_rel dim_head gated_norm_rank global_head_dim hc_lowrank head_dim hidden_size_per_layer_input
        index_head_dim index_topk kv_channels kv_lora_rank laurel_rank linear_head_dim linear_key_head_dim
        linear_value_head_dim loop_gate_rank mamba_chunk_size mamba_d_head mamba_d_state mamba_head_dim o_lora_rank
        ple_dim position_bias_num_buckets q_lora_rank query_pre_attn_scalar rel_extent rotary_dim ssm_state_size
        state_size swa_head_dim v_head_dim
    """,
    8: """
        index_block_size latent_query_num mamba_n_heads mamba_num_heads num_mel_bins num_query_tokens patch_size
        qk_nope_head_dim qk_rope_head_dim
    """,
    4: """
        attention_heads conf_num_attention_heads decoder_attention_heads decoder_layers encoder_attention_heads
        encoder_layers index_n_heads linear_num_heads linear_num_value_heads mamba_d_conv mamba_dt_rank
        mm_tokens_per_image moe_num_experts n_head n_heads n_routed_experts num_attention_heads
        num_decoder_attention_heads num_decoder_layers num_encoder_attention_heads num_encoder_layers num_experts
        num_heads num_local_experts num_query_groups ple_conv_kernel_size swa_num_attention_heads time_step_rank
        zero_expert_num
    """,
    2: """
        conf_num_hidden_layers depth index_topk_blocks kv_n_heads linear_num_key_heads moe_k moe_top_k moe_topk
        n_mamba_heads num_experts_per_tok num_experts_per_token num_global_layers num_key_value_heads num_kv_heads
        num_kv_shared_layers swa_num_key_value_heads
    """,
    1: """
        first_k_dense_replace mamba_n_groups mamba_ngroups moe_num_shared_experts n_group n_groups n_shared_experts
        num_dense_layers num_expert_group num_shared_experts topk_group
    """,
}
SIZES: dict[str, int] = {name: size for size, names in NAMES.items() for name in names.split()}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "depth")
MIXED = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
MLP = ["dense", "sparse", "sparse", "sparse"]
SHARED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
# What the defaults do not tell, by model type.
CHANGES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]} for kind in MIXED
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": MIXED,
    },
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "gemma3n_text": SHARED | {"intermediate_size": 64, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": SHARED,
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]], "spatial_target_layers": []},
    "granitemoehybrid": {"layer_types": HYBRID, "mamba_d_head": 16},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_vision_model": {"intermediate_size": 256},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mllama_text_model": {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 2], "vision_output_dim": 192},
    # Its masks know nothing of the window that its cache has.
    "moshi": {"sliding_window": 512},
    "qwen3_omni_moe_text": {"sliding_window": None},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 81},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 81},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # Nor do the masks of these know of one.
    "qwen3_vl_moe_text": {"sliding_window": None},
    "reformer": {"axial_pos_embds": False},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "depths": [1] * 7},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# Parts that are not there by default.
BASES: dict[str, dict[str, Any]] = {"gemma4": {"vision_config": {"model_type": "gemma4_vision"}}}
PICTURE_TOKENS = ("image_token_id", "image_token_index", "audio_token_id")
# The sections of these are a default of the model, not of the configuration.
MROPE = (
    "ernie4_5_vl_moe_text",
    "glm4v_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "hunyuan_vl",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)
# Where rounding grows: layers that run many times over, or states that decode otherwise than they are read at once.
CALM = dict.fromkeys(
    ("hrm_text", "nemotron_h", "qwen3_5", "qwen3_5_moe", "recurrent_gemma", "zamba", "zamba2"),
    0.1,
)


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Build a small configuration of a class."""
    return kind(**_small(kind(**BASES.get(kind.model_type, {})), {}))


def _small(config: PreTrainedConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """Return the fields of a configuration that are to be small, sub-configurations included."""
    values = config.to_dict()
    small = {name: size for name, size in SIZES.items() if name in values and _is_number(values[name])}
    small |= _fewer_layers(values) | _heads_and_rotation(config, values, small) | _special_tokens(values, tokens)
    small |= {
        name: [SIZES[name]] * 2 for name in ("image_size", "patch_size") if isinstance(values.get(name), (list, tuple))
    }
    small |= {name: value for name, value in {"is_decoder": True, "initializer_range": 0.3}.items() if name in values}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _small(value, tokens) | ({"model_type": value.model_type} if value.model_type else {})
    return small | CHANGES.get(config.model_type, {})


def _fewer_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the depth, and what lists say of each layer that is left."""
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == depth > 1 and isinstance(value[0], (int, float, str))
    }
    layers = _some_layers(list(lists.values()), depth)
    small: dict[str, Any] = {name: [value[layer] for layer in layers] for name, value in lists.items()}
    return small | {name: len(layers) for name in DEPTHS if values.get(name) == depth}


def _heads_and_rotation(config: PreTrainedConfig, values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Return sizes of heads and sections of rotary embeddings that go together."""
    found: dict[str, Any] = {}
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        # Latents are expanded to all heads.
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    if "qk_rope_head_dim" in values and "head_dim" in values:
        is_rotary_part = values["head_dim"] == values["qk_rope_head_dim"]
        found["head_dim"] = SIZES["qk_rope_head_dim" if is_rotary_part else "head_dim"]
    rope = values.get("rope_parameters") or {}
    if "mrope_section" in rope or config.model_type in MROPE:
        half = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        found["rope_parameters"] = rope | {"mrope_section": [half // 3, half // 3, half - 2 * (half // 3)]}
    return found


def _special_tokens(values: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """Return numbers out of the way of the text, the same for a name in all parts of a composite configuration."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_number = isinstance(value, int) and name.endswith(("token_id", "token_index"))
        if name in PICTURE_TOKENS or (is_number and value >= VOCABULARY):
            found[name] = tokens.setdefault(name, VOCABULARY - 1 - len(tokens))
    if isinstance(values.get("eos_token_id"), list):
        found["eos_token_id"] = 2
    return found | ({"pad_token_id": 0} if "pad_token_id" in values else {})


def _is_number(value: Any) -> bool:
    return value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool))


def _some_layers(lists: list[Any], depth: int) -> list[int]:
    """Choose at least 4 layers such that every combination of what lists say of a layer occurs."""
    seen: dict[str, int] = {}
    for layer in range(depth):
        seen.setdefault(repr([each[layer] for each in lists]), layer)
    first = list(seen.values())
    # Kinds alternate, so that something comes after every one of them.
    return first if len(first) > 3 else (first * 4)[:4] if len(first) != 3 else first * 2


def tiny_model(kind: type, config: PreTrainedConfig, seed: int = 0) -> Any:
    """Build a model in float32 whose attention is not flat; the same for the same seed."""
    torch.manual_seed(seed)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config(decoder=True)
    model = kind(config).eval()
    randomize(model, CALM.get(config.model_type, 0.3))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module, scale: float) -> None:
    """Make matrices large: many models ignore initializer_range."""
    for name, weight in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        is_matrix = weight.dim() >= 2 and "conv" not in name and last not in ("A_log", "D", "dt_bias")
        # Some are left as they came from memory.
        if is_matrix or last in ("sinks", "bias") or not weight.isfinite().all():
            weight.normal_(0, scale)
