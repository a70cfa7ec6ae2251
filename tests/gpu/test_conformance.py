"""The properties of the kit, on the device."""

from __future__ import annotations

import pytest


def _devices() -> list[str]:
    found = []
    for name in ("cupy", "torch.cuda"):
        try:
            module = __import__(name, fromlist=["is_available"])
        except ImportError:
            continue
        if module.is_available():
            found.append(name)
    return found


if not _devices():
    pytest.skip("neither CuPy nor torch finds a CUDA device", allow_module_level=True)

from graphkv.testing.suite import *  # noqa: E402, F403

pytestmark = pytest.mark.gpu
