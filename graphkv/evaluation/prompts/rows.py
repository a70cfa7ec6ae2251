"""Rows of a data set: contexts with questions and answers, as LongBench and RULER have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import ArgumentError
from ...core.files import read_file
from .metrics import METRICS
from .prompts import Prompt, Question, chat_template, encode_question

__all__ = ["Row", "Rows", "data_prompts", "read_rows"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question about a context.

    Attributes
    ----------
    context, question : str
    answers : tuple of str
        The first one is what the likelihood is about; the metric looks at all.
    max_new_tokens : int
    metric : str
    dataset : str
    line : int
        Its number in the file, from 1.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    dataset: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The prompts made of the rows of a file, and the rows that were left out.

    Attributes
    ----------
    prompts : tuple of Prompt
        One for every context, with all questions about it.
    cut : int
        How many of them lost their middle.
    skipped : mapping of str to tuple of int
        Why rows cannot be answered, and their lines.
    """

    prompts: tuple[Prompt, ...]
    cut: int
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_rows(path: Path, metric: str | None = None, /) -> list[Row]:
    """Read a file of one JSON object per line.

    Parameters
    ----------
    path : pathlib.Path
        Each object has ``context``, ``question`` (or ``input``) and ``answers`` (or ``outputs``), and may have
        ``max_new_tokens`` (default 64), ``metric`` and ``dataset`` (default: the file's name).
    metric : str, optional
        For rows that name none.

    Raises
    ------
    ArgumentError
        If the file cannot be read, or a row lacks something.
    """
    # Ended by newlines alone: JSON may have Unicode's other line ends in its texts.
    lines = read_file(path, "--data").split("\n")
    rows = [
        _row(line, n, f"--data {path}, line {n}", metric, path.stem) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not rows:
        raise ArgumentError(f"--data {path} must hold rows; it is empty")
    return rows


def _row(line: str, number: int, where: str, metric: str | None, dataset: str) -> Row:
    try:
        values: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where} must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"{where} must be a JSON object; got {line[:60]!r}")
    context, question = values.get("context"), values.get("question", values.get("input"))
    answers = values.get("answers", values.get("outputs"))
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(context, str) or not isinstance(question, str):
        raise ArgumentError(f"{where} must have the texts context and question; got {sorted(values)}")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ArgumentError(f"{where} must have answers, a list of texts; got {answers!r}")
    chosen = values.get("metric", metric)
    if chosen not in METRICS:
        raise ArgumentError(f"{where} must name a metric, or --metric do so: {', '.join(METRICS)}; got {chosen!r}")
    longest = values.get("max_new_tokens", 64)
    if not isinstance(longest, int) or longest < 1:
        raise ArgumentError(f"{where} must have max_new_tokens of at least 1; got {longest!r}")
    return Row(
        context=context,
        question=question,
        answers=tuple(answers),
        max_new_tokens=longest,
        metric=chosen,
        dataset=str(values.get("dataset", dataset)),
        line=number,
    )


def data_prompts(rows: list[Row], tokenizer: Any, most: int, least: Mapping[str, int] | None = None) -> Rows:
    """Make a prompt of every context, with all questions about it that can be answered.

    Parameters
    ----------
    rows : list of Row
    tokenizer : transformers tokenizer
    most : int
        Tokens that fit into the model. A longer context loses its middle, as in LongBench.
    least : mapping of str to int, optional
        Policies that cannot evict a prompt of fewer tokens.

    Returns
    -------
    Rows
    """
    by_context: dict[str, list[Row]] = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    before, after = chat_template(tokenizer)
    header = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    prompts, cut = [], 0
    skipped: dict[str, list[int]] = {}
    for number, (context, asked) in enumerate(by_context.items()):
        ids = list(tokenizer(context, add_special_tokens=False)["input_ids"]) if _is_unicode(context) else []
        questions: dict[int, Question] = {}
        room = most - len(header)
        for row in asked:
            question = _question(row, tokenizer, after, len(header), len(ids), most)
            if isinstance(question, str):
                skipped.setdefault(question, []).append(row.line)
            else:
                questions[row.line] = question
                room = min(room, most - len(header) - _length(question))
        num_tokens = len(header) + min(len(ids), room)
        for name, fewest in (least or {}).items():
            if questions and num_tokens < fewest:
                reason = f"the prompt is shorter than the {fewest} tokens that {name} needs"
                skipped.setdefault(reason, []).extend(questions)
                questions = {}
        if not questions:
            continue
        if len(ids) > room:
            ids = ids[: room // 2] + ids[-(room - room // 2) :]
            cut += 1
        prompts.append(
            Prompt(
                name=f"{asked[0].dataset}/{number}",
                length=None,
                seed=None,
                split=None,
                ids=(*header, *ids),
                questions=tuple(questions.values()),
            )
        )
    return Rows(prompts=tuple(prompts), cut=cut, skipped={why: tuple(lines) for why, lines in skipped.items()})


def _question(row: Row, tokenizer: Any, footer: str, num_header: int, num_context: int, most: int) -> Question | str:
    """Return the tokens of a question, or the reason why it cannot be answered."""
    if not (row.answers and row.answers[0].strip()):
        return "there is no answer"
    if not all(map(_is_unicode, (row.context, row.question, row.answers[0]))):
        return "a text is not Unicode: it holds half a surrogate pair"
    ids, answer = encode_question(tokenizer, footer, row.question, "", row.answers[0])
    question = Question(
        task=row.dataset,
        kind=None,
        depth=None,
        ids=ids,
        answer=answer,
        references=row.answers,
        metric=row.metric,
        max_new_tokens=row.max_new_tokens,
    )
    # A tokenizer may drop white space, and what it does not know.
    for name, num_tokens in (("context", num_header + num_context), ("question", len(ids)), ("answer", len(answer))):
        if not num_tokens:
            return f"the {name} has no tokens"
    if most - num_header - _length(question) < 2:
        return f"question and answer leave no room for a context in the model's {most} positions"
    return question


def _length(question: Question) -> int:
    """Count the tokens that come after the context."""
    return len(question.ids) + max(len(question.answer), question.max_new_tokens)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
