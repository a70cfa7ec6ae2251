"""A budget of its own for each layer, over any policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core import checks
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.policy import LayerInputs, Requirements, Wrapper
from ..core.types import Array

__all__ = ["LayerBudgets"]


@dataclass(frozen=True)
class LayerBudgets(Wrapper):
    """Any policy, with one budget per layer that was worked out elsewhere.

    Parameters
    ----------
    base : Policy
        Where importance and protection come from. Its own budget is not used.
    budgets : sequence of int
        Tokens to keep per row, one number per layer.

    Raises
    ------
    ArgumentError
        If a budget is negative or, in use, if the model has another number of layers.
    ArgumentTypeError
        If `base` is no Policy or `budgets` no sequence of integers.

    Examples
    --------
    >>> from graphkv import KNorm, LayerBudgets
    >>> policy = LayerBudgets(KNorm(budget=20), budgets=(30, 10))
    >>> policy.layer_budget(100, 0, 2), policy.layer_budget(100, 1, 2)
    (30, 10)
    """

    budgets: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budgets, str) or not isinstance(self.budgets, Sequence):
            raise ArgumentTypeError(f"budgets must be a sequence of integers; got {type(self.budgets).__name__}")
        budgets = tuple(checks.count(f"budgets[{layer}]", budget) for layer, budget in enumerate(self.budgets))
        object.__setattr__(self, "budgets", budgets)

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Give the layer's number."""
        if len(self.budgets) != num_layers:
            raise ArgumentError(f"budgets must have one entry for each of {num_layers} layers; got {len(self.budgets)}")
        return self.budgets[layer]

    def needs(self) -> Requirements:
        """Need what the base needs, but no preferences: the budgets stand."""
        return replace(super().needs(), preferences=False)

    def preference(self, inputs: LayerInputs, /) -> Array | None:
        """Want nothing."""
        return None

    def layer_budgets(self, preferences: Sequence[float], num_tokens: int, /) -> list[int]:
        """Give the numbers."""
        return [self.layer_budget(num_tokens, layer, len(preferences)) for layer in range(len(preferences))]
