"""CuPy, on the current CUDA device. Tests play it without one; see the ladder of checks in ``tests/cupy_ladder``.

Segment products and sums stay the portable ones of `graphkv.core.primitives`: CuPy has no ``multiply.at``, and its
float ``add.at`` adds in an order that changes from run to run.
"""

from __future__ import annotations

import os
from functools import partial

import array_api_compat.cupy as xp
import cupy

from ..core import primitives
from ..core.backend import Backend
from ..core.errors import BackendUnavailableError
from ..core.types import Array

__all__ = ["BACKEND"]


def _why_none() -> str:
    """Return why CuPy finds no device: a driver that is older than the CUDA of its build looks like no device."""
    found = f"backend 'cupy' needs a CUDA device; CuPy {cupy.__version__} finds none"
    driver, built = (number // 1000 for number in (_version("driver"), _version("runtime")))
    if not 0 < driver < built:
        return found
    reason = f"the driver here is for CUDA {driver} and this CuPy for {built}"
    return f"{found}, because {reason}: pip install cupy-cuda{driver}x"


def _version(what: str) -> int:
    """Return a version of CUDA as CuPy numbers it, such as 12040; 0 where there is none."""
    try:
        return int(getattr(cupy.cuda.runtime, f"{what}GetVersion")())
    except RuntimeError:
        return 0


# CuPy has no public way to leave it out for one call.
if os.environ.get("CUPY_TF32") == "1":
    raise BackendUnavailableError(
        "backend 'cupy' needs products in full float32; CUPY_TF32=1 in the environment takes digits from all: unset it"
    )
# The package can be imported on a machine that cannot run it.
if not cupy.is_available():
    raise BackendUnavailableError(_why_none())


def _smallest(keys: Array, k: int, /) -> Array:
    return cupy.sort(cupy.partition(keys, k - 1, axis=-1)[..., :k], axis=-1)


top_k = partial(primitives.packed_top_k, bits=lambda x: x.view(cupy.int32), smallest=_smallest)

BACKEND = Backend(name="cupy", xp=xp, to_numpy=cupy.asnumpy, top_k=top_k)
