"""The golden vectors of docs/vectors: well formed, up to date, and true on every backend that is installed."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import graphkv
from graphkv.testing.subject import OPTIONAL, label
from tests.support.subjects import SUBJECTS

FOLDER = Path(__file__).parents[1] / "docs" / "vectors"
sys.path.insert(0, str(FOLDER))
vectors = importlib.import_module("vectors")

CASES = [pytest.param(case, id=f"{file}-{case['name']}") for file, cases in vectors.load().items() for case in cases]
PORTABLE = dict.fromkeys(OPTIONAL)


@pytest.fixture(scope="module", params=["numpy", "torch", "mlx", "array_api_strict"])
def library(request):
    if request.param == "array_api_strict":
        module = pytest.importorskip(request.param)
        return graphkv.Backend(name="array_api_strict", xp=module, to_numpy=np.asarray)
    found = [subject for subject in SUBJECTS if label(subject) == request.param]
    return found[0] if found else pytest.skip(f"{request.param} is not installed")


@pytest.fixture(scope="module", params=["own", "portable"])
def candidate(request, library):
    return library if request.param == "own" else replace(library, **PORTABLE)


@pytest.mark.parametrize("case", CASES)
def test_backend_gives_what_is_expected(case, candidate):
    try:
        got = vectors.run(case, candidate)
    except vectors.NotApplicableError as missing:
        pytest.skip(str(missing))

    assert vectors.differences(case["expected"], got, case["tolerance"]) == []


@pytest.mark.parametrize("path", sorted(set(FOLDER.glob("*.json")) - {FOLDER / "schema.json"}), ids=lambda p: p.stem)
def test_file_obeys_the_schema(path):
    schema = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)

    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema, jsonschema.Draft202012Validator)


def test_schema_refuses_a_broken_case():
    schema = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    document = json.loads((FOLDER / "select.json").read_text(encoding="utf-8"))
    del document["cases"][0]["expected"]["kept"]["dtype"]

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


def test_generating_again_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / "generate.py", "--check"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_file_is_out_of_date(monkeypatch, tmp_path):
    generate = importlib.import_module("generate")
    for path in FOLDER.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    changed = tmp_path / "counts.json"
    changed.write_text(changed.read_text(encoding="utf-8").replace('"count": 90', '"count": 89'), encoding="utf-8")
    monkeypatch.setattr(vectors, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])

    assert generate.main() == 1


def test_the_presets_of_d2o_are_the_library_s():
    made = {case["name"]: vectors.policy(case["arguments"]["policy"]) for case in vectors.load()["merging"]}

    for name, preset in (("d2o_paper", graphkv.D2O.paper(4)), ("d2o_official", graphkv.D2O.official(3))):
        wanted = replace(preset, base=replace(preset.base, num_sinks=1, num_recent=1))
        assert made[name] == made[f"{name}_padding"] == wanted
    assert graphkv.D2O.official(3).base.protection(3) == replace(made["d2o_official"].base, num_sinks=4).protection(3)


def test_tolerance_is_for_finite_weights_and_scores_only():
    loose = {"relative": 0.5, "absolute": 0.5}

    assert vectors.differences([3, 0, 0.75], [3, 0, 0.5], loose) == []
    assert vectors.differences([3, 0, 0.75], [3, 1, 0.75], loose) != []
    for expected, got in (("Infinity", 1.0), (1.0, "Infinity"), ("Infinity", "-Infinity"), ("NaN", 1.0), (1.0, "NaN")):
        assert vectors.differences([expected], [got], loose) != []


def test_vectors_catch_a_wrong_backend():
    numpy_backend = importlib.import_module("graphkv.backends.numpy").BACKEND

    def later_index_first(scores, k, tiers, *, backend):
        last = scores.shape[-1] - 1
        tiers = None if tiers is None else tiers[..., ::-1]
        return last - numpy_backend.top_k(scores[..., ::-1], k, tiers, backend=backend)

    wrong = replace(numpy_backend, top_k=later_index_first)
    case = next(case for case in vectors.load()["order"] if case["name"] == "all_equal")

    assert vectors.differences(case["expected"], vectors.run(case, wrong), None) != []
