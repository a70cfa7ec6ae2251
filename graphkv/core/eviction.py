"""One call that evicts one layer: a policy's stages in their order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import budgets, checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError
from .layer import Layer, Memory
from .merging import Merge
from .needs import check_needs, check_state, has_rows, name_of
from .policy import Assessment, Policy
from .selection import Choice
from .types import Array, Graph

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .layer import LayerFacts

__all__ = ["Eviction", "evict", "observe", "wants"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Eviction:
    """Which tokens of one layer stay, and why.

    Attributes
    ----------
    choice : Choice
        Who stays.
    merge : Merge or None
        Where dropped tokens go; None where they are gone.
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
        The layer's budget in tokens.
    num_tokens : int
        N, the number of tokens before.
    """

    choice: Choice
    merge: Merge | None = None
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
            If `x` is not an array of the backend's library.
        """
        resolve(self.backend, x=x)
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
    layer: int = 0,
    num_layers: int = 1,
    budget: int | float | None = None,
    tokens_seen: int | None = None,
    state: Memory | None = None,
    backend: Backend | str | None = None,
) -> Eviction:
    """Decide which tokens of one layer's cache stay.

    With a budget of N tokens or more everything stays and nothing is scored.

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
        If the arrays are not all of the backend's library.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import StreamingLLM, evict
    >>> evict(StreamingLLM(budget=4, num_sinks=1), np.ones((1, 1, 9, 2))).kept
    array([[[0, 6, 7, 8]]])
    """
    checks.instance("policy", policy, Policy)
    facts = Layer(
        keys,
        values=values,
        queries=queries,
        attention=attention,
        valid=valid,
        positions=positions,
        unrotated_keys=unrotated_keys,
        num_new=_num_new(keys, state),
        layer=layer,
        num_layers=num_layers,
        backend=backend,
    )
    num_tokens = _budget(policy, facts, budget, tokens_seen)
    policy = policy.at(facts.layer, facts.num_layers)
    check_state(policy, state, facts)
    scores = facts.num_tokens > num_tokens
    if scores or state is not None or has_rows(facts):
        check_needs(policy, facts, scores=scores)
    with facts.backend.guarded(keys):
        return _evict(policy, facts, num_tokens, state)


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


def _evict(policy: Policy, layer: Layer, budget: int, state: Memory | None, /) -> Eviction:
    """Run the stages on what was checked."""
    memory = _observed(policy, layer, state)
    if layer.num_tokens <= budget:
        return Eviction(
            choice=_everything(layer),
            state=_detached(memory, layer),
            budget=budget,
            num_tokens=layer.num_tokens,
            backend=layer.backend,
        )
    importance, protected = policy.score(layer, memory), policy.protection(budget).mask(layer, memory)
    found = policy.rescore(Assessment(importance=importance, scores=importance, protected=protected), layer, budget)
    choice = policy.choose(found, layer, budget)
    decision = Eviction(
        choice=choice,
        merge=policy.merge(choice, layer, memory),
        importance=found.importance,
        scores=found.scores,
        protected=found.protected,
        graph=found.graph,
        budget=budget,
        num_tokens=layer.num_tokens,
        backend=layer.backend,
    )
    remembered = _detached(memory, layer)
    if remembered is None:
        return decision
    kept = {name: decision.apply(x) for name, x in remembered.tokens.items()}
    return replace(decision, state=replace(remembered, tokens=kept))


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
