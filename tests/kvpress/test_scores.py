"""Scores of policies that kvpress has too, against its own."""

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")

from kvpress import LagKVPress

from graphkv import LagKV, evict


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
