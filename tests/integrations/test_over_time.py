"""What happens to a cache over many calls: chunks, long answers, rollbacks, turns, budgets of heads and layers."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from graphkv import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    ChunkKV,
    Decay,
    ExpectedAttention,
    GraphKV,
    GraphKVWarning,
    KeyDiff,
    KNorm,
    Lossless,
    Policy,
    PyramidKV,
    Random,
    RoCo,
    Shared,
    SnapKV,
    StreamingLLM,
)
from graphkv.core import budgets
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.reference import assert_close, reference_logits
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES, tiny_llama

N = 40
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = {
    "snapkv": SNAPKV,
    "snapkv+graphkv": GraphKV(SNAPKV, Decay(neighbors=3)),
    "pyramidkv": PyramidKV(budget=14, window=6, kernel_size=3, beta=4),
    "h2o": H2O(budget=12),
    "h2o+graphkv": GraphKV(H2O(budget=12)),
    "roco": RoCo(budget=14, num_sinks=1, num_recent=3),
    "tova": TOVA(budget=12),
    "knorm": KNorm(budget=12),
    "keydiff": KeyDiff(budget=12, num_sinks=1),
    "cake": CAKE(budget=14, window=6, kernel_size=3),
    "cake+graphkv": GraphKV(CAKE(budget=14, window=6, kernel_size=3)),
    "sagekv": SAGEKV(budget=12, num_sinks=1),
    "expected-attention": ExpectedAttention(budget=14, num_sinks=1),
    "caote": CAOTE(SNAPKV),
    "adakv": AdaKV(SNAPKV),
    "adakv+h2o": AdaKV(H2O(budget=12)),
    "graphkv+adakv": GraphKV(AdaKV(SNAPKV)),
    "shared": Shared(SNAPKV),
    "shared+h2o": Shared(H2O(budget=12)),
    "blocks": Shared(SNAPKV, block=4),
    "chunkkv": ChunkKV(SNAPKV, chunk=5),
    "lossless": Lossless(SNAPKV, 0.2),
    "lossless+h2o": Lossless(GraphKV(H2O(budget=0.5)), 0.1),
    "shared lossless blocks": Shared(Lossless(KNorm(budget=1.0, num_sinks=1), 0.1), block=4),
    "streaming-llm": StreamingLLM(budget=9, num_sinks=2),
    "random": Random(budget=12, seed=5),
    "half of all seen": KNorm(budget=0.5),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
each_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (N + 20,), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids, calls):
    """Feed one row of tokens in calls of the given lengths; give the logits of all."""
    with torch.inference_mode():
        return torch.cat([model(part[None], **with_cache(model, cache)).logits[0] for part in ids.split(calls)])


def greedy(model, ids, num_new=8, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **options)


def assert_keeps(cache, kept):
    for number, layer in enumerate(cache.layers):
        assert [[p for p in row if p >= 0] for row in layer.true_positions[0].tolist()] == kept[number]


@each_policy
@each_implementation
def test_evicting_again_and_again_equals_the_slow_reference(model, ids, policy, implementation):
    """A prompt, then calls of several lengths, with an eviction whenever 4 tokens have come."""
    model.set_attn_implementation(implementation)
    calls = [N, 1, 1, 1, 1, 3, 2, 7, 1, 3]
    with observing(model):
        cache = EvictingCache(policy, every=4)
        logits = read(model, cache, ids, calls)
    expected, kept = reference_logits(model, ids, policy, calls, every=4)

    assert_close(logits, expected)
    assert_keeps(cache, kept)
    assert [layer.num_evictions for layer in cache.layers] == [5] * 3


@each_policy
def test_a_prompt_in_chunks_equals_the_slow_reference(model, ids, policy):
    calls = [12] * 5
    with observing(model):
        cache = EvictingCache(policy, every=12)
        logits = read(model, cache, ids, calls)
    expected, kept = reference_logits(model, ids, policy, calls, every=12)

    assert_close(logits, expected)
    assert_keeps(cache, kept)


@each_policy
def test_left_padded_rows_evict_like_rows_alone(model, ids, policy):
    """Decoding with evictions, in a batch with padding: every row as if it were alone."""
    if isinstance(policy.budget, float) or isinstance(policy, Random):
        pytest.skip("a share of the tokens, or a random draw, is another in a row with padding")
    pads = [0, 5, 11]
    prompts = torch.stack([ids[:N], ids[7 : N + 7], ids[15 : N + 15]])
    mask = torch.stack([(torch.arange(N) >= pad).long() for pad in pads])
    with evicting(model, policy, every=3):
        batch = greedy(model, prompts * mask, 12, attention_mask=mask)
        for row, pad in enumerate(pads):
            alone = greedy(model, prompts[row : row + 1, pad:], 12)
            assert batch[row, N:].tolist() == alone[0, N - pad :].tolist()


def test_a_chunked_prefill_of_generate_stores_no_more_than_budget_and_chunk(model, ids, monkeypatch):
    most = []
    update = EvictingCache.update

    def watch(cache, *args, **kwargs):
        result = update(cache, *args, **kwargs)
        most.append(result[0].shape[-2])
        return result

    monkeypatch.setattr(EvictingCache, "update", watch)
    with evicting(model, SNAPKV, every=8):
        out = greedy(model, ids[None], 20, prefill_chunk_size=8)

    assert out.shape == (1, N + 20 + 20)
    assert max(most) == 14 + 8


def bytes_alive():
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [(GraphKV(H2O(budget=12)), 10_000), (SNAPKV, 500), (AdaKV(SNAPKV), 500), (CAKE(budget=14, window=6), 500)],
    ids=["h2o+graphkv", "snapkv", "adakv", "cake"],
)
def test_ten_thousand_steps_take_constant_memory(policy, steps):
    model = tiny_llama(num_hidden_layers=1, hidden_size=12, num_attention_heads=2, num_key_value_heads=1, vocab_size=11)
    sizes, stored = [], []
    with observing(model), torch.inference_mode():
        cache = EvictingCache(policy, every=50)
        token = model(torch.arange(1, 10)[None], **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        for step in range(1, steps + 1):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            if step % (steps // 5) == 0:
                # A multiple of `every`: eviction has just run.
                sizes.append(bytes_alive())
                stored.append(cache.layers[0].num_stored)

    assert cache.get_seq_length() == 9 + steps
    assert stored == [stored[0]] * 5
    assert stored[0] <= policy.budget
    assert sizes == [sizes[0]] * 5


def test_a_cache_stays_at_its_budget_for_every_policy(model, ids):
    for name, policy in POLICIES.items():
        with observing(model):
            cache = EvictingCache(policy, every=1)
            read(model, cache, ids, [N] + [1] * 20)
        kept = [sum(p >= 0 for row in layer.true_positions[0].tolist() for p in row) for layer in cache.layers]
        total = 3 * 2 * budgets.tokens_of(policy.budget, N + 20)
        # Whole blocks may leave a part of the budget empty, in each of 3 layers and 2 heads.
        room = 3 * 2 * (getattr(policy, "block", 1) - 1)
        least = 1 if policy.needs().automatic else total - room
        assert least <= sum(kept) <= total, name


@each_implementation
@pytest.mark.parametrize("base", [SNAPKV, KNorm(budget=12)])
def test_heads_keep_what_they_were_given(model, ids, base, implementation):
    """Ada-KV: slots that a head does not use are masked, and hold no memory beyond the widest head."""
    model.set_attn_implementation(implementation)
    with observing(model):
        cache = EvictingCache(AdaKV(base), record=True)
        read(model, cache, ids[:N], [N])

    for layer in cache.layers:
        (decision,) = layer.record.decisions
        counts = (layer.positions >= 0).sum(-1)
        assert counts.tolist() == decision.counts.tolist()
        assert int(counts.sum()) == 2 * base.budget
        assert layer.num_stored == int(counts.max())
        assert torch.equal(layer.valid, layer.positions >= 0)
    assert any(len(set((layer.positions >= 0).sum(-1)[0].tolist())) > 1 for layer in cache.layers)


def test_cake_gives_layers_what_they_prefer(model, ids):
    policy = CAKE(budget=14, window=6, kernel_size=3)
    rows = torch.stack([ids[:N], ids[20 : N + 20]])
    with evicting(model, policy), torch.inference_mode():
        both = cache_of(model(rows))
        alone = [cache_of(model(row[None])) for row in rows]

    for row, cache in enumerate(alone):
        budgets = [layer.num_stored for layer in cache.layers]
        assert sum(budgets) == 3 * 14
        assert len(set(budgets)) > 1
        # The batch is as wide as its widest row; the row keeps what it keeps alone.
        for layer, single in zip(both.layers, cache.layers, strict=True):
            assert layer.positions[row][:, -single.num_stored :].tolist() == single.positions[0].tolist()
            assert not layer.valid[row][:, : layer.num_stored - single.num_stored].any()


def test_another_policy_does_not_inherit_the_budgets_of_cake(model, ids):
    with observing(model):
        cache = EvictingCache(num_queries=6)
        read(model, cache, ids[:N], [N])
        cache.evict(CAKE(budget=20, window=6, kernel_size=3))
        assert len({layer.num_stored for layer in cache.layers}) > 1
        cache.evict(KNorm(budget=9))
        assert [layer.num_stored for layer in cache.layers] == [9] * 3


def test_a_cache_gives_its_memory_back_at_once(model, ids):
    """Not when the garbage collector comes, which counts objects and no bytes."""
    gc.disable()
    try:
        with observing(model):
            cache = EvictingCache(num_queries=6)
            read(model, cache, ids[:N], [N])
            cache.evict(CAKE(budget=20, window=6, kernel_size=3))
            cache.activate_past_recording()
        caches = [weakref.ref(each) for each in (cache, cache.copy())]
        del cache
        assert [each() for each in caches] == [None, None]
    finally:
        gc.enable()


def test_turns_are_evicted_too(model, ids):
    """A second question on an evicted cache, with the whole history passed again."""
    policy = POLICIES["snapkv+graphkv"]
    calls = [N, *[1] * 7, 6, *[1] * 4]
    with evicting(model, policy, every=5):
        cache = EvictingCache(policy, every=5)
        first = greedy(model, ids[None, :N], **with_cache(model, cache))
        history = torch.cat([first, ids[None, N : N + 5]], dim=1)
        second = greedy(model, history, 5, **with_cache(model, cache))

    assert cache.get_seq_length() == N + 8 + 5 + 4
    expected, kept = reference_logits(model, second[0, :-1], policy, calls, every=5)
    assert second[0, N:].tolist()[-5:] == expected[-5:].argmax(-1).tolist()
    assert_keeps(cache, kept)


@each_policy
def test_beams_carry_their_sums_and_positions(model, ids, policy):
    rows = torch.stack([ids[:N], ids[20 : N + 20]])
    with evicting(model, policy, every=3):
        batch = greedy(model, rows, num_beams=3)
        alone = greedy(model, rows[1:], num_beams=3)

    assert batch[1].tolist() == alone[0].tolist()


@each_policy
def test_rows_that_are_repeated_and_selected_go_on_as_before(model, ids, policy):
    rows = torch.stack([ids[:N], ids[20 : N + 20], ids[10 : N + 10]])
    with observing(model), torch.inference_mode():
        cache = EvictingCache(policy, every=2)
        model(rows, **with_cache(model, cache))
        twin = cache.copy()
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([5, 2]))
        steps = torch.tensor([[3, 4, 5, 6, 7], [4, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
        for step in steps.T[:, :, None]:
            whole = model(step, **with_cache(model, cache)).logits
            part = model(step[[2, 1]], **with_cache(model, twin)).logits
            torch.testing.assert_close(part, whole[[2, 1]], rtol=1e-5, atol=1e-5)


# Rollbacks.


def test_crop_takes_back_what_came_since_the_eviction(model, ids):
    with observing(model):
        cache, straight = EvictingCache(SNAPKV), EvictingCache(SNAPKV)
        read(model, cache, ids[: N + 5], [N, 5])
        cache.crop(-3)
        assert cache.get_seq_length() == N + 2
        cache.crop(N + 1)
        again = read(model, cache, ids[N + 1 : N + 9], [8])
        read(model, straight, ids[: N + 1], [N, 1])
        expected = read(model, straight, ids[N + 1 : N + 9], [8])

    assert_close(again, expected)


def test_crop_refuses_to_cross_an_eviction_and_changes_nothing(model, ids):
    with observing(model):
        cache = EvictingCache(SNAPKV)
        read(model, cache, ids[: N + 5], [N, 5])
        before = cache.copy()
        for argument in (-6, N - 1):
            with pytest.raises(ArgumentError, match="at most the 5 tokens since the last eviction; got 6"):
                cache.crop(argument)
        assert_close(read(model, cache, ids[N + 5 : N + 9], [4]), read(model, before, ids[N + 5 : N + 9], [4]))


def test_crop_of_a_cache_that_dropped_nothing_goes_back_all_the_way(model, ids):
    with observing(model):
        cache = EvictingCache(SnapKV(budget=100))
        read(model, cache, ids[:N], [N])
        cache.crop(-30)
        assert_close(read(model, cache, ids[10:], [50]), read(model, EvictingCache(), ids, [60])[10:])


@pytest.mark.parametrize("policy", [SNAPKV, GraphKV(H2O(budget=12)), KNorm(budget=12)], ids=["snapkv", "h2o", "knorm"])
@pytest.mark.parametrize("every", [None, 4])
def test_assisted_decoding_gives_what_plain_decoding_gives(model, ids, policy, every):
    """The assistant guesses wrong most of the time, so almost every step is rolled back."""
    assistant = tiny_llama(seed=1)
    with observing(model):
        plain = greedy(model, ids[None, :N], 12, **with_cache(model, EvictingCache(policy)))
        cache = EvictingCache(policy, every=every)
        # transformers calls this itself from 5.20 on.
        cache.activate_past_recording()
        assisted = greedy(model, ids[None, :N], 12, **with_cache(model, cache), assistant_model=assistant)

    if every is None:
        assert assisted.tolist() == plain.tolist()
    assert assisted.shape == plain.shape
    assert cache.layers[0].num_evictions == 1 if every is None else cache.layers[0].num_evictions >= 3
    assert cache.layers[0].num_stored <= policy.budget + 12


def test_prompt_lookup_decoding_gives_what_plain_decoding_gives(model):
    """Guesses come from the prompt; here they are often right."""
    prompt = torch.tensor([[5, 6, 7, 8, 9] * 8])
    # transformers 5.2 looks guesses up among the stop tokens, and falls over where there is none.
    stop = {"eos_token_id": 96, "pad_token_id": 0}
    with observing(model):
        plain = greedy(model, prompt, 12, **with_cache(model, EvictingCache(SNAPKV)), **stop)
        cache = EvictingCache(SNAPKV)
        cache.activate_past_recording()
        guessed = greedy(model, prompt, 12, **with_cache(model, cache), prompt_lookup_num_tokens=3, **stop)

    assert guessed.shape[1] == 40 + 12
    assert guessed.tolist() == plain.tolist()


@pytest.mark.parametrize("seed", [0, 1], ids=["guesses that are right", "guesses that are wrong"])
def test_assisted_decoding_inside_a_block_gives_what_plain_decoding_gives(model, ids, seed):
    """Guesses come with the prompt; they see what was kept of it, and the eviction does not see them."""
    with evicting(model, SNAPKV):
        expected = greedy(model, ids[None, :N], 15)
        found = greedy(model, ids[None, :N], 15, assistant_model=tiny_llama(seed=seed))
    assert torch.equal(found, expected)


# Turned keys.


def rotate(x, positions, theta=10000.0):
    """Rotary embedding from its definition, x (tokens, D)."""
    half = x.shape[-1] // 2
    angle = torch.tensor(positions)[:, None].double() * theta ** (-torch.arange(half).double() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


class TurnedKeys:
    """The keys of a Llama at any positions, recomputed from what the key projection gives."""

    def __init__(self, model):
        self.raw = {}
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.k_proj.register_forward_hook(lambda _, __, out, number=number: self.note(number, out))
        self.size = model.model.layers[0].self_attn.head_dim

    def note(self, layer, out):
        self.raw[layer] = out[0].view(out.shape[1], -1, self.size).transpose(0, 1).double()

    def __call__(self, layer, head, tokens, positions):
        return rotate(self.raw[layer][head, tokens], positions)


@pytest.mark.parametrize("name", ["snapkv", "snapkv+graphkv", "knorm", "h2o", "adakv", "keydiff"])
def test_turned_keys_equal_recomputed_rotary_embeddings(ids, name):
    model, policy = tiny_llama(), POLICIES[name]
    calls = [N, 1, 1, 3, 2, 7, 1, 1, 1, 3]
    with observing(model):
        cache = EvictingCache(policy, every=4, rerotate=True)
        logits = read(model, cache, ids, calls)
        plain = read(model, EvictingCache(policy, every=4), ids, calls)
    turned = TurnedKeys(model)
    expected, kept = reference_logits(model, ids, policy, calls, every=4, turned_keys=turned)

    assert_close(logits, expected)
    assert_keeps(cache, kept)
    assert not torch.allclose(logits, plain, atol=1e-2)
    for number, layer in enumerate(cache.layers):
        for head in range(2):
            tokens = kept[number][head]
            where = layer.places[0, head, -len(tokens) :, 0].tolist()
            assert where == list(range(N + 20 - len(tokens), N + 20))
            keys = turned(number, head, tokens, where).float()
            torch.testing.assert_close(layer.keys[0, head, -len(tokens) :], keys, rtol=1e-5, atol=1e-4)


def gemma3_full_first():
    return FAMILIES["gemma3-mixed"](layer_types=["full_attention", "sliding_attention"] * 2)


@pytest.mark.parametrize(
    "make",
    [FAMILIES[name] for name in ("llama", "qwen3", "phi3", "gpt-neox")] + [gemma3_full_first],
    ids=["llama", "qwen3", "phi3", "gpt-neox", "gemma3"],
)
def test_a_turn_is_the_models_own_rotation(make, ids):
    """Keys of the first layer do not depend on what came before: those of a text that starts later are the same."""
    model = make()
    with observing(model), torch.inference_mode():
        cache = EvictingCache(StreamingLLM(budget=10, num_sinks=4), rerotate=True)
        model(ids[None, :N], **with_cache(model, cache))
        later = EvictingCache()
        text = torch.cat([ids[:4], ids[N - 6 : N]])[None]
        model(text, position_ids=torch.arange(N - 10, N)[None], **with_cache(model, later))

    assert cache.layers[0].evicts
    torch.testing.assert_close(cache.layers[0].keys, later.layers[0].keys, rtol=1e-4, atol=1e-4)


def test_yarn_is_turned_without_being_scaled_twice(ids):
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    model = tiny_llama(rope_parameters=yarn)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(StreamingLLM(budget=10, num_sinks=4), rerotate=True)
        model(ids[None, :N], **with_cache(model, cache))
        later = EvictingCache()
        text = torch.cat([ids[:4], ids[N - 6 : N]])[None]
        model(text, position_ids=torch.arange(N - 10, N)[None], **with_cache(model, later))

    torch.testing.assert_close(cache.layers[0].keys, later.layers[0].keys, rtol=1e-4, atol=1e-4)


def test_keys_that_cannot_be_turned_are_refused(ids):
    for family in ("opt", "gpt2"):
        model = FAMILIES[family]()
        with evicting(model, SNAPKV, rerotate=True), pytest.raises(ArgumentError, match="takes no rotary embedding"):
            model(ids[None, :N])
    dynamic = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with evicting(dynamic, SNAPKV, rerotate=True), pytest.raises(ArgumentError, match="depend on the length"):
        dynamic(ids[None, :N])


# Sampling, copies, compilation.


def test_sampling_with_a_seed_is_repeatable_and_equals_sampling_from_the_reference(model, ids):
    def sample():
        torch.manual_seed(11)
        with evicting(model, SNAPKV, every=4):
            return model.generate(
                ids[None, :N], attention_mask=torch.ones(1, N).long(), max_new_tokens=10, do_sample=True, top_k=0
            )

    out = sample()
    assert sample().tolist() == out.tolist()
    torch.manual_seed(11)
    seen = ids[:N]
    for step in range(10):
        logits, _ = reference_logits(model, seen, SNAPKV, [N] + [1] * step, every=4)
        seen = torch.cat([seen, torch.multinomial(logits[-1:].softmax(-1), 1)[0]])
    assert out[0].tolist() == seen.tolist()


def test_a_deep_copy_goes_its_own_way(model, ids):
    with observing(model):
        cache = EvictingCache(SNAPKV, every=4)
        read(model, cache, ids[:N], [N])
        twin = copy.deepcopy(cache)
        expected = read(model, cache, ids[N:], [20])
        assert_close(read(model, twin, ids[N:], [20]), expected)


@pytest.mark.parametrize("policy", [SNAPKV, H2O(budget=12), AdaKV(SNAPKV), SnapKV(budget=100)])
def test_a_cache_can_be_saved_and_loaded(model, ids, policy, tmp_path):
    with observing(model):
        cache = EvictingCache(policy, every=4)
        read(model, cache, ids[:N], [N])
        torch.save(cache, tmp_path / "cache.pt")
        expected = read(model, cache, ids[N:], [4, 1, 15])
        loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
        assert loaded.policy == policy
        assert_close(read(model, loaded, ids[N:], [4, 1, 15]), expected)


def test_a_model_may_run_under_our_attention_for_good(ids):
    """Without a context manager: the cache alone decides."""
    model = tiny_llama()
    with evicting(model, SNAPKV, every=4):
        expected = greedy(model, ids[None, :N], 12)
    model.set_attn_implementation("graphkv_sdpa")
    cache = EvictingCache(SNAPKV, every=4)

    assert greedy(model, ids[None, :N], 12, **with_cache(model, cache)).tolist() == expected.tolist()
    assert cache.layers[0].num_evictions == 3
    assert greedy(model, ids[None, :N], 12).tolist() != expected.tolist()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_gives_what_it_gives_uncompiled(ids):
    """The model is cut at the cache; a graph without cuts is refused, and says where."""
    model = tiny_llama()
    # Beyond its limit torch would run the rest uncompiled: since 5.24 all forwards share the code of one wrapper.
    with torch._dynamo.config.patch(recompile_limit=64), observing(model):
        expected_cache, cache = EvictingCache(SNAPKV, every=4), EvictingCache(SNAPKV, every=4)
        calls = [N] + [1] * 10
        expected = read(model, expected_cache, ids[: N + 10], calls)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", dynamic=True)
        assert_close(read(compiled, cache, ids[: N + 10], calls), expected)
        assert [layer.num_evictions for layer in cache.layers] == [3] * 3
        # Each layer has its pieces: before the cache, and after it for the prompt and for tokens.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 20
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"EvictingCache\.update|_Hooks\.before"):
            read(whole, EvictingCache(SNAPKV), ids[:N], [N])
    torch._dynamo.reset()


# Misuse.


def test_growth_after_the_only_eviction_is_warned_about_once(model, ids):
    with observing(model):
        cache = EvictingCache(SNAPKV)
        read(model, cache, ids[: N + 14], [N, 14])
        with pytest.warns(GraphKVWarning, match=r"15 tokens have come since the only eviction.*every="):
            read(model, cache, ids[N + 14 : N + 15], [1])
        read(model, cache, ids[N + 15 :], [5])
        # In chunks, the second chunk shows it.
        with pytest.warns(GraphKVWarning, match="20 tokens have come"):
            read(model, EvictingCache(SNAPKV), ids, [20, 20, 20])


def test_a_cache_outside_of_our_attention_is_refused(model, ids):
    with pytest.raises(ArgumentError, match=r"runs neither inside evicting\(\) or observing\(\) nor with"):
        model(ids[None, :N], **with_cache(model, EvictingCache(SNAPKV)))


def test_a_single_layer_outside_of_our_attention_is_refused_at_the_next_call(ids):
    model, cache = tiny_llama(num_hidden_layers=1), EvictingCache(SNAPKV)
    model(ids[None, :N], **with_cache(model, cache))
    with pytest.raises(ArgumentError, match="finished forward pass"):
        model(ids[None, N:], **with_cache(model, cache))


class Broken(Policy):
    """Fails in the second layer, from the second eviction on."""

    def score(self, layer, memory, /):
        if layer.layer == 1 and layer.num_tokens < N:
            raise RuntimeError("broken policy")
        return layer.keys[..., 0]


def test_a_cache_that_an_exception_left_unfinished_is_refused(model, ids):
    with observing(model):
        cache = EvictingCache(Broken(budget=5), every=1)
        read(model, cache, ids[:N], [N])
        with pytest.raises(RuntimeError, match="broken policy"):
            read(model, cache, ids[N:], [1] * 20)
        for use in (lambda: read(model, cache, ids[N:], [20]), lambda: cache.evict(SNAPKV)):
            with pytest.raises(ArgumentError, match="finished forward pass"):
                use()
        cache.reset()
        read(model, cache, ids[:N], [N])
        assert cache.get_seq_length() == N


def test_a_larger_budget_than_what_is_left_is_refused(model, ids):
    with observing(model):
        cache = EvictingCache(num_queries=N)
        read(model, cache, ids[:N], [N])
        cache.evict(KNorm(budget=10))
        before = [layer.keys for layer in cache.layers]
        with pytest.raises(ArgumentError, match="more tokens than the 10 that an earlier eviction left"):
            cache.evict(KNorm(budget=11))
        assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))
        cache.evict(KNorm(budget=6))
        assert [layer.num_stored for layer in cache.layers] == [6] * 3
    with evicting(model, KNorm(budget=7)), pytest.raises(ArgumentError, match="must have the policy of evicting"):
        read(model, EvictingCache(KNorm(budget=6)), ids, [60])
    with pytest.raises(AttributeError):
        cache.policy = KNorm(budget=7)


def test_bad_arguments_are_named(model, ids):
    for arguments, error, message in (
        ({"every": 0}, ArgumentError, "every must be at least 1; got 0"),
        ({"every": 2.0}, ArgumentTypeError, "every must be an integer; got 2.0"),
        ({"rerotate": "yes"}, ArgumentTypeError, "rerotate must be True or False; got 'yes'"),
        ({"record": 1}, ArgumentTypeError, "record must be True or False; got 1"),
    ):
        with pytest.raises(error, match=message):
            EvictingCache(SNAPKV, **arguments)
    with observing(model):
        cache = EvictingCache()
        read(model, cache, ids, [60])
        with pytest.raises(ArgumentError, match="policy must be given"):
            cache.evict()
        with pytest.raises(ArgumentError, match=r"attention_mask must have one column for each of 63 tokens"):
            model(ids[None, :3], **with_cache(model, cache), attention_mask=torch.tensor([[0] * 7]))


class Compressed(DynamicCache):
    """Stands in for quantized and offloaded caches, which are made from a dynamic one."""


def test_caches_of_another_kind_are_refused_before_anything_runs(model, ids):
    cache = Compressed()
    with (
        evicting(model, SNAPKV),
        pytest.raises(ArgumentError, match=r"must be None, an empty DynamicCache .*got Compressed"),
    ):
        model(ids[None, :N], **with_cache(model, cache))
    assert cache.get_seq_length() == 0


def test_configurations_that_cannot_work_are_refused():
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ArgumentError, match=r"encoder-decoder|'sdpa' or 'eager'"), evicting(t5, SNAPKV):
        pass
    bloom = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(ArgumentError, match="attention"), evicting(bloom, SNAPKV):
        pass
    odd = tiny_llama()
    odd.config.layer_types = ["full_attention", "indexed_attention", "full_attention"]
    with (
        pytest.raises(
            ArgumentError,
            match=r"kinds that can be evicted or left alone; LlamaForCausalLM has \['indexed_attention'\]",
        ),
        evicting(odd, SNAPKV),
    ):
        pass


@pytest.mark.parametrize(
    "policy", [SnapKV(budget=7, window=6, num_sinks=2), GraphKV(PyramidKV(budget=7, window=6, num_sinks=2, beta=4))]
)
def test_a_window_that_evictions_would_cut_is_refused_before_anything_is_read(policy):
    message = r"^every must be at least 6, or the budget at least 8, for window and sinks of .*; got 5 and 7$"
    with pytest.raises(ArgumentError, match=message):
        EvictingCache(policy, every=5)


@pytest.mark.parametrize("budget", [0.2, 0.1])
def test_of_shares_it_is_refused_at_the_first_eviction(model, ids, budget):
    """The prompt's, so that no answer breaks off."""
    cache = EvictingCache(SnapKV(budget=budget, window=9), every=5)
    with observing(model), torch.inference_mode(), pytest.raises(ArgumentError, match="every must be at least 9"):
        model(ids[None, :N], **with_cache(model, cache))


@pytest.mark.filterwarnings("ignore:.* leave nothing of the budget")
@pytest.mark.parametrize(("budget", "every"), [(6, 1), (5, 6), (0, 1)])
def test_what_evictions_do_not_cut_goes_on(model, ids, budget, every):
    cache = EvictingCache(SnapKV(budget=budget, window=6), every=every)
    with observing(model), torch.inference_mode():
        for part in (ids[:N], *ids[N : N + 2 * every + 1].split(1)):
            model(part[None], **with_cache(model, cache))
    assert cache.num_seen == N + 2 * every + 1
