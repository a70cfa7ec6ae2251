"""The attention and mask functions that are registered with transformers.

A model runs under them with ``attn_implementation="graphkv_sdpa"`` or ``"graphkv_eager"``. They call the functions
of the same name without prefix, with masks from the true positions of what each layer stores. With other caches than
ours they change nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ...core.errors import ArgumentError
from . import versions
from .cache import met_by, not_compiled
from .layer import EvictingLayer, Source

__all__ = ["IMPLEMENTATIONS", "PREFIX"]

PREFIX = "graphkv_"
IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """Who may see whom, as transformers says it: by true positions. Stands in for the mask on its way to the layers."""

    mask_function: Callable[..., Any]
    padding: torch.Tensor | None
    arguments: Mapping[str, Any]

    def mask(self, layer: EvictingLayer | None, query: torch.Tensor, key: torch.Tensor, spell_out: bool) -> Any:
        """Give a bool mask (batch or 1, query_heads or 1, Q, stored), or None where attention needs none."""
        num_new, stored, device = query.shape[2], key.shape[2], key.device
        if layer is not None:
            first, first_key, valid = layer.num_seen - num_new, layer.num_seen - stored, layer.valid
            positions = layer.positions
        else:
            first = versions.first_query(dict(self.arguments)) if self.arguments else stored - num_new
            first_key, positions = self.arguments.get("kv_offset", 0), None
            valid = self._columns(first_key, stored)
        is_plain = valid is None and self.mask_function is causal_mask_function
        is_last = first_key + stored == first + num_new
        if is_plain and is_last and (num_new == 1 or (num_new == stored and not spell_out)):
            return None
        query_at = torch.arange(first, first + num_new, device=device)[None, None, :, None]
        if positions is None or is_plain:
            # New tokens come last and see all that is stored before them, wherever it stood.
            key_at = torch.arange(first_key, first_key + stored, device=device)[None, None, None, :]
        else:
            key_at = positions[:, :, None, :]
        row = torch.arange(query.shape[0], device=device)[:, None, None, None]
        visible = self.mask_function(row, torch.zeros_like(row), query_at, key_at)
        if valid is not None:
            visible = visible & valid[:, :, None, :]
            # A padded query sees nothing; let it see itself, so that softmax has something to share out.
            visible = visible | (key_at == query_at)
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
        return visible

    def _columns(self, first: int, stored: int) -> torch.Tensor | None:
        """Cut the padding mask to the slots of another kind of cache; what it does not speak of is not there."""
        if self.padding is None:
            return None
        lack = max(0, first + stored - self.padding.shape[1])
        return torch.nn.functional.pad(self.padding, (0, lack))[:, None, first : first + stored]


def _visibility(
    *, mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Any = None, **arguments: Any
) -> Visibility:
    """Stand in for the mask functions of transformers, see AttentionMaskInterface."""
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    padding = attention_mask.bool() if has_padding else None
    return Visibility(mask_function=mask_function, padding=padding, arguments=arguments)


def _source_of(module: Any, query: torch.Tensor, key: torch.Tensor) -> Source:
    """Say where keys come from, and whether all heads are here."""
    config, query_heads = module.config, query.shape[1]
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Source(
        kind=type(module),
        config=config,
        index=int(module.layer_idx),
        # Plans that gather the projections leave all heads everywhere, so the number of processes says nothing.
        has_all_heads=not is_distributed or query_heads == config.num_attention_heads,
        has_whole_groups=query_heads == key.shape[1] * getattr(module, "num_key_value_groups", 1),
    )


def _attention(implementation: str) -> Callable[..., Any]:
    """Wrap one attention function of transformers, see AttentionInterface."""

    @not_compiled
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        # The sixth by position, because kvpress passes it so to every function that it finds registered.
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None:
            attention_mask = Visibility(mask_function=causal_mask_function, padding=None, arguments={})
        if not isinstance(attention_mask, Visibility):
            raise ArgumentError(
                f"attention_mask must be None or of shape (batch, tokens) under {PREFIX}{implementation}; got a mask "
                f"of shape {tuple(attention_mask.shape)}"
            )
        cache, layer = met_by(key)
        if layer is not None:
            layer.admit(attention_mask.padding, query.shape[2])
        mask = attention_mask.mask(layer, query, key, implementation == "eager")
        if implementation == "eager":
            # Every model file has an eager function of its own; transformers falls back to it by name.
            attend_as_before = sys.modules[type(module).__module__].eager_attention_forward
            if mask is not None:
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
        else:
            attend_as_before = AttentionInterface()[implementation]
        result = attend_as_before(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        if cache is not None and layer is not None:
            kinds = set(getattr(module.config, "layer_types", None) or ())
            layer.observe(_source_of(module, query, key), query, scaling, kwargs.get("sliding_window"), len(kinds) > 1)
            layer.locate(module, query.shape[2])
            cache.after_layer(layer)
        return result

    return attend


for _implementation in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _implementation, _attention(_implementation))
    AttentionMaskInterface.register(PREFIX + _implementation, _visibility)
