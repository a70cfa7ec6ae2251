"""RULER's tasks: the package's own texts, prompts that fit, official scores, and what is refused.

What is compared with the package runs its scripts as they are, but for the sentence model, which is ours in both.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections import Counter
from itertools import takewhile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graphkv import ArgumentError
from graphkv.__main__ import main
from graphkv.evaluation.prompts import metrics, ruler
from graphkv.evaluation.prompts.haystack import prompt_text
from graphkv.evaluation.prompts.prompts import PromptMaker, _last_that_fits, chat_template
from graphkv.evaluation.prompts.riddles import task_names
from graphkv.evaluation.prompts.ruler import OFFICIAL, PLAIN, RULER, RulerTask, sentences
from graphkv.evaluation.records import read_records
from graphkv.evaluation.runs.config import load_config

SEED = 10_003
# In bytes; the package makes long lists from 4096 on.
LENGTH = 9000
NEEDLES = [name for name in OFFICIAL if name.startswith("niah")]


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("wonderwords", reason="words of RULER: graphkv[ruler] is not installed")
    return pytest.importorskip("long_context_eval", reason="data of RULER: graphkv[ruler] is not installed")


def made(name, length=2048, split="held-out"):
    """A task whose tokens are four letters each."""
    return RulerTask(name, length, split, lambda text: len(text) // 4)


def whole(sample):
    return sample.document + sample.question + sample.prefix


# What the package does. It leaves its files open.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def few_words(monkeypatch):
    """Sixty words of each kind, for both: the package's own script writes out six million pairs."""
    found = {name: ruler._word_list(name)[:60] for name in ("nounlist", "adjectivelist", "verblist")}
    for each in (ruler._pairs, ruler._list_words):
        each.cache_clear()
    monkeypatch.setattr(ruler, "_word_list", found.__getitem__)
    monkeypatch.setattr(
        "wonderwords.random_word._get_words_from_text_file", lambda file: found[file.removesuffix(".txt")]
    )
    yield
    for each in (ruler._pairs, ruler._list_words):
        each.cache_clear()


@pytest.fixture
def theirs(package, few_words, monkeypatch):
    """Load the script of a task with its own arguments and a seed, and set its generators to that seed."""
    constants = importlib.import_module("long_context_eval.data.synthetic.constants")
    folder = ruler._folder() / "data" / "synthetic"

    def load(name, length, seed):
        task = made(name, length)
        nltk, tokenizer = ModuleType("nltk.tokenize"), ModuleType("tokenizer")
        nltk.sent_tokenize = sentences
        tokenizer.select_tokenizer = lambda *options: SimpleNamespace(text_to_tokens=lambda text: [])
        stubs = {"nltk": ModuleType("nltk"), "nltk.tokenize": nltk, "tokenizer": tokenizer, "constants": constants}
        for module, stub in (stubs | {"long_context_eval.data.tokenizer": tokenizer}).items():
            monkeypatch.setitem(sys.modules, module, stub)
        monkeypatch.setattr(sys, "path", list(sys.path))
        template = constants.TASKS[task.kind]["template"] + constants.TASKS[task.kind]["answer_prefix"]
        options = {"save_dir": "x", "save_name": "x", "tokenizer_path": "x", "max_seq_length": length}
        options |= {"tokens_to_generate": task.max_new_tokens, "num_samples": 1, "random_seed": seed}
        options |= {"template": template} | task.args
        arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        spec = importlib.util.spec_from_file_location("script", folder / f"{task.kind}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what the script draws from
        return task, module

    return load


@LEFT_OPEN
@pytest.mark.parametrize(("name", "size"), [*((name, 40) for name in NEEDLES), ("niah_multivalue", 900)])
def test_needles_are_those_of_the_package(theirs, name, size):
    task, script = theirs(name, 2048, SEED)
    text, answers = script.generate_input_output(size)
    sample = task.write(SEED, size)

    assert whole(sample) == text
    assert list(sample.references) == answers


@LEFT_OPEN
@pytest.mark.parametrize("size", [3, 10, 40])
def test_variables_are_those_of_the_package(theirs, size):
    task, script = theirs("vt", 2048, SEED)
    example, names = script.generate_input_output(task._example_size(SEED), 1, 4, is_icl=True)
    text, answers = script.generate_input_output(size, 1, 4)
    shown = script.randomize_icl(f"{example} {' '.join(names)}\n\n")
    sample = task.write(SEED, size)

    assert whole(sample) == f" {shown}\n\n{text}"
    assert list(sample.references) == answers


@LEFT_OPEN
@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words_are_those_of_the_package(theirs, length):
    task, script = theirs("cwe", length, SEED)
    text, answers = script.generate_input_output(50)
    sample = task.write(SEED, 50)

    assert whole(sample) == text
    assert list(sample.references) == answers


@LEFT_OPEN
@pytest.mark.parametrize("length", [1024, 4096])
def test_coded_words_are_those_of_the_package(theirs, length):
    task, script = theirs("fwe", length, SEED)
    size = task.sizes[1]
    text, answers, _ = script.generate_input_output(length, num_words=size, vocab_size=length // 50)
    sample = task.write(SEED, size)

    assert whole(sample) == text
    assert list(sample.references) == answers


@LEFT_OPEN
@pytest.mark.parametrize(("name", "sizes"), [("qa_1", (1, 10, 60)), ("qa_2", (30,))])
def test_documents_are_those_of_the_package(theirs, name, sizes):
    task, script = theirs(name, 2048, SEED)
    for size in sizes:
        sample = task.write(SEED, size)
        (index,) = (
            number for number, each in enumerate(script.QAS) if sample.question.endswith(f"Question: {each['query']}")
        )
        script.random.seed(SEED)
        text, answers = script.generate_input_output(index, size)
        assert whole(sample) == text
        assert list(sample.references) == answers


def test_names_and_parameters_are_those_of_the_package(package):
    assert tuple(ruler._configurations()) == OFFICIAL
    assert {made(name).max_new_tokens for name in NEEDLES} == {128}
    assert [made(name).max_new_tokens for name in ("vt", "cwe", "fwe", "qa_1", "qa_2")] == [30, 120, 50, 32, 32]


def test_pairs_of_words_are_sorted_as_if_they_were_written_out():
    adjectives, nouns = ["high", "high-pitched", "low", "ad hoc", "highly", "low"], ["zoo", "ant", "pitched-bee", "ant"]
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    pairs = ruler._Pairs(adjectives, nouns)

    assert [pairs[index] for index in range(len(pairs))] == expected
    assert expected.index("high-pitched-ant") < expected.index("high-zoo")


def test_sentences_joined_are_the_text_again():
    text = 'He (Dr. A. Smith) left at 3.5 p.m. Why? "No idea!" 3 of them stayed, e.g. Ann. and so on... Then: end'
    found = sentences(text)

    assert " ".join(found) == text
    assert found[-3:] == ['"No idea!"', "3 of them stayed, e.g. Ann. and so on...", "Then: end"]


# Prompts.


@pytest.fixture(scope="module")
def letters(tokenizer):
    return PromptMaker(tokenizer, prompt_text())


@pytest.mark.parametrize("name", RULER)
def test_a_prompt_is_the_longest_that_fits_with_its_question_and_answer(package, letters, tokenizer, name):
    prompt = letters.make(name, LENGTH, "held-out", SEED)
    (question,) = prompt.questions
    task = letters._ruler[name, LENGTH, "held-out"]

    def total(size):
        # A token is a byte here.
        text = "".join(chat_template(tokenizer)) + whole(task.write(SEED, size))
        return len(text.encode()) + task.max_new_tokens

    sizes = task.sizes if total(task.sizes[0]) <= LENGTH else task.small_sizes
    totals = list(takewhile(lambda each: each <= LENGTH, map(total, sizes)))
    assert len(prompt.ids) + len(question.ids) + question.max_new_tokens == totals[-1]
    assert (prompt.name, prompt.length) == (f"{name}/{LENGTH}/{SEED}", LENGTH)
    assert (question.metric, question.max_new_tokens) == (task.metric, task.max_new_tokens)


@pytest.mark.parametrize("name", RULER)
def test_the_answer_is_in_the_prompt_and_not_in_the_question_and_scores_1(package, letters, tokenizer, name):
    for seed in (10_000, 10_001):
        prompt = letters.make(name, LENGTH, "held-out", seed)
        (question,) = prompt.questions
        document, asked = tokenizer.decode(prompt.ids), tokenizer.decode(question.ids)
        assert metrics.score(question.metric, tokenizer.decode(question.answer), question.references) == 1
        assert question.modes == ("aware", "agnostic", "protected")
        for reference in question.references:
            assert reference in document or name in ("qa_2", "hotpotqa")
            assert not re.search(rf"\b{re.escape(reference)}\b", asked)
        # The question is not in what is read before it, whatever its example asked.
        last_line = asked.strip().partition("\n\n")[2] or asked.strip().partition("\n")[0]
        assert last_line not in document or name == "cwe"


@pytest.mark.parametrize("name", ["niah_multikey_2", "vt", "cwe", "fwe", "qa_1"])
def test_equal_seeds_give_equal_bytes_and_others_do_not(package, tokenizer, name):
    first, again, other = (
        PromptMaker(tokenizer, prompt_text()).make(name, LENGTH, "held-out", seed) for seed in (10_000, 10_000, 10_001)
    )

    assert first == again
    assert first.ids != other.ids


def test_the_splits_share_neither_essays_nor_questions(package):
    held_out, tuning = (ruler._essay_words(split) for split in ("held-out", "tuning"))
    text = json.loads(ruler._read("data/synthetic/json/PaulGrahamEssays.json"))["text"]
    everything = re.sub(r"\s+", " ", text).split(" ")
    assert [*held_out, *tuning] == everything
    assert len(held_out) == 2 * len(everything) // 3

    task, other = made("qa_1"), made("qa_1", split="tuning")
    asked = {task.write(seed, 1).question for seed in range(10_000, 10_200)}
    tuned = {other.write(seed, 1).question for seed in range(200)}
    ordered = [each.query for each in ruler._questions("squad")[0]]
    border = int(2 / 3 * len(ordered))
    for questions, queries in ((asked, ordered[:border]), (tuned, ordered[border:])):
        assert {question.partition("Question: ")[2] for question in questions} <= set(queries)
    # Seeds that follow each other hardly ever ask the same.
    assert len(asked) == len(tuned) == 200


def test_a_question_of_hotpotqa_that_does_not_fit_keeps_what_it_needs(package):
    task = made("qa_2")
    questions, texts = ruler._questions("hotpotqa")
    for size in (2, 5, 9):
        sample = task.write(SEED, size)
        (question,) = (each for each in questions if sample.question.endswith(f"Question: {each.query}"))
        assert sample.document.count("\nDocument ") == size
        assert all(texts[index] in sample.document for index in question.gold)


def test_coded_words_at_the_smallest_size_have_three_that_stand_out(package):
    sample = made("fwe", 400).write(SEED, ruler.FEWEST_DRAWS)
    counts = Counter(sample.document.partition("coded words. ")[2].split()).most_common()

    assert {word for word, _ in counts[1:4]} == set(sample.references)
    assert len(counts) == 4 or counts[3][1] > counts[4][1]


@pytest.mark.parametrize(("most", "expected"), [(2, None), (3, 3), (10, 9), (33, 33), (1000, 63)])
def test_the_last_size_that_fits_is_found(most, expected):
    assert _last_that_fits(range(3, 64, 3), lambda size: size <= most) == expected
    assert _last_that_fits(range(0), lambda size: True) is None


# Scores.

ANSWERS = [
    ("niah_single_1", "1234567.", ["1234567"], 1),
    ("niah_single_2", "It is 1234568.", ["1234567"], 0),
    ("niah_single_3", "0F6C2F1A-39BE-4D7E-9B0A-8D1F6B0E1C11", ["0f6c2f1a-39be-4d7e-9b0a-8d1f6b0e1c11"], 1),
    ("niah_multikey_1", "123456 7", ["1234567"], 0),
    ("niah_multikey_2", "7654321 or 1234567", ["1234567"], 1),
    ("niah_multikey_3", "0f6c2f1a", ["0f6c2f1a-39be-4d7e-9b0a-8d1f6b0e1c11"], 0),
    ("niah_multivalue", "1111111, 2222222 and 3333333", ["1111111", "2222222", "3333333", "4444444"], 0.75),
    ("niah_multiquery", "4444444 1111111", ["1111111", "2222222", "3333333", "4444444"], 0.5),
    ("vt", "ABCDE, fghij", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 0.4),
    (
        "cwe",
        "1. peer 2. trap 3. sun",
        ["peer", "trap", "loan", "spy", "tank", "sunday", "a", "zoo", "mink", "jam"],
        0.3,
    ),
    ("fwe", "abcdef ghijkl", ["abcdef", "ghijkl", "mnopqr"], 2 / 3),
    ("qa_1", "In the 10th and 11th centuries, I think.", ["10th century", "10th and 11th centuries"], 1),
    ("qa_2", "No.", ["yes"], 0),
    # Plain question answering, without articles: the one word that there is is one of three.
    ("squad", "the Normans", ["Norman people", "the Normans of France"], 2 * 1 / (1 + 3)),
    ("hotpotqa", "Yes!", ["yes"], 1),
]


@pytest.mark.parametrize(("name", "text", "references", "expected"), ANSWERS)
def test_answers_made_by_hand_score_as_they_should_and_as_the_package_says(package, name, text, references, expected):
    task = made(name)
    assert metrics.score(task.metric, text, references) == pytest.approx(expected, abs=1e-6)
    if name in OFFICIAL:
        official = importlib.import_module("long_context_eval.eval.synthetic.constants").TASKS[task.kind]
        assert official["metric_fn"]([text], [references]) == pytest.approx(100 * expected, abs=0.01)


def test_every_task_has_an_answer_made_by_hand():
    assert [name for name, *_ in ANSWERS] == [*OFFICIAL, *PLAIN]


# The command.


def run(*arguments):
    return main(["eval", *map(str, arguments)])


def one_line(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("missing", ["long_context_eval", "wonderwords"])
def test_a_missing_package_is_one_line_that_names_the_extra(missing, tmp_path, capsys, monkeypatch):
    # As if only this one were missing, whatever is installed.
    monkeypatch.setattr("graphkv.core.extras._is_there", lambda module: module != missing)
    for chosen in (["--suite", "ruler"], ["--task", "niah_single_1"]):
        assert run(*chosen, "--output", tmp_path / "out") == 2
        line = one_line(capsys)
        assert line.startswith("graphkv: --task niah_single_1 needs: pip install 'graphkv[ruler]'")
        assert line.endswith(f"(No module named '{missing}')")
    assert not (tmp_path / "out").exists()


def test_a_length_that_cannot_hold_a_task_is_one_line(package, tiny, tmp_path, capsys):
    arguments = ("--model", tiny, "--output", tmp_path / "out", "--prompts", 1, "--task", "fwe", "--task", "cwe")
    assert run(*arguments, "--length", 1000) == 2
    line = one_line(capsys)
    assert line.startswith("graphkv: --length must be at least ")
    assert line.endswith(" for cwe; got 1000")
    least = int(line.split("at least ")[1].split()[0])
    assert not (tmp_path / "out").exists()
    # It is what it says, to the token.
    assert run(*arguments[:-4], "--task", "cwe", "--length", least - 1) == 2
    assert f"at least {least} for cwe; got {least - 1}" in one_line(capsys)


def test_the_least_length_is_enough(package, letters):
    with pytest.raises(ArgumentError, match="--length must be at least") as caught:
        letters.make("niah_multiquery", 200, "held-out", SEED)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    prompt = letters.make("niah_multiquery", least, "held-out", SEED)
    assert len(prompt.ids) + len(prompt.questions[0].ids) + 128 == least


def test_a_tokenizer_that_cannot_spell_an_answer_is_one_line(package):
    words = Tokenizer(models.WordLevel({"magic": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    maker = PromptMaker(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?"), prompt_text())
    with pytest.raises(
        ArgumentError, match=r"a tokenizer that can spell the answers of niah_single_1; it cannot write"
    ):
        maker.make("niah_single_1", 1024, "held-out", SEED)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turn') }}", "that takes one message; it says: no system turn"),
        ("{{ messages | length }}", "that shows the message; it leaves it out"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(template, message):
    words = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)
    with pytest.raises(ArgumentError, match="--model must have a chat template " + message):
        chat_template(tokenizer)


def test_tasks_of_ruler_share_their_prompt_with_nobody():
    assert task_names("niah_single_1") == ["niah_single_1"]
    for tasks in ("niah_single_1+niah_single_2", "niah_single_1+needle", "vt+cwe", "qa_1+common-words"):
        with pytest.raises(ArgumentError, match="--task can join different tasks over the same text only"):
            task_names(tasks)


def test_without_a_chat_template_the_input_is_the_package_s_own(package, tokenizer):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    prompt = PromptMaker(plain, prompt_text()).make("qa_1", LENGTH, "held-out", SEED)
    task = made("qa_1", LENGTH)
    texts = {whole(task.write(SEED, size)) for size in range(1, 20)}

    assert plain.decode([*prompt.ids, *prompt.questions[0].ids]) in texts


def test_the_command_answers_in_both_modes(package, tiny, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["--model", tiny, "--task", "niah_single_1", "--task", "squad", "--length", 2000, "--prompts", 1]
    command += ["--policy", "knorm", "--budget", "25%", "--threads", 1, "--output", output, "--no-generate"]

    assert run(*command) == 0
    records = read_records(output)
    assert [(record.task, record.mode, record.policy, record.budget) for record in records] == [
        (task, mode, policy, budget)
        for task in ("niah_single_1", "squad")
        for mode in ("agnostic", "aware")
        for policy, budget in (("full", None), ("knorm", 500))
    ]
    assert {record.metric for record in records} == {"substring_all", "f1"}
    header = json.loads((output / "run.json").read_text())
    assert header["ruler"] == ruler.ruler_versions()
    assert set(header["ruler"]) == {"nvidia-long-context-eval", "wonderwords"}


def test_the_suite_asks_all_tasks_and_lets_the_model_answer(package):
    suite = load_config("ruler", None, {"lengths": [1024], "prompts": 2})
    assert suite.tasks == OFFICIAL
    assert (suite.generate, suite.split, suite.modes) == (True, "held-out", ("aware", "agnostic"))
    assert {"full", "snapkv", "snapkv+graphkv", "snapkv+degree"} <= set(suite.policies)
