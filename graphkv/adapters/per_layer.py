"""A budget of its own for each layer, or a policy of its own for each group of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from ..core import budgets as core_budgets
from ..core import checks, primitives
from ..core.backend import Backend, resolve
from ..core.errors import ArgumentError, ArgumentTypeError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Policy, Requirements, Wrapper
from ..core.types import Array

__all__ = ["LayerBudgets", "LayerShares", "PerLayer", "key_similarity"]


def key_similarity(keys: Array, others: Array, /, *, window: int = 100, backend: Backend | str | None = None) -> Array:
    """Compute how alike the keys of a layer are in two runs of the model, window by window.

    Parameters
    ----------
    keys, others : array, shape (batch, kv_heads, N, D)
        Of the same text: with full attention, and with attention to the text's own blocks and its first tokens only.
    window : int
        Tokens whose keys are compared as one vector. The last window may be shorter.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (batch,), float32 or wider
        Mean cosine over heads and windows, for `LayerShares.epicache`. A window of zeros has cosine 0.

    Raises
    ------
    ArgumentError
        If the shapes differ, there are no tokens, or `window` is below 1.
    ArgumentTypeError
        If an array is not real.
    BackendError
        If the arrays are not of one library.

    Examples
    --------
    Two windows of two tokens; the first is the same, the second turned by a right angle:

    >>> import numpy as np
    >>> keys = np.asarray([[[[1.0, 0], [2, 0], [3, 0], [4, 0]]]])
    >>> others = np.asarray([[[[1.0, 0], [2, 0], [0, 3], [0, 4]]]])
    >>> key_similarity(keys, others, window=2)
    array([0.5])
    """
    backend = resolve(backend, keys=keys, others=others)
    xp, window = backend.xp, checks.count("window", window, minimum=1)
    axes = "(batch, kv_heads, N, D)"
    shape = checks.numeric("keys", keys, axes, ndim=4, backend=backend)
    checks.same_leading("others", checks.numeric("others", others, axes, ndim=4, backend=backend), shape, "keys")
    if not shape[2]:
        raise ArgumentError(f"keys must have at least one token; got shape {shape}")
    first, second = (primitives.widen(x, xp=xp) for x in (keys, others))

    def by_window(product: Array) -> Array:
        tokens = xp.sum(product, axis=-1)
        parts = [(start, min(start + window, shape[2])) for start in range(0, shape[2], window)]
        return xp.stack([xp.sum(tokens[..., start:stop], axis=-1) for start, stop in parts], axis=-1)

    lengths = xp.sqrt(by_window(first * first)) * xp.sqrt(by_window(second * second))
    cosines = by_window(first * second) / xp.where(lengths > 0, lengths, xp.ones_like(lengths))
    return xp.mean(cosines, axis=(1, 2))


# Layers of an imagined model.
FEW = 12


@dataclass(frozen=True)
class SettledBudgets(Wrapper):
    """Any policy, with budgets that are fixed before a layer is read."""

    def needs(self) -> Requirements:
        """Return the needs of the base, but for its wants: the budgets are fixed."""
        return replace(super().needs(), wants=False, settled=True)

    def wants(self, layer: Layer, memory: Memory | None, /) -> Array | None:
        """Return None: budgets are already fixed."""
        return None

    def share_out(self, wants: Sequence[float], num_tokens: int, /) -> list[int]:
        """Return the fixed budgets."""
        return [self.layer_budget(num_tokens, layer, len(wants)) for layer in range(len(wants))]


@dataclass(frozen=True)
class LayerBudgets(SettledBudgets):
    """Any policy, with one budget per layer that was computed elsewhere.

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
        If `base` is not a Policy or `budgets` no sequence of integers.

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
        """Return the layer's number."""
        if len(self.budgets) != num_layers:
            raise ArgumentError(f"budgets must have one entry for each of {num_layers} layers; got {len(self.budgets)}")
        return self.budgets[layer]


@dataclass(frozen=True)
class LayerShares(SettledBudgets):
    """Any policy, whose budget is shared out over the layers in given proportions.

    The layers' budgets add up to exactly layers x budget, whatever the budget; no layer gets more tokens than there
    are, or fewer than the base protects at the average budget. `pyramid_infer` and `epicache` return those of papers.

    Parameters
    ----------
    base : Policy
        Where importance, protection and the average budget come from.
    shares : sequence of int or float
        One number per layer, at least 0. Only their proportions matter; integers that add up to layers x budget are
        the budgets themselves, within those bounds.
    floor : float
        In [0, 1]. Of the average budget, the part that every layer gets, rounded down.

    Raises
    ------
    ArgumentError
        If a number is out of range or not finite or, in use, if the model has another number of layers.
    ArgumentTypeError
        If `base` is not a Policy or `shares` no sequence of numbers.

    Examples
    --------
    >>> from graphkv import KNorm, LayerShares
    >>> policy = LayerShares(KNorm(budget=20), shares=(3, 1))
    >>> policy.layer_budget(100, 0, 2), policy.layer_budget(100, 1, 2)
    (30, 10)
    >>> policy.layer_budget(25, 0, 2), policy.layer_budget(25, 1, 2)
    (25, 15)
    """

    shares: Sequence[int | float]
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("floor", self.floor)
        if isinstance(self.shares, str) or not isinstance(self.shares, Sequence):
            raise ArgumentTypeError(f"shares must be a sequence of numbers; got {type(self.shares).__name__}")
        shares = tuple(checks.finite_weight(f"shares[{layer}]", share) for layer, share in enumerate(self.shares))
        object.__setattr__(self, "shares", shares)

    @classmethod
    def pyramid_infer(cls, base: Policy, num_layers: int, /, *, least: float = 0.9) -> LayerShares:
        """Return PyramidInfer's shares: every layer keeps a part of what the layer below has kept.

        The paper drops tokens for all deeper layers as well, so that what a layer keeps is part of what the layer below
        keeps: with the base ``Shared(base, nested=True)``. Otherwise each layer chooses for itself. The paper's least
        number of 64 tokens is not expressed.

        Parameters
        ----------
        base : Policy
        num_layers : int
            Layers of the model.
        least : float
            The part that the last layers keep; see `graphkv.core.budgets.cut_again`.

        Returns
        -------
        LayerShares

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is out of range or of the wrong type.

        Examples
        --------
        >>> from graphkv import KNorm, LayerShares
        >>> policy = LayerShares.pyramid_infer(KNorm(budget=100), 4, least=0.5)
        >>> [policy.layer_budget(1000, layer, 4) for layer in range(4)]
        [132, 123, 92, 53]
        """
        return cls(base, core_budgets.cut_again(num_layers, least))

    @classmethod
    def epicache(cls, base: Policy, similarities: Sequence[float], /, *, power: float = 1.1) -> LayerShares:
        """Return EpiCache's shares: more for layers whose keys change when the model sees blocks of the text only.

        Every layer gets a quarter of the average at least. The public code cuts the shares to integers and does not
        pay for that quarter, so that its total is too high; here it is exact.

        Parameters
        ----------
        base : Policy
        similarities : sequence of float
            One per layer, measured once per model by `graphkv.adapters.per_layer.key_similarity`.
        power : float
            1.1 for Llama and 1.3 for Qwen in the paper; 0 gives all layers the same.

        Returns
        -------
        LayerShares

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is out of range or of the wrong type.

        Examples
        --------
        >>> from graphkv import KNorm, LayerShares
        >>> policy = LayerShares.epicache(KNorm(budget=100), [0.75, 0.25, 0.5], power=1)
        >>> [policy.layer_budget(1000, layer, 3) for layer in range(3)]
        [25, 183, 92]
        """
        return cls(base, core_budgets.sensitivities(similarities, power), floor=0.25)

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Return the layer's share of the whole."""
        if len(self.shares) != num_layers:
            raise ArgumentError(f"shares must have one entry for each of {num_layers} layers; got {len(self.shares)}")
        average = min(core_budgets.tokens_of(self.base.budget, num_tokens), num_tokens)
        least = min(max(self.base.protection(average).count, core_budgets.share_of(self.floor, average)), average)
        return _budget_of(layer, tuple(self.shares), num_layers * average, num_tokens, least)


def _budget_of(layer: int, /, *shares_and_bounds: Any) -> int:
    """Look one layer up."""
    return _allocated(*shares_and_bounds)[layer]


# What torch.compiler.assume_constant_result sets, without an import of torch: budgets are constants of a graph.
_budget_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _allocated(shares: tuple[float, ...], total: int, most: int, least: int, /) -> list[int]:
    """Compute the budgets of all layers once, not once per layer."""
    return core_budgets.allocate(shares, total, most, least)


@dataclass(frozen=True)
class PerLayer(Wrapper):
    """Policies that take turns from the lowest layers to the highest.

    Of L layers and G policies, policy ``layer * G // L`` scores a layer: G groups of successive layers, as equal as
    whole layers can be.

    Parameters
    ----------
    base : Policy
        Decides for all layers together: budgets, protected tokens, queries and memory.
    policies : sequence of Policy
        The lowest layers' policy first: each one `base` itself, or wrappers such as `GraphKV` around it.

    Raises
    ------
    ArgumentError
        If there are no policies, or one of them is not built on `base` or shares a choice with other layers.
    ArgumentTypeError
        If `base` or a policy is not a Policy.

    Examples
    --------
    No graph in the lower half of the layers:

    >>> from graphkv import GraphKV, KNorm, PerLayer
    >>> base = KNorm(budget=20)
    >>> PerLayer(base, policies=(base, GraphKV(base))).budget
    20
    """

    policies: Sequence[Policy]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.policies, str) or not isinstance(self.policies, Sequence):
            raise ArgumentTypeError(f"policies must be a sequence of policies; got {type(self.policies).__name__}")
        if not self.policies:
            raise ArgumentError("policies must hold at least one policy; got none")
        for number, policy in enumerate(self.policies):
            checks.instance(f"policies[{number}]", policy, Policy)
            if not _is_built_on(policy, self.base):
                raise ArgumentError(f"policies[{number}] must be base or a wrapper around it; got {policy!r}")
            # The base says which layers share a choice; a few of them show it.
            if any(policy.voters(layer, FEW) != self.base.voters(layer, FEW) for layer in range(FEW)):
                raise ArgumentError(
                    f"policies[{number}] must choose for its layer alone; put what layers share around PerLayer, or in "
                    f"its base; got {policy!r}"
                )
        object.__setattr__(self, "policies", tuple(self.policies))

    def at(self, layer: int, num_layers: int, /) -> Policy:
        """Return the layer's policy."""
        return self.policies[layer * len(self.policies) // num_layers].at(layer, num_layers)

    def with_base(self, change: Callable[[Policy], Policy], /) -> Policy:
        """Return the same wrappers over another base, in every layer."""
        base, policies = self.base.with_base(change), tuple(policy.with_base(change) for policy in self.policies)
        return self if base is self.base else replace(self, base=base, policies=policies)

    def needs(self) -> Requirements:
        """Return the needs of all policies together."""
        return reduce(lambda needs, policy: needs.joined(policy.needs()), self.policies, self.base.needs())

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the policy with the most uses."""
        return max(policy.num_queries(num_tokens) for policy in (self.base, *self.policies))

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the most expensive layer."""
        costs = [policy.cost(shape) for policy in self.policies]
        return Cost(max(cost.flops for cost in costs), max(cost.bytes for cost in costs))


def _is_built_on(policy: Policy, base: Policy, /) -> bool:
    while policy != base and isinstance(policy, Wrapper):
        policy = policy.base
    return policy == base
