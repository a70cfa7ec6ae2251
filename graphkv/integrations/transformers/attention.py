"""The attention and mask functions that are registered with transformers.

A model runs under them with ``attn_implementation="graphkv_sdpa"`` or ``"graphkv_eager"``. They call the functions
of the same name without prefix, with masks from the true positions of what each layer stores. Attention whose keys no
`EvictingCache` handed out, such as that of a vision tower or with another cache, gets exactly what it came with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...core.errors import ArgumentError
from . import versions
from .cache import not_compiled
from .handout import Handout, handed_out, refuse_hidden_keys
from .masks import Mask, columns, layer_mask, mask_maker, new_tokens_shown
from .source import Source

__all__ = ["IMPLEMENTATIONS", "PREFIX", "WITHOUT_CACHE"]

PREFIX = "graphkv_"
IMPLEMENTATIONS = ("sdpa", "eager")

ATTENTION: Any = AttentionInterface()

# Callbacks for attention without an EvictingCache, by the identity of its configuration.
WITHOUT_CACHE: dict[int, Callable[[torch.nn.Module], None]] = {}


def _attention(implementation: str) -> Callable[..., Any]:
    """Wrap one attention function of transformers, see AttentionInterface."""

    @not_compiled
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        function: Any = ATTENTION["sdpa"] if implementation == "sdpa" else _eager_function(module)
        if len(args) == 1 and ("scaling" in kwargs or "scaling" not in inspect.signature(function).parameters):
            # kvpress wraps every function that it finds registered, and hands on the dropout by place; eager functions
            # have the scaling there, or nothing.
            kwargs["dropout"] = args[0]
            args = ()

        def attend_as_before(*tensors: Any, **biases: torch.Tensor) -> Any:
            return function(module, *tensors, *args, **kwargs | biases)

        handout = handed_out(module, key, value)
        if isinstance(attention_mask, Mask) and attention_mask.was_used:
            # The model may have changed it, so its rule no longer holds.
            attention_mask = attention_mask.written
        if handout is None or not _is_self_attention(handout, module, query):
            if isinstance(attention_mask, Mask):
                attention_mask = attention_mask.written
            if handout is None:
                refuse_hidden_keys(module, key)
                take_note = WITHOUT_CACHE.get(id(getattr(module, "config", None)))
                if take_note is not None:
                    take_note(module)
            return attend_as_before(query, key, value, attention_mask)
        is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)

        # What some models add to the logits, by position.
        biases = {
            name: each
            for name, each in kwargs.items()
            if isinstance(each, torch.Tensor) and each.shape[-2:] == (query.shape[2], handout.num_seen)
        }

        def attend_to(
            handout: Handout,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            mask: Any,
            biases: dict[str, torch.Tensor],
        ) -> Any:
            if handout.is_open:
                shown = new_tokens_shown(mask, query.shape[2])
                handout.note_padding(mask.padding if isinstance(mask, Mask) else shown)
            answer = handout.answer(query, kwargs.get("scaling"))
            as_numbers = implementation == "eager" or answer is not None
            mask = layer_mask(mask, handout, query, is_causal=is_causal, as_numbers=as_numbers)
            biases = {
                name: each if handout.is_whole else columns(each, handout, query) for name, each in biases.items()
            }
            if answer is None:
                result = attend_as_before(query, key, value, mask, **biases)
            else:
                result = _with_answer(attend_as_before, query, key, value, mask, biases, *answer)
            if handout.is_open:
                source = _source_of(module, handout, query, key)
                handout.after_attention(module, source, query, kwargs.get("scaling"), _window(source, kwargs))
            return result

        num_guessed = handout.num_guessed
        if not num_guessed:
            return attend_to(handout, query, key, value, attention_mask, biases)
        # A prompt that comes with guesses of its continuation is evicted before the guesses look back at it.
        if isinstance(attention_mask, Mask):
            attention_mask = attention_mask.written
        prompt_mask = None if attention_mask is None else attention_mask[..., :-num_guessed, :-num_guessed]
        guess_mask = None if attention_mask is None else attention_mask[..., -num_guessed:, :]
        prompt = handout.without_guesses()
        first, _ = attend_to(
            prompt,
            query[:, :, :-num_guessed],
            key[:, :, :-num_guessed],
            value[:, :, :-num_guessed],
            prompt_mask,
            {name: each[..., :-num_guessed, :-num_guessed] for name, each in biases.items()},
        )
        guesses, key, value = prompt.with_guesses(key[:, :, -num_guessed:], value[:, :, -num_guessed:])
        biases = {name: each[..., -num_guessed:, :] for name, each in biases.items()}
        second, _ = attend_to(guesses, query[:, :, -num_guessed:], key, value, guess_mask, biases)
        return torch.cat([first, second], dim=1), None

    return attend


def _with_answer(
    attend: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    biases: Mapping[str, torch.Tensor],
    logits: torch.Tensor,
    values: torch.Tensor,
) -> Any:
    """Attend to slots of an answer too: keys of zero, whose logits are in the mask. So any kernel will do."""
    number, stored = values.shape[2], key.shape[2]
    shown = query.new_zeros(1) if mask is None else mask
    if shown.dtype == torch.bool:
        shown = torch.where(shown, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    mask = torch.cat([shown.expand(*query.shape[:3], stored), logits], dim=-1)
    key = torch.cat([key, key.new_zeros(*key.shape[:2], number, key.shape[3])], dim=2)
    value = torch.cat([value, values.to(value.dtype)], dim=2)
    biases = {name: torch.nn.functional.pad(each, (0, number)) for name, each in biases.items()}
    result, weights = attend(query, key, value, mask, **biases)
    return result, None if weights is None else weights[..., :stored]


def _is_self_attention(handout: Handout, module: Any, query: torch.Tensor) -> bool:
    """Return whether queries and newest keys are the same tokens; keys of a picture, for example, are left alone."""
    if handout.is_open:
        if query.shape[2] != handout.num_new or "cross" in type(module).__name__.lower():
            handout.set_apart()
        elif handout.is_out_of_step:
            handout.cache.refuse_unfinished()
    return not handout.is_apart


def _eager_function(module: torch.nn.Module) -> Callable[..., Any]:
    """Find the function that a module calls when its attention is "eager": every model file has its own."""
    names: set[str] = set()
    # A class of the user's own may hand on to the model's.
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            forward = inspect.unwrap(vars(kind)["forward"])
            names = {name for name in forward.__code__.co_names if callable(forward.__globals__.get(name))}
            names = {name for name in names if "eager" in name}
            if len(names) == 1:
                found: Callable[..., Any] = forward.__globals__[names.pop()]
                return found
            if names:
                break
    raise ArgumentError(
        f"model must name one eager attention function in the forward of {type(module).__name__} to run with "
        f"attn_implementation 'eager'; found {sorted(names)}. Load it with 'sdpa'"
    )


def _source_of(module: Any, handout: Handout, query: torch.Tensor, key: torch.Tensor) -> Source:
    """Describe where keys come from, and whether all heads are here."""
    config, query_heads, known = module.config, query.shape[1], handout.layer.source
    if known is not None and known.kind is type(module) and known.config is config and known.index == handout.index:
        return known
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Source(
        kind=type(module),
        config=config,
        index=handout.index,
        layer_kinds=versions.layer_kinds(config),
        # Plans that gather the projections leave all heads everywhere, so the number of processes does not matter.
        has_all_heads=not is_distributed or query_heads == config.num_attention_heads,
        has_whole_groups=query_heads == key.shape[1] * getattr(module, "num_key_value_groups", 1),
    )


def _window(source: Source, kwargs: dict[str, Any]) -> int | None:
    """Find how many of the newest tokens a layer can see at most; None if all."""
    if kwargs.get("sliding_window") is not None:
        return int(kwargs["sliding_window"])
    # Chunks are windows for the cache: what is older than a chunk can never be seen again.
    fields = {
        "sliding_attention": "sliding_window",
        "hybrid_sliding": "sliding_window",
        "chunked_attention": "attention_chunk_size",
    }
    window = getattr(source.config, fields.get(source.layer_kind, ""), None)
    return None if window is None else int(window)


for _implementation in IMPLEMENTATIONS:
    ATTENTION.register(PREFIX + _implementation, _attention(_implementation))
    AttentionMaskInterface.register(PREFIX + _implementation, mask_maker(_implementation))
