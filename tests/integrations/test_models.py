"""Every family of models against the slow reference."""

import pytest
import torch
from transformers import DynamicCache

from graphkv import H2O, GraphKV, KeyDiff, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import reference_logits
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES

N = 40
POLICIES = {
    "snapkv+graphkv": GraphKV(SnapKV(budget=14, window=6, kernel_size=3), signal="decay", neighbors=3),
    "h2o": H2O(budget=12),
    "keydiff": KeyDiff(budget=10, num_sinks=1),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (N + 9,), generator=torch.Generator().manual_seed(3))


@each_family
@each_implementation
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_logits_equal_the_slow_reference(family, implementation, policy, ids):
    """A prompt, several tokens at once, one token, and evictions in between."""
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    calls, logits = [N, 5, 1, 3], []
    with observing(model), torch.inference_mode():
        cache = EvictingCache(policy, every=6)
        for chunk in ids.split(calls):
            logits.append(model(chunk[None], **with_cache(model, cache)).logits[0])
    expected, kept = reference_logits(model, ids, policy, calls, every=6)

    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for number, layer in enumerate(cache.layers):
        if layer.evicts:
            assert layer.positions[0].tolist() == kept[number]
            assert layer.num_evictions == 2


@each_family
def test_a_left_padded_batch_equals_its_rows_alone(family, ids):
    model, policy = FAMILIES[family](), POLICIES["snapkv+graphkv"]
    pads = [0, 5, 11]
    prompts = torch.stack([ids[:N], ids[4 : N + 4], ids[9 : N + 9]])
    mask = torch.stack([(torch.arange(N) >= pad).long() for pad in pads])
    with evicting(model, policy, every=4):
        batch = model.generate(prompts * mask, attention_mask=mask, max_new_tokens=10, do_sample=False)
        for row, pad in enumerate(pads):
            alone = prompts[row : row + 1, pad:]
            out = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=10, do_sample=False)
            assert batch[row, N:].tolist() == out[0, N - pad :].tolist()


@each_family
def test_a_budget_of_everything_changes_nothing(family, ids):
    model = FAMILIES[family]()
    prompt = ids[None, :N]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(prompt, **options)
    with evicting(model, SnapKV(budget=60, window=4), every=1):
        assert model.generate(prompt, **options).tolist() == plain.tolist()


@each_family
def test_our_attention_changes_nothing_for_other_caches(family, ids):
    model = FAMILIES[family]()
    pads = torch.tensor([[0], [7]])
    prompt, mask = ids[:N].repeat(2, 1), (torch.arange(N) >= pads).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(prompt * mask, **options)
    with observing(model):
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            assert model.generate(prompt * mask, **with_cache(model, cache), **options).tolist() == plain.tolist()


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_numbers(family, dtype, ids):
    """Keys and values as large as the format allows them, scores in float32."""
    model = FAMILIES[family]().to(dtype)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(POLICIES["snapkv+graphkv"], every=4)
        for chunk in ids.split([N, 4, 5]):
            assert torch.isfinite(model(chunk[None], **with_cache(model, cache)).logits).all()
    assert all(layer.keys.dtype == dtype for layer in cache.layers)
    assert all(layer.num_stored == 14 for layer in cache.layers if layer.evicts)


def test_only_full_layers_of_a_mixed_model_evict(ids):
    model = FAMILIES["gemma3-mixed"]()
    with evicting(model, POLICIES["snapkv+graphkv"], every=1), torch.inference_mode():
        cache = cache_of(model(ids[None]))

    assert [layer.num_stored for layer in cache.layers] == [11, 14, 11, 14]
    assert [layer.num_evictions for layer in cache.layers] == [0, 1, 0, 1]


def test_sliding_layers_drop_what_is_out_of_sight_first(ids):
    model = FAMILIES["mistral-sliding"]()
    with evicting(model, KeyDiff(budget=20)), torch.inference_mode():
        cache = cache_of(model(ids[None]))

    assert all(int(layer.positions.min()) > len(ids) - 24 for layer in cache.layers)
