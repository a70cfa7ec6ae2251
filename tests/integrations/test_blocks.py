"""A block of evicting() evicts, or says why it could not; and says nothing where all is well."""

import gc
import logging
import threading
import weakref

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from graphkv import ArgumentError, Degree, GraphKV, GraphKVWarning, KNorm, PyramidKV, SnapKV, StreamingLLM
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import cache_argument, with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import SIZES, tiny, tiny_gemma3, tiny_llama

N, POLICY = 40, KNorm(budget=10)
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(7))


def stored(output):
    """How many tokens each layer has; None if the layers know of no eviction."""
    return [getattr(layer, "num_stored", None) for layer in cache_of(output).layers]


def generate(model, ids, *args, **options):
    return model.generate(ids, *args, **{"attention_mask": torch.ones_like(ids)} | OPTIONS | options)


def config_without_cache(**options):
    return GenerationConfig(use_cache=False, **OPTIONS, **options)


def without_a_cache_in_its_config(model, ids):
    model.config.use_cache = False
    model(ids)


def without_a_cache_in_its_generation_config(model, ids):
    model.generation_config.use_cache = False
    generate(model, ids)


def under_checkpointing(model, ids):
    model.train()
    # Newer releases have another name for it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with torch.enable_grad():
        model(ids)


def a_layer_alone(model, ids):
    hidden = model.get_input_embeddings()(ids)
    model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(N)[None]))


def after_an_error(model, ids):
    with pytest.raises(IndexError):
        model(ids + 1000)
    model.model.forward(ids)


class Deaf(LlamaForCausalLM):
    """Takes a cache, and every other argument, and runs without."""

    def forward(self, input_ids, **kwargs):
        return self.model.forward(input_ids)


NOTHING_EVICTED = {
    "use_cache=False": (lambda model, ids: model(ids, use_cache=False), "use_cache is False"),
    "config.use_cache": (without_a_cache_in_its_config, "use_cache is False"),
    "generate with use_cache=False": (lambda model, ids: generate(model, ids, use_cache=False), "use_cache is False"),
    "generation_config.use_cache": (without_a_cache_in_its_generation_config, "use_cache is False"),
    "a generation config by keyword": (
        lambda model, ids: model.generate(ids, generation_config=config_without_cache()),
        "use_cache is False",
    ),
    "a generation config by place": (
        lambda model, ids: model.generate(ids, config_without_cache()),
        "use_cache is False",
    ),
    "gradient checkpointing": (under_checkpointing, "gradient checkpointing caches nothing"),
    "an inner forward()": (lambda model, ids: model.model.forward(ids), "LlamaAttention ran without a cache"),
    "a layer alone": (a_layer_alone, "LlamaAttention ran without a cache"),
    "a forward() after all went well": (
        lambda model, ids: (generate(model, ids), model.model.forward(ids)),
        "LlamaAttention ran without a cache",
    ),
    "a forward() after an error was caught": (
        after_an_error,
        "LlamaAttention ran without a cache",
    ),
}


@pytest.mark.parametrize(("run", "reason"), NOTHING_EVICTED.values(), ids=NOTHING_EVICTED)
def test_a_block_that_evicts_nothing_says_why(model, ids, run, reason):
    with torch.no_grad(), pytest.warns(GraphKVWarning, match=reason) as found, evicting(model, POLICY):
        run(model, ids)
    assert len(found) == 1
    # The one reason, and no other.
    assert ("ran without a cache" in str(found[0].message)) == ("ran without a cache" in reason)
    # It points at the block.
    assert found[0].filename == __file__


def test_a_cache_that_the_model_drops_is_told_of(ids):
    deaf = tiny(Deaf, LlamaConfig, **SIZES)
    with torch.no_grad(), pytest.warns(GraphKVWarning, match="Deaf dropped the cache"), evicting(deaf, POLICY):
        deaf(ids)


class Renaming(LlamaForCausalLM):
    """Calls its cache otherwise."""

    def forward(self, input_ids, memory=None, **kwargs):
        name = cache_argument(super().forward)
        return super().forward(input_ids, **{name: memory} | kwargs)


class Narrow(LlamaForCausalLM):
    """Takes no cache, but the model inside does."""

    def forward(self, input_ids):
        return super().forward(input_ids)


class Outside(LlamaForCausalLM):
    """Drops the cache, but the model inside gets one of its own."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids)


def base_model(model, ids):
    return model.model(ids)


EVICTED = {
    "forward()": lambda model, ids: model.forward(ids),
    "the model inside": base_model,
    "training": lambda model, ids: model.train()(ids),
    "the default cache by name": lambda model, ids: generate(model, ids, cache_implementation="dynamic"),
    "embeddings": lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids)),
    "embeddings by place": lambda model, ids: model(None, None, None, None, model.get_input_embeddings()(ids)),
    "sampling": lambda model, ids: generate(model, ids, do_sample=True),
    "beams": lambda model, ids: generate(model, ids, num_beams=3),
    "guidance": lambda model, ids: generate(model, ids, guidance_scale=1.5),
    "attentions": lambda model, ids: generate(model, ids, output_scores=True, output_logits=True),
}


@pytest.mark.parametrize("run", EVICTED.values(), ids=EVICTED)
def test_typical_use_evicts_without_a_warning(model, ids, run):
    with torch.no_grad(), evicting(model, POLICY):
        output = run(model, ids)
    # generate() stores three of its four tokens.
    assert stored(output) in ([10] * 3, [13] * 3)


@pytest.mark.parametrize("kind", [Renaming, Narrow, Outside])
def test_models_that_treat_their_cache_otherwise_are_evicted_inside(ids, kind):
    model = tiny(kind, LlamaConfig, **SIZES)
    with torch.no_grad(), evicting(model, POLICY):
        assert stored(model(ids)) == [10] * 3


def test_a_block_around_the_model_inside_counts_for_the_whole_one(model, ids):
    """And keyword arguments stay keyword arguments."""
    with torch.no_grad(), evicting(model.model, POLICY):
        assert stored(model(ids, use_cache=True)) == [10] * 3
        assert stored(generate(model, ids)) == [13] * 3


def test_what_has_nothing_to_evict_says_nothing(model, ids):
    with torch.no_grad():
        with evicting(model, POLICY):
            pass
        with evicting(model, POLICY):
            model.get_input_embeddings()(ids)
            model.lm_head(torch.ones(1, 48))
        with evicting(model, POLICY):
            cache = cache_of(generate(model, ids[:, :5]))
        assert "all 5 tokens fitted into the budget of 10" in cache.report()


def test_models_of_windows_alone_are_evicted(ids):
    model = tiny_gemma3(layer_types=["sliding_attention"] * 4)
    with torch.no_grad(), evicting(model, POLICY):
        assert stored(model(ids)) == [10] * 4


def test_an_exception_in_the_block_comes_alone(model, ids):
    def fail():
        with evicting(model, POLICY):
            model(ids, use_cache=False)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_blocks_on_two_models_do_not_meet(model, ids):
    other = tiny_llama(seed=1)
    with torch.no_grad(), evicting(model, POLICY), evicting(other, KNorm(budget=7)):
        assert stored(model(ids)) == [10] * 3
        assert stored(other(ids)) == [7] * 3
    with torch.no_grad(), evicting(model, POLICY), evicting(other, POLICY):
        model(ids)


def test_a_model_that_shares_the_configuration_is_left_alone(model, ids):
    twin = LlamaForCausalLM(model.config).eval()
    with torch.no_grad(), evicting(model, POLICY):
        assert stored(twin(ids)) == [None] * 3
    with evicting(model, POLICY), pytest.raises(ArgumentError, match="shares its config"), evicting(twin, POLICY):
        pass


def test_a_second_block_on_a_part_is_refused(model):
    with (
        evicting(model, POLICY),
        pytest.raises(ArgumentError, match="already; LlamaModel is"),
        evicting(model.model, POLICY),
    ):
        pass


def test_threads_in_one_block_are_all_evicted(model, ids):
    found = []
    with evicting(model, POLICY):
        threads = [threading.Thread(target=lambda: found.append(stored(generate(model, ids)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[13] * 3] * 3


class Steps:
    """A streamer that waits for leave after its second token."""

    def __init__(self):
        self.count, self.has_begun, self.may_go_on = 0, threading.Event(), threading.Event()

    def put(self, tokens):
        self.count += 1
        if self.count == 3:
            self.has_begun.set()
            assert self.may_go_on.wait(60)

    def end(self):
        pass


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("num_new", [4, 12])
@pytest.mark.parametrize("block", [lambda model: evicting(model, POLICY), observing], ids=["evicting", "observing"])
def test_a_block_that_is_left_while_a_thread_generates_is_an_error_there(model, ids, pad, num_new, block):
    steps, errors = Steps(), []
    mask = (torch.arange(N) >= pad).long()[None]

    def run():
        try:
            generate(model, ids, attention_mask=mask, max_new_tokens=num_new, streamer=steps)
        except ArgumentError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    with block(model):
        thread.start()
        assert steps.has_begun.wait(60)
        kept = model.generate
    steps.may_go_on.set()
    thread.join()
    assert errors == ["the block of evicting() or observing() must last until generate() returns"]
    with pytest.raises(ArgumentError, match="must last until generate"):
        kept(ids)


def test_attention_past_the_interface_in_one_layer_is_refused(model, ids):
    with torch.no_grad(), evicting(model, POLICY):
        model.model.layers[1].self_attn.config = LlamaConfig(**SIZES, attn_implementation="sdpa")
        with pytest.raises(ArgumentError, match="layer 1 does not hand its"):
            model(ids)


def test_the_handle_of_a_block_has_the_last_cache_and_its_report(model, ids):
    with torch.no_grad(), evicting(model, POLICY) as run:
        assert run.cache is None
        assert run.report() == "Nothing was evicted: no call of the model in the block has filled a cache."
        model(ids)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert [layer.num_stored for layer in run.cache.layers] == [13] * 3
    # After the block too.
    assert run.cache.num_seen == N + 3
    assert run.report() == run.cache.report()
    assert "3 evictions ran" in run.report()


def test_the_handle_keeps_a_cache_of_the_callers_own_object(model, ids):
    cache = EvictingCache(POLICY)
    with torch.no_grad(), evicting(model, POLICY) as run:
        model(ids, **with_cache(model, cache))
    assert run.cache is cache


def test_the_cache_of_a_call_makes_room_before_the_next_one_begins(model, ids):
    with torch.no_grad(), evicting(model, POLICY) as run:
        model(ids)
        before = weakref.ref(run.cache)
        alive = []
        model.model.register_forward_pre_hook(lambda *_: alive.append((gc.collect(), before())[1]))
        model(ids)
    assert alive == [None]


def test_the_handle_says_why_nothing_was_evicted(model, ids):
    with torch.no_grad(), pytest.warns(GraphKVWarning), evicting(model, POLICY) as run:
        model(ids, use_cache=False)
    assert run.report() == "Nothing was evicted: use_cache is False."


def test_a_block_can_be_entered_once(model):
    block = evicting(model, POLICY)
    with block:
        pass
    with pytest.raises(ArgumentError, match="can be entered once"), block:
        pass


def test_a_forgotten_with_warns_at_its_line(model):
    with pytest.warns(GraphKVWarning, match="evicting.. does nothing by itself; write `with") as found:
        evicting(model, POLICY)
    assert [each.filename for each in found] == [__file__]


def test_a_block_that_is_refused_is_not_called_forgotten(model):
    for wrong in (lambda: evicting(model, POLICY, every=0), lambda: evicting(torch.nn.Linear(2, 2), POLICY)):
        with pytest.raises((ArgumentError, TypeError)):
            wrong()
    gc.collect()


@pytest.mark.parametrize("name", ["snapkv+degree", "snapkv(window=8)"])
def test_policies_by_their_name_on_the_command_line(model, ids, name):
    window = 32 if "degree" in name else 8
    snapkv = SnapKV(budget=36, window=window)
    for budget, tokens in ((36, 36), (0.9, 36), ("90%", 36), ("36", 36)):
        with torch.no_grad(), evicting(model, name, budget=budget) as run:
            model(ids)
        assert run.cache.layers[0].num_stored == tokens
        policy = run.cache.policy
        assert (policy.base if "degree" in name else policy).window == window
    with evicting(model, name, budget=36) as run:
        model(ids)
    assert run.cache.policy == (GraphKV(snapkv, Degree()) if "degree" in name else snapkv)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("snapkv", {}, "budget must be given with the name of a policy, 'snapkv'"),
        ("full", {"budget": 5}, "policy must evict something; got 'full'"),
        ("best", {"budget": 5}, "^policy must be one of full, snapkv"),
        ("snapkv", {"budget": "many"}, "^budget must be a number of tokens or a percentage like 25%; got 'many'"),
        (POLICY, {"budget": 5}, "budget must be left out where policy has one of its own; got 5"),
    ],
)
def test_other_names_and_budgets_are_refused(model, policy, options, message):
    with pytest.raises(ArgumentError, match=message):
        evicting(model, policy, **options)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            SnapKV(budget=10, window=32),
            "^32 newest tokens are kept before all others and leave nothing of the budget of 10,",
        ),
        (SnapKV(budget=0.2, window=8), "^8 newest tokens .* the budget of 8,"),
        (GraphKV(KNorm(budget=10, num_sinks=20)), "^20 sinks are kept .* the budget of 10,"),
        (StreamingLLM(budget=4), "^4 sinks are kept"),
        (SnapKV(budget=12, window=8, num_sinks=4), "^4 sinks and 8 newest tokens"),
    ],
)
def test_a_budget_that_leaves_no_choice_warns_and_says_why(model, ids, policy, message):
    with torch.no_grad(), pytest.warns(GraphKVWarning, match=message) as found, evicting(model, policy, every=32):
        model(ids)
    assert [each.filename for each in found] == [__file__]
    with torch.no_grad(), observing(model):
        cache = EvictingCache(num_queries=32)
        model(ids, **with_cache(model, cache))
        with pytest.warns(GraphKVWarning, match=message):
            cache.evict(policy)


def test_a_budget_with_a_choice_in_some_layer_or_nothing_to_drop_says_nothing(model, ids):
    for policy in (SnapKV(budget=9, window=8), SnapKV(budget=N, window=N), PyramidKV(budget=10, window=8)):
        with torch.no_grad(), evicting(model, policy):
            model(ids)


def test_evictions_are_logged_at_debug_level(model, ids, caplog):
    with torch.no_grad(), evicting(model, POLICY):
        model(ids)
        assert caplog.messages == []
        with caplog.at_level(logging.DEBUG, logger="graphkv"):
            model(ids)
    assert len(caplog.messages) == 3
    assert caplog.messages[2].startswith(
        "layer 2: KNorm kept 10 of 40 stored tokens under a budget of 10, 40 seen; 0.00 MB freed in"
    )
