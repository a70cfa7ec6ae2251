"""Slots of which some are packed in fewer bits; they read like any others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import pad

from ...core.backend import load
from ...core.errors import ArgumentError
from ...core.precision import Precision, Quantized, dequantize, key_balance, peaks, quantize
from .slots import FILLS, Slots, gathered

__all__ = ["Packed", "TieredSlots", "Tiers", "demoted", "query_peaks"]

Change = Callable[[torch.Tensor], torch.Tensor]

# What is packed, and of which tensors it is made.
LOW, PARTS = ("low_keys", "low_values"), ("codes", "scale", "offset")


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Keys or values in fewer bits.

    Attributes
    ----------
    codes : torch.Tensor, shape (batch, kv_heads, P, bytes), uint8
        Codes of `Precision.bits` bits each, the first in the lowest bits; 8 codes of 3 bits take 3 bytes.
    scale, offset : torch.Tensor, shape (batch, kv_heads, P, groups)
        In the dtype of the model.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, precision: Precision, dtype: torch.dtype) -> Packed:
        """Round and pack numbers (batch, kv_heads, P, D)."""
        found = quantize(x, precision, backend=load("torch"))
        return cls(codes=packed(found.codes, precision), scale=found.scale.to(dtype), offset=found.offset.to(dtype))

    def read(self, size: int, precision: Precision) -> torch.Tensor:
        """Return the numbers (batch, kv_heads, P, size), float32 or wider."""
        scale, offset = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (self.scale, self.offset))
        codes = unpacked(self.codes, size, precision)
        found = Quantized(codes=codes, scale=scale, offset=offset)
        return cast("torch.Tensor", dequantize(found, precision, backend=load("torch")))

    def each(self, change: Change) -> Packed:
        """Change every tensor."""
        return Packed(codes=change(self.codes), scale=change(self.scale), offset=change(self.offset))

    def or_from(self, old: Packed, index: torch.Tensor, is_old: torch.Tensor) -> Packed:
        """Take the bits of an older one where they are known: at `index` (batch, kv_heads, P) where `is_old`."""
        names = ("codes", "scale", "offset")
        return Packed(**{
            name: torch.where(is_old[..., None], gathered(getattr(old, name), index), getattr(self, name))
            for name in names
        })  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self.codes.nbytes + self.scale.nbytes + self.offset.nbytes


def packed(codes: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Pack codes (..., D) into bytes."""
    per_word, num_bytes = precision.word
    missing = -codes.shape[-1] % per_word
    words = _parted(pad(codes, (0, missing)), per_word).to(torch.int32)
    words = (words << _steps(per_word, precision.bits, words)).sum(dim=-1, dtype=torch.int32)
    found: torch.Tensor = (words[..., None] >> _steps(num_bytes, 8, words)) & 255
    return found.to(torch.uint8).flatten(-2)


def unpacked(packed: torch.Tensor, size: int, precision: Precision) -> torch.Tensor:
    """Return the codes (..., size), uint8, of bytes."""
    per_word, num_bytes = precision.word
    # Words of one byte are shifted in place of integers four times as large.
    words = _parted(packed, num_bytes)
    if num_bytes == 1:
        words = words[..., 0]
    else:
        words = (words.to(torch.int32) << _steps(num_bytes, 8, words, torch.int32)).sum(dim=-1, dtype=torch.int32)
    codes: torch.Tensor = (words[..., None] >> _steps(per_word, precision.bits, words)) & (2**precision.bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :size]


def _parted(x: torch.Tensor, count: int) -> torch.Tensor:
    """Part the last axis into words of as many entries."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // count, count)


def _steps(count: int, step: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.arange(0, count * step, step, dtype=dtype or like.dtype, device=like.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiers:
    """Keys and values of tokens of which some are packed, and in which order they stand.

    Attributes
    ----------
    precision : Precision
    low_keys, low_values : Packed
        The demoted tokens.
    keys, values : torch.Tensor, shape (batch, kv_heads, F, D)
        All others.
    order : torch.Tensor, shape (batch, kv_heads, stored), int32
        Where a token is: among the P packed ones, or P and more among the others. Rows that demote fewer than the most
        have places there that no token is at.
    balance : torch.Tensor, shape (batch, kv_heads, D), float32, or None
        What packed keys are multiplied by, see `key_balance`.
    num_appended : int
        How many of the newest tokens have come since.
    """

    precision: Precision
    low_keys: Packed
    low_values: Packed
    keys: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor
    balance: torch.Tensor | None
    num_appended: int = 0

    @property
    def is_low(self) -> torch.Tensor:
        """Mark the demoted tokens (batch, kv_heads, stored)."""
        return self.order < self.low_keys.codes.shape[2]

    def read(self, name: str) -> torch.Tensor:
        """Return all keys, or all values, in their order (batch, kv_heads, stored, D)."""
        full: torch.Tensor = getattr(self, name)
        low = getattr(self, f"low_{name}").read(full.shape[-1], self.precision)
        if name == "keys" and self.balance is not None:
            low = low / self.balance[:, :, None]
        return gathered(torch.cat([low.to(full.dtype), full], dim=2), self.order.long())

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Tiers:
        """Add tokens that are not demoted."""
        count, start = keys.shape[2], self.low_keys.codes.shape[2] + self.keys.shape[2]
        places = torch.arange(start, start + count, dtype=torch.int32, device=keys.device)
        return self._with(
            keys=torch.cat([self.keys, keys], dim=2),
            values=torch.cat([self.values, values], dim=2),
            order=torch.cat([self.order, places.expand(*self.order.shape[:2], -1)], dim=2),
            num_appended=self.num_appended + count,
        )

    def without_newest(self, count: int) -> Tiers:
        """Forget some of the tokens that were appended."""
        full, stored = self.keys.shape[2] - count, self.order.shape[2] - count
        return self._with(
            keys=self.keys[:, :, :full],
            values=self.values[:, :, :full],
            order=self.order[:, :, :stored],
            num_appended=self.num_appended - count,
        )

    def each(self, change: Change) -> Tiers:
        """Change every tensor."""
        return self._with(
            low_keys=self.low_keys.each(change),
            low_values=self.low_values.each(change),
            keys=change(self.keys),
            values=change(self.values),
            order=change(self.order),
            balance=None if self.balance is None else change(self.balance),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor by its name, for a file."""
        packed = {f"{low}.{part}": getattr(getattr(self, low), part) for low in LOW for part in PARTS}
        balance = {} if self.balance is None else {"balance": self.balance}
        return packed | balance | {"keys": self.keys, "values": self.values, "order": self.order}

    @classmethod
    def of_tensors(cls, found: dict[str, torch.Tensor], precision: Precision, num_appended: int, name: str) -> Tiers:
        """Put the tensors of a file together.

        Raises
        ------
        ArgumentError
            If they do not fit to each other.
        """
        names = {"keys", "values", "order", *(f"{low}.{part}" for low in LOW for part in PARTS)}
        names |= {"balance"} if precision.balanced else set()
        if set(found) != names:
            raise ArgumentError(f"its {name} must hold {', '.join(sorted(names))}; got {sorted(found)}")
        order, width = found["order"], found["low_keys.codes"].shape[2] if found["low_keys.codes"].ndim == 4 else -1
        rows, full = tuple(found["keys"].shape[:2]), found["keys"].shape[2] if found["keys"].ndim == 4 else -1
        for key, tensor in found.items():
            low, _, part = key.partition(".")
            size = found[low.removeprefix("low_")].shape[-1] if part else found["keys"].shape[-1]
            shapes = {
                "codes": (*rows, width, precision.row_bytes(size, full_bits=0)),
                "scale": (*rows, width, precision.num_groups(size)),
                "offset": (*rows, width, precision.num_groups(size)),
                "keys": (*rows, full, size),
                "values": (*rows, full, found["values"].shape[-1]),
                "order": (*rows, order.shape[-1]),
                "balance": (*rows, size),
            }
            dtype = {"codes": torch.uint8, "order": torch.int32, "balance": torch.float32}.get(part or low)
            is_kind = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
            if tuple(tensor.shape) != shapes[part or low] or not is_kind:
                raise ArgumentError(
                    f"its {name}.{key} must have shape {shapes[part or low]} and dtype {dtype or 'float'}; "
                    f"got {tuple(tensor.shape)} and {tensor.dtype}"
                )
        if not bool(((order >= 0) & (order < width + full)).all()) or num_appended > min(full, order.shape[-1]):
            raise ArgumentError(f"its {name}.order must name places among the {width + full} that are stored")
        low_keys, low_values = (Packed(**{part: found[f"{low}.{part}"] for part in PARTS}) for low in LOW)
        return cls(
            precision=precision,
            low_keys=low_keys,
            low_values=low_values,
            keys=found["keys"],
            values=found["values"],
            order=order,
            balance=found.get("balance"),
            num_appended=num_appended,
        )

    def _with(self, **changes: Any) -> Tiers:
        return Tiers(**{**self.__dict__, **changes})

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: of codes, scales, offsets, the balance, and of what is not packed."""
        balance = 0 if self.balance is None else self.balance.nbytes
        return self.low_keys.nbytes + self.low_values.nbytes + balance + self.keys.nbytes + self.values.nbytes


class TieredSlots(Slots):
    """Slots whose `keys` and `values` are put together whenever they are read, from what is packed and what is not.

    Whatever has no line here works on what is read, and returns slots without tiers.
    """

    tiers: Tiers

    @classmethod
    def of(cls, slots: Slots, tiers: Tiers) -> TieredSlots:
        """Exchange keys and values for tiers of them."""
        return _made({name: getattr(slots, name) for name in FILLS if name not in ("keys", "values")}, tiers)

    @property
    def keys(self) -> torch.Tensor:
        """All keys, in the order of the tokens."""
        return self.tiers.read("keys")

    @property
    def values(self) -> torch.Tensor:
        """All values, in the order of the tokens."""
        return self.tiers.read("values")

    @property
    def count(self) -> int:
        """Slots per row and head."""
        return self.tiers.order.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are stored."""
        return self.tiers.nbytes

    def true_positions(self, end: int) -> torch.Tensor:
        """Return positions (batch, kv_heads, stored): the last ones before `end` where none are held."""
        if self.positions is not None:
            return self.positions
        return torch.arange(end - self.count, end, device=self.tiers.order.device).expand(self.tiers.order.shape)

    def whole(self) -> Slots:
        """Return the same slots with nothing packed."""
        return Slots(**{name: getattr(self, name) for name in FILLS})

    def having(self, **arrays: Any) -> Slots:
        """Return slots with some arrays in place of theirs; other keys or values are not packed."""
        if "keys" in arrays or "values" in arrays:
            return self.whole().having(**arrays)
        return _made({**self.__dict__, **arrays}, arrays.get("tiers", self.tiers))

    def append(self, new: Mapping[str, Any]) -> Slots:
        """Add slots at the end, given by their arrays; they are not packed."""
        tiers = self.tiers.append(new["keys"], new["values"])
        others = {name: array for name, array in new.items() if name not in ("keys", "values")}
        return _made(vars(super().append(others)), tiers)

    def first(self, count: int) -> Slots:
        """Return the oldest slots."""
        removed = self.count - count
        if removed > self.tiers.num_appended:
            return self.whole().first(count)
        others = {name: _each(getattr(self, name), lambda x: x[:, :, :count]) for name in self._others}
        return _made(others, self.tiers.without_newest(removed))

    def last(self, count: int) -> Slots:
        """Return the newest slots, not packed."""
        return self.whole().last(count)

    def rows(self, change: Change) -> Slots:
        """Select, repeat or reorder rows of the batch."""
        return _made({name: _each(getattr(self, name), change) for name in self._others}, self.tiers.each(change))

    def clone(self) -> Slots:
        """Copy every tensor, so that what these are parts of is freed."""
        return self.rows(torch.clone)

    @property
    def _others(self) -> list[str]:
        return [name for name in FILLS if name not in ("keys", "values")]


def _made(others: dict[str, Any], tiers: Tiers) -> TieredSlots:
    slots = object.__new__(TieredSlots)
    slots.__dict__.update({**others, "tiers": tiers})
    return slots


def _each(stored: Any, change: Change) -> Any:
    if isinstance(stored, dict):
        return {name: change(each) for name, each in stored.items()}
    return None if stored is None else change(stored)


def query_peaks(
    queries: torch.Tensor, asked: torch.Tensor | None, kv_heads: int, before: torch.Tensor | None
) -> torch.Tensor:
    """Compute the largest absolute query of every channel, over the query heads of each KV head and all calls so far.

    Parameters
    ----------
    queries : torch.Tensor, shape (batch, query_heads, Q, D)
    asked : torch.Tensor, shape (batch, Q), or None
        Below 0 for padding.
    kv_heads : int
    before : torch.Tensor, shape (batch, kv_heads, D), or None
        Those of earlier calls.

    Returns
    -------
    torch.Tensor, shape (batch, kv_heads, D), float32
    """
    valid = None if asked is None else (asked >= 0)[:, None].expand(-1, queries.shape[1], -1)
    found = peaks(queries.detach(), valid, xp=load("torch").xp).float()
    found = found.reshape(found.shape[0], kv_heads, -1, found.shape[-1]).amax(dim=2)
    return found if before is None else torch.maximum(before, found)


def demoted(
    after: Slots,
    before: Slots,
    kept: torch.Tensor,
    levels: torch.Tensor | None,
    precision: Precision | None,
    query_peaks: torch.Tensor | None,
) -> Slots:
    """Pack what a decision demotes, and what was packed before: a demoted token keeps its bits and never comes back.

    Parameters
    ----------
    after, before : Slots
        What is kept, with keys and values as they read, and what it was chosen from.
    kept : torch.Tensor, shape (batch, kv_heads, b), int64
        The slots that `after` was gathered from; -1 for unused ones.
    levels : torch.Tensor, shape (batch, kv_heads, b), or None
        Above 0 for what is demoted.
    precision : Precision or None
        How it is stored; None if the decision demotes nothing.
    query_peaks : torch.Tensor, shape (batch, kv_heads, D), or None
        See `query_peaks`.

    Returns
    -------
    Slots

    Raises
    ------
    ArgumentError
        If tokens were demoted otherwise before, or a balance needs queries that were not seen.
    """
    old = before.tiers if isinstance(before, TieredSlots) else None
    if old is None and precision is None:
        return after
    if old is not None and precision is not None and precision != old.precision:
        raise ArgumentError(
            f"policy must demote tokens as an earlier eviction did, to {old.precision}; got {precision}"
        )
    precision = old.precision if old is not None else precision
    assert precision is not None
    keys, values, index, used = after.keys, after.values, kept.clamp(min=0), kept >= 0
    # Unused slots take the least room there.
    is_low = ~used if levels is None else (levels > 0) | ~used
    was_low = None
    if old is not None:
        was_low = old.is_low.gather(2, index) & used
        is_low = is_low | was_low
    if not bool(is_low.any()):
        return after
    balance = None if not precision.balanced else _balance(before, query_peaks) if old is None else old.balance
    stored, number = keys.shape[2], is_low.sum(dim=-1)
    width, rest = int(number.max()), stored - int(number.min())
    low_first = is_low.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    rank = low_first.argsort(dim=-1)
    order = torch.where(is_low, rank, rank - (stored - rest) + width).to(torch.int32)
    low_at, full_at = low_first[:, :, :width], low_first[:, :, stored - rest :]
    low = gathered(keys, low_at).to(torch.promote_types(keys.dtype, torch.float32))
    low_keys = Packed.of(low if balance is None else low * balance[:, :, None], precision, keys.dtype)
    low_values = Packed.of(gathered(values, low_at), precision, values.dtype)
    if old is not None and was_low is not None:
        # Numbers would be rounded the same way again; their scale would not.
        where = old.order.long().gather(2, index).gather(2, low_at).clamp(max=old.low_keys.codes.shape[2] - 1)
        is_old = was_low.gather(2, low_at)
        low_keys, low_values = (
            new.or_from(was, where, is_old) for new, was in ((low_keys, old.low_keys), (low_values, old.low_values))
        )
    tiers = Tiers(
        precision=precision,
        low_keys=low_keys,
        low_values=low_values,
        keys=gathered(keys, full_at),
        values=gathered(values, full_at),
        order=order,
        balance=balance,
    )
    return TieredSlots.of(after, tiers)


def _balance(slots: Slots, query_peaks: torch.Tensor | None) -> torch.Tensor:
    """Compute the balance of a layer, once: over all keys and all queries until then."""
    if query_peaks is None:
        raise ArgumentError(
            "the cache must have seen queries to balance the keys that policy demotes: give it the policy when it is "
            "made, or num_queries=1, or set balanced=False"
        )
    xp, keys = load("torch").xp, slots.keys.detach().float()
    return cast("torch.Tensor", key_balance(query_peaks, peaks(keys, slots.valid, xp=xp), xp=xp))
