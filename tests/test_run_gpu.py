"""The tests of a GPU start with what `.ci/run-gpu` asks for: the testing extra and one library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Without())
"""


@pytest.mark.parametrize("missing", [("array_api_strict",), ("array_api_strict", "torch"), ("cupy",)], ids=" ".join)
def test_gpu_tests_are_collected_without(missing, tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT.format(missing=missing))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:cacheprovider", "-q", "tests/gpu"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert " skipped" in run.stdout
    assert "error" not in run.stdout.lower().replace("backendunavailableerror", "")
