"""What holds for the package as a whole: light imports, complete public names, documented functions."""

import inspect
import subprocess
import sys

import pytest

import graphkv

LIBRARIES = ("array_api_compat", "cupy", "jax", "mlx", "numpy", "scipy", "torch", "transformers")


def loaded_after(statement):
    """Which array libraries a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print([name for name in {LIBRARIES!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import graphkv",
        "import graphkv.adapters, graphkv.core, graphkv.backends, graphkv.integrations",
        "import graphkv; graphkv.GraphKV(graphkv.SnapKV(budget=512))",
        "import graphkv.__main__",
    ],
)
def test_importing_graphkv_imports_no_array_library(statement):
    assert loaded_after(statement) == "[]"


def test_that_test_can_fail():
    assert "'numpy'" in loaded_after("import graphkv.backends.numpy")
    assert "'torch'" not in loaded_after("import graphkv, numpy; graphkv.select(numpy.ones(3), 2)")


def test_all_names_are_public_and_sorted():
    assert sorted(graphkv.__all__) == graphkv.__all__
    # pytest adds names of its own, such as @py_builtins, to modules whose asserts it rewrites.
    names = {name for name in dir(graphkv) if name.isidentifier() and not name.startswith("_")}
    rooms = {"adapters", "backends", "cli", "core", "demo", "evaluation"}
    rooms |= {"integrations", "naming", "testing", "workbench"}
    assert names - rooms == set(graphkv.__all__)


@pytest.mark.parametrize("name", ["build_graph", "degree", "evict", "fuse", "propagate", "select"])
def test_steps_say_shapes_and_errors(name):
    text = inspect.getdoc(getattr(graphkv, name))
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}" in text
    assert "shape (" in text


def test_every_error_is_also_a_builtin():
    assert issubclass(graphkv.ArgumentError, (graphkv.GraphKVError, ValueError))
    expected = {
        graphkv.ArgumentError: ValueError,
        graphkv.ArgumentTypeError: TypeError,
        graphkv.BackendError: TypeError,
        graphkv.BackendUnavailableError: ImportError,
    }
    for error, builtin in expected.items():
        assert issubclass(error, graphkv.GraphKVError)
        assert issubclass(error, builtin)
