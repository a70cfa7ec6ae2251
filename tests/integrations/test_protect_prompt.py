"""What a model reads stays, whatever the policy says of it, while what it writes is evicted."""

from dataclasses import dataclass

import pytest
import torch

from graphkv import (
    CAKE,
    CAOTE,
    H2O,
    LFA,
    TOVA,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Choice,
    Degree,
    GraphKV,
    KeyDiff,
    KNorm,
    LayerBudgets,
    LayerShares,
    LazyEviction,
    PerLayer,
    PyramidKV,
    Random,
    RoCo,
    SnapKV,
    StreamingLLM,
    Wrapper,
)
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES, tiny_llama

PROMPT, NEW = 12, 26
SNAPKV = SnapKV(budget=20, window=3, kernel_size=3)
POLICIES = {
    "snapkv": SNAPKV,
    "graphkv": GraphKV(SNAPKV),
    "degree": GraphKV(KNorm(budget=20), Degree()),
    "adakv": AdaKV(SNAPKV),
    "adakv of the code": AdaKV(SNAPKV, schedule="code"),
    "graphkv+adakv": GraphKV(AdaKV(KNorm(budget=20))),
    "caote": CAOTE(SNAPKV),
    "pyramidkv": PyramidKV(budget=20, window=3, kernel_size=3, beta=4),
    "cake": CAKE(budget=20, window=3, kernel_size=3),
    "h2o": H2O(budget=20, num_recent=2),
    "roco": RoCo(budget=20, num_varying=0.3, num_sinks=1, num_recent=3),
    "tova": TOVA(budget=20),
    "keydiff": KeyDiff(budget=20),
    "lazy-eviction": LazyEviction(budget=20, window=4, alpha=0.05),
    "lfa": LFA(budget=20),
    "random": Random(budget=20),
    "streaming-llm": StreamingLLM(budget=20, num_sinks=2),
    "layer budgets": LayerBudgets(KNorm(budget=20), budgets=(14, 20, 26)),
    "layer shares": LayerShares(KNorm(budget=20), shares=(1, 0, 3)),
    "two policies": PerLayer(SNAPKV, policies=[SNAPKV, GraphKV(SNAPKV)]),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (80,), generator=torch.Generator().manual_seed(9))


def write(model, ids, num_new=NEW, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, return_dict_in_generate=True, **options
    )


def kept(cache):
    """Positions per layer, row and head."""
    return [
        [[{p for p in head if p >= 0} for head in row] for row in layer.true_positions.tolist()]
        for layer in cache.layers
    ]


@each_policy
def test_the_prompt_stays_in_every_head_and_the_budget_holds(model, ids, policy):
    with evicting(model, policy, every=4, protect_prompt=True):
        cache = cache_of(write(model, ids[None, :PROMPT]))

    for layer, heads in enumerate(rows[0] for rows in kept(cache)):
        assert all(set(range(PROMPT)) <= head for head in heads), layer
    # One eviction for the prompt, and one after every four tokens.
    assert {layer.num_evictions for layer in cache.layers} == {1 + (NEW - 1) // 4}
    stored = sum(len(head) for rows in kept(cache) for head in rows[0])
    # The last of them was one token ago.
    assert stored == 2 * (3 * 20 + 3 * ((NEW - 1) % 4))


SINKS = {
    "snapkv": (SNAPKV, SnapKV(budget=20, window=3, kernel_size=3, num_sinks=PROMPT)),
    "graphkv": (GraphKV(SNAPKV), GraphKV(SnapKV(budget=20, window=3, kernel_size=3, num_sinks=PROMPT))),
    "adakv": (AdaKV(SNAPKV), AdaKV(SnapKV(budget=20, window=3, kernel_size=3, num_sinks=PROMPT))),
    "h2o": (H2O(budget=20, num_recent=2), H2O(budget=20, num_recent=2, num_sinks=PROMPT)),
    "keydiff with a sink": (KeyDiff(budget=20, num_sinks=1), KeyDiff(budget=20, num_sinks=PROMPT)),
    "random": (Random(budget=20), Random(budget=20, num_sinks=PROMPT)),
    "layer shares": (
        LayerShares(KNorm(budget=20), shares=(1, 0, 3)),
        LayerShares(KNorm(budget=20, num_sinks=PROMPT), shares=(1, 0, 3)),
    ),
}


@pytest.mark.parametrize(("policy", "sinks"), SINKS.values(), ids=SINKS)
def test_a_protected_prompt_is_as_many_sinks(model, ids, policy, sinks):
    with evicting(model, policy, every=4, protect_prompt=True):
        protected = write(model, ids[None, :PROMPT], output_logits=True)
    with evicting(model, sinks, every=4):
        expected = write(model, ids[None, :PROMPT], output_logits=True)
    with evicting(model, policy, every=4):
        unprotected = write(model, ids[None, :PROMPT])

    assert kept(cache_of(protected)) == kept(cache_of(expected)) != kept(cache_of(unprotected))
    assert_close(torch.stack(protected.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", ["snapkv", "graphkv", "adakv", "h2o", "lazy-eviction"])
def test_rows_of_a_batch_keep_prompts_of_their_own_lengths(model, ids, name):
    pads, policy = [0, 3, 7], POLICIES[name]
    prompts = torch.stack([ids[:PROMPT], ids[7 : 7 + PROMPT], ids[15 : 15 + PROMPT]])
    mask = torch.stack([(torch.arange(PROMPT) >= pad).long() for pad in pads])

    with evicting(model, policy, every=4, protect_prompt=True):
        batch = write(model, prompts * mask, attention_mask=mask)
        for row, pad in enumerate(pads):
            alone = write(model, prompts[row : row + 1, pad:])

            assert batch.sequences[row, PROMPT:].tolist() == alone.sequences[0, PROMPT - pad :].tolist()
            for ours, theirs in zip(kept(cache_of(batch)), kept(cache_of(alone)), strict=True):
                expected = [{p + pad for p in head} for head in theirs[0]]
                assert [{p for p in head if p >= pad} for head in ours[row]] == expected


@pytest.mark.parametrize("chunk", [5, 11])
def test_a_prompt_in_chunks_is_one_prompt(model, ids, chunk):
    """Also where the last chunk is a single token."""
    with evicting(model, KNorm(budget=20), every=3, protect_prompt=True):
        cache = cache_of(write(model, ids[None, :PROMPT], prefill_chunk_size=chunk))

    assert all(set(range(PROMPT)) <= head for rows in kept(cache) for head in rows[0])
    assert {layer.pinned.sum().item() for layer in cache.layers} == {2 * PROMPT}


def test_later_questions_are_protected_and_earlier_answers_are_not(model, ids):
    with evicting(model, KNorm(budget=24), every=4, protect_prompt=True):
        first = write(model, ids[None, :PROMPT])
        cache = cache_of(first)
        length = first.sequences.shape[1]
        # A turn of one word: the last token of the answer has not been read yet.
        for question in (ids[60:61], ids[61:66]):
            history = torch.cat([first.sequences, question[None]], dim=1)
            first = write(model, history, num_new=11, **{with_name(model): cache})

    asked = set(range(PROMPT)) | {length, *range(length + 12, length + 17)}
    for rows in kept(cache):
        for head in rows[0]:
            assert asked <= head
    written = set(range(PROMPT, length)) - {length - 1}
    assert all(not written <= head for rows in kept(cache) for head in rows[0])


def with_name(model):
    return next(iter(with_cache(model, None)))


def test_guesses_of_an_assistant_are_no_prompt(model, ids):
    prompt = ids[None, :PROMPT]
    with evicting(model, KNorm(budget=20), every=4, protect_prompt=True):
        plain = write(model, prompt)
        guessed = write(model, prompt, assistant_model=tiny_llama(seed=1), num_assistant_tokens=3)

    cache = cache_of(guessed)
    assert guessed.sequences.tolist() == plain.sequences.tolist()
    assert {layer.pinned.sum().item() for layer in cache.layers} == {2 * PROMPT}
    assert all(set(range(PROMPT)) <= head for rows in kept(cache) for head in rows[0])


def test_a_model_is_called_by_hand(model, ids):
    """Calls of more than one token are read, and calls of one are written."""
    cache = EvictingCache(KNorm(budget=20), every=4, protect_prompt=True)
    with observing(model), torch.inference_mode():
        for part in ids[:40].split([PROMPT, *[1] * 10, 3, *[1] * 15]):
            model(part[None], **with_cache(model, cache))

    asked = {*range(PROMPT), *range(PROMPT + 10, PROMPT + 13)}
    assert all(asked <= head for rows in kept(cache) for head in rows[0])
    assert "15 tokens of the prompt are protected: no eviction drops them." in cache.report()
    assert "protected" not in EvictingCache(KNorm(budget=20), every=4).report()


def test_what_has_left_a_sliding_window_goes(ids):
    model = FAMILIES["mistral-sliding"]()
    with evicting(model, KNorm(budget=20), every=4, protect_prompt=True):
        cache = cache_of(write(model, ids[None, :PROMPT]))

    # 37 tokens seen, of which the last 24 can be: the prompt is out of sight, and takes no room.
    assert all(len([p for p in head if p >= 13]) >= 18 for rows in kept(cache) for head in rows[0])


@pytest.mark.parametrize(
    ("policy", "budget", "layer"),
    [
        (KNorm(budget=11), 11, 0),
        (KNorm(budget=0.9), 11, 0),
        (LayerBudgets(KNorm(budget=20), budgets=(20, 11, 29)), 11, 1),
    ],
)
def test_a_budget_without_room_for_the_prompt_is_named(model, ids, policy, budget, layer):
    message = (
        f"budget must leave room for the 12 tokens of the prompt, which protect_prompt=True keeps; layer {layer} has a "
        f"budget of {budget}"
    )
    with evicting(model, policy, every=4, protect_prompt=True), pytest.raises(ArgumentError, match=message):
        write(model, ids[None, :PROMPT])


def test_a_budget_that_is_all_prompt_keeps_nothing_else(model, ids):
    with evicting(model, KNorm(budget=PROMPT), every=1, protect_prompt=True):
        cache = cache_of(write(model, ids[None, :PROMPT]))

    assert all(head == set(range(PROMPT)) for rows in kept(cache) for head in rows[0])


@pytest.mark.parametrize("policy", [H2O(budget=15), StreamingLLM(budget=15, num_sinks=2), SnapKV(budget=13, window=9)])
def test_recents_are_protected_as_far_as_there_is_room(model, ids, policy):
    with evicting(model, policy, every=1, protect_prompt=True):
        cache = cache_of(write(model, ids[None, :PROMPT]))

    expected = set(range(PROMPT)) | set(range(PROMPT + NEW - 1 - (policy.budget - PROMPT), PROMPT + NEW - 1))
    assert all(head == expected for rows in kept(cache) for head in rows[0])


def test_random_forgets_what_the_model_writes_whatever_its_age(model, ids):
    """The baseline of reasoning: the prompt, and at every step one of 8 written tokens and the new one at random."""
    cache, ages = EvictingCache(Random(budget=20), every=1, protect_prompt=True), []
    with observing(model), torch.inference_mode():
        for step, part in enumerate(ids[:80].split([PROMPT, *[1] * (80 - PROMPT)])):
            model(part[None], **with_cache(model, cache))
            if step >= 30:
                end = PROMPT + step
                ages += [end - 1 - p for rows in kept(cache) for head in rows[0] for p in head if p >= PROMPT]

    assert all(set(range(PROMPT)) <= head for rows in kept(cache) for head in rows[0])
    # A token survives each step with 8 / 9: 8 of them are there, of any age up to some tens.
    counts = [ages.count(age) / (6 * 39) for age in range(24)]
    for first in (0, 8, 16):
        expected = sum((8 / 9) ** (age + 1) for age in range(first, first + 8))
        assert sum(counts[first : first + 8]) == pytest.approx(expected, rel=0.35), first


@dataclass(frozen=True)
class NewestOnly(Wrapper):
    """A policy of one's own whose choice asks nobody."""

    def choose(self, found, layer, budget):
        newest = torch.arange(layer.num_tokens - budget, layer.num_tokens)
        return Choice(kept=newest.expand(*layer.valid.shape[:2], -1))


def test_a_choice_that_drops_the_prompt_all_the_same_is_refused(model, ids):
    message = "policy must keep the prompt with protect_prompt=True; NewestOnly dropped 4 of its tokens in layer 0"
    with (
        evicting(model, NewestOnly(KNorm(budget=20)), every=4, protect_prompt=True),
        pytest.raises(ArgumentError, match=message),
    ):
        write(model, ids[None, :PROMPT], num_new=16)


def test_bad_arguments_are_named(model):
    with pytest.raises(ArgumentError, match="every must be given with protect_prompt=True"):
        EvictingCache(SNAPKV, protect_prompt=True)
    with pytest.raises(ArgumentTypeError, match="protect_prompt must be True or False; got 1"):
        EvictingCache(SNAPKV, every=4, protect_prompt=1)
    with (
        evicting(model, SNAPKV, every=4, protect_prompt=True),
        pytest.raises(ArgumentError, match=r"must have the protect_prompt of evicting\(\), True; its own is False"),
    ):
        model(torch.ones(1, 4, dtype=torch.int64), **with_cache(model, EvictingCache(SNAPKV, every=4)))


def test_stacked_caches_keep_their_prompts(model, ids):
    caches = []
    with observing(model), torch.inference_mode():
        for start, length in ((0, PROMPT), (20, PROMPT - 4)):
            cache = EvictingCache(protect_prompt=True)
            for part in ids[start : start + 30].split([length, *[1] * (30 - length)]):
                model(part[None], **with_cache(model, cache))
            caches.append(cache)
    batch = EvictingCache.stacked(caches)
    for cache in (*caches, batch):
        cache.evict(KNorm(budget=16))

    for ours, first, second in zip(*map(kept, (batch, *caches)), strict=True):
        assert ours == [first[0], second[0]]
        assert all(set(range(PROMPT)) <= head for head in first[0])
        assert all(set(range(PROMPT - 4)) <= head for head in second[0])
