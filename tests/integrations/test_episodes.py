"""EpiCache's drivers: blocks under a bound, the episodes of a conversation, and the cache for a question."""

import numpy as np
import pytest
import torch

from graphkv import AdaKV, ArgumentError, EpiCache, KNorm, SnapKV
from graphkv.integrations.transformers import (
    EvictingCache,
    evicting,
    find_episodes,
    mean_hidden_state,
    observing,
    read_episodes,
    read_in_blocks,
)
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_llama

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))


def test_blocks_are_read_asked_and_evicted_in_turn(model, ids):
    """Against the same steps by hand, with the bound checked at every update."""
    policy, most = EpiCache(budget=12), []
    update = EvictingCache.update

    def watched(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        most.append(found[0].shape[2])
        return found

    EvictingCache.update = watched
    try:
        cache = read_in_blocks(model, ids, policy, [5, 6, 7], block=16)
    finally:
        EvictingCache.update = update

    by_hand, question = EvictingCache(), torch.tensor([[5, 6, 7]]).expand(2, -1)
    with observing(model), torch.inference_mode():
        for start in range(0, 50, 16):
            model(ids[:, start : start + 16], **with_cache(model, by_hand))
            by_hand.probe(model, question)
            by_hand.evict(policy)
    assert max(most) == 12 + 16 + 3
    assert cache.num_seen == 50
    for ours, theirs in zip(cache.layers, by_hand.layers, strict=True):
        assert ours.num_stored == 12
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.probes == ()


def test_a_text_that_fits_is_not_asked_about(model, ids):
    cache = read_in_blocks(model, ids, EpiCache(budget=50), [5], block=16)
    assert [layer.num_evictions for layer in cache.layers] == [0, 0]


def test_heads_may_share_a_budget_and_other_policies_read_in_blocks_too(model, ids):
    shared = read_in_blocks(model, ids, AdaKV(EpiCache(budget=12), floor=0.0), torch.tensor([5, 6]), block=16)
    windowed = read_in_blocks(model, ids, SnapKV(budget=12, window=4), block=16)
    with evicting(model, SnapKV(budget=12, window=4), every=16), torch.inference_mode():
        every = EvictingCache(SnapKV(budget=12, window=4), every=16)
        for start in range(0, 50, 16):
            model(ids[:, start : start + 16], **with_cache(model, every))
        every.evict()

    for layer in shared.layers:
        assert ((layer.positions >= 0).sum(dim=(1, 2)) == 24).all()
    for one, other in zip(windowed.layers, every.layers, strict=True):
        assert torch.equal(one.positions, other.positions)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("block must be at least 1; got 0", {"block": 0}),
        ("policy must have a budget in tokens, which does not grow; got 0.5", {"policy": EpiCache(budget=0.5)}),
        (r"prompt must hold at least one token for a policy that asks; got shape \(0,\)", {"prompt": []}),
        ("prompt must hold at least one token", {"prompt": None}),
        (r"ids must be a tensor .* got \(2, 0\)", {"ids": torch.zeros(2, 0, dtype=torch.int64)}),
    ],
)
def test_mistakes_get_their_errors(message, change, model, ids):
    given = {"ids": ids, "policy": EpiCache(budget=12), "prompt": [5]} | change
    with pytest.raises(ArgumentError, match=message):
        read_in_blocks(model, given.pop("ids"), given.pop("policy"), given.pop("prompt"), **given)


def test_episodes_are_found_and_numbered_by_their_first_window():
    directions = np.eye(3, 8)
    order = [2, 0, 2, 1, 1, 0, 2, 0]
    points = np.stack([directions[each] * RNG.uniform(1, 9) for each in order]) + RNG.normal(size=(8, 8)) * 0.01

    found = find_episodes(points, episodes=3, medoids=2, seed=0)

    assert found.labels.tolist() == [0, 1, 0, 2, 2, 1, 0, 1]
    assert [found.nearest(directions[each] + 0.05) for each in (2, 0, 1)] == [0, 1, 2]
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for label, medoids in enumerate(found.medoids):
        members = np.flatnonzero(found.labels == label)
        nearness = unit[members] @ unit[members].mean(axis=0)
        assert list(medoids) == sorted(members[np.argsort(-nearness)][:2].tolist())


def test_fewer_windows_than_clusters_and_equal_windows_are_no_error():
    assert find_episodes([[1.0, 2.0]], episodes=4).medoids == ((0,),)
    assert find_episodes([[1.0, 0.0]] * 5, episodes=4, medoids=3).medoids == ((0, 1, 2),)
    two = find_episodes([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], episodes=3)
    assert two.labels.tolist() == [0, 1, 0]
    for seed in (1, 1, 2):
        points = np.random.default_rng(seed).normal(size=(20, 4))
        one, other = (find_episodes(points, seed=seed) for _ in range(2))
        assert one.labels.tolist() == other.labels.tolist()
        assert set(one.labels.tolist()) == set(range(len(one.medoids)))


@pytest.mark.parametrize("points", [[], [[]], [1.0], [[np.nan, 1.0]]])
def test_what_is_no_embedding_is_refused(points):
    with pytest.raises(ArgumentError, match="embeddings must be finite, of shape"):
        find_episodes(points)


def test_a_conversation_is_read_once_for_every_episode(model):
    """Turns of two kinds: a question goes to the cache that was asked with turns of its kind."""
    random = np.random.default_rng(0)
    kinds = [0, 0, 1, 1, 0, 0, 1, 1]
    turns = [random.integers(3 + 40 * kind, 43 + 40 * kind, size=6).tolist() for kind in kinds]

    def embed(ids):
        return np.asarray([np.mean([3 <= token < 43 for token in ids]), np.mean([43 <= token < 83 for token in ids])])

    kept = read_episodes(
        model, turns, EpiCache(budget=9), [90, 91], episodes=2, medoids=1, window=2, block=16, embed=embed
    )

    assert kept.episodes.labels.tolist() == [0, 1, 0, 1]
    text = torch.tensor([np.concatenate(turns).tolist()])
    for episode, medoids in enumerate(kept.episodes.medoids):
        (window,) = medoids
        prompt = [90, 91, *turns[2 * window], *turns[2 * window + 1]]
        expected = read_in_blocks(model, text, EpiCache(budget=9), prompt, block=16)
        found = kept.of([3 + 40 * episode] * 3)
        assert found is not kept.caches[episode]
        for ours, theirs in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions)
    with observing(model), torch.inference_mode():
        model(torch.tensor([[4, 5]]), **with_cache(model, kept.of([4, 5])))
    assert [cache.num_seen for cache in kept.caches] == [48, 48]


def test_the_models_own_embedding_is_the_mean_of_its_last_hidden_states(model):
    with torch.inference_mode():
        states = model.model(torch.tensor([[4, 5, 6]])).last_hidden_state
    np.testing.assert_allclose(mean_hidden_state(model, [4, 5, 6]), states[0].mean(dim=0), rtol=1e-5)
    kept = read_episodes(model, [[4, 5], [6]], EpiCache(budget=2), [7], block=16)
    assert len(kept.caches) == 1
    for turns in ([], [[4], []]):
        with pytest.raises(ArgumentError, match="turns must be token ids, at least one turn and one token in each"):
            read_episodes(model, turns, EpiCache(budget=2), [7])


def test_a_policy_that_asks_nothing_needs_no_prompt(model, ids):
    cache = read_in_blocks(model, ids, KNorm(budget=7), block=20)
    assert [layer.num_stored for layer in cache.layers] == [7, 7]
