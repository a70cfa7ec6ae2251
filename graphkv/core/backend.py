"""The seam to an array library: what a backend must bring, what it may bring, and how a call finds it."""

# ruff: noqa: D102 - a protocol has its docstring on the class

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from .errors import ArgumentTypeError, BackendError, BackendUnavailableError
from .libraries import BUILT_IN, library_of
from .types import Array, Graph

__all__ = [
    "BUILT_IN",
    "Backend",
    "BuildGraphStep",
    "DegreeStep",
    "DistanceStep",
    "FuseStep",
    "PageRankStep",
    "PropagateStep",
    "ReceivedAttention",
    "SegmentReduce",
    "SelectStep",
    "SumRows",
    "TopK",
    "is_found_by_name",
    "load",
    "resolve",
]

# A package that brings a backend names it here: [project.entry-points."graphkv.backends"] name = "module:BACKEND".
ENTRY_POINTS = "graphkv.backends"


class TopK(Protocol):
    """The form of `graphkv.core.primitives.portable_top_k`. `tiers` may be bool where there are two of them."""

    def __call__(self, scores: Array, k: int, tiers: Array | None, /, *, backend: Backend) -> Array: ...


class SegmentReduce(Protocol):
    """The form of `graphkv.core.primitives.portable_segment_product` and of its sum."""

    def __call__(self, values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array: ...


class SumRows(Protocol):
    """The form of `graphkv.core.primitives.portable_sum_rows`."""

    def __call__(self, rows: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array: ...


class ReceivedAttention(Protocol):
    """The form of `graphkv.core.attention.portable_received_attention`."""

    def __call__(self, queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend) -> Array: ...


class BuildGraphStep(Protocol):
    """The form of `graphkv.core.graph.portable_build_graph`."""

    def __call__(
        self,
        keys: Array,
        importance: Array,
        valid: Array,
        /,
        *,
        num_sources: int,
        num_neighbors: int,
        chunk_size: int,
        backend: Backend,
    ) -> Graph: ...


class PropagateStep(Protocol):
    """The form of `graphkv.core.propagation.portable_propagate`."""

    def __call__(
        self,
        importance: Array,
        graph: Graph,
        /,
        *,
        signal: str,
        rounds: int,
        accumulation: str,
        strength: float,
        backend: Backend,
    ) -> Array: ...


class DegreeStep(Protocol):
    """The form of `graphkv.core.fusion.portable_degree`."""

    def __call__(self, keys: Array, valid: Array, /, *, backend: Backend) -> Array: ...


class DistanceStep(Protocol):
    """The form of `graphkv.core.fusion.portable_distance`."""

    def __call__(self, keys: Array, valid: Array, /, *, backend: Backend) -> Array: ...


class FuseStep(Protocol):
    """The form of `graphkv.core.fusion.portable_fuse`."""

    def __call__(
        self, importance: Array, distance: Array, valid: Array, /, *, fusion: str, exponent: int, backend: Backend
    ) -> Array: ...


class PageRankStep(Protocol):
    """The form of `graphkv.core.pagerank.portable_pagerank`."""

    def __call__(
        self, importance: Array, keys: Array, valid: Array, /, *, damping: float, rounds: int, backend: Backend
    ) -> Array: ...


class SelectStep(Protocol):
    """The form of `graphkv.core.selection.portable_select`."""

    def __call__(
        self, scores: Array, budget: int, protected: Array | None, valid: Array | None, /, *, backend: Backend
    ) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An array library, as graphkv sees it.

    Only the first three fields are required. Where a field is None, the portable form in `graphkv.core` is used, which
    needs nothing but the array API standard (2024.12 or later).

    Parameters
    ----------
    name : str
        The name by which it is asked for: ``backend="torch"``.
    xp : namespace
        An array API namespace.
    to_numpy : callable
        Turns an array into a `numpy.ndarray`.
    library : str, optional
        Root module of the array type. Default: `name`.
    top_k : TopK, optional
        The best tokens by the order of the specification.
    segment_product, segment_sum : SegmentReduce, optional
        Products and sums of the values that share an index.
    sum_rows : SumRows, optional
        Sums of the rows that go into the same slot, for merges.
    received_attention : ReceivedAttention, optional
        The attention that each token receives from the last positions.
    build_graph, propagate, degree, distance, fuse, pagerank, select : optional
        Replacements of a whole step, for speed: `BuildGraphStep`, `PropagateStep`, and so on. Each is called like the
        portable body of the step, such as `graphkv.core.graph.portable_build_graph`, and must give the same result.
    guard : callable, optional
        ``guard(array)`` returns a context that is entered around every call on that array: for a library whose results
        depend on global state, or that warns about values.
    detach : callable, optional
        ``detach(array)`` cuts an array off from the recording of gradients: for state, which would keep recording them.
    location : callable, optional
        ``location(array)`` names where an array is, and returns None where the library may move it to the others.
        Default: its attribute `device`.
    refuse : callable, optional
        ``refuse(array)`` names the kind of an array with which these steps cannot compute, such as
        ``"a sparse array"``, and returns an empty string for all others.

    Notes
    -----
    A copy is the same object. A pickle holds where the value is found again: the name of a built-in backend or of an
    entry point, else the module that has the value as a variable.
    """

    name: str
    xp: Any
    to_numpy: Callable[[Any], Any]
    library: str = ""
    top_k: TopK | None = None
    segment_product: SegmentReduce | None = None
    segment_sum: SegmentReduce | None = None
    sum_rows: SumRows | None = None
    received_attention: ReceivedAttention | None = None
    build_graph: BuildGraphStep | None = None
    propagate: PropagateStep | None = None
    degree: DegreeStep | None = None
    distance: DistanceStep | None = None
    fuse: FuseStep | None = None
    pagerank: PageRankStep | None = None
    select: SelectStep | None = None
    guard: Callable[[Any], AbstractContextManager[Any]] | None = None
    detach: Callable[[Any], Any] | None = None
    location: Callable[[Any], Any] | None = None
    refuse: Callable[[Any], str] | None = None

    def __post_init__(self) -> None:
        if not self.library:
            object.__setattr__(self, "library", self.name)

    def guarded(self, array: Any, /) -> AbstractContextManager[Any]:
        """Return the context of `guard`, or one that does nothing."""
        return nullcontext() if self.guard is None else self.guard(array)

    def __copy__(self) -> Backend:
        return self

    def __deepcopy__(self, memo: Any) -> Backend:
        return self

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[str, ...]]:
        """Pickle where the value is found: an array library cannot be pickled."""
        if is_found_by_name(self):
            return load, (self.name,)
        for module, values in [(name, vars(each)) for name, each in _modules()]:
            for variable, value in list(values.items()):
                if value is self:
                    return _load_variable, (module, variable)
        raise BackendError(
            f"backend {self.name!r} can be pickled only where it is found again: built in, an entry point of the group "
            f"{ENTRY_POINTS!r}, or a variable of an imported module; this value is not"
        )


def resolve(backend: Backend | str | None, /, **arrays: Any) -> Backend:
    """Return the backend of a call: the one that is asked for, else the one of the arrays.

    Parameters
    ----------
    backend : Backend, str or None
        A value is returned as it is, a name is looked up among the built-in ones and then among the entry points of
        the group ``graphkv.backends``, and None is inferred from the arrays (built-in ones only).
    **arrays : array or None
        The call's array arguments by name. None is ignored.

    Returns
    -------
    Backend

    Raises
    ------
    BackendError
        If an argument is not an array of a known library, if libraries or devices are mixed, or if the name is not
        known.
    BackendUnavailableError
        If the backend's library is not installed, or finds no device.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    libraries = {name: library_of(array) for name, array in given.items()}
    if isinstance(backend, Backend):
        found = backend
    elif backend is None:
        library = _only(libraries)
        if library not in BUILT_IN:
            raise BackendError(
                f"backend must be given for arrays of {library!r}; it is inferred only for {sorted(BUILT_IN)}"
            )
        found = load(library)
    elif isinstance(backend, str):
        found = load(backend)
    else:
        raise BackendError(f"backend must be a Backend, a name or None; got {type(backend).__name__}")
    for name, library in libraries.items():
        if library != found.library:
            _only(libraries)
            raise BackendError(
                f"{name} must be an array of {found.library!r} for backend {found.name!r}; got {library!r}"
            )
    if found.refuse is not None:
        for name, array in given.items():
            kind = found.refuse(array)
            if kind:
                raise ArgumentTypeError(f"{name} must be a dense array; got {kind}")
    _check_devices(given, found)
    return found


def _check_devices(arrays: dict[str, Any], backend: Backend, /) -> None:
    """Refuse arrays on several devices: a library would say so in the middle of a computation, or copy silently."""
    first, expected = "", None
    for name, array in arrays.items():
        device = getattr(array, "device", None) if backend.location is None else backend.location(array)
        if device is None:
            continue
        if expected is None:
            first, expected = name, device
        elif device != expected:
            raise BackendError(f"{name} must be on the device of {first}, {expected}; got {device}")


# The backends loaded so far, by name. A plain table, because a compiler (torch.compile) traces through a function cache
# into the import behind it.
LOADED: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """Return the backend of that name: a built-in one, else one that an installed package brings."""
    _ensure(name)
    return LOADED[name]


def _ensure(name: str) -> None:
    """Put the backend into the table, if it is not there."""
    if name not in LOADED:
        LOADED[name] = _import(name)


# What torch.compiler.assume_constant_result sets, without importing torch: the import then happens while tracing.
_ensure._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _import(name: str) -> Backend:
    """Import a backend."""
    if name not in BUILT_IN:
        return _load_entry_point(name)
    try:
        backend: Backend = importlib.import_module(BUILT_IN[name]).BACKEND
    except BackendUnavailableError:
        raise
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend {name!r} needs {name}: pip install 'graphkv[{name}]' ({error})"
        ) from error
    return backend


def is_found_by_name(backend: Backend) -> bool:
    """Return whether `load` finds that backend by its name."""
    try:
        return load(backend.name) == backend
    except (BackendError, BackendUnavailableError):
        return False


def _modules() -> list[tuple[str, ModuleType]]:
    """List the imported modules, our own first, because others may have imported their values."""
    modules = [(name, each) for name, each in list(sys.modules.items()) if isinstance(each, ModuleType)]
    return sorted(modules, key=lambda found: not found[0].startswith("graphkv."))


def _load_variable(module: str, name: str) -> Backend:
    """Return the backend that a module has as a variable."""
    backend = getattr(importlib.import_module(module), name, None)
    if not isinstance(backend, Backend):
        raise BackendError(f"the pickled backend must be {name!r} of {module!r}; there is none now")
    return backend


def _load_entry_point(name: str) -> Backend:
    """Load the backend that an installed package declares under that name."""
    from importlib import metadata  # noqa: PLC0415 - takes longer to import than graphkv, and few ask for it

    offers = list(metadata.entry_points(group=ENTRY_POINTS, name=name))
    if not offers:
        raise BackendError(
            f"backend must be one of {sorted(BUILT_IN)}, an entry point of the group {ENTRY_POINTS!r} or a Backend; "
            f"got {name!r}"
        )
    targets = sorted({offer.value for offer in offers})
    if len(targets) > 1:
        raise BackendError(f"backend {name!r} must have one entry point; got {targets}")
    try:
        backend = offers[0].load()
    except BackendUnavailableError:
        raise
    except ImportError as error:
        raise BackendUnavailableError(f"backend {name!r} needs what {targets[0]!r} imports ({error})") from error
    except AttributeError as error:
        raise BackendError(f"backend {name!r} must be where its entry point says, {targets[0]!r} ({error})") from error
    if not isinstance(backend, Backend):
        raise BackendError(
            f"backend {name!r} must be a Backend where its entry point says, {targets[0]!r}; "
            f"got {type(backend).__name__}"
        )
    return backend


def _only(libraries: dict[str, str]) -> str:
    """Return the one library of all arguments, or raise an error that names the library of each."""
    for name, library in libraries.items():
        if library.startswith("builtins."):
            raise BackendError(f"{name} must be an array; got {library.removeprefix('builtins.')}")
    if len(set(libraries.values())) != 1:
        raise BackendError(
            "arrays must come from one library; got "
            + ", ".join(f"{name}: {library!r}" for name, library in libraries.items())
        )
    return next(iter(libraries.values()))
