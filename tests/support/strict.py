"""array-api-strict as backends for tests: it refuses what the standard does not promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import array_api_strict as xp
import numpy as np

from graphkv import Backend
from graphkv.testing import Subject, label

CPU = xp.Device("CPU_DEVICE")


def to_numpy(x):
    return np.asarray(xp.asarray(x.to_device(CPU), copy=True))


def on(device: str):
    return lambda x: xp.asarray(x, device=xp.Device(device))


def guard(array):
    # The arithmetic is NumPy's, and so are its warnings.
    return np.errstate(all="ignore")


STRICT = Subject(name="strict", xp=xp, to_numpy=to_numpy, library="array_api_strict", guard=guard)
# Results must be made where the inputs are: a creation call without `device=` fails here.
DEVICE1 = Subject(**vars(STRICT) | {"title": "strict:device1", "from_numpy": on("device1")})
NO_FLOAT64 = Subject(**vars(STRICT) | {"title": "strict:no_float64", "from_numpy": on("no_float64")})
# No boolean indexing, no data-dependent shapes, no extensions; on a device of its own as well.
STRICTEST = Subject(**vars(DEVICE1) | {"title": "strictest"})


@contextmanager
def strictest_flags() -> Iterator[None]:
    with xp.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()):
        yield


def flags_for(backend: Backend | None) -> AbstractContextManager[None]:
    """The flags of the library are global, so they are set around a test and not in the backend."""
    return strictest_flags() if backend is not None and label(backend) == "strictest" else _as_they_are()


@contextmanager
def _as_they_are() -> Iterator[None]:
    yield
