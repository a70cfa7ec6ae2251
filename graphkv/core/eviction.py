"""One call that evicts one layer: policy, graph, propagation and selection together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError
from .policy import LayerInputs, Policy
from .selection import select, select_per_head
from .types import Array, Graph

__all__ = ["Eviction", "evict", "preference"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Eviction:
    """Which tokens of one layer stay, and why.

    Attributes
    ----------
    kept : array, shape (batch, kv_heads, b), int64
        Positions of the kept tokens, ascending; b = min(budget, N). Under a policy with head budgets b is what the
        widest head may keep, and a row is filled up with -1.
    budget : int
        The layer's budget in tokens.
    num_tokens : int
        N, the number of tokens before.
    importance : array, shape (batch, kv_heads, N), float32 or wider, or None
        The policy's base score. None when everything fits: then nothing was scored.
    scores : array, shape (batch, kv_heads, N), float32 or wider, or None
        What the selection ranked by, after propagation.
    protected : array, shape (batch, kv_heads, N), bool, or None
        Tokens that were kept before all others.
    graph : Graph or None
        The edges that changed the scores.
    head_budgets : array, shape (batch, kv_heads), integer, or None
        Number of kept tokens per head, where heads keep different numbers.
    state : dict of str to array, shape (batch, kv_heads, b, ...), or None
        The policy's running sums of the kept tokens, for the next call. No gradients flow through them.
    """

    kept: Array
    budget: int
    num_tokens: int
    importance: Array | None
    scores: Array | None
    protected: Array | None
    graph: Graph | None
    backend: Backend
    head_budgets: Array | None = None
    state: Mapping[str, Array] | None = None

    def apply(self, x: Array, /) -> Array:
        """Gather the kept tokens of any per-token array.

        Parameters
        ----------
        x : array, shape (batch, kv_heads, N, ...)
            Keys, values, positions or what else belongs to the tokens; of the same library as `kept`.

        Returns
        -------
        array, shape (batch, kv_heads, b, ...)
            Same dtype as `x`; `x` itself when everything is kept. Zero where a head keeps less than the widest.

        Raises
        ------
        ArgumentError
            If the leading shape of `x` is another.
        BackendError
            If `x` is not an array of the backend's library.
        """
        resolve(self.backend, x=x)
        expected = (*self.kept.shape[:-1], self.num_tokens)
        if tuple(x.shape[: len(expected)]) != expected:
            raise ArgumentError(f"x must have shape (batch, kv_heads, N, ...) = {expected} + ...; got {tuple(x.shape)}")
        xp = self.backend.xp
        if self.head_budgets is None:
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
    layer: int = 0,
    num_layers: int = 1,
    valid: Array | None = None,
    state: Mapping[str, Array] | None = None,
    unrotated_keys: Array | None = None,
    tokens_seen: int | None = None,
    backend: Backend | str | None = None,
) -> Eviction:
    """Decide which tokens of one layer's cache stay.

    With N tokens or more of budget everything stays and nothing is scored.

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
    layer, num_layers : int
        Which layer of how many, for policies whose budget depends on it.
    valid : array, shape (batch, N) or (batch, kv_heads, N), bool, optional
        False for padding. Default: all True.
    state : mapping of str to array, shape (batch, kv_heads, S, ...), optional
        The `Eviction.state` of the last call, for policies that score by what they have seen so far. The N - S tokens
        after them are new. Then `queries` or `attention` hold the new positions.
    unrotated_keys : array, shape (batch, kv_heads, N, D), optional
        The keys before the rotary embedding, for ``GraphKV(base, unrotated=True)``. Rotating all keys of a row by one
        and the same angle changes nothing.
    tokens_seen : int, optional
        Tokens that came so far, those included that earlier calls evicted: what budgets are shares of. Default: N.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    Eviction
        Positions to keep, with the scores and the graph that led to them.

    Raises
    ------
    ArgumentError
        If shapes disagree, `layer` is out of range, or the policy needs an input that is missing.
    ArgumentTypeError
        If `policy` is no Policy, an array is not real, or `valid` not bool.
    BackendError
        If the arrays are not all of the backend's library.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import StreamingLLM, evict
    >>> evict(StreamingLLM(budget=4, num_sinks=1), np.ones((1, 1, 9, 2))).kept
    array([[[0, 6, 7, 8]]])
    """
    inputs = _inputs(
        policy,
        keys,
        values=values,
        queries=queries,
        attention=attention,
        layer=layer,
        num_layers=num_layers,
        valid=valid,
        state=state,
        unrotated_keys=unrotated_keys,
        tokens_seen=tokens_seen,
        backend=backend,
    )
    with inputs.backend.guarded(keys):
        return _evict(policy, inputs)


def _evict(policy: Policy, inputs: LayerInputs, /) -> Eviction:
    """Decide from checked arguments."""
    backend, xp, budget, rows = inputs.backend, inputs.xp, inputs.budget, tuple(inputs.valid.shape)
    kv_heads, num_tokens = rows[1:]
    if inputs.queries is not None or inputs.attention is not None:
        inputs = replace(inputs, state=policy.observe(inputs))
    if num_tokens <= budget:
        everything = xp.broadcast_to(
            xp.arange(num_tokens, dtype=xp.int64, device=primitives.device_of(inputs.keys)), rows
        )
        return Eviction(
            kept=xp.asarray(everything, copy=True),
            budget=budget,
            num_tokens=num_tokens,
            importance=None,
            scores=None,
            protected=None,
            graph=None,
            backend=backend,
            state=None if inputs.state is None else _detached(inputs),
        )
    found = policy.assess(inputs)
    if found.head_budgets is None:
        kept = select(found.scores, budget, protected=found.protected, valid=inputs.valid, backend=backend)
    else:
        width = policy.widest_head(budget, num_tokens, kv_heads)
        kept = select_per_head(found.scores, found.head_budgets, width, found.protected, inputs.valid, backend=backend)
    decision = Eviction(
        kept=kept,
        budget=budget,
        num_tokens=num_tokens,
        importance=found.importance,
        scores=found.scores,
        protected=found.protected,
        graph=found.graph,
        backend=backend,
        head_budgets=found.head_budgets,
    )
    if inputs.state is None:
        return decision
    return replace(decision, state={name: decision.apply(sums) for name, sums in _detached(inputs).items()})


def _detached(inputs: LayerInputs, /) -> Mapping[str, Array]:
    """Give the state without the gradients that led to it, which would be kept from step to step, ever more of them."""
    state, detach = inputs.state or {}, inputs.backend.detach
    return state if detach is None else {name: detach(sums) for name, sums in state.items()}


def preference(
    policy: Policy,
    keys: Array,
    /,
    *,
    values: Array | None = None,
    queries: Array | None = None,
    attention: Array | None = None,
    layer: int = 0,
    num_layers: int = 1,
    valid: Array | None = None,
    backend: Backend | str | None = None,
) -> Array | None:
    """Ask a policy how much one layer wants of the common budget.

    With the answers of all layers, `Policy.layer_budgets` gives each layer its budget, and `LayerBudgets` applies them.

    Parameters
    ----------
    policy : Policy
        For example ``CAKE(budget=512)``.
    keys, values, queries, attention, layer, num_layers, valid, backend
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
    >>> from graphkv import CAKE, preference
    >>> rows = np.asarray([[[[0.2, 0.0, 0.8, 0.0], [0.2, 0.3, 0.3, 0.2]]]])
    >>> policy = CAKE(budget=3, window=2, kernel_size=1)
    >>> preference(policy, np.ones((1, 1, 4, 2)), attention=rows).round(4)
    array([0.0452])
    """
    inputs = _inputs(
        policy,
        keys,
        values=values,
        queries=queries,
        attention=attention,
        layer=layer,
        num_layers=num_layers,
        valid=valid,
        state=None,
        unrotated_keys=None,
        tokens_seen=None,
        backend=backend,
    )
    with inputs.backend.guarded(keys):
        return policy.preference(inputs)


def _inputs(
    policy: Policy,
    keys: Array,
    /,
    *,
    values: Array | None,
    queries: Array | None,
    attention: Array | None,
    layer: int,
    num_layers: int,
    valid: Array | None,
    state: Mapping[str, Array] | None,
    unrotated_keys: Array | None,
    tokens_seen: int | None,
    backend: Backend | str | None,
) -> LayerInputs:
    """Check the arguments of `evict` and put them in order."""
    checks.instance("policy", policy, Policy)
    backend = resolve(
        backend,
        keys=keys,
        values=values,
        queries=queries,
        attention=attention,
        valid=valid,
        unrotated_keys=unrotated_keys,
    )
    xp = backend.xp
    batch, kv_heads, num_tokens, head_size = checks.numeric(
        "keys", keys, "(batch, kv_heads, N, D)", ndim=4, backend=backend
    )
    if values is not None:
        shape = checks.numeric("values", values, "(batch, kv_heads, N, Dv)", ndim=4, backend=backend)
        checks.same_leading("values", shape[:3], (batch, kv_heads, num_tokens), "keys")
    for name, array, last, axes in (
        ("queries", queries, head_size, "(batch, query_heads, Q, D)"),
        ("attention", attention, num_tokens, "(batch, query_heads, Q, N)"),
    ):
        if array is not None:
            shape = checks.numeric(name, array, axes, ndim=4, backend=backend)
            checks.grouped_rows(name, shape, axes, batch, kv_heads, num_tokens, last)
    if unrotated_keys is not None:
        shape = checks.numeric("unrotated_keys", unrotated_keys, "(batch, kv_heads, N, D)", ndim=4, backend=backend)
        checks.same_leading("unrotated_keys", shape, (batch, kv_heads, num_tokens, head_size), "keys")
    layer = checks.count("layer", layer)
    num_layers = checks.count("num_layers", num_layers, minimum=1)
    if layer >= num_layers:
        raise ArgumentError(f"layer must be below num_layers={num_layers}; got {layer}")
    rows = (batch, kv_heads, num_tokens)
    valid = _per_head(valid, keys, rows, backend)

    seen = num_tokens if tokens_seen is None else checks.count("tokens_seen", tokens_seen)
    if seen < num_tokens:
        raise ArgumentError(f"tokens_seen must be at least N={num_tokens}; got {seen}")
    budget = checks.count("the layer's budget", policy.layer_budget(seen, layer, num_layers))
    state, num_seen = (None, 0) if state is None else _with_new_tokens(state, rows, backend)
    return LayerInputs(
        keys=primitives.widen(keys, xp=xp),
        values=None if values is None else primitives.widen(values, xp=xp),
        queries=None if queries is None else primitives.widen(queries, xp=xp),
        attention=None if attention is None else primitives.widen(attention, xp=xp),
        valid=valid,
        budget=budget,
        layer=layer,
        num_layers=num_layers,
        backend=backend,
        state=state,
        num_seen=num_seen,
        unrotated_keys=None if unrotated_keys is None else primitives.widen(unrotated_keys, xp=xp),
    )


def _per_head(valid: Array | None, keys: Array, rows: tuple[int, ...], backend: Backend, /) -> Array:
    """Give the mask of padding one row per KV head."""
    xp, (batch, _, num_tokens) = backend.xp, rows
    if valid is None:
        return xp.ones(rows, dtype=xp.bool, device=primitives.device_of(keys))
    if valid.ndim == 2:
        checks.mask("valid", valid, (batch, num_tokens), "(batch, N)", backend=backend)
        return xp.broadcast_to(valid[:, None, :], rows)
    checks.mask("valid", valid, rows, "(batch, kv_heads, N)", backend=backend)
    return valid


def _with_new_tokens(
    state: Mapping[str, Array], rows: tuple[int, ...], backend: Backend, /
) -> tuple[dict[str, Array], int]:
    """Give the tokens that came since the last call a state of zero, and count those that were there before."""
    xp, num_tokens = backend.xp, rows[-1]
    grown: dict[str, Array] = {}
    seen: dict[str, int] = {}
    for name, sums in state.items():
        resolve(backend, **{f"state[{name!r}]": sums})
        shape = tuple(sums.shape)
        if len(shape) < 3 or shape[:2] != rows[:2] or shape[2] > num_tokens:
            raise ArgumentError(f"state[{name!r}] must have shape (batch, kv_heads, S <= N, ...) = {rows}; got {shape}")
        seen[name] = shape[2]
        new = xp.zeros(
            (*rows[:2], num_tokens - shape[2], *shape[3:]), dtype=sums.dtype, device=primitives.device_of(sums)
        )
        grown[name] = xp.concat([sums, new], axis=2)
    if len(set(seen.values())) > 1:
        raise ArgumentError(f"state must hold arrays of one number of tokens S; got {seen}")
    return grown, next(iter(seen.values()), 0)
