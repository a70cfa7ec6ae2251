"""A backend of an installed package is found by its name."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from graphkv import Backend, BackendError, BackendUnavailableError, select
from graphkv.core import backend as core_backend

SCORES = np.asarray([1.0, 3.0, 2.0])


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with one module and one entry point, as pip would."""
    monkeypatch.setattr(core_backend, "LOADED", {})
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str, target: str, package: str = "thirdparty") -> None:
        (tmp_path / f"{package}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[graphkv.backends]\n{name} = {target}\n")

    yield write
    for module in ("thirdparty", "another"):
        sys.modules.pop(module, None)


GOOD = """
    import array_api_compat.numpy as xp
    import numpy as np
    from graphkv import Backend

    BACKEND = Backend(name="third", library="numpy", xp=xp, to_numpy=np.asarray)
"""


def test_a_name_is_found_among_the_entry_points(install):
    install("third", GOOD, "thirdparty:BACKEND")

    assert core_backend.load("third").name == "third"
    assert select(SCORES, 2, backend="third").tolist() == [1, 2]


def test_it_is_not_imported_before_it_is_asked_for(install):
    install("third", GOOD, "thirdparty:BACKEND")

    select(SCORES, 2)

    assert "thirdparty" not in sys.modules


def test_a_built_in_name_stays_built_in(install):
    install("numpy", GOOD, "thirdparty:BACKEND")

    assert core_backend.load("numpy").name == "numpy"


@pytest.mark.parametrize(
    ("source", "target", "error", "words"),
    [
        ("import no_such_library", "thirdparty:BACKEND", BackendUnavailableError, "no_such_library"),
        ("", "thirdparty:BACKEND", BackendError, "must be where its entry point says"),
        ("BACKEND = 3", "thirdparty:BACKEND", BackendError, "must be a Backend .* got int"),
    ],
    ids=["its library is missing", "its value is missing", "its value is something else"],
)
def test_a_broken_entry_point_says_what_is_wrong(install, source, target, error, words):
    install("third", source, target)

    with pytest.raises(error, match=words) as caught:
        select(SCORES, 2, backend="third")

    assert "'third'" in str(caught.value)
    assert "thirdparty:BACKEND" in str(caught.value)


def test_two_packages_with_one_name_are_an_error(install):
    install("third", GOOD, "thirdparty:BACKEND")
    install("third", GOOD, "another:BACKEND", package="another")

    with pytest.raises(BackendError, match=r"one entry point; got \['another:BACKEND', 'thirdparty:BACKEND'\]"):
        select(SCORES, 2, backend="third")


def test_an_unknown_name_says_where_was_looked():
    with pytest.raises(BackendError, match=r"'numpy'.*entry point of the group 'graphkv.backends'.*got 'nonesuch'"):
        select(SCORES, 2, backend="nonesuch")


@pytest.mark.parametrize("name", ["cupy", "jax", "mlx", "torch"])
def test_a_library_that_is_not_installed_is_named_with_the_way_to_get_it(name):
    # In a process where the import fails, because the library may well be installed here.
    code = f"""
        import sys
        sys.modules[{name!r}] = None
        import numpy, graphkv
        try:
            graphkv.select(numpy.ones(3), 1, backend={name!r})
        except graphkv.BackendUnavailableError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)

    assert f"pip install 'graphkv[{name}]'" in done.stdout


def test_cupy_without_a_device_says_so():
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        pytest.skip("there is a CUDA device")

    with pytest.raises(BackendUnavailableError, match=r"needs a CUDA device; CuPy .* finds none"):
        select(SCORES, 2, backend="cupy")


def test_cupy_refuses_an_environment_that_takes_digits_from_products(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.delitem(sys.modules, "graphkv.backends.cupy", raising=False)
    monkeypatch.setenv("CUPY_TF32", "1")

    with pytest.raises(BackendUnavailableError, match="needs products in full float32; CUPY_TF32=1"):
        select(SCORES, 2, backend="cupy")


def test_cupy_names_the_package_for_an_older_driver(monkeypatch):
    cupy = pytest.importorskip("cupy")
    if cupy.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 12040)

    with pytest.raises(
        BackendUnavailableError, match="driver here is for CUDA 12 and this CuPy for 13: pip install cupy-cuda12x"
    ):
        select(SCORES, 2, backend="cupy")


def test_a_backend_value_needs_no_name_at_all():
    value = Backend(name="mine", library="numpy", xp=core_backend.load("numpy").xp, to_numpy=np.asarray)

    assert select(SCORES, 2, backend=value).tolist() == [1, 2]
