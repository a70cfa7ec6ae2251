"""Metrics of generated text, from 0 to 1.

Normalization (lower case, no punctuation, no articles, single spaces) is that of the SQuAD evaluation
(arXiv:1606.05250, section 6), which LongBench (arXiv:2308.14508) uses too.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

__all__ = ["METRICS", "edit_similarity", "exact", "f1", "lines", "rouge_l", "score", "substring_all", "substring_any"]

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower the case, drop punctuation and articles, and collapse spaces.

    >>> normalize("The  Cat, a dog!")
    'cat dog'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact(text: str, references: Sequence[str]) -> float:
    """Return whether the text is one of the references, after normalization."""
    return float(any(normalize(text) == normalize(reference) for reference in references))


def substring_all(text: str, references: Sequence[str]) -> float:
    """Return the share of references that occur in the text, whatever their case (RULER's metric for lists)."""
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


def substring_any(text: str, references: Sequence[str]) -> float:
    """Return whether any reference occurs in the text, whatever its case (RULER's metric for alternatives)."""
    return float(any(reference.lower() in text.lower() for reference in references))


def f1(text: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, for the best reference.

    >>> round(f1("the red house", ["a red brick house"]), 3)
    0.8
    """
    return max(_f1(normalize(text).split(), normalize(reference).split()) for reference in references)


def _f1(words: list[str], expected: list[str]) -> float:
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return ROUGE-L: as F1, of the longest common subsequence of words, for the best reference (Lin 2004, section 3).

    >>> rouge_l("police kill the gunman", ["police killed the gunman"])
    0.75
    """
    return max(_rouge_l(text.lower().split(), reference.lower().split()) for reference in references)


def _rouge_l(words: list[str], expected: list[str]) -> float:
    common = LCSseq.similarity(words, expected)
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def edit_similarity(text: str, references: Sequence[str]) -> float:
    """Return 2 M / T of the longest common subsequence of characters, for the best reference.

    M are the common characters and T the characters of both.

    >>> edit_similarity("abcd", ["abed"])
    0.75
    """
    return max(fuzz.ratio(text, reference) / 100 for reference in references)


def lines(text: str, references: Sequence[str]) -> float:
    r"""Return the share of a reference's lines that the text has, in their order, for the best reference.

    Lines in between take nothing away; blank lines and spaces around a line do not count.

    >>> lines("a = 1\nb = 3\nc = 4", ["a = 1\nb = 2\nc = 4\nd = 5"])
    0.5
    """
    return max(_lines(_stripped(text), _stripped(reference)) for reference in references)


def _lines(found: list[str], expected: list[str]) -> float:
    return LCSseq.similarity(found, expected) / len(expected)


def _stripped(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "substring_all": substring_all,
    "substring_any": substring_any,
    "f1": f1,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "lines": lines,
}


def score(metric: str, text: str, references: Sequence[str]) -> float:
    """Score a text by a metric's name, rounded to 6 places."""
    return round(METRICS[metric](text, references), 6)
