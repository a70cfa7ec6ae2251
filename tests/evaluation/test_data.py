"""Rows of a data set."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graphkv import ArgumentError
from graphkv.evaluation.prompts.rows import data_prompts, read_rows

ROW = {"context": "Ann is here.", "question": "Who?", "answers": ["Ann"], "metric": "f1", "max_new_tokens": 5}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_tokenizer(*words):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_rows_of_both_kinds_are_read(tmp_path):
    ruler = {"context": "C", "input": "Q", "outputs": ["1", "2"]}
    first, second = read_rows(write(tmp_path / "set.jsonl", {**ROW, "dataset": "own"}, ruler), "substring_all")

    assert (first.dataset, first.metric, first.answers, first.max_new_tokens) == ("own", "f1", ("Ann",), 5)
    assert (second.dataset, second.metric, second.question, second.answers) == ("set", "substring_all", "Q", ("1", "2"))
    assert second.max_new_tokens == 64


def test_rows_of_one_context_share_a_prompt(tmp_path, tokenizer):
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "context": "Else."}, {**ROW, "question": "Where?"}))
    found = data_prompts(rows, tokenizer, 512)
    prompts = found.prompts

    assert [len(prompt.questions) for prompt in prompts] == [2, 1]
    assert (found.cut, found.skipped) == (0, {})
    assert tokenizer.decode(prompts[0].ids) == "User: Ann is here."
    assert tokenizer.decode(prompts[0].questions[1].ids) == "\n\nWhere?\n"
    assert tokenizer.decode(prompts[0].questions[1].answer) == "Ann"


def test_a_context_that_does_not_fit_loses_its_middle(tmp_path, tokenizer):
    rows = read_rows(write(tmp_path / "a.jsonl", {**ROW, "context": "a" * 100 + "b" * 100}))
    found = data_prompts(rows, tokenizer, 60)

    # 60 less the template's 6, the question's 7 and the answer's 5.
    assert tokenizer.decode(found.prompts[0].ids) == "User: " + "a" * 21 + "b" * 21
    assert (found.cut, found.skipped) == (1, {})


def test_rows_that_leave_no_room_for_a_context_are_skipped_and_no_others(tmp_path, tokenizer):
    long = {**ROW, "question": "Who is it who is here?"}
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, long, {**long, "context": "Else."}, {**ROW, "context": "More."}))
    # The template's 6, the question's 7, the answer's 5, and a context of 2.
    found = data_prompts(rows, tokenizer, 20)

    assert [tokenizer.decode(prompt.ids) for prompt in found.prompts] == ["User: A.", "User: M."]
    assert [len(prompt.questions) for prompt in found.prompts] == [1, 1]
    # Contexts keep their numbers, whoever is skipped.
    assert [prompt.name for prompt in found.prompts] == ["a/0", "a/2"]
    assert found.skipped == {"question and answer leave no room for a context in the model's 20 positions": (2, 3)}
    assert data_prompts(rows, tokenizer, 19).prompts == ()


@pytest.mark.parametrize("answers", [[], [""], [" \n"], ["", "Ann"]])
def test_rows_without_an_answer_are_skipped(tmp_path, tokenizer, answers):
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "answers": answers}))
    found = data_prompts(rows, tokenizer, 512)

    assert [len(prompt.questions) for prompt in found.prompts] == [1]
    assert found.skipped == {"there is no answer": (2,)}


@pytest.mark.parametrize("field", ["context", "question", "answers"])
def test_rows_of_half_a_surrogate_pair_are_skipped(tmp_path, tokenizer, field):
    broken = ["\ud83d"] if field == "answers" else "\ud83d"
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, field: broken}))
    found = data_prompts(rows, tokenizer, 512)

    assert [len(prompt.questions) for prompt in found.prompts] == [1]
    assert found.skipped == {"a text is not Unicode: it holds half a surrogate pair": (2,)}


def test_texts_without_tokens_are_skipped(tmp_path):
    """A tokenizer of words drops white space; without a template nothing else is there."""
    tokenizer = word_tokenizer("Who?", "Ann", "here", "I", "you", "me")
    row = {**ROW, "context": "here", "answers": ["Ann"]}
    rows = [row, {**row, "context": " "}, {**row, "question": "\n"}, {**row, "context": "", "question": ""}]
    found = data_prompts(read_rows(write(tmp_path / "a.jsonl", *rows)), tokenizer, 512)

    assert [tokenizer.decode(prompt.ids) for prompt in found.prompts] == ["here"]
    assert found.skipped == {"the question has no tokens": (3,), "the context has no tokens": (2, 4)}


def test_prompts_that_are_too_short_for_a_policy_are_skipped(tmp_path, tokenizer):
    rows = read_rows(write(tmp_path / "a.jsonl", ROW, {**ROW, "context": "Here."}, {**ROW, "question": "Where?"}))
    found = data_prompts(rows, tokenizer, 512, {"a press": 18})

    # The template's 6 tokens and the context's 12.
    assert [len(prompt.ids) for prompt in found.prompts] == [18]
    assert found.skipped == {"the prompt is shorter than the 18 tokens that a press needs": (2,)}


def test_a_byte_order_mark_and_other_line_ends_are_no_part_of_a_row(tmp_path):
    row = {**ROW, "context": "one\u2028two\x85three"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig", newline="")

    assert [found.context for found in read_rows(tmp_path / "a.jsonl")] == [row["context"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "context": None}, "line 1 must have the texts context and question"),
        ({**ROW, "answers": None}, "line 1 must have answers, a list of texts"),
        ({**ROW, "answers": [1]}, "line 1 must have answers, a list of texts"),
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
