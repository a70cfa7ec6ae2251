"""Turning cached keys to other positions, by the model's own rotary embedding."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from ...core.errors import ArgumentError

__all__ = ["turn"]

# Their frequencies depend on the length of the text, so a turn has no fixed angle.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def turn(keys: torch.Tensor, steps: torch.Tensor, kind: type | None, config: Any, layer: int) -> torch.Tensor:
    """Rotate keys on by a number of positions.

    Rotations add up, so a key at position p turned by s is the key at position p + s.

    Parameters
    ----------
    keys : torch.Tensor, shape (batch, kv_heads, N, D)
        After the rotary embedding.
    steps : torch.Tensor, shape (batch, kv_heads, N), integer
        May be negative.
    kind : type or None
        Class of the attention module that the keys come from. None, after loading without a model, is refused.
    config : transformers.PreTrainedConfig
        Its configuration.
    layer : int
        Which layer it is.

    Returns
    -------
    torch.Tensor, shape (batch, kv_heads, N, D)
        In the dtype of the keys; computed in float32 at least.
    """
    if kind is None:
        raise ArgumentError(
            "turning keys needs the model; pass it to EvictingCache.load, or let it read on before the next eviction"
        )
    rotary, apply, layer_type = _rotary(kind, config, layer)
    rotary = rotary.to(keys.device)
    rows = keys.shape[0] * keys.shape[1]
    flat = keys.reshape(rows, 1, *keys.shape[2:])
    wide = flat if flat.dtype == torch.float64 else flat.float()
    cos, sin = rotary(wide, steps.reshape(rows, -1), *([layer_type] if layer_type else []))
    # YaRN scales what it rotates; here it has been scaled already.
    scaling = float(getattr(rotary, f"{layer_type}_attention_scaling" if layer_type else "attention_scaling", 1.0))
    _, turned = apply(wide, wide, cos / scaling, sin / scaling)
    result: torch.Tensor = turned.to(keys.dtype).reshape(keys.shape)
    return result


def _rotary(kind: type, config: Any, layer: int) -> tuple[Any, Any, str | None]:
    """Build the rotary embedding of an attention module; give it with its function and the kind of the layer."""
    names = vars(sys.modules[kind.__module__])
    kinds = {
        each
        for name, each in names.items()
        if name.endswith("RotaryEmbedding") and isinstance(each, type) and "Vision" not in name
    }
    apply = names.get("apply_rotary_pos_emb")
    if len(kinds) != 1 or apply is None:
        raise ArgumentError(
            f"turning keys needs a model with one rotary embedding; that of {kind.__name__} has {len(kinds)}"
        )
    rotary = kinds.pop()(config=config)
    takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
    layer_type = str(config.layer_types[layer]) if takes_type else None
    rope = rotary.rope_type[layer_type] if layer_type else rotary.rope_type
    if rope in LENGTH_DEPENDENT:
        raise ArgumentError(f"turning keys needs rotary frequencies that do not depend on the length; got {rope!r}")
    return rotary, apply, layer_type
