"""Eviction inside transformers, against a reference that recomputes attention over the kept positions."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from graphkv import (
    H2O,
    TOVA,
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    Decay,
    ExpectedAttention,
    GraphKV,
    KeyDiff,
    Policy,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import cache_argument, with_cache
from tests.integrations.reference import assert_close, reference_generate, reference_logits
from tests.integrations.releases import cache_of
from tests.integrations.tiny import tiny_llama

N = 40
POLICIES = {
    "snapkv": SnapKV(budget=14, window=6, kernel_size=3),
    "snapkv+graphkv": GraphKV(SnapKV(budget=14, window=6, kernel_size=3), Decay(neighbors=4)),
    "streaming-llm": StreamingLLM(budget=9, num_sinks=2),
    "random": Random(budget=0.3, seed=5),
    # Another budget in every layer.
    "pyramidkv": PyramidKV(budget=14, window=6, kernel_size=3),
    "h2o+graphkv": GraphKV(H2O(budget=14)),
    "tova": TOVA(budget=14),
    "keydiff": KeyDiff(budget=14, num_sinks=1),
    "expected-attention": ExpectedAttention(budget=14),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
each_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(1, 97, (3, N), generator=torch.Generator().manual_seed(1))


def generate(model, ids, mask=None, num_new=8, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **options)


@each_policy
@each_implementation
def test_generated_tokens_equal_the_slow_reference(model, prompts, policy, implementation):
    model.set_attn_implementation(implementation)
    with evicting(model, policy):
        out = generate(model, prompts[:1])

    assert out[0].tolist() == reference_generate(model, prompts[0], policy, 8).tolist()


@each_policy
def test_logits_equal_the_slow_reference(model, prompts, policy):
    """Several new tokens at once: the mask and the positions must both be true."""
    later = torch.randint(1, 97, (1, 7), generator=torch.Generator().manual_seed(2))
    with observing(model), torch.inference_mode():
        cache = EvictingCache(policy)
        model(prompts[:1], **with_cache(model, cache))
        logits = model(later, **with_cache(model, cache)).logits[0]

    expected, kept = reference_logits(model, torch.cat([prompts[0], later[0]]), policy, [N, 7])
    # Float32 sums in another order: close on the scale of the logits.
    torch.testing.assert_close(logits, expected[N:], rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert [layer.positions[0].tolist() for layer in cache.layers] == [kept[layer] for layer in range(3)]


def test_the_reference_can_tell_policies_apart(model, prompts):
    answers = {name: reference_generate(model, prompts[0], policy, 8).tolist()[N:] for name, policy in POLICIES.items()}
    full = reference_generate(model, prompts[0], SnapKV(budget=N), 8).tolist()[N:]

    assert all(answer != full for answer in answers.values())


@each_implementation
def test_a_budget_of_the_whole_prompt_changes_nothing(model, prompts, implementation):
    model.set_attn_implementation(implementation)
    plain = generate(model, prompts)
    with evicting(model, GraphKV(SnapKV(budget=N, window=6))):
        evicted = generate(model, prompts)

    assert evicted.tolist() == plain.tolist()


@each_policy
def test_the_cache_shrinks_for_real(model, prompts, policy):
    with evicting(model, policy):
        out = generate(model, prompts, return_dict_in_generate=True)

    cache = cache_of(out)
    budgets = [policy.layer_budget(N, layer, 3) for layer in range(3)]
    assert isinstance(policy, PyramidKV) == (len(set(budgets)) > 1)
    for layer, kept in zip(cache.layers, budgets, strict=True):
        assert layer.num_seen == N + 7
        assert layer.keys.shape == layer.values.shape == (3, 2, kept + 7, 8)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert (layer.positions.diff(dim=-1) > 0).all()
        assert layer.positions[..., kept:].tolist() == [[list(range(N, N + 7))] * 2] * 3
    assert cache.nbytes == 2 * 3 * 2 * (sum(budgets) + 3 * 7) * 8 * 4


def test_a_plain_forward_call_is_evicted_too(model, prompts):
    with evicting(model, POLICIES["snapkv"]), torch.inference_mode():
        assert cache_of(model(prompts)).layers[0].num_stored == 14


@each_policy
@pytest.mark.parametrize("other", ["numpy", "jax"])
def test_every_backend_keeps_the_same_tokens(model, prompts, policy, other):
    pytest.importorskip(other)
    kept = []
    for backend in ("torch", other):
        with evicting(model, policy, backend=backend, record=True):
            cache = cache_of(generate(model, prompts, return_dict_in_generate=True))
        kept.append([layer.positions.tolist() for layer in cache.layers])
        (decision,) = cache.layers[0].record.decisions
        assert type(decision.kept).__module__.startswith(backend)

    assert kept[0] == kept[1]


@each_policy
@each_implementation
def test_a_left_padded_batch_equals_its_rows_alone(model, prompts, policy, implementation):
    model.set_attn_implementation(implementation)
    # A share of the tokens would be another number of tokens in a padded row.
    policy = Random(budget=12, seed=5) if isinstance(policy, Random) else policy
    pads = [0, 5, 11]
    mask = torch.stack([(torch.arange(N) >= pad).long() for pad in pads])
    with evicting(model, policy):
        batch = generate(model, prompts * mask, mask)
        for row, pad in enumerate(pads):
            alone = generate(model, prompts[row : row + 1, pad:])
            assert batch[row, N:].tolist() == alone[0, N - pad :].tolist()


@each_policy
def test_beams_carry_their_positions(model, prompts, policy):
    with evicting(model, policy):
        batch = generate(model, prompts, num_beams=3, return_dict_in_generate=True)
        alone = generate(model, prompts[1:2], num_beams=3)

    assert batch.sequences[1].tolist() == alone[0].tolist()
    assert cache_of(batch).layers[0].positions.shape[0] == 9


def test_a_second_turn_feeds_only_new_tokens(model, prompts):
    policy = POLICIES["snapkv+graphkv"]
    later = torch.randint(1, 97, (1, 5), generator=torch.Generator().manual_seed(2))
    history = torch.cat([prompts[:1], later], dim=1)
    with evicting(model, policy), torch.inference_mode():
        cache = EvictingCache(policy)
        model(prompts[:1], **with_cache(model, cache))
        out = generate(model, history, **with_cache(model, cache))

    ids = history[0]
    for step in range(8):
        logits, _ = reference_logits(model, ids, policy, [N, 5] + [1] * step)
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    assert out[0].tolist() == ids.tolist()
    assert cache.layers[0].num_seen == N + 5 + 7


def test_interleaved_requests_do_not_touch_each_other(model, prompts):
    policy = POLICIES["snapkv"]
    with evicting(model, policy), torch.inference_mode():
        alone = [generate(model, row[None])[0, N:].tolist() for row in prompts[:2]]
        caches, last, answers = [EvictingCache(policy) for _ in range(2)], list(prompts[:2]), [[], []]
        for _ in range(8):
            for request in range(2):
                logits = model(last[request][None], **with_cache(model, caches[request])).logits
                last[request] = logits[0, -1].argmax()[None]
                answers[request].append(int(last[request]))

    assert answers == alone


def test_copies_of_one_prefill_go_their_own_ways(model, prompts):
    with observing(model), torch.inference_mode():
        full = EvictingCache(num_queries=N)
        model(prompts[:1], **with_cache(model, full))
        before = [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
        for policy in POLICIES.values():
            twin = full.copy()
            twin.evict(policy)
            expected = EvictingCache(policy)
            model(prompts[:1], **with_cache(model, expected))
            for layer, same in zip(twin.layers, expected.layers, strict=True):
                assert torch.equal(layer.keys, same.keys)
                assert torch.equal(layer.positions, same.positions)
            model(prompts[1:2, :3], **with_cache(model, twin))

    for layer, (keys, values) in zip(full.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@each_implementation
def test_the_model_is_as_it_was(model, prompts, implementation):
    model.set_attn_implementation(implementation)
    plain = generate(model, prompts)
    hooks = (dict(model._forward_pre_hooks), dict(model._forward_hooks))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with evicting(model, POLICIES["snapkv"]):
        generate(model, prompts)

    assert model.config._attn_implementation == implementation
    assert (dict(model._forward_pre_hooks), dict(model._forward_hooks)) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert generate(model, prompts).tolist() == plain.tolist()
    assert type(cache_of(generate(model, prompts, return_dict_in_generate=True))) is DynamicCache


class Broken(Policy):
    """Fails in the second layer."""

    def score(self, layer, memory, /):
        if layer.layer == 1:
            raise RuntimeError("broken policy")
        return layer.keys[..., 0]


def test_an_exception_leaves_the_model_as_it_was(model, prompts):
    hooks = (dict(model._forward_pre_hooks), dict(model._forward_hooks))
    implementation = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="broken policy"), evicting(model, Broken(budget=5)):
        generate(model, prompts)

    assert model.config._attn_implementation == implementation
    assert (dict(model._forward_pre_hooks), dict(model._forward_hooks)) == hooks


def test_a_failing_policy_does_not_half_evict_a_cache(model, prompts):
    with observing(model), torch.inference_mode():
        cache = EvictingCache()
        model(prompts, **with_cache(model, cache))
        with pytest.raises(RuntimeError, match="broken policy"):
            cache.evict(Broken(budget=5))

    assert [layer.num_stored for layer in cache.layers] == [N] * 3
    assert all(layer.num_evictions == 0 for layer in cache.layers)


def test_half_precision_is_evicted_without_nan(prompts):
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_llama().to(dtype)
        with evicting(model, POLICIES["snapkv+graphkv"], backend="numpy"), torch.inference_mode():
            out = model(prompts)
        assert cache_of(out).layers[0].keys.dtype == dtype
        assert torch.isfinite(out.logits).all()


def test_another_scaling_of_the_logits_reaches_the_policy(prompts):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    with observing(model), torch.inference_mode():
        cache = EvictingCache(num_queries=6)
        model(prompts, **with_cache(model, cache))
        model.set_attn_implementation("graphkv_eager")
        weights = model(prompts, output_attentions=True).attentions

    layer = cache.layers[0]
    keys = layer.keys.repeat_interleave(3, dim=1)
    logits = layer.queries @ keys.transpose(-1, -2) / 8**0.5
    logits = logits.masked_fill(torch.arange(N) > torch.arange(N - 6, N)[:, None], -torch.inf)
    torch.testing.assert_close(logits.softmax(-1), weights[0][:, :, -6:], rtol=1e-4, atol=1e-6)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()


def test_multi_head_models_run_as_well(prompts):
    """GPT-2: learned positions, no grouped heads, its own attention module."""
    model = gpt2()
    with evicting(model, SnapKV(budget=N, window=4)):
        same = generate(model, prompts)
    with evicting(model, SnapKV(budget=10, window=4)):
        cache = cache_of(generate(model, prompts, return_dict_in_generate=True))

    assert same.tolist() == generate(model, prompts).tolist()
    assert cache.layers[0].num_stored == 10 + 7


@pytest.mark.parametrize(
    ("enter", "error", "message"),
    [
        (lambda: evicting(tiny_llama(), 3), ArgumentTypeError, "policy must be a Policy; got int"),
        (
            lambda: evicting(tiny_llama(), SnapKV),
            ArgumentTypeError,
            "policy must be a Policy; got the class SnapKV: call",
        ),
        (lambda: evicting(SnapKV(budget=9), tiny_llama()), ArgumentTypeError, "model must come first .*; got SnapKV"),
        (lambda: evicting(torch.nn.Linear(2, 2), SnapKV(budget=9)), ArgumentTypeError, "model must be a transformers"),
        (lambda: evicting(tiny_llama(), SnapKV(budget=9), every=0), ArgumentError, "every must be at least 1; got 0"),
        (lambda: evicting(tiny_llama(), SnapKV(budget=9), backend="tpu"), BackendError, "backend must be one of"),
        (lambda: observing(tiny_llama(attn_implementation="flex_attention")), ArgumentError, "'sdpa' or 'eager'"),
    ],
)
def test_what_cannot_be_evicted_is_refused_at_the_door(enter, error, message):
    with pytest.raises(error, match=message), enter():
        pass


def test_nesting_is_refused(model):
    with evicting(model, POLICIES["snapkv"]), pytest.raises(ArgumentError, match="already"), observing(model):
        pass
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_foreign_and_used_caches_are_refused(model, prompts):
    used = DynamicCache()
    with torch.inference_mode():
        model(prompts, **with_cache(model, used))
        for cache in (used, StaticCache(config=model.config, max_cache_len=64)):
            with (
                pytest.raises(ArgumentError, match="must be None, an empty DynamicCache"),
                evicting(model, POLICIES["snapkv"]),
            ):
                model(prompts, **with_cache(model, cache))


def test_a_mask_of_four_axes_hides_what_it_hides_without_us(model, prompts):
    # The other one adds what it is given.
    model.set_attn_implementation("sdpa")
    mask = torch.ones(3, 1, N, N, dtype=torch.bool).tril()
    mask[0, :, :, :5] = False
    later = torch.ones(3, 1, 1, N + 1, dtype=torch.bool)
    later[0, :, :, :5] = False
    rows = torch.tensor([[1]] * 3)
    with evicting(model, POLICIES["snapkv"]), torch.inference_mode():
        output = model(prompts, attention_mask=mask)
        cache = cache_of(output)
        after = model(rows, attention_mask=later, **with_cache(model, cache)).logits
        two_axes = model(prompts, attention_mask=mask[:, 0, -1].long())
        cache = cache_of(two_axes)
        expected = model(rows, attention_mask=later[:, 0, 0].long(), **with_cache(model, cache)).logits
    assert torch.equal(cache_of(output).layers[0].positions, cache.layers[0].positions)
    assert_close(output.logits[:, 5:], two_axes.logits[:, 5:])
    assert_close(after, expected)
    with evicting(model, POLICIES["snapkv"]), torch.inference_mode():
        cache = cache_of(model(prompts, attention_mask=mask))
        with pytest.raises(ArgumentError, match=r"four axes and a column for each of the \d+ tokens seen"):
            model(rows, attention_mask=later[..., 8:], **with_cache(model, cache))


def test_misuse_of_a_cache_is_refused(model, prompts):
    with observing(model), torch.inference_mode():
        cache = EvictingCache()
        with pytest.raises(ArgumentError, match="it is empty"):
            cache.evict(POLICIES["snapkv"])
        model(prompts, **with_cache(model, cache))
        with pytest.raises(ArgumentError, match="queries must hold the last"):
            cache.evict(POLICIES["snapkv"])
    with pytest.raises(ArgumentTypeError, match="num_queries must be an integer"):
        EvictingCache(num_queries=1.5)


def test_a_model_that_hides_its_keys_is_noticed(model, prompts, monkeypatch):
    """A cache that never hears of queries would silently never evict."""
    real = model.model.layers[1].self_attn.forward

    def hide(*args, **kwargs):
        cache = kwargs[cache_argument(real)]
        update = cache.update
        monkeypatch.setattr(cache, "update", lambda *a, **k: tuple(x.clone() for x in update(*a, **k)))
        try:
            return real(*args, **kwargs)
        finally:
            monkeypatch.setattr(cache, "update", update)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", hide)
    with (
        evicting(model, POLICIES["snapkv"]),
        pytest.raises(ArgumentError, match="attend to its cached keys as they are; LlamaAttention computes others"),
    ):
        model(prompts)


def test_a_reset_cache_starts_over(model, prompts):
    policy = POLICIES["snapkv"]
    with evicting(model, policy), torch.inference_mode():
        cache = EvictingCache(policy)
        first = model(prompts, **with_cache(model, cache)).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        assert torch.equal(model(prompts, **with_cache(model, cache)).logits, first)


def test_rows_can_be_repeated_and_selected(model, prompts):
    policy = POLICIES["snapkv"]
    with evicting(model, policy), torch.inference_mode():
        cache = EvictingCache(policy)
        model(prompts, **with_cache(model, cache))
        twin = cache.copy()
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([2, 5]))
        step = torch.tensor([[3], [4], [5]])
        whole = model(step, **with_cache(model, cache)).logits
        part = model(step[1:], **with_cache(model, twin)).logits

    torch.testing.assert_close(part, whole[1:], rtol=1e-5, atol=1e-5)


def test_models_can_be_copied_afterwards(model, prompts):
    with evicting(model, POLICIES["snapkv"]):
        generate(model, prompts)
    assert generate(copy.deepcopy(model), prompts).tolist() == generate(model, prompts).tolist()
