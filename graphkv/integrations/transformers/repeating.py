"""The questions of KVzip: a model is asked to repeat what its cache has seen, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...core import checks
from ...core.errors import ArgumentError, ArgumentTypeError
from .attention import PREFIX
from .cache import EvictingCache
from .models import observing

__all__ = ["RepeatPrompt", "ask_to_repeat", "attending"]

MARKER = "<<document>>"


@dataclass(frozen=True, kw_only=True)
class RepeatPrompt:
    """What a model is asked in order to repeat a text, as tokens.

    A probe for the first piece is `first`, `answer` and the piece; for a later piece it is `later`, the last `overlap`
    tokens of the piece before, `answer` and the piece.

    Parameters
    ----------
    first, later : tuple of int
        The instruction for the first piece, and for those after it.
    answer : tuple of int
        What stands between a question and the answer, in the model's chat template.
    overlap : int
        Tokens of the piece before that say where to begin.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an instruction is empty or holds anything but token ids, or `overlap` is negative.

    Examples
    --------
    >>> import torch
    >>> from graphkv.integrations.transformers import RepeatPrompt
    >>> prompt = RepeatPrompt(first=(90,), later=(91,), answer=(92,), overlap=2)
    >>> for ids, about in prompt.pieces(torch.tensor([[1, 2, 3, 4, 5]]), chunk=3):
    ...     print(ids.tolist(), about)
    [[90, 92, 1, 2, 3]] (0, 3)
    [[91, 2, 3, 92, 4, 5]] (3, 5)
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    answer: tuple[int, ...] = ()
    overlap: int = 8

    def __post_init__(self) -> None:
        for name in ("first", "later", "answer"):
            ids = getattr(self, name)
            if not isinstance(ids, (tuple, list)):
                raise ArgumentTypeError(f"{name} must be token ids; got {type(ids).__name__}")
            object.__setattr__(self, name, tuple(checks.count(f"{name}[{i}]", each) for i, each in enumerate(ids)))
            if name != "answer" and not ids:
                raise ArgumentError(f"{name} must hold at least one token; got none")
        checks.count("overlap", self.overlap)

    @classmethod
    def of(cls, tokenizer: Any) -> RepeatPrompt:
        """Return the public code's instructions, as a tokenizer and its chat template write them.

        Parameters
        ----------
        tokenizer : transformers tokenizer
            Without a chat template, a line break stands between instruction and answer.

        Returns
        -------
        RepeatPrompt
        """
        after = "\n"
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": MARKER}]
            whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            after = whole.partition(MARKER)[2]

        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

        return cls(
            first=encode("\n\nRepeat the previous context exactly."),
            later=encode("\n\nRepeat the part of the previous context exactly, starting with "),
            answer=encode(after),
        )

    def pieces(
        self, ids: torch.Tensor, *, chunk: int, start: int = 0
    ) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
        """List the probes for a text of ids (batch, tokens), and the tokens seen that each is about.

        Parameters
        ----------
        ids : torch.Tensor, shape (batch, tokens)
            Or a mask of these; see `mask`.
        chunk : int
            Tokens of a piece.
        start : int
            Tokens seen before the text.
        """
        for begin in range(0, ids.shape[1], chunk):
            piece = ids[:, begin : begin + chunk]
            parts = [self.first] if not begin else [self.later, ids[:, max(0, begin - self.overlap) : begin]]
            rows = [each if isinstance(each, torch.Tensor) else _rows(each, ids) for each in (*parts, self.answer)]
            yield torch.cat([*rows, piece], dim=1), (start + begin, start + begin + piece.shape[1])

    def masks(self, mask: torch.Tensor, *, chunk: int) -> Iterator[torch.Tensor]:
        """List the attention masks of the probes for a text with padding, from the mask (batch, tokens) of the text."""
        shown = RepeatPrompt(
            first=(1,) * len(self.first),
            later=(1,) * len(self.later),
            answer=(1,) * len(self.answer),
            overlap=self.overlap,
        )
        return (piece for piece, _ in shown.pieces(mask.to(torch.int64), chunk=chunk))


def ask_to_repeat(
    model: Any,
    cache: EvictingCache,
    ids: torch.Tensor,
    prompt: RepeatPrompt,
    /,
    *,
    chunk: int = 2000,
    start: int = 0,
    attention_mask: torch.Tensor | None = None,
) -> None:
    """Ask a model to repeat a text that its cache has seen, so that `KVzip` can evict it.

    Costs a forward pass over the text and its instructions: a second prefill. Until the eviction, the queries and keys
    of all these tokens are in memory, which is more than the cache itself where query heads outnumber the KV heads.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The one that has filled the cache, in a block of `observing` or not.
    cache : EvictingCache
    ids : torch.Tensor, shape (batch, tokens), integer
        The text, as it was read.
    prompt : RepeatPrompt
    chunk : int
        Tokens that are asked for at a time.
    start : int
        Tokens that the cache has seen before the text. Nothing is asked about them, nor about what came after it, so
        policies rank them last: protect a system prompt by ``num_sinks``.
    attention_mask : torch.Tensor, shape (batch, tokens), optional
        0 for padding in `ids`.

    Raises
    ------
    ArgumentError
        If `chunk` is below 1, the text is empty or not among the tokens seen, or as for `EvictingCache.probe`. The
        cache then is as it was.
    ArgumentTypeError
        If an argument has the wrong type.

    References
    ----------
    .. [1] Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv:2505.23416,
       section 3.

    Examples
    --------
    ::

        with observing(model):
            cache = EvictingCache()
            model(ids, cache=cache)  # past_key_values=cache before transformers 5.24
            ask_to_repeat(model, cache, ids, RepeatPrompt.of(tokenizer))
            cache.evict(AdaKV(KVzip(budget=512), floor=0.0))
            model.generate(ids_and_question, cache=cache)
    """
    checks.instance("cache", cache, EvictingCache)
    checks.instance("prompt", prompt, RepeatPrompt)
    chunk, start = checks.count("chunk", chunk, minimum=1), checks.count("start", start)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.shape[1]:
        got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ArgumentError(f"ids must be a tensor of shape (batch, tokens) with at least one token; got {got}")
    if start + ids.shape[1] > cache.num_seen:
        raise ArgumentError(
            f"ids must be among the {cache.num_seen} tokens seen; got {ids.shape[1]} tokens after the first {start}"
        )
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ArgumentError(
            f"attention_mask must have shape (batch, tokens) = {tuple(ids.shape)}; got {tuple(attention_mask.shape)}"
        )
    pieces = list(prompt.pieces(ids, chunk=chunk, start=start))
    masks = [None] * len(pieces) if attention_mask is None else list(prompt.masks(attention_mask, chunk=chunk))
    before = [layer.probes for layer in cache.attention_layers]
    try:
        with attending(model):
            for (piece, about), mask in zip(pieces, masks, strict=True):
                cache.probe(model, piece, about=about, attention_mask=mask)
    except BaseException:
        for layer, probes in zip(cache.attention_layers, before, strict=True):
            layer.probes = probes
        raise


def attending(model: Any) -> AbstractContextManager[None]:
    """Return the context in which a model works with our cache: none if it does so already."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    is_inside = str(getattr(config, "_attn_implementation", "")).startswith(PREFIX)
    return nullcontext() if is_inside else observing(model)


def _rows(tokens: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=like.dtype, device=like.device).expand(like.shape[0], -1)
