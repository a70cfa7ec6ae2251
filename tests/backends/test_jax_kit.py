"""The whole kit on JAX, in processes of its own: JAX compiles for every new shape, so the examples are few."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not portable", "portable"])
def test_the_kit_passes_on_jax(which):
    settings = {
        "GRAPHKV_HYPOTHESIS": "quick",
        # What is compiled runs once or twice: compiling is what takes the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/test_conformance.py"]
        + ["--graphkv-backend", "jax", "-k", which],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 35
    assert "skipped" not in run.stdout
