"""The backends on which the kit runs here. To add one, add it to `SUBJECTS`.

Whoever runs `tests/gpu` with the testing extra and CuPy alone has neither torch nor array-api-strict: then those are
not among them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from graphkv import Backend, BackendUnavailableError
from graphkv.core.backend import load
from graphkv.testing import Subject, variants

try:
    from tests.support import strict
except ModuleNotFoundError:
    strict = None


def fields_of(backend: Backend) -> dict[str, object]:
    return {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)}


def read_only(x):
    x = np.array(x)
    x.flags.writeable = False
    return x


NUMPY = load("numpy")
READ_ONLY = Subject(**fields_of(NUMPY) | {"title": "numpy:readonly", "from_numpy": read_only})


def torch_variants() -> list[Backend]:
    try:
        return variants(load("torch"))
    except BackendUnavailableError:
        return []


def mlx_variants() -> list[Backend]:
    try:
        backend = load("mlx")
    except BackendUnavailableError:
        return []
    import mlx.core as mx

    def from_numpy(x):
        # By itself MLX narrows float64, in which it computes on a CPU only.
        is_wide = x.dtype == np.float64 and mx.default_device() == mx.cpu
        return mx.array(x, dtype=mx.float64) if is_wide else mx.array(x)

    return variants(Subject(**fields_of(backend) | {"from_numpy": from_numpy}))


SUBJECTS: list[Backend] = [*variants(NUMPY), READ_ONLY, *torch_variants(), *mlx_variants()]
if strict is not None:
    # What passes on the strictest passes on the others that have float64.
    SUBJECTS += [strict.NO_FLOAT64, strict.STRICTEST]
