"""A merge for tests: what is dropped goes into the next token that stays, and counts there."""

from dataclasses import dataclass
from typing import ClassVar

from graphkv import Merge, Requirements, Wrapper
from graphkv.core import primitives


@dataclass(frozen=True)
class Folded(Wrapper):
    """Every dropped token goes into the next kept one, if that is not protected, by the mass of each.

    Parameters
    ----------
    base : Policy
    keys : bool
        Whether keys are averaged too, or stay those of the kept tokens.
    """

    requirements: ClassVar[Requirements] = Requirements(merges=True)

    keys: bool = True

    def merge(self, choice, found, layer, memory, /):
        xp, kept, count = layer.xp, choice.kept, layer.num_tokens
        dtype, device = layer.keys.dtype, primitives.device_of(layer.keys)
        position = xp.arange(count, dtype=kept.dtype, device=device)
        stands = xp.where(kept >= 0, kept, xp.full_like(kept, count))
        slot = xp.sum(xp.astype(stands[..., None, :] < position[:, None], xp.int64), axis=-1)
        own = xp.any(stands[..., None, :] == position[:, None], axis=-1)
        is_there = slot < xp.sum(xp.astype(kept >= 0, xp.int64), axis=-1)[..., None]
        slot = xp.where(is_there, slot, xp.zeros_like(slot))
        goes = is_there & layer.valid
        if found.protected is not None:
            last = xp.where(stands < count, stands, xp.zeros_like(stands))
            guarded = primitives.take_rows(primitives.take_rows(found.protected, last, xp=xp), slot, xp=xp)
            goes = goes & ~guarded
        into = xp.where(own | goes, slot, xp.full_like(slot, -1))
        mass = xp.ones(own.shape, dtype=dtype, device=device) if layer.mass is None else layer.mass
        mass = xp.where(into >= 0, mass, xp.zeros_like(mass))
        place = xp.arange(kept.shape[-1], dtype=into.dtype, device=device)
        member = xp.astype(into[..., None, :] == place[:, None], dtype)
        total = xp.sum(member * mass[..., None, :], axis=-1)
        share = mass / xp.where(into >= 0, primitives.take_rows(total, slot, xp=xp), xp.ones_like(mass))
        keys = share if self.keys else xp.astype(own, dtype)
        return Merge(into=into, key_weights=keys, value_weights=share, mass=total)
