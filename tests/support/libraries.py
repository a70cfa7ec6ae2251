"""The libraries that some tests run on: those of graphkv, and two more that only the tests know.

A folder whose tests use these fixtures imports them in its `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from graphkv import Backend, BackendUnavailableError
from graphkv.core.backend import load


@dataclass(frozen=True)
class Library:
    """A backend, how a NumPy array becomes one of its arrays, and the mode in which the library permits least."""

    backend: Backend
    make: Callable[[np.ndarray], Any]
    strictly: Callable[[], AbstractContextManager[None]] = nullcontext

    def host(self, x: Any) -> np.ndarray:
        """Return the values as a NumPy array."""
        return np.asarray(self.backend.to_numpy(x))

    def dtypes(self) -> list[str]:
        """Return the dtypes in which this library computes: JAX has float64 only where it is switched on."""
        wide = str(self.make(np.zeros(1, dtype=np.float64)).dtype).endswith("float64")
        return ["float32", "float64"] if wide else ["float32"]


def _built_in(name: str) -> Library:
    backend = load(name)
    return Library(backend, lambda x: backend.xp.asarray(np.array(x)))


def _sparse() -> Library:
    from graphkv.backends.numpy import SPARSE

    return Library(SPARSE, np.asarray)


def _torch_cuda() -> Library:
    backend = load("torch")
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError("torch finds no CUDA device")
    return Library(backend, lambda x: torch.from_numpy(np.array(x)).to("cuda"))


def _jax() -> Library:
    backend = load("jax")
    import jax

    # No axis is added silently.
    return Library(backend, lambda x: jax.numpy.asarray(np.array(x)), lambda: jax.numpy_rank_promotion("raise"))


def _mlx() -> Library:
    backend = load("mlx")
    import mlx.core as mx

    return Library(backend, mx.array)


def _strict() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library(Backend(name="strict", library="array_api_strict", xp=strict, to_numpy=np.asarray), strict.asarray)


LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": lambda: _built_in("numpy"),
    "scipy": _sparse,
    "torch": lambda: _built_in("torch"),
    "torch-cuda": _torch_cuda,
    "jax": _jax,
    "mlx": _mlx,
    "cupy": lambda: _built_in("cupy"),
    "strict": _strict,
}


def _library(name: str) -> Library:
    try:
        return LIBRARIES[name]()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


# JAX compiles every operation anew for every shape, which takes minutes: `make test-jax` runs what is marked.
@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.jax) if name == "jax" else name for name in LIBRARIES],
)
def library(request: pytest.FixtureRequest) -> Library:
    """Return each library that can run here; the others are skipped for the reason that they state."""
    return _library(request.param)


@pytest.fixture(scope="session")
def numpy_library() -> Library:
    """Return the library to compare with."""
    return _library("numpy")


@pytest.fixture(scope="session")
def libraries() -> Callable[[str], Library]:
    """Return a way to libraries by name."""
    return _library
