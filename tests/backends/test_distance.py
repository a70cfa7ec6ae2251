"""The distance of torch, chunk by chunk, against the portable body."""

import pytest
import torch

from graphkv.backends import torch as backend
from graphkv.core.fusion import portable_distance


@pytest.fixture(params=[7, 24, 60, 1 << 18])
def size(request, monkeypatch):
    """Chunks of one token, of some, of a row and of several."""
    monkeypatch.setattr(backend, "DIRECTION_SIZE", request.param)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("kind", ["any", "nearly equal", "odd"])
def test_distance_equals_the_portable_body(kind):
    random = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 3, 11, 5, generator=random)
    valid = torch.rand(2, 3, 11, generator=random) > 0.3
    if kind == "nearly equal":
        keys = 1 + 1e-3 * keys
    if kind == "odd":
        keys[0, 0, 1], keys[0, 1, 4, 2], keys[1, 2, 3, 0], keys[1, 0, 5] = 0, torch.inf, torch.nan, 1e30
        valid[1, 1] = False
    expected = portable_distance(keys, valid, backend=backend.BACKEND)

    found = backend.distance(keys, valid, backend=backend.BACKEND)

    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9 if kind == "nearly equal" else 1e-6)
    assert (found == 1)[expected == 1].all()
