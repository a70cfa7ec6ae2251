"""The notebook of the documentation runs from its first cell to its last, and is stored without output."""

import ast
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "notebooks" / "tour.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def run(cell, namespace):
    """Run a cell as Jupyter does: what its last line says is shown."""
    tree = ast.parse(cell)
    shown = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(PATH), "exec"), namespace)
    return None if shown is None else eval(compile(shown, str(PATH), "eval"), namespace)


def test_no_output_is_stored():
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
def test_every_cell_runs(default_model):
    namespace = {"__name__": "notebook"}

    shown = [run(cell.replace("HuggingFaceTB/SmolLM2-135M-Instruct", default_model), namespace) for cell in CODE]

    assert shown[-1]["layers"] == 30
    assert shown[-1]["dropped per layer"] > 5 * namespace["budget"] - 7
