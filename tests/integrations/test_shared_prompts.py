"""What one reading of a prompt gives to many caches: rows put together, sums worked out once, keys from elsewhere."""

import pytest
import torch
import transformers

from graphkv import CAKE, H2O, AdaKV, ArgumentError, ArgumentTypeError, GraphKV, KNorm, Memory, RoCo, SnapKV
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.test_layers import hybrids_go_through_the_cache
from tests.integrations.tiny import SIZES, tiny, tiny_gemma3, tiny_llama

N = 40
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, N + 10), generator=torch.Generator().manual_seed(2))


def read(model, cache, ids):
    with observing(model), torch.inference_mode():
        return model(ids, **with_cache(model, cache)).logits


def evicted(full, *policies):
    caches = []
    for policy in policies:
        caches.append(full.copy())
        caches[-1].evict(policy)
    return caches


STACKS = {
    "different tokens": (SNAPKV, GraphKV(KNorm(budget=14)), H2O(budget=14)),
    "unused slots in some": (SNAPKV, AdaKV(SNAPKV), KNorm(budget=14)),
    "budgets of layers": (CAKE(budget=14, window=6, kernel_size=3),) * 2,
}


@pytest.mark.parametrize("name", STACKS)
def test_rows_of_a_stack_go_on_as_in_their_own_caches(name, model, ids):
    full = EvictingCache(num_queries=N)
    read(model, full, ids[:, :N])
    caches = evicted(full, *STACKS[name])
    widths = [[layer.num_stored for layer in cache.layers] for cache in caches]
    if name == "unused slots in some":
        # A head of Ada-KV may keep more: as wide as that, all of them.
        caches = [caches[1], caches[1].copy()]
        assert caches[0].layers[0].valid is not None
    else:
        assert widths == [widths[0]] * len(caches)
    stack = EvictingCache.stacked(caches)
    together = read(model, stack, ids[:, N:].expand(len(caches), -1))

    for row, cache in enumerate(caches):
        torch.testing.assert_close(together[row], read(model, cache, ids[:, N:])[0], rtol=1e-4, atol=1e-4)
        for ours, its in zip(stack.layers, cache.layers, strict=True):
            assert ours.positions[row].tolist() == its.positions[0].tolist()


def test_a_stack_has_rows_with_and_without_padding_and_evictions(model, ids):
    """And leaves the caches that it was made of as they are."""
    full, padded = EvictingCache(), EvictingCache()
    read(model, full, ids[:, :N])
    shown = torch.ones(2, N).long()
    shown[1, :7] = 0
    with observing(model), torch.inference_mode():
        model(ids[:, :N].expand(2, -1), attention_mask=shown, **with_cache(model, padded))
    small = EvictingCache(num_queries=N)
    read(model, small, ids[:, :N])
    small = small.with_stored([(layer.keys, layer.values) for layer in small.layers])
    stack = EvictingCache.stacked([full, padded, small])
    new = ids[:, N:]
    shown = torch.cat([torch.ones(1, N).long(), shown, torch.ones(1, N).long()])
    with observing(model), torch.inference_mode():
        mask = torch.cat([shown, torch.ones(4, 10).long()], dim=1)
        together = model(new.expand(4, -1), attention_mask=mask, **with_cache(model, stack)).logits
        alone = model(new.expand(2, -1), attention_mask=mask[1:3], **with_cache(model, padded.copy())).logits

    assert full.layers[0].valid is None
    assert full.num_seen == N
    torch.testing.assert_close(together[1:3], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[[0, 3]], read(model, full, new).expand(2, -1, -1), rtol=1e-4, atol=1e-4)


@hybrids_go_through_the_cache
def test_a_stack_takes_the_states_of_linear_attention_along(ids):
    kinds = ["conv", "full_attention", "conv"]
    model = tiny(transformers.Lfm2ForCausalLM, transformers.Lfm2Config, **SIZES, layer_types=kinds)
    caches = []
    for text in (ids[:, :N], ids.flip(1)[:, :N]):
        caches.append(EvictingCache(SnapKV(budget=14, window=6)))
        read(model, caches[-1], text)
    together = read(model, EvictingCache.stacked(caches), ids[:, N:].expand(2, -1))
    for row, cache in enumerate(caches):
        torch.testing.assert_close(together[row], read(model, cache, ids[:, N:])[0], rtol=1e-4, atol=1e-4)


def test_caches_that_do_not_go_together_are_refused(model, ids):
    one, shorter, smaller = (EvictingCache(num_queries=N) for _ in range(3))
    for cache, length in ((one, N), (shorter, N - 1), (smaller, N)):
        read(model, cache, ids[:, :length])
    smaller.evict(KNorm(budget=9))
    again = EvictingCache(KNorm(budget=50), every=4)
    read(model, again, ids[:, :N])
    with pytest.raises(ArgumentError, match="caches must hold at least one cache; got none"):
        EvictingCache.stacked([])
    with pytest.raises(ArgumentTypeError, match=r"caches\[1\] must be a EvictingCache; got dict"):
        EvictingCache.stacked([one, {}])
    for other in (shorter, smaller):
        with pytest.raises(ArgumentError, match=r"caches must have seen and store equally many .* \(40, \(40, 40\)\)"):
            EvictingCache.stacked([one, other])
    with pytest.raises(ArgumentError, match=r"must not evict again by themselves.*caches\[1\] does"):
        EvictingCache.stacked([one, again])


def test_only_so_many_queries_are_kept_and_later_ones_come_after_them(model, ids):
    whole, cache = EvictingCache(num_queries=N), EvictingCache(num_queries=N)
    for each in (whole, cache):
        read(model, each, ids[:, :N])
    copied = cache.copy()
    cache.keep_queries(6)
    for layer, its in zip(cache.layers, whole.layers, strict=True):
        assert torch.equal(layer.queries, its.queries[:, :, -6:])
        assert layer.queries.untyped_storage().nbytes() == layer.queries.nbytes
    read(model, cache, ids[:, N : N + 3])
    assert [layer.queries.shape[2] for layer in cache.layers] == [9, 9]
    cache.keep_queries(0)
    assert [layer.queries for layer in cache.layers] == [None, None]
    assert copied.layers[0].queries.shape[2] == N
    with pytest.raises(ArgumentError, match="count must be at least 0; got -1"):
        cache.keep_queries(-1)


@pytest.mark.parametrize(
    "policy", [H2O(budget=12), RoCo(budget=14, num_sinks=1, num_recent=3), GraphKV(H2O(budget=12))]
)
def test_sums_worked_out_once_keep_what_queries_keep(policy, model, ids):
    """In two parts, for another budget, and without the queries."""
    full = EvictingCache(num_queries=N)
    read(model, full, ids[:, :30])
    before = full.running_states(policy)
    read(model, full, ids[:, 30:N])
    full.keep_queries(10)
    states = full.running_states(policy, before)
    full.keep_queries(0)
    cache = full.with_states(states)
    assert all(not layer.state for layer in full.layers)
    with pytest.raises(ArgumentError, match="queries must"):
        full.copy().evict(policy)
    cache.evict(policy)

    direct = EvictingCache(policy)
    read(model, direct, ids[:, :N])
    for ours, its in zip(cache.layers, direct.layers, strict=True):
        assert ours.positions.tolist() == its.positions.tolist()
        for name, sums in its.state.items():
            torch.testing.assert_close(ours.state[name], sums)


def test_sums_are_those_of_every_backend(model, ids):
    full = EvictingCache(num_queries=N, backend="numpy")
    read(model, full, ids[:, :N])
    twin = EvictingCache(num_queries=N)
    read(model, twin, ids[:, :N])
    for ours, its in zip(full.running_states(H2O(budget=3)), twin.running_states(H2O(budget=9)), strict=True):
        torch.testing.assert_close(ours.tokens["attention"], its.tokens["attention"], rtol=1e-4, atol=1e-4)
    assert [state.names for state in full.running_states(KNorm(budget=3))] == [(), ()]


def test_tokens_in_given_sums_are_not_taken_back(model, ids):
    full = EvictingCache(num_queries=N)
    read(model, full, ids[:, :N])
    cache = full.with_states(full.running_states(H2O(budget=12)))
    read(model, cache, ids[:, N : N + 3])
    with pytest.raises(ArgumentError, match="crop must remove at most the 3 tokens"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.num_seen == N


def test_sliding_layers_of_a_mixed_model_have_no_sums(ids):
    model, cache = tiny_gemma3(), EvictingCache(num_queries=N)
    read(model, cache, ids[:, :30])
    states = cache.running_states(H2O(budget=1))
    read(model, cache, ids[:, 30:N])
    states = cache.running_states(H2O(budget=1), states)
    cache = cache.with_states(states)
    cache.evict(H2O(budget=20))

    assert [bool(state.names) for state in states] == [layer.evicts for layer in cache.layers] == [False, True] * 2
    assert [layer.num_stored for layer in cache.layers if layer.evicts] == [20, 20]


def test_sums_that_do_not_fit_are_refused(model, ids):
    cache = EvictingCache(num_queries=N)
    read(model, cache, ids[:, :N])
    states = cache.running_states(H2O(budget=1))
    with pytest.raises(ArgumentError, match="states must have one entry for each of 2 layers; got 1"):
        cache.with_states(states[:1])
    with pytest.raises(ArgumentError, match="states must have one entry for each of 2 layers; got 3"):
        cache.running_states(H2O(budget=1), [*states, states[0]])
    for change in (lambda x: x[:, :1], lambda x: torch.cat([x, x], dim=2), lambda x: x[0]):
        wrong = [Memory({name: change(sums) for name, sums in state.tokens.items()}) for state in states]
        with pytest.raises(
            ArgumentError, match=r"states must have shape \(batch, kv_heads, S, .* \(1, 2\) and S <= 40"
        ):
            cache.with_states(wrong)
    with pytest.raises(ArgumentTypeError, match="policy must be a Policy; got int"):
        cache.running_states(3)


def test_keys_from_elsewhere_are_read_at_the_places_where_they_are(model, ids):
    full = EvictingCache(num_queries=N)
    read(model, full, ids[:, :N])
    pairs = [(layer.keys[:, :, ::2], layer.values[:, :, ::2]) for layer in full.layers]
    cache = full.with_stored(pairs)
    kept = torch.arange(0, N, 2).expand(1, 2, -1)
    direct = full.copy()
    for layer in direct.layers:
        layer.slots = layer.slots.take(kept)
        layer.slots = type(layer.slots)(keys=layer.slots.keys, values=layer.slots.values, positions=kept)
        layer.held = None

    assert [layer.true_positions[0, 0].tolist() for layer in cache.layers] == [list(range(20))] * 2
    assert [layer.queries for layer in cache.layers] == [None] * 2
    assert cache.num_seen == N
    assert torch.equal(read(model, cache, ids[:, N:]), read(model, direct, ids[:, N:]))
    assert full.layers[0].num_stored == N
    with pytest.raises(ArgumentError, match="keys_and_values must have one entry for each of 2 layers; got 1"):
        full.with_stored(pairs[:1])
    for keys, values in (
        (pairs[0][0], pairs[0][1][:, :, 1:]),
        (pairs[0][0][:, :1], pairs[0][1][:, :1]),
        tuple(torch.cat([each] * 3, dim=2) for each in pairs[0]),
    ):
        with pytest.raises(
            ArgumentError, match=r"keys_and_values must have shape .* \(1, 2\) and b <= 40; got .* layer 0"
        ):
            full.with_stored([(keys, values)] * 2)
