"""A document with a question, in the chat template of a model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..core.errors import ArgumentError
from ..workbench.text import Text
from .stories import Story, reference

__all__ = ["ChatPrompt", "make_prompt", "prompt_of"]


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A document with a question.

    Attributes
    ----------
    token_ids : torch.Tensor, shape (1, N), int64
        The whole prompt, up to where the answer begins.
    words : list of str
        The text of each token; together the whole prompt. Empty for all but the first token of one character.
    question : str
    expected : str or None
        The expected answer; None if only the full cache can tell.
    must_contain : str or None
        A part of every correct answer.
    document : tuple of int
        First token of the document and the one after its last.
    fact : tuple of int or None
        The same for the fact that was placed in the document.
    """

    token_ids: torch.Tensor
    words: list[str]
    question: str
    expected: str | None
    must_contain: str | None
    document: tuple[int, int]
    fact: tuple[int, int] | None


def make_prompt(
    tokenizer: Any,
    text: Text | None,
    question: str | None,
    answer: str | None,
    max_tokens: int,
    *,
    must_contain: str | None = None,
    seed: int = 0,
) -> ChatPrompt:
    """Put document and question into the model's chat template.

    Without a question, a sentence is placed in the document, between two paragraphs, and asked about.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    text : Text or None
        The document. None: the running text of `reference`.
    question, answer : str or None
    max_tokens : int
        Room in the model's context, without that of the answer.
    must_contain : str, optional
        What every right answer contains. Default: `answer`.
    seed : int
        Of the word that is asked for.

    Raises
    ------
    ArgumentError
        If the prompt is too long for the model, or the model has no chat template.
    """
    story = reference(seed)
    if question is None:
        paragraphs = story.text.paragraphs
        if text is not None:
            middle = _middle(text.paragraphs)
            paragraphs = [*text.paragraphs[:middle], story.fact, *text.paragraphs[middle:]]
        return _put(tokenizer, paragraphs, story.question, story.fact, story.must_contain, max_tokens, fact=story.fact)
    paragraphs = reference(seed, with_fact=False).text.paragraphs if text is None else text.paragraphs
    return _put(tokenizer, paragraphs, question, answer, must_contain or answer, max_tokens)


def prompt_of(tokenizer: Any, story: Story, max_tokens: int) -> ChatPrompt:
    """Put one of the demo's own documents, with its question, into the model's chat template; see `make_prompt`."""
    paragraphs = story.text.paragraphs
    return _put(tokenizer, paragraphs, story.question, story.fact, story.must_contain, max_tokens, fact=story.fact)


def _put(
    tokenizer: Any,
    paragraphs: list[str],
    question: str,
    expected: str | None,
    must_contain: str | None,
    max_tokens: int,
    fact: str | None = None,
) -> ChatPrompt:
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("--model must have a chat template; this one has none")
    document = "\n\n".join(paragraphs)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{document}\n\n{question}"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) > max_tokens:
        raise ArgumentError(
            f"--text must fit into the model's context: {max_tokens} tokens with the question; got {len(ids)}"
        )
    begin = whole.index(document)
    return ChatPrompt(
        token_ids=torch.asarray([ids]),
        words=_words(whole, offsets),
        question=question,
        expected=expected,
        must_contain=must_contain,
        document=_span(offsets, begin, begin + len(document)),
        fact=None if fact is None else _span(offsets, whole.index(fact), whole.index(fact) + len(fact)),
    )


def _middle(paragraphs: list[str]) -> int:
    """Return the paragraph boundary that is nearest to half of the text."""
    ends = list(accumulate((len(paragraph) for paragraph in paragraphs), initial=0))
    return min(range(len(ends)), key=lambda boundary: abs(ends[boundary] - ends[-1] / 2))


def _words(whole: str, offsets: list[tuple[int, int]]) -> list[str]:
    """Cut the text at the tokens. Several tokens may share one character, and some spaces belong to no token."""
    ends = [stop for _, stop in offsets]
    return [whole[begin:end] for begin, end in zip([0, *ends], [*ends[:-1], len(whole)], strict=False)]


def _span(offsets: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """Return the tokens that touch the characters from `start` to `stop`."""
    touching = [index for index, (begin, end) in enumerate(offsets) if begin < stop and end > start]
    return touching[0], touching[-1] + 1
