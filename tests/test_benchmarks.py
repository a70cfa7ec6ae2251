"""The benchmark program runs, on the tiniest sizes: what it writes is whole. How fast anything is, is not tested."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.contests import SHAPES, contests
from benchmarks.measure import Contest, in_turns

HERE = [name for name in contests() if not name.startswith("kvpress")]


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", HERE)
def test_both_sides_of_a_row_give_arrays_without_nan(name):
    for call in contests()[name].make(True):
        found = call()
        found = getattr(found, "scores", found)
        assert found is None or not torch.as_tensor(found).isnan().any()


def test_a_run_writes_every_row_it_was_asked_for(tmp_path, capsys):
    output = tmp_path / "results.json"

    assert main(["--tiny", "--rounds", "2", "--only", "graph step, torch", "--output", str(output)]) == 0
    assert main(["--tiny", "--rounds", "1", "--only", "import", "--output", str(output)]) == 0

    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert set(rows) == {f"graph step, torch: {shape}" for shape in SHAPES} | {"import graphkv"}
    for shape in SHAPES:
        row = rows[f"graph step, torch: {shape}"]
        assert row["met"] == (row["ratio"] <= 1.5)
        assert row["memory"] >= 0
    assert "bare product" in capsys.readouterr().out


def test_without_kvpress_its_row_says_so(tmp_path, capsys):
    output = tmp_path / "results.json"

    main(["--tiny", "--only", "kvpress", "--kvpress-python", str(tmp_path / "none"), "--output", str(output)])

    (row,) = json.loads(output.read_text())["rows"]
    assert row["ratio"] is None or row["ratio"] > 0  # the second in an environment that has kvpress
    assert (row["ratio"] is None) == ("NOT MEASURED" in row["note"]) == ("NOT MEASURED" in capsys.readouterr().out)


def test_turns_change_who_goes_first():
    calls = []
    sides = (lambda: calls.append("of"), lambda: calls.append("to"))

    in_turns(Contest(name="", make=lambda tiny: sides, of="of", to="to"), 3)

    assert calls == ["of", "to", "to", "of", "of", "to", "to", "of"]
