"""The same arrays in every library under test; without PyTorch the others are left."""

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest

from graphkv.backends.numpy import BACKEND as NUMPY
from graphkv.core import Backend
from graphkv.testing.subject import OPTIONAL

MAKE = {"numpy": np.asarray}


def portable(backend):
    """The same library without any of its faster forms."""
    return dataclasses.replace(backend, **dict.fromkeys(OPTIONAL))


BACKENDS = {"numpy": NUMPY, "numpy:portable": portable(NUMPY)}
if find_spec("torch"):
    import torch

    from graphkv.backends.torch import BACKEND as TORCH

    MAKE["torch"] = lambda x: torch.as_tensor(np.asarray(x))
    BACKENDS |= {"torch": TORCH, "torch:portable": portable(TORCH)}

# The standard and nothing else: no half precision, no mixing of kinds.
LIBRARIES = dict(BACKENDS)
if find_spec("array_api_strict"):
    import array_api_strict

    MAKE["array_api_strict"] = lambda x: array_api_strict.asarray(np.asarray(x))
    LIBRARIES["strict"] = Backend(name="array_api_strict", xp=array_api_strict, to_numpy=np.asarray)

each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
each_library = pytest.mark.parametrize("backend", LIBRARIES.values(), ids=LIBRARIES.keys())


def make(backend, x, dtype=np.float32):
    """An array of the backend's library."""
    x = np.asarray(x)
    return MAKE[backend.library](x.astype(dtype) if dtype is not None else x)
