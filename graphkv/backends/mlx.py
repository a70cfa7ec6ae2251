"""MLX, lazily: nothing is computed before its user asks for values. Never run on Apple's GPUs: see the page on porting.

Computed where MLX's default stream is, which on a machine of Apple's is the GPU; there is no float64 there. Indices are
int64 all the same.

Segment products and sums stay the portable ones of `graphkv.core.primitives`: scatters on a GPU combine in an order
that changes from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..core import primitives
from ..core.backend import Backend
from ..core.types import Array

__all__ = ["BACKEND"]

# What the standard creates on a device.
CREATION = ("arange", "asarray", "full", "ones", "zeros")


def _anywhere(create: Callable[..., Array], /) -> Callable[..., Array]:
    """Leave out the device: MLX's arrays have none, the operations have."""

    def created(*args: Any, device: None = None, **options: Any) -> Array:
        return create(*args, **options)

    return created


class _Namespace:
    """mlx.core, where it differs from the standard in a name, a keyword or the dtype of a result."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(mx, "bool_" if name == "bool" else name)
        return _anywhere(found) if name in CREATION else found

    # MLX sorts upwards only, and stably; downwards by what turns the order round and leaves equal ones in theirs.
    @staticmethod
    def argsort(x: Array, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        if descending:
            x = -x if mx.isdtype(x.dtype, "real floating") else ~x
        return mx.argsort(x, axis=axis).astype(mx.int64)

    # MLX's own has the digits of float32 only.
    @staticmethod
    def exp(x: Array, /) -> Array:
        return mx.power(math.e, x) if x.dtype == mx.float64 else mx.exp(x)

    # A gather refuses gradients where it is not told that its indices have none.
    @staticmethod
    def take(x: Array, indices: Array, /) -> Array:
        return mx.take(x, mx.stop_gradient(indices))

    @staticmethod
    def take_along_axis(x: Array, indices: Array, /, *, axis: int = -1) -> Array:
        return mx.take_along_axis(x, mx.stop_gradient(indices), axis=axis)

    @staticmethod
    def searchsorted(x1: Array, x2: Array, /, *, side: str = "left") -> Array:
        return mx.searchsorted(x1, x2, side=side).astype(mx.int64)

    @staticmethod
    def sum(x: Array, /, *, dtype: Any = None, **options: Any) -> Array:
        return mx.sum(x if dtype is None else x.astype(dtype), **options)


def _smallest(keys: Array, k: int, /) -> Array:
    return mx.sort(mx.partition(keys, k - 1, axis=-1)[..., :k], axis=-1)


top_k = partial(primitives.packed_top_k, bits=lambda x: mx.view(mx.stop_gradient(x), mx.int32), smallest=_smallest)

BACKEND = Backend(name="mlx", xp=_Namespace(), to_numpy=np.asarray, top_k=top_k, detach=mx.stop_gradient)
