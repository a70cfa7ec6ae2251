"""Hypothesis profiles, and the backends of this run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from graphkv.testing import describe, label
from tests.support.subjects import SUBJECTS, strict

# Nearly all that JAX does here is to compile: quickly, and each program once for all workers and later runs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

settings.register_profile("default", max_examples=30, deadline=None, database=None, derandomize=True, print_blob=True)
settings.register_profile("thorough", max_examples=1_000, deadline=None, database=None, print_blob=True)
# For a library that compiles at every new shape. What must be caught is caught by fixed examples.
settings.register_profile("quick", max_examples=2, deadline=None, database=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("GRAPHKV_HYPOTHESIS", "default"))


def asked(config: pytest.Config) -> list[str]:
    """The backends of ``--graphkv-backend``, if the kit's plugin is there and has the option."""
    return config.getoption("graphkv_backend", [])


def pytest_report_header(config: pytest.Config) -> str:
    return "" if asked(config) else describe(SUBJECTS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    # tests/gpu has a fixture of its own; where the option is used, the plugin brings it.
    on_gpu = metafunc.definition.get_closest_marker("gpu")
    if "backend" in metafunc.fixturenames and not own and not on_gpu and not asked(metafunc.config):
        metafunc.parametrize("backend", SUBJECTS, ids=label, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long tests first, so that no worker is left with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    callspec = getattr(item, "callspec", None)
    if strict is None:
        return (yield)
    with strict.flags_for(callspec.params.get("backend") if callspec else None):
        return (yield)


@pytest.fixture(scope="session")
def default_model() -> str:
    """The folder of the model that the pages name by its hub id."""
    model = pytest.importorskip("graphkv.workbench.model", reason="SmolLM2 needs graphkv[demo]")
    return str(model._converted_default(print))
