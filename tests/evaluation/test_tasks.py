"""Prompts: exact lengths, answers that are in the text where they should be, and the same ones for the same seed."""

import re
from collections import Counter

import pytest

from graphkv import ArgumentError
from graphkv.evaluation.prompts.haystack import SPLITS, prompt_text, seeds_of, split_of
from graphkv.evaluation.prompts.prompts import PromptMaker, encode_question
from graphkv.evaluation.prompts.riddles import DEPTHS, TASKS
from graphkv.workbench.text import Text, read_text

LENGTH = 1500
HELD_OUT = SPLITS["held-out"]
HIDDEN = [name for name, task in TASKS.items() if task.riddle]


def prompt_of(maker, tokenizer, tasks, seed=HELD_OUT[0], length=LENGTH, split="held-out"):
    prompt = maker.make(tasks, length, split, seed)
    return prompt, tokenizer.decode(prompt.ids)


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_the_length_that_was_asked_for(maker, tokenizer, task):
    prompt, _ = prompt_of(maker, tokenizer, task)

    # Documents of entries may lack less than one entry: a word, its number and what parts them.
    shortfall = 15 if TASKS[task].write else 0
    assert LENGTH - shortfall <= len(prompt.ids) <= LENGTH
    assert prompt.length == LENGTH


@pytest.mark.parametrize("task", [name for name in TASKS if name != "continuation"])
def test_what_is_asked_for_is_in_the_prompt_once_and_in_the_answer(maker, tokenizer, task):
    for seed in HELD_OUT[:4]:
        prompt, text = prompt_of(maker, tokenizer, task, seed)
        (question,) = prompt.questions
        answer = tokenizer.decode(question.answer)
        for reference in question.references:
            assert reference in answer
            assert text.count(reference) >= 1
            if TASKS[task].riddle and task != "variable-tracking" and question.kind != "word":
                assert text.count(reference) == 1
            assert reference not in tokenizer.decode(question.ids)


@pytest.mark.parametrize("task", ["needle", "code"])
def test_a_needle_lies_where_the_record_says_and_near_the_depth_of_its_seed(maker, tokenizer, task):
    for seed in HELD_OUT[:10]:
        prompt, text = prompt_of(maker, tokenizer, task, seed)
        (question,) = prompt.questions
        begin = re.search(r"^(User: )?(?P<needle>The secret|def visit_\w+\(value, )", text, re.MULTILINE).start(
            "needle"
        )
        # A token is a byte here.
        assert question.depth == round(len(text[:begin].encode()) / LENGTH, 4)
        # Paragraphs are cut at 400 letters, so a place is never further away than half of that, and the needle itself.
        assert abs(question.depth - DEPTHS[seed % 10]) < 300 / LENGTH
        assert begin == len("User: ") or text[:begin].endswith("\n")


def test_seeds_go_through_all_kinds_and_depths(maker):
    asked = [maker.make("needle", LENGTH, "held-out", seed).questions[0] for seed in HELD_OUT[:30]]

    assert Counter(question.kind for question in asked) == {"number": 10, "word": 10, "uuid": 10}
    assert len({(question.kind, seed % 10) for seed, question in enumerate(asked)}) == 30


def test_equal_seeds_give_equal_prompts_and_others_do_not(maker):
    first, again, other = (
        maker.make("needle+continuation", LENGTH, "held-out", seed) for seed in (10_000, 10_000, 10_001)
    )

    assert first == again
    assert first.ids != other.ids
    assert first.questions[0].answer != other.questions[0].answer


def test_a_riddle_is_the_same_at_every_length(maker):
    short, long = (maker.make("multi-key", length, "held-out", 10_007).questions[0] for length in (1000, 1800))

    assert (short.ids, short.answer) == (long.ids, long.answer)


def test_tasks_that_share_a_prompt_ask_about_it(maker, tokenizer):
    prompt, text = prompt_of(maker, tokenizer, "needle+multi-key+continuation")

    assert [question.task for question in prompt.questions] == ["needle", "multi-key", "continuation"]
    for question in prompt.questions[:2]:
        assert question.references[0] in text


def test_a_continuation_is_what_the_text_goes_on_with(maker, tokenizer):
    prompt, text = prompt_of(maker, tokenizer, "continuation")
    (question,) = prompt.questions
    following = tokenizer.decode([*question.ids, *question.answer])

    source = "\n\n".join(split_of(maker.text, "held-out"))
    assert len(question.ids) == 1
    assert len(question.answer) == 32
    assert question.modes == ("agnostic",)
    assert text[-200:] + following in source


def test_variables_follow_each_other_from_the_number_on(maker, tokenizer):
    prompt, text = prompt_of(maker, tokenizer, "variable-tracking")
    names = prompt.questions[0].references
    steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)

    assert [name for name, _ in steps] == list(names)
    assert [source for _, source in steps[1:]] == list(names[:-1])
    assert steps[0][1] in tokenizer.decode(prompt.questions[0].ids)


def test_common_words_are_the_most_frequent_ones(maker, tokenizer):
    prompt, text = prompt_of(maker, tokenizer, "common-words")
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    ranked = counts.most_common()

    assert {word for word, _ in ranked[:10]} == set(prompt.questions[0].references)
    assert ranked[9][1] >= 2 * ranked[10][1]


def test_common_words_come_30_and_3_times_in_a_long_list(maker, tokenizer):
    prompt = maker.make("common-words", 12_000, "held-out", 10_000)
    counts = Counter(re.findall(r"\d+\. (\w+)", tokenizer.decode(prompt.ids)))
    common = set(prompt.questions[0].references)

    assert {counts[word] for word in common} == {30}
    # The last rare word may be cut short.
    assert Counter(counts[word] for word in counts if word not in common)[3] >= len(counts) - len(common) - 1


def test_frequent_words_follow_their_law(maker, tokenizer):
    prompt, text = prompt_of(maker, tokenizer, "frequent-words")
    entries = text.removeprefix("User: ").split()
    counts = Counter(entries)
    ranked = counts.most_common()

    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == list(prompt.questions[0].references)
    # 1, 1/4, 1/9, 1/16 of the noise.
    assert [count for _, count in ranked[1:4]] == pytest.approx([ranked[0][1] / k**2 for k in (2, 3, 4)], abs=1)


def test_the_splits_share_no_paragraph():
    text = prompt_text()
    tuning, held_out = set(split_of(text, "tuning")), set(split_of(text, "held-out"))

    assert tuning.isdisjoint(held_out)
    assert 0.25 < len(tuning) / len(tuning | held_out) < 0.4
    assert set(SPLITS["tuning"]).isdisjoint(SPLITS["held-out"])


def test_every_paragraph_is_there_once():
    text = prompt_text()
    paragraphs = split_of(text, "tuning") + split_of(text, "held-out")

    assert len(set(paragraphs)) == len(paragraphs) > 1000


def test_a_text_of_ones_own(tmp_path, tokenizer):
    (tmp_path / "b.md").write_text("Second.\n\nThird.\n\nSecond.")
    (tmp_path / "a.txt").write_text("First.\n\n\n\n")
    (tmp_path / "c.bin").write_bytes(b"\xff")

    assert prompt_text(tmp_path).documents == (("First.",), ("Second.", "Third."))
    assert prompt_text(tmp_path / "b.md").documents == (("Second.", "Third."),)
    assert prompt_text(tmp_path).sha256() != prompt_text(tmp_path / "b.md").sha256()
    # A repeated paragraph is left out of prompts alone: the demo reads a text as it is.
    assert read_text(tmp_path / "b.md").paragraphs == ["Second.", "Third.", "Second."]


@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (b"\xff", "not UTF-8 text")])
def test_an_unusable_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        prompt_text(path)


def test_a_short_text_is_refused(tokenizer):
    maker = PromptMaker(tokenizer, Text(name="short", documents=(("Word. " * 100,),)))
    with pytest.raises(ArgumentError, match="--text must have at least"):
        maker.make("continuation", 1000, "held-out", 10_000)


def test_a_length_without_room_for_text_is_refused(maker):
    with pytest.raises(ArgumentError, match="--length must leave half"):
        maker.make("multi-query", 300, "held-out", 10_000)
    with pytest.raises(ArgumentError, match="room for 60 entries"):
        maker.make("common-words", 300, "held-out", 10_000)


@pytest.mark.parametrize(
    "tasks", ["haystack", "needle+", "needle+needle", "needle+code", "common-words+frequent-words"]
)
def test_tasks_that_do_not_exist_or_do_not_go_together_are_refused(maker, tasks):
    with pytest.raises(ArgumentError, match="--task"):
        maker.make(tasks, LENGTH, "held-out", 10_000)


def test_seeds_stay_in_their_split():
    assert seeds_of("held-out", 5, 3) == range(10_005, 10_008)
    with pytest.raises(ArgumentError, match="must stay within the 10000 prompts"):
        seeds_of("tuning", 9_999, 2)


def test_a_question_and_its_answer_are_the_tokens_of_the_whole(tokenizer):
    ids, answer = encode_question(tokenizer, "\nA:", "Who?", "It is", "me")

    assert tokenizer.decode(ids) == "\n\nWho?\nA:It is"
    assert tokenizer.decode(answer) == " me"
