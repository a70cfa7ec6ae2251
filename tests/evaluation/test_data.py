"""Rows of a data set."""

import json

import pytest

from graphkv import ArgumentError
from graphkv.evaluation.data import data_prompts, read_rows

ROW = {"context": "Ann is here.", "question": "Who?", "answers": ["Ann"], "metric": "f1", "max_new_tokens": 5}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_of_both_kinds_are_read(tmp_path):
    ruler = {"context": "C", "input": "Q", "outputs": ["1", "2"]}
    first, second = read_rows(write(tmp_path / "set.jsonl", {**ROW, "dataset": "own"}, ruler), "substring_all")

    assert (first.dataset, first.metric, first.answers, first.max_new_tokens) == ("own", "f1", ("Ann",), 5)
    assert (second.dataset, second.metric, second.question, second.answers) == ("set", "substring_all", "Q", ("1", "2"))
    assert second.max_new_tokens == 64


def test_rows_of_one_context_share_a_prompt(tmp_path, tokenizer):
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "context": "Else."}, {**ROW, "question": "Where?"}))
    prompts, cut = data_prompts(rows, tokenizer, 512)

    assert [len(prompt.questions) for prompt in prompts] == [2, 1]
    assert cut == 0
    assert tokenizer.decode(prompts[0].ids) == "User: Ann is here."
    assert tokenizer.decode(prompts[0].questions[1].ids) == "\n\nWhere?\n"
    assert tokenizer.decode(prompts[0].questions[1].answer) == "Ann"


def test_a_context_that_does_not_fit_loses_its_middle(tmp_path, tokenizer):
    rows = read_rows(write(tmp_path / "a.jsonl", {**ROW, "context": "a" * 100 + "b" * 100}))
    prompts, cut = data_prompts(rows, tokenizer, 60)

    # 60 less the template's 6, the question's 7 and the answer's 5.
    assert tokenizer.decode(prompts[0].ids) == "User: " + "a" * 21 + "b" * 21
    assert cut == 1
    with pytest.raises(ArgumentError, match="must fit into the model's 18 positions"):
        data_prompts(rows, tokenizer, 18)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "context": None}, "line 1 must have the texts context and question"),
        ({**ROW, "answers": []}, "line 1 must have answers, a list of texts"),
        ({**ROW, "answers": [" "]}, "answers of at least a letter"),
        ({**ROW, "metric": "bleu"}, "must name a metric"),
        ({**ROW, "max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ([1], "must be a JSON object"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, message):
    with pytest.raises(ArgumentError, match=message):
        read_rows(write(tmp_path / "a.jsonl", row))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(ArgumentError, match="it is empty"):
        read_rows(write(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ArgumentError, match="line 1 must be JSON"):
        read_rows(tmp_path / "b.jsonl")
