"""Context managers that let a model work with an `EvictingCache`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...core import checks
from ...core.backend import Backend
from ...core.errors import ArgumentError, ArgumentTypeError
from ...core.policy import Policy
from .attention import IMPLEMENTATIONS, PREFIX
from .cache import EvictingCache

__all__ = ["evicting", "observing"]


@contextmanager
def evicting(
    model: PreTrainedModel,
    policy: Policy,
    *,
    every: int | None = None,
    rerotate: bool = False,
    record: bool = False,
    backend: Backend | str | None = None,
) -> Iterator[None]:
    """Evict the cache of every prompt that the model reads inside the block.

    ``model.generate(**inputs)`` and ``model(**inputs)`` run unchanged. Each layer attends to the full prompt, then
    keeps what the policy keeps; later tokens attend to that, at their true positions. Afterwards the model is as it
    was, also when an exception passes through.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose attention goes through transformers' attention interface, loaded with ``"sdpa"`` or ``"eager"``
        attention. Where full and sliding-window layers are mixed, the full ones are evicted.
    policy : Policy
        For example ``GraphKV(SnapKV(budget=512))``.
    every, rerotate, record, backend
        As for `EvictingCache`, which every call without a cache of its own gets.

    Raises
    ------
    ArgumentError
        If the model cannot be evicted, or a cache of another kind or with another policy is passed to it.
    ArgumentTypeError
        If `policy` is no Policy or `model` no transformers model.

    Examples
    --------
    ::

        with evicting(model, GraphKV(SnapKV(budget=512))):
            output = model.generate(**inputs, max_new_tokens=64)
    """
    checks.instance("policy", policy, Policy)

    def new_cache() -> EvictingCache:
        return EvictingCache(policy, every=every, rerotate=rerotate, record=record, backend=backend)

    new_cache()  # bad arguments are said here, not in the middle of a forward pass

    def supply_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = call.arguments.get("past_key_values")
        if isinstance(given, EvictingCache):
            if given.policy != policy:
                raise ArgumentError(
                    f"past_key_values must have the policy of evicting(), {policy}; its own is {given.policy}"
                )
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
        call.arguments["past_key_values"] = new_cache()
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

    For a model that always runs so, ``model.set_attn_implementation("graphkv_sdpa")`` does the same for good.

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
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _check_model(model: Any) -> str:
    """Give the attention implementation of a model that can be evicted, or say why it cannot."""
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}")
    name, config = type(model).__name__, model.config
    implementation = str(config._attn_implementation)
    if implementation.startswith(PREFIX):
        raise ArgumentError(f"model must not be inside evicting() or observing() already; {name} is")
    if implementation not in IMPLEMENTATIONS:
        raise ArgumentError(
            f"model must be loaded with attn_implementation 'sdpa' or 'eager'; {name} has {implementation!r}"
        )
    if config.is_encoder_decoder:
        raise ArgumentError(f"model must be a decoder; {name} is an encoder-decoder")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ArgumentError(f"model must have full or sliding attention in every layer; {name} has {sorted(kinds)}")
    has_eager = implementation != "eager" or hasattr(sys.modules[type(model).__module__], "eager_attention_forward")
    if not (model._can_set_attn_implementation() and has_eager):
        raise ArgumentError(f"model must use transformers' attention interface; {name} does not")
    return implementation
