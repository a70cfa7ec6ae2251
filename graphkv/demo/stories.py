"""The demo's own documents, generated from a seed: a log that repeats itself, and ordinary running text."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..workbench.text import Text, language_reference

__all__ = ["Story", "log", "reference"]

LINES = 70
FACT = "The captain has left his red umbrella at the bakery in Harbor Street."
# Chapters of CPython's language reference that are running text rather than grammar, and about 2,000 tokens of them.
CHAPTERS = ("execmodel", "naming", "compound", "with")
CHARACTERS = 7600
CITIES = ("Lisbon", "Vienna", "Oslo", "Prague", "Dublin", "Athens", "Warsaw", "Madrid", "Zurich", "Geneva")


@dataclass(frozen=True, kw_only=True)
class Story:
    """A document with a fact in it, and the question about that.

    Attributes
    ----------
    title : str
        What the document is, in a few words.
    text : Text
        The document, the fact included.
    question : str
    fact : str
        A sentence of the document that answers the question.
    must_contain : str
        What every right answer contains.
    """

    title: str
    text: Text
    question: str
    fact: str
    must_contain: str


def log(seed: int, /) -> Story:
    """Return 70 lines that differ in the time and a number, and one that is like no other.

    Parameters
    ----------
    seed : int
        Of the numbers, and of where the odd line is.
    """
    random = Random(seed)
    lines = [
        f"{8 + line // 12:02d}:{5 * (line % 12):02d} The ferry leaves the north pier with {random.randint(20, 90)} "
        "passengers and no delay."
        for line in range(LINES)
    ]
    lines.insert(random.randrange(10, LINES - 10), f"10:17 {FACT}")
    return Story(
        title="a log that repeats itself",
        text=Text(name="log", documents=(("\n".join(lines),),)),
        question="Where has the captain left his red umbrella?",
        fact=FACT,
        must_contain="bakery in Harbor Street",
    )


def reference(seed: int, /, *, with_fact: bool = True) -> Story:
    """Return running text, CPython's language reference, with a sentence about its author between two paragraphs.

    Parameters
    ----------
    seed : int
        Of the city that is asked for, and of where the sentence is: in the middle half of the text.
    with_fact : bool
        Whether the sentence is there at all.
    """
    random, paragraphs, room = Random(seed), list[str](), CHARACTERS
    city = CITIES[seed % len(CITIES)]
    fact = f"The author of this chapter lives in {city}."
    for paragraph in language_reference(*CHAPTERS).paragraphs:
        room -= len(paragraph)
        if room < 0:
            break
        paragraphs.append(paragraph)
    if with_fact:
        paragraphs.insert(random.randrange(len(paragraphs) // 4, 3 * len(paragraphs) // 4 + 1), fact)
    return Story(
        title="ordinary running text",
        text=Text(name="reference", documents=(tuple(paragraphs),)),
        question="Where does the author of this chapter live? Answer with one sentence.",
        fact=fact,
        must_contain=city,
    )
