"""CuPy checked without a GPU, rung by rung; what no rung here can show is in ``tests/gpu``.

====  =================================================================  ==========================================
rung  what                                                               shows
====  =================================================================  ==========================================
2     tests of the backends, and the kit, on the stand-in (own process)   logic, which calls are made, no waiting
3     every distinct call of rung 2 on the real wheel over host memory    the wheel accepts each call
4     the stand-in's table of names made anew from the wheel              the stand-in's names are true
====  =================================================================  ==========================================

Rung 1 is array-api-strict in ``tests/backends``. Rung 5 would compile kernels; graphkv ships none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def on_standin(folder: Path, *arguments: str) -> tuple[dict[str, int], Path]:
    """Run pytest on the stand-in. Gives how many tests did what, and the file of calls."""
    calls, report = folder / "calls.json", folder / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    done = run(HERE / "run.py", "--calls", calls, *options, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ElementTree.parse(report).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}, calls


def wheel():
    cupy = pytest.importorskip("cupy", reason="the wheel of CuPy is not installed")
    if cupy.is_available():
        pytest.skip("there is a CUDA device: tests/gpu says more")
    return cupy


@pytest.fixture(scope="session")
def rung_2(tmp_path_factory):
    return on_standin(
        tmp_path_factory.mktemp("rung_2"),
        "tests/backends/test_exactness.py",
        "tests/backends/test_agreement.py",
        "tests/adapters/test_on_every_library.py",
        "tests/cupy_ladder/on_standin/test_no_waiting.py",
        "-k",
        "(cupy or test_no_waiting) and not planted",
    )


def test_rung_2_the_tests_of_the_backends_pass_on_the_standin(rung_2):
    counts, calls = rung_2

    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}
    assert counts["tests"] > 50
    assert len(json.loads(calls.read_text())) > 500


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    pytest.importorskip("graphkv.testing.suite", reason="graphkv.testing is not here")
    arguments = ("--pyargs", "graphkv.testing.suite", "--graphkv-backend", "cupy")
    return on_standin(tmp_path_factory.mktemp("kit"), *arguments)


def test_rung_2_the_kit_passes_on_the_standin(kit):
    counts, calls = kit

    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}
    assert counts["tests"] > 60
    assert len(json.loads(calls.read_text())) > 5000


def test_rung_2_the_standin_is_as_strict_as_it_says_and_planted_mistakes_are_found(tmp_path):
    counts, _ = on_standin(tmp_path, "tests/cupy_ladder/on_standin")

    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}
    assert counts["tests"] > 80


def test_rung_2_can_fail(tmp_path):
    """A backend with one call that CuPy lacks does not pass."""
    bad = tmp_path / "test_bad.py"
    bad.write_text(
        "import cupy, graphkv\n"
        "from dataclasses import replace\n"
        "from graphkv.core.backend import load\n"
        "def test_it():\n"
        "    bad = replace(load('cupy'), top_k=lambda s, k, t=None, *, backend: cupy.argsort(-s, stable=True)[..., :k])\n"
        "    graphkv.select(cupy.ones(4), 2, backend=bad)\n"
    )

    done = run(HERE / "run.py", "-q", "-p", "no:cacheprovider", bad)

    assert done.returncode == 1
    assert "unexpected keyword argument 'stable'" in done.stdout


@pytest.mark.parametrize("recorded", ["rung_2", "kit"])
def test_rung_3_the_wheel_accepts_every_call(recorded, request):
    wheel()
    _, calls = request.getfixturevalue(recorded)

    done = run(HERE / "replay.py", calls)

    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads(done.stdout)
    assert verdicts["what was rejected"] == []
    assert verdicts["calls"] == len(json.loads(calls.read_text()))
    assert verdicts["accepted, stopped at the driver"] > 300


def test_rung_3_can_fail(tmp_path):
    wheel()
    array = ["array", [3, 4], "float32"]
    bad = [
        ["cupy", "argsort", [array], {"stable": ["value", True]}],
        ["cupy", "multiply.at", [array, ["array", [2], "int64"], array], {}],
        ["cupy", "take_along_axis", [array, ["array", [3], "int64"]], {"axis": ["value", 1]}],
        ["cupy", "sum", [array], {"where": ["array", [3, 4], "bool"]}],
        ["ndarray", "to_device", [array, ["value", "cpu"]], {}],
    ]
    good = [["cupy", "sort", [array], {"axis": ["value", -1]}], ["operator", "getitem", [array, ["value", 0]], {}]]
    (tmp_path / "calls.json").write_text(json.dumps(bad + good))

    done = run(HERE / "replay.py", tmp_path / "calls.json")

    assert done.returncode == 1
    assert [call for _, call in json.loads(done.stdout)["what was rejected"]] == bad


def test_rung_4_the_manifest_is_that_of_the_wheel():
    cupy = pytest.importorskip("cupy", reason="the wheel of CuPy is not installed")
    committed = (HERE / "manifest.json").read_text()
    version = json.loads(committed)["version"]
    if cupy.__version__ != version:
        pytest.skip(f"the manifest is of CuPy {version}; installed is {cupy.__version__}")

    # In a process of its own, because names of submodules depend on what was imported before.
    made = run("-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import manifest as m; print(m.text(m.build()))")

    assert made.returncode == 0, made.stderr
    assert made.stdout.strip().splitlines() == committed.strip().splitlines()


def test_the_bodies_of_the_gpu_tests_pass_on_the_standin(tmp_path):
    """Which shows only that they are no nonsense: streams and memory are left out, the device is not there."""
    counts, _ = on_standin(tmp_path, "tests/gpu/test_device.py", "-k", "cupy and not only_on_a_device")

    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}
    assert counts["tests"] > 5
