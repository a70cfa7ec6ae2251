"""What a policy remembers of a layer as a whole stays with the rows of a cache, whatever happens to them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from graphkv import ArgumentError, ArgumentTypeError, KNorm, Memory, Policy, Requirements
from graphkv.adapters import running
from graphkv.core import primitives
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close, reference_logits
from tests.integrations.tiny import tiny_llama

N = 30


@dataclass(frozen=True, kw_only=True)
class Drift(Policy):
    """Keeps what is unlike a moving mean of the keys that came, one per head; the mean moves with every call."""

    requirements: ClassVar[Requirements] = Requirements(state=("age", "calls", "center"))

    def observe(self, layer, memory, /):
        xp, new = layer.xp, layer.num_new
        keys, valid = layer.keys[:, :, layer.num_tokens - new :, :], layer.valid[:, :, layer.num_tokens - new :, None]
        shown = xp.astype(valid, keys.dtype)
        count = xp.sum(shown, axis=2)
        center = xp.sum(keys * shown, axis=2) / xp.where(count > 0, count, xp.ones_like(count))
        # Float counts, so that every library divides them.
        calls = xp.ones(keys.shape[0], dtype=keys.dtype, device=primitives.device_of(keys))
        if memory is not None:
            step = calls[:, None, None] / (1 + memory.layer["calls"][:, None, None])
            center = memory.layer["center"] + step * (center - memory.layer["center"])
            calls = calls + memory.layer["calls"]
        age = running.grown(memory, layer, "age") + 1
        return Memory(tokens={"age": age}, layer={"calls": calls, "center": center})

    def score(self, layer, memory, /):
        return layer.xp.sum((layer.keys - memory.layer["center"][:, :, None, :]) ** 2, axis=-1) + memory.tokens["age"]


@dataclass(frozen=True, kw_only=True)
class Turns(Policy):
    """Remembers nothing but how often it was asked, and keeps the oldest or the newest in turn."""

    requirements: ClassVar[Requirements] = Requirements(state=("turn",))

    def observe(self, layer, memory, /):
        ones = layer.xp.ones(layer.keys.shape[0], dtype=layer.keys.dtype, device=primitives.device_of(layer.keys))
        return Memory(layer={"turn": ones if memory is None else -memory.layer["turn"]})

    def score(self, layer, memory, /):
        place = layer.xp.arange(layer.num_tokens, dtype=layer.keys.dtype, device=primitives.device_of(layer.keys))
        return layer.xp.broadcast_to(memory.layer["turn"][:, None, None] * place, layer.valid.shape)


DRIFT = Drift(budget=11)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


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


CALLS = [N, 1, 1, 1, 1, 3, 2, 7, 1, 3]


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_the_memory_of_a_layer_goes_from_eviction_to_eviction(model, ids, backend):
    with observing(model):
        cache = EvictingCache(DRIFT, every=4, backend=backend)
        logits = read(model, cache, ids[:1], CALLS)
    expected, kept = reference_logits(model, ids[0], DRIFT, CALLS, every=4)

    assert_close(logits[0], expected)
    for number, layer in enumerate(cache.layers):
        assert layer.true_positions[0].tolist() == kept[number]
        assert {name: tuple(x.shape) for name, x in layer.layer_state.items()} == {"calls": (1,), "center": (1, 2, 8)}
        assert layer.layer_state["calls"].tolist() == [5]


def test_a_policy_may_remember_the_layer_only(model, ids):
    with observing(model):
        cache = EvictingCache(Turns(budget=11), every=1)
        read(model, cache, ids[:1], [N])
        assert cache.layers[1].true_positions[0, 0].tolist() == list(range(N - 11, N))
        read(model, cache, ids[:1], [1])
        assert cache.layers[1].true_positions[0, 0].tolist() == list(range(N - 11, N))
        cache.crop(0)
        with pytest.raises(ArgumentError, match="at most the 0 tokens since the last eviction; got 1"):
            cache.crop(-1)
        read(model, cache, ids[:1], [1])
        assert cache.layers[1].true_positions[0, 0].tolist() == [*range(N - 10, N), N + 1]
        whole = EvictingCache(Turns(budget=100), every=1)
        read(model, whole, ids[:1], [N])
        with pytest.raises(ArgumentError, match="at most the 0 tokens since the last eviction; got 1"):
            whole.crop(-1)


@pytest.mark.parametrize("where", ["left", "holes"])
def test_rows_with_padding_remember_what_they_remember_alone(model, ids, where):
    """Left, where rows are decided together, and between tokens, where each is decided alone."""
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    if where == "holes":
        mask[2, N : N + 6] = 0
    with observing(model):
        cache = EvictingCache(DRIFT, every=4)
        read(model, cache, ids * mask, [N, 2, 4, 5, 3], mask)
        for row in range(3):
            calls = [int(mask[row, :N].sum()), *(int(part.sum()) for part in mask[row, N : N + 14].split([2, 4, 5, 3]))]
            alone = EvictingCache(DRIFT, every=4)
            # A call of padding only does not exist alone.
            read(model, alone, ids[row][mask[row] > 0][None], [each for each in calls if each])
            for ours, its in zip(cache.layers, alone.layers, strict=True):
                torch.testing.assert_close(ours.layer_state["center"][row], its.layer_state["center"][0])
                assert ours.layer_state["calls"][row] == its.layer_state["calls"][0]


def test_a_row_at_rest_is_not_asked_again(model, ids):
    """Nothing but padding has come in it: alone, it would not have been evicted."""
    mask = torch.ones_like(ids[:2])
    mask[1, N : N + 2] = 0
    with observing(model):
        cache = EvictingCache(Turns(budget=11), every=2)
        read(model, cache, ids[:2] * mask, [N, 2, 2], mask)
    assert [layer.layer_state["turn"].tolist() for layer in cache.layers] == [[1, -1]] * 2


def greedy(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)


def test_rows_take_their_memory_along(model, ids):
    """Beams, repeated and selected rows, copies."""
    with evicting(model, DRIFT, every=3):
        batch = greedy(model, ids[:, :N], num_beams=3)
        assert batch[1].tolist() == greedy(model, ids[1:2, :N], num_beams=3)[0].tolist()
    with observing(model):
        cache = EvictingCache(DRIFT, every=2)
        read(model, cache, ids, [N])
        twin = cache.copy()
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([5, 2]))
        before = cache.layers[0].layer_state["center"]
        assert torch.equal(twin.layers[0].layer_state["center"], before[[2, 1]])
        assert_close(read(model, twin, ids[[2, 1]], [1] * 6), read(model, cache, ids, [1] * 6)[[2, 1]])
        assert cache.layers[0].layer_state["center"].shape == (3, 2, 8)
        assert not torch.equal(cache.layers[0].layer_state["center"], before)


def test_a_stack_forgets_as_it_forgets_sums(model, ids):
    caches = [EvictingCache(DRIFT), EvictingCache(DRIFT)]
    with observing(model):
        for row, cache in enumerate(caches):
            read(model, cache, ids[row : row + 1], [N])
    assert [dict(layer.layer_state) for layer in EvictingCache.stacked(caches).layers] == [{}, {}]
    assert caches[0].layers[0].layer_state


def test_crop_does_not_take_back_what_a_layer_remembers(model, ids):
    with observing(model):
        cache = EvictingCache(Drift(budget=100), every=4)
        read(model, cache, ids[:1], [N, 2])
        with pytest.raises(ArgumentError, match="at most the 2 tokens since the last eviction; got 3"):
            cache.crop(-3)
        cache.crop(-2)
        straight = EvictingCache(Drift(budget=100), every=4)
        read(model, straight, ids[:1], [N])
        assert_close(read(model, cache, ids[:1], [5]), read(model, straight, ids[:1], [5]))
        assert torch.equal(cache.layers[1].layer_state["center"], straight.layers[1].layer_state["center"])


def test_a_file_brings_it_back(model, ids, tmp_path):
    path = tmp_path / "cache"
    with observing(model):
        cache = EvictingCache(DRIFT, every=4)
        read(model, cache, ids, [N, 2, 3])
        cache.save(path)
        made = EvictingCache.load(path, model=model, policy=DRIFT)
        assert torch.equal(read(model, made, ids, [4, 4]), read(model, cache, ids, [4, 4]))
        for ours, its in zip(made.layers, cache.layers, strict=True):
            assert torch.equal(ours.layer_state["center"], its.layer_state["center"])
        cache.layers[0].layer_state = {"center": torch.ones(2, 2)}
        cache.save(path)
        with pytest.raises(ArgumentError, match=r"its layers\.0\.layer_state\.center must be numbers of 3 rows; got"):
            EvictingCache.load(path, policy=DRIFT)


def test_what_a_layer_remembers_is_worked_out_once_for_many_budgets(model, ids):
    full = EvictingCache(num_queries=N)
    with observing(model):
        read(model, full, ids, [N - 8])
        before = full.running_states(DRIFT)
        read(model, full, ids, [8])
        states = full.running_states(DRIFT, before)
        full.keep_queries(0)
        cache = full.with_states(states)
        with pytest.raises(ArgumentError, match="at most the 0 tokens"):
            cache.crop(-1)
        cache.evict(DRIFT)
    assert states[0].layer["calls"].tolist() == [2] * 3
    assert cache.layers[0].layer_state["calls"].tolist() == [2] * 3
    assert not full.layers[0].layer_state
    only = full.with_states([Memory(layer={"turn": torch.ones(3)})] * 2)
    only.evict(Turns(budget=3))
    assert only.layers[0].true_positions[0, 0].tolist() == [0, 1, 2]
    with pytest.raises(
        ArgumentError, match=r"with 3 rows in what is remembered of a layer; got \(1,\) for turn of lay"
    ):
        full.with_states([Memory(layer={"turn": torch.ones(1)})] * 2)
    with pytest.raises(ArgumentTypeError, match="states must be a Memory; got dict"):
        full.with_states([{}, {}])
    with pytest.raises(ArgumentError, match=r"state must be None for KNorm.*\['age', 'calls', 'center'\]"):
        cache.evict(KNorm(budget=3))
