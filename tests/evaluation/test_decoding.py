"""Long answers, and caches that are evicted while they are written."""

from dataclasses import replace

import pytest
import torch

from graphkv.__main__ import main
from graphkv.core.errors import ArgumentError
from graphkv.evaluation.prompts.haystack import prompt_text
from graphkv.evaluation.prompts.metrics import lines, score
from graphkv.evaluation.prompts.prompts import PromptMaker
from graphkv.evaluation.prompts.reasoning import REASONING, exercises
from graphkv.evaluation.records import read_records, read_timings
from graphkv.evaluation.runs.config import Config, load_config
from graphkv.evaluation.runs.decoding import decode
from graphkv.evaluation.runs.prompt_run import evaluate
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import make_policy
from tests.integrations.tiny import byte_tokenizer

EVERY, BUDGET, LIMIT = 5, 24, 17
POLICIES = ("random", "tova", "h2o+graphkv", "snapkv(window=8)+degree", "knorm+adakv")
WORDS = ["river", "stone"]


@pytest.fixture(scope="module")
def prompt(maker):
    return maker.make("assignments", 300, "held-out", 10_003)


@pytest.fixture(scope="module")
def config():
    return Config(
        tasks=("assignments",), lengths=(300,), budgets=(BUDGET,), policies=POLICIES, modes=("aware", "protected"),
        every=EVERY, generate=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def records(model, tokenizer, prompt, config):
    return evaluate(model, tokenizer, prompt, config)


def find(records, **wanted):
    (found,) = [record for record in records if all(getattr(record, name) == value for name, value in wanted.items())]
    return found


def alone(model, ids, last, policy, *, limit=LIMIT, protect=False):
    """Generate as anybody would, with one cache that evicts by itself; return also its sizes on the way."""
    cache = EvictingCache(policy, every=EVERY, protect_prompt=protect)
    cache.num_given = len(ids) + len(last)
    tokens, sizes, kept = [], [], []
    model(torch.tensor([list(ids)]), **with_cache(model, cache))
    new = torch.tensor([list(last)])
    for _ in range(limit):
        before = [layer.num_evictions for layer in cache.attention_layers]
        stored = max(layer.num_stored for layer in cache.attention_layers)
        new = model(new, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        sizes.append(stored + 1)
        if [layer.num_evictions for layer in cache.attention_layers] > before:
            kept.append(max(layer.num_stored for layer in cache.attention_layers))
        tokens.append(int(new))
    return tokens, max(sizes), kept


@pytest.mark.parametrize("protect", [False, True])
@torch.inference_mode()
def test_rows_of_a_batch_are_evicted_as_each_would_be_alone(model, tokenizer, prompt, records, protect):
    mode = "protected" if protect else "aware"
    (question,) = prompt.questions
    ids = (*prompt.ids, *question.ids[:-1])
    for name in POLICIES:
        policy = make_policy(name, BUDGET + (len(ids) + 1 if protect else 0), sinks=4, seed=prompt.seed)
        with observing(model):
            tokens, most, kept = alone(
                model, ids, question.ids[-1:], policy, limit=question.max_new_tokens, protect=protect
            )
        found = find(records, mode=mode, policy=name)
        ends = tokenizer.eos_token_id
        if ends in tokens:
            tokens = tokens[: tokens.index(ends)]

        assert found.text == tokenizer.decode(tokens, skip_special_tokens=True).strip(), name
        assert found.generated == len(tokens)
        if "adakv" not in name:
            assert most <= policy.budget + EVERY
            assert found.tokens_kept == kept[-1] == policy.budget
            full = find(records, mode=mode, policy="full")
            per_token = full.cache_bytes / (len(ids) + full.generated)
            assert found.cache_bytes == per_token * most


def test_everybody_keeps_within_budget_and_the_tokens_between_two_evictions(records, prompt, config):
    full = find(records, mode="aware", policy="full")
    per_token = full.cache_bytes / (full.num_tokens + full.generated)
    for record in records:
        if record.policy in ("full", "knorm+adakv"):
            continue
        prompt_tokens = full.num_tokens + 1 if record.mode == "protected" else 0
        assert record.tokens_kept == prompt_tokens + BUDGET
        assert record.cache_bytes <= per_token * (prompt_tokens + BUDGET + EVERY)
        assert not record.is_off_budget


def test_all_policies_at_once_give_what_each_gives_alone(model, tokenizer, prompt, config, records):
    rounded = {"nll": 0, "kl": 0, "redundancy": 0}
    for name in ("h2o+graphkv", "knorm+adakv"):
        alone = evaluate(model, tokenizer, prompt, replace(config, policies=(name,), batch=1))
        for record in alone:
            together = find(records, mode=record.mode, policy=record.policy)
            assert replace(record, **rounded) == replace(together, **rounded)
            assert (record.nll, record.kl) == pytest.approx((together.nll, together.kl), abs=1e-4)


@torch.inference_mode()
def test_the_likelihood_is_measured_under_the_same_evictions(model, prompt, records):
    """Token by token, as `evicting` would."""
    (question,) = prompt.questions
    ids = (*prompt.ids, *question.ids[:-1])
    for mode, extra in (("aware", 0), ("protected", len(ids) + 1)):
        policy = make_policy("tova", BUDGET + extra, sinks=4)
        with observing(model):
            cache = EvictingCache(policy, every=EVERY, protect_prompt=mode == "protected")
            cache.num_given = len(ids) + 1
            model(torch.tensor([list(ids)]), **with_cache(model, cache))
            losses = []
            for token, wanted in zip((question.ids[-1], *question.answer[:-1]), question.answer, strict=True):
                logits = model(torch.tensor([[token]]), **with_cache(model, cache)).logits[0, -1]
                losses.append(-float(logits.log_softmax(-1)[wanted]))
        assert find(records, mode=mode, policy="tova").nll == pytest.approx(sum(losses) / len(losses), abs=2e-4)


def test_a_protected_prompt_stays_whole(model, tokenizer, prompt):
    (question,) = prompt.questions
    ids = (*prompt.ids, *question.ids[:-1])
    with observing(model), torch.inference_mode():
        read = EvictingCache(num_queries=len(ids))
        model(torch.tensor([list(ids)]), **with_cache(model, read))
        policy = make_policy("random", len(ids) + 1 + 8, seed=3)
        cache = read.with_settings(policy=policy, every=EVERY, protect_prompt=True)
        cache.num_given = len(ids) + 1
        cache.evict(policy)
        (found,) = decode(model, [cache], question.ids[-1:], limit=LIMIT, ends=set(), batch=1)
    assert len(found.tokens) == LIMIT
    assert sum(layer.num_dropped for layer in found.cache.attention_layers)
    for layer in found.cache.attention_layers:
        positions = layer.true_positions
        assert (positions[..., : len(ids) + 1] == torch.arange(len(ids) + 1)).all()
        assert layer.pinned.sum(-1).unique().tolist() == [len(ids) + 1]


def test_a_budget_that_holds_the_answer_is_left_out_where_the_prompt_is_protected(model, tokenizer, prompt, config):
    longest = prompt.questions[0].max_new_tokens
    config = replace(config, budgets=(longest - 1, longest), policies=("knorm",))
    cells = [(record.mode, record.budget) for record in evaluate(model, tokenizer, prompt, config)]
    assert cells == [
        ("aware", None), ("aware", longest - 1), ("aware", longest), ("protected", None), ("protected", longest - 1)
    ]  # fmt: skip


def test_an_answer_that_ends_early_has_its_own_numbers(model, tokenizer, prompt, config, records):
    """Rows that go on do not count for those that have ended."""
    (question,) = prompt.questions
    ids = (*prompt.ids, *question.ids[:-1])
    with observing(model), torch.inference_mode():
        read = EvictingCache(num_queries=64)
        model(torch.tensor([list(ids)]), **with_cache(model, read))

        def caches():
            for name in ("knorm", "random"):
                policy = make_policy(name, BUDGET)
                cache = read.with_settings(policy=policy, every=EVERY)
                cache.evict(policy)
                yield cache

        first, second = decode(model, list(caches()), question.ids[-1:], limit=LIMIT, ends=set(), batch=2)
        end = next(token for token in first.tokens if token not in second.tokens)
        place = first.tokens.index(end)
        short, whole = decode(model, list(caches()), question.ids[-1:], limit=LIMIT, ends={end}, batch=2)
    assert short.tokens == first.tokens[:place]
    assert whole.tokens == second.tokens
    assert short.cache.num_seen == len(ids) + 1 + place
    assert whole.cache.num_seen == len(ids) + LIMIT


@pytest.mark.parametrize("name", list(REASONING))
def test_exercises_are_the_same_every_time_and_right_answers_score_one(maker, tokenizer, name):
    prompt = maker.make(name, 600, "held-out", 10_001)
    assert prompt == maker.make(name, 600, "held-out", 10_001)
    assert prompt.ids != maker.make(name, 600, "held-out", 10_002).ids
    assert len(prompt.ids) <= 600 < len(prompt.ids) + 100
    (question,) = prompt.questions
    (reference,) = question.references
    assert tokenizer.decode(question.answer) == reference
    assert score("lines", reference, question.references) == 1
    steps = reference.split("\n")
    assert score("lines", "\n".join(steps[:-1]), question.references) == pytest.approx(1 - 1 / len(steps), abs=1e-6)
    assert tokenizer.decode(prompt.ids).count(REASONING[name].instruction) == 2


@pytest.mark.parametrize("name", list(REASONING))
def test_answers_follow_from_what_is_given(name):
    """Worked out once more, by other code."""
    for exercise in exercises(name, 7, WORDS, 9):
        given, steps = exercise.given.split("\n"), exercise.answer.split("\n")
        assert len(given) == len(steps) == 9
        values = {}
        for line, step in zip(given, steps, strict=True):
            if name == "transform-list":
                assert step == f"{line} {line.split()[1]}"
            elif name == "sums":
                word, number = line.split(": ")
                assert step == f"{word}: {number} + 1 = {int(number) + 1}, {int(number) + 1} + 1 = {int(number) + 2}"
            else:
                left, right = line.split(" = ")
                values[left] = values.get(right, right)
                assert step == (line if right not in values else f"{line} = {values[left]}")


def test_exercises_have_no_word_in_common_and_go_on_with_words_of_the_text():
    many = exercises("transform-list", 1, [f"word{number}" for number in range(300)], 100)
    words = [line.split()[1] for exercise in many for line in exercise.given.split("\n")]
    assert len(set(words)) == len(words) == 300


def test_exercises_without_a_chat_template_are_plain_text():
    bare = byte_tokenizer()
    bare.chat_template = None
    prompt = PromptMaker(bare, prompt_text()).make("sums", 500, "tuning", 5)
    text = bare.decode([*prompt.ids, *prompt.questions[0].ids, *prompt.questions[0].answer])
    assert text.count("\n\nCount on by two") == 3
    assert text.endswith(prompt.questions[0].references[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb\nc", 1), (" a\n\nb \nnoise\nc\nmore", 1), ("a\nc", 2 / 3), ("c\nb\na", 1 / 3), ("", 0), ("ab\nbc", 0)],
)
def test_lines_counts_right_lines_in_order(text, expected):
    assert lines(text, ["a\nb\nc"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": ("tova", "kvzip")},
            r"every must be left out for --policy kvzip: policy must do without probes",
        ),
        ({"policies": ("snapkv+shared(nested=True)",)}, "every must be left out for --policy snapkv"),
        ({"policies": ("snapkv+degree",), "budgets": (30,)}, r"every must be at least 32 with --policy snapkv\+degree"),
        ({"policies": ("snapkv",), "budgets": ("10%",)}, "or the budget at least 36 for its window and sinks"),
        ({"every": None}, "every must be given with mode protected"),
        ({"every": 0}, "every must be"),
        ({"closeness": True}, "closeness must be off with every"),
        ({"modes": ("protect",)}, "modes must be one of"),
    ],
)
def test_what_cannot_be_evicted_in_the_middle_of_an_answer_is_refused(config, changes, message):
    with pytest.raises(ArgumentError, match=message):
        replace(config, **changes)


def test_the_command_refuses_before_anything_is_written(tiny, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--model", str(tiny), "--suite", "decoding", "--policy", "kvzip", "--output", str(output)]
    assert main(["eval", *options]) == 2
    assert len(capsys.readouterr().err.strip().split("\n")) == 1
    assert not output.exists()


def test_a_run_has_the_same_bytes_twice_and_its_times_apart(tiny, tmp_path, capsys):
    options = [
        "--model",
        str(tiny),
        "--suite",
        "decoding",
        "--length",
        "300",
        "--task",
        "assignments",
        "--prompts",
        "2",
    ]
    options += ["--policy", "h2o+degree", "--policy", "random", "--budget", "24", "--threads", "1"]
    for name in "ab":
        assert main(["eval", *options, "--output", str(tmp_path / name)]) == 0
    assert "Tokens per second" in capsys.readouterr().out
    one, other = ((tmp_path / name / "records.jsonl").read_bytes() for name in "ab")
    assert one == other
    records, timings = read_records(tmp_path / "a"), read_timings(tmp_path / "a")
    assert {record.key for record in records} == set(timings)
    assert all(timings[record.key].tokens == record.generated for record in records)
    assert all(timing.seconds > 0 for timing in timings.values())


def test_the_suite_is_what_the_page_says():
    config = load_config("decoding", None, {})
    assert (config.every, config.modes, config.generate) == (16, ("aware", "protected"), True)
    assert set(config.tasks) == set(REASONING)
