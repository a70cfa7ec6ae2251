"""A cache that evicts after every token goes over to a form that is written into; nobody can tell but by the clock."""

import copy
from types import SimpleNamespace

import pytest
import torch

from graphkv import H2O, Decay, Degree, GraphKV, SnapKV
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers import layer as layers
from graphkv.integrations.transformers.settings import Settings
from graphkv.integrations.transformers.source import Source
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close, reference_logits
from tests.integrations.tiny import tiny_llama

PROMPT, STEPS = 24, 16
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = {
    "snapkv": SNAPKV,
    "snapkv, maxima and sinks": SnapKV(
        budget=14, window=4, kernel_size=5, pooling="max", group_reduction="max", num_sinks=2
    ),
    "snapkv+degree": GraphKV(SNAPKV, Degree()),
    "snapkv+ranks": GraphKV(SNAPKV, Degree(fusion="max_rank")),
    "snapkv+decay": GraphKV(SNAPKV, Decay(neighbors=3)),
    "h2o": H2O(budget=12),
    "h2o by age": H2O(budget=12, num_sinks=2, num_recent=3, age_normalized=True, group_reduction="sum"),
    "h2o+degree": GraphKV(H2O(budget=12), Degree(exponent=3)),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids):
    with observing(model):
        return model(ids, **with_cache(model, cache)).logits


def after(model, policy, ids, **settings):
    """Return a cache that has read a prompt and decoded, and the logits."""
    cache = EvictingCache(policy, every=1, **settings)
    with torch.inference_mode():
        calls = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, 1)]
        logits = [read(model, cache, each) for each in calls]
    return cache, torch.cat(logits, dim=1)


def is_steady(cache):
    return [layer.steady is not None for layer in cache.layers] == [True] * 3


def facts(cache):
    """Return all that a cache holds, layer by layer; this ends what is steady."""
    return [
        (vars(layer.slots), layer.held, layer.num_seen, layer.num_stored, layer.num_evictions, layer.num_dropped,
         layer.bytes_freed, layer.nbytes, layer.budget, layer.num_new, layer.due_at)
        for layer in cache.layers
    ]  # fmt: skip


def assert_same(one, other):
    for (slots, held, *numbers), (other_slots, other_held, *other_numbers) in zip(one, other, strict=True):
        assert numbers == other_numbers
        assert (held is None) == (other_held is None)
        if held is not None:
            assert_close(held.queries, other_held.queries)
        assert torch.equal(slots["positions"], other_slots["positions"])
        for name in ("keys", "values"):
            assert_close(slots[name], other_slots[name])
        assert slots["state"].keys() == other_slots["state"].keys()
        for name, sums in slots["state"].items():
            assert_close(sums, other_slots["state"][name])


@pytest.fixture
def never_steady(monkeypatch):
    return lambda: monkeypatch.setattr(layers, "CALM", 10**9)


@each_policy
def test_a_steady_cache_answers_as_the_reference_does(policy, model, ids):
    cache, logits = after(model, policy, ids[:1])

    assert is_steady(cache)
    expected, kept = reference_logits(model, ids[0], policy, [PROMPT, *[1] * STEPS], every=1)
    assert_close(logits[0], expected)
    assert {number: layer.true_positions[0].tolist() for number, layer in enumerate(cache.layers)} == kept


@each_policy
def test_a_steady_cache_counts_what_it_holds_and_holds_keys_once(policy, model, ids):
    cache, _ = after(model, policy, ids)
    counted, layer = cache.nbytes, cache.layers[0]

    assert is_steady(cache)
    scorer = policy.base if isinstance(policy, GraphKV) else policy
    keys, places = 2 * layer.steady.keys.nbytes, 2 * layer.steady.order.nbytes
    if isinstance(scorer, SnapKV):
        # The weights of the window's queries, and those queries; 2 rows of 2 KV heads, with 3 query heads each.
        scores = 4 * 12 * scorer.window * (scorer.budget + 1 + 8)
    else:
        scores = 4 * 4 * (3 + 1) * (scorer.budget + 1)
    rest = layer.nbytes - keys - places - scores
    apart = 4 * (4 * (scorer.budget + 1) + 2 * 4 * 8) if layer.steady.apart is not None else 0
    assert rest == apart
    assert counted == sum(each.nbytes for each in cache.layers)
    assert layer._slots.nbytes == 0
    assert layer.slots.nbytes == 2 * 4 * scorer.budget * 8 * 4 == layer.nbytes


@each_policy
def test_a_steady_cache_holds_what_it_would_hold_without(policy, model, ids, never_steady):
    cache, logits = after(model, policy, ids)
    assert is_steady(cache)
    found = facts(cache)
    assert not any(layer.steady for layer in cache.layers)
    never_steady()
    other, expected = after(model, policy, ids)
    assert_close(logits, expected)
    assert_same(found, facts(other))


@pytest.mark.parametrize("policy", [POLICIES["snapkv+degree"], POLICIES["h2o+degree"]], ids=["snapkv", "h2o"])
def test_looking_at_a_layer_changes_nothing(policy, model, ids, never_steady):
    cache, _ = after(model, policy, ids[:, : PROMPT + 8])
    with torch.inference_mode():
        for number, each in enumerate(ids[:, PROMPT + 8 :].split(1, 1)):
            assert cache.layers[number % 3].keys.shape[2] == policy.base.budget
            read(model, cache, each)
    found = facts(cache)
    never_steady()
    assert_same(found, facts(after(model, policy, ids)[0]))


def test_copies_go_their_own_ways(model, ids, tmp_path):
    cache, _ = after(model, POLICIES["snapkv+degree"], ids[:, : PROMPT + 8])
    cache.save(tmp_path / "cache")
    twins = [cache.copy(), copy.deepcopy(cache), EvictingCache.load(tmp_path / "cache"), cache]
    with torch.inference_mode():
        for each in ids[:, PROMPT + 8 :].split(1, 1):
            read(model, cache, each)
        for number, twin in enumerate(twins[:-1]):
            for each in ids[:, PROMPT + 8 :].flip(1)[:, : 3 + number].split(1, 1):
                read(model, twin, each)
            for each in ids[:, PROMPT + 8 :].split(1, 1)[: 5 + number]:
                read(model, twin, each)
    expected = after(model, POLICIES["snapkv+degree"], ids)[0]
    assert_same(facts(cache), facts(expected))


@pytest.mark.parametrize("policy", [POLICIES["snapkv+degree"], POLICIES["h2o"]], ids=["snapkv", "h2o"])
def test_what_does_not_fit_is_taken_in_as_before(policy, model, ids, never_steady):
    def go(cache):
        logits = []
        with torch.inference_mode():
            # Several tokens, then padding in one row, then one token in another mode.
            logits += [read(model, cache, ids[:, :3]), *(read(model, cache, each) for each in ids[:, 3:9].split(1, 1))]
        with torch.no_grad():
            logits += [read(model, cache, each) for each in ids[:, 9:18].split(1, 1)]
        logits.append(read(model, cache, ids[:, 18:19]).detach())
        with torch.inference_mode(), observing(model):
            for number in range(19, 24):
                mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.int64)
                mask[1, PROMPT + STEPS + 19 :] = 0
                new = ids[:, number : number + 1]
                logits.append(model(new, attention_mask=mask, **with_cache(model, cache)).logits)
        return torch.cat([each[:1] for each in logits], dim=1)

    cache, _ = after(model, policy, ids)
    logits = go(cache)
    never_steady()
    other, _ = after(model, policy, ids)
    assert_close(logits, go(other))
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.positions, expected.positions)


def test_beams_and_rows_follow(model, ids, never_steady):
    def go(cache):
        with torch.inference_mode():
            cache.reorder_cache(torch.tensor([1, 1]))
            for each in ids[:, :5].split(1, 1):
                read(model, cache, each)
            cache.batch_select_indices(torch.tensor([1]))
            for each in ids[:1, 5:12].split(1, 1):
                read(model, cache, each)
        return facts(cache)

    found = go(after(model, POLICIES["h2o"], ids)[0])
    never_steady()
    assert_same(found, go(after(model, POLICIES["h2o"], ids)[0]))


def test_a_steady_cache_in_half_precision(model, ids, never_steady):
    half = copy.deepcopy(model).bfloat16()
    cache, logits = after(half, POLICIES["snapkv+degree"], ids)
    assert is_steady(cache)
    never_steady()
    other, expected = after(half, POLICIES["snapkv+degree"], ids)
    assert torch.equal(cache.layers[0].positions, other.layers[0].positions)
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "settings", [{"record": True}, {"rerotate": True}, {"protect_prompt": True}, {"backend": "numpy"}], ids=str
)
def test_other_settings_are_never_steady(settings, model, ids):
    budget = PROMPT + 4 if "protect_prompt" in settings else 14
    cache, _ = after(model, SnapKV(budget=budget, window=4, kernel_size=3), ids, **settings)

    assert not any(layer.steady for layer in cache.layers)


def one_layer(policy, steps, change=lambda keys: keys):
    """Return the positions that a layer keeps after each step, without a model."""
    random = torch.Generator().manual_seed(5)
    settings = Settings(
        policy=policy, every=1, protect_prompt=False, rerotate=False, record=False, num_queries=0, backend=None
    )
    layer = layers.EvictingLayer(settings)
    source = Source(kind=None, config=SimpleNamespace(num_hidden_layers=1), index=0)
    found = []
    for number in [PROMPT, *[1] * steps]:
        keys, queries = torch.randn(1, 2, number, 8, generator=random), torch.randn(1, 4, number, 8, generator=random)
        layer.update(change(keys), keys)
        layer.after_attention(source, queries, None, None)
        if not layer.step(policy):
            layer.evict(policy)
        steady = layer.steady
        found.append(layer.positions if steady is None else steady.settled()[0].positions)
    return found, layer.steady is not None


@each_policy
@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (torch.ones_like, True),
        (lambda keys: keys * 30, True),
        (torch.zeros_like, False),
        (lambda keys: keys.masked_fill(keys > 2.2, torch.inf), None),
    ],
    ids=["equal keys", "sharp attention", "no directions", "infinite"],
)
def test_keys_that_are_hard_to_tell_apart(policy, change, stays, never_steady):
    found, is_steady = one_layer(policy, 20, change)
    never_steady()
    expected, _ = one_layer(policy, 20, change)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    if stays is not None and isinstance(policy, GraphKV) and policy.signal == Degree():
        assert is_steady == stays
