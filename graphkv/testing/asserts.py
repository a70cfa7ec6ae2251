"""Comparisons: library, dtype, shape and device of both operands first, then values.

The margin rule
---------------
On exact inputs (see `graphkv.testing.strategies.exact`) every library must give the same numbers, so values and
choices are compared for equality. On general inputs similarities differ in the last bits, so numbers are compared
within `tolerance`, and a choice is right if no dropped token beats a kept one by more than that (`chosen`). Index
arrays of general inputs are never compared for equality.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import primitives
from ..core.backend import Backend
from ..core.libraries import library_of
from ..core.types import Array, Graph

__all__ = [
    "chosen",
    "close",
    "device_of",
    "equal",
    "flushes",
    "graph_equal",
    "identical",
    "make",
    "supports",
    "tolerance",
    "values",
    "wide",
]


def make(backend: Backend, x: NDArray[Any], /, dtype: str | None = None) -> Array:
    """Return an array of the backend's library with the values of `x`.

    Parameters
    ----------
    backend : Backend
        Or a `Subject`, which defines how its arrays are made.
    x : numpy.ndarray
        A dtype that the library does not have is narrowed to its 32-bit kin.
    dtype : str, optional
        Name of the dtype, for example ``"bfloat16"``. Default: that of `x`.
    """
    # A copy, because a library may share memory, and a fault must not reach the oracle's input.
    with np.errstate(all="ignore"):
        x = np.array(x, dtype=dtype if dtype in _NUMPY_NAMES else None, copy=True, order="C")
        if x.dtype.name in _NARROW and not supports(backend, x.dtype.name):
            x = x.astype(_NARROW[x.dtype.name])
    array = _from_numpy(backend, x)
    if dtype is not None and dtype not in _NUMPY_NAMES:
        array = backend.xp.astype(array, getattr(backend.xp, dtype))
    return array


_NARROW = {"float64": "float32", "int64": "int32"}
_NUMPY_NAMES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


def _from_numpy(backend: Backend, x: NDArray[Any]) -> Array:
    convert = getattr(backend, "from_numpy", None) or backend.xp.asarray
    return convert(x)


@cache
def supports(backend: Backend, dtype: str, /) -> bool:
    """Return whether the library, on the device under test, has a dtype of that name."""
    expected = getattr(backend.xp, dtype, None)
    if expected is None:
        return False
    if dtype not in _NUMPY_NAMES:
        return True
    with warnings.catch_warnings():
        # jax warns of what it narrows; that it narrows is what is asked here.
        warnings.simplefilter("ignore")
        try:
            return bool(_from_numpy(backend, np.zeros(1, dtype=dtype)).dtype == expected)
        except (TypeError, ValueError):
            return False


def device_of(backend: Backend, /) -> str:
    """Name the device on which arrays under test are made; a library without devices has None."""
    return str(primitives.device_of(make(backend, np.zeros(1, dtype=np.float32))))


@cache
def flushes(backend: Backend, dtype: str, /) -> bool:
    """Return whether the library's arithmetic takes subnormal numbers for zero, as compilers for speed let it."""
    small = make(backend, np.full(3, np.finfo(dtype).tiny), dtype)
    return not bool(np.all(values(backend, small * 0.5) > 0))


def wide(backend: Backend, *dtypes: str) -> str:
    """Name the dtype in which the library computes with inputs of these dtypes."""
    return "float64" if "float64" in dtypes and supports(backend, "float64") else "float32"


def values(backend: Backend, x: Array, /) -> NDArray[Any]:
    """Return the values as a NumPy array; half precision, which NumPy may lack, as float32."""
    xp = backend.xp
    if xp.isdtype(x.dtype, "real floating") and x.dtype not in (xp.float32, xp.float64):
        x = xp.astype(x, xp.float32)
    return np.asarray(backend.to_numpy(x))


def tolerance(dtype: Any, /) -> float:
    """Return how far apart two computations of one number may be: 1e-5 in float32, 1e-12 in float64.

    That is some tens of roundings of float32, and a fiftieth of what products in TF32 or bfloat16 are off by.
    """
    return 1e-12 if "float64" in str(dtype) else 1e-5


def equal(actual: Array, expected: Array | NDArray[Any], /, *, backend: Backend, like: Array) -> None:
    """Check that two arrays are the same but for the sign of zeros; NaN equals NaN.

    Parameters
    ----------
    actual : array
        What the backend gave.
    expected : array or numpy.ndarray
        Of the backend's library, or of NumPy.
    backend : Backend
    like : array
        An input of the call: `actual` must be on its device.
    """
    found, wanted = _operands(actual, expected, backend, like)
    np.testing.assert_array_equal(found, wanted)


def identical(actual: Array, expected: Array | NDArray[Any], /, *, backend: Backend, like: Array) -> None:
    """Check that two arrays are the same bit for bit, the sign of zeros included; any NaN equals any NaN."""
    found, wanted = _operands(actual, expected, backend, like)
    np.testing.assert_array_equal(found, wanted)
    number = ~np.isnan(found)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(wanted)[number], err_msg="sign of zero")


def close(
    actual: Array,
    expected: Array | NDArray[Any],
    /,
    *,
    backend: Backend,
    like: Array,
    scale: NDArray[Any] | float = 0.0,
) -> None:
    """Check that two arrays are the same within the tolerance, relative to the larger of `expected` and `scale`."""
    found, wanted = _operands(actual, expected, backend, like)
    settled = np.isnan(wanted) | np.isinf(wanted)
    np.testing.assert_array_equal(np.where(settled, found, 0), np.where(settled, wanted, 0))
    with np.errstate(invalid="ignore"):
        gap = np.where(settled, 0, np.abs(found - wanted))
        allowed = tolerance(actual.dtype) * np.maximum(np.abs(wanted), np.abs(scale))
    # A NaN in `found` alone is beyond every allowance.
    wrong = ~settled & ~(gap <= allowed)
    where = np.argwhere(wrong)[:3].tolist()
    assert not np.any(wrong), (
        f"got {found[wrong][:3]}, should be {wanted[wrong][:3]} at {where} within {allowed[wrong][:3]}"
    )


def chosen(kept: Sequence[int], scores: Sequence[float], /, *, eligible: Sequence[int], dtype: Any) -> None:
    """Check a choice on general numbers: no dropped token beats a kept one by more than the tolerance.

    Parameters
    ----------
    kept : sequence of int
        Tokens that were chosen.
    scores : sequence of float
        The oracle's score of every token.
    eligible : sequence of int
        Tokens among which to choose.
    dtype : dtype
        In which the backend computed.
    """
    dropped = set(eligible) - set(kept)
    assert set(kept) <= set(eligible), f"chose {sorted(set(kept) - set(eligible))}, which were not to be chosen"
    assert len(set(kept)) == len(kept), f"chose twice: {sorted(kept)}"
    if not kept or not dropped:
        return
    worst, best = min(scores[j] for j in kept), max(scores[j] for j in dropped)
    allowed = tolerance(dtype) * max(1.0, abs(worst), abs(best))
    assert best - worst <= allowed, f"dropped a token of score {best}, kept one of {worst}; tolerance {allowed}"


def graph_equal(
    graph: Graph,
    sources: NDArray[Any],
    neighbors: NDArray[Any],
    weights: NDArray[Any],
    /,
    *,
    backend: Backend,
    like: Array,
) -> None:
    """Check a graph on exact inputs. Where `neighbors` is `oracle.FREE`, any token will do."""
    assert isinstance(graph, Graph), f"got {type(graph).__name__}, should be a Graph"
    num_tokens = like.shape[-2]
    assert graph.num_tokens == num_tokens
    equal(graph.sources, sources, backend=backend, like=like)
    equal(graph.weights, weights, backend=backend, like=like)
    found = values(backend, graph.neighbors)
    assert np.all((found >= 0) & (found < num_tokens)), "a neighbor outside the row"
    equal(graph.neighbors, np.where(neighbors < 0, found, neighbors), backend=backend, like=like)


def _operands(
    actual: Array, expected: Array | NDArray[Any], backend: Backend, like: Array
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check what is not a value, of both operands, and give their values."""
    xp = backend.xp
    library = library_of(actual)
    assert library == backend.library, f"result of library {library!r}, should be {backend.library!r}"
    if isinstance(expected, np.ndarray):
        name = expected.dtype.name
        name = _NARROW[name] if name in _NARROW and not supports(backend, name) else name
        dtype, wanted = getattr(xp, name), expected
    else:
        other = library_of(expected)
        if other != backend.library:
            raise TypeError(f"expected must be an array of {backend.library!r} or of NumPy; got {other!r}")
        dtype, wanted = expected.dtype, values(backend, expected)
    assert actual.dtype == dtype, f"dtype {actual.dtype}, should be {dtype}"
    shape = tuple(actual.shape)
    assert shape == wanted.shape, f"shape {shape}, should be {wanted.shape}"
    here, there = primitives.device_of(actual), primitives.device_of(like)
    assert here == there, f"on device {here}, should be on {there}"
    return values(backend, actual), wanted
