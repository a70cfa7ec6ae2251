"""The backends on which the kit runs here. To add one, add it to `SUBJECTS`."""

from __future__ import annotations

import dataclasses

import numpy as np

from graphkv import Backend
from graphkv.core.backend import load
from graphkv.testing import Subject, variants
from tests import strict


def fields_of(backend: Backend) -> dict[str, object]:
    return {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)}


def read_only(x):
    x = np.array(x)
    x.flags.writeable = False
    return x


NUMPY = load("numpy")
READ_ONLY = Subject(**fields_of(NUMPY) | {"title": "numpy:readonly", "from_numpy": read_only})

SUBJECTS: list[Backend] = [
    *variants(NUMPY),
    READ_ONLY,
    *variants(load("torch")),
    strict.STRICT,
    strict.DEVICE1,
    strict.NO_FLOAT64,
    strict.STRICTEST,
]
