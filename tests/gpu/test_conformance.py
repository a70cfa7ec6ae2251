"""The properties of the kit, on the device."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import found

if not found():
    pytest.skip("neither CuPy nor torch nor JAX finds a CUDA device", allow_module_level=True)

from graphkv.testing.suite import *  # noqa: F403

pytestmark = pytest.mark.gpu
