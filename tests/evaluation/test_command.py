"""``graphkv eval`` as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from graphkv.__main__ import main
from graphkv.evaluation.records import read_header, read_records
from graphkv.evaluation.runs import provenance, workers
from graphkv.evaluation.runs.config import Config, load_config, suite_names

OPTIONS = ("--length", 240, "--budget", 64, "--policy", "snapkv", "--policy", "h2o+graphkv", "--threads", 1)


def run(*arguments):
    return main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of three prompts that nobody interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", folder) == 0
    return folder


def test_a_run_has_every_record_and_says_what_it_is(finished):
    records = read_records(finished)
    header = json.loads((finished / "run.json").read_text())

    # 3 prompts x (2 questions agnostic, 1 aware) x (full and 2 policies)
    assert len(records) == 3 * 3 * 3
    assert {record.seed for record in records} == {10_000, 10_001, 10_002}
    assert {record.split for record in records} == {"held-out"}
    assert header["config"]["policies"] == ["full", "snapkv", "h2o+graphkv"]
    assert header["threads"] == 1
    for sha256 in (header["model"]["sha256"], header["text"]["sha256"]):
        assert len(sha256) == 64
    (session,) = header["sessions"]
    assert {"graphkv", "python", "torch", "transformers"} <= session["versions"].keys()
    assert session["machine"]["cores"] == os.cpu_count()


def test_the_same_seed_gives_the_same_file(finished, tiny, tmp_path):
    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path) == 0

    assert (tmp_path / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()


def test_another_seed_gives_other_numbers(finished, tiny, tmp_path):
    assert run("--model", tiny, *OPTIONS, "--prompts", 1, "--seed", 7, "--split", "tuning", "--output", tmp_path) == 0

    records = read_records(tmp_path)
    assert {record.seed for record in records} == {7}
    assert {record.nll for record in records}.isdisjoint(record.nll for record in read_records(finished))


def test_a_killed_run_goes_on_without_losing_or_repeating_an_example(finished, tiny, tmp_path):
    command = [sys.executable, "-m", "graphkv", "eval", "--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path]
    path = tmp_path / "records.jsonl"
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = path.read_bytes()
    whole = (finished / "records.jsonl").read_bytes()
    assert 0 < len(before) < len(whole)
    # As if the kill had come in the middle of a line.
    path.write_bytes(before[:-30])

    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path) == 0
    assert path.read_bytes() == whole


def test_a_run_that_breaks_goes_on(finished, tiny, tmp_path, monkeypatch):
    answered = []

    def break_off(*arguments, evaluate=workers.evaluate):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(arguments)
        return evaluate(*arguments)

    monkeypatch.setattr(workers, "evaluate", break_off)
    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path) == 130
    assert len(read_records(tmp_path)) == 18
    answered.append(None)
    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path) == 0
    assert (tmp_path / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()


def test_a_finished_run_does_nothing_but_print(finished, tiny, tmp_path, capsys, monkeypatch):
    before = (finished / "records.jsonl").read_bytes()
    monkeypatch.setattr(workers, "evaluate", None)

    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", finished) == 0
    assert (finished / "records.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    for word in ("needle, aware", "needle, agnostic", "continuation, agnostic", "h2o+graphkv", "records.jsonl"):
        assert word in shown


def test_other_settings_for_a_run_are_refused(finished, tiny, capsys):
    assert run("--model", tiny, *OPTIONS, "--prompts", 4, "--output", finished) == 2
    assert "holds another run: prompts is 3 there, 4 now" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_give_the_same_file(finished, tiny, tmp_path):
    assert run("--model", tiny, *OPTIONS, "--prompts", 3, "--output", tmp_path, "--workers", 2) == 0

    assert (tmp_path / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()


def test_rows_of_a_data_set_are_asked_and_scored(tiny, tmp_path, capsys):
    row = {"context": "Ann is here. " * 20, "question": "Who?", "answers": ["Ann"], "metric": "edit_similarity"}
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps({**row, "max_new_tokens": 6}) + "\n")

    options = ("--data", path, "--budget", 64, "--policy", "knorm", "--output", tmp_path / "out")
    assert run("--model", tiny, *options) == 0
    records = read_records(tmp_path / "out")
    assert [(record.mode, record.policy) for record in records] == [
        ("agnostic", "full"), ("agnostic", "knorm"), ("aware", "full"), ("aware", "knorm")
    ]  # fmt: skip
    assert all(0 <= record.score <= 1 and len(record.text) <= 6 for record in records)
    assert "people, aware" in capsys.readouterr().out
    path.write_text(json.dumps({**row, "max_new_tokens": 5}) + "\n")
    assert run("--model", tiny, *options) == 2


def test_a_file_of_settings(tiny, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('tasks = ["continuation"]\nlengths = [240]\nbudgets = [64]\npolicies = ["knorm"]\nprompts = 5\n')

    assert run("--config", path, "--model", tiny, "--prompts", 1, "--output", tmp_path / "out") == 0
    assert [record.policy for record in read_records(tmp_path / "out")] == ["full", "knorm"]


def test_options_that_are_the_default_change_a_file_of_settings_too(tiny, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('tasks = ["continuation"]\npolicies = ["knorm"]\ndevice = "nowhere"\ndtype = "bfloat16"\n')
    options = ["--model", tiny, "--length", 240, "--budget", 64, "--prompts", 1, "--output", tmp_path / "out"]

    assert run("--config", path, *options) == 2
    assert run("--config", path, *options, "--device", "cpu", "--dtype", "float32") == 0
    assert read_header(tmp_path / "out")["model"]["dtype"] == "torch.float32"


def test_the_suites_are_sound():
    assert suite_names() == ["decoding", "quick", "ruler", "standard"]
    standard = load_config("standard", None, {})
    assert standard.split == "held-out"
    assert standard.prompts >= 40
    assert set(standard.lengths) == {1024, 2048, 4096}
    assert set(standard.budgets) == {128, 256, 512, 1024}
    for base in ("snapkv", "pyramidkv", "h2o", "knorm"):
        assert {base, f"{base}+graphkv", f"{base}+degree"} <= set(standard.policies)
    assert {"full", "random", "keydiff"} <= set(standard.policies)


def test_the_full_cache_is_always_there_and_first():
    assert Config(policies=("knorm", "full", "knorm")).policies == ("full", "knorm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "slow"], "--suite must be one of decoding, quick, ruler, standard; got 'slow'"),
        (["--suite", "quick", "--config", "x.toml"], "exclude each other"),
        (["--config", "missing.toml"], "missing.toml cannot be read"),
        (["--policy", "best"], "--policy must be one of full, snapkv"),
        (["--task", "haystack"], "--task must be one of needle"),
        (["--split", "test"], "split must be one of ['held-out', 'tuning']"),
        (["--mode", "both"], "modes must be one of"),
        (["--seed", "9999"], "must stay within the 10000 prompts of a split"),
        (["--text", "missing.txt"], "missing.txt cannot be read"),
        (["--data", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["--budget", "0"], "--budget must be at least 1 token; got '0'"),
        (["--budget", "0%"], "--budget must lie above 0% and be at most 100%"),
        (["--budget", "25%", "--data", "rows.jsonl"], "--budget must be a number of tokens with --data"),
        (["--device", "abacus"], "--device must be one that PyTorch has here; got 'abacus'"),
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--prompts", "0"], "Invalid value for '--prompts'"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--output", tmp_path / "out") == 2

    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("budget = [1]", "unknown settings: budget; known: batch, budgets"),
        ("budgets = 1", "budgets must be a list of at least one entry; got 1"),
        ("budgets = [0]", "budgets must hold numbers of at least 1; got 0"),
        ("budgets = ['a']", "--budget must be a number of tokens or a percentage like 25%; got 'a'"),
        ("budgets = [2.5]", "budgets must hold entries of type int or str; got 2.5"),
        ("dtype = 1", "dtype must be a string; got 1"),
        ("generate = 1", "generate must be True or False; got 1"),
        ("x = ", "must be TOML"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    assert run("--config", path, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_the_model_cannot_hold_is_refused(tiny, tmp_path, capsys):
    assert run("--model", tiny, "--length", 2040, "--output", tmp_path / "out") == 2
    assert "--length must fit into the model's 2048 positions" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphkv.evaluation.runs.command", None)

    assert run("--output", tmp_path) == 2
    assert "graphkv eval needs: pip install 'graphkv[eval]'" in capsys.readouterr().err


def test_the_commit_is_that_of_this_checkout_and_of_no_other(monkeypatch, tmp_path):
    def is_inside(top):
        return lambda folder, *arguments: (top or str(folder.parent)) if "rev-parse" in arguments else "abc"

    monkeypatch.setattr(provenance, "_git", is_inside("/elsewhere"))
    assert provenance._commit() is None
    monkeypatch.setattr(provenance, "_git", is_inside(None))
    assert provenance._commit() == "abc"
