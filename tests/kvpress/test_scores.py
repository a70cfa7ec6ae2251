"""Scores of policies that kvpress has too, against its own."""

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")

from kvpress import LagKVPress
from kvpress.presses.leverage_press import LeverageScorePress
from kvpress.presses.non_causal_attention_press import NonCausalAttnPress

from graphkv import Compactor, LagKV, evict
from graphkv.adapters.compactor import leverage, mutual_attention
from graphkv.backends.torch import BACKEND as TORCH


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("num_tokens", [43, 44, 60])
def test_lagkv_scores_parts_as_kvpress_does(num_tokens, across):
    keys, values = drawn(2, 3, num_tokens, 8), drawn(2, 3, num_tokens, 8, seed=1)
    press = LagKVPress(compression_ratio=0.5, n_sink=4, lag_size=8, cross_scoring=across)

    ours = evict(LagKV(budget=20, num_sinks=4, lag=8, across=across), keys, values=values).importance
    theirs = press.score(None, None, keys, values, None, {})

    scored = slice(4, 4 + ((num_tokens - 4) // 8 - 1) * 8)
    torch.testing.assert_close(ours[..., scored] / (2 if across else 1), theirs[..., scored])
    assert (theirs[..., scored.stop :] == 1).all()


def test_leverage_is_that_of_kvpress_for_its_sketch():
    keys = drawn(2, 3, 60, 16) * torch.arange(1.0, 17)
    torch.manual_seed(5)
    theirs = LeverageScorePress.compute_leverage_scores(keys, 8)
    torch.manual_seed(5)
    sketch = torch.randn(2, 3, 16, 8) / 8**0.5

    ours = leverage((keys - keys.mean(dim=-2, keepdim=True)) @ sketch, ridge=0.01, xp=TORCH.xp)

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_without_a_mask_is_that_of_kvpress():
    """In whole chunks: what it fills a short one up with takes part."""
    keys, queries = drawn(2, 3, 24, 4), drawn(2, 3, 24, 4, seed=1)
    everything = torch.ones(2, 3, 24, dtype=torch.bool)

    ours = mutual_attention(
        queries[:, :, None], keys, everything[:, :, None], everything, chunk=8, scaled=False, xp=TORCH.xp
    )

    torch.testing.assert_close(ours, NonCausalAttnPress.non_causal_chunked_attn(queries, keys, 8))


def test_compactor_blends_as_kvpress_does_for_one_head():
    """Where a batch and a head are one, so that its means and deviations are those of a head."""
    keys, values, queries = drawn(1, 1, 24, 4), drawn(1, 1, 24, 6, seed=2), drawn(1, 1, 24, 4, seed=1)
    attended = NonCausalAttnPress.non_causal_chunked_attn(queries, keys, 8) * values.norm(dim=-1)
    attended = torch.nn.functional.avg_pool1d(attended, kernel_size=3, padding=1, stride=1)
    torch.manual_seed(0)
    outlying = LeverageScorePress.compute_leverage_scores(keys, 400)

    policy = Compactor(
        budget=9, sketch=None, chunk=8, mix=0.6, centered=True, value_norm=True, num_sinks=0, num_recent=0
    )
    ours = evict(policy, keys, values=values, queries=queries).importance
    theirs = 0.6 * (outlying - outlying.mean()) / outlying.std() + (attended - attended.mean()) / attended.std()

    # Its deviation divides by N - 1. A sketch of more columns than the keys have spans the same.
    torch.testing.assert_close(ours * (23 / 24) ** 0.5, theirs, rtol=1e-2, atol=1e-2)
