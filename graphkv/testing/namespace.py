"""Every name and keyword that graphkv uses of an array library, in calls that can be tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..core import primitives
from ..core.backend import Backend
from . import asserts

__all__ = ["CALLS", "missing"]

CALLS = (
    "abs(x)",
    "add(x, x)",
    "all(m, axis=-1, keepdims=True)",
    "any(m, axis=-1, keepdims=True)",
    "arange(1, 3, dtype=int64, device=device)",
    "argmax(x, axis=-1, keepdims=True)",
    "argsort(x, axis=-1, descending=True, stable=True)",
    "asarray(1.0, dtype=float32, device=device)",
    "asarray(x, copy=True)",
    "astype(x, int32)",
    "bool",
    "broadcast_to(x, (2, 2, 3))",
    "clip(x, 0, 1)",
    "concat([x, x], axis=-1)",
    "cumulative_sum(i, axis=-1, dtype=int64)",
    "exp(x)",
    "finfo(x.dtype).bits",
    "float32",
    "float64",
    "full((2, 3), 1.0, dtype=x.dtype, device=device)",
    "full_like(x, -inf)",
    "iinfo(int64).max",
    "inf",
    "int32",
    "int64",
    "isdtype(x.dtype, ('real floating', 'integral'))",
    "isfinite(x)",
    "isinf(x)",
    "isnan(x)",
    "log(x)",
    "matrix_transpose(x)",
    "max(x, axis=-1, keepdims=True)",
    "maximum(x, x)",
    "mean(x, axis=(0, 1), keepdims=True)",
    "min(x, axis=-1, keepdims=True)",
    "minimum(x, x)",
    "multiply(x, x)",
    "nan",
    "ones((2, 3), dtype=bool, device=device)",
    "ones_like(x)",
    "reshape(x, (-1,))",
    "result_type(x.dtype, float32)",
    "round(x)",
    "searchsorted(s, s, side='right')",
    "sort(x, axis=-1)",
    "sqrt(x)",
    "stack([x, x], axis=-1)",
    "sum(x, axis=-1, keepdims=True)",
    "sum(i, axis=-1, dtype=int64)",
    "take(s, s)",
    "take_along_axis(x, i, axis=-1)",
    "tanh(x)",
    "uint8",
    "where(m, x, x)",
    "zeros((2, 3), dtype=int64, device=device)",
    "zeros_like(x)",
    "x @ matrix_transpose(x)",
    "x[..., None, :2] * 2 + 1 - x[:, 1:, None] / x[:, 1:, None] ** 2",
    "-x < abs(x)",
    "~m & (i % 2 == 0) | (i // 2 >= 1)",
)
"""Every use of the namespace in the portable forms and in the policies, as a call on x (2, 3) in float32, i (2, 3) and
s (3,) in int64, and m (2, 3) in bool."""


def missing(backend: Backend, /) -> list[str]:
    """Try every call, and list those that the backend's library does not know, with its error.

    Parameters
    ----------
    backend : Backend

    Returns
    -------
    list of str
        Empty where nothing is missing.
    """
    return list(_failures(backend))


def _failures(backend: Backend, /) -> Iterator[str]:
    x = asserts.make(backend, np.asarray([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=np.float32))
    known = {
        "x": x,
        "i": asserts.make(backend, np.asarray([[0, 1, 2], [2, 1, 0]])),
        "s": asserts.make(backend, np.asarray([0, 1, 2])),
        "m": asserts.make(backend, np.asarray([[True, False, True], [False, True, False]])),
        "device": primitives.device_of(x),
    }
    for call in CALLS:
        # A library that lacks a dtype is known to `asserts.supports`, and the properties leave the dtype out.
        if call == "float64":
            continue
        try:
            # With builtins: CuPy imports a module while it makes its first kernel of a kind.
            eval(call, {}, _Names(backend.xp, known))
        except Exception as error:  # libraries differ in what they raise
            yield f"{call}: {type(error).__name__}: {error}"


class _Names(Mapping[str, Any]):
    """The arrays of the calls, and behind them the namespace."""

    def __init__(self, xp: Any, known: dict[str, Any]) -> None:
        self.xp, self.known = xp, known

    def __getitem__(self, name: str) -> Any:
        return self.known[name] if name in self.known else getattr(self.xp, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)
