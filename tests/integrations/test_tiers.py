"""Tokens in fewer bits in a model's cache: what attention reads, what is stored, and that nothing comes back."""

import numpy as np
import pytest
import torch

from graphkv import H2O, Absorb, AdaKV, ArgumentError, Decay, GraphKV, KNorm, MiKV, Precision, SnapKV, evict
from graphkv.backends.torch import BACKEND as TORCH
from graphkv.core.precision import demote, key_balance, peaks
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.tiers import TieredSlots, Tiers, packed, unpacked
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_llama

N, D = 30, 8
SNAPKV = SnapKV(budget=12, window=4, kernel_size=3)
POLICIES = {
    "all": MiKV(KNorm(budget=12)),
    "two bits": MiKV(SNAPKV, low_bits=2, balanced=False),
    "equal bytes": MiKV(SNAPKV, high=6, low_bits=3, group=4, full_bits=32),
    "heads": MiKV(AdaKV(SNAPKV), high=0.5, low_bits=8, full_bits=32),
    "sums": MiKV(H2O(budget=12), high=0.25, full_bits=32),
    "graph": GraphKV(MiKV(GraphKV(SNAPKV), high=5), Decay(neighbors=1)),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, N + 12), generator=torch.Generator().manual_seed(3))


def read(model, cache, ids, mask=None, **options):
    options |= {} if mask is None else {"attention_mask": mask}
    with observing(model), torch.inference_mode():
        return model(ids, **with_cache(model, cache), **options).logits


def demoted_by_core(full, policy):
    """What the core decides over a full cache, and how its keys and values then read."""
    result = []
    for number, layer in enumerate(full.layers):
        done = evict(
            policy, layer.keys, values=layer.values, queries=layer.queries, layer=number, num_layers=len(full.layers)
        )
        keys, values = done.apply(layer.keys), done.apply(layer.values)
        if done.levels is not None:
            (precision,) = done.choice.precisions
            queries = layer.queries.unflatten(1, (2, -1)).flatten(2, 3)
            balance = key_balance(peaks(queries, xp=TORCH.xp), peaks(layer.keys, xp=TORCH.xp), xp=TORCH.xp)
            keys = demote(keys, done.levels, precision, balance=balance if precision.balanced else None)
            values = demote(values, done.levels, precision)
        result.append((done, keys, values))
    return result


def of_heads(tensor, positions):
    """The rows of a layer by head, without what is unused."""
    return [[row[at >= 0] for row, at in zip(*pair, strict=True)] for pair in zip(tensor, positions, strict=True)]


@each_policy
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_reads_what_the_core_demotes(model, ids, policy, implementation):
    model.set_attn_implementation(implementation)
    full, cache = EvictingCache(num_queries=N), EvictingCache(policy)
    for each in (full, cache):
        read(model, each, ids[:, :N])

    expected = demoted_by_core(full, policy)

    for layer, (done, keys, values) in zip(cache.layers, expected, strict=True):
        kept = done.kept
        for pair in zip(layer.true_positions.flatten(0, 1), kept.flatten(0, 1), strict=True):
            mine, its = (row[row >= 0].tolist() for row in pair)
            assert mine == its
        for ours, theirs in ((layer.keys, keys), (layer.values, values)):
            for mine, its in zip(of_heads(ours, layer.true_positions), of_heads(theirs, kept), strict=True):
                for one, other in zip(mine, its, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert isinstance(layer.slots, TieredSlots)
    if all(done.counts is None for done, _, _ in expected):
        # A cache that holds these keys and values as they are goes on alike.
        plain = full.with_stored([(keys, values) for _, keys, values in expected])
        for start, stop in ((N, N + 1), (N + 1, N + 4)):
            found, reference = (read(model, each, ids[:, start:stop]) for each in (cache, plain))
            torch.testing.assert_close(found, reference, atol=2e-4, rtol=1e-4)
    assert cache.layers[0].slots.tiers.num_appended == cache.num_seen - N


@each_policy
def test_bytes_are_those_of_the_packed_tensors(model, ids, policy):
    cache = EvictingCache(policy)
    read(model, cache, ids[:, :N])

    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        tiers = layer.slots.tiers
        precision, full, rows = tiers.precision, tiers.keys.shape[2], 2 * 2
        low = tiers.low_keys.codes.shape[2]
        row = precision.row_bytes(D, full_bits=32)
        balance = 4 * D * rows if precision.balanced else 0
        assert layer.nbytes == stats.nbytes == rows * 2 * (full * 4 * D + low * row) + balance
        assert stats.bytes_freed == rows * 2 * N * 4 * D - layer.nbytes
        assert (stats.num_kept - stats.num_demoted).max() <= full
        assert stats.num_demoted.max() <= low
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)
    kept, demoted = (
        sum(int(getattr(each, name).sum()) for each in cache.stats()) for name in ("num_kept", "num_demoted")
    )
    assert f"{demoted} of {kept} tokens in all heads are kept in {precision.bits} bits." in cache.report()
    assert "3 evictions ran in 3 of 3 layers" in cache.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equal_bytes_are_at_most_those_of_the_base_in_every_dtype(ids, dtype, bits):
    model = tiny_llama().to(dtype)
    caches = []
    for policy in (SNAPKV, MiKV(SNAPKV, high=3, low_bits=bits, full_bits=torch.finfo(dtype).bits)):
        caches.append(EvictingCache(policy))
        read(model, caches[-1], ids[:, :N])
        assert read(model, caches[-1], ids[:, N : N + 2]).isfinite().all()

    base, tiered = caches
    assert tiered.layers[0].keys.dtype == tiered.layers[0].slots.tiers.low_keys.scale.dtype == dtype
    row = 2 * Precision(bits=bits).row_bytes(D, full_bits=torch.finfo(dtype).bits)
    # What is left over holds no token more.
    assert 0 <= base.layers[0].nbytes - tiered.layers[0].nbytes < 4 * row
    assert tiered.layers[0].num_stored > base.layers[0].num_stored


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 24])
def test_codes_are_packed_without_gaps(bits, size):
    codes = torch.randint(0, 2**bits, (2, 1, 3, size), dtype=torch.uint8)
    precision = Precision(bits=bits)

    stored = packed(codes, precision)

    assert stored.dtype == torch.uint8
    assert torch.equal(unpacked(stored, size, precision), codes)
    assert stored.shape[-1] == precision.row_bytes(size) - 2 * 2
    # One long number, the first code in its lowest bits.
    for row in np.ndindex(2, 1, 3):
        number = sum(int(code) << (bits * place) for place, code in enumerate(codes[row]))
        assert int.from_bytes(bytes(stored[row].tolist()), "little") == number


def by_position(layer):
    """Codes and scales of every demoted token, by row, head and position."""
    tiers, found = layer.slots.tiers, {}
    for row, head, slot in torch.nonzero(tiers.is_low).tolist():
        position, place = int(layer.true_positions[row, head, slot]), int(tiers.order[row, head, slot])
        if position >= 0:
            found[row, head, position] = [
                getattr(each, name)[row, head, place].tolist()
                for each in (tiers.low_keys, tiers.low_values)
                for name in ("codes", "scale", "offset")
            ]
    return found


@pytest.mark.parametrize("name", ["all", "equal bytes", "heads", "sums"])
def test_a_demoted_token_keeps_its_bits_and_never_comes_back(model, ids, name):
    cache = EvictingCache(POLICIES[name], every=4)
    read(model, cache, ids[:, :N])
    before = [by_position(layer) for layer in cache.layers]
    balance = cache.layers[0].slots.tiers.balance
    for start in range(N, N + 12):
        read(model, cache, ids[:, start : start + 1])

    assert [layer.num_evictions for layer in cache.layers] == [4] * 3
    for layer, old in zip(cache.layers, before, strict=True):
        now, still = by_position(layer), 0
        for row in range(2):
            for head in range(2):
                for position in layer.true_positions[row, head].tolist():
                    if (row, head, position) in old:
                        still += 1
                        assert now[row, head, position] == old[row, head, position]
        assert still
        assert len(now) > still
    assert balance is None or torch.equal(cache.layers[0].slots.tiers.balance, balance)
    if name == "all":
        # Nothing was dropped, so heads stay at what they may keep as it is, or below it.
        assert cache.layers[0].num_stored == N + 12
        assert (cache.stats()[0].num_kept - cache.stats()[0].num_demoted).max() <= 12


def test_other_policies_leave_demoted_tokens_demoted(model, ids):
    cache = EvictingCache(num_queries=N)
    read(model, cache, ids[:, :N])
    cache.evict(MiKV(SNAPKV))
    before = by_position(cache.layers[0])

    cache.evict(KNorm(budget=20))

    now = by_position(cache.layers[0])
    assert cache.layers[0].num_stored == 20
    assert now
    assert all(before[key] == bits for key, bits in now.items())
    with pytest.raises(
        ArgumentError, match=r"policy must demote tokens as an earlier eviction did, to .*bits=4.*bits=2"
    ):
        cache.evict(MiKV(KNorm(budget=8), low_bits=2))


@pytest.mark.parametrize("name", ["all", "equal bytes", "sums", "heads"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(model, ids, name, side):
    policy, mask = POLICIES[name], torch.ones(2, N, dtype=torch.long)
    pads = slice(0, 5) if side == "left" else slice(N - 5, N)
    mask[1, pads] = 0
    together, alone = EvictingCache(policy), EvictingCache(policy)
    read(model, together, ids[:, :N], mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    read(model, alone, ids[1:, :N][mask[1:] == 1][None])

    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        valid = ours.valid[1]
        for head in range(2):
            mine = valid[head] & (ours.true_positions[1, head] >= 0)
            its = theirs.true_positions[0, head] >= 0
            offset = 5 if side == "left" else 0
            assert (
                ours.true_positions[1, head][mine].tolist() == (theirs.true_positions[0, head][its] + offset).tolist()
            )
            torch.testing.assert_close(ours.keys[1, head][mine], theirs.keys[0, head][its], atol=1e-4, rtol=1e-3)


@each_policy
def test_rows_copies_and_crops_go_along(model, ids, policy):
    cache = EvictingCache(policy)
    read(model, cache, ids[:, :N])
    expected, before = read(model, cache.copy(), ids[:, N : N + 1]), [layer.keys for layer in cache.layers]

    swapped = cache.copy()
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(read(model, swapped, ids[[1, 0], N : N + 1]), expected[[1, 0]])
    wide = cache.copy()
    wide.batch_repeat_interleave(2)
    wide.batch_select_indices(torch.tensor([0, 3]))
    torch.testing.assert_close(read(model, wide, ids[:, N : N + 1]), expected)
    cropped = cache.copy()
    read(model, cropped, ids[:, N + 3 : N + 7])
    cropped.crop(-4)
    assert cropped.nbytes == cache.nbytes
    torch.testing.assert_close(read(model, cropped, ids[:, N : N + 1]), expected)
    with pytest.raises(ArgumentError, match="crop must remove at most the 0 tokens since the last eviction; got 1"):
        cache.crop(-1)
    together = EvictingCache.stacked([cache, cache])
    torch.testing.assert_close(read(model, together, ids[[0, 1, 0, 1], N : N + 1]), expected[[0, 1, 0, 1]])
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_beams_and_long_answers_run(model, ids):
    with evicting(model, POLICIES["equal bytes"], every=3), torch.inference_mode():
        found = model.generate(ids[:, :N], num_beams=3, max_new_tokens=9, do_sample=False)

    assert found.shape == (2, N + 9)


def test_eight_bits_are_close_and_two_bits_are_not(model, ids):
    full = EvictingCache()
    read(model, full, ids[:, :N])
    expected, errors = read(model, full, ids[:, N : N + 1]), []
    for bits in (8, 4, 2):
        cache = EvictingCache(MiKV(SNAPKV, low_bits=bits))
        read(model, cache, ids[:, :N])
        errors.append(float((read(model, cache, ids[:, N : N + 1]) - expected).abs().mean()))

    assert errors[0] < errors[1] < errors[2]


def test_what_cannot_be_is_refused(model, ids):
    with pytest.raises(ArgumentError, match="rerotate must be False for a policy that keeps tokens in fewer bits; got"):
        EvictingCache(MiKV(SNAPKV), rerotate=True)
    cache = EvictingCache()
    read(model, cache, ids[:, :N])
    with pytest.raises(ArgumentError, match="the cache must have seen queries to balance the keys"):
        cache.evict(MiKV(KNorm(budget=9)))
    for wrap in (lambda base: Absorb(MiKV(base)), lambda base: MiKV(Absorb(base))):
        with pytest.raises(
            ArgumentError, match="policy must either merge tokens or keep them in fewer bits in a model's"
        ):
            cache.evict(wrap(KNorm(budget=9)))
    cache.evict(MiKV(KNorm(budget=9), balanced=False))
    with pytest.raises(
        ArgumentError, match="policy must not merge tokens of which some are kept in fewer bits; got Absorb"
    ):
        cache.evict(Absorb(KNorm(budget=8)))


@each_policy
def test_a_file_holds_the_packed_bits(model, ids, policy, tmp_path):
    cache = EvictingCache(policy, every=4)
    read(model, cache, ids[:, :N])
    read(model, cache, ids[:, N : N + 2])

    cache.save(tmp_path / "cache.safetensors")
    made = EvictingCache.load(tmp_path / "cache.safetensors", model=model)

    assert made.nbytes == cache.nbytes
    assert [by_position(layer) for layer in made.layers] == [by_position(layer) for layer in cache.layers]
    for start in range(N + 2, N + 8):
        found, expected = (read(model, each, ids[:, start : start + 1]) for each in (made, cache))
        assert torch.equal(found, expected)
    assert made.layers[0].num_evictions == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found | {"order": found["order"] + 99}, "tiers.order must name places among the"),
        (lambda found: found | {"low_keys.codes": found["low_keys.codes"][..., 1:]}, "low_keys.codes must have shape"),
        (
            lambda found: found | {"low_values.scale": found["low_values.scale"].int()},
            "low_values.scale must have shape",
        ),
        (lambda found: {name: x for name, x in found.items() if name != "balance"}, "tiers must hold balance, keys"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(model, ids, change, message):
    cache = EvictingCache(POLICIES["all"])
    read(model, cache, ids[:, :N])
    tiers = cache.layers[0].slots.tiers

    with pytest.raises(ArgumentError, match=message):
        Tiers.of_tensors(change(tiers.tensors()), tiers.precision, 0, "layers.0.tiers")
