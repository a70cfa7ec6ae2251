"""Layers of a model's cache that share what they keep."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from graphkv import H2O, ArgumentError, ChunkKV, Given, GraphKV, LayerShares, PyramidKV, Shared, SnapKV, evict_layers
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close, reference_logits
from tests.integrations.releases import cache_of
from tests.integrations.tiny import tiny_gemma3, tiny_llama

N = 40
CALLS = [N, *[1] * 8, 4]
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = {
    "layers": Shared(SNAPKV, over="layers"),
    "blocks of all layers": Shared(SNAPKV, over="layers", block=4),
    "graph on top": GraphKV(Shared(SNAPKV, over="layers")),
    "running sums": Shared(H2O(budget=12), over="layers"),
    "chunks": ChunkKV(SNAPKV, chunk=5, reuse=2),
    "chunks of all": ChunkKV(Shared(SNAPKV), chunk=5, reuse=9),
}
NESTED = LayerShares.pyramid_infer(Shared(SNAPKV, nested=True), 3, least=0.5)
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (N + 20,), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids, calls):
    with torch.inference_mode():
        return torch.cat([model(part[None], **with_cache(model, cache)).logits[0] for part in ids.split(calls)])


def positions(layer):
    return [[p for p in row if p >= 0] for row in layer.true_positions[0].tolist()]


@pytest.mark.parametrize("policy", [*POLICIES.values(), NESTED], ids=[*POLICIES, "nested"])
def test_a_prompt_keeps_what_the_core_keeps_of_the_same_layers(model, ids, policy):
    with observing(model):
        whole, cache = EvictingCache(num_queries=N), EvictingCache(policy)
        read(model, whole, ids[:N], [N])
        logits = read(model, cache, ids[: N + 12], CALLS)
    layers = [{"keys": each.keys, "queries": each.queries} for each in whole.layers]

    expected = evict_layers(policy, layers)

    for layer, each in zip(cache.layers, expected, strict=True):
        kept = [[p for p in row if p >= 0] for row in each.kept[0].tolist()]
        assert [[p for p in row if p < N] for row in positions(layer)] == kept
    # By hand from there on: what the first eviction has left, and everything after it.
    whole.evict(policy)
    assert [positions(layer) for layer in whole.layers] == [
        [[p for p in row if p >= 0] for row in each.kept[0].tolist()] for each in expected
    ]
    if policy.voters(0, 3) == policy.voters(2, 3):
        marks = np.zeros((1, 2, N))
        for head, row in enumerate(expected[0].kept[0].tolist()):
            marks[0, head, [p for p in row if p >= 0]] = 1
        given = Given(budget=int(marks[0, 0].sum()), importance=marks)
        assert_close(logits, reference_logits(model, ids[: N + 12], given, CALLS)[0])


@each_policy
def test_layers_that_share_hold_the_same_tokens_at_every_step(model, ids, policy):
    groups = [policy.voters(layer, 3) for layer in range(3)]
    with observing(model):
        cache = EvictingCache(policy, every=4, record=True)
        for part in ids.split([N, 1, 1, 1, 1, 3, 2, 7, 1, 3]):
            read(model, cache, part, [len(part)])
            for layer, group in zip(cache.layers, groups, strict=True):
                assert positions(layer) == positions(cache.layers[groups.index(group)])

    assert [layer.num_evictions for layer in cache.layers] == [5] * 3
    assert all(layer.seconds > 0 for layer in cache.layers)
    assert "5 x" in cache.report()


def test_all_layers_are_read_before_one_is_evicted(model, ids):
    stored = []
    update = EvictingCache.update

    class Watched(EvictingCache):
        def update(self, *args, **kwargs):
            result = update(self, *args, **kwargs)
            stored.append([layer.num_stored for layer in self.layers])
            return result

    with observing(model):
        read(model, Watched(POLICIES["layers"]), ids[: N + 1], [N, 1])

    assert stored[2] == [N] * 3
    assert stored[3] == [15, 14, 14]


def test_generation_and_models_whose_sliding_layers_are_left_alone(ids):
    gemma = tiny_gemma3(
        num_hidden_layers=5, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    )
    for policy in (POLICIES["layers"], POLICIES["chunks"]):
        with evicting(gemma, policy, every=4), torch.inference_mode():
            cache = cache_of(gemma(ids[None, :N]))
        evicted = [layer for layer in cache.layers if layer.evicts]

        assert len(evicted) == 3
        assert {layer.num_stored for layer in evicted} == {14}
        assert all(positions(layer) == positions(evicted[0]) for layer in evicted[:2])


def test_a_window_that_may_lose_a_block_is_not_taken_for_kept():
    """Its queries would be those of tokens that are gone."""
    policy = Shared(SNAPKV, block=6)
    assert policy.protection(14).count <= 14 < policy.protection(14).room
    with pytest.raises(
        ArgumentError, match=f"every must be at least 6, or the budget at least {policy.protection(14).room}"
    ):
        EvictingCache(policy, every=4)


def test_layers_with_budgets_of_their_own_cannot_share_and_the_cache_stays_as_it_was(model, ids):
    with observing(model):
        cache = EvictingCache(num_queries=6)
        read(model, cache, ids[:N], [N])
        with pytest.raises(ArgumentError, match="layers must have one budget where they share"):
            cache.evict(Shared(PyramidKV(budget=14, window=6, beta=4), over="layers"))
        assert [layer.num_stored for layer in cache.layers] == [N] * 3
        cache.evict(Shared(SNAPKV, over="layers"))
        assert [layer.num_stored for layer in cache.layers] == [14] * 3


def test_nested_layers_evict_a_prompt_once(model, ids):
    with observing(model):
        cache = EvictingCache(NESTED)
        read(model, cache, ids[: N + 3], [N, 3])
    sets = [[{p for p in row if p < N} for row in positions(layer)] for layer in cache.layers]
    assert all(upper[0] < lower[0] and upper[0] == upper[1] for lower, upper in pairwise(sets))
    assert sum(len(each[0]) for each in sets) == 3 * 14

    with pytest.raises(ArgumentError, match=r"every must be None for layers that are nested.*; got 4"):
        EvictingCache(NESTED, every=4)
    with observing(model):
        plain = EvictingCache(num_queries=6)
        read(model, plain, ids[:N], [N])
    plain.evict(NESTED)
    with pytest.raises(ArgumentError, match=r"layers must have one \(batch, kv_heads, N\) where they share"):
        plain.evict(NESTED)
    assert [layer.num_evictions for layer in plain.layers] == [1] * 3
