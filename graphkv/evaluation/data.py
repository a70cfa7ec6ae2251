"""Rows of a data set: contexts with questions and answers, as LongBench and RULER have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ArgumentError
from .metrics import METRICS
from .tasks import Prompt, Question, chat_template, encode_question

__all__ = ["Row", "data_prompts", "read_rows"]


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
    """

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    dataset: str


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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ArgumentError(f"--data {path} cannot be read: {reason}") from error
    rows = [
        _row(line, f"--data {path}, line {n}", metric, path.stem) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not rows:
        raise ArgumentError(f"--data {path} must hold rows; it is empty")
    return rows


def _row(line: str, where: str, metric: str | None, dataset: str) -> Row:
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
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ArgumentError(f"{where} must have answers, a list of texts; got {answers!r}")
    if not answers[0].strip():
        raise ArgumentError(f"{where} must have answers of at least a letter; got {answers!r}")
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
    )


def data_prompts(rows: list[Row], tokenizer: Any, most: int) -> tuple[list[Prompt], int]:
    """Make a prompt of every context, with all questions about it.

    Parameters
    ----------
    rows : list of Row
    tokenizer : transformers tokenizer
    most : int
        Tokens that fit into the model. A longer context loses its middle, as in LongBench.

    Returns
    -------
    prompts : list of Prompt
    cut : int
        How many of them lost their middle.
    """
    by_context: dict[str, list[Row]] = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    before, after = chat_template(tokenizer)
    header = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    prompts, cut = [], 0
    for number, (context, asked) in enumerate(by_context.items()):
        questions = tuple(_question(row, tokenizer, after) for row in asked)
        room = (
            most
            - len(header)
            - max(len(question.ids) + max(len(question.answer), question.max_new_tokens) for question in questions)
        )
        if room < 2:
            raise ArgumentError(f"--data must fit into the model's {most} positions; question {number} alone does not")
        ids = list(tokenizer(context, add_special_tokens=False)["input_ids"])
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
                questions=questions,
            )
        )
    return prompts, cut


def _question(row: Row, tokenizer: Any, footer: str) -> Question:
    ids, answer = encode_question(tokenizer, footer, row.question, "", row.answers[0])
    return Question(
        task=row.dataset,
        kind=None,
        depth=None,
        ids=ids,
        answer=answer,
        references=row.answers,
        metric=row.metric,
        max_new_tokens=row.max_new_tokens,
    )
