"""What a caller hands to a model inside evicting() is used as it is, or refused by name."""

import functools

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from graphkv import ArgumentError, ArgumentTypeError, KNorm, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import CACHE_ARGUMENTS, cache_argument, with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import SIZES, tiny, tiny_llama

N, POLICY, EVERYTHING = 40, KNorm(budget=10), KNorm(budget=10_000)
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def stored(output):
    return [layer.num_stored for layer in cache_of(output).layers]


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS | options)


def by_name(model, ids, cache):
    return model(ids, **with_cache(model, cache))


def by_place(model, ids, cache):
    return model(ids, torch.ones(1, ids.shape[1] + cache.get_seq_length()), None, cache)


@pytest.mark.parametrize("call", [by_name, by_place])
@pytest.mark.parametrize("with_config", [False, True])
def test_a_loop_around_one_cache_fills_that_cache(model, ids, call, with_config):
    make = functools.partial(DynamicCache, config=model.config) if with_config else DynamicCache
    plain, kept, small, token = make(), make(), make(), ids[:, :1]
    expected = [call(model, ids, plain).logits, call(model, token, plain).logits]
    with evicting(model, EVERYTHING):
        found = [call(model, ids, kept).logits, call(model, token, kept).logits]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)

    with evicting(model, POLICY):
        assert cache_of(call(model, ids, small)) is small
        assert [layer.num_stored for layer in small.layers] == [10] * 3
        call(model, token, small)
    assert isinstance(small, EvictingCache)
    assert small.policy == POLICY
    assert [(layer.num_stored, layer.num_seen) for layer in small.layers] == [(11, N + 1)] * 3


@pytest.mark.parametrize("with_config", [False, True])
def test_generate_fills_the_callers_cache(model, ids, with_config):
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    with evicting(model, POLICY):
        expected = generate(model, ids).sequences
        output = generate(model, ids, **with_cache(model, cache))
    assert cache_of(output) is cache
    assert torch.equal(output.sequences, expected)
    assert [layer.num_stored for layer in cache.layers] == [13] * 3


def test_assisted_decoding_with_the_callers_cache_gives_what_plain_decoding_gives(model, ids):
    with evicting(model, SnapKV(budget=12, window=4)):
        expected = generate(model, ids, max_new_tokens=12).sequences
        cache = with_cache(model, DynamicCache())
        found = generate(model, ids, max_new_tokens=12, assistant_model=tiny_llama(), **cache).sequences
    assert torch.equal(found, expected)


class Own(DynamicCache):
    """Somebody's own cache."""


def filled(model):
    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), 1)
    return cache


REFUSED = {
    "offloading": (lambda model: DynamicCache(offloading=True), "DynamicCache with 0 tokens with offloading"),
    "filled in a later layer": (filled, "DynamicCache with 5 tokens"),
    "static": (lambda model: StaticCache(config=model.config, max_cache_len=64), "StaticCache with 0 tokens"),
    "a class of one's own": (lambda model: Own(), "got Own with 0 tokens"),
    "a tuple": (lambda model: ((torch.ones(1, 2, 0, 8), torch.ones(1, 2, 0, 8)),) * 3, "got tuple"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_caches_are_refused_by_name_and_left_as_they_were(model, ids, make, message):
    cache = make(model)
    for run in (model, functools.partial(generate, model)):
        with evicting(model, POLICY), pytest.raises(ArgumentError, match=message):
            run(ids, **with_cache(model, cache))
    assert not isinstance(cache, EvictingCache)


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
@pytest.mark.parametrize("mask", [True, False])
def test_other_caches_of_generate_are_refused(model, ids, name, mask):
    options = {"attention_mask": torch.ones_like(ids)} if mask else {}
    with evicting(model, POLICY), pytest.raises(ArgumentError, match=f"cache_implementation must be left.*'{name}'"):
        model.generate(ids, **options, max_new_tokens=2, cache_implementation=name)


def test_a_cache_that_would_not_do_what_the_block_asks_for_is_refused(model, ids):
    for options in ({"every": 3}, {"rerotate": True}, {"record": True}):
        (name,) = options
        with evicting(model, POLICY, **options), pytest.raises(ArgumentError, match=f"have the {name} of evicting"):
            by_name(model, ids, EvictingCache(POLICY))
        with evicting(model, POLICY, **options):
            assert stored(by_name(model, ids, EvictingCache(POLICY, **options))) == [10] * 3
        # A block that does not ask leaves it to the cache.
        with evicting(model, POLICY):
            assert stored(by_name(model, ids, EvictingCache(POLICY, **options))) == [10] * 3
    for policy in (None, KNorm(budget=11)):
        with evicting(model, POLICY), pytest.raises(ArgumentError, match="have the policy of evicting"):
            by_name(model, ids, EvictingCache(policy))


def test_both_names_at_once_that_hold_nothing_are_no_cache(model, ids):
    nothing = dict.fromkeys({*CACHE_ARGUMENTS, cache_argument(model.forward)})
    with evicting(model, POLICY):
        for options in (nothing, {cache_argument(model.forward): None}, {}):
            assert stored(model(ids, **options)) == [10] * 3


def renamed(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def nameless(forward):
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def partial(forward):
    return functools.partial(forward, use_cache=True)


@pytest.mark.parametrize("wrap", [renamed, nameless, partial])
def test_forwards_that_were_exchanged_hand_on_what_they_get(model, ids, wrap):
    model.forward = wrap(model.forward)
    mask = torch.ones_like(ids)
    with evicting(model, POLICY):
        assert stored(model(ids)) == [10] * 3
        assert stored(model(ids, attention_mask=mask)) == [10] * 3
        assert stored(model(ids, mask, None, None)) == [10] * 3
        assert stored(by_place(model, ids, cache := DynamicCache())) == [10] * 3
        assert stored(generate(model, ids)) == [13] * 3
    assert isinstance(cache, EvictingCache)


class Tuner(torch.nn.Module):
    """As LoRA models of peft: calls the forward of the model that it wraps, past its hooks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class Wrapped(torch.nn.Module):
    """As the models of peft."""

    def __init__(self, model, peft_type="LORA"):
        super().__init__()
        self.base_model = Tuner(model)
        self.active_peft_config = LlamaConfig(peft_type=peft_type)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.get_base_model().generate(*args, **kwargs)


@pytest.mark.parametrize("block", [Wrapped.get_base_model, lambda wrapped: wrapped], ids=["inside", "whole"])
def test_a_model_of_peft_is_the_model_that_it_wraps(model, ids, block):
    wrapped = Wrapped(model)
    with evicting(block(wrapped), POLICY):
        assert stored(wrapped(ids)) == stored(wrapped(input_ids=ids)) == [10] * 3
        assert stored(generate(wrapped, ids)) == [13] * 3


def test_prefix_tuning_is_refused(model):
    for block in (lambda wrapped: evicting(wrapped, POLICY), observing):
        with pytest.raises(ArgumentError, match="prefix tuning fills it"), block(Wrapped(model, "PREFIX_TUNING")):
            pass


@pytest.mark.parametrize(
    ("wrap", "name"), [(torch.nn.DataParallel, ".module"), (lambda m: torch.compile(m, backend="eager"), "._orig_mod")]
)
def test_other_wrappers_are_refused_with_the_name_of_what_to_pass(model, wrap, name):
    with pytest.raises(ArgumentTypeError, match=f"the model inside may be its {name}"), evicting(wrap(model), POLICY):
        pass


def test_a_forward_of_keyword_arguments_alone_keeps_them(ids):
    class Keywords(LlamaForCausalLM):
        def forward(self, **kwargs):
            return super().forward(**kwargs)

    with evicting(model := tiny(Keywords, LlamaConfig, **SIZES), POLICY):
        assert stored(model(input_ids=ids)) == [10] * 3
        assert stored(by_keyword := model(input_ids=ids, **with_cache(model, DynamicCache()))) == [10] * 3
    assert isinstance(cache_of(by_keyword), EvictingCache)
