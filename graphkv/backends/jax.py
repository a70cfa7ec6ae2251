"""JAX, eagerly and under ``jax.jit``.

Everything that is no array (counts, budgets, options) must be static under ``jax.jit``; a `Graph` and an `Eviction` may
go in and out. Without ``jax_enable_x64`` indices are int32.

Segment products and sums stay the portable ones of `graphkv.core.primitives`: scatters on a GPU combine in an order
that changes from run to run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import primitives
from ..core.backend import Backend
from ..core.eviction import Eviction
from ..core.fusion import _degree, _fuse
from ..core.graph import _build_graph
from ..core.pagerank import _pagerank
from ..core.propagation import _propagate
from ..core.selection import _select
from ..core.types import Array, Graph, Namespace

__all__ = ["BACKEND"]


class _Namespace:
    """jax.numpy, in which ``int64`` is the widest integer that is switched on: asking for more is a warning."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @property
    def int64(self) -> Any:
        return jax.dtypes.canonicalize_dtype(np.int64)


def top_k(scores: Array, k: int, /, tiers: Array | None = None, *, xp: Namespace) -> Array:
    """Rank tier by tier with lax.top_k, which takes the lower index among equals and is far faster than a sort."""
    num_tokens = scores.shape[-1]
    if num_tokens >= 2**23:  # the places below would not be exact in float32
        return primitives.top_k(scores, k, tiers, xp=xp)
    # lax.top_k ranks 0.0 above -0.0. By bits, because arithmetic may take a subnormal number for zero.
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32 if scores.dtype == jnp.float32 else jnp.int64)
    scores = jnp.where(bits == jnp.iinfo(bits.dtype).min, jnp.zeros_like(scores), scores)
    # Minus infinity and NaN cannot compete by value: they go by their place in the row, the NaN behind.
    place = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.float32), scores.shape)
    place = jnp.where(jnp.isnan(scores), place + num_tokens, place)
    if tiers is None:
        members = [jnp.ones(scores.shape, dtype=bool)]
    elif tiers.dtype == bool:
        members = [~tiers, tiers]
    else:
        members = [tiers == tier for tier in range(4)]

    slot = jnp.broadcast_to(jnp.arange(k, dtype=xp.int64), (*scores.shape[:-1], k))
    result, first = jnp.zeros_like(slot), jnp.zeros_like(slot[..., :1])
    for member in members:
        by_value = member & (scores > -jnp.inf)
        for among, key in ((by_value, scores), (member & ~by_value, -place)):
            _, found = jax.lax.top_k(jnp.where(among, key, -jnp.inf), k)
            count = jnp.sum(among, axis=-1, keepdims=True, dtype=xp.int64)
            own = jnp.minimum(jnp.maximum(slot - first, 0), k - 1)
            here = (slot >= first) & (slot < first + count)
            result = jnp.where(here, jnp.take_along_axis(found.astype(xp.int64), own, axis=-1), result)
            first = first + count
    return result


def _graph_of(num_tokens: int, arrays: tuple[Any, ...]) -> Graph:
    # Without the checks: jax rebuilds trees with stand-ins for the arrays.
    graph = object.__new__(Graph)
    for name, value in zip(("sources", "neighbors", "weights", "num_tokens"), (*arrays, num_tokens), strict=True):
        object.__setattr__(graph, name, value)
    return graph


jax.tree_util.register_pytree_node(Graph, lambda g: ((g.sources, g.neighbors, g.weights), g.num_tokens), _graph_of)
jax.tree_util.register_dataclass(
    Eviction,
    data_fields=["kept", "importance", "scores", "protected", "graph", "head_budgets", "state"],
    meta_fields=["budget", "num_tokens", "backend"],
)

# One compiled function per step and shape: a call for each operation would be ten times slower.
build_graph = jax.jit(_build_graph, static_argnames=("num_sources", "num_neighbors", "chunk_size", "backend"))
propagate = jax.jit(_propagate, static_argnames=("signal", "rounds", "accumulation", "strength", "backend"))
degree = jax.jit(_degree, static_argnames="backend")
fuse = jax.jit(_fuse, static_argnames=("fusion", "exponent", "backend"))
# A tracer for the damping, which is only arithmetic: a search over it compiles once.
pagerank = jax.jit(_pagerank, static_argnames=("rounds", "backend"))
select = jax.jit(_select, static_argnums=1, static_argnames="backend")

BACKEND = Backend(
    name="jax",
    xp=_Namespace(),
    to_numpy=np.asarray,
    top_k=top_k,
    build_graph=build_graph,
    propagate=propagate,
    degree=degree,
    fuse=fuse,
    pagerank=pagerank,
    select=select,
)
