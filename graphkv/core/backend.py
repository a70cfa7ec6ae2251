"""What graphkv needs from an array library, and how a call finds it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import ArgumentTypeError, BackendError, BackendUnavailableError

__all__ = ["Backend", "library_of", "resolve"]

# Names, not modules: importing graphkv must not import an array library.
BUILT_IN = {
    "cupy": "graphkv.backends.cupy",
    "jax": "graphkv.backends.jax",
    "mlx": "graphkv.backends.mlx",
    "numpy": "graphkv.backends.numpy",
    "torch": "graphkv.backends.torch",
}
# A package that brings a backend names it here: [project.entry-points."graphkv.backends"] name = "module:BACKEND".
ENTRY_POINTS = "graphkv.backends"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An array library, as graphkv sees it.

    Only the first three fields are required. A field left as None means that the portable form in `graphkv.core` is
    used, which needs nothing but the array API standard (2024.12 or later).

    Parameters
    ----------
    name : str
        How people ask for it: ``backend="torch"``.
    xp : namespace
        An array API namespace.
    to_numpy : callable
        Turns an array into a `numpy.ndarray`.
    library : str, optional
        Root module of the array type. Default: `name`.
    top_k : callable, optional
        ``top_k(scores, k, tiers=None, *, xp)``, see `graphkv.core.primitives.top_k`.
    segment_product : callable, optional
        ``segment_product(values, index, num_segments, *, xp)``, see `graphkv.core.primitives.segment_product`.
    segment_sum : callable, optional
        As `segment_product`, with sums.
    received_attention : callable, optional
        ``received_attention(queries, keys, valid, *, block_size, xp)``, see
        `graphkv.core.primitives.received_attention`.
    build_graph, propagate, degree, fuse, pagerank, select : callable, optional
        Replacements of a whole step, for speed. Each is called like the portable body of the step (`_build_graph`,
        `_propagate`, and so on) and must give the same result.
    guard : callable, optional
        ``guard(array)`` returns a context that is entered around every call on that array: for a library whose results
        depend on a state around the call, or that warns about values.
    detach : callable, optional
        ``detach(array)`` cuts an array off from the recording of gradients: for state, which would record them forever.
    refuse : callable, optional
        ``refuse(array)`` names the kind of an array of the library with which these steps cannot compute, such as
        ``"a sparse array"``; an empty string for all others.

    Notes
    -----
    A copy is the same object. A pickle holds where the value is found again: the name of a built-in backend or of an
    entry point, else the module that has it as a variable.
    """

    name: str
    xp: Any
    to_numpy: Callable[[Any], Any]
    library: str = ""
    top_k: Callable[..., Any] | None = None
    segment_product: Callable[..., Any] | None = None
    segment_sum: Callable[..., Any] | None = None
    received_attention: Callable[..., Any] | None = None
    build_graph: Callable[..., Any] | None = None
    propagate: Callable[..., Any] | None = None
    degree: Callable[..., Any] | None = None
    fuse: Callable[..., Any] | None = None
    pagerank: Callable[..., Any] | None = None
    select: Callable[..., Any] | None = None
    guard: Callable[[Any], AbstractContextManager[Any]] | None = None
    detach: Callable[[Any], Any] | None = None
    refuse: Callable[[Any], str] | None = None

    def __post_init__(self) -> None:
        if not self.library:
            object.__setattr__(self, "library", self.name)

    def guarded(self, array: Any, /) -> AbstractContextManager[Any]:
        """Enter the `guard`, if there is one."""
        return nullcontext() if self.guard is None else self.guard(array)

    def __copy__(self) -> Backend:
        return self

    def __deepcopy__(self, memo: Any) -> Backend:
        return self

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[str, ...]]:
        """Pickle the way to the value: an array library cannot be pickled."""
        if is_found_by_name(self):
            return load, (self.name,)
        for module, values in [(name, vars(each)) for name, each in _modules()]:
            for variable, value in list(values.items()):
                if value is self:
                    return _load_variable, (module, variable)
        raise BackendError(
            f"backend {self.name!r} can be pickled only where it is found again: built in, an entry point of the group "
            f"{ENTRY_POINTS!r}, or a variable of an imported module; this value is none of them"
        )


def resolve(backend: Backend | str | None, /, **arrays: Any) -> Backend:
    """Give the backend of a call: the one that is asked for, else the one of the arrays.

    Parameters
    ----------
    backend : Backend, str or None
        A value is taken as it is, a name is looked up among the built-in ones and then among the entry points of the
        group ``graphkv.backends``, None is inferred from the arrays (built-in ones only).
    **arrays : array or None
        The call's array arguments by name. None is passed over.

    Returns
    -------
    Backend

    Raises
    ------
    BackendError
        If an argument is not an array of a known library, if libraries are mixed, or if the name is not known.
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
    return found


# The backends that were asked for, by name. A plain table, because a compiler (torch.compile) looks through a function
# cache and at the import behind it.
LOADED: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """Import the backend of that name: a built-in one, else one that an installed package brings."""
    _ensure(name)
    return LOADED[name]


def _ensure(name: str) -> None:
    """See that the backend is in the table."""
    if name not in LOADED:
        LOADED[name] = _import(name)


# What torch.compiler.assume_constant_result sets, without an import of torch: the import is made while it traces.
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
    """Say whether `load` gives that backend for its name."""
    try:
        return load(backend.name) == backend
    except (BackendError, BackendUnavailableError):
        return False


def _modules() -> list[tuple[str, ModuleType]]:
    """List what is imported, our own modules first, because others may have taken their values over."""
    modules = [(name, each) for name, each in list(sys.modules.items()) if isinstance(each, ModuleType)]
    return sorted(modules, key=lambda found: not found[0].startswith("graphkv."))


def _load_variable(module: str, name: str) -> Backend:
    """Find a backend again that a module has as a variable."""
    backend = getattr(importlib.import_module(module), name, None)
    if not isinstance(backend, Backend):
        raise BackendError(f"the pickled backend must be {name!r} of {module!r}; there is none now")
    return backend


def _load_entry_point(name: str) -> Backend:
    """Load the backend that an installed package offers under that name."""
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


def library_of(array: Any) -> str:
    """Name the library of an array: the root module of its type, or of the first known ancestor."""
    kind = type(array)
    if not _looks_like_array(array):
        return kind.__module__.partition(".")[0] if kind.__module__ != "builtins" else f"builtins.{kind.__name__}"
    # A mixin of NumPy's gives a class NumPy's operators, and no array of NumPy's.
    family = [ancestor for ancestor in kind.__mro__ if "Mixin" not in ancestor.__name__]
    roots = [ancestor.__module__.partition(".")[0] for ancestor in family]
    # The arrays of older releases of jax (0.4.35, say) have no ancestor in jax itself.
    roots = ["jax" if root == "jaxlib" else root for root in roots]
    return next((root for root in roots if root in BUILT_IN), roots[0])


def _looks_like_array(array: Any) -> bool:
    try:
        return hasattr(array, "shape") and hasattr(array, "dtype")
    except RuntimeError:
        return True  # a nested tensor has no single shape, and says so


def _only(libraries: dict[str, str]) -> str:
    """Give the one library of all arguments, or say which argument brings which."""
    for name, library in libraries.items():
        if library.startswith("builtins."):
            raise BackendError(f"{name} must be an array; got {library.removeprefix('builtins.')}")
    if len(set(libraries.values())) != 1:
        raise BackendError(
            "arrays must come from one library; got "
            + ", ".join(f"{name}: {library!r}" for name, library in libraries.items())
        )
    return next(iter(libraries.values()))
