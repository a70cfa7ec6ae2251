"""Tokens that a model reads only to be asked: what they leave, and that they leave nothing else."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from graphkv import ArgumentError, ArgumentTypeError, KNorm, Policy, Requirements, SnapKV
from graphkv.core.attention import highest_attention
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.test_layers import hybrids_go_through_the_cache, qwen3_next
from tests.integrations.tiny import FAMILIES, tiny_gemma3, tiny_llama

N, P = 30, 7


def most(layer):
    return [
        highest_attention(probe, layer.keys, layer.valid, sees_itself=True, block_size=64, xp=layer.xp)
        for probe in layer.probes
    ]


@dataclass(frozen=True, kw_only=True)
class Asking(Policy):
    """Ranks by what the probes look at, and notes what it was given."""

    requirements: ClassVar[Requirements] = Requirements(probes=True)

    seen: list[Any] = field(default_factory=list)

    def score(self, layer, memory):
        self.seen.append(layer)
        return sum(most(layer))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (2, N + P), generator=torch.Generator().manual_seed(1))


def read(model, cache, ids, **inputs):
    with observing(model), torch.inference_mode():
        return model(ids, **inputs, **with_cache(model, cache)).logits


def contents(cache):
    """Everything of a cache, with copies of its tensors, as it is at the moment."""

    def held(value):
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {name: held(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [held(each) for each in value]
        return held(vars(value)) if type(value).__name__ in ("Slots", "History") else value

    own = {name: held(value) for name, value in vars(cache).items() if name != "layers"}
    return [own, *({name: held(x) for name, x in vars(layer).items() if name != "probes"} for layer in cache.layers)]


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            assert_same(found[name], each)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found is expected or found == expected


def seen_attention(model, ids, **inputs):
    """The probabilities of every layer, as a model without any cache computes them."""
    before, rows = model.config._attn_implementation, []

    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            rows = model(ids, output_attentions=True, use_cache=False, **inputs).attentions
    finally:
        model.set_attn_implementation(before)
    return rows


def ask(cache, model, ids, **inputs):
    with observing(model):
        cache.probe(model, ids, **inputs)


def filled(model, ids, **options):
    cache = EvictingCache(config=model.config, **options)
    read(model, cache, ids)
    return cache


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3-mixed", "gpt2"])
def test_the_scores_are_the_attention_of_the_model_itself(name, ids):
    """Sliding windows, grouped heads, another scale of logits, positions that are no rotation."""
    model = FAMILIES[name]()
    cache, policy = filled(model, ids[:, :N]), Asking(budget=9)
    ask(cache, model, ids[:, N:])
    cache.evict(policy)

    attention = seen_attention(model, ids)
    assert [layer.layer for layer in policy.seen] == [i for i, layer in enumerate(cache.layers) if layer.evicts]
    for layer in policy.seen:
        expected = attention[layer.layer][:, :, N:, :N].unflatten(1, (layer.keys.shape[1], -1)).amax(dim=(2, 3))
        torch.testing.assert_close(most(layer)[0], expected)
    assert all(layer.probes == () for layer in cache.layers)


@hybrids_go_through_the_cache
@pytest.mark.parametrize("kind", [tiny_gemma3, qwen3_next])
def test_a_probe_leaves_nothing_but_its_queries(kind, ids):
    model = kind()
    cache = filled(model, ids[:, :N], num_queries=4)
    twin, before = cache.copy(), contents(cache)

    ask(cache, model, ids[:, N:])

    assert_same(contents(cache), before)
    sizes = {len(layer.probes) for layer in cache.attention_layers if layer.evicts}
    assert sizes == {1}
    assert torch.equal(read(model, cache, ids[:, :3]), read(model, twin, ids[:, :3]))


def test_a_probe_of_an_evicted_cache_sees_what_is_left(model, ids):
    cache = filled(model, ids[:, :N], num_queries=8)
    cache.evict(SnapKV(budget=12, window=4))
    before, kept = contents(cache), [layer.positions for layer in cache.layers]
    ask(cache, model, ids[:, N:], about=(3, 9))
    twin, policy = cache.copy(), Asking(budget=5)
    read(model, twin, ids[:, N:])

    assert_same(contents(cache), before)
    for held, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(held.probes[0].keys, other.keys[:, :, -P:])
        # New tokens: what was asked is not what would be asked now.
        assert other.probes == ()
    cache.evict(policy)
    for layer, positions in zip(policy.seen, kept, strict=True):
        assert torch.equal(layer.probes[0].about, (positions >= 3) & (positions < 9))
    assert {layer.num_stored for layer in cache.layers} == {5}


@pytest.mark.parametrize("where", ["left", "right"])
def test_a_padded_row_asks_and_is_asked_like_the_row_alone(model, ids, where):
    shown = torch.ones(2, N, dtype=torch.int64)
    shown[1, : 6 if where == "left" else 0] = 0
    shown[1, N if where == "left" else 24 :] = 0
    asks = torch.ones(2, P, dtype=torch.int64)
    asks[1, 5:] = 0
    # As `generate` counts them.
    places = torch.cat([shown, asks], dim=1).cumsum(dim=1).sub(1).clamp(min=0)
    together, alone = EvictingCache(), EvictingCache()
    read(model, together, ids[:, :N], attention_mask=shown, position_ids=places[:, :N])
    text = ids[1:, :N][:, shown[1].bool()]
    read(model, alone, text)
    for _ in range(2):
        # The mask of the text is known, and can be given.
        mask = asks if not together.layers[0].probes else torch.cat([shown, asks], dim=1)
        ask(together, model, ids[:, N:], attention_mask=mask, position_ids=places[:, N:])
        ask(alone, model, ids[1:, N : N + 5])
    policy = Asking(budget=9)
    together.evict(policy)
    alone.evict(policy)

    assert [len(layer.probes) for layer in policy.seen] == [2] * len(policy.seen)
    for ours, its in zip(together.layers, alone.layers, strict=True):
        columns = shown[1].nonzero().flatten()
        assert ours.positions[1].tolist() == columns[its.positions[0]].tolist()
        assert ours.num_hidden.tolist() == [0, 6]


def test_a_row_with_holes_is_asked_about_the_same_tokens(model, ids):
    shown = torch.ones(2, N, dtype=torch.int64)
    shown[1, 20:] = 0
    cache, policy = EvictingCache(), Asking(budget=9)
    read(model, cache, ids[:, :N], attention_mask=shown)
    read(model, cache, ids[:, :2])
    ask(cache, model, ids[:, N:], about=(18, 31))
    cache.evict(policy)

    first, second = policy.seen[:2]
    assert first.probes[0].about[0, 0].nonzero().flatten().tolist() == list(range(18, 31))
    # Twenty tokens and two more: of the thirteen that are asked about, it has 18, 19 and 30.
    assert second.probes[0].about[0, 0].nonzero().flatten().tolist() == [18, 19, 20]


def test_rows_of_the_batch_take_their_probes_along(model, ids):
    cache = filled(model, ids[:, :N])
    ask(cache, model, ids[:, N:])
    other = cache.copy()
    other.reorder_cache(torch.tensor([1, 1, 0]))
    policy = Asking(budget=9)
    cache.evict(policy)
    other.evict(policy)

    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(two.positions, one.positions[[1, 1, 0]])


@pytest.mark.parametrize("inside", ["observing", "evicting", "for good"])
def test_a_probe_is_read_wherever_the_model_works_with_our_cache(inside, ids):
    model = tiny_llama(num_hidden_layers=2)
    cache = filled(model, ids[:, :N])
    if inside == "for good":
        model.set_attn_implementation("graphkv_sdpa")
        cache.probe(model, ids[:, N:])
    else:
        with observing(model) if inside == "observing" else evicting(model, KNorm(budget=4)):
            cache.probe(model, ids[:, N:])
    assert [len(layer.probes) for layer in cache.layers] == [1, 1]
    assert cache.layers[0].probes[0].queries.shape == (2, 6, P, 8)
    assert not cache.layers[0].probes[0].queries.requires_grad


def test_a_probe_of_a_model_outside_is_refused(model, ids):
    cache = filled(model, ids[:, :N])
    before = contents(cache)
    with pytest.raises(ArgumentError, match="does not hand its cached keys to graphkv's attention function"):
        cache.probe(model, ids[:, N:])

    assert_same(contents(cache), before)
    ask(cache, model, ids[:, N:])


def test_what_is_taken_back_takes_the_probes_along(model, ids):
    cache = filled(model, ids[:, :N])
    ask(cache, model, ids[:, N:])
    cache.crop(0)
    assert [len(layer.probes) for layer in cache.layers] == [1, 1]
    cache.crop(-2)
    assert [layer.probes for layer in cache.layers] == [(), ()]
    with pytest.raises(ArgumentError, match="probes must be given for Asking; got None"):
        cache.evict(Asking(budget=9))
    assert cache.num_seen == N - 2


WRONG_IDS = {
    "empty": (ArgumentError, "ids must hold at least one token to ask with; got none", lambda ids: ids[:, :0]),
    "one row": (ArgumentError, r"ids must have shape .* with the 2 rows .* got \(1, 7\)", lambda ids: ids[:1, N:]),
    "floats": (ArgumentTypeError, "ids must be a tensor of integers; got torch.float32", lambda ids: ids.float()),
    "list": (ArgumentTypeError, "ids must be a tensor of integers; got list", lambda ids: ids.tolist()),
    "too long": (
        ArgumentError,
        "within the model's context of 512 tokens; the cache has seen 30 and the probe has 483",
        lambda ids: ids[:, :1].expand(2, 513 - N),
    ),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_wrong_ids_leave_the_cache_as_it_was(name, model, ids):
    error, message, change = WRONG_IDS[name]
    cache = filled(model, ids[:, :N])
    before = contents(cache)
    with pytest.raises(error, match=message):
        ask(cache, model, change(ids))

    assert_same(contents(cache), before)
    ask(cache, model, ids[:, :1].expand(2, 512 - N))


def test_other_mistakes_get_their_errors(model, ids):
    cache = filled(model, ids[:, :N])
    for about in ((3, 31), (3, 3), (-1, 4), (0.0, 3), 5):
        with pytest.raises(ArgumentError, match=r"about must be \(first, end\).* <= 30 tokens seen; got"):
            ask(cache, model, ids[:, N:], about=about)
    with pytest.raises(ArgumentError, match=r"attention_mask must have shape .* got \(2, 30\)"):
        ask(cache, model, ids[:, N:], attention_mask=torch.ones(2, N))
    with pytest.raises(ArgumentError, match="the cache must hold a prompt before it is probed; it is empty"):
        ask(EvictingCache(), model, ids)
    with pytest.raises(ArgumentError, match="policy must do without probes to evict by itself; Asking needs some"):
        EvictingCache(Asking(budget=4))
    assert [layer.probes for layer in cache.layers] == [(), ()]


def test_a_model_that_breaks_off_leaves_the_cache_as_it_was(model, ids):
    cache = filled(model, ids[:, :N])
    before = contents(cache)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(cache, model, ids[:, N:])
    handle.remove()

    assert_same(contents(cache), before)
    assert [layer.probes for layer in cache.layers] == [(), ()]
    assert read(model, cache, ids[:, :1]).shape[1] == 1
