"""Tokens that a model reads after the text only to be asked, and that its cache then forgets.

The model reads them into a copy of the cache, which costs no copy of keys and values. So nothing can be left over in
the cache itself, whatever kinds of layers it has and however the call ends: it takes the queries, and the copy goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from ...core.errors import ArgumentError, ArgumentTypeError
from . import versions
from .layer import EvictingLayer
from .probes import HeldProbe
from .settings import Settings

__all__ = ["probe"]


class Probed(Protocol):
    """What a cache must have to be probed; an `EvictingCache`."""

    settings: Settings
    layers: list[Any]
    num_seen: int
    num_guessed: int
    is_waiting: bool

    @property
    def attention_layers(self) -> list[EvictingLayer]:
        """The layers that cache keys of the text."""

    def check_finished(self) -> None:
        """Refuse to go on from a forward pass that broke off."""

    def copy(self) -> Any:
        """Return an independent cache with the same contents."""


def probe(
    cache: Probed,
    model: Any,
    ids: torch.Tensor,
    /,
    *,
    about: tuple[int, int] | None,
    attention_mask: torch.Tensor | None,
    inputs: Mapping[str, Any],
) -> None:
    """Read a probe and keep its queries, see `EvictingCache.probe`."""
    asked = [layer for layer in cache.attention_layers if layer.num_seen]
    if not asked:
        raise ArgumentError("the cache must hold a prompt before it is probed; it is empty")
    cache.check_finished()
    rows = asked[0].slots.keys.shape[0]
    _check_ids(ids, rows)
    _check_about(about, cache.num_seen)
    shown = _shown(asked, ids, attention_mask, cache.num_seen)
    twin = _twin(cache)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": True, **inputs, **versions.with_cache(model, twin)}
    if shown is not None:
        given["attention_mask"] = shown.to(torch.int64)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    _check_length(model, cache.num_seen, ids.shape[1])
    with torch.no_grad():
        model(**given)
    if twin.num_seen != cache.num_seen + ids.shape[1]:
        raise ArgumentError(f"model must read ids into its cache; {type(model).__name__} did not")
    twin.check_finished()
    number = ids.shape[1]
    valid = None if shown is None or bool(shown[:, -number:].all()) else shown[:, -number:]
    for layer, read in zip(cache.layers, twin.layers, strict=True):
        if layer in asked and layer.evicts and read.held is not None:
            # A copy, so that the rest is freed.
            keys = read.slots.keys[:, :, -number:].detach().clone()
            here = None if valid is None else valid.to(keys.device)
            held = HeldProbe(
                queries=read.held.queries.detach(),
                keys=keys,
                valid=here,
                about=about,
                start=cache.num_seen,
                window=read.sliding_window,
            )
            layer.probes = (*layer.probes, held)


def _check_ids(ids: Any, rows: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ArgumentTypeError(f"ids must be a tensor of integers; got {got}")
    if ids.ndim != 2 or ids.shape[0] != rows:
        raise ArgumentError(f"ids must have shape (batch, P) with the {rows} rows of the cache; got {tuple(ids.shape)}")
    if not ids.shape[1]:
        raise ArgumentError("ids must hold at least one token to ask with; got none")


def _check_about(about: Any, num_seen: int) -> None:
    if about is None:
        return
    is_pair = isinstance(about, tuple) and len(about) == 2 and all(type(each) is int for each in about)
    if not is_pair or not 0 <= about[0] < about[1] <= num_seen:
        raise ArgumentError(
            f"about must be (first, end), two integers with 0 <= first < end <= {num_seen} tokens seen; got {about!r}"
        )


def _check_length(model: Any, num_seen: int, number: int) -> None:
    """Refuse positions that the model does not know."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and num_seen + number > longest:
        raise ArgumentError(
            f"ids must end within the model's context of {longest} tokens; the cache has seen {num_seen} and the probe "
            f"has {number}"
        )


def _twin(cache: Probed) -> Probed:
    """Return a copy of a cache that evicts nothing and keeps the queries of the next call."""
    twin: Probed = cache.copy()
    twin.settings = replace(cache.settings, policy=None, every=None, is_probing=True)
    twin.is_waiting, twin.num_guessed = False, 0
    for layer in twin.layers:
        if isinstance(layer, EvictingLayer):
            layer.settings, layer.due_at = twin.settings, None
    return twin


def _shown(
    layers: list[EvictingLayer], ids: torch.Tensor, attention_mask: torch.Tensor | None, num_seen: int
) -> torch.Tensor | None:
    """Return which tokens seen and new are not padding, bool (batch, num_seen + P); None where all are shown."""
    wide = (ids.shape[0], num_seen + ids.shape[1])
    if attention_mask is not None and tuple(attention_mask.shape) not in (tuple(ids.shape), wide):
        raise ArgumentError(
            f"attention_mask must have shape (batch, P) = {tuple(ids.shape)} or (batch, tokens seen + P) = {wide}; "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and tuple(attention_mask.shape) == wide:
        return attention_mask.bool()
    hidden = ids.new_zeros((ids.shape[0], num_seen), dtype=torch.int64)
    for layer in layers:
        if layer.slots.valid is not None:
            # What is gone cannot be seen anyway.
            positions = layer.true_positions.to(ids.device).flatten(1)
            is_padding = (~layer.slots.valid).to(ids.device).flatten(1) & (positions >= 0)
            hidden = hidden.scatter_reduce(1, positions.clamp(min=0), is_padding.to(torch.int64), "amax")
    if attention_mask is None and not bool(hidden.any()):
        return None
    new = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool().to(ids.device)
    return torch.cat([hidden == 0, new], dim=1)
