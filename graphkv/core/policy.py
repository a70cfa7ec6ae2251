"""What an eviction policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from . import budgets, checks
from .backend import Backend
from .types import Array, Graph, Namespace
from .values import Value

__all__ = ["Assessment", "LayerInputs", "LayerShape", "Policy", "Requirements", "Wrapper"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerInputs:
    """What a policy may look at: one attention layer, checked, with floating-point arrays in float32 or wider.

    Attributes
    ----------
    keys : array, shape (batch, kv_heads, N, D)
        Cached keys, after the rotary embedding.
    values : array, shape (batch, kv_heads, N, Dv), or None
    queries : array, shape (batch, query_heads, Q, D), or None
        The last Q positions.
    attention : array, shape (batch, query_heads, Q, N), or None
        Attention probabilities of the last Q positions.
    valid : array, shape (batch, kv_heads, N), bool
        False for padding.
    budget : int
        Tokens to keep per row in this layer. `score` is asked only when it is smaller than N.
    layer, num_layers : int
        Index of the layer and number of layers.
    backend : Backend
    state : mapping of str to array, shape (batch, kv_heads, N, ...), or None
        The policy's running sums per token, new tokens at zero. None at the first call.
    num_seen : int
        S, the first tokens that the state covers already; the N - S tokens after them are new. 0 at the first call.
    unrotated_keys : array, shape (batch, kv_heads, N, D), or None
        The keys before the rotary embedding.
    """

    keys: Array
    values: Array | None
    queries: Array | None
    attention: Array | None
    valid: Array
    budget: int
    layer: int
    num_layers: int
    backend: Backend
    state: Mapping[str, Array] | None = None
    num_seen: int = 0
    unrotated_keys: Array | None = None

    @property
    def xp(self) -> Namespace:
        """The array API namespace of the arrays."""
        return self.backend.xp

    @property
    def num_tokens(self) -> int:
        """N, the number of cached tokens."""
        return int(self.keys.shape[-2])


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """What a policy thinks of one layer's tokens.

    Attributes
    ----------
    importance : array, shape (batch, kv_heads, N)
        Base score per token, higher = keep.
    scores : array, shape (batch, kv_heads, N)
        What selection ranks by: the importance, or what propagation made of it.
    protected : array, shape (batch, kv_heads, N), bool, or None
        Tokens that selection keeps before all others.
    graph : Graph or None
        The last graph that changed the scores.
    head_budgets : array, shape (batch, kv_heads), integer, or None
        Tokens to keep per head, for policies that share a layer's budget out over its heads.
    """

    importance: Array
    scores: Array
    protected: Array | None = None
    graph: Graph | None = None
    head_budgets: Array | None = None


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one layer, for costs.

    Attributes
    ----------
    num_tokens : int
        N, the number of cached tokens.
    query_heads, kv_heads, head_size : int
        The layer's heads and D.
    budget : int
        Tokens to keep per row in this layer.
    batch : int
        Default: 1.
    """

    num_tokens: int
    query_heads: int
    kv_heads: int
    head_size: int
    budget: int
    batch: int = 1


def _no_cost(policy: Any, shape: LayerShape, /) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a policy needs beyond the cached keys, and what it costs on top of the model.

    Attributes
    ----------
    values : bool
        Looks at the cached values.
    queries : str
        ``"none"``, ``"window"`` (those of the last few positions) or ``"all"`` (those, or the attention rows, of every
        position).
    state : bool
        Carries running sums per token from call to call.
    fused_attention : bool
        Works with an attention kernel that hands out no attention rows.
    unrotated_keys : bool
        Looks at the keys before the rotary embedding.
    preferences : bool
        Shares the layers' budgets out by `Policy.preference`, so that all layers must be read before one is evicted.
    couples_heads : bool
        What a KV head keeps depends on the layer's other KV heads, or on its number among them. Such a policy decides
        otherwise where some of the heads are in another process.
    flops : callable
        ``flops(policy, shape)``, floating-point operations per layer to leading order, as a plain function of the
        policy's fields and a `LayerShape`. Default: none to speak of.
    bytes : callable
        ``bytes(policy, shape)``, size of the largest temporary array in float32. Default: none larger than the scores.
    """

    values: bool = False
    queries: str = "none"
    state: bool = False
    fused_attention: bool = True
    unrotated_keys: bool = False
    preferences: bool = False
    couples_heads: bool = False
    flops: Callable[[Any, LayerShape], int] = _no_cost
    bytes: Callable[[Any, LayerShape], int] = _no_cost

    def joined(self, base: Requirements, /) -> Requirements:
        """Add the needs of a base policy; costs stay with their own policy, see `Policy.flops`."""
        kinds = ("none", "window", "all")
        return replace(
            self,
            values=self.values or base.values,
            queries=max(self.queries, base.queries, key=kinds.index),
            state=self.state or base.state,
            fused_attention=self.fused_attention and base.fused_attention,
            unrotated_keys=self.unrotated_keys or base.unrotated_keys,
            preferences=self.preferences or base.preferences,
            couples_heads=self.couples_heads or base.couples_heads,
        )


@dataclass(frozen=True, kw_only=True)
class Policy(Value, ABC):
    """An immutable eviction policy: a budget per layer, and a score per token.

    A new policy is a frozen dataclass that defines `score`; the other methods have defaults.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per row and layer, window, sinks and recents included; or a share of the tokens as a float in
        (0, 1].
    """

    # What this class itself needs; `needs`, `flops` and `bytes` speak for a whole policy with its base.
    requirements: ClassVar[Requirements] = Requirements()

    budget: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", checks.ratio_or_count("budget", self.budget, zero=False))

    @abstractmethod
    def score(self, inputs: LayerInputs, /) -> Array:
        """Give the importance of every token.

        Parameters
        ----------
        inputs : LayerInputs
            One layer, arrays in float32 or wider.

        Returns
        -------
        array, shape (batch, kv_heads, N), float32 or wider
            Higher = keep. Entries of invalid tokens do not matter.
        """

    def protect(self, inputs: LayerInputs, /) -> Array | None:
        """Mark the tokens to keep before all others.

        Parameters
        ----------
        inputs : LayerInputs
            One layer.

        Returns
        -------
        array, shape (batch, kv_heads, N), bool, or None
            None protects nothing, which is the default.
        """
        return None

    def num_protected(self, budget: int, /) -> int:
        """Say how many tokens `protect` marks in a row without padding.

        Parameters
        ----------
        budget : int
            The layer's budget in tokens.

        Returns
        -------
        int
            Default: 0. May be more than the budget.
        """
        return 0

    def num_queries(self, num_tokens: int, /) -> int:
        """Say of how many last positions `score` needs the queries.

        Parameters
        ----------
        num_tokens : int
            N, tokens in the cache.

        Returns
        -------
        int
            At most N. Default: 0.
        """
        return 0

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Give the budget of one layer in tokens.

        Parameters
        ----------
        num_tokens : int
            N, tokens in the cache.
        layer, num_layers : int
            Which layer of how many.

        Returns
        -------
        int
            Default: `budget` for every layer; a share f of N tokens is floor(f N + 0.5) of the decimal number.
        """
        return budgets.tokens_of(self.budget, num_tokens)

    def preference(self, inputs: LayerInputs, /) -> Array | None:
        """Say how much one layer wants of the common budget.

        Parameters
        ----------
        inputs : LayerInputs
            One layer.

        Returns
        -------
        array, shape (batch,), or None
            Default: None, for policies whose budgets do not depend on what is in the layers.
        """
        return None

    def layer_budgets(self, preferences: Sequence[float], num_tokens: int, /) -> list[int]:
        """Share the budgets of all layers out by their preferences.

        Parameters
        ----------
        preferences : sequence of float
            One per layer, of one row of the batch.
        num_tokens : int
            N, tokens in the cache.

        Returns
        -------
        list of int
            Default: `layer_budget` of every layer.
        """
        return [self.layer_budget(num_tokens, layer, len(preferences)) for layer in range(len(preferences))]

    def widest_head(self, budget: int, num_tokens: int, kv_heads: int, /) -> int:
        """Say how many tokens a single head may keep at most, at a layer budget."""
        return min(budget, num_tokens)

    def needs(self) -> Requirements:
        """Say what the policy needs, its base included."""
        return self.requirements

    def flops(self, shape: LayerShape, /) -> int:
        """Count the extra floating-point operations of one layer, to leading order."""
        return self.requirements.flops(self, shape)

    def bytes(self, shape: LayerShape, /) -> int:
        """Give the size of the largest temporary array of one layer, in float32."""
        return self.requirements.bytes(self, shape)

    def observe(self, inputs: LayerInputs, /) -> Mapping[str, Array] | None:
        """Fold the attention of the given queries into the running state; None for a policy without one.

        Called before `score`, whenever queries or attention rows are given. The state is one array of shape (batch,
        kv_heads, N, ...) per name, and travels with the kept tokens. Only rows of the N - `LayerInputs.num_seen` new
        positions belong in it: the others were folded in by an earlier call.
        """
        return None

    def assess(self, inputs: LayerInputs, /) -> Assessment:
        """Score one layer.

        Parameters
        ----------
        inputs : LayerInputs
            One layer.

        Returns
        -------
        Assessment
            Default: scores equal to the importance, and no graph.
        """
        importance = self.score(inputs)
        return Assessment(importance=importance, scores=importance, protected=self.protect(inputs))


@dataclass(frozen=True)
class Wrapper(Policy):
    """A policy on top of another one: asks the base for everything that it does not change.

    Parameters
    ----------
    base : Policy
    """

    budget: int | float = field(init=False, repr=False)
    base: Policy

    def __post_init__(self) -> None:
        checks.instance("base", self.base, Policy)
        object.__setattr__(self, "budget", self.base.budget)

    def score(self, inputs: LayerInputs, /) -> Array:
        """Give the base's importance."""
        return self.base.score(inputs)

    def protect(self, inputs: LayerInputs, /) -> Array | None:
        """Protect what the base protects."""
        return self.base.protect(inputs)

    def num_protected(self, budget: int, /) -> int:
        """Count what the base protects."""
        return self.base.num_protected(budget)

    def num_queries(self, num_tokens: int, /) -> int:
        """Ask for the queries that the base needs."""
        return self.base.num_queries(num_tokens)

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Give the base's budget of the layer."""
        return self.base.layer_budget(num_tokens, layer, num_layers)

    def preference(self, inputs: LayerInputs, /) -> Array | None:
        """Give the base's preference."""
        return self.base.preference(inputs)

    def layer_budgets(self, preferences: Sequence[float], num_tokens: int, /) -> list[int]:
        """Give the base's budgets."""
        return self.base.layer_budgets(preferences, num_tokens)

    def widest_head(self, budget: int, num_tokens: int, kv_heads: int, /) -> int:
        """Give the base's widest head."""
        return self.base.widest_head(budget, num_tokens, kv_heads)

    def needs(self) -> Requirements:
        """Need what the base needs as well."""
        return self.requirements.joined(self.base.needs())

    def flops(self, shape: LayerShape, /) -> int:
        """Add to the base's operations."""
        return self.base.flops(shape) + super().flops(shape)

    def bytes(self, shape: LayerShape, /) -> int:
        """Compare with the base's largest array."""
        return max(self.base.bytes(shape), super().bytes(shape))

    def observe(self, inputs: LayerInputs, /) -> Mapping[str, Array] | None:
        """Keep the base's state."""
        return self.base.observe(inputs)

    def assess(self, inputs: LayerInputs, /) -> Assessment:
        """Let the base score."""
        return self.base.assess(inputs)
