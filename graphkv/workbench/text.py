"""Running text: CPython's documentation and code, or the user's own files, cut into paragraphs."""

from __future__ import annotations

import argparse
import ast
import configparser
import difflib
import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics

from ..core.errors import ArgumentError
from ..core.files import read_file

__all__ = ["Text", "language_reference", "listed", "read_text", "standard_library"]

MODULES = (argparse, ast, configparser, difflib, inspect, textwrap)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents, as paragraphs.

    Attributes
    ----------
    name : str
    documents : tuple of tuple of str
        The paragraphs of each document. Joined by empty lines, they are the document again.
    """

    name: str
    documents: tuple[tuple[str, ...], ...]

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs of all documents."""
        return [paragraph for document in self.documents for paragraph in document]

    def sha256(self) -> str:
        """Return the hash of the whole text."""
        return hashlib.sha256("\f".join("\n\n".join(document) for document in self.documents).encode()).hexdigest()

    def distinct(self) -> Text:
        """Return the text with each paragraph once, where it comes first, and without newlines around it."""
        seen: set[str] = set()
        documents = []
        for document in self.documents:
            paragraphs = list(dict.fromkeys(paragraph.strip("\n") for paragraph in document))
            new = tuple(paragraph for paragraph in paragraphs if paragraph not in seen)
            seen.update(new)
            if new:
                documents.append(new)
        return replace(self, documents=tuple(documents))


def language_reference(*chapters: str) -> Text:
    """Return CPython's language reference, which comes with every Python.

    Parameters
    ----------
    *chapters : str
        Names of ``pydoc_data.topics``. None: all of them, the longest first, because the short ones are mostly parts of
        those.
    """
    found = topics.topics
    names = chapters or sorted(found, key=lambda name: (-len(found[name]), name))
    return Text(name="pydoc_data.topics", documents=_documents(found[name] for name in names))


def standard_library() -> Text:
    """Return the code of modules of the standard library that are written in Python."""
    return Text(name="standard library", documents=_documents(inspect.getsource(module) for module in MODULES))


def read_text(path: Path, /) -> Text:
    """Read a UTF-8 file as one document, or every ``.txt`` and ``.md`` file of a folder as a document each.

    Raises
    ------
    ArgumentError
        If it cannot be read, or is empty.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    documents = _documents(read_file(file, "--text") for file in files)
    if not documents:
        raise ArgumentError(f"--text {path} must hold text; it is empty")
    return Text(name=path.name, documents=documents)


def listed(words: Sequence[str | int], /) -> str:
    """Join words like a, b and c."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def _documents(contents: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Cut each content at empty lines; leave out what is blank."""
    documents = (
        tuple(paragraph for paragraph in content.strip("\n").split("\n\n") if paragraph.strip()) for content in contents
    )
    return tuple(document for document in documents if document)
