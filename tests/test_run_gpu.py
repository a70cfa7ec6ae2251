"""`.ci/run-gpu` on a machine with next to nothing: it asks for a device, and prints a record in any case."""

import os
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ALWAYS = ("numpy", "scipy", "hypothesis", "pytest", "array-api-compat")
LIBRARIES = {"cupy": ("cupy-cuda13x",), "torch": ("torch", "transformers"), "jax": ("jax",)}


def closure(names):
    """Return the installed distributions that these need, themselves included."""
    found, left = {}, list(names)
    while left:
        name = left.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.name in found:
            continue
        found[distribution.name] = distribution
        needs = [Requirement(each) for each in distribution.requires or ()]
        left += [each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def bare(folder, libraries):
    """Make an environment that has these libraries and what they need, and no graphkv: links to what is installed."""
    venv.create(folder, with_pip=False, symlinks=True)
    (into,) = folder.glob("lib/python*/site-packages")
    for distribution in closure([*ALWAYS, *(name for library in libraries for name in LIBRARIES[library])]).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            there = Path(distribution.locate_file(top))
            if there.exists() and there.suffix != ".pth" and not (into / top).exists():
                (into / top).symlink_to(there)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def environment():
    hidden = {"PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "GRAPHKV_HYPOTHESIS"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden and "PYTEST_XDIST" not in name}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "", "OMP_NUM_THREADS": "1"}


def run(environment, *command, **more):
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment | more, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("libraries", [("cupy",), ("torch", "jax")], ids=" ".join)
def test_a_bare_machine_without_a_device_is_told_so_by_every_library(libraries, environment, tmp_path):
    for library in libraries:
        pytest.importorskip(library)
    python = bare(tmp_path, libraries)
    assert run(environment, python, "-c", "import array_api_strict").returncode == 1

    asked = run(environment, ROOT / ".ci" / "run-gpu", python)
    collected = run(environment, python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "tests/gpu")

    assert asked.returncode == 1
    assert "nothing to record, because no library finds a CUDA device here" in asked.stderr
    said = {"cupy": "finds none", "torch": "finds no CUDA device", "jax": "finds no CUDA device"}
    lines = {line.split(":")[0].strip(): line for line in asked.stderr.splitlines() if line.startswith("  ")}
    for library, line in zip(("cupy", "torch", "jax"), lines.values(), strict=True):
        assert (said[library] if library in libraries else f"needs {library}") in line, line
    assert collected.returncode == 0, collected.stdout[-2000:] + collected.stderr[-2000:]
    assert " skipped" in collected.stdout
    assert "error" not in collected.stdout.lower().replace("backendunavailableerror", "")


def test_a_rehearsal_on_the_cpu_records_every_part_and_what_failed(environment, tmp_path):
    """Tests are collected, and those of the cache run; the benchmarks find no device, and are recorded as failed."""
    for library in ("torch", "jax"):
        pytest.importorskip(library)
    python = bare(tmp_path, ("torch", "jax"))
    rehearsal = {"GRAPHKV_GPU_REHEARSAL": "1"}

    recorded = run(environment, ROOT / ".ci" / "run-gpu", python, "--collect-only", **rehearsal)
    some = "torch and (merges or select) and not numpy"
    tests = ("tests/gpu/test_transformers.py", "tests/gpu/test_vectors.py", "-k", some)
    rehearsed = run(environment, python, "-m", "pytest", "-p", "no:cacheprovider", "-q", *tests, **rehearsal)

    assert recorded.returncode == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in recorded.stdout.splitlines() if "|" in line]
    rows = {name: row for name, *row in cells}
    for part in ("torch", "cupy", "jax-1", "backends"):
        assert "tests collected" in rows[part][0], recorded.stdout[-3000:]
        assert rows[part][1] == "0"
    assert rows["benchmarks"][1] == "1"
    assert {"Python", "CUDA of torch", "commit", "device, driver"} <= rows.keys()
    assert recorded.stdout.rstrip().endswith("---- end of record ----")
    assert rehearsed.returncode == 0, rehearsed.stdout[-3000:]
    assert " skipped" not in rehearsed.stdout
