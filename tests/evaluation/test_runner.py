"""What is measured: against a reference without any cache, sizes included, and the same every time."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from graphkv import H2O, AdaKV, KNorm, SnapKV
from graphkv.evaluation.runs import prompt_run
from graphkv.evaluation.runs.closeness import make_probe
from graphkv.evaluation.runs.config import Config
from graphkv.evaluation.runs.prompt_run import evaluate
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import BASES, make_policy
from tests.integrations.folding import Folded
from tests.integrations.reference import reference_logits
from tests.integrations.tiny import tiny_gemma3, tiny_llama

LENGTH = 240
EVERYBODY = (*BASES, *(f"{base}+graphkv" for base in BASES))


@pytest.fixture(scope="module")
def prompt(maker):
    return maker.make("needle-number+continuation", LENGTH, "held-out", 10_004)


@pytest.fixture(scope="module")
def few():
    return Config(budgets=(40, 80), policies=("snapkv", "h2o+graphkv", "pyramidkv"), lengths=(LENGTH,))


@pytest.fixture(scope="module")
def records(model, tokenizer, prompt, few):
    return evaluate(model, tokenizer, prompt, few)


def find(records, **wanted):
    (found,) = [record for record in records if all(getattr(record, name) == value for name, value in wanted.items())]
    return found


def told(model, prompt, question, policy, mode):
    """Logits at the answer's places, recomputed from the whole row of tokens."""
    ids = torch.tensor([*prompt.ids, *question.ids, *question.answer])
    before = len(prompt.ids) + (len(question.ids) - 1 if mode == "aware" else 0)
    if policy is None:
        logits = model(ids[None]).logits[0]
    else:
        logits, _ = reference_logits(model, ids, policy, [before, len(ids) - before])
    return logits[-len(question.answer) - 1 : -1].log_softmax(-1), torch.tensor(question.answer)


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
@pytest.mark.parametrize(("name", "budget"), [("full", None), ("snapkv", 40), ("h2o+graphkv", 80), ("pyramidkv", 40)])
@torch.inference_mode()
def test_records_are_what_a_reference_without_cache_gives(model, prompt, records, mode, name, budget):
    for index, question in enumerate(prompt.questions):
        if mode not in question.modes:
            continue
        found = find(records, question=index, mode=mode, policy=name, budget=budget)
        policy = make_policy(name, budget, sinks=4)
        logits, answer = told(model, prompt, question, policy, mode)
        full, _ = told(model, prompt, question, None, mode)

        assert found.nll == pytest.approx(float(cross_entropy(logits, answer)), abs=2e-4)
        assert found.kl == pytest.approx(float(kl_div(logits, full, log_target=True, reduction="batchmean")), abs=2e-4)
        assert found.match == bool((logits.argmax(-1) == answer).all())
        assert found.answer_tokens == len(question.answer)
        assert found.num_tokens == LENGTH + (len(question.ids) - 1 if mode == "aware" else 0)


def test_there_is_one_record_for_everything(records, few):
    cells = 1 + len(few.budgets) * 3
    assert len(records) == len({record.key for record in records}) == 3 * cells
    assert {(record.mode, record.task) for record in records} == {
        ("agnostic", "needle-number"), ("agnostic", "continuation"), ("aware", "needle-number")
    }  # fmt: skip


def test_modes_differ_for_policies_and_not_for_the_full_cache(records):
    aware, agnostic = (find(records, task="needle-number", mode=m, policy="full") for m in ("aware", "agnostic"))
    assert aware.nll == pytest.approx(agnostic.nll, abs=1e-4)
    aware, agnostic = (
        find(records, task="needle-number", mode=m, policy="snapkv", budget=40) for m in ("aware", "agnostic")
    )
    assert aware.nll != agnostic.nll


def test_the_same_again_gives_the_same_records(model, tokenizer, prompt, few, records):
    assert evaluate(model, tokenizer, prompt, few) == records


def test_only_what_is_missing_is_given_and_it_is_the_same(model, tokenizer, prompt, few, records):
    for missing in (records[::3], records[5:], records[-1:]):
        done = {record.key for record in records} - {record.key for record in missing}
        assert evaluate(model, tokenizer, prompt, few, done) == missing
    assert evaluate(model, tokenizer, prompt, few, {record.key for record in records}) == []


@pytest.mark.parametrize("sinks", [0, 4])
def test_every_policy_keeps_exactly_its_budget(model, tokenizer, prompt, monkeypatch, sinks):
    kept = {}

    def watch(self, read, name, policy, budget, evict=prompt_run.PromptRun._evict):
        cache = evict(self, read, name, policy, budget)
        kept[name, read.mode] = [layer.num_stored for layer in cache.layers]
        return cache

    monkeypatch.setattr(prompt_run.PromptRun, "_evict", watch)
    found = evaluate(model, tokenizer, prompt, Config(budgets=(64,), policies=EVERYBODY, sinks=(sinks,)))

    assert {name for name, _ in kept} == set(EVERYBODY)
    assert {sum(stored) for stored in kept.values()} == {3 * 64}
    assert {record.tokens_kept for record in found if record.policy != "full"} == {64}
    assert not any(record.is_off_budget for record in found)


def test_fewer_bits_are_compared_at_equal_bytes(model, tokenizer, prompt):
    names = ("snapkv", "snapkv+mikv(high=0.5,low_bits=4,full_bits=32)", "h2o+mikv(high=0.25,low_bits=2,full_bits=32)")
    found = evaluate(model, tokenizer, prompt, Config(budgets=(64,), policies=names))

    for mode in ("aware", "agnostic"):
        base, *tiered = (find(found, mode=mode, policy=name, budget=64, task="needle-number") for name in names)
        assert base.tokens_kept == 64
        for each in tiered:
            # Less by less than one packed token in each head.
            assert 0 <= base.cache_bytes - each.cache_bytes < 3 * 2 * 2 * (4 + 8)
            assert each.tokens_kept > 64
            assert each.nll != base.nll


def test_a_policy_that_keeps_more_is_recorded_with_what_it_kept(model, tokenizer, prompt, monkeypatch):
    def one_more(name, budget, **_):
        return SnapKV(budget=budget + 1) if name == "snapkv" else make_policy(name, budget)

    monkeypatch.setattr(prompt_run, "make_policy", one_more)
    found = evaluate(model, tokenizer, prompt, Config(budgets=(64,), policies=("snapkv", "knorm")))

    # 3 layers of 2 KV heads of 8 numbers of 4 bytes, for keys and for values.
    a_token = 3 * 2 * 8 * 4 * 2
    sizes = {(record.policy, record.mode): (record.budget, record.tokens_kept, record.cache_bytes) for record in found}
    for mode in ("aware", "agnostic"):
        assert sizes["snapkv", mode] == (64, 65, 65 * a_token)
        assert sizes["knorm", mode] == (64, 64, 64 * a_token)
    assert sizes["full", "agnostic"] == (None, LENGTH, LENGTH * a_token)
    assert {record.policy for record in found if record.is_off_budget} == {"snapkv"}


def test_slots_that_shorter_heads_leave_unused_count_as_bytes_and_not_as_tokens(model, tokenizer, prompt):
    config = Config(budgets=(64,), policies=("snapkv", "snapkv+adakv", "snapkv+caote"), modes=("agnostic",))
    found = {record.policy: record for record in evaluate(model, tokenizer, prompt, config)}

    assert {found[name].tokens_kept for name in config.policies[1:]} == {64}
    assert found["snapkv+adakv"].cache_bytes > found["snapkv+caote"].cache_bytes == found["snapkv"].cache_bytes


def test_caches_that_find_their_budgets_or_share_them_are_recorded_with_what_they_kept(model, tokenizer, prompt):
    names = ("snapkv+lossless(tolerance=0.9)", "h2o+lossless(tolerance=0.9)", "h2o+anyquery(threshold=0.1)")
    shared = ("snapkv+shared(over=layers)", "snapkv+chunkkv(reuse=2)", "snapkv+shared(block=16)")
    records = evaluate(model, tokenizer, prompt, Config(budgets=(100,), policies=(*names, *shared)))

    for record in records:
        if record.policy in names:
            assert 0 < record.tokens_kept < 100
        elif record.policy in shared:
            assert record.tokens_kept == 100 if "block" not in record.policy else 84 < record.tokens_kept <= 100
    assert len({record.tokens_kept for record in records if record.policy in names}) > 1


def test_a_budget_that_holds_the_prompt_is_left_out(model, tokenizer, prompt):
    found = evaluate(model, tokenizer, prompt, Config(budgets=(64, LENGTH), policies=("knorm",)))

    assert {record.budget for record in found} == {None, 64}


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_answers_do_not_depend_on_who_else_is_in_the_batch(model, tokenizer, prompt, few, records, batch):
    found = evaluate(model, tokenizer, prompt, replace(few, batch=batch, generate=True))

    assert [record.nll for record in found] == pytest.approx([record.nll for record in records], abs=1e-4)
    alone = evaluate(model, tokenizer, prompt, replace(few, batch=1, generate=True))
    assert [record.text for record in found] == [record.text for record in alone]


def test_generated_text_is_the_model_s_own_greedy_answer(model, tokenizer, prompt):
    (found,) = evaluate(
        model, tokenizer, replace(prompt, questions=prompt.questions[:1]),
        Config(budgets=(LENGTH,), policies=("full",), modes=("agnostic",), generate=True),
    )  # fmt: skip
    question = prompt.questions[0]
    ids = torch.tensor([[*prompt.ids, *question.ids]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=question.max_new_tokens, do_sample=False
    )

    assert found.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert found.score == float(question.references[0] in found.text)


def test_generation_ends_where_the_model_does(model, tokenizer, prompt, monkeypatch):
    config = Config(budgets=(64,), policies=("snapkv", "knorm"), modes=("agnostic",), generate=True)
    prompt = replace(prompt, questions=prompt.questions[:1])
    whole = evaluate(model, tokenizer, prompt, config)[1].text
    letter = next(letter for letter in whole[3:] if letter.isascii() and letter.isprintable())
    end = tokenizer(letter, add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])

    found = evaluate(model, tokenizer, prompt, config)
    for record in found:
        assert letter not in record.text
    assert whole.startswith(found[1].text)


@torch.inference_mode()
def test_a_stack_goes_on_as_each_of_its_caches_would(model):
    ids = torch.randint(1, 256, (1, 60), generator=torch.manual_seed(0))
    with observing(model):
        full = EvictingCache(num_queries=60)
        model(ids[:, :50], **with_cache(model, full))
        caches = []
        for policy in (SnapKV(budget=20, window=4), make_policy("knorm+graphkv", 20)):
            caches.append(full.copy())
            caches[-1].evict(policy)
        alone = [model(ids[:, 50:], **with_cache(model, cache.copy())).logits for cache in caches]
        together = model(ids[:, 50:].expand(2, -1), **with_cache(model, EvictingCache.stacked(caches))).logits

    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(alone[0], alone[1])


@torch.inference_mode()
def test_heads_with_budgets_of_their_own_can_be_stacked(model):
    ids = torch.randint(1, 256, (1, 60), generator=torch.manual_seed(0))
    with observing(model):
        full = EvictingCache(num_queries=60)
        model(ids[:, :50], **with_cache(model, full))
        cache = full.copy()
        cache.evict(AdaKV(SnapKV(budget=20, window=4)))
        alone = model(ids[:, 50:], **with_cache(model, cache.copy())).logits
        together = model(ids[:, 50:].expand(2, -1), **with_cache(model, EvictingCache.stacked([cache, cache]))).logits

    assert any(layer.valid is not None for layer in cache.layers)
    torch.testing.assert_close(together, torch.cat([alone, alone]))


def test_closeness_is_total_for_everything_and_falls_with_the_budget(model, tokenizer, prompt):
    config = Config(budgets=(40, 120, LENGTH - 1), policies=("snapkv", "random"), closeness=True)
    found = [record for record in evaluate(model, tokenizer, prompt, config) if record.task == "continuation"]

    full = find(found, policy="full")
    assert (full.output_error, full.attention_mass) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    for policy in ("snapkv", "random"):
        small, middle, large = (find(found, policy=policy, budget=budget) for budget in config.budgets)
        assert small.attention_mass < middle.attention_mass < large.attention_mass < 1
        assert small.output_error > middle.output_error > large.output_error > 0
    best, worst = find(found, policy="snapkv", budget=40), find(found, policy="random", budget=40)
    assert best.attention_mass > worst.attention_mass


@torch.inference_mode()
def test_closeness_against_plain_loops(model, tokenizer, prompt):
    prompt = replace(prompt, questions=prompt.questions[1:])
    config = Config(budgets=(40,), policies=("knorm",), closeness=True, modes=("agnostic",))
    found = find(evaluate(model, tokenizer, prompt, config), policy="knorm")

    question, errors, masses = prompt.questions[0], [], []
    ids = torch.tensor([[*prompt.ids, *question.ids, *question.answer[:-1]]])
    with observing(model):
        cache = EvictingCache(num_queries=16)
        model(ids, **with_cache(model, cache))
        evicted = EvictingCache()
        model(ids[:, :LENGTH], **with_cache(model, evicted))
        evicted.evict(make_policy("knorm", 40, sinks=4))
    for layer, small in zip(cache.layers, evicted.layers, strict=True):
        for head in range(6):
            there = [*small.positions[0, head // 3].tolist(), *range(LENGTH, ids.shape[1])]
            keys, values = layer.keys[0, head // 3], layer.values[0, head // 3]
            for place in range(16):
                upto = ids.shape[1] - 15 + place
                weights = (keys[:upto] @ layer.queries[0, head, place] / 8**0.5).softmax(-1)
                kept = torch.tensor([index for index in there if index < upto])
                full, mass = weights @ values[:upto], weights[kept].sum()
                errors.append((weights[kept] @ values[kept] / mass - full).norm() / full.norm())
                masses.append(mass)

    assert found.output_error == pytest.approx(float(torch.stack(errors).mean()), abs=1e-4)
    assert found.attention_mass == pytest.approx(float(torch.stack(masses).mean()), abs=1e-4)


@pytest.mark.parametrize("policy", [Folded(KNorm(budget=12)), Folded(AdaKV(KNorm(budget=12)))])
def test_closeness_asks_merged_slots_as_often_as_they_count(policy):
    """Keys and values that were averaged, and their masses, one query at a time."""
    model, ids = tiny_llama(), torch.arange(1, 49)[None]
    with observing(model), torch.inference_mode():
        full, small = EvictingCache(num_queries=8), EvictingCache()
        model(ids, **with_cache(model, full))
        model(ids[:, :40], **with_cache(model, small))
        small.evict(policy)
        error, _ = make_probe(full, 40, 8).compare(small)
    errors = []
    for whole, layer in zip(full.layers, small.layers, strict=True):
        for head in range(6):
            mine = head // 3
            shown = [slot for slot, at in enumerate(layer.true_positions[0, mine].tolist()) if at >= 0]
            for place in range(8):
                query, later = whole.queries[0, head, place], slice(40, 41 + place)
                keys = torch.cat([layer.keys[0, mine, shown], whole.keys[0, mine, later]])
                values = torch.cat([layer.values[0, mine, shown], whole.values[0, mine, later]])
                mass = torch.cat([layer.mass[0, mine, shown], torch.ones(place + 1)])
                weights = mass * (keys @ query / 8**0.5).exp()
                everything = (whole.keys[0, mine, : 41 + place] @ query / 8**0.5).softmax(-1)
                expected = everything @ whole.values[0, mine, : 41 + place]
                errors.append((weights @ values / weights.sum() - expected).norm() / expected.norm())
    assert error == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_running_sums_leave_the_sliding_layers_of_a_mixed_model_alone():
    """Such layers hold their window only, and nobody evicts them."""
    model, ids = tiny_gemma3().eval(), torch.arange(1, 31)[None]
    with observing(model), torch.inference_mode():
        cache = EvictingCache(num_queries=30)
        model(ids[:, :20], **with_cache(model, cache))
        before = cache.running_states(H2O(budget=1))
        model(ids[:, 20:], **with_cache(model, cache))
        states = cache.running_states(H2O(budget=1), before)
        cache = cache.with_states(states)
        cache.evict(H2O(budget=20))

    assert [bool(state.names) for state in states] == [layer.evicts for layer in cache.layers] == [False, True] * 2
    assert [layer.num_stored for layer in cache.layers if layer.evicts] == [20, 20]
