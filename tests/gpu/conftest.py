"""The backends of this folder: those whose arrays live on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from graphkv import Backend, BackendUnavailableError
from graphkv.core.backend import load


@dataclass(frozen=True)
class OnDevice:
    """A backend, and how a NumPy array gets onto the device."""

    backend: Backend
    make: Callable[[np.ndarray], Any]

    def host(self, x: Any) -> np.ndarray:
        """Return the values as a NumPy array."""
        return np.asarray(self.backend.to_numpy(x))


def _cupy() -> OnDevice:
    backend = load("cupy")
    return OnDevice(backend, backend.xp.asarray)


def _torch() -> OnDevice:
    backend = load("torch")
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError(f"torch {torch.__version__} finds no CUDA device")
    return OnDevice(backend, lambda x: torch.from_numpy(np.array(x)).to("cuda"))


DEVICES = {"cupy": _cupy, "torch-cuda": _torch}


def _on_device(name: str) -> OnDevice:
    try:
        return DEVICES[name]()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=DEVICES)
def gpu(request: pytest.FixtureRequest) -> OnDevice:
    """Return each library that finds a device; the others are skipped with their own words."""
    return _on_device(request.param)


@pytest.fixture(scope="session", params=[f"{name}{kind}" for name in DEVICES for kind in ("", ":portable")])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return what the kit tests: each library on its device, with and without its overrides."""
    from graphkv.testing.subject import Subject, variants

    name, _, portable = request.param.partition(":")
    device = _on_device(name)
    subject = Subject(**vars(device.backend), from_numpy=device.make, title=name)
    return variants(subject)[1 if portable else 0]
