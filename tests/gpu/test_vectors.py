"""The golden vectors of docs/vectors, on the device."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "vectors"
sys.path.insert(0, str(FOLDER))
vectors = importlib.import_module("vectors")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("file", sorted(vectors.load()))
def test_golden_vectors(backend, file):
    wrong, count = {}, 0
    for case in vectors.load()[file]:
        try:
            got = vectors.run(case, backend)
        except vectors.NotApplicableError:
            continue
        count += 1
        found = vectors.differences(case["expected"], got, case["tolerance"])
        if found:
            wrong[case["name"]] = found

    assert wrong == {}
    assert count
