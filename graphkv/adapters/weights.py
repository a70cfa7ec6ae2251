"""Weights of trained policies: arrays that are handed in, or those of a file in any array library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core import checks, primitives
from ..core.backend import Backend, resolve
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.files import StoredArray, read_tensors
from ..core.types import Array

__all__ = ["check_layers", "load_layers", "of_layer"]

# A frozen dataclass of one layer's arrays, whose AXES names their axes.
Weights = TypeVar("Weights")


def load_layers(path: Path, option: str, kind: type[Weights], /) -> list[Weights]:
    """Read the weights of all layers from a file.

    Parameters
    ----------
    path : pathlib.Path
        Of arrays ``layers.0.NAME``, ``layers.1.NAME`` and so on, for each name in the AXES of the kind.
    option : str
        The option that named the file, for the error.
    kind : type

    Returns
    -------
    list of that kind
        Of `StoredArray`.

    Raises
    ------
    ArgumentError
        If the file cannot be read, or an array is missing, surplus or not float32.
    """
    tensors, names = read_tensors(path, option), tuple(_axes(kind))
    found: dict[int, dict[str, StoredArray]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d{1,6})\.(\w+)", key)
        if match is None or match[2] not in names:
            raise ArgumentError(f"{option} {path} must hold layers.0.{names[0]} and so on, of {names}; got {key!r}")
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    wanted = [f"layers.{layer}.{name}" for layer in range(max(found, default=0) + 1) for name in names]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise ArgumentError(f"{option} {path} must hold all of its layers from 0 on; it lacks {', '.join(missing[:5])}")
    return [kind(**found[layer]) for layer in sorted(found)]


def check_layers(option: str, layers: Any, kind: type[Weights], /) -> tuple[Weights, ...]:
    """Return the weights of all layers as a tuple, whose shapes agree.

    Raises
    ------
    ArgumentError
        If there is no layer, or a shape does not fit to the others.
    ArgumentTypeError
        If `layers` is not a sequence of that kind, or something in it not an array.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ArgumentTypeError(f"{option} must be a sequence of {kind.__name__}; got {type(layers).__name__}")
    if not layers:
        raise ArgumentError(f"{option} must hold a {kind.__name__} for each layer; got none")
    known: dict[str, int] = {}
    for number, layer in enumerate(layers):
        checks.instance(f"{option}[{number}]", layer, kind)
        for name, axes in _axes(kind).items():
            array, where = getattr(layer, name), f"{option}[{number}].{name}"
            if not hasattr(array, "shape"):
                raise ArgumentTypeError(f"{where} must be an array; got {type(array).__name__}")
            shape = tuple(array.shape)
            fits = len(shape) == len(axes) and all(
                known.setdefault(axis, int(length)) == length and length > 0
                for axis, length in zip(axes, shape, strict=True)
            )
            if not fits:
                expected = ", ".join(f"{axis}={known[axis]}" if axis in known else axis for axis in axes)
                raise ArgumentError(f"{where} must have shape ({expected}); got {shape}")
    return tuple(layers)


def of_layer(
    option: str,
    layers: Sequence[Weights],
    layer: int,
    num_layers: int,
    sizes: Mapping[str, int],
    /,
    *,
    like: Array,
    backend: Backend,
) -> Weights:
    """Return the weights of one layer in the library, dtype and device of an array.

    Parameters
    ----------
    option : str
        What errors call the weights.
    layers : sequence
        As `check_layers` returned them.
    layer, num_layers : int
        Which layer of how many.
    sizes : mapping of str to int
        What axes must be in this model.
    like : array
    backend : Backend

    Raises
    ------
    ArgumentError
        If they are those of a model with another number of layers, or other sizes.
    BackendError
        If they are arrays of another library.
    """
    kind, xp = type(layers[0]), backend.xp
    found: dict[str, int] = {}
    for name, axes in _axes(kind).items():
        found.update(zip(axes, map(int, getattr(layers[0], name).shape), strict=True))
    ours, theirs = ({"layers": n, **x} for n, x in ((len(layers), found), (num_layers, sizes)))
    ours = {axis: ours[axis] for axis in theirs}
    if ours != theirs:
        raise ArgumentError(f"{option} must be those of this model, with {_said(theirs)}; got some for {_said(ours)}")
    arrays, device = {}, primitives.device_of(like)
    for name in _axes(kind):
        array = getattr(layers[layer], name)
        if isinstance(array, StoredArray):
            array = xp.reshape(xp.asarray(array.data, dtype=xp.float32, device=device), array.shape)
        else:
            resolve(backend, **{f"{option}[{layer}].{name}": array})
        # On another device they would have been refused by the library, in words of its own.
        arrays[name] = xp.asarray(xp.astype(array, like.dtype), device=device)
    return kind(**arrays)


def _axes(kind: type, /) -> dict[str, tuple[str, ...]]:
    axes: dict[str, tuple[str, ...]] = kind.AXES  # type: ignore[attr-defined]
    return axes


def _said(sizes: Mapping[str, int], /) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
