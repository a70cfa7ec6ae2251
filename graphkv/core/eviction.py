"""One call that evicts one layer: policy, graph, propagation and selection together."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError, ArgumentTypeError
from .policy import LayerInputs, Policy
from .selection import select
from .types import Array, Graph

__all__ = ["Eviction", "evict"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Eviction:
    """Which tokens of one layer stay, and why.

    Attributes
    ----------
    kept : array, shape (batch, kv_heads, b), int64
        Positions of the kept tokens, ascending; b = min(budget, N).
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
    """

    kept: Array
    budget: int
    num_tokens: int
    importance: Array | None
    scores: Array | None
    protected: Array | None
    graph: Graph | None
    backend: Backend

    def apply(self, x: Array, /) -> Array:
        """Gather the kept tokens of any per-token array.

        Parameters
        ----------
        x : array, shape (batch, kv_heads, N, ...)
            Keys, values, positions or what else belongs to the tokens; of the same library as `kept`.

        Returns
        -------
        array, shape (batch, kv_heads, b, ...)
            Same dtype as `x`; `x` itself when everything is kept.

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
        if self.kept.shape[-1] == self.num_tokens:
            return x
        return primitives.take_rows(x, self.kept, xp=self.backend.xp)

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
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    Eviction

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
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(f"policy must be a Policy; got {type(policy).__name__}")
    backend = resolve(backend, keys=keys, values=values, queries=queries, attention=attention, valid=valid)
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
    layer = checks.count("layer", layer)
    num_layers = checks.count("num_layers", num_layers, minimum=1)
    if layer >= num_layers:
        raise ArgumentError(f"layer must be below num_layers={num_layers}; got {layer}")
    rows = (batch, kv_heads, num_tokens)
    if valid is None:
        valid = xp.ones(rows, dtype=xp.bool, device=primitives.device_of(keys))
    elif valid.ndim == 2:
        checks.mask("valid", valid, (batch, num_tokens), "(batch, N)", backend=backend)
        valid = xp.broadcast_to(valid[:, None, :], rows)
    else:
        checks.mask("valid", valid, rows, "(batch, kv_heads, N)", backend=backend)

    budget = checks.count("the layer's budget", policy.layer_budget(num_tokens, layer, num_layers))
    if num_tokens <= budget:
        position = xp.arange(num_tokens, dtype=xp.int64, device=primitives.device_of(keys))
        return Eviction(
            kept=xp.broadcast_to(position, rows),
            budget=budget,
            num_tokens=num_tokens,
            importance=None,
            scores=None,
            protected=None,
            graph=None,
            backend=backend,
        )
    inputs = LayerInputs(
        keys=primitives.widen(keys, xp=xp),
        values=None if values is None else primitives.widen(values, xp=xp),
        queries=None if queries is None else primitives.widen(queries, xp=xp),
        attention=None if attention is None else primitives.widen(attention, xp=xp),
        valid=valid,
        budget=budget,
        layer=layer,
        num_layers=num_layers,
        backend=backend,
    )
    found = policy.assess(inputs)
    return Eviction(
        kept=select(found.scores, budget, protected=found.protected, valid=valid, backend=backend),
        budget=budget,
        num_tokens=num_tokens,
        importance=found.importance,
        scores=found.scores,
        protected=found.protected,
        graph=found.graph,
        backend=backend,
    )
