"""Prompts of an exact length: riddles put into running text, as tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from ...core.errors import ArgumentError
from ...workbench.text import Text, standard_library
from .haystack import Haystack, split_of
from .reasoning import NOUNS, REASONING, SHOTS, Exercise, exercises
from .riddles import TASKS, Riddle, task_names
from .ruler import RulerTask, Sample, is_ruler

__all__ = ["Prompt", "PromptMaker", "Question", "chat_template", "encode_question"]

CONTINUATION_TOKENS = 32
# Below that, common words are hardly more common than others.
FEWEST_ENTRIES = 60
FEWEST_STEPS = 4
MARKER = "<<document>>"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a prompt, as tokens.

    Attributes
    ----------
    task : str
    kind : str or None
    depth : float or None
        Depth of the needle in [0, 1]: tokens before it as a share of the prompt's.
    ids : tuple of int
        What follows the prompt, up to where the answer begins. At least one token.
    answer : tuple of int
        Tokens of the right answer.
    references : tuple of str
        What `metric` compares a generated text with.
    metric : str
    max_new_tokens : int
        Longest answer to generate.
    modes : tuple of str
        Modes in which it can be asked.
    """

    task: str
    kind: str | None
    depth: float | None
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    modes: tuple[str, ...] = ("aware", "agnostic", "protected")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text that is read once and asked about, once or several times.

    Attributes
    ----------
    name : str
        Unique within a run.
    length : int or None
        Tokens asked for; None for rows of a data set. Of RULER's tasks, with the question and the longest answer.
    seed : int or None
    split : str or None
    ids : tuple of int
        The prompt before any question: exactly `length` tokens where that is given, but for tasks that write documents
        of their own, which are as long as fits.
    questions : tuple of Question
    """

    name: str
    length: int | None
    seed: int | None
    split: str | None
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


class PromptMaker:
    """A maker of prompts of an exact length, for one model and text.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        With a chat template, the prompt is the beginning of a user's turn and answers are the assistant's.
    text : Text
    """

    def __init__(self, tokenizer: Any, text: Text) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self._haystacks: dict[tuple[str, str], Haystack] = {}
        self._vocabulary: dict[str, list[str]] = {}
        self._ruler: dict[tuple[str, int, str], RulerTask] = {}

    @cached_property
    def template(self) -> tuple[str, str]:
        """The text before a document, and the one between its question and the answer."""
        return chat_template(self.tokenizer)

    def make(self, tasks: str, length: int, split: str, seed: int) -> Prompt:
        """Make the prompt of a seed.

        Parameters
        ----------
        tasks : str
            One of `TASKS`, or several joined by ``+``, which then share the prompt; or one of `RULER` or `REASONING`.
        length : int
            Tokens of the prompt before the question; for a task of RULER, of prompt, question and longest answer, as
            it counts them.
        split : str
            ``tuning`` or ``held-out``.
        seed : int
            Of the split's range. Equal seeds give equal riddles at every length.

        Returns
        -------
        Prompt

        Raises
        ------
        ArgumentError
            If a task is unknown, tasks cannot share a prompt, or text or length is too short.
        BackendUnavailableError
            If the package of RULER's tasks is missing.
        """
        names = task_names(tasks)
        if tasks in REASONING:
            return self._exercise(tasks, length, split, seed)
        header = self._encode(self.template[0])
        write = None if is_ruler(tasks) else TASKS[names[0]].write
        if is_ruler(tasks):
            ids, questions = self._fill(tasks, length, len(header), split, seed)
        elif write is not None:
            ids, questions = self._write(write, names[0], length - len(header), split, seed)
        else:
            ids, questions = self._hide(names, length, len(header), split, seed)
        return Prompt(
            name=f"{tasks}/{length}/{seed}",
            length=length,
            seed=seed,
            split=split,
            ids=(*header, *ids),
            questions=questions,
        )

    def _hide(
        self, names: list[str], length: int, header: int, split: str, seed: int
    ) -> tuple[list[int], tuple[Question, ...]]:
        """Put riddles into running text; return the tokens after the header, and the questions."""
        haystack = self._haystack(TASKS[names[0]].haystack, split)
        riddles = {
            name: riddle(Random(f"{seed}/{name}"), seed) for name in names if (riddle := TASKS[name].riddle) is not None
        }
        inserts = [
            (depth, name, self._encode(paragraph + "\n\n"))
            for name, riddle in riddles.items()
            for depth, paragraph in riddle.inserts
        ]
        room = length - header - sum(len(ids) for _, _, ids in inserts)
        if room < length // 2:
            raise ArgumentError(f"--length must leave half of the prompt to the text, here {names}; got {length}")
        piece, starts = haystack.cut(seed, room + CONTINUATION_TOKENS + 1)
        ids, places = _insert(piece[:room], [start for start in starts if start < room], inserts)
        depths = {name: [round((header + place) / length, 4) for place in found] for name, found in places.items()}
        return ids, tuple(
            self._ask(name, riddles[name], depths[name]) if name in riddles else _continue(name, piece[room:])
            for name in names
        )

    def _write(
        self, write: Callable[..., tuple[str, Riddle]], name: str, room: int, split: str, seed: int
    ) -> tuple[list[int], tuple[Question, ...]]:
        """Let a task write the longest document that fits, to within one entry."""

        def written(size: int) -> tuple[list[int], Riddle]:
            document, riddle = write(Random(f"{seed}/{name}"), self._words(split), size)
            return self._encode(document), riddle

        least, most = FEWEST_ENTRIES, 2 * FEWEST_ENTRIES
        ids, riddle = written(least)
        if len(ids) > room:
            raise ArgumentError(f"--length must have room for {least} entries of {name}; got {room} tokens")
        while len(written(most)[0]) <= room:
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if len(written(middle)[0]) <= room else (least, middle)
        ids, riddle = written(least)
        return ids, (self._ask(name, riddle, []),)

    def _fill(
        self, name: str, length: int, header: int, split: str, seed: int
    ) -> tuple[list[int], tuple[Question, ...]]:
        """Let a task of RULER write the longest document that leaves room for its question and answer."""
        if (name, length, split) not in self._ruler:
            self._ruler[name, length, split] = RulerTask(name, length, split, lambda text: len(self._encode(text)))
        task = self._ruler[name, length, split]
        # Without a chat template, an input is the task's own template and nothing else.
        footer = self.template[1] if getattr(self.tokenizer, "chat_template", None) else ""

        def encoded(size: int) -> tuple[Sample, list[int], tuple[int, ...], tuple[int, ...]]:
            sample = task.write(seed, size)
            before = f"{sample.question}{footer}{sample.prefix}"
            return sample, self._encode(sample.document), *_encode_answer(self.tokenizer, before, sample.answer)

        def total(size: int) -> int:
            _, document, asked, _ = encoded(size)
            return header + len(document) + len(asked) + task.max_new_tokens

        sizes = task.sizes if total(task.sizes[0]) <= length else task.small_sizes
        size = _last_that_fits(sizes, lambda size: total(size) <= length)
        if size is None:
            least = (*task.small_sizes, *task.sizes)[0]
            raise ArgumentError(f"--length must be at least {total(least)} for {name}; got {length}")
        sample, ids, asked, answer = encoded(size)
        if not answer or self.tokenizer.unk_token_id in answer:
            raise ArgumentError(
                f"--model must have a tokenizer that can spell the answers of {name}; it cannot write {sample.answer!r}"
            )
        return ids, (
            Question(
                task=name,
                kind=None,
                depth=None,
                ids=asked,
                answer=answer,
                references=sample.references,
                metric=task.metric,
                max_new_tokens=task.max_new_tokens,
            ),
        )

    def _exercise(self, name: str, length: int, split: str, seed: int) -> Prompt:
        """Write worked examples and an exercise of as many steps as fit."""
        words = self._words(split)

        def written(size: int) -> tuple[list[int], tuple[int, ...], tuple[int, ...], str]:
            *examples, last = exercises(name, seed, words, size)
            before, after = self._conversation(REASONING[name].instruction, examples, last)
            return self._encode(before), *_encode_answer(self.tokenizer, after, last.answer), last.answer

        sizes = range(FEWEST_STEPS, len({*NOUNS, *words}) // (SHOTS + 1) + 1)
        size = _last_that_fits(sizes, lambda size: len(written(size)[0]) <= length)
        if size is None:
            least = len(written(sizes[0])[0])
            raise ArgumentError(f"--length must be at least {least} for {name}; got {length}")
        ids, asked, answer, text = written(size)
        question = Question(
            task=name,
            kind=None,
            depth=None,
            ids=asked,
            answer=answer,
            references=(text,),
            metric="lines",
            # A model that is wrong may write longer numbers; the end of the answer is a token too.
            max_new_tokens=len(answer) + 8,
        )
        return Prompt(
            name=f"{name}/{length}/{seed}",
            length=length,
            seed=seed,
            split=split,
            ids=tuple(ids),
            questions=(question,),
        )

    def _conversation(self, instruction: str, examples: Sequence[Exercise], last: Exercise) -> tuple[str, str]:
        """Return the worked examples and what is given last, and what follows it up to the answer."""
        asked = [f"{each.given}\n\n{instruction}" for each in examples]
        if not getattr(self.tokenizer, "chat_template", None):
            shown = [f"{user}\n\n{each.answer}\n\n\n" for user, each in zip(asked, examples, strict=True)]
            return (self.tokenizer.bos_token or "") + "".join(shown) + last.given, f"\n\n{instruction}\n\n"
        turns = [(user, each.answer) for user, each in zip(asked, examples, strict=True)]
        before, after = chat_template(self.tokenizer, turns)
        return before + last.given, f"\n\n{instruction}{after}"

    def _words(self, split: str) -> list[str]:
        """Collect the text's own words of 4 to 9 letters."""
        if split not in self._vocabulary:
            found = re.findall(r"\b[a-z]{4,9}\b", "\n".join(split_of(self.text, split)))
            self._vocabulary[split] = sorted(set(found))
        return self._vocabulary[split]

    def _haystack(self, source: str, split: str) -> Haystack:
        if (source, split) not in self._haystacks:
            text = standard_library().distinct() if source == "code" else self.text
            self._haystacks[source, split] = Haystack(split_of(text, split), self.tokenizer)
        return self._haystacks[source, split]

    def _ask(self, name: str, riddle: Riddle, depths: list[float]) -> Question:
        ids, answer = encode_question(self.tokenizer, self.template[1], riddle.question, riddle.prefix, riddle.answer)
        return Question(
            task=name,
            kind=riddle.kind,
            depth=depths[0] if len(depths) == 1 else None,
            ids=ids,
            answer=answer,
            references=riddle.references,
            metric=riddle.metric,
            max_new_tokens=riddle.max_new_tokens,
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_template(tokenizer: Any, turns: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
    """Return what a model's template puts before a document, and between its question and the answer.

    `turns` are what user and assistant have said before.

    Raises
    ------
    ArgumentError
        If the template fails, or leaves the message out.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", "\n"
    said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages = [{"role": role, "content": text} for role, text in (*said, ("user", MARKER))]
    try:
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a model's authors let their template raise
        raise ArgumentError(f"--model must have a chat template that takes one message; it says: {error}") from error
    before, marker, after = whole.partition(MARKER)
    if not marker:
        raise ArgumentError("--model must have a chat template that shows the message; it leaves it out")
    return before, after


def encode_question(
    tokenizer: Any, footer: str, question: str, prefix: str, answer: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of a question, template and prefix included, and those of the answer after it."""
    return _encode_answer(tokenizer, f"\n\n{question}{footer}{prefix}", f" {answer}" if prefix else answer)


def _encode_answer(tokenizer: Any, before: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of a text, and those of the answer that goes on from it."""
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    # Where the tokenizer merges the answer's first letters into the question's last token, that is the answer's.
    shared = next((place for place, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    return tuple(whole[:shared]), tuple(whole[shared:])


def _last_that_fits(sizes: range, fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending sizes that fits, where all below it do; None if the first one does not."""
    if not sizes or not fits(sizes[0]):
        return None
    least, most = 0, 1
    while most < len(sizes) and fits(sizes[most]):
        least, most = most, 2 * most
    most = min(most, len(sizes))
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(sizes[middle]) else (least, middle)
    return sizes[least]


def _insert(
    piece: list[int], starts: list[int], inserts: list[tuple[float, str, list[int]]]
) -> tuple[list[int], dict[str, list[int]]]:
    """Put paragraphs where a paragraph begins nearest to their depth; return also where that was."""
    placed = sorted(
        (min(starts, key=lambda start: abs(start - depth * len(piece))), number)
        for number, (depth, _, _) in enumerate(inserts)
    )
    ids: list[int] = []
    begin = 0
    places: dict[str, list[int]] = {}
    for place, number in placed:
        _, name, paragraph = inserts[number]
        ids += piece[begin:place]
        places.setdefault(name, []).append(len(ids))
        ids += paragraph
        begin = place
    return ids + piece[begin:], places


def _continue(name: str, following: list[int]) -> Question:
    """Ask for what follows. Its first token is given, so that the tested cache predicts the rest."""
    return Question(
        task=name,
        kind=None,
        depth=None,
        ids=tuple(following[:1]),
        answer=tuple(following[1:]),
        references=(),
        metric="none",
        max_new_tokens=0,
        modes=("agnostic",),
    )
