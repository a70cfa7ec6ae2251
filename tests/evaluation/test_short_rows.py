"""Rows of any length: answered, or skipped with a line; no run ends at one."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from graphkv.__main__ import main
from graphkv.evaluation.prompts.prompts import Prompt, Question
from graphkv.evaluation.prompts.rows import read_rows
from graphkv.evaluation.records import read_records
from graphkv.evaluation.runs.config import Config, load_config
from graphkv.evaluation.runs.prompt_run import evaluate
from graphkv.naming.policies import BASES, make_policy
from graphkv.naming.presets import load_preset
from graphkv.workbench.text import read_text
from tests.integrations.reference import reference_logits

EVERYBODY = (*BASES, *(f"{base}+graphkv" for base in BASES))
ROW = {"context": "A few words, more than a window holds.", "question": "Who?", "answers": ["Ann"], "max_new_tokens": 3}


def prompt_of(num_tokens, num_question):
    question = Question(
        task="rows", kind=None, depth=None, ids=tuple(range(50, 50 + num_question)), answer=(7, 9),
        references=("x",), metric="f1", max_new_tokens=2,
    )  # fmt: skip
    ids = tuple(range(100, 100 + num_tokens))
    return Prompt(name="rows/0", length=None, seed=None, split=None, ids=ids, questions=(question,))


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("num_tokens", "num_question"), [(1, 1), (2, 1), (2, 40), (9, 1), (9, 40), (26, 2), (33, 40)])
def test_every_policy_answers_a_prompt_that_is_shorter_than_its_window(
    model, tokenizer, num_tokens, num_question, sinks
):
    """Windows are of 32 tokens; budgets reach from 1 token to more than there are."""
    config = Config(budgets=(1, 8, 25, 64), policies=EVERYBODY, sinks=(sinks,), generate=True)
    records = evaluate(model, tokenizer, prompt_of(num_tokens, num_question), config)

    there = [budget for budget in (1, 8, 25) if budget < num_tokens]
    assert len(records) == 2 * (1 + len(there) * len(EVERYBODY))
    assert {record.budget for record in records} == {None, *there}
    assert all(math.isfinite(record.nll) and record.text is not None for record in records)


@pytest.mark.parametrize("name", ["snapkv", "tova", "h2o", "pyramidkv", "snapkv+graphkv"])
@torch.inference_mode()
def test_a_window_that_ends_in_the_question_is_the_references(model, tokenizer, name):
    """The prompt is shorter than the window, prompt and question together are longer."""
    prompt, policy = prompt_of(26, 30), make_policy(name, 8, sinks=2)
    question = prompt.questions[0]
    records = evaluate(model, tokenizer, prompt, Config(budgets=(8,), policies=(name,), sinks=(2,)))
    (found,) = [record for record in records if (record.mode, record.budget) == ("aware", 8)]

    ids = torch.tensor([*prompt.ids, *question.ids, *question.answer])
    logits, _ = reference_logits(model, ids, policy, [26 + 29, 3])
    assert found.nll == pytest.approx(float(cross_entropy(logits[-3:-1], torch.tensor(question.answer))), abs=2e-4)


def run(tiny, path, output, *options):
    arguments = ("--model", tiny, "--data", path, "--metric", "f1", "--threads", 1, "--output", output, *options)
    return main(["eval", *map(str, arguments)])


def write(path, *rows, encoding="utf-8"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return path


def test_short_rows_end_no_run_and_skipped_ones_are_counted(tiny, tmp_path, capsys):
    rows = [
        ROW,
        {**ROW, "context": ""},
        {**ROW, "context": "é", "question": ""},
        {**ROW, "context": " \n", "question": " "},
        {**ROW, "answers": [""]},
        {**ROW, "answers": []},
        {**ROW, "context": "\ud83d"},
        {**ROW, "context": "🙂" * 9, "question": "¿Quién?"},
        {**ROW, "question": "Why? " * 500},
    ]
    path = write(tmp_path / "rows.jsonl", *rows, encoding="utf-8-sig")
    options = ("--policy", "snapkv", "--policy", "h2o", "--budget", 8, "--mode", "aware", "--mode", "agnostic")
    assert run(tiny, path, tmp_path / "out", *options) == 0

    told = " ".join(capsys.readouterr().err.split())
    assert "Skipped 2 of 9 rows, because there is no answer: line 5, 6" in told
    assert "Skipped 1 of 9 rows, because a text is not Unicode: it holds half a surrogate pair: line 7" in told
    assert "Skipped 1 of 9 rows, because question and answer leave no room for a context" in told
    assert "Skipped 1 of 9 rows, because the context has no tokens: line 2" in told
    records = read_records(tmp_path / "out")
    assert {record.prompt for record in records} == {"rows/0", "rows/2", "rows/3", "rows/5"}
    assert {record.prompt for record in records if record.budget == 8} == {"rows/0", "rows/5"}
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "Rows that were skipped, because there is no answer: 2." in (
        tmp_path / "out" / "report" / "report.md"
    ).read_text(encoding="utf-8")

    # What is lost is made again, and nothing else.
    lines = (tmp_path / "out" / "records.jsonl").read_bytes()
    (tmp_path / "out" / "records.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:5]))
    assert run(tiny, path, tmp_path / "out", *options) == 0
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == lines


def test_a_file_of_rows_that_cannot_be_answered_is_no_error(tiny, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", {**ROW, "answers": [" "]}, {**ROW, "answers": []})
    assert run(tiny, path, tmp_path / "out", "--policy", "snapkv", "--budget", 8) == 0

    assert "Skipped 2 of 2 rows, because there is no answer: line 1, 2" in " ".join(capsys.readouterr().err.split())
    assert read_records(tmp_path / "out") == []


def test_presses_skip_prompts_that_are_shorter_than_their_windows(tiny, tmp_path, capsys):
    pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")
    path = write(tmp_path / "rows.jsonl", ROW, {**ROW, "context": "Short."})
    options = ("--policy", "kvpress:SnapKVPress(window_size=20)", "--policy", "kvpress:StreamingLLMPress")
    assert run(tiny, path, tmp_path / "out", *options, "--budget", 4) == 0

    told = " ".join(capsys.readouterr().err.split())
    assert (
        "rows, because the prompt is shorter than the 21 tokens that kvpress:SnapKVPress(window_size=20) needs" in told
    )
    assert {record.prompt for record in read_records(tmp_path / "out") if record.budget == 4} == {"rows/0"}


def test_every_file_of_text_may_begin_with_a_byte_order_mark(tmp_path):
    def made(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        return tmp_path / name

    assert read_text(made("a.txt", "First.")).documents == (("First.",),)
    assert read_text(made("b.txt", "First.\n\nSecond.")).paragraphs == ["First.", "Second."]
    assert load_preset(made("c.toml", 'base = "knorm"\n')).base == "knorm"
    assert load_config(None, made("d.toml", "budgets = [8]\n"), {}).budgets == (8,)
    assert [row.question for row in read_rows(made("e.jsonl", json.dumps(ROW)), "f1")] == ["Who?"]
