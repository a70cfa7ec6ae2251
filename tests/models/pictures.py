"""A picture, or a sound, for tiny composite models: the inputs beside the tokens, for a batch of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
SIDE = 32


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def square(config: Any) -> Inputs:
    """One picture a row, (batch, 3, side, side)."""
    return {"pixel_values": _noise(2, 3, SIDE, SIDE)}


def asked(config: Any) -> Inputs:
    """As `square`, with a question to the Q-former."""
    return square(config) | {"qformer_input_ids": torch.full((2, 4), 5)}


def sized(config: Any) -> Inputs:
    """As `square`, with the size that padding left."""
    return square(config) | {"image_sizes": torch.tensor([[SIDE, SIDE]] * 2)}


def tiled(config: Any) -> Inputs:
    """An overview and two tiles of each picture, with its size."""
    return {"pixel_values": _noise(2, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * 2)}


def several(config: Any) -> Inputs:
    """A list of pictures per row, which holds one."""
    return {"pixel_values": _noise(2, 1, 3, SIDE, SIDE)}


def patches(config: Any) -> Inputs:
    """All patches of all pictures in one list, with the grid that each picture makes: one tall, one wide."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    size = channels * (getattr(vision, "temporal_patch_size", None) or 1) * vision.patch_size**2
    return {"pixel_values": _noise(32, size), "image_grid_thw": torch.tensor([[1, 8, 2], [1, 2, 8]])}


def placed(config: Any) -> Inputs:
    """Patches of each picture with their coordinates."""
    vision = config.vision_config
    side = 2 * vision.pooling_kernel_size
    where = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1).reshape(1, -1, 2)
    pixels = _noise(2, side * side, 3 * vision.patch_size**2).sigmoid()
    return {"pixel_values": pixels, "image_position_ids": where.repeat(2, 1, 1)}


def crossed(config: Any) -> Inputs:
    """Tiles that text reads by cross-attention, from the fifth token on."""
    tiles = config.vision_config.max_num_tiles
    return {
        "pixel_values": _noise(2, 1, tiles, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.full((2, 1), 6, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.int64),
    }


def mel(config: Any) -> Inputs:
    """A spectrogram per row, as long as the encoder wants it."""
    audio = config.audio_config
    return {"input_features": _noise(2, audio.num_mel_bins, 2 * audio.max_source_positions)}


def masked_mel(config: Any) -> Inputs:
    """As `mel`, with the frames that are there."""
    found = mel(config)
    return found | {"feature_attention_mask": torch.ones(2, found["input_features"].shape[-1], dtype=torch.int64)}


PICTURES: dict[str, Callable[[Any], Inputs]] = {
    "aria": square,
    "aya_vision": square,
    "blip-2": square,
    "cohere2_vision": square,
    "gemma3": square,
    "gemma4": placed,
    "glm4v": patches,
    "glm4v_moe": patches,
    "glm_ocr": patches,
    "idefics2": several,
    "idefics3": several,
    "instructblip": asked,
    "internvl": square,
    "kosmos-2": square,
    "lighton_ocr": sized,
    "llama4": square,
    "llava": square,
    "llava_next": tiled,
    "llava_onevision": tiled,
    "mistral3": sized,
    "mllama": crossed,
    "ovis2": square,
    "paligemma": square,
    "qwen2_5_vl": patches,
    "qwen2_audio": masked_mel,
    "qwen2_vl": patches,
    "qwen3_5": patches,
    "qwen3_5_moe": patches,
    "qwen3_vl": patches,
    "qwen3_vl_moe": patches,
    "smolvlm": several,
    "vipllava": square,
    "voxtral": mel,
}  # fmt: skip


def num_tokens(model: Any, extra: Inputs) -> int:
    """Return how many tokens of the text stand for the picture or the sound of a row."""
    config = model.config
    if config.model_type == "mllama":
        return 0
    if config.model_type in ("blip-2", "instructblip"):
        return int(config.num_query_tokens)
    if config.model_type == "kosmos-2":
        return int(config.latent_query_num)
    if config.model_type == "qwen2_audio":
        return extra["input_features"].shape[-1] // 4
    inner = model if hasattr(model, "get_image_features") or hasattr(model, "get_audio_features") else model.model
    give = getattr(inner, "get_audio_features" if "input_features" in extra else "get_image_features")
    with torch.inference_mode():
        found = give(**extra)
    if not isinstance(found, (torch.Tensor, list, tuple)):
        found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    if isinstance(found, (list, tuple)):
        return sum(each.reshape(-1, each.shape[-1]).shape[0] for each in found) // 2
    return found.reshape(-1, found.shape[-1]).shape[0] // 2


def token_of(config: Any) -> int:
    """Return the token that stands for pictures or sounds."""
    names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    return next((int(getattr(config, name)) for name in names if isinstance(getattr(config, name, None), int)), 1)
