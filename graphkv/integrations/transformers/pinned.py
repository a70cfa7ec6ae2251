"""Tokens that an eviction may not drop, whatever the policy says: those of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...core import budgets
from ...core.errors import ArgumentError
from ...core.layer import Layer, Memory
from ...core.policy import Policy, Wrapper
from ...core.protection import Protection
from ...core.types import Array

__all__ = ["check_room", "with_pinned"]


@dataclass(frozen=True, kw_only=True)
class AlsoMarked(Protection):
    """Marked tokens, and of what a policy protects the newest that the budget has room for.

    Parameters
    ----------
    others : Protection
    marks : array, shape (batch, kv_heads, N), bool
    number : int
        How many are marked in the row that has most; the sinks are among them.
    spare : int
        How many other tokens can be protected.
    """

    others: Protection
    marks: Array
    number: int
    spare: int

    @property
    def count(self) -> int:
        """Tokens that are protected in a row."""
        return self.number + min(self.spare, max(0, self.others.count - min(self.others.first, self.number)))

    @property
    def newest(self) -> int:
        """How many of them are the newest tokens."""
        return min(self.others.newest, self.spare)

    def mask(self, layer: Layer, memory: Memory | None = None, /) -> Array:
        """Return who is protected."""
        xp, marks, others = layer.xp, self.marks & layer.valid, self.others.mask(layer, memory)
        if others is None:
            return marks
        others = others & layer.valid & ~marks
        so_far = xp.cumulative_sum(xp.astype(others, xp.int64), axis=-1)
        return marks | (others & (so_far > so_far[..., -1:] - self.spare))


@dataclass(frozen=True)
class Pinned(Wrapper):
    """A base that keeps marked tokens before all others.

    Parameters
    ----------
    base : Policy
    marks : array, shape (batch, kv_heads, N), bool
    number : int
        As for `AlsoMarked`.
    """

    marks: Array = field(repr=False, kw_only=True)
    number: int = field(kw_only=True)

    def protection(self, budget: int, /) -> Protection:
        """Protect what the base protects, and the marked tokens."""
        others, spare = self.base.protection(budget), max(0, budget - self.number)
        return AlsoMarked(others=others, marks=self.marks, number=self.number, spare=spare, block=others.block)

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Return the base's budget; a layer with too little for the marks gets more, and the others less."""
        shares = [self.base.layer_budget(num_tokens, each, num_layers) for each in range(num_layers)]
        if min(shares) < self.number <= sum(shares) // num_layers:
            shares = budgets.allocate(shares, sum(shares), sum(shares), self.number)
        return shares[layer]


def with_pinned(policy: Policy, marks: Array, number: int, /) -> Policy:
    """Return a policy that keeps marked tokens before all others, under all its wrappers.

    Parameters
    ----------
    policy : Policy
    marks : array, shape (batch, kv_heads, N), bool
    number : int
        How many are marked in the row that has most.

    Returns
    -------
    Policy
    """
    return policy.with_base(lambda base: Pinned(base, marks=marks, number=number))


def check_room(number: int, budget: int, layer: int, /) -> None:
    """Refuse a budget that is too small for the prompt."""
    if number > budget:
        raise ArgumentError(
            f"budget must leave room for the {number} tokens of the prompt, which protect_prompt=True keeps; layer "
            f"{layer} has a budget of {budget}"
        )
