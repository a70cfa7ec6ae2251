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


# JAX's arrays cannot be written to and have one layout, so four of these cannot fail; to compile them takes a minute.
# Policies run op by op, which takes minutes too: `test_jax` and `test_agreement` hold them against NumPy's.
LEFT_OUT = (
    "test_every_policy_keeps_what_numpy_keeps",
    "test_layouts_never_matter",
    "test_results_outlive_the_next_call",
    "test_an_array_changed_in_place_is_read_again",
    "test_four_threads_at_once",
)
# Examples that have nothing to do with top_k, in which the second backend differs: to compile them takes minutes.
ELSEWHERE = (
    "test_the_namespace_has_what_is_used",
    "test_segments_of_many_values",
    "test_attention_received_in_real_shapes",
    "test_attention_leaves_out_what_is_not_finite",
    "test_degrees_of_long_rows",
    "test_propagation_over_large_graphs",
    "test_duplicates_of_several_sources_fall_by_a_factor_each",
    "test_graphs_made_by_hand",
    "test_powers_of_small_distances_keep_their_digits",
    "test_pagerank_of_long_rows",
    "test_pagerank_of_odd_rows",
    "test_pagerank_grows_with_the_importance",
    *LEFT_OUT,
)


# XLA sorts subnormal numbers as zeros, which is why the shipped backend has a top_k of its own.
PORTABLE_SORT = ("test_special_scores_have_their_places",)


# The steps of this backend are the portable bodies, compiled whole. Run op by op (`jax:portable`) they are compiled op
# by op, which takes minutes; the second case has the portable primitives inside the compiled bodies instead.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left_out"),
    [("jax", LEFT_OUT), ("standard:BACKEND", (*ELSEWHERE, *PORTABLE_SORT))],
    ids=["jax", "standard"],
)
def test_the_kit_passes_on_jax(name, left_out, tmp_path):
    (tmp_path / "standard.py").write_text(STANDARD)
    settings = {
        "GRAPHKV_HYPOTHESIS": "quick",
        # What is compiled runs once or twice: compiling is what takes the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    kit = ("tests/test_conformance.py", "--graphkv-backend", name, "-k", " and not ".join(["not portable", *left_out]))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *kit],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == len(suite.__all__) - len(left_out)
    assert "skipped" not in run.stdout
