"""Checks that several doors and constructors share, of shapes, dtypes and options; array values are never read."""

from __future__ import annotations

import operator
from collections.abc import Collection
from inspect import Parameter, signature
from math import isfinite, isnan
from numbers import Real
from typing import Any, Protocol

from .errors import ArgumentError, ArgumentTypeError, BackendError
from .libraries import library_of

__all__ = [
    "budget",
    "choice",
    "constructor",
    "cosine",
    "count",
    "finite_weight",
    "flag",
    "fraction",
    "graph_fields",
    "grouped_rows",
    "instance",
    "integers",
    "is_whole",
    "mask",
    "most_places",
    "numeric",
    "places",
    "ratio_or_count",
    "same_leading",
    "single_round",
    "unused",
]


class HasNamespace(Protocol):
    """The part of a `Backend` that checks need; its module imports this one."""

    @property
    def xp(self) -> Any:
        """Return the array API namespace."""


def count(name: str, value: Any, /, *, minimum: int = 0) -> int:
    """Return an integer >= `minimum`; bools are rejected."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{name} must be an integer; got {_show(value)}") from None
    if number < minimum:
        raise ArgumentError(f"{name} must be at least {minimum}; got {number}")
    return number


def is_whole(value: Any, /) -> bool:
    """Return whether a number is an integer, of any library: a count; others are shares."""
    return hasattr(value, "__index__")


def fraction(name: str, value: Any, /) -> float:
    """Return a real number in [0, 1] as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a real number in [0, 1]; got {_show(value)}")
    number = float(value)
    if isnan(number) or not 0 <= number <= 1:
        raise ArgumentError(f"{name} must lie in [0, 1]; got {number}")
    return number


def cosine(name: str, value: Any, /) -> float:
    """Return a real number in [-1, 1] as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a real number in [-1, 1]; got {_show(value)}")
    number = float(value)
    if isnan(number) or not -1 <= number <= 1:
        raise ArgumentError(f"{name} must lie in [-1, 1]; got {number}")
    return number


def finite_weight(name: str, value: Any, /) -> float:
    """Return a finite real number >= 0 as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a real number; got {_show(value)}")
    number = float(value)
    if not isfinite(number) or number < 0:
        raise ArgumentError(f"{name} must be finite and at least 0; got {number}")
    return number


def budget(value: Any, /) -> int | float:
    """Return a budget: tokens as an integer of at least 0, or a share of the tokens as a float above 0, at most 1."""
    if isinstance(value, Real) and not isinstance(value, bool) and not is_whole(value):
        number = float(value)
        if not 0 < number <= 1:
            raise ArgumentError(
                f"budget must be a number of tokens as an integer, or a share above 0 and at most 1; got {number}"
            )
        return number
    try:
        return count("budget", value)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"budget must be an integer or a float share; got {_show(value)}") from None


def finite_number(name: str, value: Any, /) -> float:
    """Return a finite real number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a real number; got {_show(value)}")
    number = float(value)
    if not isfinite(number):
        raise ArgumentError(f"{name} must be finite; got {number}")
    return number


def ratio_or_count(name: str, value: Any, /) -> int | float:
    """Return a count as an integer, or a share as a float in [0, 1]."""
    if isinstance(value, Real) and not isinstance(value, bool) and not is_whole(value):
        return fraction(name, value)
    try:
        return count(name, value)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{name} must be an integer or a float share; got {_show(value)}") from None


def choice(name: str, value: Any, allowed: Collection[str], /) -> str:
    """Return a word that must be one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ArgumentError(f"{name} must be one of {sorted(allowed)}; got {_show(value)}")
    return value


def flag(name: str, value: Any, /) -> bool:
    """Return a value that must be True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False; got {_show(value)}")
    return value


def single_round(accumulation: str, rounds: int, /) -> None:
    """Refuse to iterate the sum accumulation, which would flip signs."""
    if accumulation == "sum" and rounds != 1:
        raise ArgumentError(f"rounds must be 1 with accumulation 'sum'; got {rounds}")


def unused(name: str, value: Any, default: Any, choice: str, chosen: str, /) -> None:
    """Require that an option which the chosen mode ignores keeps its default."""
    # By type too: one neighbor is 1, and all of them are 1.0.
    if (type(value), value) != (type(default), default):
        raise ArgumentError(f"{name} must be left out with {choice} {chosen!r}; got {_show(value)}")


def numeric(name: str, array: Any, axes: str, /, *, ndim: int | None = None, backend: HasNamespace) -> tuple[int, ...]:
    """Return the shape of a real array, which must have the axes that `axes` describes, such as ``(..., N, D)``."""
    xp = backend.xp
    # torch counts half precision as real floating; the standard has float32 and float64 only.
    if not _is_kind(array, ("real floating", "integral"), backend):
        raise ArgumentTypeError(f"{name} must be real; got dtype {array.dtype}")
    # Wider than float64 would have to be narrowed, and no call changes a dtype silently.
    if xp.isdtype(array.dtype, "real floating") and xp.finfo(array.dtype).bits > 64:
        raise ArgumentTypeError(f"{name} must be float64 or narrower; got dtype {array.dtype}")
    shape = tuple(array.shape)
    least = axes.count(",") + (0 if "..." in axes else 1)
    if len(shape) < least or (ndim is not None and len(shape) != ndim):
        raise ArgumentError(f"{name} must have shape {axes}; got {shape}")
    places(name, shape, backend=backend)
    return shape


def places(name: str, shape: tuple[int, ...], /, *, backend: HasNamespace) -> None:
    """Require that each place along an axis is one of the library's integers: JAX has none above 2^31 by default."""
    most = most_places(backend.xp)
    if max(shape, default=0) > most:
        raise ArgumentError(f"{name} must have at most {most} entries along an axis, to have indices; got {shape}")


def most_places(xp: Any, /) -> int:
    """Return how many places the widest integers of a library can count."""
    return int(xp.iinfo(xp.int64).max)


def integers(name: str, array: Any, /, *, backend: HasNamespace) -> None:
    """Require an array of integers."""
    if not _is_kind(array, "integral", backend):
        raise ArgumentTypeError(f"{name} must be an array of integers; got dtype {array.dtype}")


def mask(name: str, array: Any, shape: tuple[int, ...], of: str, /, *, backend: HasNamespace) -> None:
    """Require a bool array of that shape."""
    if not _is_kind(array, "bool", backend):
        raise ArgumentTypeError(f"{name} must be bool; got dtype {array.dtype}")
    if tuple(array.shape) != shape:
        raise ArgumentError(f"{name} must have the shape {shape} of {of}; got {tuple(array.shape)}")


def same_leading(name: str, shape: tuple[int, ...], expected: tuple[int, ...], of: str, /) -> None:
    """Require equal shapes."""
    if shape != expected:
        raise ArgumentError(f"{name} must have shape {expected} like {of}; got {shape}")


def grouped_rows(
    name: str, shape: tuple[int, ...], axes: str, batch: int, kv_heads: int, num_tokens: int, last: int, /
) -> None:
    """Require rows of query heads, a multiple of the KV heads, for at most the last N positions."""
    _, query_heads, num_queries, _ = shape
    if shape[0] != batch or shape[-1] != last:
        raise ArgumentError(f"{name} must have shape {axes} = ({batch}, query_heads, Q, {last}) like keys; got {shape}")
    if kv_heads == 0 or query_heads == 0 or query_heads % kv_heads:
        raise ArgumentError(f"{name} must have a multiple of the {kv_heads} KV heads of keys; got {query_heads} heads")
    if num_queries > num_tokens:
        raise ArgumentError(f"{name} must cover at most the N={num_tokens} positions of keys; got {num_queries}")


def instance(name: str, value: Any, kind: type, /) -> None:
    """Require a value of one of the library's own types."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}: call it" if isinstance(value, type) else type(value).__name__
        raise ArgumentTypeError(f"{name} must be a {kind.__name__}; got {got}")


def constructor(kind: type, /, *values: Any, **options: Any) -> None:
    """Require that values without a name have places in the constructor of a class, and leave none empty.

    Options that it does not know are Python's to refuse, which names them.
    """
    expected = signature(kind.__init__)  # type: ignore[misc]
    try:
        expected.bind(None, *values, **{name: options[name] for name in options if name in expected.parameters})
    except TypeError as problem:
        _, *parameters = expected.parameters.values()
        takes = [f"{each.name}=..." if each.kind is Parameter.KEYWORD_ONLY else each.name for each in parameters]
        got = [*(_show(each) for each in values), *(f"{name}={_show(each)}" for name, each in options.items())]
        name = kind.__name__
        raise ArgumentTypeError(
            f"{name} must be called as {name}({', '.join(takes)}); {problem} in {name}({', '.join(got)})"
        ) from None


def graph_fields(graph: Any, /) -> None:
    """Check the fields of a Graph."""
    count("num_tokens", graph.num_tokens)
    arrays = {name: getattr(graph, name) for name in ("sources", "neighbors", "weights")}
    libraries = {name: library_of(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise BackendError(f"{name} must be an array; got {type(array).__name__}")
    if len(set(libraries.values())) != 1:
        raise BackendError(f"arrays of a Graph must come from one library; got {libraries}")
    sources, neighbors, weights = (tuple(array.shape) for array in arrays.values())
    if len(sources) < 1:
        raise ArgumentError(f"sources must have shape (..., K); got {sources}")
    if len(neighbors) != len(sources) + 1 or neighbors[:-1] != sources:
        raise ArgumentError(f"neighbors must have shape (..., K, M) with sources of shape {sources}; got {neighbors}")
    same_leading("weights", weights, neighbors, "neighbors")


def _is_kind(array: Any, kind: Any, backend: HasNamespace) -> bool:
    """Return whether an array has a dtype of that kind; False for dtypes that the library does not know."""
    try:
        return bool(backend.xp.isdtype(array.dtype, kind))
    except (TypeError, ValueError):
        return False


def _show(value: Any) -> str:
    """Return a short description: numbers and words themselves, and the type of anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return type(value).__name__
