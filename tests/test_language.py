"""The language of the code: docstrings that open with a verb of the trade, and one spelling."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for folder in ("graphkv", "tests", "docs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_build" not in path.parts and path != Path(__file__)
]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

# A function returns, computes, selects or checks; it does not give, say or tell.
OPENINGS = re.compile(r"(Give|Say|Tell)s?\b")
BRITISH = re.compile(
    r"\b\w*(?:neighbour|colour|favour|behaviour|honour|centre|analyse|catalogue"
    r"|(?:normal|quant|recogn|optim|summar|minim|maxim|initial|organ|general|serial|personal|token|vector|synchron)is"
    r"(?:e|ed|es|er|ing|ation)\b)\w*",
    re.IGNORECASE,
)


def docstrings(source):
    """(line, text) of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node)


def prose(source):
    """(line, text) of every docstring and comment, without the names of code in them."""
    comments = (
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    for line, text in (*docstrings(source), *comments):
        # Public names keep the spelling that they were published with.
        yield line, re.sub(r"\b\w*_\w*\b", "", text)


def openings(source):
    return [line for line, text in docstrings(source) if OPENINGS.match(text)]


def misspelled(source):
    return [(line, word) for line, text in prose(source) for word in BRITISH.findall(text)]


@each_file
def test_docstrings_say_what_is_returned_or_done(path):
    assert openings(path.read_text(encoding="utf-8")) == []


@each_file
def test_spelling_is_american(path):
    assert misspelled(path.read_text(encoding="utf-8")) == []


def test_those_tests_can_fail():
    source = 'def f():\n    """Give the neighbours."""\n    # normalised, as `age_normalised`\n    return 1\n'

    assert openings(source) == [2]
    assert misspelled(source) == [(2, "neighbours"), (3, "normalised")]
    assert len(FILES) > 40
