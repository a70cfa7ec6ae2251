"""Right padding and holes in the mask: every row of a batch keeps what it keeps alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphkv import (
    CAKE,
    CAOTE,
    H2O,
    AdaKV,
    ChunkKV,
    ExpectedAttention,
    GraphKV,
    KeyDiff,
    Lossless,
    PyramidKV,
    RoCo,
    Shared,
    SnapKV,
)
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.report import fates, layer_stats
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_llama

SNAPKV = SnapKV(budget=12, window=4, kernel_size=3)
POLICIES = {
    "snapkv": SNAPKV,
    "snapkv+graphkv": GraphKV(SNAPKV),
    "a share": SnapKV(budget=0.3, window=4, kernel_size=3),
    "pyramidkv": PyramidKV(budget=12, window=4, kernel_size=3, beta=4),
    "cake": CAKE(budget=12, window=4, kernel_size=3),
    "h2o": H2O(budget=12, num_sinks=1, num_recent=3),
    "roco+graphkv": GraphKV(RoCo(budget=12, num_sinks=1, num_recent=3)),
    "caote+h2o": CAOTE(H2O(budget=12)),
    "adakv": AdaKV(SNAPKV),
    "adakv+h2o": AdaKV(H2O(budget=12)),
    "expected-attention": ExpectedAttention(budget=12, num_sinks=1),
    "shared": Shared(SNAPKV),
    "blocks": Shared(SNAPKV, block=4),
    "shared layers": Shared(SNAPKV, over="layers"),
    "blocks of all layers": Shared(H2O(budget=12), over="layers", block=3),
    "chunkkv": ChunkKV(SNAPKV, chunk=5, reuse=2),
    "lossless": Lossless(SnapKV(budget=20, window=4, kernel_size=3), 0.2),
    "lossless h2o": Lossless(H2O(budget=1.0), 0.1),
    "keydiff": KeyDiff(budget=12, num_sinks=1),
}
# One string per call and row, 1 for a token: none missing, left and right padding, holes in every call.
CALLS = [30, 1, 2, 5, 1, 4]
SHOWN = [
    ["1" * 30, "1", "11", "11111", "1", "1111"],
    ["0" * 5 + "1" * 25, "1", "11", "11111", "0", "0111"],
    ["1" * 21 + "0" * 9, "0", "01", "11000", "1", "1110"],
    ["1" * 9 + "0" * 4 + "1" * 14 + "000", "1", "10", "01101", "0", "0110"],
    ["10" * 15, "0", "00", "10001", "1", "1001"],
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


def masks(row):
    return [torch.tensor([each == "1" for each in call]) for call in SHOWN[row]]


def read_batch(model, cache, ids):
    """Return the logits of all rows, each at its own positions."""
    mask = torch.stack([torch.cat(masks(row)) for row in range(len(SHOWN))]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, start = [], 0
    for end in np.cumsum(CALLS):
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        logits.append(model(ids[:, start:end], **options, **with_cache(model, cache)).logits)
        start = end
    return torch.cat(logits, dim=1)


def read_alone(model, cache, ids, row, every):
    """Read the tokens of one row, and evict when the batch does."""
    logits, start, since = [], 0, every
    for length, shown in zip(CALLS, masks(row), strict=True):
        since += length
        settings = replace(cache.settings, every=1 if since >= every else 1000)
        cache.settings = settings
        for layer in cache.layers:
            layer.settings = settings
        since = 0 if since >= every else since
        tokens = ids[row, start : start + length][shown]
        if len(tokens):
            logits.append(model(tokens[None], **with_cache(model, cache)).logits[0])
        start += length
    return torch.cat(logits)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("every", "implementation"), [(1, "sdpa"), (4, "eager")])
def test_rows_with_holes_evict_like_rows_alone(model, name, every, implementation):
    policy = POLICIES[name]
    if every == 1 and name not in ("snapkv+graphkv", "adakv+h2o", "cake"):
        pytest.skip("one of each kind is enough")
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 97, (len(SHOWN), sum(CALLS)), generator=torch.Generator().manual_seed(3))
    with observing(model), torch.inference_mode():
        batch = EvictingCache(policy, every=every, record=True)
        together = read_batch(model, batch, ids)
        for row in range(len(SHOWN)):
            single = EvictingCache(policy, every=1, record=True)
            alone = read_alone(model, single, ids, row, every)
            where = torch.cat(masks(row)).nonzero()[:, 0]

            torch.testing.assert_close(together[row, where], alone, rtol=1e-4, atol=1e-4)
            for number, (ours, its) in enumerate(zip(batch.layers, single.layers, strict=True)):
                assert fates(ours)[row][:, where].tolist() == fates(its)[0].tolist()
                assert_same_report(layer_stats(number, ours), layer_stats(number, its), row, where.tolist())


def assert_same_report(batch, single, row, where):
    assert batch.num_kept[row].tolist() == single.num_kept[0].tolist()
    assert batch.num_suppressed[row].tolist() == single.num_suppressed[0].tolist()
    np.testing.assert_allclose(batch.redundancy_after[row], single.redundancy_after[0], atol=1e-4)
    ours, its = batch.suppressions, single.suppressions
    mine = ours.row == row
    assert ours.token[mine].tolist() == [where[token] for token in its.token]
    assert ours.source[mine].tolist() == [where[source] if source >= 0 else -1 for source in its.source]


def test_other_backends_see_the_same_rows(model):
    ids = torch.randint(1, 97, (len(SHOWN), sum(CALLS)), generator=torch.Generator().manual_seed(4))
    for name in ("cake", "adakv+h2o"):
        kept = []
        for backend in ("torch", "numpy"):
            with observing(model), torch.inference_mode():
                cache = EvictingCache(POLICIES[name], every=1, backend=backend)
                read_batch(model, cache, ids)
            kept.append([layer.positions.tolist() for layer in cache.layers])
        assert kept[0] == kept[1]


def test_pooling_does_not_cross_holes(model):
    """The same text with a hole in it, wherever the hole is."""
    text = torch.randint(1, 97, (30,), generator=torch.Generator().manual_seed(5))
    for at in (3, 14, 27):
        ids = torch.stack([torch.cat([text, text[:6] * 0]), torch.cat([text[:at], text[:6] * 0, text[at:]])])
        shown = torch.stack([torch.arange(36) < 30, (torch.arange(36) < at) | (torch.arange(36) >= at + 6)]).long()
        with observing(model), torch.inference_mode():
            cache = EvictingCache(SnapKV(budget=14, window=4, kernel_size=7))
            positions = (shown.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=shown, position_ids=positions, **with_cache(model, cache))
        for layer in cache.layers:
            first, second = layer.positions
            assert torch.where(second >= at + 6, second - 6, second).tolist() == first.tolist()


def test_a_crop_takes_each_row_back_to_its_own_queries(model):
    """Tokens that are taken back leave no queries behind, in rows with and without holes among them."""
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(6))
    shown = torch.ones(2, 40).long()
    shown[1, 26:30] = shown[1, 32:34] = shown[0, 35] = 0
    positions = (shown.cumsum(1) - 1).clamp(min=0)

    def read(cache, start, end):
        options = {"attention_mask": shown[:, :end], "position_ids": positions[:, start:end]}
        model(ids[:, start:end], **options, **with_cache(model, cache))

    with observing(model), torch.inference_mode():
        straight, back = (EvictingCache(num_queries=6) for _ in range(2))
        for cache in (straight, back):
            read(cache, 0, 30)
        read(back, 30, 36)
        back.crop(-6)
        for cache in (straight, back):
            read(cache, 30, 36)
            cache.evict(SNAPKV)
    for one, other in zip(straight.layers, back.layers, strict=True):
        assert one.positions.tolist() == other.positions.tolist()


def test_a_batch_with_holes_that_fits_keeps_its_tokens(model):
    ids, shown = torch.arange(1, 41).repeat(2, 1), torch.ones(2, 40).long()
    shown[1, 30:] = 0
    with observing(model), torch.inference_mode():
        cache = EvictingCache(SnapKV(budget=50, window=4))
        model(ids, attention_mask=shown, **with_cache(model, cache))
    assert [layer.valid[:, 0].sum(dim=-1).tolist() for layer in cache.layers] == [[40, 30]] * 2


def test_the_budget_is_that_of_the_rows_that_were_decided(model):
    """A row without new tokens keeps all that it has, which in one head may be more than the budget."""
    ids = torch.randint(1, 97, (2, 42), generator=torch.Generator().manual_seed(7))
    shown = torch.ones(2, 42).long()
    shown[1, 30:] = shown[0, 38:] = 0
    positions = (shown.cumsum(1) - 1).clamp(min=0)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(AdaKV(SNAPKV), every=4)
        for number, (start, end) in enumerate([(0, 30), (30, 38), (38, 42)], start=1):
            options = {"attention_mask": shown[:, :end], "position_ids": positions[:, start:end]}
            model(ids[:, start:end], **options, **with_cache(model, cache))
            assert max(int((layer.positions[1] >= 0).sum(dim=-1).max()) for layer in cache.layers) > 12
            assert [(layer.budget, layer.num_evictions) for layer in cache.layers] == [(12, number)] * 2
