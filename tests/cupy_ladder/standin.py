"""A stand-in for CuPy over NumPy memory: it refuses what CuPy refuses and is hostile where CuPy promises nothing.

It shows which calls reach CuPy and what would come of them; it shows nothing about a GPU. Names and signatures come
from ``manifest.json``, that is from the real wheel; what the manifest lacks does not exist here, and what nobody has
needed yet raises NotImplementedError. `install` must come before anything imports CuPy or ``array_api_compat.cupy``.

Stricter than CuPy on purpose: host arrays are refused as indices (CuPy copies them silently), an index out of bounds
raises (CuPy wraps it), and so does a repeated index in an assignment (CuPy leaves the result open).

Logs: `CALLS` holds every distinct call for the replay on the real wheel, `SYNCS` what would wait for the GPU.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = json.loads(Path(__file__).with_name("manifest.json").read_text())
CALLS: dict[str, None] = {}
SYNCS: list[str] = []

# What CuPy leaves to chance is drawn here.
_chance = np.random.default_rng(20250900388)

UFUNC_AT = {"add", "subtract", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"}
UFUNC_AT_DTYPES = {"int32", "int64", "uint32", "uint64", "float16", "float32", "float64"}


class ndarray:
    """A NumPy array behind CuPy's manners."""

    __module__ = "cupy"
    __array_priority__ = 100
    __slots__ = ("_a",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("the stand-in makes arrays by asarray, empty and the like only")

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    device = property(lambda self: Device(0))

    @property
    def T(self) -> ndarray:
        return _method("transpose", self, self._a.T)

    @property
    def mT(self) -> ndarray:
        return _wrap(self._a.mT)

    # Ways to the host, all of which wait.

    def get(self) -> np.ndarray:
        SYNCS.append("get")
        return self._a.copy()

    def item(self) -> Any:
        SYNCS.append("item")
        return self._a.item()

    def tolist(self) -> Any:
        SYNCS.append("tolist")
        return self._a.tolist()

    def __bool__(self) -> bool:
        SYNCS.append("bool")
        return bool(self._a)

    def __int__(self) -> int:
        SYNCS.append("int")
        return int(self._a)

    def __float__(self) -> float:
        SYNCS.append("float")
        return float(self._a)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    # NumPy functions on such an array go to the stand-in's own, as CuPy's do.

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        own = getattr(sys.modules["cupy"], ufunc.__name__)
        return own(*args, **kwargs) if method == "__call__" else getattr(own, method)(*args, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return getattr(sys.modules["cupy"], function.__name__)(*args, **kwargs)

    # Shape and views: no data is touched.

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[ndarray]:
        return (_wrap(np.asarray(row)) for row in self._a)

    def view(self, dtype: Any) -> ndarray:
        return _method("view", self, self._a.view(dtype), dtype)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return _method("reshape", self, self._a.reshape(*shape, order=order), *shape)

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return _method("swapaxes", self, self._a.swapaxes(axis1, axis2), axis1, axis2)

    # Data.

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> ndarray:
        return _method("astype", self, self._a.astype(dtype, copy=copy), dtype, copy=copy)

    def copy(self, order: str = "C") -> ndarray:
        return _method("copy", self, self._a.copy())

    def sum(self, axis: Any = None, dtype: Any = None, out: None = None, keepdims: bool = False) -> ndarray:
        return _method("sum", self, self._a.sum(axis=axis, dtype=dtype, keepdims=keepdims), axis=axis)

    def sort(self, axis: int = -1, kind: Any = None) -> None:
        _check_kind(kind)
        _method("sort", self, np.zeros(0), axis=axis)
        self._a.sort(axis=axis)

    def __getitem__(self, key: Any) -> ndarray:
        raw = _index(key, self.shape)
        _record("operator", "getitem", (self, key), {})
        return _wrap(np.asarray(self._a[raw]))

    def __setitem__(self, key: Any, value: Any) -> None:
        raw = _index(key, self.shape)
        _record("operator", "setitem", (self, key, value), {})
        _operand("__setitem__", value)
        touched = np.zeros(self.shape, dtype=np.int64)
        np.add.at(touched, raw, 1)
        if np.any(touched > 1):
            raise RuntimeError("an assignment repeats an index: CuPy leaves the result open")
        self._a[raw] = _raw(value)

    def __getattr__(self, name: str) -> Any:
        if name in MANIFEST["ndarray"]:
            raise NotImplementedError(f"the stand-in does not play cupy.ndarray.{name}")
        raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")


class Device:
    """The one GPU that is not there."""

    __module__ = "cupy.cuda.device"

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "<CUDA Device 0 (stand-in)>"


class Ufunc:
    """One elementwise function."""

    def __init__(self, name: str, nin: int, nout: int) -> None:
        self.__name__, self.nin, self.nout = name, nin, nout
        self._function = getattr(np, name)

    def __call__(self, *args: Any, out: None = None, dtype: Any = None, _as: str = "cupy") -> Any:
        if len(args) != self.nin or out is not None:
            raise TypeError(f"{self.__name__}() takes {self.nin} arrays here, and no out=")
        for arg in args:
            _operand(self.__name__, arg)
        if not any(isinstance(arg, ndarray) for arg in args):
            raise TypeError(f"cupy.{self.__name__} without an array of CuPy")
        _record(_as, self.__name__, args, {} if dtype is None else {"dtype": dtype})
        with np.errstate(all="ignore"):  # a GPU does not warn
            result = self._function(*(_flush(_raw(arg)) for arg in args), dtype=dtype)
        return tuple(_wrap(_flush(each)) for each in result) if self.nout > 1 else _wrap(_flush(result))

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        if self.__name__ not in UFUNC_AT:
            raise NotImplementedError(f"`{self.__name__}.at` is not supported yet")
        if a.dtype.name not in UFUNC_AT_DTYPES:
            raise TypeError(f"{self.__name__}.at: unsupported dtype {a.dtype}")
        raw = _index(indices, a.shape)
        raw = np.atleast_1d(raw[0] if isinstance(raw, tuple) else raw)
        _record("cupy", f"{self.__name__}.at", (a, indices, b), {})
        order = _chance.permutation(raw.size)  # atomics come in any order
        values = np.broadcast_to(_raw(b), raw.shape).reshape(-1)[order]
        self._function.at(a._a, raw.reshape(-1)[order], values)

    def reduceat(self, array: ndarray, indices: Any, axis: int = 0) -> ndarray:
        if self.__name__ != "add":
            raise NotImplementedError(f"`{self.__name__}.reduceat` is not supported yet")
        _record("cupy", "add.reduceat", (array, indices), {"axis": axis})
        running = np.cumsum(_raw(array), axis=axis, dtype=array.dtype)  # as CuPy: a difference of running sums
        start = _raw(indices)
        stop = np.append(start[1:], array.shape[axis])
        upto = np.take(running, np.maximum(stop, start + 1) - 1, axis=axis)
        before = np.where(start > 0, np.take(running, np.maximum(start - 1, 0), axis=axis), 0)
        return _wrap((upto - before).astype(array.dtype))

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the reductions of the ufunc {self.__name__} are not supported yet")

    reduce = accumulate = outer = _refuse


def _raw(x: Any) -> Any:
    if isinstance(x, ndarray):
        return x._a
    return type(x)(map(_raw, x)) if isinstance(x, (tuple, list)) else x


def _wrap(x: Any) -> ndarray:
    array = object.__new__(ndarray)
    array._a = x if isinstance(x, np.ndarray) else np.asarray(x)
    return array


def _operand(where: str, x: Any) -> None:
    """Refuse what lies on the host, but for scalars."""
    if not isinstance(x, (ndarray, bool, int, float, complex, np.generic)):
        raise TypeError(f"{where}: Unsupported type {type(x)}")


def _flush(x: Any) -> Any:
    """Do as CuPy's kernels, which are compiled with -ftz=true: a subnormal float32 is zero."""
    if not (isinstance(x, (np.ndarray, np.generic)) and x.dtype == np.float32):
        return x
    tiny = (x != 0) & (np.abs(x) < np.finfo(np.float32).tiny)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if np.any(tiny) else x


def _method(name: str, array: ndarray, result: Any, *args: Any, **kwargs: Any) -> ndarray:
    _record("ndarray", name, (array, *args), kwargs)
    return _wrap(result)


def _index(key: Any, shape: tuple[int, ...]) -> Any:
    """Check an index and give NumPy's. NumPy itself raises where an index is out of bounds."""
    if isinstance(key, tuple):
        return tuple(_index(each, shape) for each in key)
    if isinstance(key, ndarray):
        if key.dtype == bool:
            SYNCS.append("boolean index")
        elif key.dtype.kind not in "iu":
            raise IndexError("arrays used as indices must be of integer or boolean type")
        return key._a
    if isinstance(key, (np.ndarray, list)):
        raise TypeError("a host array as an index: CuPy would copy it to the device each time")
    return key


def _check_kind(kind: Any) -> None:
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")


# Functions that differ from NumPy's of the same name, or wait for the GPU.


def _shuffled_sides(order: np.ndarray, kth: int, axis: int) -> np.ndarray:
    """Shuffle what lies before and behind the k-th place, which a partition leaves open."""
    order = np.moveaxis(order, axis, -1).copy()
    for row in order.reshape(-1, order.shape[-1]):
        _chance.shuffle(row[:kth])
        _chance.shuffle(row[kth + 1 :])
    return np.moveaxis(order, -1, axis)


def argpartition(a: np.ndarray, kth: int, axis: int = -1) -> np.ndarray:
    size = a.shape[axis]
    if not -size <= kth < size:
        raise ValueError(f"kth(={kth}) out of bounds {size}")
    shuffle = _chance.permutation(size)  # equal values come in any order
    order = shuffle[np.argsort(np.take(a, shuffle, axis=axis), axis=axis, kind="stable")]
    return _shuffled_sides(order, kth % size, axis)


def partition(a: np.ndarray, kth: int, axis: int = -1) -> np.ndarray:
    return np.take_along_axis(a, argpartition(a, kth, axis), axis=axis)


def sort(a: np.ndarray, axis: int = -1, kind: str | None = None) -> np.ndarray:
    _check_kind(kind)
    return np.sort(a, axis=axis, kind="stable")


def argsort(a: np.ndarray, axis: int = -1, kind: str | None = None) -> np.ndarray:
    _check_kind(kind)
    return np.argsort(a, axis=axis, kind="stable")


def lexsort(keys: Any) -> np.ndarray:
    if not isinstance(keys, np.ndarray):
        raise TypeError("lexsort takes one stacked array")
    return np.lexsort(keys)


def where(condition: np.ndarray, x: Any = None, y: Any = None) -> Any:
    if x is None:
        SYNCS.append("where with one argument")
        return np.nonzero(condition)
    return np.where(condition, x, y)


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: bool | None = None, blocking: bool = False) -> Any:
    return np.array(a, dtype=dtype, order=order or "K", copy=copy if isinstance(a, np.ndarray) and copy else None)


def array(obj: Any, dtype: Any = None, copy: bool = True, order: Any = "K") -> np.ndarray:
    return np.array(obj, dtype=dtype, copy=copy or None, order=order)


PLAYED: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (argpartition, partition, sort, argsort, lexsort, where, asarray, array)
}
PLAYED |= {
    name: getattr(np, name)
    for name in [
        "all",
        "any",
        "arange",
        "argmax",
        "argmin",
        "broadcast_arrays",
        "broadcast_to",
        "can_cast",
        "concatenate",
        "copy",
        "count_nonzero",
        "cumprod",
        "cumsum",
        "diff",
        "einsum",
        "empty",
        "empty_like",
        "expand_dims",
        "eye",
        "finfo",
        "flip",
        "full",
        "full_like",
        "iinfo",
        "isdtype",
        "issubdtype",
        "max",
        "matmul",
        "mean",
        "min",
        "moveaxis",
        "ones",
        "ones_like",
        "prod",
        "ravel",
        "repeat",
        "reshape",
        "result_type",
        "roll",
        "round",
        "searchsorted",
        "squeeze",
        "stack",
        "std",
        "sum",
        "swapaxes",
        "take",
        "take_along_axis",
        "tensordot",
        "tile",
        "transpose",
        "tril",
        "triu",
        "var",
        "zeros",
        "zeros_like",
        "broadcast_shapes",
        "isin",
        "bincount",
        "nonzero",
        "unique",
        "array_equal",
        "allclose",
    ]
}
WAITS = {"allclose", "array_equal", "bincount", "nonzero", "unique"}
# These take things of the host; to all others a host array or list in place of an array is an error.
FROM_HOST = {"array", "asarray"}
NO_ARRAYS = {"arange", "broadcast_shapes", "can_cast", "empty", "eye", "finfo", "full", "iinfo", "isdtype"}
NO_ARRAYS |= {"issubdtype", "ones", "result_type", "zeros"}


def _function(name: str, parameters: list[list[Any]] | None) -> Callable[..., Any]:
    """Make the function of that name, which takes the parameters of the real one and no others."""
    if name not in PLAYED:

        def unknown(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"the stand-in does not play cupy.{name}")

        return unknown
    signature = _signature(parameters)

    def play(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        if name not in FROM_HOST | NO_ARRAYS:
            arrays = args[0] if isinstance(args[0], (tuple, list)) and name != "einsum" else args[:1]
            for each in arrays[1:] if name == "einsum" else arrays:
                if not isinstance(each, ndarray):
                    raise TypeError(f"cupy.{name}: Unsupported type {type(each)}")
        if name not in FROM_HOST and any(isinstance(each, np.ndarray) for each in (*args, *kwargs.values())):
            raise TypeError(f"cupy.{name}: Unsupported type {np.ndarray}")
        if name in WAITS:
            SYNCS.append(name)
        _record("cupy", name, args, kwargs)
        with np.errstate(all="ignore"):
            result = PLAYED[name](*map(_raw, args), **{key: _raw(value) for key, value in kwargs.items()})
        if name in FROM_HOST and not isinstance(args[0], ndarray):
            result = result.copy()  # the device has memory of its own
        if isinstance(result, (tuple, list)) and name != "broadcast_shapes":
            return type(result)(map(_wrap, result)) if type(result) in (tuple, list) else tuple(map(_wrap, result))
        return _wrap(result) if isinstance(result, (np.ndarray, np.generic)) else result

    play.__name__ = name
    play.__signature__ = signature  # type: ignore[attr-defined]
    return play


def _signature(parameters: list[list[Any]] | None) -> inspect.Signature:
    """Rebuild a signature; where Python could not tell the real one, anything goes."""
    kinds = list(inspect._ParameterKind)
    if parameters is None:
        parameters = [["args", int(inspect.Parameter.VAR_POSITIONAL), True], ["kwargs", 4, True]]
    return inspect.Signature(
        [
            inspect.Parameter(name, kinds[kind], default=inspect.Parameter.empty if required else None)
            for name, kind, required in parameters
        ]
    )


# The log for the replay.


def _record(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = {key: encode(value) for key, value in kwargs.items()}
    CALLS[json.dumps([module, name, [encode(each) for each in args], given])] = None


def encode(x: Any) -> list[Any]:  # noqa: PLR0911 - a table of types
    """Describe an argument: of arrays only shape and dtype."""
    if isinstance(x, ndarray):
        return ["array", list(x.shape), x.dtype.name]
    if isinstance(x, np.ndarray):
        return ["host", list(x.shape), x.dtype.name]
    if isinstance(x, np.generic):
        return ["scalar", x.dtype.name, x.item()]
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return ["dtype", np.dtype(x).name]
    if isinstance(x, type):
        return ["type", x.__name__]
    if isinstance(x, (tuple, list)):
        if x and isinstance(x[0], (list, float)):
            return encode(np.asarray(x))
        return [type(x).__name__, [encode(each) for each in x]]
    if isinstance(x, slice):
        return ["slice", [x.start, x.stop, x.step]]
    if x is Ellipsis:
        return ["ellipsis"]
    return ["value", x]


# The operators of Python, each of which is one ufunc.
_BINARY = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "left_shift",
    "rshift": "right_shift",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
}
_UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}


def _add_operators(functions: dict[str, Any]) -> None:
    def binary(name: str, reverse: bool) -> Callable[..., Any]:
        ufunc = functions[name]
        return lambda self, other: ufunc(other, self) if reverse else ufunc(self, other)

    def unary(name: str) -> Callable[..., Any]:
        ufunc = functions[name]
        return lambda self: ufunc(self)  # noqa: PLW0108 - an object in its place would not be bound

    def in_place(name: str) -> Callable[..., Any]:
        def write(self: ndarray, other: Any) -> ndarray:
            result = functions[name](self, other)
            np.copyto(self._a, result._a, casting="same_kind")
            return self

        return write

    for short, name in _BINARY.items():
        setattr(ndarray, f"__{short}__", binary(name, reverse=False))
        if short not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(ndarray, f"__r{short}__", binary(name, reverse=True))
            setattr(ndarray, f"__i{short}__", in_place(name))
    for short, name in _UNARY.items():
        setattr(ndarray, f"__{short}__", unary(name))
    # A lambda, because it is bound as a method.
    ndarray.__matmul__ = lambda self, other: functions["matmul"](self, other)  # type: ignore[attr-defined]  # noqa: PLW0108


def _members(names: dict[str, Any]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, what in names.items():
        if what["kind"] == "ufunc":
            members[name] = Ufunc(name, what["nin"], what["nout"]) if hasattr(np, name) else _function("", None)
        elif what["kind"] == "function":
            members[name] = _function(name, what["signature"])
        elif what["kind"] in ("type", "constant"):
            members[name] = getattr(np, name, None) or type(name, (), {})
    return members


def install() -> types.ModuleType:
    """Put the stand-in where ``import cupy`` finds it, for the rest of the process."""
    if "cupy" in sys.modules or "array_api_compat.cupy" in sys.modules:
        raise RuntimeError("CuPy was imported already; the stand-in must come first, in a process of its own")
    modules = {}
    for name, names in MANIFEST["modules"].items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(_members(names))
    modules["cupy.cuda"] = types.ModuleType("cupy.cuda")
    modules["cupy.cuda.device"] = types.ModuleType("cupy.cuda.device")
    modules["cupy.cuda.device"].Device = modules["cupy.cuda"].Device = Device  # type: ignore[attr-defined]
    modules["cupy.cuda"].device = modules["cupy.cuda.device"]  # type: ignore[attr-defined]
    cupy = modules["cupy"]
    _add_operators(vars(cupy))
    for name in ("cuda", "fft", "linalg"):
        setattr(cupy, name, modules[f"cupy.{name}"])
    own = {"__version__": f"{MANIFEST['version']} (stand-in)", "ndarray": ndarray, "asnumpy": lambda a: a.get()}
    vars(cupy).update(own, is_available=lambda: True, newaxis=None)
    sys.modules.update(modules)
    return cupy
