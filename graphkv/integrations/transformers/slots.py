"""Everything that a cache layer stores per token, as one immutable value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import torch
from torch.nn.functional import pad

from . import rotary

__all__ = ["FILLS", "OfSlots", "Slots", "gathered", "in_line", "padding_first"]

# A tensor, a mapping of tensors by name, or None.
Stored = TypeVar("Stored")


def per_token(*axes: str, dtype: torch.dtype | None = None, fill: Any = 0) -> dict[str, Any]:
    """Describe an array of shape (batch, kv_heads, stored, *axes), of floats unless a dtype is given.

    `fill` is the value of slots that the array does not reach.
    """
    return {"axes": ("batch", "kv_heads", "stored", *axes), "dtype": dtype, "fill": fill}


def _nothing() -> torch.Tensor:
    return torch.zeros(0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """What a layer stores per token. A new array is one line here, and every method below knows it.

    Keys and values are there for every slot. Other arrays may end earlier: what comes after their end is what nothing
    is known of yet. No method writes into a tensor, so copies of a cache share them.

    Attributes
    ----------
    keys : torch.Tensor, shape (batch, kv_heads, stored, D)
    values : torch.Tensor, shape (batch, kv_heads, stored, Dv)
    positions : torch.Tensor, shape (batch, kv_heads, stored), int64, or None
        True positions, ascending; -1, at the front, in slots that a head with a smaller budget does not use. None as
        long as they follow on each other up to the last token seen, see `true_positions`.
    places : torch.Tensor, shape (batch, kv_heads, P, axes), int64, or None
        The positions that the first P stored keys are rotated by, which may be the caller's own.
    valid : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        False for padding and unused slots. None if there are none.
    mass : torch.Tensor, shape (batch, kv_heads, stored), float32, or None
        How many tokens a slot counts as: attention adds its logarithm to the slot's logit. None as long as nothing was
        merged.
    absorbed : torch.Tensor, shape (batch, kv_heads, stored), int32, or None
        How many dropped tokens went into a slot. None as long as nothing was merged.
    pinned : torch.Tensor, shape (batch, kv_heads, stored), bool, or None
        True for the tokens of the prompt, in a cache that protects them.
    state : dict of str to torch.Tensor, shape (batch, kv_heads, S, ...)
        A policy's running sums of the first S stored tokens.
    """

    keys: torch.Tensor = field(default_factory=_nothing, metadata=per_token("head_size"))
    values: torch.Tensor = field(default_factory=_nothing, metadata=per_token("value_size"))
    positions: torch.Tensor | None = field(default=None, metadata=per_token(dtype=torch.int64, fill=-1))
    places: torch.Tensor | None = field(
        default=None, metadata=per_token("axes", dtype=torch.int64, fill=rotary.UNKNOWN)
    )
    valid: torch.Tensor | None = field(default=None, metadata=per_token(dtype=torch.bool, fill=True))
    mass: torch.Tensor | None = field(default=None, metadata=per_token(dtype=torch.float32, fill=1.0))
    absorbed: torch.Tensor | None = field(default=None, metadata=per_token(dtype=torch.int32, fill=0))
    pinned: torch.Tensor | None = field(default=None, metadata=per_token(dtype=torch.bool, fill=False))
    state: dict[str, torch.Tensor] = field(default_factory=dict, metadata=per_token())

    @classmethod
    def empty(cls, keys: torch.Tensor, values: torch.Tensor) -> Slots:
        """Make slots without a token, for keys and values of these kinds."""
        return cls(keys=keys[:, :, :0], values=values[:, :, :0])

    @property
    def count(self) -> int:
        """Slots per row and head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return int(self.keys.nbytes + self.values.nbytes)

    def true_positions(self, end: int) -> torch.Tensor:
        """Return positions (batch, kv_heads, stored): the last ones before `end` where none are held."""
        if self.positions is not None:
            return self.positions
        return torch.arange(end - self.count, end, device=self.keys.device).expand(*self.keys.shape[:2], -1)

    def having(self, **arrays: Any) -> Slots:
        """Return slots with some arrays in place of theirs."""
        return _made({**self.__dict__, **arrays})

    def append(self, new: Mapping[str, Any]) -> Slots:
        """Add slots at the end, given by their arrays; arrays that they lack do not grow."""
        arrays, count = {**self.__dict__}, self.count
        for name, array in new.items():
            if array is not None:
                arrays[name] = _joined(arrays[name], array, count, FILLS[name])
        return _made(arrays)

    def reaching(self, name: str, new: torch.Tensor) -> Slots:
        """Return slots whose array of this name ends with `new`, for the last tokens stored."""
        return self.having(**{name: _joined(self.__dict__[name], new, self.count - new.shape[2], FILLS[name])})

    def first(self, count: int) -> Slots:
        """Return the oldest slots."""
        return self._each(lambda x, _: x[:, :, :count])

    def last(self, count: int) -> Slots:
        """Return the newest slots."""
        start = self.count - count
        return self._each(lambda x, _: x[:, :, start:]) if start else self

    def take(self, index: torch.Tensor, *, has_unused: bool = False) -> Slots:
        """Gather slots by their index, shape (batch, kv_heads, b).

        With `has_unused`, an index of -1 leaves a slot unused: not valid, and at position -1.
        """
        count, where = self.count, index.clamp(min=0) if has_unused else index
        taken = self._each(lambda x, fill: gathered(_reaching(x, count, fill), where))
        if not has_unused:
            return taken
        is_used = index >= 0
        return taken.having(
            positions=None if taken.positions is None else taken.positions.masked_fill(~is_used, -1),
            valid=is_used if taken.valid is None else taken.valid & is_used,
        )

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Slots:
        """Select, repeat or reorder rows of the batch."""
        return self._each(lambda x, _: change(x))

    def clone(self) -> Slots:
        """Copy every tensor, so that what these are parts of is freed."""
        return self._each(lambda x, _: x.clone())

    @classmethod
    def stack(cls, slots: Sequence[Slots]) -> Slots:
        """Put batches of equally many slots below each other; what one of them lacks is filled up."""
        return cls(**{
            name: _stacked([getattr(each, name) for each in slots], slots, fill) for name, fill in FILLS.items()
        })  # fmt: skip

    def _each(self, change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Slots:
        """Change every tensor; `change` gets the fill of its array as well."""
        return self.having(**{name: _changed(getattr(self, name), change, fill) for name, fill in FILLS.items()})


class OfSlots(Generic[Stored]):
    """An array of the slots as an attribute of a layer: transformers' own code reads and assigns keys and values."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Stored:
        if layer is None:
            return self  # type: ignore[return-value]
        # Before the first token transformers expects no keys and values.
        is_there = layer.is_initialized or self.name not in ("keys", "values")
        return getattr(layer.slots, self.name) if is_there else None  # type: ignore[return-value]

    def __set__(self, layer: Any, value: Stored) -> None:
        if layer.is_initialized:
            layer.slots = layer.slots.having(**{self.name: value})


FILLS = {each.name: each.metadata["fill"] for each in fields(Slots)}


def _made(arrays: dict[str, Any]) -> Slots:
    """Make slots of all their arrays in a fraction of the constructor's time: every step of decoding does so."""
    slots = object.__new__(Slots)
    slots.__dict__.update(arrays)
    return slots


def _changed(stored: Stored, change: Callable[[torch.Tensor, Any], torch.Tensor], fill: Any) -> Stored:
    if isinstance(stored, dict):
        return {name: change(each, fill) for name, each in stored.items()}  # type: ignore[return-value]
    return None if stored is None else change(stored, fill)  # type: ignore[arg-type, return-value]


def _joined(stored: Any, new: Any, count: int, fill: Any) -> Any:
    """Append to an array of `count` slots."""
    if isinstance(new, dict):
        return {**stored, **{name: _joined(stored.get(name), each, count, fill) for name, each in new.items()}}
    if stored is None or stored.shape[2] != count:
        if not new.shape[2]:
            return stored
        stored = _reaching(new[:, :, :0] if stored is None else stored, count, fill)
    return torch.cat([stored, new], dim=2)


def _stacked(arrays: Sequence[Any], slots: Sequence[Slots], fill: Any) -> Any:
    first = next((each for each in arrays if each is not None), None)
    if first is None:
        return None
    if isinstance(first, dict):
        names = dict.fromkeys(name for each in arrays for name in each)
        return {name: _stacked([each.get(name) for each in arrays], slots, fill) for name in names}
    rows = [
        first.new_full((own.keys.shape[0], *first.shape[1:2], own.count, *first.shape[3:]), fill)
        if each is None
        else _reaching(each, own.count, fill)
        for each, own in zip(arrays, slots, strict=True)
    ]
    return torch.cat(rows)


def _reaching(array: torch.Tensor, count: int, fill: Any) -> torch.Tensor:
    """Fill an array up to a number of slots."""
    if missing := count - array.shape[2]:
        return pad(array, (*(0, 0) * (array.ndim - 3), 0, missing), value=fill)
    return array


def gathered(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather along the third axis by an index of shape (batch, heads, b)."""
    index = index.reshape(*index.shape, *(1 for _ in tensor.shape[3:]))
    return tensor.gather(2, index.expand(*index.shape[:3], *tensor.shape[3:]))


def padding_first(valid: torch.Tensor) -> torch.Tensor:
    """Return the order along the last axis that puts what is not valid first and changes nothing else."""
    return valid.to(torch.uint8).argsort(dim=-1, stable=True)


def in_line(kept: torch.Tensor, arrays: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Sort kept slots and what goes with them, and cut off the front where no row holds anything."""
    kept, order = kept.sort(dim=-1, stable=True)
    unused = kept.shape[-1] - int((kept >= 0).sum(dim=-1).max())
    sorted_too = {
        name: _changed(each, lambda x, _: gathered(x, order)[:, :, unused:], None) for name, each in arrays.items()
    }
    return kept[..., unused:], sorted_too
