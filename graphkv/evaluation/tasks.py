"""What is asked: tasks generated from a seed, put into running text, as tokens.

The definitions of the needles with several keys, values or queries, of variable tracking and of common and frequent
words are those of RULER (arXiv:2404.06654, section 3); all wording is our own. Answers begin right after a prefix that
the prompt ends with, so that the likelihood of an answer is about the answer and not about how a model likes to begin.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import pi
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from ..core.errors import ArgumentError
from .text import SPLITS, Haystack, Text, default_code

__all__ = ["TASKS", "Prompt", "PromptMaker", "Question", "Task", "encode_question"]

KINDS = ("number", "word", "uuid")
DEPTHS = tuple((2 * step + 1) / 20 for step in range(10))
CONTINUATION_TOKENS = 32
# Below that, common words are hardly more common than others.
FEWEST_ENTRIES = 60
MARKER = "<<document>>"


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "amber brass bronze calm copper crimson distant dusty early faded gentle golden hollow icy ivory jade late lonely "
    "marble mellow misty narrow pale patient quiet rapid rusty scarlet silent silver slender sturdy sunny velvet woolen"
)
NOUNS = _words(
    "anchor bakery barrel bridge canal castle cellar clock compass cottage engine ferry fountain garden harbor hotel "
    "island kettle ladder lantern library market mill museum orchard palace pier quarry saddle station tower village "
    "wagon well windmill"
)
VALUES = _words(
    "acorn badger cinnamon dolphin eagle falcon ginger hazel iris jasmine koala lemon maple nutmeg otter parsley quail "
    "raven saffron tulip urchin violet walnut yarrow zebra"
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to a prompt, as tokens.

    Attributes
    ----------
    task : str
    kind : str or None
    depth : float or None
        Where the needle lies, in [0, 1]: tokens before it as a share of the prompt's.
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
        In which modes it can be asked.
    """

    task: str
    kind: str | None
    depth: float | None
    ids: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    modes: tuple[str, ...] = ("aware", "agnostic")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is read once, and asked about one or several times.

    Attributes
    ----------
    name : str
        Unique within a run.
    length : int or None
        Tokens asked for; None for rows of a data set.
    seed : int or None
    split : str or None
    ids : tuple of int
        The prompt before any question: exactly `length` tokens where that is given.
    questions : tuple of Question
    """

    name: str
    length: int | None
    seed: int | None
    split: str | None
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class Riddle:
    """What a task hides and asks, in words.

    `inserts` are depths in [0, 1] with paragraphs to put there.
    """

    inserts: tuple[tuple[float, str], ...]
    question: str
    prefix: str
    answer: str
    references: tuple[str, ...]
    metric: str = "substring_all"
    kind: str | None = None
    max_new_tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way to ask.

    Attributes
    ----------
    haystack : str
        ``text``, ``code``, or ``words``: a document that the task writes itself.
    riddle : callable or None
        ``riddle(random, seed)`` gives a `Riddle`. None: nothing is hidden, the text itself is to be continued.
    write : callable or None
        ``write(random, words, size)`` gives a document of `size` entries, and the `Riddle` about it.
    """

    haystack: str = "text"
    riddle: Callable[[Random, int], Riddle] | None = None
    write: Callable[[Random, list[str], int], tuple[str, Riddle]] | None = None


def needle(random: Random, seed: int, kind: str | None = None) -> Riddle:
    """Hide one number, word or UUID; seeds go through all kinds and depths."""
    kind = kind or KINDS[seed % len(KINDS)]
    (key,), (value,) = _keys(random, 1), _values(random, kind, 1)
    return Riddle(
        inserts=((DEPTHS[seed % len(DEPTHS)], _hidden(kind, key, value)),),
        question=f"What is the secret {kind} of the {key}?",
        prefix=f"The secret {kind} of the {key} is",
        answer=value,
        references=(value,),
        kind=kind,
    )


def _of_kind(kind: str) -> Callable[[Random, int], Riddle]:
    return lambda random, seed: needle(random, seed, kind)


def _keys(random: Random, number: int) -> list[str]:
    """Draw names of things, all different."""
    pairs = random.sample(range(len(ADJECTIVES) * len(NOUNS)), number)
    return [f"{ADJECTIVES[pair % len(ADJECTIVES)]} {NOUNS[pair // len(ADJECTIVES)]}" for pair in pairs]


def _values(random: Random, kind: str, number: int) -> list[str]:
    """Draw secrets, all different."""
    if kind == "number":
        return [str(value) for value in random.sample(range(1_000_000, 10_000_000), number)]
    if kind == "word":
        return random.sample(VALUES, number)
    return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(number)]


def _hidden(kind: str, key: str, value: str) -> str:
    return f"The secret {kind} of the {key} is {value}."


def multi_key(random: Random, seed: int) -> Riddle:
    """Hide numbers under 4 keys and ask for one of them."""
    keys, values = _keys(random, 4), _values(random, "number", 4)
    return Riddle(
        inserts=_spread(random, [_hidden("number", key, value) for key, value in zip(keys, values, strict=True)]),
        question=f"What is the secret number of the {keys[0]}?",
        prefix=f"The secret number of the {keys[0]} is",
        answer=values[0],
        references=(values[0],),
    )


def multi_value(random: Random, seed: int) -> Riddle:
    """Hide 4 numbers under one key and ask for all."""
    (key,), values = _keys(random, 1), _values(random, "number", 4)
    return Riddle(
        inserts=_spread(random, [f"One of the secret numbers of the {key} is {value}." for value in values]),
        question=f"What are all the secret numbers of the {key}?",
        prefix=f"The secret numbers of the {key} are",
        answer=_listed(values),
        references=tuple(values),
        max_new_tokens=64,
    )


def multi_query(random: Random, seed: int) -> Riddle:
    """Hide numbers under 4 keys and ask for all of them."""
    keys, values = _keys(random, 4), _values(random, "number", 4)
    named = _listed([f"the {key}" for key in keys])
    return Riddle(
        inserts=_spread(random, [_hidden("number", key, value) for key, value in zip(keys, values, strict=True)]),
        question=f"What are the secret numbers of {named}, in this order?",
        prefix=f"The secret numbers of {named} are",
        answer=_listed(values),
        references=tuple(values),
        max_new_tokens=64,
    )


def variable_tracking(random: Random, seed: int) -> Riddle:
    """Assign a number to a variable, that to a next one and so on, over 4 hops; ask who holds the number."""
    names = ["".join(random.choices(ascii_uppercase, k=5)) for _ in range(5)]
    value = str(random.randrange(10_000, 100_000))
    steps = [
        f"VAR {name} = {source}" for name, source in zip(names, [value, *(f"VAR {x}" for x in names)], strict=False)
    ]
    return Riddle(
        inserts=_spread(random, steps),
        question=f"Variables were assigned in the text above. Which variables hold the value {value} in the end?",
        prefix=f"The variables that hold the value {value} are",
        answer=_listed(names),
        references=tuple(names),
    )


def code(random: Random, seed: int) -> Riddle:
    """Hide a function among others and ask for the default of one of its parameters."""
    (key,), (value,) = _keys(random, 1), random.sample(range(1000, 10_000), 1)
    name, parameter = key.replace(" ", "_"), random.choice(("timeout", "limit", "offset", "width"))
    body = f"    return min(value, {parameter})"
    return Riddle(
        inserts=((DEPTHS[seed % len(DEPTHS)], f"def visit_{name}(value, {parameter}={value}):\n{body}"),),
        question=f"What is the default value of the parameter `{parameter}` of the function `visit_{name}`?",
        prefix=f"The default value of `{parameter}` in `visit_{name}` is",
        answer=str(value),
        references=(str(value),),
    )


def common_words(random: Random, words: list[str], size: int) -> tuple[str, Riddle]:
    """List 10 words 30 times each among words that come 3 times, less often in short lists; ask for the 10."""
    often = max(2, min(30, size // 20))
    seldom = max(1, often // 10)
    drawn = random.sample(words, min(len(words), 10 + size))
    common = drawn[:10]
    rest = [word for word in drawn[10:] for _ in range(seldom)]
    entries = (common * often + rest)[:size]
    if len(entries) < size:
        raise ArgumentError(f"--text must have more different words for common-words; it has {len(words)}")
    random.shuffle(entries)
    return "\n".join(f"{number}. {word}" for number, word in enumerate(entries, start=1)), Riddle(
        inserts=(),
        question="Some words come more often than others in the list above. Which are the 10 most frequent words?",
        prefix="The 10 most frequent words of the list are",
        answer=_listed(common),
        references=tuple(common),
        max_new_tokens=96,
    )


def frequent_words(random: Random, words: list[str], size: int) -> tuple[str, Riddle]:
    """Mix made-up words, the k-th as often as k to the power of -2 says; ask for the first three that are words.

    The most frequent one of all is three dots, which is noise.
    """
    made_up = ["...", *("".join(random.choices(ascii_lowercase, k=6)) for _ in range(size))]
    entries = [word for rank, word in enumerate(made_up, start=1) for _ in range(round(size * 6 / (pi * rank) ** 2))]
    random.shuffle(entries)
    return " ".join(entries), Riddle(
        inserts=(),
        question="The text above is made of code words; dots mean nothing. Which are the 3 most frequent code words?",
        prefix="The 3 most frequent code words are",
        answer=_listed(made_up[1:4]),
        references=tuple(made_up[1:4]),
    )


def _spread(random: Random, paragraphs: list[str]) -> tuple[tuple[float, str], ...]:
    """Give paragraphs different depths, in their order."""
    return tuple(zip(sorted(random.sample(DEPTHS, len(paragraphs))), paragraphs, strict=True))


def _listed(words: Sequence[str]) -> str:
    """Write a list as people do: a, b and c."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


TASKS: dict[str, Task] = {
    "needle": Task(riddle=needle),
    **{f"needle-{kind}": Task(riddle=_of_kind(kind)) for kind in KINDS},
    "multi-key": Task(riddle=multi_key),
    "multi-value": Task(riddle=multi_value),
    "multi-query": Task(riddle=multi_query),
    "variable-tracking": Task(riddle=variable_tracking),
    "code": Task(haystack="code", riddle=code),
    "common-words": Task(haystack="words", write=common_words),
    "frequent-words": Task(haystack="words", write=frequent_words),
    "continuation": Task(),
}


class PromptMaker:
    """Makes prompts of an exact length for one model and text.

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

    @cached_property
    def template(self) -> tuple[str, str]:
        """What comes before a document, and between its question and the answer."""
        return chat_template(self.tokenizer)

    def make(self, tasks: str, length: int, split: str, seed: int) -> Prompt:
        """Make the prompt of a seed.

        Parameters
        ----------
        tasks : str
            One of `TASKS`, or several joined by ``+``, which then share the prompt.
        length : int
            Tokens of the prompt before the question.
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
        """
        names = task_names(tasks)
        header = self._encode(self.template[0])
        write = TASKS[names[0]].write
        if write is not None:
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
        """Put riddles into running text; give the tokens after the header, and the questions."""
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
        """Let a task write the longest document that fits; it may fall short by less than an entry."""

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

    def _words(self, split: str) -> list[str]:
        """Give the text's own words of 4 to 9 letters."""
        if split not in self._vocabulary:
            found = re.findall(r"\b[a-z]{4,9}\b", "\n".join(self.text.of_split(split)))
            self._vocabulary[split] = sorted(set(found))
        return self._vocabulary[split]

    def _haystack(self, source: str, split: str) -> Haystack:
        if (source, split) not in self._haystacks:
            text = default_code() if source == "code" else self.text
            self._haystacks[source, split] = Haystack(text.of_split(split), self.tokenizer)
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


def task_names(tasks: str) -> list[str]:
    """Take ``needle+continuation`` apart, or say in an ArgumentError what is wrong with it."""
    names = tasks.split("+")
    for name in names:
        if name not in TASKS:
            raise ArgumentError(f"--task must be one of {', '.join(TASKS)}, or some of them joined by +; got {name!r}")
    kinds = {TASKS[name].haystack for name in names}
    if len(set(names)) < len(names) or len(kinds) > 1 or (len(names) > 1 and kinds == {"words"}):
        raise ArgumentError(f"--task can join different tasks over the same text only; got {tasks!r}")
    return names


def chat_template(tokenizer: Any) -> tuple[str, str]:
    """Give what a model's template puts before a document, and between its question and the answer."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": MARKER}]
        whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before, _, after = whole.partition(MARKER)
        return before, after
    return tokenizer.bos_token or "", "\n"


def encode_question(
    tokenizer: Any, footer: str, question: str, prefix: str, answer: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the tokens of a question, template and prefix included, and those of the answer after it."""
    before = f"\n\n{question}{footer}{prefix}"
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{before} {answer}" if prefix else before + answer, add_special_tokens=False)["input_ids"]
    # Where the answer's first letters melt into the question's last token, that token belongs to the answer.
    shared = next((place for place, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    return tuple(whole[:shared]), tuple(whole[shared:])


def _insert(
    piece: list[int], starts: list[int], inserts: list[tuple[float, str, list[int]]]
) -> tuple[list[int], dict[str, list[int]]]:
    """Put paragraphs where a paragraph begins nearest to their depth; say where they came to lie."""
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
    """Ask for what follows. Its first token is given, so that the rest is told from the cache that is tested."""
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


def seeds_of(split: str, first: int, number: int) -> range:
    """Give `number` seeds of a split, beginning with its `first` one."""
    seeds = SPLITS[split][first : first + number]
    if len(seeds) < number:
        raise ArgumentError(
            f"--seed and --prompts must stay within the {len(SPLITS[split])} prompts of a split; got {first}, {number}"
        )
    return seeds
