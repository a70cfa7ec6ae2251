"""A type checker tells a third party what is wrong with a function of its backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import graphkv

pytest.importorskip("mypy")

SOURCE = """
from typing import Any

from graphkv import Backend, Graph

xp: Any = None


def top_k(scores: Any, k: int, tiers: Any, *, backend: Backend) -> Any: ...


def propagate(importance: Any, graph: Graph, **options: Any) -> Any: ...


def by_namespace(scores: Any, k: int, tiers: Any, *, xp: Any) -> Any: ...


def by_edges(importance: Any, graph: list[int], **options: Any) -> Any: ...


def without_count(values: Any, index: Any, *, backend: Backend) -> Any: ...


Backend(name="right", xp=xp, to_numpy=list, top_k=top_k, propagate=propagate)
Backend(name="wrong", xp=xp, to_numpy=list, top_k=by_namespace)
Backend(name="wrong", xp=xp, to_numpy=list, propagate=by_edges)
Backend(name="wrong", xp=xp, to_numpy=list, segment_sum=without_count)
Backend(name="wrong", xp=xp, to_numpy=list, select=top_k)
"""


def test_a_function_of_another_form_is_a_type_error(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", "mine.py"]
    environment = os.environ | {"MYPYPATH": str(Path(graphkv.__file__).parents[1])}

    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    wrong = [place for place, line in enumerate(SOURCE.splitlines(), 1) if line.startswith('Backend(name="wrong"')]
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert [int(line.split(":")[1]) for line in errors] == wrong, found.stdout + found.stderr
    for error, protocol in zip(errors, ("TopK", "PropagateStep", "SegmentReduce", "SelectStep"), strict=True):
        assert f'expected "{protocol} | None"' in error
