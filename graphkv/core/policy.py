"""What an eviction policy is, and the one that this library exists for: `GraphKV` over any other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, ClassVar

from . import budgets, checks
from .backend import Backend
from .errors import ArgumentError
from .fusion import EXPONENT, FUSIONS, degree, fuse
from .graph import CHUNK_SIZE, build_graph
from .propagation import SIGNALS, propagate
from .types import Array, Graph, Namespace

__all__ = ["Assessment", "GraphKV", "LayerInputs", "LayerShape", "Policy", "Requirements", "Wrapper"]


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


def _identity(value: Any, /) -> Any:
    """Give what tells a value from another one: a number's kind too, counts being integers and shares floats."""
    if isinstance(value, Policy):
        return (type(value), *(_identity(getattr(value, each.name)) for each in fields(value)))
    if isinstance(value, (tuple, list)):
        return tuple(_identity(each) for each in value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return ("count" if hasattr(value, "__index__") else "share", value)
    # An array is equal to itself only: whether to another one, its values would have to say.
    return ("array", id(value)) if hasattr(value, "shape") else value


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
class Policy(ABC):
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

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # In the class itself, so that `dataclass` does not write its own: there 1 token is equal to 1.0, all of them.
        for name in ("__eq__", "__hash__"):
            if name not in vars(cls):
                setattr(cls, name, vars(Policy)[name])

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", checks.ratio_or_count("budget", self.budget, zero=False))

    def __eq__(self, other: object) -> bool:
        """Compare class and fields; a count and a share are different, whatever their numbers."""
        if type(self) is not type(other):
            return NotImplemented
        return bool(_identity(self) == _identity(other))

    def __hash__(self) -> int:
        """Hash what is compared."""
        return hash(_identity(self))

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


def _graph_counts(policy: GraphKV, budget: int, /) -> tuple[int, int]:
    """Give K and M at a layer budget."""
    open_tokens = max(0, budget - policy.num_protected(budget))
    if not open_tokens:
        return 0, 0
    return budgets.count_of(float(policy.source_ratio), open_tokens), budgets.count_of(policy.neighbors, open_tokens)


def _graph_flops(policy: GraphKV, shape: LayerShape, /) -> int:
    """Compare every source with every token: 2 K N D, and 3 N D to normalise; as often as a graph is built.

    Or sum up (1) and compare with the mean (2) instead.
    """
    if policy.signal == "degree":
        return 6 * shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
    num_sources, _ = _graph_counts(policy, shape.budget)
    passes = policy.rounds if policy.recompute_sources else 1
    rows = shape.batch * shape.kv_heads * passes
    return rows * shape.num_tokens * shape.head_size * (2 * min(num_sources, shape.num_tokens) + 3)


def _graph_bytes(policy: GraphKV, shape: LayerShape, /) -> int:
    """Hold the normalised keys, or a chunk of similarities where that is more, as the portable form does."""
    num_sources = 0 if policy.signal == "degree" else _graph_counts(policy, shape.budget)[0]
    similarities = num_sources * min(shape.num_tokens, CHUNK_SIZE)
    return 4 * shape.batch * shape.kv_heads * max(similarities, shape.num_tokens * shape.head_size)


@dataclass(frozen=True)
class GraphKV(Wrapper):
    """Any policy, with tokens that resemble others ranked down.

    The base policy scores the tokens, the graph of similarities changes the scores, and the budget is filled from the
    result. Only tokens that the base may still choose get new scores: neither padding nor protected ones (observation
    window, sinks, recents).

    With ``signal="degree"``, the default, `degree` compares every key with the mean of all that are no padding, and
    `fuse` puts that together with the importance. No edges are drawn.

    With the paper's ``signal="decay"``, or ``"enhance"`` or ``"evict"``, `build_graph` links the best of those tokens
    to their most similar ones, and `propagate` lowers (or raises, or bars) the latter.

    Parameters
    ----------
    base : Policy
        Where importance, protection and budget come from.
    signal : str
        ``"degree"``; or ``"decay"``, ``"enhance"`` or ``"evict"``, see `propagate`.
    fusion : str
        For the degree: ``"power"``, ``"max_rank"`` or ``"mean_rank"``, see `fuse`.
    exponent : int
        For ``fusion="power"``: p, at least 1.
    source_ratio : float
        For the other signals, like all that follow up to `recompute_sources`: K, the number of sources, as a share of
        P, the layer budget less the protected tokens. Rounded down, at least 1 when above 0.
    neighbors : int or float
        M, the number of neighbors per source, or its share of P, rounded likewise.
    rounds : int
        T, the number of rounds.
    accumulation : str
        ``"product"`` or ``"sum"``, see `propagate`.
    strength : float
        g, in [0, 1].
    recompute_sources : bool
        Choose sources and edges anew before each round. Default: fixed, as in the paper's formula.
    unrotated : bool
        For every signal: compare the keys as they were before the rotary embedding, which `evict` must be given. Then
        the distance between two tokens in the text does not make them less alike.

    Raises
    ------
    ArgumentError
        If an option is unknown or out of range, or belongs to another signal or fusion; when evicting, if there are no
        keys to compare.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    The degree signal is not in the paper. It is the default because it was better on a tuning split, with every base.

    That K counts only the tokens that are still open, that protected tokens stand outside the graph and that M may be
    a share of P are our reading of the paper, which gives the ratio 0.3 of the budget and says "adaptive" of the rest.

    References
    ----------
    .. [1] Li, Jin, Zhang, "GraphKV", arXiv:2509.00388.

    Examples
    --------
    >>> from graphkv import GraphKV, SnapKV
    >>> GraphKV(SnapKV(budget=512)).budget
    512
    >>> GraphKV(SnapKV(budget=512), signal="decay", neighbors=2).neighbors
    2
    """

    requirements: ClassVar[Requirements] = Requirements(flops=_graph_flops, bytes=_graph_bytes)

    signal: str = "degree"
    fusion: str = "power"
    exponent: int = EXPONENT
    source_ratio: float = 0.3
    neighbors: int | float = 1
    rounds: int = 1
    accumulation: str = "product"
    strength: float = 1.0
    recompute_sources: bool = False
    unrotated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("source_ratio", self.source_ratio)
        checks.ratio_or_count("neighbors", self.neighbors)
        checks.count("rounds", self.rounds)
        checks.choice("signal", self.signal, (*SIGNALS, "degree"))
        checks.choice("accumulation", self.accumulation, ("product", "sum"))
        checks.single_round(self.accumulation, self.rounds)
        checks.fraction("strength", self.strength)
        checks.flag("recompute_sources", self.recompute_sources)
        checks.choice("fusion", self.fusion, FUSIONS)
        checks.count("exponent", self.exponent, minimum=1)
        checks.flag("unrotated", self.unrotated)
        if self.signal != "degree":
            self._refuse("signal", "fusion", "exponent")
            return
        self._refuse("signal", "source_ratio", "neighbors", "rounds", "accumulation", "strength", "recompute_sources")
        if self.fusion != "power":
            self._refuse("fusion", "exponent")

    def _refuse(self, choice: str, /, *names: str) -> None:
        """Refuse options that have no meaning with the choice that was made."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in names:
            checks.unused(name, getattr(self, name), defaults[name], choice, getattr(self, choice))

    @classmethod
    def paper(cls, base: Policy, /) -> GraphKV:
        """Give the paper's setting: product, one round, sources 0.3 of the budget.

        The paper gives no number of neighbors; 2 is what both of its method figures draw.

        Parameters
        ----------
        base : Policy
            Where importance, protection and budget come from.

        Returns
        -------
        GraphKV
            A policy over `base`.

        Raises
        ------
        ArgumentTypeError
            If `base` is no Policy.
        """
        return cls(base, source_ratio=0.3, neighbors=2, rounds=1, signal="decay", accumulation="product")

    def needs(self) -> Requirements:
        """Need what the base needs, and the keys that are compared."""
        needs = super().needs()
        return replace(needs, unrotated_keys=self.unrotated or needs.unrotated_keys)

    def assess(self, inputs: LayerInputs, /) -> Assessment:
        """Let the base score, then propagate or fuse."""
        keys = inputs.unrotated_keys if self.unrotated else inputs.keys
        if keys is None:
            raise ArgumentError("unrotated_keys must be given for GraphKV with unrotated=True; got None")
        found = self.base.assess(inputs)
        candidates = inputs.valid if found.protected is None else inputs.valid & ~found.protected
        if self.signal == "degree":
            scores = fuse(
                found.scores,
                degree(keys, valid=inputs.valid, backend=inputs.backend),
                fusion=self.fusion,
                exponent=self.exponent,
                valid=candidates,
                backend=inputs.backend,
            )
            return replace(found, scores=scores)

        num_sources, num_neighbors = _graph_counts(self, inputs.budget)
        scores, graph = found.scores, found.graph
        # Fixed sources: one graph serves all rounds. Recomputed: a graph and a single round, T times.
        passes, rounds = (self.rounds, 1) if self.recompute_sources else (1, self.rounds)
        for _ in range(passes):
            graph = build_graph(
                keys,
                scores,
                num_sources=num_sources,
                num_neighbors=num_neighbors,
                valid=candidates,
                backend=inputs.backend,
            )
            scores = propagate(
                scores,
                graph,
                signal=self.signal,
                rounds=rounds,
                accumulation=self.accumulation,
                strength=self.strength,
                backend=inputs.backend,
            )
        return replace(found, scores=scores, graph=graph)
