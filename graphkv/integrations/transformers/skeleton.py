"""How a model turns its keys, from its configuration alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...core.errors import ArgumentError
from . import rotary, versions
from .cache import EvictingCache
from .models import observing

__all__ = ["rotations"]

# What makes a model large and has no say in how a key is turned.
SMALL = {
    "hidden_size": None,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rotations(config: Any) -> tuple[rotary.Rotation, ...]:
    """Look at how each layer turns its keys, in a model of the same kind with one head and a few weights.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model. It is not changed.

    Returns
    -------
    tuple of Rotation
        One per layer that caches keys of the text.

    Raises
    ------
    ArgumentError
        If no small model can be made of the configuration, or a layer turns its keys in a way that cannot be undone.
    """
    config = copy.deepcopy(config.get_text_config(decoder=True))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in (SMALL | {"hidden_size": head_size, "head_dim": head_size}).items():
        if hasattr(config, name) or name == "head_dim":
            setattr(config, name, value)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with observing(model):
                cache = EvictingCache(rerotate=True, config=config)
                model(torch.arange(4)[None], **versions.with_cache(model, cache))
    except ArgumentError:
        raise
    # A configuration of any model may come, with any demands on its sizes.
    except Exception as error:
        raise ArgumentError(
            f"config must be of a model that a copy with one head can be made of; that of "
            f"{type(config).__name__} fails, {type(error).__name__}: {error}"
        ) from error
    found = []
    for layer in cache.attention_layers:
        places = None if layer.slots.places is None else layer.slots.places
        found.append(rotary.check(layer.rotation, places))
    return tuple(found)
