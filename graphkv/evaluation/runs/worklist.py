"""The worklist of a run: its prompts, and the records that they still lack."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ...core.budgets import tokens_of
from ...core.errors import ArgumentError
from ...naming.names import FULL, is_press
from ...workbench.text import Text
from ..prompts.haystack import seeds_of
from ..prompts.prompts import Prompt, PromptMaker, Question
from ..prompts.rows import Row, Rows, data_prompts
from ..records import record_key
from .config import PROTECTED, Config, budget_of
from .presses import fewest_tokens

__all__ = ["cells", "data_set_prompts", "missing", "written_prompts"]


def written_prompts(model: Any, tokenizer: Any, text: Text, config: Config, /) -> list[Prompt]:
    """Make the prompts of tasks: all lengths of a seed before the next one, so that an interrupted run stays balanced.

    Raises
    ------
    ArgumentError
        If a prompt with its question and answer does not fit into the model.
    """
    maker = PromptMaker(tokenizer, text)
    prompts = [
        maker.make(tasks, length, config.split, seed)
        for seed in seeds_of(config.split, config.seed, config.prompts)
        for tasks in config.tasks
        for length in config.lengths
    ]
    most = _positions(model)
    for prompt in prompts:
        for question in prompt.questions:
            total = len(prompt.ids) + len(question.ids) + _longest(question, config)
            if total > most:
                raise ArgumentError(f"--length must fit into the model's {most} positions; {prompt.name} needs {total}")
    return prompts


def data_set_prompts(model: Any, tokenizer: Any, rows: list[Row], config: Config, /) -> Rows:
    """Make the prompts of a data set's rows; rows that a press cannot evict are left out."""
    least: Mapping[str, int] = {name: fewest_tokens(name) for name in config.policies if is_press(name)}
    return data_prompts(rows, tokenizer, _positions(model), least)


def _longest(question: Question, config: Config) -> int:
    """Count the tokens of the longest answer: the right one, or one that is generated."""
    return max(len(question.answer), question.max_new_tokens if config.generate else 0)


def _positions(model: Any) -> int:
    return int(model.config.max_position_embeddings)


def cells(prompt: Prompt, config: Config, /) -> list[tuple[int, int]]:
    """List the pairs of budget and sinks for a prompt; a budget that holds all of it evicts nothing."""
    length = prompt.length or len(prompt.ids)
    found = dict.fromkeys(tokens_of(budget_of(budget), length) for budget in config.budgets)
    budgets = [budget for budget in found if 0 < budget < len(prompt.ids)]
    return [(budget, sinks) for budget in budgets for sinks in config.sinks]


def missing(prompt: Prompt, config: Config, done: Set[str], /) -> list[tuple[str, int, int | None, int | None]]:
    """List mode, question, budget and sinks wherever a record is missing.

    Beside a protected prompt, a budget that holds the longest answer evicts nothing.
    """
    return [
        (mode, index, budget, sinks)
        for mode in config.modes
        for index, question in enumerate(prompt.questions)
        if mode in question.modes
        for budget, sinks in [(None, None), *cells(prompt, config)]
        if not (mode == PROTECTED and budget and budget >= _longest(question, config))
        for names in [config.policies[1:] if budget else [FULL]]
        if any(record_key(prompt.name, index, mode, name, budget, sinks) not in done for name in names)
    ]
