"""Caches whose policies find their budgets themselves: they shrink by what was found, and say it."""

import numpy as np
import pytest
import torch

from graphkv import AdaKV, AnyQuery, ArgumentError, GraphKV, KNorm, Lossless, Shared, SnapKV, evict
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close, reference_logits
from tests.integrations.tiny import tiny_llama

N = 40
SNAPKV = SnapKV(budget=1.0, window=6, kernel_size=3)
POLICIES = {
    "lossless": Lossless(SNAPKV, 0.2),
    "of a graph": Lossless(GraphKV(SNAPKV), 0.2),
    "bounded": Lossless(SnapKV(budget=14, window=6, kernel_size=3), 0.02),
    "any query": AnyQuery(SNAPKV, 0.2, 0.5),
    "blocks": Shared(Lossless(SNAPKV, 0.2), block=4),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(1, 97, (3, N + 8), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids):
    with torch.inference_mode():
        return model(ids, **with_cache(model, cache)).logits


@each_policy
def test_every_layer_and_row_shrinks_to_what_the_core_finds_and_the_report_says_it(model, rows, policy):
    with observing(model):
        whole, cache = EvictingCache(num_queries=N), EvictingCache(policy)
        read(model, whole, rows[:, :N])
        read(model, cache, rows[:, :N])

    found = []
    for place, (layer, stats) in enumerate(zip(whole.layers, cache.stats(), strict=True)):
        expected = evict(policy, layer.keys, queries=layer.queries, layer=place, num_layers=3)
        counts = expected.counts.amax(dim=1).tolist()
        assert stats.budgets_found.tolist() == counts
        assert stats.num_kept.tolist() == expected.counts.tolist()
        assert stats.num_stored == stats.budget == max(counts)
        assert stats.nbytes == cache.layers[place].keys.nbytes * 2 < layer.nbytes
        found.append(counts)
    lines = cache.report().splitlines()
    table = lines[next(number for number, line in enumerate(lines) if "budget found" in line) + 1 :]
    # Layers that found the same are in one line.
    for line, counts in zip(table, found if len(table) == 3 else found[:1], strict=True):
        assert line.endswith("  " + (str(counts[0]) if len(set(counts)) == 1 else " ".join(map(str, counts))))
    assert "budget found" not in whole.report()
    if policy is not POLICIES["bounded"]:
        assert len({tuple(counts) for counts in found}) == 3


def test_rows_answer_as_they_would_alone(model, rows):
    policy = POLICIES["lossless"]
    calls = [N, 1, 1, 6]
    with observing(model):
        cache = EvictingCache(policy, every=2)
        both = torch.cat([read(model, cache, part) for part in rows[:2].split(calls, dim=1)], dim=1)

    for row in range(2):
        expected, kept = reference_logits(model, rows[row], policy, calls, every=2)
        assert_close(both[row], expected)
        for number, layer in enumerate(cache.layers):
            assert [[p for p in head if p >= 0] for head in layer.true_positions[row].tolist()] == kept[number]


def test_a_row_without_new_tokens_keeps_all_that_it_found(model, rows):
    """Looking for a budget in what is left would find a smaller one each time."""
    mask = torch.ones(2, N + 4, dtype=torch.long)
    mask[1, N:] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(Lossless(SNAPKV, 0.4), every=2)
        kept = []
        for start, end in ((0, N), (N, N + 2), (N + 2, N + 4)):
            options = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
            model(rows[:2, start:end], **options, **with_cache(model, cache))
            kept.append(
                [
                    [p for p, seen in zip(*pair, strict=True) if seen and p >= 0]
                    for layer in cache.layers
                    for pair in zip(layer.true_positions[1].tolist(), layer.valid[1].tolist(), strict=True)
                ]
            )

    assert cache.layers[0].num_evictions == 3
    assert kept[0] == kept[1] == kept[2]


def test_what_was_found_follows_rows_copies_and_files(model, rows, tmp_path):
    with observing(model):
        cache = EvictingCache(POLICIES["lossless"])
        read(model, cache, rows[:, :N])
        found = [each.budgets_found.tolist() for each in cache.stats()]
        cache.save(tmp_path / "cache.safetensors")
        made = EvictingCache.load(tmp_path / "cache.safetensors", model=model)
        assert [each.budgets_found.tolist() for each in made.stats()] == found
        twin = cache.copy()
        twin.reorder_cache(torch.tensor([2, 0, 1]))
        assert [each.budgets_found.tolist() for each in twin.stats()] == [[c, a, b] for a, b, c in found]
        assert [each.budgets_found.tolist() for each in cache.stats()] == found
        assert EvictingCache.stacked([cache, cache]).stats()[0].budgets_found is None
        cache.reset()
        assert cache.layers[0].budgets_found is None


def test_a_later_policy_cannot_have_more_than_was_found_but_may_find_less(model, rows):
    with observing(model):
        cache = EvictingCache(num_queries=6)
        read(model, cache, rows[:, :N])
        cache.evict(Lossless(SNAPKV, 0.3))
        found = [layer.num_stored for layer in cache.layers]
        with pytest.raises(ArgumentError, match=f"more tokens than the {found[0]} that an earlier eviction left"):
            cache.evict(KNorm(budget=N - 1))
        assert [layer.num_stored for layer in cache.layers] == found
        assert all(6 <= count < N for count in found)
        cache.evict(KNorm(budget=5))
        assert [each.budgets_found for each in cache.stats()] == [None] * 3


def test_the_range_stands_for_many_rows(model):
    rows = torch.randint(1, 97, (12, N), generator=torch.Generator().manual_seed(1))
    with observing(model):
        cache = EvictingCache(POLICIES["lossless"])
        read(model, cache, rows)
    least, most = (int(reduce(cache.stats()[0].budgets_found)) for reduce in (np.min, np.max))

    assert cache.report().splitlines()[-3].endswith(f"  {least} to {most}")


def test_heads_of_their_own_stay_refused():
    with pytest.raises(ArgumentError, match="base must choose by its scores alone"):
        AdaKV(POLICIES["lossless"])
