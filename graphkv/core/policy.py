"""The contract of an eviction policy: a budget and a short list of stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from . import budgets, checks
from .answer import Answer
from .backend import Backend
from .errors import ArgumentError
from .layer import Cost, Layer, LayerShape, Memory
from .merging import Merge
from .protection import Protection
from .selection import Choice, select
from .types import Array, Graph
from .values import Value

__all__ = ["Assessment", "Policy", "Requirements", "Wrapper"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """What was found about one layer's tokens.

    Attributes
    ----------
    importance : array, shape (batch, kv_heads, N)
        Base score per token, higher = keep.
    scores : array, shape (batch, kv_heads, N)
        What the choice ranks by: the importance, or what re-scoring made of it.
    protected : array, shape (batch, kv_heads, N), bool, or None
        Tokens to keep before all others.
    graph : Graph or None
        The last graph that changed the scores.
    counts : array, shape (batch, kv_heads), integer, or None
        Tokens to keep per head, where a policy settles them by the scores of its own stage.
    barred : array, shape (batch, kv_heads, N), bool, or None
        Tokens that may not stay, whatever later stages make of their scores.
    pivots : array, shape (batch, kv_heads, N), integer, or None
        The token that stands for each token, where a policy makes sets of them before the choice.
    """

    importance: Array
    scores: Array
    protected: Array | None = None
    graph: Graph | None = None
    counts: Array | None = None
    barred: Array | None = None
    pivots: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a policy needs beyond the cached keys. `evict` checks it before anything is computed.

    Attributes
    ----------
    values : bool
        Needs the cached values.
    queries : str
        ``"none"``, ``"window"`` (those of the last `Policy.num_queries` positions), ``"new"`` (those of every position
        since the last call) or ``"all"`` (those of every position; fewer are accepted). Attention rows serve as well.
    logits : bool
        Needs the queries themselves: attention rows cannot replace them.
    state : tuple of str
        Names of the arrays of its `Memory`. Empty for a policy that remembers nothing.
    unrotated_keys : bool
        Needs the keys before the rotary embedding.
    probes : bool
        Needs tokens that were read after the text only to ask it, see `Probe`.
    wants : bool
        Shares the layers' budgets out by `Policy.wants`, so that all layers must be read before one is evicted.
    couples_heads : bool
        What a KV head keeps depends on the layer's other KV heads, or on its number among them. Such a policy decides
        differently where some of the heads are in another process.
    head_counts : bool
        The KV heads of a layer keep numbers of tokens of their own.
    couples_layers : bool
        What a layer keeps depends on other layers, see `Policy.voters`, so that `evict_layers` must decide.
    nested : bool
        What a layer keeps is a part of what the layer below it keeps, by the places of one text. So all layers must
        hold the same tokens: such a policy evicts once.
    automatic : bool
        May keep fewer tokens than the budget, which is then the most that it may keep: it scores even what fits.
    merges : bool
        Puts dropped tokens into kept ones, so that whoever stores them must average keys and values.
    masses : bool
        Its merges change what a slot counts as, so that whoever stores them must keep masses, and attention add them.
        False promises that a slot counts as its kept token did; without `merges` it says nothing.
    settled : bool
        Every layer's budget is fixed, so that no other can be asked for.
    demotes : bool
        Keeps some tokens in fewer bits, see `Choice.levels`.
    answers : bool
        Answers queries in the place of tokens that are gone, so that whoever attends must ask it, see `Policy.answer`.
    """

    values: bool = False
    queries: str = "none"
    logits: bool = False
    state: tuple[str, ...] = ()
    unrotated_keys: bool = False
    probes: bool = False
    wants: bool = False
    couples_heads: bool = False
    head_counts: bool = False
    couples_layers: bool = False
    nested: bool = False
    automatic: bool = False
    merges: bool = False
    masses: bool = True
    settled: bool = False
    demotes: bool = False
    answers: bool = False

    @property
    def all_layers(self) -> bool:
        """Whether all layers must be read before one is evicted."""
        return self.wants or self.couples_layers

    def joined(self, base: Requirements, /) -> Requirements:
        """Return these needs together with those of a base policy."""
        kinds = ("none", "window", "new", "all")
        masses = [each.masses for each in (self, base) if each.merges]
        return replace(
            self,
            values=self.values or base.values,
            queries=max(self.queries, base.queries, key=kinds.index),
            logits=self.logits or base.logits,
            state=tuple(sorted({*self.state, *base.state})),
            unrotated_keys=self.unrotated_keys or base.unrotated_keys,
            probes=self.probes or base.probes,
            wants=self.wants or base.wants,
            couples_heads=self.couples_heads or base.couples_heads,
            head_counts=self.head_counts or base.head_counts,
            couples_layers=self.couples_layers or base.couples_layers,
            nested=self.nested or base.nested,
            automatic=self.automatic or base.automatic,
            merges=self.merges or base.merges,
            masses=any(masses) or not masses,
            settled=self.settled or base.settled,
            demotes=self.demotes or base.demotes,
            answers=self.answers or base.answers,
        )


@dataclass(frozen=True, kw_only=True)
class Policy(Value, ABC):
    """An immutable eviction policy: a budget per layer, and the stages that decide what stays.

    A new policy is a frozen dataclass that defines `score`; the other stages have defaults. `evict` runs them in the
    order observe, score, protection, rescore, choose, merge.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per row and layer, window, sinks and recents included; or a share of the tokens as a float in
        (0, 1].
    """

    # What this class itself needs; `needs` speaks for a whole policy with its base.
    requirements: ClassVar[Requirements] = Requirements()

    budget: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", checks.budget(self.budget))

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory | None:
        """Remember the attention of the new positions.

        Runs first, in a policy whose requirements name a state. Only the last `Layer.num_new` positions belong in it:
        earlier calls have seen the others. Growing the memory to N tokens is part of this stage.

        Parameters
        ----------
        layer : Layer
        memory : Memory or None
            What the last call left, of the N - num_new tokens that are still there; None at the first call.

        Returns
        -------
        Memory or None
            Of all N tokens. Default: None.
        """
        return None

    @abstractmethod
    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the importance of every token.

        Parameters
        ----------
        layer : Layer
        memory : Memory or None
            What `observe` returned.

        Returns
        -------
        array, shape (batch, kv_heads, N), float32 or wider
            Higher = keep. Entries of invalid tokens do not matter.
        """

    def protection(self, budget: int, /) -> Protection:
        """Return who is kept before all others, at a layer budget in tokens. Default: nobody."""
        return Protection()

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Return new scores in the light of all importance. Default: what was found.

        Parameters
        ----------
        found : Assessment
            Importance, scores equal to it, and who is protected.
        layer : Layer
        budget : int
            Tokens to keep per row.

        Returns
        -------
        Assessment
        """
        return found

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Return who stays. Default: `select`, which fills the budget in every row.

        Parameters
        ----------
        found : Assessment
            What the last stage returned.
        layer : Layer
        budget : int
            Tokens to keep per row; less than N, or N for a policy whose budgets are automatic.

        Returns
        -------
        Choice
        """
        kept = select(found.scores, budget, protected=found.protected, valid=layer.valid, backend=layer.backend)
        return Choice(kept=kept)

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge | None:
        """Return which dropped tokens go into which kept ones.

        Parameters
        ----------
        choice : Choice
            What the last stage returned.
        found : Assessment
            What it was chosen by: scores, and who is protected. Nothing goes into protected tokens, unless the method's
            paper says so.
        layer : Layer
        memory : Memory or None

        Returns
        -------
        Merge or None
            Default: None, they are gone.
        """
        return None

    def remains(
        self, choice: Choice, merge: Merge | None, layer: Layer, memory: Memory | None, /
    ) -> Mapping[str, Array]:
        """Return what the layer's memory is to hold of the tokens that go.

        Parameters
        ----------
        choice : Choice
        merge : Merge or None
            What the last stages returned.
        layer : Layer
        memory : Memory or None

        Returns
        -------
        mapping of str to array, shape (batch, ...)
            In place of the arrays of those names in `Memory.layer`. Default: none.
        """
        return {}

    def answer(
        self,
        queries: Array,
        memory: Memory,
        /,
        *,
        layer: int,
        num_layers: int,
        backend: Backend | str | None = None,
    ) -> Answer | None:
        """Return what attention finds in the place of tokens that are gone.

        Parameters
        ----------
        queries : array, shape (batch, query_heads, Q, D)
            Scaled such that q k / sqrt(D) is the attention logit.
        memory : Memory
            What the last eviction left.
        layer, num_layers : int
            Which layer of how many.
        backend : Backend or str, optional
            Default: inferred from the arrays.

        Returns
        -------
        Answer or None
            Default: None, nothing.
        """
        return None

    def wants(self, layer: Layer, memory: Memory | None, /) -> Array | None:
        """Return how much one layer wants of the common budget.

        Returns
        -------
        array, shape (batch,), or None
            Default: None, for policies whose budgets do not depend on what is in the layers.
        """
        return None

    def share_out(self, wants: Sequence[float], num_tokens: int, /) -> list[int]:
        """Return the budgets of all layers in tokens.

        Parameters
        ----------
        wants : sequence of float
            What `wants` returned for one row of the batch, one number per layer.
        num_tokens : int
            N, tokens in the cache.

        Returns
        -------
        list of int
            Default: `layer_budget` of every layer.
        """
        return [self.layer_budget(num_tokens, layer, len(wants)) for layer in range(len(wants))]

    def voters(self, layer: int, num_layers: int, /) -> tuple[int, ...]:
        """Return the layers whose scores decide what a layer keeps, ascending.

        Layers with the same voters keep the same tokens. A policy for which they are not the layer itself says
        `Requirements.couples_layers`.

        Parameters
        ----------
        layer, num_layers : int
            Which layer of how many, of those that are evicted.

        Returns
        -------
        tuple of int
            Default: the layer itself.
        """
        return (layer,)

    def join(self, found: Sequence[Assessment], /) -> Assessment:
        """Return what layers are to choose by together. Default: what was found about the first one.

        Parameters
        ----------
        found : sequence of Assessment
            Of every voter, after re-scoring.

        Returns
        -------
        Assessment
        """
        return found[0]

    def within(self, found: Assessment, below: Choice, layer: Layer, budget: int, /) -> Assessment:
        """Return what was found about a layer, in the light of what the layer below it keeps. Default: what was found.

        Parameters
        ----------
        found : Assessment
            What `join` returned.
        below : Choice
            Of the layer below, where that may drop anything.
        layer : Layer
            The layer itself.
        budget : int
            Tokens to keep per row.

        Returns
        -------
        Assessment
        """
        return found

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Return the budget of one layer in tokens.

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

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many trailing queries `score` uses, at most N. Default: 0."""
        return 0

    def at(self, layer: int, num_layers: int, /) -> Policy:
        """Return the policy of one layer. Default: this one for all."""
        return self

    def renewed(self, number: int, /) -> Policy:
        """Return the base for a cache's eviction `number`, counted from 0. Default: this one for all.

        For bases that draw: the draws of one eviction must not be those of the next.
        """
        return self

    def with_base(self, change: Callable[[Policy], Policy], /) -> Policy:
        """Return the same wrappers over what `change` makes of the innermost base. Default: a policy without wrappers.

        Parameters
        ----------
        change : callable
            Called with the base, returns a policy.

        Returns
        -------
        Policy
        """
        return change(self)

    def needs(self) -> Requirements:
        """Return what the policy needs, its base included."""
        return self.requirements

    def chooses(self) -> bool:
        """Return whether `choose` may fill the budget otherwise than by `select`. Default: if the class defines it."""
        return type(self).choose is not Policy.choose

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the extra cost of one layer. Default: negligible."""
        return Cost()


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
        if self.base.needs().demotes and type(self).choose is not Wrapper.choose:
            name = type(self).__name__
            raise ArgumentError(f"base must not demote tokens below {name}, which chooses anew; got {self.base}")
        object.__setattr__(self, "budget", self.base.budget)

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory | None:
        """Return the base's memory."""
        return self.base.observe(layer, memory)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the base's importance."""
        return self.base.score(layer, memory)

    def protection(self, budget: int, /) -> Protection:
        """Return the base's protection."""
        return self.base.protection(budget)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Return the base's scores."""
        return self.base.rescore(found, layer, budget)

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Return the base's choice."""
        return self.base.choose(found, layer, budget)

    def merge(self, choice: Choice, found: Assessment, layer: Layer, memory: Memory | None, /) -> Merge | None:
        """Return the base's merge."""
        return self.base.merge(choice, found, layer, memory)

    def remains(
        self, choice: Choice, merge: Merge | None, layer: Layer, memory: Memory | None, /
    ) -> Mapping[str, Array]:
        """Return what the base remembers of the tokens that go."""
        return self.base.remains(choice, merge, layer, memory)

    def answer(
        self,
        queries: Array,
        memory: Memory,
        /,
        *,
        layer: int,
        num_layers: int,
        backend: Backend | str | None = None,
    ) -> Answer | None:
        """Return what the base answers."""
        return self.base.answer(queries, memory, layer=layer, num_layers=num_layers, backend=backend)

    def wants(self, layer: Layer, memory: Memory | None, /) -> Array | None:
        """Return what the base wants."""
        return self.base.wants(layer, memory)

    def share_out(self, wants: Sequence[float], num_tokens: int, /) -> list[int]:
        """Return the base's budgets."""
        return self.base.share_out(wants, num_tokens)

    def voters(self, layer: int, num_layers: int, /) -> tuple[int, ...]:
        """Return the base's voters."""
        return self.base.voters(layer, num_layers)

    def join(self, found: Sequence[Assessment], /) -> Assessment:
        """Return what the base makes of all."""
        return self.base.join(found)

    def within(self, found: Assessment, below: Choice, layer: Layer, budget: int, /) -> Assessment:
        """Return what the base makes of it."""
        return self.base.within(found, below, layer, budget)

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Return the base's budget of the layer."""
        return self.base.layer_budget(num_tokens, layer, num_layers)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base uses."""
        return self.base.num_queries(num_tokens)

    def at(self, layer: int, num_layers: int, /) -> Policy:
        """Return this wrapper over the base's policy of the layer."""
        base = self.base.at(layer, num_layers)
        return self if base is self.base else replace(self, base=base)

    def renewed(self, number: int, /) -> Policy:
        """Return this wrapper over the base of that eviction."""
        return self.with_base(lambda base: base.renewed(number))

    def with_base(self, change: Callable[[Policy], Policy], /) -> Policy:
        """Return this wrapper over another base."""
        base = self.base.with_base(change)
        return self if base is self.base else replace(self, base=base)

    def chooses(self) -> bool:
        """Return whether this wrapper, or one below it, may fill the budget otherwise."""
        return type(self).choose is not Wrapper.choose or self.base.chooses()

    def needs(self) -> Requirements:
        """Return the needs of the base and of this wrapper."""
        return self.requirements.joined(self.base.needs())

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the base's cost."""
        return self.base.cost(shape)
