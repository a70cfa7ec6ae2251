"""The same arrays in every library under test."""

import dataclasses

import numpy as np
import pytest
import torch

from graphkv.backends.numpy import BACKEND as NUMPY
from graphkv.backends.torch import BACKEND as TORCH

MAKE = {"numpy": np.asarray, "torch": lambda x: torch.as_tensor(np.asarray(x))}


def portable(backend):
    """The same library without any of its faster forms."""
    optional = ("top_k", "segment_product", "segment_sum", "build_graph", "propagate", "select")
    return dataclasses.replace(backend, **dict.fromkeys(optional))


BACKENDS = {
    "numpy": NUMPY,
    "torch": TORCH,
    "numpy:portable": portable(NUMPY),
    "torch:portable": portable(TORCH),
}

each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


def make(backend, x, dtype=np.float32):
    """An array of the backend's library."""
    x = np.asarray(x)
    return MAKE[backend.library](x.astype(dtype) if dtype is not None else x)
