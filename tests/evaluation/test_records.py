"""A run on disk: what is refused, what is repaired."""

import json

import pytest

from graphkv import ArgumentError
from graphkv.evaluation.records import Run, read_records
from tests.evaluation.test_statistics import record

IDENTITY = {"config": {"budgets": [1, 2]}, "model": {"sha256": "aa"}}
SESSION = {"commit": "c"}
SIZES = ("tokens_kept", "cache_bytes")


def test_records_come_back_as_they_went(tmp_path):
    records = [record("a", "full", 1.0), record("a", "x", 2.5, text="naïve\nlines", score=0.5)]
    Run(tmp_path / "run", IDENTITY, SESSION).append(records)

    assert read_records(tmp_path / "run") == records
    lines = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a|0|aware|full|None|None", "a|0|aware|x|8|4"]


def test_nothing_is_written_twice(tmp_path):
    records = [record("a", "full", 1.0), record("a", "x", 2.5)]
    Run(tmp_path, IDENTITY, SESSION).append(records[:1])
    Run(tmp_path, IDENTITY, SESSION).append(records)

    assert read_records(tmp_path) == records
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 2


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_cut_off(tmp_path, cut):
    records = [record("a", "full", 1.0), record("a", "x", 2.5)]
    Run(tmp_path, IDENTITY, SESSION).append(records)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])

    assert read_records(tmp_path) == records[:1]
    run = Run(tmp_path, IDENTITY, SESSION)
    assert run.done == {records[0].key}
    run.append(records)
    assert read_records(tmp_path) == records


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({**IDENTITY, "config": {"budgets": [1, 3]}}, r"budgets is \[1, 2\] there, \[1, 3\] now"),
        ({**IDENTITY, "model": {"sha256": "bb"}}, 'sha256 is "aa" there, "bb" now'),
        ({**IDENTITY, "threads": 2}, "threads is null there, 2 now"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path, identity, message):
    Run(tmp_path, IDENTITY, SESSION)
    before = (tmp_path / "run.json").read_text()

    with pytest.raises(ArgumentError, match=message):
        Run(tmp_path, identity, SESSION)
    assert (tmp_path / "run.json").read_text() == before


def test_damaged_runs_are_refused(tmp_path):
    run = Run(tmp_path, IDENTITY, SESSION)
    run.append([record("a", "full", 1.0)])
    path = tmp_path / "records.jsonl"
    content = path.read_text()

    path.write_text(content + content)
    with pytest.raises(ArgumentError, match="some are there twice"):
        Run(tmp_path, IDENTITY, SESSION)
    path.write_text('{"key": "a"}\n')
    with pytest.raises(ArgumentError, match="line 1 must be a record of schema 2 or older"):
        Run(tmp_path, IDENTITY, SESSION)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArgumentError, match="damaged"):
        Run(tmp_path, IDENTITY, SESSION)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ArgumentError, match=r"records.jsonl but no run.json"):
        Run(tmp_path, IDENTITY, SESSION)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArgumentError, match="cannot be written"):
        Run(tmp_path / "out", IDENTITY, SESSION)
    assert (tmp_path / "out").read_text() == "mine"


def test_records_of_schema_1_are_read_and_say_nothing_of_sizes(tmp_path):
    old = {name: value for name, value in vars(record("a", "x", 2.5)).items() if name not in SIZES}
    (tmp_path / "records.jsonl").write_text(json.dumps({"key": "a|0|aware|x|8|4", **old}) + "\n")

    (found,) = read_records(tmp_path)
    assert found == record("a", "x", 2.5)
    assert [getattr(found, name) for name in SIZES] == [None, None]
    assert not found.is_off_budget


def test_a_run_of_schema_1_is_not_continued(tmp_path):
    Run(tmp_path, IDENTITY, SESSION)
    header = tmp_path / "run.json"
    header.write_text(header.read_text().replace('"schema": 2', '"schema": 1'))

    with pytest.raises(ArgumentError, match="schema is 1 there, 2 now"):
        Run(tmp_path, IDENTITY, SESSION)


@pytest.mark.parametrize(("kept", "expected"), [(8.0, False), (7.5, True), (None, False)])
def test_a_cache_is_off_its_budget_if_it_was_measured_to_be(kept, expected):
    assert record("a", "x", 1.0, tokens_kept=kept).is_off_budget == expected
    assert not record("a", "full", 1.0, tokens_kept=64.0).is_off_budget
