"""The backends of this folder: those whose arrays live on a CUDA device.

With ``GRAPHKV_GPU_PART=1/4`` every fourth test runs, so that several processes share what takes long.

With ``GRAPHKV_GPU_REHEARSAL=1`` torch and JAX stay on the CPU: nothing is shown about a device, but the tests have run
before the first machine that has one. What asks for a device by its nature says so in its name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from graphkv import Backend, BackendUnavailableError
from graphkv.core.backend import load

REHEARSAL = os.environ.get("GRAPHKV_GPU_REHEARSAL") == "1"


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


def torch_device() -> str:
    """Return where torch's tests run, or say that there is no device."""
    import torch

    if not REHEARSAL and not torch.cuda.is_available():
        raise BackendUnavailableError(f"torch {torch.__version__} finds no CUDA device")
    return "cpu" if REHEARSAL else "cuda"


def _torch() -> OnDevice:
    backend, device = load("torch"), torch_device()
    import torch

    return OnDevice(backend, lambda x: torch.from_numpy(np.array(x)).to(device))


def _jax() -> OnDevice:
    backend = load("jax")
    import jax

    try:
        device = jax.devices("cpu" if REHEARSAL else "cuda")[0]
    except RuntimeError as error:
        raise BackendUnavailableError(f"jax {jax.__version__} finds no CUDA device") from error
    return OnDevice(backend, lambda x: jax.device_put(np.array(x), device))


DEVICES = {"cupy": _cupy, "torch-cuda": _torch, "jax-cuda": _jax}
# JAX op by op compiles op by op, which takes many minutes.
SUBJECTS = [*(f"{name}{kind}" for name in ("cupy", "torch-cuda") for kind in ("", ":portable")), "jax-cuda"]


def found() -> list[str]:
    """Return the libraries that find a device."""
    return [name for name in DEVICES if refusal(name) is None]


def refusal(name: str) -> str | None:
    """Return why a library finds no device; None where it does."""
    try:
        DEVICES[name]()
    except BackendUnavailableError as error:
        return str(error)
    return None


def _on_device(name: str) -> OnDevice:
    try:
        return DEVICES[name]()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error that torch waits for the device."""
    import torch

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That the mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


# Last, so that -k has taken its choice already.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave every n-th test."""
    part, _, parts = os.environ.get("GRAPHKV_GPU_PART", "1/1").partition("/")
    mine, others = slice(int(part) - 1, None, int(parts)), list(items)
    del others[mine]
    config.hook.pytest_deselected(items=others)
    items[:] = items[mine]


@pytest.fixture(scope="session", params=["cupy", "torch-cuda"])
def gpu(request: pytest.FixtureRequest) -> OnDevice:
    """Return each library that finds a device; the others are skipped with their own words."""
    return _on_device(request.param)


@pytest.fixture(scope="session", params=SUBJECTS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return what the kit tests: each library on its device, with and without its overrides."""
    from graphkv.testing.subject import Subject, variants

    name, _, portable = request.param.partition(":")
    device = _on_device(name)
    subject = Subject(**vars(device.backend) | {"from_numpy": device.make, "title": name})
    return variants(subject)[1 if portable else 0]
