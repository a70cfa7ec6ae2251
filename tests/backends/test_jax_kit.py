"""The whole kit on JAX, in processes of its own: JAX compiles for every new shape, so the examples are few."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphkv.testing import suite

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]
STANDARD = """
from dataclasses import replace
from graphkv.backends import jax

BACKEND = replace(jax.BACKEND, top_k=None)
"""


# The steps of this backend are the portable bodies, compiled whole. Run op by op (`jax:portable`) they are compiled op
# by op, which takes minutes; the second case has the portable primitives inside the compiled bodies instead.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "standard:BACKEND"])
def test_the_kit_passes_on_jax(name, tmp_path):
    (tmp_path / "standard.py").write_text(STANDARD)
    settings = {
        "GRAPHKV_HYPOTHESIS": "quick",
        # What is compiled runs once or twice: compiling is what takes the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    kit = ("tests/test_conformance.py", "--graphkv-backend", name, "-k", "not portable")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *kit],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == len(suite.__all__)
    assert "skipped" not in run.stdout
