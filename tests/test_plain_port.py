"""The port to plain Python lists: written from the documentation pages alone, and proved by the golden vectors."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphkv.testing import examples

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "examples"))
plain_port = importlib.import_module("plain_port")

CASES = [
    pytest.param(case, id=f"{file}-{case['name']}")
    for file in plain_port.CORE
    for case in json.loads((DOCS / "vectors" / f"{file}.json").read_text(encoding="utf-8"))["cases"]
]

ERRORS = json.loads((DOCS / "vectors" / "errors.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES)
def test_port_gives_what_is_expected(case):
    assert plain_port.same(case["expected"], plain_port.run(case), case["tolerance"])


def test_port_runs_by_itself(capsys):
    assert plain_port.main() == 0
    assert "cases passed" in capsys.readouterr().out


def test_port_is_as_long_as_the_pages_say():
    text = (DOCS / "examples" / "plain_port.py").read_text(encoding="utf-8")
    method = text[text.index("# The method") : text.index("# The vectors")]

    assert 340 <= len(text.splitlines()) <= 370
    assert 165 <= len(method.splitlines()) <= 185


@pytest.mark.parametrize("case", [case for case in ERRORS if case["rule"].startswith("a sum")], ids=lambda c: c["name"])
def test_port_refuses_a_sum_of_other_than_one_round(case):
    with pytest.raises(ValueError, match="one round"):
        plain_port.run(case)


def test_port_shares_nothing_with_the_library():
    tree = ast.parse((DOCS / "examples" / "plain_port.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_comparison_sees_a_difference():
    assert not plain_port.same({"count": 90}, {"count": 89}, None)
    assert not plain_port.same({"data": [1.0, "NaN"]}, {"data": [1.0, 0.0]}, {"relative": 1e-5, "absolute": 1e-6})
    assert plain_port.same({"data": ["-0.0", "NaN"]}, {"data": [0.0, float("nan")]}, None)
    assert not plain_port.same({"data": ["Infinity"]}, {"data": [1.0]}, {"relative": 1e-5, "absolute": 1e-6})


def test_small_backend_of_the_porting_page_passes_every_vector():
    sys.path.insert(0, str(DOCS / "vectors"))
    vectors = importlib.import_module("vectors")
    backend = importlib.import_module("my_backend").BACKEND

    for cases in vectors.load().values():
        for case in cases:
            assert vectors.differences(case["expected"], vectors.run(case, backend), case["tolerance"]) == []


@pytest.mark.parametrize("claim", examples.__all__)
def test_small_backend_of_the_porting_page_passes_the_examples_of_the_kit(claim):
    getattr(examples, claim)(importlib.import_module("my_backend").BACKEND)


NODE = shutil.which("node")
with_node = pytest.mark.skipif(NODE is None, reason="the port to JavaScript needs node, which is not installed here")


def javascript(*paths):
    command = [NODE, DOCS / "examples" / "plain_port.mjs", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@with_node
def test_port_to_javascript_gives_what_is_expected():
    done = javascript()

    assert (done.returncode, done.stderr) == (0, "")
    counts = re.findall(r"^(\w+)\.json: (\d+) of (\d+) cases passed$", done.stdout, re.MULTILINE)
    # Of the policies that merge it has Absorb.
    merging = json.loads((DOCS / "vectors" / "merging.json").read_text(encoding="utf-8"))["cases"]
    absorbed = [case for case in merging if case["arguments"]["policy"]["name"] == "Absorb"]
    assert [name for name, _, _ in counts] == [*plain_port.CORE, "merging"]
    assert sum(int(total) for _, _, total in counts) == len(CASES) + len(absorbed)
    assert len(absorbed) >= 9


@with_node
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("counts", '"count": 90', '"count": 89'),
        ("select", "[1, 2]", "[0, 2]"),
        ("merging", '"threshold": 0.75', '"threshold": 0.25'),
        ("merging", "0.69314718056", "0.693"),
    ],
)
def test_port_to_javascript_sees_a_difference(tmp_path, file, right, wrong):
    text = (DOCS / "vectors" / f"{file}.json").read_text(encoding="utf-8")
    assert right in text
    changed = tmp_path / f"{file}.json"
    changed.write_text(text.replace(right, wrong), encoding="utf-8")

    assert javascript(changed).returncode == 1
