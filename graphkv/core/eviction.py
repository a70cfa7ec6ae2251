"""One call that evicts one layer: a policy's stages in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import budgets, checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError
from .layer import Layer, Memory, Probe
from .merging import Merge, compressed
from .needs import check_needs, check_state, has_rows, name_of
from .policy import Assessment, Policy
from .selection import Choice
from .types import Array, Graph

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .layer import LayerFacts

__all__ = ["Eviction", "evict", "evict_layers", "observe", "wants"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Eviction:
    """Which tokens of one layer stay, and why.

    Attributes
    ----------
    choice : Choice
        Who stays.
    merge : Merge or None
        Where dropped tokens go; None where they are gone.
    mass : array, shape (batch, kv_heads, b), float32 or wider, or None
        Tokens that each slot counts as, for the next call. None where each counts as one.
    state : Memory or None
        What the policy remembers of the kept tokens, for the next call.
    importance : array, shape (batch, kv_heads, N), float32 or wider, or None
        The policy's base score. None when everything fits: then nothing was scored.
    scores : array, shape (batch, kv_heads, N), float32 or wider, or None
        What the choice ranked by, after re-scoring.
    protected : array, shape (batch, kv_heads, N), bool, or None
        Tokens that were kept before all others.
    graph : Graph or None
        The edges that changed the scores.
    budget : int
        The layer's budget in tokens; the most that a row may keep, where a policy finds its budgets itself.
    num_tokens : int
        N, the number of tokens before.
    """

    choice: Choice
    merge: Merge | None = None
    mass: Array | None = None
    state: Memory | None = None
    importance: Array | None = None
    scores: Array | None = None
    protected: Array | None = None
    graph: Graph | None = None
    budget: int
    num_tokens: int
    backend: Backend

    @property
    def kept(self) -> Array:
        """Positions of the kept tokens, see `Choice`: (batch, kv_heads, b), int64, ascending."""
        return self.choice.kept

    @property
    def counts(self) -> Array | None:
        """Number of kept tokens per head, where heads or rows keep different numbers, see `Choice`."""
        return self.choice.counts

    @property
    def levels(self) -> Array | None:
        """How far each kept token is demoted, where some are kept in fewer bits, see `Choice`."""
        return self.choice.levels

    def apply(self, x: Array, /) -> Array:
        """Gather the kept tokens of any per-token array.

        Parameters
        ----------
        x : array, shape (batch, kv_heads, N, ...)
            Keys, values, positions or what else belongs to the tokens; of the same library as `kept`.

        Returns
        -------
        array, shape (batch, kv_heads, b, ...)
            Same dtype as `x`; `x` itself when everything is kept. Zero where a row keeps less than the widest.

        Raises
        ------
        ArgumentError
            If `x` has a different leading shape.
        BackendError
            If `x` is not an array of the backend's library, or on another device.
        """
        resolve(self.backend, kept=self.kept, x=x)
        expected = (*self.kept.shape[:-1], self.num_tokens)
        if tuple(x.shape[: len(expected)]) != expected:
            raise ArgumentError(f"x must have shape (batch, kv_heads, N, ...) = {expected} + ...; got {tuple(x.shape)}")
        xp = self.backend.xp
        if self.counts is None:
            return x if self.kept.shape[-1] == self.num_tokens else primitives.take_rows(x, self.kept, xp=xp)
        is_kept = self.kept >= 0
        gathered = primitives.take_rows(x, xp.where(is_kept, self.kept, xp.zeros_like(self.kept)), xp=xp)
        is_kept = xp.reshape(is_kept, (*is_kept.shape, *(1 for _ in gathered.shape[is_kept.ndim :])))
        return xp.where(is_kept, gathered, xp.zeros_like(gathered))

    def compress(self, keys: Array, values: Array, /) -> tuple[Array, Array]:
        """Return the keys and values that stay, with what was merged into them.

        Parameters
        ----------
        keys : array, shape (batch, kv_heads, N, D)
        values : array, shape (batch, kv_heads, N, Dv)
            Of the same library as `kept`.

        Returns
        -------
        keys, values : arrays, shape (batch, kv_heads, b, D) and (batch, kv_heads, b, Dv)
            Of the dtypes given; sums are in float32 or wider. Without a merge what `apply` returns, and bit for bit so
            in every slot that nothing went into.

        Raises
        ------
        ArgumentError
            If an array has a different leading shape, or more or less than four axes.
        BackendError
            If an array is not of the backend's library, or on another device.

        Examples
        --------
        The second token is dropped into the first, which stays where it is and now counts as two:

        >>> import numpy as np
        >>> from graphkv import Absorb, Given, evict
        >>> keys = np.asarray([[[[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]]])
        >>> base = Given(budget=2, importance=np.asarray([[[3.0, 1.0, 2.0]]]))
        >>> done = evict(Absorb(base, weights="count"), keys, values=keys)
        >>> done.compress(keys, keys)[0].tolist(), done.compress(keys, keys)[1].tolist()
        ([[[[2.0, 0.0], [0.0, 1.0]]]], [[[[2.5, 0.0], [0.0, 1.0]]]])
        >>> done.log_mass().round(3)
        array([[[0.693, 0.   ]]])
        """
        gathered = [self.apply(x) for x in (keys, values)]
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 4:
                raise ArgumentError(f"{name} must have shape (batch, kv_heads, N, D); got {tuple(x.shape)}")
        if self.merge is None:
            return gathered[0], gathered[1]
        into, weights = self.merge.into, (self.merge.key_weights, self.merge.value_weights)
        with self.backend.guarded(keys):
            merged = [
                compressed(x, kept, self.kept, into, weight, backend=self.backend)
                for x, kept, weight in zip((keys, values), gathered, weights, strict=True)
            ]
        return merged[0], merged[1]

    def log_mass(self) -> Array | None:
        """Return what attention adds to the logits of each slot.

        Returns
        -------
        array, shape (batch, kv_heads, b), float32 or wider, or None
            The logarithm of `mass`; 0 where a row has no token. None where each slot counts as one.
        """
        if self.mass is None:
            return None
        xp, one = self.backend.xp, self.backend.xp.ones_like(self.mass)
        return xp.log(xp.where(self.mass > 0, self.mass, one))

    def __repr__(self) -> str:
        return f"Eviction(kept of shape (batch, kv_heads, b)={tuple(self.kept.shape)} of {self.num_tokens} tokens)"


def evict(
    policy: Policy,
    keys: Array,
    /,
    *,
    values: Array | None = None,
    queries: Array | None = None,
    attention: Array | None = None,
    valid: Array | None = None,
    positions: Array | None = None,
    unrotated_keys: Array | None = None,
    mass: Array | None = None,
    probes: Array | Probe | Sequence[Probe] | None = None,
    layer: int = 0,
    num_layers: int = 1,
    budget: int | float | None = None,
    tokens_seen: int | None = None,
    state: Memory | None = None,
    backend: Backend | str | None = None,
) -> Eviction:
    """Decide which tokens of one layer's cache stay.

    With a budget of N tokens or more everything stays and nothing is scored, unless the policy finds its budgets
    itself.

    Parameters
    ----------
    policy : Policy
        For example ``GraphKV(SnapKV(budget=512))``.
    keys : array, shape (batch, kv_heads, N, D)
        Cached keys, after the rotary embedding.
    values : array, shape (batch, kv_heads, N, Dv), optional
        For policies that look at values.
    queries : array, shape (batch, query_heads, Q, D), optional
        The last Q <= N positions; query head h belongs to KV head h // (query_heads / kv_heads). Scaled such that
        q k / sqrt(D) is the model's attention logit.
    attention : array, shape (batch, query_heads, Q, N), optional
        Attention probabilities of the last Q positions, where they are at hand.
    valid : array, shape (batch, N) or (batch, kv_heads, N), bool, optional
        False for padding. Default: all True.
    positions : array, shape (batch, kv_heads, N), integer, optional
        Where each token was in the text, for policies with a clock.
    unrotated_keys : array, shape (batch, kv_heads, N, D), optional
        The keys before the rotary embedding, for ``GraphKV(base, unrotated=True)``. Rotating all keys of a row by the
        same angle changes nothing.
    mass : array, shape (batch, kv_heads, N), optional
        How many tokens each key stands for, where earlier calls have merged some: their `Eviction.mass`, and 1 for what
        came since. Attention that is computed here adds its logarithm. Default: 1 each.
    probes : array, shape (batch, query_heads, P, D), or Probe, or sequence of Probe, optional
        What was read after the text only to ask it, for policies like `KVzip`. An array is the queries of one probe.
    layer, num_layers : int
        Which layer of how many, for policies whose budget depends on it.
    budget : int or float, optional
        Tokens to keep per row, or their share, in place of the policy's own budget. Default: `Policy.layer_budget`.
    tokens_seen : int, optional
        Tokens that came so far, those included that earlier calls evicted: what budgets are shares of. Default: N.
    state : Memory, optional
        The `Eviction.state` of the last call, for policies that score by what they have seen so far. With S tokens in
        it, the N - S tokens after them are new, and `queries` or `attention` hold the new positions.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    Eviction
        Positions to keep, with the scores and the graph that led to them.

    Raises
    ------
    ArgumentError
        If shapes disagree, an integer is out of range, the policy needs an input that is missing, the state is another
        policy's, or the policy's budgets are settled and another is given.
    ArgumentTypeError
        If `policy` is not a Policy, `state` not a Memory, an array not real, or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library and on one device.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import StreamingLLM, evict
    >>> evict(StreamingLLM(budget=4, num_sinks=1), np.ones((1, 1, 9, 2))).kept
    array([[[0, 6, 7, 8]]])
    """
    case = _Case.of(
        policy,
        keys,
        budget=budget,
        tokens_seen=tokens_seen,
        state=state,
        values=values,
        queries=queries,
        attention=attention,
        valid=valid,
        positions=positions,
        unrotated_keys=unrotated_keys,
        mass=mass,
        probes=probes,
        layer=layer,
        num_layers=num_layers,
        backend=backend,
    )
    voters = policy.voters(case.layer.layer, case.layer.num_layers)
    if voters != (case.layer.layer,):
        raise ArgumentError(
            f"layer must be evicted together with others, by evict_layers: with {name_of(policy)} layer "
            f"{case.layer.layer} keeps what the layers {list(voters)} choose"
        )
    case.check_needs()
    with case.layer.backend.guarded(keys):
        case = case.observed()
        if not case.is_scored:
            return case.whole()
        found = case.found()
        return case.evicted(found, case.choice(found))


def evict_layers(
    policy: Policy,
    layers: Sequence[Mapping[str, Any]],
    /,
    *,
    budget: int | float | None = None,
    tokens_seen: int | None = None,
    backend: Backend | str | None = None,
) -> tuple[Eviction, ...]:
    """Decide which tokens of several layers' caches stay, where layers share what they keep.

    Other policies decide for each layer as `evict` does.

    Parameters
    ----------
    policy : Policy
        For example ``Shared(SnapKV(budget=512), over="layers")``.
    layers : sequence of mapping of str to object
        What `evict` takes for each layer, the first layer first: ``keys``, and ``values``, ``queries``, ``state`` and
        so on by their names. Default of ``layer`` and ``num_layers``: the place among those given, and their number.
    budget, tokens_seen, backend
        As for `evict`, for all layers. A layer may have its own.

    Returns
    -------
    tuple of Eviction
        One per layer. Layers that share a choice have its scores, and the graph of the first that was scored.

    Raises
    ------
    ArgumentError
        As `evict`; and if layers that share a choice differ in budget, device or (batch, kv_heads, N).
    ArgumentTypeError, BackendError
        As `evict`.

    Examples
    --------
    Token 0 is the first layer's favorite, token 2 the second's; token 1 is what they agree on:

    >>> import numpy as np
    >>> from graphkv import Shared, SnapKV, evict_layers
    >>> rows = [np.asarray([[[[0.5, 0.4, 0.1, 0.0]]]]), np.asarray([[[[0.1, 0.4, 0.5, 0.0]]]])]
    >>> policy = Shared(SnapKV(budget=2, window=1, kernel_size=1), over="layers")
    >>> done = evict_layers(policy, [{"keys": np.ones((1, 1, 4, 2)), "attention": each} for each in rows])
    >>> [layer.kept.tolist() for layer in done]
    [[[[1, 3]]], [[[1, 3]]]]
    """
    checks.instance("policy", policy, Policy)
    common = {"budget": budget, "tokens_seen": tokens_seen, "num_layers": len(layers), "backend": backend}
    cases, voters = [], [policy.voters(place, len(layers)) for place in range(len(layers))]
    for place, facts in enumerate(layers):
        if "keys" not in facts:
            raise ArgumentError(f"layers[{place}] must have keys; got {sorted(facts)}")
        given = {**common, "layer": place, **facts}
        cases.append(_Case.of(policy, given.pop("keys"), **given))
    for place, case in enumerate(cases):
        for voter in voters[place]:
            case.check_same(cases[voter], place, voter, shares=voters[place] == voters[voter])
        case.check_needs(votes=any(place in each for each in voters))
    found: dict[int, Assessment] = {}
    chosen: dict[tuple[int, ...], tuple[Assessment, Choice]] = {}
    for place, case in enumerate(cases):
        with case.layer.backend.guarded(case.layer.keys):
            cases[place] = case.observed()
            if case.is_scored and any(place in group for group in voters):
                found[place] = cases[place].found()
    done: list[Eviction] = []
    below: Choice | None = None
    for place, (group, case) in enumerate(zip(voters, cases, strict=True)):
        with case.layer.backend.guarded(case.layer.keys):
            if not case.is_scored:
                done.append(case.whole())
                below = None
                continue
            if group not in chosen:
                joined = policy.join([found[voter] for voter in group if voter in found])
                chooser = case if place in group else cases[group[0]]
                if below is not None:
                    joined = policy.within(joined, below, chooser.layer, chooser.most)
                chosen[group] = joined, chooser.choice(joined)
            done.append(case.evicted(*chosen[group]))
            below = chosen[group][1]
    return tuple(done)


def observe(
    policy: Policy, keys: Array, /, *, state: Memory | None = None, **facts: Unpack[LayerFacts]
) -> Memory | None:
    """Let a policy remember what new positions attend to, without evicting anything.

    Parameters
    ----------
    policy : Policy
        For example ``H2O(budget=512)``.
    keys, state, and all others
        As for `evict`.

    Returns
    -------
    Memory or None
        Of all N tokens: the `state` of the next call. None for a policy that remembers nothing.

    Raises
    ------
    ArgumentError, ArgumentTypeError, BackendError
        As `evict`.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import H2O, observe
    >>> rows = np.asarray([[[[1.0, 0.0], [0.25, 0.75]]]])
    >>> observe(H2O(budget=1), np.ones((1, 1, 2, 4)), attention=rows).tokens["queries"]
    array([[[2., 1.]]])
    """
    checks.instance("policy", policy, Policy)
    layer = Layer(keys, num_new=_num_new(keys, state), **facts)
    policy = policy.at(layer.layer, layer.num_layers)
    check_state(policy, state, layer)
    check_needs(policy, layer, scores=False)
    with layer.backend.guarded(keys):
        return _detached(_observed(policy, layer, state), layer)


def wants(policy: Policy, keys: Array, /, *, state: Memory | None = None, **facts: Unpack[LayerFacts]) -> Array | None:
    """Return how much one layer wants of the common budget.

    With the answers of all layers, `Policy.share_out` makes each layer's budget, which `evict` takes.

    Parameters
    ----------
    policy : Policy
        For example ``CAKE(budget=512)``.
    keys, state, and all others
        As for `evict`.

    Returns
    -------
    array, shape (batch,), float32 or wider, or None
        None for policies whose budgets do not depend on what is in the layers.

    Raises
    ------
    ArgumentError, ArgumentTypeError, BackendError
        As `evict`.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import CAKE, wants
    >>> rows = np.asarray([[[[0.2, 0.0, 0.8, 0.0], [0.2, 0.3, 0.3, 0.2]]]])
    >>> wants(CAKE(budget=3, window=2, kernel_size=1), np.ones((1, 1, 4, 2)), attention=rows).round(4)
    array([0.0452])
    """
    checks.instance("policy", policy, Policy)
    layer = Layer(keys, num_new=_num_new(keys, state), **facts)
    check_state(policy, state, layer)
    check_needs(policy, layer, scores=policy.needs().wants)
    with layer.backend.guarded(keys):
        return policy.wants(layer, _observed(policy, layer, state))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """One layer to be evicted: its policy, its checked facts, its budget and what the last call left."""

    policy: Policy
    layer: Layer
    budget: int
    state: Memory | None
    memory: Memory | None = None

    @classmethod
    def of(
        cls,
        policy: Policy,
        keys: Array,
        /,
        *,
        budget: int | float | None,
        tokens_seen: int | None,
        state: Memory | None = None,
        **facts: Unpack[LayerFacts],
    ) -> _Case:
        """Check the arguments, but for what the policy needs."""
        checks.instance("policy", policy, Policy)
        layer = Layer(keys, num_new=_num_new(keys, state), **facts)
        num_tokens = _budget(policy, layer, budget, tokens_seen)
        policy = policy.at(layer.layer, layer.num_layers)
        check_state(policy, state, layer)
        return cls(policy=policy, layer=layer, budget=num_tokens, state=state)

    @property
    def is_scored(self) -> bool:
        """Whether anything may go."""
        return self.layer.num_tokens > (0 if self.policy.needs().automatic else self.budget)

    @property
    def most(self) -> int:
        """The most tokens that a row may keep."""
        return min(self.budget, self.layer.num_tokens)

    def check_needs(self, *, votes: bool = True) -> None:
        """Refuse a layer without what the policy needs of it."""
        scores = self.is_scored and votes
        if scores or self.state is not None or has_rows(self.layer):
            check_needs(self.policy, self.layer, scores=scores)

    def check_same(self, voter: _Case, place: int, its_place: int, /, *, shares: bool) -> None:
        """Refuse to keep what a layer of another size chooses."""
        for name, own, other in (
            *([("budget", self.budget, voter.budget)] if shares else []),
            ("(batch, kv_heads, N)", tuple(self.layer.valid.shape), tuple(voter.layer.valid.shape)),
            ("backend", self.layer.backend.name, voter.layer.backend.name),
            ("device", primitives.device_of(self.layer.keys), primitives.device_of(voter.layer.keys)),
        ):
            if own != other:
                raise ArgumentError(
                    f"layers must have one {name} where they share what they keep, with {name_of(self.policy)}; "
                    f"layers[{its_place}] has {other}, layers[{place}] has {own}"
                )

    def observed(self) -> _Case:
        """Let the policy remember the new positions."""
        return replace(self, memory=_observed(self.policy, self.layer, self.state))

    def whole(self) -> Eviction:
        """Keep everything."""
        return Eviction(
            choice=_everything(self.layer),
            mass=self.layer.mass,
            state=_detached(self.memory, self.layer),
            budget=self.budget,
            num_tokens=self.layer.num_tokens,
            backend=self.layer.backend,
        )

    def found(self) -> Assessment:
        """Score, protect and score again."""
        importance = self.policy.score(self.layer, self.memory)
        protected = self.policy.protection(self.most).mask(self.layer, self.memory)
        found = Assessment(importance=importance, scores=importance, protected=protected)
        return self.policy.rescore(found, self.layer, self.most)

    def choice(self, found: Assessment, /) -> Choice:
        """Choose by what was found, in this layer or in several."""
        return self.policy.choose(found, self.layer, self.most)

    def evicted(self, found: Assessment, choice: Choice, /) -> Eviction:
        """Do as was chosen."""
        merge = self.policy.merge(choice, found, self.layer, self.memory)
        decision = Eviction(
            choice=choice,
            merge=merge,
            importance=found.importance,
            scores=found.scores,
            protected=found.protected,
            graph=found.graph,
            budget=self.budget,
            num_tokens=self.layer.num_tokens,
            backend=self.layer.backend,
        )
        if merge is not None:
            decision = replace(decision, mass=merge.mass)
        elif self.layer.mass is not None:
            decision = replace(decision, mass=decision.apply(self.layer.mass))
        told = {
            **({} if merge is None else merge.memory),
            **self.policy.remains(choice, merge, self.layer, self.memory),
        }
        if self.memory is None and not told:
            return decision
        memory = self.memory or Memory()
        kept = {name: decision.apply(x) for name, x in memory.tokens.items()}
        return replace(decision, state=_detached(Memory(tokens=kept, layer={**memory.layer, **told}), self.layer))


def _everything(layer: Layer, /) -> Choice:
    """Return the choice of all tokens."""
    xp = layer.xp
    position = xp.arange(layer.num_tokens, dtype=xp.int64, device=primitives.device_of(layer.keys))
    return Choice(kept=xp.asarray(xp.broadcast_to(position, tuple(layer.valid.shape)), copy=True))


def _observed(policy: Policy, layer: Layer, state: Memory | None, /) -> Memory | None:
    """Return what the policy remembers of all tokens."""
    # A prompt that fits may come without queries; nothing is known of it then, and the next call needs them all.
    needs = policy.needs()
    if not needs.state or (state is None and needs.queries != "none" and not has_rows(layer)):
        return None
    return state if state is not None and not layer.num_new else policy.observe(layer, state)


def _detached(memory: Memory | None, layer: Layer, /) -> Memory | None:
    """Cut a memory off from the gradients that led to it, which would pile up from call to call."""
    detach = layer.backend.detach
    if memory is None or detach is None:
        return memory
    return Memory(
        tokens={name: detach(x) for name, x in memory.tokens.items()},
        layer={name: detach(x) for name, x in memory.layer.items()},
    )


def _budget(policy: Policy, layer: Layer, budget: int | float | None, tokens_seen: int | None, /) -> int:
    """Return the layer's budget in tokens."""
    num_tokens = layer.num_tokens
    seen = num_tokens if tokens_seen is None else checks.count("tokens_seen", tokens_seen)
    if seen < num_tokens:
        raise ArgumentError(f"tokens_seen must be at least N={num_tokens}; got {seen}")
    own = checks.count("the layer's budget", policy.layer_budget(seen, layer.layer, layer.num_layers))
    if budget is None:
        return own
    tokens = budgets.tokens_of(checks.budget(budget), seen)
    # With room for everything nothing is evicted, whatever the policy's budgets are.
    if policy.needs().settled and tokens != own and tokens < num_tokens:
        raise ArgumentError(f"budget must be {own}, as {name_of(policy)} has settled, or left out; got {budget}")
    return tokens


def _num_new(keys: Array, state: Memory | None, /) -> int | None:
    """Return the number of tokens that the state does not know."""
    if state is None or not hasattr(keys, "shape") or len(keys.shape) != 4:
        return None
    checks.instance("state", state, Memory)
    return max(0, int(keys.shape[2]) - state.num_tokens) if state.tokens else None
