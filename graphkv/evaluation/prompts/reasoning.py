"""Tasks whose answers are long: worked examples, then one more of the same to work through line by line.

What is asked is simple on purpose. A small model that is shown how does it with its whole cache, and what an eviction
in the middle of the answer takes away shows in the lines that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

__all__ = ["REASONING", "Exercise", "ReasoningTask", "exercises"]

SHOTS = 2


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Plain words, which small models copy well. Longer lists go on with words of the text.
NOUNS = _words(
    "apple arrow baker ball basket beach bell bird boat bottle bread bridge bucket butter button cabin camera candle "
    "carpet castle chair cheese cherry church circle clock cloud coffee copper corner cotton crown desert diamond "
    "doctor dragon eagle engine farmer feather fence finger fire flower forest fruit garden ghost glass gold grape "
    "guitar hammer harbor hill honey horse hotel house iron island jacket jewel judge jungle kettle king kitchen knife "
    "ladder lake lemon letter lion machine market mirror moon mountain mouse needle ocean onion orange paint paper "
    "pencil pepper piano pirate planet plate pocket potato prince queen rabbit rain ring river road rocket rose sail "
    "salt school shadow sheep ship shirt silver snake snow soldier spoon spring square star station stone storm street "
    "student sugar summer table teacher temple ticket tiger tower train tree tunnel uncle valley village violin wagon "
    "water whale wheel window winter wolf wood yellow zebra"
)


@dataclass(frozen=True)
class Exercise:
    """What is given, and the answer that works it out: one line for each step."""

    given: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class ReasoningTask:
    """One kind of exercises.

    Attributes
    ----------
    instruction : str
        What follows what is given.
    write : callable
        ``write(random, words)`` returns an `Exercise` of one step per word.
    """

    instruction: str
    write: Callable[[Random, Sequence[str]], Exercise]


def transform_list(random: Random, words: Sequence[str]) -> Exercise:
    """Copy a list, each entry twice.

    >>> print(transform_list(Random(0), ["river", "stone"]).answer)
    1. river river
    2. stone stone
    """
    return Exercise(_numbered(words), _numbered([f"{word} {word}" for word in words]))


def sums(random: Random, words: Sequence[str]) -> Exercise:
    """Count on from one number after the other, in two small sums each.

    >>> print(sums(Random(0), ["river", "stone"]).answer)
    river: 7 + 1 = 8, 8 + 1 = 9
    stone: 4 + 1 = 5, 5 + 1 = 6
    """
    given, steps = [], []
    for word in words:
        # No carry: the tables of addition are not what is tested.
        number = random.randint(1, 7)
        given.append(f"{word}: {number}")
        steps.append(f"{word}: {number} + 1 = {number + 1}, {number + 1} + 1 = {number + 2}")
    return Exercise("\n".join(given), "\n".join(steps))


def assignments(random: Random, words: Sequence[str]) -> Exercise:
    """Follow assignments aloud: every third variable is given a word, the others are each the variable before.

    >>> print(assignments(Random(0), ["river", "stone", "window", "garden"]).answer)
    a = river
    b = a = river
    c = b = river
    d = garden
    """
    given, steps = [], []
    for step, word in enumerate(words):
        name, before = _variable(step), _variable(step - 1)
        given.append(f"{name} = {before if step % 3 else word}")
        steps.append(f"{name} = {before} = {words[step - step % 3]}" if step % 3 else given[-1])
    return Exercise("\n".join(given), "\n".join(steps))


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _variable(step: int) -> str:
    """Return a, b, ..., z, aa, ab, ...: the name of a variable."""
    if step < 0:
        return ""
    rounds, letter = divmod(step, len(ascii_lowercase))
    return (_variable(rounds - 1) if rounds else "") + ascii_lowercase[letter]


REASONING: dict[str, ReasoningTask] = {
    "transform-list": ReasoningTask(instruction="Write each word of the list twice.", write=transform_list),
    "sums": ReasoningTask(instruction="Count on by two from each number, step by step.", write=sums),
    "assignments": ReasoningTask(instruction="Work out the values one after the other.", write=assignments),
}


def exercises(name: str, seed: int, words: Sequence[str], size: int) -> list[Exercise]:
    """Write the worked examples of a seed, and last the exercise, of `size` steps each and without a word in common.

    `words` are for exercises that `NOUNS` are too few for.
    """
    random, number = Random(f"{seed}/{name}"), (SHOTS + 1) * size
    drawn = random.sample(NOUNS, min(number, len(NOUNS)))
    drawn += random.sample(sorted(set(words) - set(NOUNS)), number - len(drawn))
    return [REASONING[name].write(random, drawn[start : start + size]) for start in range(0, len(drawn), size)]
