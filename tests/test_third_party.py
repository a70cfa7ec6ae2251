"""A backend as a stranger would write it: passed by value, named on pytest's command line, found by entry point."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import graphkv
from graphkv import Decay, GraphKV, StreamingLLM, evict
from graphkv.core import backend as core_backend
from graphkv.testing import suite

BACKEND_SOURCE = '''
"""graphkv on array-api-strict: what the standard lacks, in the standard's own words."""

from functools import partial

import array_api_strict as xp
import numpy as np

from graphkv import Backend


def to_numpy(x):
    return np.asarray(x.to_device(xp.Device("CPU_DEVICE")))


def top_k(scores, k, tiers, *, backend):
    """Sort by score, then stably by tier; NaN is a tier of its own, after the numbers."""
    is_nan = xp.isnan(scores)
    tier = xp.astype(is_nan, xp.int64)
    if tiers is not None:
        tier = tier + 2 * xp.astype(tiers, xp.int64)
    plain = xp.where(is_nan, xp.zeros_like(scores), scores)
    order = xp.argsort(plain, axis=-1, descending=True, stable=True)
    order = xp.take_along_axis(order, xp.argsort(xp.take_along_axis(tier, order, axis=-1), stable=True), axis=-1)
    return order[..., :k]


def by_segment(values, index, num_segments, *, reduce, nothing, backend):
    """A table of segments by values: large, but short to write."""
    segments = xp.arange(num_segments, dtype=index.dtype, device=index.device)
    hit = index[..., None, :] == segments[:, None]
    return reduce(xp.where(hit, values[..., None, :], xp.full_like(values, nothing)[..., None, :]), axis=-1)


BACKEND = Backend(
    name="stranger",
    xp=xp,
    to_numpy=to_numpy,
    library="array_api_strict",
    top_k=top_k,
    segment_product=partial(by_segment, reduce=xp.prod, nothing=1),
    segment_sum=partial(by_segment, reduce=xp.sum, nothing=0),
    guard=lambda array: np.errstate(all="ignore"),
)
'''

BROKEN_SOURCE = """
import dataclasses

from stranger.backend import BACKEND


def without_tiers(scores, k, tiers, *, backend):
    return BACKEND.top_k(scores, k, None, backend=backend)


BROKEN = dataclasses.replace(BACKEND, name="broken", top_k=without_tiers)
NOT_A_BACKEND = "stranger"
"""

# Few examples: that the properties hold is shown elsewhere.
QUICK_SOURCE = """
from hypothesis import settings

settings.register_profile("quick", max_examples=4, database=None, derandomize=True)
settings.load_profile("quick")
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A folder outside the repository, with a stranger's package in it."""
    package = tmp_path / "stranger"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "backend.py").write_text(BACKEND_SOURCE)
    (package / "broken.py").write_text(BROKEN_SOURCE)
    (tmp_path / "quick.py").write_text(QUICK_SOURCE)
    return tmp_path


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as from a stranger's shell, with the kit's plugin as the only one."""
    root = Path(graphkv.__file__).parents[1]
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(root)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "graphkv.testing.plugin", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


NUM_CLAIMS = len(suite.__all__)


def test_the_stranger_s_backend_is_short():
    code = [line for line in BACKEND_SOURCE.splitlines() if line.strip()]
    assert len(code) <= 42


def test_a_backend_is_passed_by_value(elsewhere, monkeypatch):
    monkeypatch.syspath_prepend(elsewhere)
    stranger = importlib.import_module("stranger.backend")
    for name in ("stranger.backend", "stranger"):
        monkeypatch.delitem(sys.modules, name)
    keys = stranger.xp.asarray(np.random.default_rng(0).normal(size=(1, 2, 12, 4)))
    policy = GraphKV(StreamingLLM(budget=8, num_sinks=2), Decay(source_ratio=0.5, neighbors=2))

    found = evict(policy, keys, backend=stranger.BACKEND)

    wanted = evict(policy, stranger.to_numpy(keys))
    assert type(found.kept) is type(keys)
    np.testing.assert_array_equal(stranger.to_numpy(found.kept), wanted.kept)
    suite.test_graph_agrees_with_the_oracle(backend=stranger.BACKEND)
    suite.test_propagation_agrees_with_the_oracle(backend=stranger.BACKEND)
    suite.test_selection_agrees_with_the_oracle(backend=stranger.BACKEND)


def test_one_line_runs_the_kit_on_a_backend_from_anywhere(elsewhere):
    options = ("--graphkv-backend", "stranger.backend:BACKEND", "-k", "not portable")
    found = pytest_in(elsewhere, "-p", "quick", "--pyargs", "graphkv.testing.suite", *options)

    assert found.returncode == 0, found.stdout + found.stderr
    # Without overrides it is array-api-strict as `tests/test_conformance.py` runs it.
    assert f"{NUM_CLAIMS} passed, {NUM_CLAIMS} deselected" in found.stdout
    device = "array_api_strict.Device('CPU_DEVICE')"
    assert f"graphkv backends: stranger ({device}), stranger:portable ({device})" in found.stdout


def test_the_option_repeats_and_knows_built_in_names(elsewhere):
    options = ("--graphkv-backend", "numpy", "--graphkv-backend", "stranger.backend:BACKEND")
    found = pytest_in(elsewhere, "-v", "-p", "quick", "--pyargs", "graphkv.testing.suite", *options, "-k", "kept")

    assert found.returncode == 0, found.stdout + found.stderr
    for title in ("numpy", "numpy:portable", "stranger", "stranger:portable"):
        assert f"test_exactly_the_budget_is_kept[{title}] PASSED" in found.stdout


def test_the_kit_runs_by_re_export(elsewhere):
    (elsewhere / "test_stranger.py").write_text(
        textwrap.dedent(
            """
            import pytest

            from graphkv.testing import label, variants
            from graphkv.testing.suite import *

            from stranger.backend import BACKEND


            @pytest.fixture(scope="session", params=variants(BACKEND), ids=label)
            def backend(request):
                return request.param
            """
        )
    )

    collected = pytest_in(elsewhere, "--collect-only", "-q", "-p", "quick", "test_stranger.py")
    found = pytest_in(elsewhere, "-v", "-p", "quick", "test_stranger.py", "-k", "kept")

    assert f"{2 * NUM_CLAIMS} tests collected" in collected.stdout
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_exactly_the_budget_is_kept[stranger:portable] PASSED" in found.stdout


def test_a_wrong_backend_fails(elsewhere):
    options = ("--graphkv-backend", "stranger.broken:BROKEN", "-k", "ranks_rows_and_tiers")
    found = pytest_in(elsewhere, "-v", "--pyargs", "graphkv.testing.suite", *options)

    assert found.returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_top_k_ranks_rows_and_tiers_apart[broken] FAILED" in found.stdout
    # What is wrong is the override; without it, the namespace is as right as before.
    assert "test_top_k_ranks_rows_and_tiers_apart[broken:portable] PASSED" in found.stdout


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("stranger.nowhere:BACKEND", "No module named 'stranger.nowhere'"),
        ("stranger.backend:NONESUCH", "has no attribute 'NONESUCH'"),
        ("stranger.broken:NOT_A_BACKEND", "must be a graphkv.Backend; got str"),
        ("nonesuch", "backend must be one of"),
    ],
)
def test_a_backend_that_was_asked_for_and_is_missing_fails(elsewhere, asked, said):
    found = pytest_in(elsewhere, "--pyargs", "graphkv.testing.suite", "--graphkv-backend", asked)

    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--graphkv-backend {asked}: " in found.stderr
    assert said in found.stderr


@pytest.mark.skipif(
    not hasattr(core_backend, "ENTRY_POINTS"), reason="core/backend.py does not look names up among entry points yet"
)
def test_a_backend_is_found_by_entry_point(elsewhere):
    metadata = elsewhere / "stranger-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[graphkv.backends]\nstranger = stranger.backend:BACKEND\n")

    options = ("--graphkv-backend", "stranger", "-k", "kept")
    found = pytest_in(elsewhere, "-v", "-p", "quick", "--pyargs", "graphkv.testing.suite", *options)

    assert found.returncode == 0, found.stdout + found.stderr
    for title in ("stranger", "stranger:portable"):
        assert f"test_exactly_the_budget_is_kept[{title}] PASSED" in found.stdout


PLAIN_TEST = """
import sys

import pytest


def test_nothing_is_loaded():
    heavy = {"array_api_compat", "hypothesis", "numpy", "scipy", "torch"}
    assert not heavy & set(sys.modules)


def test_the_name_backend_is_free(request):
    with pytest.raises(LookupError):
        request.getfixturevalue("backend")
"""


def test_the_plugin_does_nothing_until_it_is_asked(elsewhere):
    (elsewhere / "test_plain.py").write_text(PLAIN_TEST)

    idle = pytest_in(elsewhere, "test_plain.py")
    in_use = pytest_in(elsewhere, "test_plain.py", "--graphkv-backend", "numpy")

    assert idle.returncode == 0, idle.stdout + idle.stderr
    assert "2 passed" in idle.stdout
    assert "graphkv backends" not in idle.stdout
    # The check itself can fail:
    assert "FAILED test_plain.py::test_nothing_is_loaded" in in_use.stdout
    assert "FAILED test_plain.py::test_the_name_backend_is_free" in in_use.stdout
