"""What a model must say after evictions, recomputed from its own code: one pass over the whole text, no evicted cache.

The text goes through the model in one forward call, with the model's own masks and its own attention function. In every
layer whose keys went through the cache, those masks are narrowed: each query sees what was left for it, by a replay of
the calls in which a cache would have read the text. graphkv is asked for nothing but the decisions (`graphkv.evict`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from graphkv import evict

NAME = "sweep_recomputed"
WITHOUT_KEYS = {"conv", "linear_attention", "mlp", "moe", "recurrent"}


class Recomputed:
    """Attention over what is left for each query, in a batch of left-padded rows read in calls of given lengths."""

    def __init__(self, policy: Any, calls: list[int], every: int | None, pads: list[int]) -> None:
        self.policy, self.calls, self.every, self.pads = policy, calls, every, pads
        self.implementation = "sdpa"
        # The layer that a tensor of keys went through, by the tensor's identity.
        self.owners: dict[int, int] = {}
        self.left: dict[int, torch.Tensor] = {}
        self.kept: dict[int, list[list[list[int]]]] = {}
        self.evicted: set[int] = set()
        self.alive: list[torch.Tensor] = []

    def attend(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        """Stand in for an attention function, see AttentionInterface."""
        # Keys of a picture that text reads by cross-attention are cached too.
        layer = self.owners.get(id(key)) if key.shape[2] == query.shape[2] else None
        if layer is not None:
            if layer not in self.left:
                self.left[layer] = self._replay(module, layer, query, key, value, attention_mask, kwargs.get("scaling"))
            left = self.left[layer].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            lowest = torch.finfo(query.dtype).min
            narrowed = torch.zeros(left.shape, dtype=query.dtype).masked_fill(~left, lowest)
            if attention_mask is not None:
                narrowed = torch.where(left, attention_mask[..., : key.shape[-2]], lowest)
            attention_mask = narrowed
        if self.implementation == "eager":
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        else:
            function = AttentionInterface()[self.implementation]
        return function(module, query, key, value, attention_mask, **kwargs)

    def _replay(
        self, module: Any, layer: int, query: Any, key: Any, value: Any, mask: Any, scaling: float | None
    ) -> torch.Tensor:
        """Return which positions are left for which query, bool (batch, kv_heads, queries, positions)."""
        batch, kv_heads, count, size = key.shape
        window = self._window(mask)
        kinds = set(getattr(module.config, "layer_types", None) or ()) - WITHOUT_KEYS
        # Where layers of several kinds attend, those that see no further than a window are left alone.
        evicts = self.policy is not None and (window is None or len(kinds) < 2)
        query = query if scaling is None else query * (scaling * size**0.5)
        left = torch.zeros(batch, kv_heads, count, count, dtype=torch.bool)
        self.kept[layer] = []
        for row in range(batch):
            one = slice(row, row + 1)
            stored = self._replay_row(
                self.policy if evicts else None,
                layer,
                max(int(module.config.num_hidden_layers), layer + 1),
                query[one], key[one], value[one], self.pads[row], window, left[row],
            )  # fmt: skip
            self.kept[layer].append(stored)
        return left

    def _window(self, mask: Any) -> int | None:
        """Read off the model's own mask how far back the last query of the first row sees, if not to the beginning."""
        if mask is None:
            return None
        visible = mask[0, 0, -1] > torch.finfo(mask.dtype).min / 2
        first = int(visible.nonzero()[0])
        return None if first <= self.pads[0] else visible.shape[0] - first

    def _replay_row(
        self,
        policy: Any,
        layer: int,
        num_layers: int,
        query: Any,
        key: Any,
        value: Any,
        pad: int,
        window: Any,
        left: Any,
    ) -> list[list[int]]:
        kv_heads = key.shape[1]
        stored: list[list[int]] = [[] for _ in range(kv_heads)]
        seen = since = carried = 0
        evicted = False
        for length in self.calls:
            stored = [row + list(range(seen, seen + length)) for row in stored]
            for head, row in enumerate(stored):
                # Causality is the model's own mask's; a padded query is of no consequence.
                left[head, seen : seen + length, row] = True
            seen, since = seen + length, since + length
            if policy is None or (evicted and (self.every is None or since < self.every)):
                continue
            index = torch.tensor(stored)
            valid = index >= pad
            if window is not None:
                valid &= index > seen - window
            width = index.shape[1]
            # Queries reach back across an eviction as far as tokens are kept for sure.
            wanted = min(policy.num_queries(width), carried + since, width)
            heads = torch.arange(kv_heads)[:, None]
            decision = evict(
                policy,
                key[0][heads, index][None].float().numpy(),
                values=value[0][heads, index][None].float().numpy(),
                queries=query[:, :, seen - wanted : seen].float().numpy() if wanted else None,
                layer=layer,
                num_layers=num_layers,
                valid=valid[None].numpy(),
                tokens_seen=seen,
            )
            evicted, since = True, 0
            self.evicted.add(layer)
            protected = policy.protection(decision.budget).count
            carried = protected if protected <= decision.budget else 0
            stored = [[int(index[head, slot]) for slot in row] for head, row in enumerate(decision.kept[0].tolist())]
        return stored

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Run a model under this attention, and take note of which keys went through its cache."""
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        update = Cache.update

        def noted(cache: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            result = update(cache, keys, values, layer, *args, **kwargs)
            self.owners[id(result[0])] = layer
            # As long as it lives nobody else has its identity.
            self.alive.append(result[0])
            return result

        Cache.update = noted  # type: ignore[method-assign]
        # Towers run as they are.
        self.implementation = str(model.config._attn_implementation)
        configs = [model.config, model.config.get_text_config(decoder=True)]
        before = [each._attn_implementation for each in configs]
        try:
            for each in configs:
                each._attn_implementation_internal = NAME
            yield
        finally:
            Cache.update = update  # type: ignore[method-assign]
            for each, name in zip(configs, before, strict=True):
                each._attn_implementation_internal = name


@torch.inference_mode()
def recompute(
    model: Any, inputs: dict[str, Any], policy: Any, calls: list[int], every: int | None, pads: list[int]
) -> tuple[torch.Tensor, Recomputed]:
    """Return the logits of all tokens (batch, tokens, vocabulary), and what was left at the end."""
    way = Recomputed(policy, calls, every, pads)
    with way.watching(model):
        logits = model(**inputs, use_cache=True).logits
    return logits, way
