"""Riddles in words: what a task hides and asks, generated from a seed.

The definitions of the needles with several keys, values or queries, of variable tracking and of common and frequent
words are those of RULER (arXiv:2404.06654, section 3); all wording is our own. Answers begin right after a prefix that
the prompt ends with, so that the likelihood of an answer is about the answer and not about how a model likes to begin.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from random import Random
from string import ascii_lowercase, ascii_uppercase

from ...core.errors import ArgumentError
from ...workbench.text import listed
from .reasoning import REASONING
from .ruler import RULER, is_ruler

__all__ = ["DEPTHS", "TASKS", "Riddle", "Task", "task_names"]

KINDS = ("number", "word", "uuid")
DEPTHS = tuple((2 * step + 1) / 20 for step in range(10))


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
class Riddle:
    """A secret and the question about it, in words.

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
        ``riddle(random, seed)`` returns a `Riddle`. None: nothing is hidden, the text itself is to be continued.
    write : callable or None
        ``write(random, words, size)`` returns a document of `size` entries, and the `Riddle` about it.
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
        answer=listed(values),
        references=tuple(values),
        max_new_tokens=64,
    )


def multi_query(random: Random, seed: int) -> Riddle:
    """Hide numbers under 4 keys and ask for all of them."""
    keys, values = _keys(random, 4), _values(random, "number", 4)
    named = listed([f"the {key}" for key in keys])
    return Riddle(
        inserts=_spread(random, [_hidden("number", key, value) for key, value in zip(keys, values, strict=True)]),
        question=f"What are the secret numbers of {named}, in this order?",
        prefix=f"The secret numbers of {named} are",
        answer=listed(values),
        references=tuple(values),
        max_new_tokens=64,
    )


def variable_tracking(random: Random, seed: int) -> Riddle:
    """Assign a number to a variable, that to a next one and so on, over 4 hops; ask which variables hold the number."""
    names = ["".join(random.choices(ascii_uppercase, k=5)) for _ in range(5)]
    value = str(random.randrange(10_000, 100_000))
    steps = [
        f"VAR {name} = {source}" for name, source in zip(names, [value, *(f"VAR {x}" for x in names)], strict=False)
    ]
    return Riddle(
        inserts=_spread(random, steps),
        question=f"Variables were assigned in the text above. Which variables hold the value {value} in the end?",
        prefix=f"The variables that hold the value {value} are",
        answer=listed(names),
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
        answer=listed(common),
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
        answer=listed(made_up[1:4]),
        references=tuple(made_up[1:4]),
    )


def _spread(random: Random, paragraphs: list[str]) -> tuple[tuple[float, str], ...]:
    """Draw different depths for paragraphs, in their order."""
    return tuple(zip(sorted(random.sample(DEPTHS, len(paragraphs))), paragraphs, strict=True))


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


def task_names(tasks: str) -> list[str]:
    """Split ``needle+continuation``; refuse unknown tasks, and tasks that cannot share a prompt."""
    names = tasks.split("+")
    for name in names:
        if name not in TASKS and not is_ruler(name) and name not in REASONING:
            known = ", ".join((*TASKS, *REASONING, *RULER))
            raise ArgumentError(f"--task must be one of {known}, or some of them joined by +; got {name!r}")
    # Those of RULER and of reasoning write all of their prompts themselves, as some others do.
    kinds = {TASKS[name].haystack if name in TASKS else "words" for name in names}
    if len(set(names)) < len(names) or len(kinds) > 1 or (len(names) > 1 and kinds == {"words"}):
        raise ArgumentError(f"--task can join different tasks over the same text only; got {tasks!r}")
    return names
