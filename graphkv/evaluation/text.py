"""The running text that prompts are cut from: CPython's documentation, or the user's own."""

from __future__ import annotations

import argparse
import ast
import configparser
import difflib
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

from ..core.errors import ArgumentError

__all__ = ["SPLITS", "Haystack", "Text", "default_code", "default_text", "read_text"]

# Seeds of the prompts. Whatever is tuned is tuned on the first, and reported on the second.
SPLITS = {"tuning": range(10_000), "held-out": range(10_000, 20_000)}
# Of every document, tuning prompts read the first third and held-out prompts the rest, so that they share no text.
TUNING_SHARE = 1 / 3
# Longer paragraphs are cut at line ends, so that there is a place for a needle near every depth.
LONGEST = 400
MODULES = (argparse, ast, configparser, difflib, inspect, textwrap)
GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents, as paragraphs.

    Attributes
    ----------
    name : str
    documents : tuple of tuple of str
        The paragraphs of each document.
    """

    name: str
    documents: tuple[tuple[str, ...], ...]

    def sha256(self) -> str:
        """Give the hash of the whole text."""
        return hashlib.sha256("\f".join("\n\n".join(paragraphs) for paragraphs in self.documents).encode()).hexdigest()

    def of_split(self, split: str, /) -> list[str]:
        """Give the paragraphs of one of the `SPLITS`."""
        result: list[str] = []
        for paragraphs in self.documents:
            border = round(len(paragraphs) * TUNING_SHARE)
            result += paragraphs[:border] if split == "tuning" else paragraphs[border:]
        return result


def default_text() -> Text:
    """Give CPython's language reference, which comes with every Python, each paragraph once."""
    # The longest chapters first: the short ones are mostly parts of them.
    chapters = sorted(topics.topics, key=lambda name: (-len(topics.topics[name]), name))
    return Text(name="pydoc_data.topics", documents=_documents(topics.topics[name] for name in chapters))


def default_code() -> Text:
    """Give modules of the standard library that are written in Python."""
    return Text(name="standard library", documents=_documents(inspect.getsource(module) for module in MODULES))


def read_text(path: Path, /) -> Text:
    """Read a UTF-8 file as one document, or every ``.txt`` and ``.md`` file of a folder as a document each.

    Raises
    ------
    ArgumentError
        If it cannot be read, or holds nothing.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    contents = []
    for file in files:
        try:
            contents.append(file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ArgumentError(f"--text {file} cannot be read: {reason}") from error
    documents = _documents(contents)
    if not documents:
        raise ArgumentError(f"--text {path} must hold text; it is empty")
    return Text(name=path.name, documents=documents)


def _documents(contents: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Cut at empty lines; drop what was there before, so that no prompt meets the same paragraph twice."""
    seen: set[str] = set()
    documents = []
    for content in contents:
        paragraphs = []
        for part in content.split("\n\n"):
            paragraph = part.strip("\n")
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append(tuple(paragraphs))
    return tuple(documents)


class Haystack:
    """A text as tokens, to cut pieces of an exact length from.

    Parameters
    ----------
    paragraphs : list of str
    tokenizer : transformers tokenizer

    Attributes
    ----------
    ids : list of int
        All tokens; paragraphs end with an empty line.
    starts : list of int
        Where something may be inserted: the first token of each paragraph or, in a long one, of some lines.
    """

    def __init__(self, paragraphs: list[str], tokenizer: Any) -> None:
        pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph)]
        self.ids: list[int] = []
        self.starts: list[int] = []
        for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
            self.starts.append(len(self.ids))
            self.ids += ids

    def cut(self, seed: int, num_tokens: int, /) -> tuple[list[int], list[int]]:
        """Cut a piece from somewhere; the end is followed by the beginning.

        Parameters
        ----------
        seed : int
            Says where. Neighboring seeds lie far apart, and many seeds spread evenly.
        num_tokens : int

        Returns
        -------
        ids : list of int
            Exactly `num_tokens`, beginning at a start.
        starts : list of int
            Where something may be inserted, 0 included.

        Raises
        ------
        ArgumentError
            If the text is shorter than that.
        """
        if num_tokens > len(self.ids):
            raise ArgumentError(
                f"--text must have at least {num_tokens} tokens for prompts of this length; this split has "
                f"{len(self.ids)}"
            )
        first = int(seed * GOLDEN % 1 * len(self.starts))
        begin = self.starts[first]
        ids = (self.ids[begin:] + self.ids[:begin])[:num_tokens]
        places = [(start - begin) % len(self.ids) for start in self.starts[first:] + self.starts[:first]]
        return ids, [place for place in places if place < num_tokens]


def _pieces(paragraph: str) -> list[str]:
    """Cut a paragraph at line ends into pieces of about `LONGEST` characters; the last one ends with an empty line."""
    pieces = [""]
    for line in paragraph.split("\n"):
        if len(pieces[-1]) + len(line) > LONGEST and pieces[-1]:
            pieces.append("")
        pieces[-1] += line + "\n"
    pieces[-1] += "\n"
    return pieces
