"""Scores from elsewhere, as a policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core import checks
from ..core.backend import resolve
from ..core.errors import ArgumentError
from ..core.layer import Layer, Memory
from ..core.policy import Policy
from ..core.protection import Protection
from ..core.types import Array

__all__ = ["Given"]


@dataclass(frozen=True, kw_only=True)
class Marked(Protection):
    """Protection of tokens that are marked beforehand.

    Parameters
    ----------
    marks : array, shape (batch, kv_heads, N), bool, or None
    number : int
        How many that are in a row without padding.
    """

    marks: Array | None = None
    number: int = 0

    @property
    def count(self) -> int:
        """Tokens that are marked in a row without padding."""
        return self.number

    def mask(self, layer: Layer, memory: Memory | None = None, /) -> Array | None:
        """Return the marks."""
        if self.marks is not None:
            checks.mask(
                "protected", self.marks, tuple(layer.valid.shape), "(batch, kv_heads, N)", backend=layer.backend
            )
        return self.marks


@dataclass(frozen=True, kw_only=True)
class Given(Policy):
    """Keep the tokens of the highest scores that are handed in: of another program, a smaller model, or a test.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head; a float is a share of the tokens.
    importance : array, shape (batch, kv_heads, N)
        Higher = keep. Of the library of the keys that it is used with.
    protected : array, shape (batch, kv_heads, N), bool, optional
        Tokens to keep before all others.
    num_protected : int
        How many that are in a row without padding: `GraphKV` takes its sources and neighbors from the rest of the
        budget. The array is not read for it, because that would wait for its device.

    Raises
    ------
    ArgumentError
        If `num_protected` is negative, or given without `protected`; when evicting, if a shape is not that of the
        tokens.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Two values of this policy are equal if their arrays are the same objects: comparing numbers would read them.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import Given, evict
    >>> evict(Given(budget=2, importance=np.asarray([[[3.0, 1.0, 2.0, 0.0]]])), np.ones((1, 1, 4, 2))).kept
    array([[[0, 2]]])
    """

    importance: Array = field(repr=False)
    protected: Array | None = field(default=None, repr=False)
    num_protected: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if checks.count("num_protected", self.num_protected) and self.protected is None:
            raise ArgumentError(f"num_protected must be 0 without protected; got {self.num_protected}")

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the scores."""
        resolve(layer.backend, keys=layer.keys, importance=self.importance, protected=self.protected)
        checks.same_leading("importance", tuple(self.importance.shape), tuple(layer.valid.shape), "keys")
        return self.importance

    def protection(self, budget: int, /) -> Protection:
        """Protect what is marked."""
        return Marked(marks=self.protected, number=self.num_protected)
