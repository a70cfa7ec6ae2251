"""JAX, eagerly and under ``jax.jit``.

Everything that is not an array (counts, budgets, options) must be static under ``jax.jit``; a `Graph` and an `Eviction`
may be arguments and results. Without ``jax_enable_x64`` indices are int32.

Compiled arithmetic flushes subnormal numbers to zero. Scores of that size still keep their order and their bits, but an
edge with a weight below 1.2e-38 has no effect, and keys near 1e-18 lose digits of their lengths. Products are in full
float32 whatever ``jax_default_matmul_precision`` says: on a GPU it means TF32 where it is not set.

Arrays may be spread over several devices. What a call creates is copied to each of them.

Segment products and sums are the portable ones of `graphkv.core.primitives`, compiled: scatters on a GPU combine in an
order that changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import primitives
from ..core.attention import portable_received_attention
from ..core.backend import Backend
from ..core.eviction import Eviction
from ..core.fusion import portable_degree, portable_distance, portable_fuse
from ..core.graph import portable_build_graph
from ..core.layer import Memory
from ..core.merging import Merge
from ..core.pagerank import portable_pagerank
from ..core.propagation import portable_propagate
from ..core.selection import Choice, portable_select
from ..core.types import Array, Graph, Namespace

__all__ = ["BACKEND"]


# Functions that create an array on the device of another, whose sharding need not fit the new shape.
CREATION = ("arange", "asarray", "full", "ones", "zeros")


@cache
def _on_all_devices(create: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function, made to create a copy on each device of an array that is spread over several."""

    def created(*args: Any, device: Any = None, **options: Any) -> Array:
        if isinstance(device, jax.sharding.NamedSharding):
            device = jax.sharding.NamedSharding(device.mesh, jax.sharding.PartitionSpec())
        elif isinstance(device, jax.sharding.Sharding):
            device = None
        elif device == (jax.config.jax_default_device or jax.local_devices()[0]):
            # There anyway, and what is not put there may be moved to the other arrays of a call.
            device = None
        return create(*args, device=device, **options)

    return created


class _Namespace:
    """jax.numpy, in which ``int64`` is the widest enabled integer: asking for a wider one is a warning."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(jnp, name)
        return _on_all_devices(found) if name in CREATION else found

    @property
    def int64(self) -> Any:
        return jax.dtypes.canonicalize_dtype(np.int64)


def top_k(scores: Array, k: int, tiers: Array | None, /, *, backend: Backend) -> Array:
    """Rank tier by tier with lax.top_k, which prefers the lower index among equals and is far faster than a sort."""
    xp, num_tokens = backend.xp, scores.shape[-1]
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32 if scores.dtype == jnp.float32 else jnp.int64)
    if num_tokens >= 2**23:  # the places of `_top_k_by_value` would not be exact in float32
        return _top_k_by_bits(bits, k, tiers, xp=xp)
    # Compiled comparisons may flush subnormal numbers to zero. These are rare: only where there is one, all is sorted.
    size = bits & jnp.iinfo(bits.dtype).max
    is_subnormal = (size > 0) & (size < jax.lax.bitcast_convert_type(jnp.finfo(scores.dtype).tiny, bits.dtype))
    return jax.lax.cond(
        jnp.any(is_subnormal),
        lambda: _top_k_by_bits(bits, k, tiers, xp=xp),
        lambda: _top_k_by_value(scores, bits, k, tiers, xp=xp),
    )


def _top_k_by_bits(bits: Array, k: int, tiers: Array | None, /, *, xp: Namespace) -> Array:
    """Rank by a sort of integers that are in the order of the scores."""
    lowest = jnp.iinfo(bits.dtype).min
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, _float_of(bits)), bits.dtype)
    is_nan = (bits & jnp.iinfo(bits.dtype).max) > infinity
    bits = jnp.where(bits == lowest, jnp.zeros_like(bits), bits)  # -0.0 equals 0.0
    bits = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
    bits = jnp.where(is_nan, jnp.full_like(bits, lowest), bits)
    tiers = jnp.zeros(bits.shape, jnp.int32) if tiers is None else tiers.astype(jnp.int32)
    place = jax.lax.broadcasted_iota(xp.int64, bits.shape, bits.ndim - 1)
    return jax.lax.sort((tiers, ~bits, place), dimension=-1, is_stable=True, num_keys=2)[2][..., :k]


def _float_of(bits: Array, /) -> Any:
    return jnp.float32 if bits.dtype == jnp.int32 else jnp.float64


def _top_k_by_value(scores: Array, bits: Array, k: int, tiers: Array | None, /, *, xp: Namespace) -> Array:
    """Rank by lax.top_k, where no score is subnormal."""
    num_tokens = scores.shape[-1]
    # lax.top_k ranks 0.0 above -0.0.
    scores = jnp.where(bits == jnp.iinfo(bits.dtype).min, jnp.zeros_like(scores), scores)
    # Minus infinity and NaN cannot compete by value: they rank by their place in the row, NaN last.
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
    # Without the checks: jax rebuilds trees with placeholders for the arrays.
    graph = object.__new__(Graph)
    for name, value in zip(("sources", "neighbors", "weights", "num_tokens"), (*arrays, num_tokens), strict=True):
        object.__setattr__(graph, name, value)
    return graph


jax.tree_util.register_pytree_node(Graph, lambda g: ((g.sources, g.neighbors, g.weights), g.num_tokens), _graph_of)
for kind, static in ((Choice, ()), (Merge, ()), (Memory, ()), (Eviction, ("budget", "num_tokens", "backend"))):
    names = [each.name for each in fields(kind) if each.name not in static]
    jax.tree_util.register_dataclass(kind, data_fields=names, meta_fields=list(static))


def guard(array: Array, /) -> AbstractContextManager[Any]:
    """Return a context in which products are in full float32: on a GPU, JAX takes TF32 where nobody asks."""
    full: AbstractContextManager[Any] = jax.default_matmul_precision("highest")
    return full


def _compiled(body: Callable[..., Any], /, **static: Any) -> Any:
    """Compile a portable body, its products in full precision wherever it is called."""

    @wraps(body)
    def precise(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return body(*args, **options)

    return jax.jit(precise, **static)


# One compiled function per step, primitive and shape: a call for each operation would be ten times slower.
build_graph = _compiled(portable_build_graph, static_argnames=("num_sources", "num_neighbors", "chunk_size", "backend"))
propagate = _compiled(portable_propagate, static_argnames=("signal", "rounds", "accumulation", "strength", "backend"))
degree = _compiled(portable_degree, static_argnames="backend")
distance = _compiled(portable_distance, static_argnames="backend")
fuse = _compiled(portable_fuse, static_argnames=("fusion", "exponent", "backend"))
# The damping is traced, because it is only arithmetic: a search over it compiles once.
pagerank = _compiled(portable_pagerank, static_argnames=("rounds", "backend"))
select = _compiled(portable_select, static_argnums=1, static_argnames="backend")
received_attention = _compiled(portable_received_attention, static_argnames=("block_size", "backend"))
segment_product = _compiled(primitives.portable_segment_product, static_argnums=2, static_argnames="backend")
segment_sum = _compiled(primitives.portable_segment_sum, static_argnums=2, static_argnames="backend")


def refuse(array: Array, /) -> str:
    """Return the kind of an array that holds no numbers, or an empty string."""
    return "an array of random keys" if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else ""


def location(array: Array, /) -> str | None:
    """Return where an array was put; None where JAX may move it: under ``jax.jit``, and where it was put nowhere."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "committed", False):
        return None
    return ", ".join(sorted(map(str, array.devices())))


BACKEND = Backend(
    name="jax",
    xp=_Namespace(),
    to_numpy=np.asarray,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
    received_attention=received_attention,
    build_graph=build_graph,
    propagate=propagate,
    degree=degree,
    distance=distance,
    fuse=fuse,
    pagerank=pagerank,
    select=select,
    guard=guard,
    detach=jax.lax.stop_gradient,
    location=location,
    refuse=refuse,
)
