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
# Policies run op by op, which takes minutes too: `test_jax` and `test_agreement` hold them against NumPy's. Nine shapes
# of every step are nine programs of every step, and whether shapes stay is a matter of the portable bodies.
LEFT_OUT = (
    "test_every_policy_keeps_what_numpy_keeps",
    "test_batches_and_axes_of_one_stay",
    "test_layouts_never_matter",
    "test_results_outlive_the_next_call",
    "test_an_array_changed_in_place_is_read_again",
    "test_four_threads_at_once",
)
# The claims about ranking, which is where the second backend differs. XLA sorts subnormal numbers as zeros, so the
# places of special scores are not among them: that is why the shipped backend has a top_k of its own.
RANKED = (
    "test_among_duplicates_the_importance_decides",
    "test_exactly_the_budget_is_kept",
    "test_eviction_agrees_with_the_oracle",
    "test_fusion_agrees_with_the_oracle",
    "test_fusion_of_long_rows",
    "test_graph_agrees_with_the_oracle",
    "test_graphs_of_long_rows",
    "test_kept_sets_grow_with_the_budget",
    "test_long_rows_are_ranked",
    "test_long_rows_are_selected",
    "test_minus_zero_equals_zero_and_nan_is_last",
    "test_protected_tokens_are_kept_first",
    "test_scores_one_bit_apart_keep_their_order",
    "test_selection_agrees_with_the_oracle",
    "test_top_k_agrees_with_the_oracle",
    "test_top_k_ranks_rows_and_tiers_apart",
)


# The steps of this backend are the portable bodies, compiled whole. Run op by op (`jax:portable`) they are compiled op
# by op, which takes minutes; the second case has the portable top_k inside the compiled bodies instead.
@pytest.mark.jax
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "properties"),
    [("jax", sorted(set(suite.__all__) - set(LEFT_OUT))), ("standard:BACKEND", RANKED)],
    ids=["jax", "standard"],
)
def test_the_kit_passes_on_jax(name, properties, tmp_path):
    (tmp_path / "standard.py").write_text(STANDARD)
    settings = {"GRAPHKV_HYPOTHESIS": "quick"}
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    kit = (
        "tests/test_conformance.py",
        "--graphkv-backend",
        name,
        "-k",
        f"not portable and ({' or '.join(properties)})",
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *kit],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == len(properties)
    assert "skipped" not in run.stdout
