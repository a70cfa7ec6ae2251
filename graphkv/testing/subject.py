"""A backend under test, and how arrays get into its library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..core.backend import Backend

__all__ = ["Subject", "describe", "label", "variants"]

# The fields for which there is a portable form; every property runs with and without them. The rest have none.
HOOKS = ("guard", "detach", "location", "refuse")
OPTIONAL = tuple(
    field.name for field in dataclasses.fields(Backend) if field.default is None and field.name not in HOOKS
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject(Backend):
    """A backend under test that defines where its arrays are made.

    A plain `Backend` is tested with arrays from ``xp.asarray``, on the library's default device. This one makes them
    its own way, to test another device or arrays that refuse to be written to.

    Parameters
    ----------
    from_numpy : callable, optional
        Turns a `numpy.ndarray` into an array of the library. Default: ``xp.asarray``.
    title : str, optional
        Name in test ids and in the report header. Default: `name`.
    """

    from_numpy: Callable[[Any], Any] | None = None
    title: str = ""


def label(backend: Backend, /) -> str:
    """Name a backend in test ids: ``torch``, or ``torch:portable`` without its overrides."""
    return getattr(backend, "title", "") or backend.name


def variants(backend: Backend, /) -> list[Backend]:
    """Return the backend, and again without its overrides if it has any, so that the portable forms are tested too.

    Parameters
    ----------
    backend : Backend

    Returns
    -------
    list of Backend
        One or two; the second is labelled ``<label>:portable``.
    """
    if all(getattr(backend, name) is None for name in OPTIONAL):
        return [backend]
    fields = {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)}
    fields |= dict.fromkeys(OPTIONAL) | {"title": f"{label(backend)}:portable"}
    return [backend, Subject(**fields)]


def describe(backends: list[Backend], /) -> str:
    """Write the line of the report header: which backends run, on which devices."""
    from . import asserts  # noqa: PLC0415 - NumPy is loaded only where the kit is in use

    shown = [f"{label(backend)} ({asserts.device_of(backend)})" for backend in backends]
    return "graphkv backends: " + (", ".join(shown) or "none")
