"""Merged slots in a cache: attention counts them as often as the tokens in them, wherever they go."""

import re

import pytest
import torch
from transformers import AttentionInterface

from graphkv import (
    CAKE,
    D2O,
    H2O,
    Absorb,
    AdaKV,
    ArgumentError,
    GraphKV,
    KNorm,
    KVMerger,
    PyramidKV,
    SnapKV,
    WeightedKV,
)
from graphkv.integrations.transformers import EvictingCache, absorbers, evicting, masses, observing
from graphkv.integrations.transformers.slots import Slots
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.folding import Folded
from tests.integrations.reference import SlowReference, assert_close, attending
from tests.integrations.tiny import FAMILIES, tiny_llama

N = 40
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = {
    "snapkv": Folded(SNAPKV),
    "keys that stay": Folded(SNAPKV, keys=False),
    "over graphkv": Folded(GraphKV(SNAPKV)),
    "under graphkv": GraphKV(Folded(SNAPKV)),
    "sums": Folded(H2O(budget=12)),
    "heads": Folded(AdaKV(SNAPKV)),
    "layers": Folded(PyramidKV(budget=14, window=6, kernel_size=3, beta=4)),
    "rows": Folded(CAKE(budget=14, window=6, kernel_size=3)),
    "a share": Folded(KNorm(budget=0.5)),
    # Loose, so that random keys are near enough.
    "absorb": Absorb(SNAPKV, threshold=0.2),
    # With a threshold that moves, in the memory of the layer.
    "d2o": D2O(SNAPKV, window=6),
    "kvmerger": KVMerger(SNAPKV, threshold=0.3),
    "weightedkv": WeightedKV(SNAPKV),
    "absorb by count": GraphKV(Absorb(H2O(budget=12), threshold=0.2, weights="count")),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
each_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (3, N + 20), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids, calls, mask=None):
    """Feed rows of tokens in calls of the given lengths, from where the cache stands; give the logits of all."""
    seen, logits = cache.get_seq_length(), []
    for length in calls:
        seen, begin = seen + length, seen
        shown = {}
        if mask is not None:
            # A row stands where it would stand alone.
            places = (mask[:, :seen].cumsum(1) - 1).clamp(min=0)
            shown = {"attention_mask": mask[:, :seen], "position_ids": places[:, begin:]}
        with torch.inference_mode():
            logits.append(model(ids[:, begin:seen], **shown, **with_cache(model, cache)).logits)
    return torch.cat(logits, dim=1)


@torch.inference_mode()
def expected(model, ids, policy, calls, *, every):
    """Logits of one row, and the slow reference that gave them."""
    slow = SlowReference(policy, calls, every=every)
    with attending(model, slow):
        if policy.needs().wants:
            model(ids, use_cache=False)
            slow.settle_budgets()
        return model(ids, use_cache=False).logits, slow


def masses_of(layer):
    """Per head of the first row, the mass by position."""
    rows = zip(layer.true_positions[0].tolist(), layer.mass[0].tolist(), strict=True)
    return [{at: mass for at, mass in zip(*row, strict=True) if at >= 0} for row in rows]


def assert_as_expected(cache, slow):
    for number, layer in enumerate(cache.attention_layers):
        assert [[p for p in row if p >= 0] for row in layer.true_positions[0].tolist()] == slow.kept[layer.index]
        if not layer.evicts:
            assert layer.mass is None
            continue
        for found, heads in zip(masses_of(layer), slow.masses[layer.index], strict=True):
            assert found == pytest.approx({at: heads.get(at, 1.0) for at in found}, rel=1e-5), number


@each_policy
@each_implementation
def test_merging_again_and_again_equals_the_slow_reference(model, ids, policy, implementation):
    """A prompt, then calls of several lengths, with an eviction whenever 4 tokens have come."""
    model.set_attn_implementation(implementation)
    calls = [N, 1, 1, 1, 1, 3, 2, 7, 1, 3]
    with observing(model):
        cache = EvictingCache(policy, every=4)
        logits = read(model, cache, ids[:1], calls)
    wanted, slow = expected(model, ids[:1], policy, calls, every=4)

    assert_close(logits, wanted)
    assert_as_expected(cache, slow)
    # Merged slots were merged again, where tokens are counted at all.
    most = max(mass for layer in cache.layers for head in masses_of(layer) for mass in head.values())
    assert (most == 1) if isinstance(policy, WeightedKV) else (most > 3)


def test_a_merge_is_worth_its_mass(model, ids):
    """The reference would notice a mass that is left out, or put off by one eviction."""
    calls = [N, 4, 4]
    wanted, _ = expected(model, ids[:1, :48], POLICIES["snapkv"], calls, every=4)
    dropped, _ = expected(model, ids[:1, :48], SNAPKV, calls, every=4)
    with observing(model):
        cache = EvictingCache(POLICIES["snapkv"], every=4)
        read(model, cache, ids[:1], [N])
        for layer in cache.layers:
            layer.slots = layer.slots.having(mass=None)
        without = read(model, cache, ids[:1], [4])
    assert (without - wanted[:, N : N + 4]).abs().max() > 1e-2
    assert (dropped - wanted)[:, N:].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["snapkv", "under graphkv", "sums", "heads"])
def test_a_prompt_in_chunks_equals_the_slow_reference(model, ids, name):
    policy = POLICIES[name]
    with observing(model):
        cache = EvictingCache(policy, every=12)
        logits = read(model, cache, ids[:1], [12] * 5)
    wanted, slow = expected(model, ids[:1], policy, [12] * 5, every=12)

    assert_close(logits, wanted)
    assert_as_expected(cache, slow)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_counts_merged_slots(family, ids):
    """Windows of one layer or of all, other scales of the logits, positions that are learned."""
    model, policy, calls = FAMILIES[family](), Folded(SnapKV(budget=12, window=4, kernel_size=3)), [30, 1, 5, 6, 3]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with observing(model):
            cache = EvictingCache(policy, every=6)
            logits = read(model, cache, ids[:1, :45], calls)
        wanted, slow = expected(model, ids[:1, :45], policy, calls, every=6)
        assert_close(logits, wanted)
        if family != "gemma3-mixed":
            assert_as_expected(cache, slow)


def test_a_slot_of_mass_three_is_three_equal_slots(model, ids):
    """Attention alone, without any eviction: the same keys and values, once with masses and once repeated."""
    times = torch.tensor([1, 3, 1, 2, 1, 1, 4, 1, 1, 1])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with observing(model):
            full = EvictingCache()
            read(model, full, ids[:2], [30])
            pairs = [(layer.keys[:, :, 5:15], layer.values[:, :, 5:15]) for layer in full.layers]
            few = full.with_stored(pairs)
            for layer in few.layers:
                layer.slots = layer.slots.having(mass=times.float().expand(2, 2, -1).clone())
            many = full.with_stored([tuple(x.repeat_interleave(times, dim=2) for x in pair) for pair in pairs])
            for calls in ([1, 1], [4, 1, 3]):
                assert_close(read(model, few.copy(), ids[:2], calls), read(model, many.copy(), ids[:2], calls))


@each_policy
def test_padded_rows_merge_like_rows_alone(model, ids, policy):
    """Left, right and between tokens."""
    if policy.budget == 0.5:
        pytest.skip("a share of the tokens is another in a row with padding")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, N : N + 4] = 0
    with evicting(model, policy, every=3):
        left = mask[:2, :N]
        batch = greedy(model, ids[:2, :N] * left, attention_mask=left)
        for row in range(2):
            alone = greedy(model, ids[row : row + 1, :N][:, left[row] > 0])
            assert batch[row, N:].tolist() == alone[0, int(left[row].sum()) :].tolist()
    with observing(model):
        cache, calls = EvictingCache(policy, every=3), [N, 4, 3, 5]
        logits = read(model, cache, ids * mask, calls, mask)
        for row in range(3):
            alone, shown = EvictingCache(policy, every=3), mask[row] > 0
            own = [int(part.sum()) for part in mask[row, : sum(calls)].split(calls)]
            wanted = read(model, alone, ids[row][shown][None], [each for each in own if each])
            assert_close(logits[row][shown[: sum(calls)]], wanted[0])
            for ours, its in zip(cache.layers, alone.layers, strict=True):
                theirs = its.mass[0][its.true_positions[0] >= 0]
                torch.testing.assert_close(ours.mass[row][ours.valid[row]], theirs, rtol=1e-4, atol=1e-4)
                assert ours.absorbed[row][ours.valid[row]].tolist() == its.absorbed[0][its.mass[0] > 0].tolist() or (
                    its.valid is not None
                )


def greedy(model, ids, num_new=8, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **options)


@pytest.mark.parametrize("name", ["snapkv", "sums", "heads", "rows"])
def test_rows_take_their_masses_along(model, ids, name):
    """Beams, copies, and rows that are repeated and selected."""
    policy = POLICIES[name]
    with evicting(model, policy, every=3):
        batch = greedy(model, ids[:2, :N], num_beams=3)
        assert batch[1].tolist() == greedy(model, ids[1:2, :N], num_beams=3)[0].tolist()
    with observing(model):
        cache = EvictingCache(policy, every=2)
        read(model, cache, ids, [N])
        twin = cache.copy()
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([5, 2]))
        assert torch.equal(twin.layers[1].mass, cache.layers[1].mass[[2, 1]])
        assert_close(read(model, twin, ids[[2, 1]], [1] * 5), read(model, cache, ids, [1] * 5)[[2, 1]])


def beams_by_reference(model, ids, policy, num_new, *, num_beams, every):
    """Search without any cache: every call sees the whole text of its beam, with masses of its own."""
    beams = [(0.0, ids)]
    for step in range(num_new):
        found = []
        for score, text in beams:
            logits, _ = expected(model, text[None], policy, [N] + [1] * step, every=every)
            best = logits[0, -1].log_softmax(-1).topk(num_beams)
            found += [(score + gain.item(), torch.cat([text, token[None]])) for gain, token in zip(*best, strict=True)]
        beams = sorted(found, key=lambda beam: -beam[0])[:num_beams]
    return beams


def test_beams_with_masses_equal_a_search_over_the_slow_reference(model, ids, monkeypatch):
    policy, num_new = Absorb(SNAPKV, threshold=0.2), 9
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "return_dict_in_generate": True}

    def search():
        with evicting(model, policy, every=2):
            done = greedy(model, ids[:1, :N], num_new, output_scores=True, **options)
        return done.sequences_scores.tolist(), done.sequences.tolist()

    scores, texts = search()
    wanted = beams_by_reference(model, ids[0, :N], policy, num_new, num_beams=3, every=2)

    assert texts == [text.tolist() for _, text in wanted]
    assert scores == pytest.approx([score for score, _ in wanted], abs=1e-4)

    # Beams swap rows whose masses differ.
    def without_masses(slots, change):
        return slots._each(lambda x, _: change(x)).having(mass=slots.mass)

    monkeypatch.setattr(Slots, "rows", without_masses)
    assert search()[0] != pytest.approx([score for score, _ in wanted], abs=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "sums", "heads"])
def test_a_file_brings_masses_back(model, ids, name, tmp_path):
    path, policy = tmp_path / "cache", POLICIES[name]
    with observing(model):
        cache = EvictingCache(policy, every=4)
        read(model, cache, ids, [N, 2, 3])
        cache.save(path)
        made = EvictingCache.load(path, model=model, policy=policy)
        assert torch.equal(read(model, made, ids, [4, 4]), read(model, cache, ids, [4, 4]))
        for ours, its in zip(made.layers, cache.layers, strict=True):
            assert torch.equal(ours.mass, its.mass)
            assert torch.equal(ours.absorbed, its.absorbed)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_file_of_impossible_masses_is_refused(model, ids, wrong, tmp_path):
    with observing(model):
        cache = EvictingCache(POLICIES["snapkv"])
        read(model, cache, ids[:1], [N])
    for layer in cache.layers:
        layer.mass = layer.mass.clone()
        layer.mass[0, 1, 3] = wrong
    cache.save(tmp_path / "cache")
    with pytest.raises(ArgumentError, match=r"its layers\.0\.mass must be finite and above 0; it is not"):
        EvictingCache.load(tmp_path / "cache", policy=POLICIES["snapkv"])


def test_stacked_rows_go_on_as_in_their_own_caches(model, ids):
    """Merged by one policy, by another, and not at all."""
    full = EvictingCache(num_queries=N)
    with observing(model):
        read(model, full, ids[:1], [N])
        caches = []
        for policy in (POLICIES["snapkv"], SNAPKV, POLICIES["heads"].base.base, POLICIES["under graphkv"]):
            caches.append(full.copy())
            caches[-1].evict(policy)
        stacked = EvictingCache.stacked(caches)
        together = read(model, stacked, ids[:1].expand(4, -1), [3, 1])
        for row, cache in enumerate(caches):
            assert_close(together[row], read(model, cache, ids[:1], [3, 1])[0])
    assert (stacked.layers[0].mass[1] == 1).all()
    assert stacked.layers[0].absorbed[0].any()


def test_turns_and_guesses(model, ids):
    """A second question with the whole history, and guesses that are taken back."""
    policy, assistant = POLICIES["snapkv"], tiny_llama(seed=1)
    with evicting(model, policy, every=5):
        cache = EvictingCache(policy, every=5)
        first = greedy(model, ids[:1, :N], **with_cache(model, cache))
        history = torch.cat([first, ids[:1, N : N + 5]], dim=1)
        second = greedy(model, history, 5, **with_cache(model, cache))
    wanted, slow = expected(model, second[:, :-1], policy, [N, *[1] * 7, 6, *[1] * 4], every=5)
    assert second[0, -5:].tolist() == wanted[0, -5:].argmax(-1).tolist()
    assert_as_expected(cache, slow)
    with evicting(model, policy):
        plain = greedy(model, ids[:1, :N], 12)
        assert greedy(model, ids[:1, :N], 12, assistant_model=assistant).tolist() == plain.tolist()


def test_crop_takes_back_what_came_since_the_merge_and_nothing_else(model, ids):
    with observing(model):
        cache, straight = EvictingCache(POLICIES["snapkv"]), EvictingCache(POLICIES["snapkv"])
        read(model, cache, ids[:1], [N, 5])
        with pytest.raises(ArgumentError, match="at most the 5 tokens since the last eviction; got 6"):
            cache.crop(-6)
        cache.crop(-3)
        read(model, straight, ids[:1], [N, 2])
        assert torch.equal(cache.layers[0].mass, straight.layers[0].mass)
        assert_close(read(model, cache, ids[:1], [6]), read(model, straight, ids[:1], [6]))


def test_a_later_policy_without_merges_keeps_the_masses(model, ids):
    """They say what is in the slots, whoever evicts."""
    with observing(model):
        cache = EvictingCache(num_queries=N)
        read(model, cache, ids[:1], [N])
        cache.evict(POLICIES["snapkv"])
        before = masses_of(cache.layers[0])
        cache.evict(KNorm(budget=7))
    for found, known in zip(masses_of(cache.layers[0]), before, strict=True):
        assert found == {at: known[at] for at in found}
        assert len(found) == 7


def test_another_library_merges_alike(model, ids):
    found = []
    for backend in ("torch", "numpy"):
        with observing(model):
            cache = EvictingCache(POLICIES["heads"], every=4, backend=backend)
            logits = read(model, cache, ids, [N, 4, 1])
        found.append((logits, cache))
    assert_close(found[0][0], found[1][0])
    for ours, its in zip(*(cache.layers for _, cache in found), strict=True):
        assert ours.positions.tolist() == its.positions.tolist()
        assert ours.absorbed.tolist() == its.absorbed.tolist()
        torch.testing.assert_close(ours.mass, its.mass)


def test_half_precision_keeps_masses_whole(ids):
    """Keys and values stay in the model's precision, masses in float32."""
    model = tiny_llama().to(torch.bfloat16)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with observing(model):
            cache = EvictingCache(POLICIES["snapkv"], every=4)
            logits = read(model, cache, ids, [N, 4, 1, 6])
        assert logits.isfinite().all()
        assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
        assert {layer.mass.dtype for layer in cache.layers} == {torch.float32}


def test_a_mask_of_the_callers_own_hides_and_the_masses_count(model, ids):
    """Of four axes, bool or in numbers, over all tokens seen."""
    model.set_attn_implementation("sdpa")
    hidden = torch.ones(1, N + 3)
    hidden[0, 10:20] = 0
    shown = torch.ones(N + 3, N + 3, dtype=torch.bool).tril()[None, None, N:] & (hidden[:, None, None] > 0)
    numbers = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(POLICIES["snapkv"])
        model(ids[:1, :N], **with_cache(model, cache))
        found = [
            model(ids[:1, N : N + 3], attention_mask=mask, position_ids=torch.arange(N, N + 3)[None],
                  **with_cache(model, cache.copy())).logits
            for mask in (hidden, shown, numbers, None)
        ]  # fmt: skip
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert (found[3] - found[0]).abs().max() > 1e-2


# Turned keys.


def rotated(keys, model, by):
    """Turn keys (..., D) by a number of positions, as Llama does."""
    size = keys.shape[-1]
    angle = by * model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def test_a_merged_key_turns_as_the_token_that_it_stands_for(model, ids):
    """By the angle between the kept token's position and its new one, whatever else is in it."""
    plain, turned = EvictingCache(POLICIES["snapkv"]), EvictingCache(POLICIES["snapkv"], rerotate=True)
    with observing(model):
        for cache in (plain, turned):
            read(model, cache, ids[:1], [N])
    for ours, its in zip(turned.layers, plain.layers, strict=True):
        assert ours.positions.tolist() == its.positions.tolist()
        assert torch.equal(ours.mass, its.mass)
        for head in range(2):
            for slot, position in enumerate(its.positions[0, head].tolist()):
                wanted = rotated(its.keys[0, head, slot], model, N - 14 + slot - position)
                torch.testing.assert_close(ours.keys[0, head, slot], wanted, rtol=1e-4, atol=1e-5)


def test_policies_that_compare_unrotated_keys_see_merged_ones_turned_back(model, ids):
    """By the kept token's position: so it makes no difference to them where the keys stand."""
    kept = []
    for averages in (False, True):
        for rerotate in (False, True):
            policy = GraphKV(Folded(KNorm(budget=14), keys=averages), unrotated=True)
            with observing(model):
                cache = EvictingCache(policy, rerotate=rerotate, record=True, every=4)
                read(model, cache, ids[:1], [N, 4])
            graph = cache.layers[0].record.decisions[0].graph
            kept.append((graph.sources.tolist(), graph.neighbors.tolist(), graph.weights))
    for one, other in (kept[:2], kept[2:]):
        assert one[:2] == other[:2]
        torch.testing.assert_close(one[2], other[2], rtol=1e-3, atol=1e-4)


# What is not merged pays nothing, and what cannot count is refused.


def masks_seen(monkeypatch, model, cache, ids, calls):
    """The masks that attention gets, call by call."""
    seen, plain = [], AttentionInterface()["sdpa"]

    def spy(module, query, key, value, attention_mask, *args, **kwargs):
        seen.append(attention_mask)
        return plain(module, query, key, value, attention_mask, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
    with observing(model):
        read(model, cache, ids, calls)
    monkeypatch.undo()
    return seen


def test_without_merges_attention_gets_the_masks_that_it_got(model, ids, monkeypatch):
    """None for single tokens, and bool for several."""
    model.set_attn_implementation("sdpa")
    cache = EvictingCache(SNAPKV, every=4)
    seen = masks_seen(monkeypatch, model, cache, ids[:1], [N, 1, 1, 2])
    assert [None if each is None else each.dtype for each in seen] == [None] * 9 + [torch.bool] * 3
    assert all(layer.mass is None and layer.absorbed is None for layer in cache.layers)
    seen = masks_seen(monkeypatch, model, EvictingCache(POLICIES["snapkv"], every=4), ids[:1], [N, 1, 1, 2])
    assert [None if each is None else each.dtype for each in seen] == [None] * 3 + [torch.float32] * 9
    assert seen[-1].shape == (1, 6, 2, 14 + 4)
    # A policy that may merge and has not.
    seen = masks_seen(monkeypatch, model, EvictingCache(Folded(SnapKV(budget=90))), ids[:1], [N, 1])
    assert seen == [None] * 6


def test_a_cache_with_masses_outside_of_our_attention_is_refused(model, ids):
    """Any other attention would count each slot once."""
    with observing(model):
        cache = EvictingCache(POLICIES["snapkv"])
        read(model, cache, ids[:1], [N])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ArgumentError, match="slots count as several tokens, which only graphkv's attention knows"):
        read(model, cache, ids[:1], [1])


def test_attention_that_cannot_add_a_bias_is_refused_at_the_door(ids):
    model = tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with (
        pytest.raises(ArgumentError, match="'sdpa' or 'eager'; LlamaForCausalLM has 'flash_attention_2'"),
        evicting(model, POLICIES["snapkv"]),
    ):
        pass


# What is said of it.


@pytest.mark.parametrize("name", ["snapkv", "heads", "rows"])
def test_what_was_absorbed_is_told_with_where_it_is(model, ids, name):
    mask = torch.ones_like(ids[:2, :N])
    mask[1, :5] = 0
    with observing(model):
        cache = EvictingCache(POLICIES[name], every=2, record=True)
        read(model, cache, ids[:2, :N] * mask, [N - 5, 5], mask)
    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        found, where = masses(layer), absorbers(layer)
        for row in range(2):
            for head in range(2):
                positions = layer.true_positions[row, head].tolist()
                held = [slot for slot, at in enumerate(positions) if at >= mask[row].tolist().index(1)]
                counted = {positions[slot]: float(layer.mass[row, head, slot]) for slot in held}
                absorbed = {positions[slot]: int(layer.absorbed[row, head, slot]) for slot in held}
                assert {at: float(found[row, head, at]) for at in found[row, head].nonzero()[0]} == counted
                # With a mass of one for each token, the masses count tokens.
                assert counted == {at: 1.0 + count for at, count in absorbed.items()}
                assert stats.num_absorbed[row, head] == sum(absorbed.values())
                assert stats.largest_mass[row, head] == max(counted.values())
                # Each went into the next token that stayed, in the last of the two evictions.
                went = {at: int(into) for at, into in enumerate(where[row, head]) if into >= 0}
                assert all(into == min(at for at in counted if at > token) for token, into in went.items())
                assert len(went) <= sum(absorbed.values())
        assert (where >= 0).any()
    said = cache.report().splitlines()
    total = sum(int(each.num_absorbed.sum()) for each in cache.stats())
    assert re.match(rf"{total} dropped tokens are in kept ones, which count as up to \d+\.0 tokens each\.", said[3])
    assert re.search(r"ms +absorbed +largest mass +cosine before", "\n".join(said))


def test_nothing_is_told_of_merges_where_there_are_none(model, ids):
    with observing(model):
        cache = EvictingCache(SNAPKV, record=True)
        read(model, cache, ids[:1], [N])
    assert {each.num_absorbed for each in cache.stats()} == {each.largest_mass for each in cache.stats()} == {None}
    assert "absorbed" not in cache.report()
    assert (absorbers(cache.layers[0]) == -1).all()
    assert sorted(set(masses(cache.layers[0]).ravel().tolist())) == [0.0, 1.0]
