"""Hugging Face transformers: a cache that stays true after eviction, and a context manager that puts it to work.

Three facts carry the whole file:

* A layer keeps how many tokens it has *seen* apart from how many it *stores*, and where the stored ones stood. So
  rotary positions, masks and the next `generate` call stay right after the cache has shrunk.
* transformers lets one register an attention function. Ours calls the model's own, then hands queries to the cache
  layer whose keys they met: no model class is patched and no projection computed twice.
* The mask of a layer is made from that layer's own positions, so layers may keep different tokens, and different
  numbers of them.

All state lives in the cache, so requests that share a model never touch each other.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..core import checks
from ..core.backend import Backend, load
from ..core.errors import ArgumentError, ArgumentTypeError, GraphKVError
from ..core.eviction import Eviction, evict
from ..core.policy import Policy

__all__ = ["EvictingCache", "EvictingLayer", "evicting", "observing"]

PREFIX = "graphkv_"


class EvictingLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one attention layer, which knows what it has seen and what of it is left.

    Attributes
    ----------
    keys, values : torch.Tensor, shape (batch, kv_heads, stored, D)
        What is stored.
    num_seen : int
        Tokens that have passed through, evicted ones included.
    positions : torch.Tensor, shape (batch, kv_heads, stored), int64, or None
        Where the stored tokens stood, ascending. None as long as nothing was evicted.
    queries : torch.Tensor, shape (batch, query_heads, Q, D), or None
        The last queries of the prefill, scaled such that q k / sqrt(D) is the attention logit. Kept only for a cache
        without a policy of its own.
    padding : torch.Tensor, shape (batch, seen), bool, or None
        False for padded tokens of the prefill. None without padding.
    eviction : Eviction or None
        What the policy decided.
    """

    keys: torch.Tensor
    values: torch.Tensor
    # Taking tokens back across an eviction is not defined.
    is_croppable = False

    def __init__(self, policy: Policy | None = None, num_queries: int = 0, backend: Backend | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.num_queries = num_queries
        self.backend = backend
        self.index = 0
        self.num_layers = 1
        self._forget()

    def _forget(self) -> None:
        self.num_seen = 0
        self.positions: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None
        self.eviction: Eviction | None = None
        self.is_prefilled = False
        self.awaits_queries = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and give all that is stored."""
        num_new = key_states.shape[-2]
        if self.positions is not None:
            new = torch.arange(self.num_seen, self.num_seen + num_new, device=self.positions.device)
            new = new.expand(*self.positions.shape[:-1], num_new)
            self.positions = torch.cat([self.positions, new], dim=-1)
        self.num_seen += num_new
        self.awaits_queries = True
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        # The attention function receives this very tensor, and so finds its way back to the layer.
        keys.graphkv_layer = weakref.ref(self)
        return keys, values

    def observe(self, module: torch.nn.Module, query: torch.Tensor, scaling: float | None, seen: _Visibility) -> None:
        """Take note of a finished attention: after the prefill, evict or keep the queries for later."""
        self.awaits_queries = False
        if self.is_prefilled:
            return
        self.is_prefilled = True
        self.index = int(cast("int", module.layer_idx))
        self.num_layers = int(cast("Any", module.config).num_hidden_layers)
        self.padding = seen.padding
        head_size = query.shape[-1]
        if scaling is not None and abs(scaling * sqrt(head_size) - 1) > 1e-6:
            query = query * (scaling * sqrt(head_size))
        if self.policy is None:
            self.queries = (
                query[:, :, max(0, query.shape[2] - self.num_queries) :].clone() if self.num_queries else None
            )
        else:
            self.queries = query
            self.evict(self.policy, backend=self.backend)
            self.queries = None

    def evict(self, policy: Policy, *, backend: Backend | None = None) -> Eviction:
        """Shrink to what the policy keeps.

        Parameters
        ----------
        policy : Policy
        backend : Backend, optional
            Who decides. Default: torch, on the cache's device.

        Returns
        -------
        Eviction
            In arrays of the backend.

        Raises
        ------
        ArgumentError
            If the layer has not seen a prompt, was evicted already, or has not kept the queries that the policy needs.
        """
        if not self.is_prefilled:
            raise ArgumentError("the cache must hold a prefilled prompt before it is evicted; layer has seen nothing")
        if self.eviction is not None:
            raise ArgumentError("the cache must not be evicted twice; evict a copy of the full cache instead")
        backend = backend or load("torch")
        wanted = policy.num_queries(self.num_seen)
        queries = None if self.queries is None or not wanted else self.queries[:, :, -wanted:]
        decision = evict(
            policy,
            _give(self.keys, backend),
            values=_give(self.values, backend),
            queries=None if queries is None else _give(queries, backend),
            layer=self.index,
            num_layers=self.num_layers,
            valid=None if self.padding is None else _give(self.padding, backend),
            backend=backend,
        )
        if decision.head_budgets is not None:
            raise ArgumentError(
                f"policy must keep equally many tokens in every head of a layer; {type(policy).__name__} does not, and "
                "one tensor per layer cannot hold that"
            )
        if decision.kept.shape[-1] < self.num_seen:
            # A copy, because some libraries hand out memory that must not be written to.
            kept = decision.kept if backend.library == "torch" else torch.tensor(backend.to_numpy(decision.kept))
            kept = kept.to(device=self.keys.device, dtype=torch.int64)
            self.keys = self.keys.gather(2, kept[..., None].expand(*kept.shape, self.keys.shape[-1]))
            self.values = self.values.gather(2, kept[..., None].expand(*kept.shape, self.values.shape[-1]))
            self.positions = kept
        self.eviction = decision
        return decision

    def get_seq_length(self, *args: Any) -> int:
        """Give the number of tokens seen: what positions and `generate` count by."""
        return self.num_seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Give the stored length with the new tokens, and how many tokens are missing before it."""
        # transformers before 5.4 hands over the positions of the new tokens instead of their number.
        num_new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        stored = self.num_stored
        return stored + num_new, self.num_seen - stored

    @property
    def num_stored(self) -> int:
        """Tokens per row that are stored."""
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys.numel() else 0

    @property
    def nbytes(self) -> int:
        """Bytes of stored keys and values."""
        return int(self.keys.nbytes + self.values.nbytes) if self.is_initialized else 0

    def copy(self) -> EvictingLayer:
        """Give a layer that goes its own way from here. Tensors are shared: no layer ever writes into one."""
        twin = EvictingLayer.__new__(EvictingLayer)
        twin.__dict__.update(self.__dict__)
        return twin

    def crop(self, *args: Any) -> None:
        """Refuse: an evicted cache cannot give tokens back."""
        raise GraphKVError("crop is not supported by EvictingCache: evicted tokens cannot be restored")

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow the beams, positions included."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._each_row(lambda x: x[indices.to(x.device)])

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("keys", "values", "positions", "queries", "padding"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                setattr(self, name, change(tensor))


class EvictingCache(Cache):  # type: ignore[misc]
    """A transformers cache whose layers can be evicted and stay true.

    It works under `evicting` or `observing`; there the model's attention tells it the queries.

    Parameters
    ----------
    policy : Policy, optional
        Evicts every layer once, right after its prefill attention. None: nothing is evicted until `evict` is called.
    num_queries : int
        Without a policy: how many of the prompt's last queries to keep for `evict`.
    backend : Backend or str, optional
        Who decides what is kept. Default: torch.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is out of range or of the wrong type.
    BackendError, BackendUnavailableError
        If the backend is unknown or not installed.
    """

    layers: list[EvictingLayer]

    def __init__(
        self, policy: Policy | None = None, *, num_queries: int = 0, backend: Backend | str | None = None
    ) -> None:
        super().__init__(layer_class_to_replicate=self._new_layer)
        self.policy = None if policy is None else _check_policy(policy)
        self.num_queries = checks.count("num_queries", num_queries)
        self.backend = load(backend) if isinstance(backend, str) else backend

    def _new_layer(self) -> EvictingLayer:
        return EvictingLayer(self.policy, self.num_queries, self.backend)

    def evict(self, policy: Policy, /, *, backend: Backend | str | None = None) -> None:
        """Shrink every layer to what the policy keeps; see `EvictingLayer.evict`."""
        _check_policy(policy)
        backend = load(backend) if isinstance(backend, str) else backend
        if not self.layers:
            raise ArgumentError("the cache must hold a prefilled prompt before it is evicted; it is empty")
        # Decide on a copy first, so that an error half-way leaves the cache as it was.
        twins = [layer.copy() for layer in self.layers]
        for twin in twins:
            twin.evict(policy, backend=backend)
        self.layers = twins

    def copy(self) -> EvictingCache:
        """Give an independent cache with the same contents, without copying tensors."""
        twin = EvictingCache(self.policy, num_queries=self.num_queries, backend=self.backend)
        twin.layers = [layer.copy() for layer in self.layers]
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.layers)


@contextmanager
def evicting(model: PreTrainedModel, policy: Policy, *, backend: Backend | str | None = None) -> Iterator[None]:
    """Evict the cache of every prompt that the model reads inside the block.

    ``model.generate(**inputs)`` and ``model(**inputs)`` run unchanged. Each layer attends to the full prompt, then
    keeps what the policy keeps; later tokens attend to that, at their true positions. The prompt must come in one
    forward call. Afterwards the model is as it was, also when an exception passes through.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose attention goes through transformers' attention interface, loaded with ``"sdpa"`` or ``"eager"``
        attention, all of its layers with full attention.
    policy : Policy
        For example ``GraphKV(SnapKV(budget=512))``.
    backend : Backend or str, optional
        Who decides what is kept. Default: torch, on the cache's device.

    Raises
    ------
    ArgumentError
        If the model cannot be evicted or a cache of another kind is passed to it.
    ArgumentTypeError
        If `policy` is no Policy or `model` no transformers model.

    Examples
    --------
    ::

        with evicting(model, GraphKV(SnapKV(budget=512))):
            output = model.generate(**inputs, max_new_tokens=64)
    """
    _check_policy(policy)
    EvictingCache(policy, backend=backend)  # bad arguments are said here, not in the middle of a forward pass

    def supply_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = call.arguments.get("past_key_values")
        if isinstance(given, EvictingCache):
            return None
        uses_cache = call.arguments.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(model.config, "use_cache", True)
        if given is None and not uses_cache:
            return None
        if given is not None and (type(given) is not DynamicCache or given.get_seq_length() > 0):
            raise ArgumentError(
                "past_key_values must be None, an empty DynamicCache or an EvictingCache inside evicting(); "
                f"got {type(given).__name__} with {given.get_seq_length()} tokens"
            )
        call.arguments["past_key_values"] = EvictingCache(policy, backend=backend)
        # bind_partial files keyword arguments that forward does not name under the name of its ** parameter.
        return call.args, call.kwargs

    with observing(model):
        hook = model.register_forward_pre_hook(supply_cache, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention work with an `EvictingCache` that is passed to it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `evicting`.

    Raises
    ------
    ArgumentError
        If the model cannot be evicted.
    ArgumentTypeError
        If `model` is no transformers model.

    Examples
    --------
    Read a prompt once, then evict copies of its cache::

        with observing(model):
            cache = EvictingCache(num_queries=32)
            model(**inputs, past_key_values=cache)
            small = cache.copy()
            small.evict(SnapKV(budget=512))
    """
    implementation = _check_model(model)
    model.set_attn_implementation(PREFIX + implementation)
    hook = model.register_forward_hook(_complain_about_unseen_queries, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(implementation)


@dataclass(frozen=True, kw_only=True)
class _Visibility:
    """Who may see whom, as transformers says it: by true positions. Stands in for the mask on its way to the layers."""

    mask_function: Callable[..., Any]
    padding: torch.Tensor | None

    def mask(self, layer: EvictingLayer | None, query: torch.Tensor, key: torch.Tensor, spell_out: bool) -> Any:
        """Give a bool mask (batch or 1, query_heads or 1, Q, stored), or None where attention needs none."""
        num_new, stored, device = query.shape[2], key.shape[2], key.device
        seen = stored if layer is None else layer.num_seen
        positions = None if layer is None else layer.positions
        is_plain = self.padding is None and self.mask_function is causal_mask_function
        if is_plain and (num_new == 1 or (num_new == stored and not spell_out)):
            return None
        query_at = torch.arange(seen - num_new, seen, device=device)[None, None, :, None]
        if positions is None or is_plain:
            # New tokens come last and see all that is stored before them, wherever it stood.
            key_at = torch.arange(seen - stored, seen, device=device)[None, None, None, :]
        else:
            key_at = positions[:, :, None, :]
        row = torch.arange(query.shape[0], device=device)[:, None, None, None]
        visible = self.mask_function(row, torch.zeros_like(row), query_at, key_at)
        if self.padding is not None:
            visible = visible & self.padding[row, key_at]
            # A padded query sees nothing; let it see itself, so that softmax has something to share out.
            visible = visible | (key_at == query_at)
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
        return visible


def _visibility(
    *, mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Any = None, **_: Any
) -> _Visibility:
    """Stand in for the mask functions of transformers, see AttentionMaskInterface."""
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    return _Visibility(mask_function=mask_function, padding=attention_mask.bool() if has_padding else None)


def _attention(implementation: str) -> Callable[..., Any]:
    """Wrap one attention function of transformers, see AttentionInterface."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None:
            attention_mask = _Visibility(mask_function=causal_mask_function, padding=None)
        if not isinstance(attention_mask, _Visibility):
            raise ArgumentError(
                "attention_mask must be None or of shape (batch, tokens) inside evicting(); got a mask of shape "
                f"{tuple(attention_mask.shape)}"
            )
        layer = getattr(key, "graphkv_layer", lambda: None)()
        mask = attention_mask.mask(layer, query, key, implementation == "eager")
        if implementation == "eager":
            # Every model file has an eager function of its own; transformers falls back to it by name.
            attend_as_before = sys.modules[type(module).__module__].eager_attention_forward
            if mask is not None:
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
        else:
            attend_as_before = AttentionInterface()[implementation]
        result = attend_as_before(module, query, key, value, mask, scaling=scaling, **kwargs)
        if layer is not None:
            layer.observe(module, query, scaling, attention_mask)
        return result

    return attend


for _implementation in ("sdpa", "eager"):
    AttentionInterface.register(PREFIX + _implementation, _attention(_implementation))
    AttentionMaskInterface.register(PREFIX + _implementation, _visibility)


def _complain_about_unseen_queries(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Fail loudly where a model would otherwise run with a cache that silently never evicts."""
    cache = getattr(output, "past_key_values", None)
    if isinstance(cache, EvictingCache) and any(layer.awaits_queries for layer in cache.layers):
        raise ArgumentError(
            f"{type(module).__name__} does not hand its cached keys to the attention function; it cannot be evicted"
        )


def _check_policy(policy: Any) -> Policy:
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(f"policy must be a graphkv Policy; got {type(policy).__name__}")
    return policy


def _check_model(model: Any) -> str:
    """Give the attention implementation of a model that can be evicted, or say why it cannot."""
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}")
    name, config = type(model).__name__, model.config
    implementation = str(config._attn_implementation)
    if implementation.startswith(PREFIX):
        raise ArgumentError(f"model must not be inside evicting() or observing() already; {name} is")
    if implementation not in ("sdpa", "eager"):
        raise ArgumentError(
            f"model must be loaded with attn_implementation 'sdpa' or 'eager'; {name} has {implementation!r}"
        )
    if config.is_encoder_decoder:
        raise ArgumentError(f"model must be a decoder; {name} is an encoder-decoder")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ArgumentError(f"model must have full attention in every layer; {name} has {sorted(kinds)}")
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        raise ArgumentError(f"model must have full attention; {name} has a sliding window of {config.sliding_window}")
    has_eager = implementation != "eager" or hasattr(sys.modules[type(model).__module__], "eager_attention_forward")
    if not (model._can_set_attn_implementation() and has_eager):
        raise ArgumentError(f"model must use transformers' attention interface; {name} does not")
    return implementation


def _give(tensor: torch.Tensor, backend: Backend) -> Any:
    """Hand a tensor to the backend that decides."""
    tensor = tensor.detach()
    if backend.library == "torch":
        return tensor
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return backend.xp.asarray(tensor.cpu().numpy())
