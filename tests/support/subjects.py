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


SUBJECTS: list[Backend] = [*variants(NUMPY), READ_ONLY, *torch_variants()]
if strict is not None:
    SUBJECTS += [strict.STRICT, strict.DEVICE1, strict.NO_FLOAT64, strict.STRICTEST]
