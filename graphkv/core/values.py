"""Immutable values that are equal when they mean the same."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Value"]


class Value:
    """Base of frozen dataclasses whose equality knows that a count and a share differ: 1 token is not 1.0 of them.

    Raises
    ------
    ArgumentTypeError
        If values without a name do not fit the constructor: options have names.
    """

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Refuse values without a name that do not fit: Python would count them, and not say what it expects."""
        if values:
            checks.constructor(cls, *values, **options)
        return super().__new__(cls)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # In the class itself, so that `dataclass` does not write its own.
        for name in ("__eq__", "__hash__"):
            if name not in vars(cls):
                setattr(cls, name, vars(Value)[name])

    def __eq__(self, other: object) -> bool:
        """Compare class and fields; a count and a share are different, whatever their numbers."""
        if type(self) is not type(other):
            return NotImplemented
        return bool(_identity(self) == _identity(other))

    def __hash__(self) -> int:
        """Hash what is compared."""
        return hash(_identity(self))


def _identity(value: Any, /) -> Any:
    """Return what distinguishes a value, the kind of a number included: counts are integers, shares are floats."""
    if isinstance(value, Value) and is_dataclass(value):
        return (type(value), *(_identity(getattr(value, each.name)) for each in fields(value)))
    if isinstance(value, (tuple, list)):
        return tuple(_identity(each) for each in value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return ("count" if hasattr(value, "__index__") else "share", value)
    # An array is equal to itself only: comparing two would have to read their values.
    return ("array", id(value)) if hasattr(value, "shape") else value
