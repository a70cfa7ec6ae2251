"""Backends that are wrong on purpose, one mistake each; `test_kit` proves that the kit sees every one.

The steps are written once more here, plainly and in NumPy, with the places where a porter may slip marked by the
name of the slip. Without a fault they are right, which `test_kit` proves too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import array_api_strict
import numpy as np

from graphkv import Backend, Graph
from graphkv.core import primitives
from graphkv.core.attention import portable_received_attention
from graphkv.core.backend import load
from graphkv.core.fusion import portable_degree, portable_distance, portable_fuse
from graphkv.core.pagerank import portable_pagerank
from graphkv.core.propagation import portable_propagate
from graphkv.core.selection import portable_select
from graphkv.testing import Subject
from graphkv.testing.subject import OPTIONAL
from tests.support import strict
from tests.support.subjects import NUMPY, fields_of

TORCH = load("torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A wrong backend, the right one that it was made from, and the property that must fail."""

    name: str
    wrong: Backend
    right: Backend
    caught_by: str
    error: type[Exception] | tuple[type[Exception], ...] = AssertionError


# ---------------------------------------------------------------------------------------------------------- primitives


def top_k(scores, k, tiers, /, *, backend, fault=""):
    score = np.where(np.isnan(scores), 0, scores)
    is_nan = np.isnan(scores).astype(int)
    index = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    tier = np.zeros(scores.shape, int) if tiers is None or fault == "tiers ignored" else tiers
    if fault == "unstable":
        index = -index
    if fault == "NaN first":
        is_nan = -is_nan
    if fault == "NaN as a number":
        is_nan = 0 * is_nan
    if fault == "-0.0 below 0.0":
        index = index + 100 * (np.signbit(score) & (score == 0))
    if fault == "lowest first":
        score = -score
    if fault == "wrong axis" and score.ndim > 1:
        return np.argsort(-score, axis=0, kind="stable")[..., :k]
    order = np.lexsort((index, -score, is_nan, tier), axis=-1)[..., :k]
    if fault == "ascending positions":
        order = np.sort(order, axis=-1)
    return order.astype(np.int32 if fault == "32-bit indices" else np.int64)


def segment(values, index, num_segments, /, *, backend, ufunc, fault=""):
    identity = {np.multiply: 1, np.add: 0}[ufunc]
    if fault == "empty segments are 0":
        identity = 0
    result = np.full((*values.shape[:-1], num_segments), identity, dtype=values.dtype)
    for *row, e in np.ndindex(*values.shape):
        if fault == "last edge lost" and e == values.shape[-1] - 1:
            continue
        of = [0 for _ in row] if fault == "rows share segments" else row
        at = (*of, index[(*row, e)])
        first = fault == "empty segments are 0" and result[at] == 0
        result[at] = values[(*row, e)] if fault == "last write wins" or first else ufunc(result[at], values[(*row, e)])
    return result


def sum_rows(rows, into, num_slots, /, *, backend, fault=""):
    total = np.zeros((*into.shape[:-1], num_slots, rows.shape[-1]), rows.dtype)
    count = np.zeros((*total.shape[:-1], 1), rows.dtype)
    for *row, j in np.ndindex(*into.shape):
        slot = into[(*row, j)]
        if fault == "nowhere is the first slot":
            slot = max(slot, 0)
        if fault == "last row lost" and j == into.shape[-1] - 1:
            continue
        if slot < 0 and fault != "nowhere is the last slot":
            continue
        at = (*(0 for _ in row), slot) if fault == "heads share slots" else (*row, slot)
        total[at] = rows[(*row, j)] if fault == "last row wins" else total[at] + rows[(*row, j)]
        count[at] += 1
    if fault == "a mean for a sum":
        total = total / np.maximum(count, 1)
    if fault == "slots without rows are NaN":
        total = np.where(count > 0, total, np.asarray(np.nan, total.dtype))
    return total


def received_attention(queries, keys, valid, /, *, block_size, backend, fault=""):
    groups = queries.shape[1] // keys.shape[1]
    total = np.zeros((*keys.shape[:2], groups, keys.shape[2]), keys.dtype)
    valid_queries, valid = valid, valid & np.all(np.isfinite(keys), axis=-1)
    num_queries, num_tokens = queries.shape[2], keys.shape[2]
    for b, h, i in np.ndindex(*queries.shape[:3]):
        kv_head = h % keys.shape[1] if fault == "heads dealt out in turns" else h // groups
        position = num_tokens - num_queries + i
        sees = valid[b, kv_head].copy()
        if fault != "looks ahead":
            sees[position + 1 :] = False
        if fault == "starts at the first position":
            sees[i + 1 :] = False
        if fault != "padding asks" and not valid_queries[b, kv_head, position]:
            continue
        if not np.all(np.isfinite(queries[b, h, i])):
            continue
        if not sees.any():
            continue
        scale = 1 if fault == "not scaled" else np.sqrt(keys.shape[-1])
        logits = np.where(sees, np.nan_to_num(keys[b, kv_head]) @ queries[b, h, i] / scale, -np.inf)
        weight = np.exp(logits - logits.max())
        total[b, kv_head, h % groups] += weight / weight.sum()
    return total


# --------------------------------------------------------------------------------------------------------------- steps


def build_graph(  # noqa: PLR0912 - a branch per fault
    keys, importance, valid, /, *, num_sources, num_neighbors, chunk_size, backend, fault=""
):
    tier = np.zeros(valid.shape, int) if fault == "padding is a source" else (~valid).astype(int)
    sources = top_k(importance, num_sources, tier, backend=backend)
    if fault != "sources unsorted":
        sources = np.sort(sources, axis=-1)
    length = np.sqrt(np.sum(keys * keys, axis=-1, keepdims=True))
    usable = (length > 0) & np.isfinite(length)
    if fault == "zero key is NaN":
        usable = length >= 0
    with np.errstate(all="ignore"):
        directions = np.where(usable, keys / np.where(usable, length, 1), 0).astype(keys.dtype)
        if fault == "dot product for cosine":
            directions = keys
        leading, num_tokens = importance.shape[:-1], importance.shape[-1]
        shape = (*leading, num_sources, num_neighbors)
        neighbors, weights = np.zeros(shape, np.int64), np.zeros(shape, keys.dtype)
        for *leading_index, k in np.ndindex(*shape[:-1]):
            row = tuple(leading_index)
            source = sources[(*row, k)]
            cosine = directions[row] @ directions[(*row, source)]
            edge = np.clip(np.abs(cosine) if fault == "negative cosine kept" else cosine, 0, 1)
            excluded = ~valid[row].copy()
            if fault == "padding scored":
                excluded[:] = False
            if fault == "self edge":
                excluded[[j for j in sources[row] if j != source]] = True
            elif fault != "decayed sources":
                excluded[sources[row]] = True
            if fault == "chunk boundary lost":
                excluded[chunk_size - 1 :: chunk_size] = True
            edge = np.where(excluded, 0, edge)
            index = np.arange(num_tokens)
            if fault == "later neighbor first":
                index = -index
            if fault == "least similar":
                best = np.lexsort((index, edge, excluded))[:num_neighbors]
            else:
                best = np.lexsort((index, -edge, excluded))[:num_neighbors]
            neighbors[(*row, k)], weights[(*row, k)] = best, edge[best]
    if fault == "neighbor off by one":
        neighbors = (neighbors + 1) % max(num_tokens, 1)
    if fault == "weights in half precision":
        weights = weights.astype(np.float16)
    if fault == "one source too few" and num_sources > 1:
        weights[..., -1, :] = 0
    return Graph(sources=sources, neighbors=neighbors, weights=weights, num_tokens=num_tokens)


def propagate(importance, graph, /, *, signal, rounds, accumulation, strength, backend, fault=""):
    with np.errstate(all="ignore"):
        weights = np.clip(np.nan_to_num(graph.weights, nan=0.0), 0, 1)
        if fault == "weights not clipped":
            weights = np.nan_to_num(graph.weights, nan=0.0, posinf=2, neginf=-2)
        if fault == "strength ignored":
            strength = 1.0
        rounds = {"rounds ignored": 1, "one round too many": rounds + 1}.get(fault, rounds)
        accumulation = {"product for sum": "product", "sum for product": "sum"}.get(fault, accumulation)
        factor = np.ones(importance.shape, np.result_type(importance, weights))
        reached = np.zeros(importance.shape, bool)
        sign = +1 if signal == "enhance" else -1
        smallest = {"no smallest factor": 0.0, "smallest factor 1e-3": 1e-3}.get(fault, 1e-6)
        for *row, k, m in np.ndindex(*weights.shape):
            at, w = (*row, graph.neighbors[(*row, k, m)]), weights[(*row, k, m)]
            reached[at] |= bool(w >= 0 if fault == ">= for > 0" else w > 0)
            step = 1 + sign * strength * w
            if accumulation == "sum":
                factor[at] += step - 1
            elif fault == "strongest source only":
                factor[at] = max(smallest, min(factor[at], step) if sign < 0 else max(factor[at], step))
            else:
                factor[at] *= max(step, smallest)
        if signal == "evict":
            if fault == "evict by zero":
                return np.where(reached, 0, importance).astype(importance.dtype)
            return np.where(reached, -np.inf, importance).astype(importance.dtype)
        power = factor**rounds
        score = importance.astype(power.dtype)
        below = score * power if fault == "sign flipped" else score - np.abs(score) * (1 - power)
        above = score - score * (1 - power) if fault == "computed as a difference" else score * power
        result = np.where(score >= 0, above, below)
        if fault != "infinities multiplied":
            result = np.where((score == 0) | np.isinf(score), score, result)
        if fault == "normalised":
            result = result / np.maximum(1, np.max(np.abs(result), axis=-1, keepdims=True))
        if fault == "input mutated":
            importance[...] = result
        return result.astype(np.float16 if fault == "scores narrowed" else power.dtype)


def degree(keys, valid, /, *, backend, fault=""):
    length = np.sqrt(np.sum(keys * keys, axis=-1, keepdims=True))
    usable = np.isfinite(length) & ((length > 0) | (fault == "zero key is NaN"))
    counted = np.ones_like(valid) if fault == "padding in the mean" else valid
    with np.errstate(all="ignore"):
        directions = np.where(usable, keys / length, 0).astype(keys.dtype)
        if fault == "dot product for cosine":
            directions = np.where(np.isfinite(keys), keys, 0)
        number = np.sum(counted, axis=-1, keepdims=True)
        if fault == "padding counted":
            number = np.full_like(number, valid.shape[-1])
        mean = np.sum(directions * counted[..., None], axis=-2) / np.maximum(number, 1)
        if fault == "a sum for a mean":
            mean = mean * number
        if fault == "cosine with the mean":
            mean = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        if fault == "mean over the rows":
            mean = np.broadcast_to(np.mean(mean, axis=0), mean.shape) if mean.ndim > 1 and len(mean) else mean
        result = np.sum(directions * mean[..., None, :], axis=-1)
        if fault == "others only":
            result = (result * number - 1) / np.maximum(number - 1, 1)
        if fault == "in half precision":
            result = result.astype(np.float16)
        if fault != "not clipped":
            result = np.clip(result, -1, 1)
        if fault == "not clipped":
            result = result * (1 + 1e-3)
    if fault != "padding has a degree":
        result = np.where(valid, result, 0)
    return result.astype(keys.dtype)


def rank(values, valid, fault):
    tiers = ~valid if fault != "padding ranked" else np.zeros(valid.shape, int)
    order = top_k(values, values.shape[-1], tiers, backend=NUMPY)
    place = np.argsort(order, axis=-1)
    if fault == "later of equals first":
        place = np.argsort(np.lexsort((-np.arange(values.shape[-1]) + 0 * place, -values, ~valid), axis=-1), axis=-1)
    if fault == "equals share a rank":
        place = np.sum((values[..., None, :] > values[..., None]) & valid[..., None, :], axis=-1)
    return (place + 1 if fault == "descending ranks" else np.sum(valid, axis=-1, keepdims=True) - place).astype(float)


def fuse(importance, distance, valid, /, *, fusion, exponent, backend, fault=""):
    dtype = np.result_type(importance, distance)
    score, distance = importance.astype(dtype), distance.astype(dtype)
    if fault == "degree for distance":
        distance = 2 - distance
    with np.errstate(all="ignore"):
        if fusion == "power":
            number = ~np.isnan(score) & (valid | (fault == "padding in the minimum"))
            if fault != "infinities in the minimum":
                number &= np.isfinite(score)
            lowest = np.min(np.where(number, score, 0), axis=-1, keepdims=True, initial=0)
            if fault == "least of all is 0":
                lowest = np.min(np.where(number, score, np.inf), axis=-1, keepdims=True, initial=np.inf)
            if fault == "negative scores multiplied":
                lowest = 0 * lowest
            exponent = {"exponent ignored": 1, "one factor too many": exponent + 1}.get(fault, exponent)
            power = distance**exponent
            if fault != "no smallest power":
                power = np.maximum(power, 1e-24)
            if fault != "no largest power":
                power = np.minimum(power, 1e24)
            fused = (score - lowest) * power
        else:
            ranks = rank(score, valid, fault), rank(distance, valid, fault)
            lower = fusion == "max_rank" and fault == "lower rank"
            fused = np.minimum(*ranks) if lower else np.maximum(*ranks)
            if fusion == "mean_rank":
                fused = (ranks[0] + ranks[1]) / (1 if fault == "sum of ranks" else 2)
                if fault == "mean rounded":
                    fused = np.floor(fused)
    result = fused if fault == "padding scored" else np.where(valid, fused, score)
    return result.astype(dtype)


def pagerank(importance, keys, valid, /, *, damping, rounds, backend, fault=""):
    dtype = np.result_type(importance, keys)
    score = importance.astype(dtype)
    takes_part = np.isfinite(score) & (valid | (fault == "padding takes part"))
    length = np.sqrt(np.sum(keys * keys, axis=-1, keepdims=True))
    usable = (length > 0) & np.isfinite(length)
    with np.errstate(all="ignore"):
        directions = np.where(usable, keys / length, 0).astype(dtype)
        if fault == "dot product for cosine":
            directions = np.where(np.isfinite(keys), keys, 0)
    cosines = directions @ np.swapaxes(directions, -1, -2)
    near = np.maximum(cosines, 0) if fault == "negative cosines clipped" else (1 + cosines) / 2
    if fault == "no loops":
        near = near * (1 - np.eye(keys.shape[-2]))
    near = near * (takes_part[..., None] & takes_part[..., None, :])
    number = np.where(takes_part, score, 0)
    lowest = np.min(number, axis=-1, keepdims=True, initial=0)
    if fault == "least of all is 0":
        lowest = np.min(np.where(takes_part, score, np.inf), axis=-1, keepdims=True, initial=np.inf)
        lowest = np.where(np.isfinite(lowest), lowest, 0)
    shifted = np.where(takes_part, score - (0 if fault == "not shifted" else lowest), 0)
    size = np.sum(shifted, axis=-1, keepdims=True)
    flat = size == 0
    teleport = np.where(flat & (fault != "flat is nothing"), takes_part, shifted)

    def scaled(x):
        total = np.sum(x, axis=-1, keepdims=True)
        return x / np.where(total == 0, 1, total)

    teleport = scaled(teleport)
    central = teleport
    rounds = {"one round too many": rounds + 1, "one round too few": rounds - 1}.get(fault, rounds)
    damping = 1 - damping if fault == "damping upside down" else damping
    for _ in range(rounds):
        flow = np.sum(near * central[..., None, :], axis=-1)
        flow = flow if fault == "flow not scaled" else scaled(flow)
        central = damping * flow + (0 if fault == "no teleport" else 1 - damping) * teleport
    ranked = central if fault == "size lost" else central * np.where(flat, 1, size)
    if fault == "in half precision":
        ranked = ranked.astype(np.float16)
    kept = takes_part if fault == "padding takes part" else takes_part & valid
    return np.where(kept, ranked, 0 if fault == "padding is 0" else score).astype(dtype)


def select(scores, budget, protected, valid, /, *, backend, fault=""):
    valid = np.ones(scores.shape, bool) if valid is None or fault == "padding kept" else valid
    protected = np.zeros(scores.shape, bool) if protected is None or fault == "protection ignored" else protected
    if fault == "protection by a sentinel score":
        scores, protected = np.where(protected & valid, np.float32(10), scores), np.zeros_like(protected)
    tier = np.where(protected, 0, 1) if fault == "padding protected" else np.where(protected & valid, 0, 1)
    tier = np.where(valid | (protected & (fault == "padding protected")), tier, 2)
    if fault == "one too few":
        budget = max(budget - 1, 0)
    order = top_k(scores, scores.shape[-1], tier, backend=backend)
    kept = order[..., :budget]
    if fault == ">= at the cut" and 0 < budget <= scores.shape[-1]:
        # A threshold, then the first that reach it: a tie at the cut displaces a better token behind it.
        last = order[..., budget - 1 : budget]
        cut, cut_tier = np.take_along_axis(scores, last, -1), np.take_along_axis(tier, last, -1)
        reaches = (tier < cut_tier) | ((tier == cut_tier) & (scores >= cut))
        kept = np.argsort(~reaches, axis=-1, kind="stable")[..., :budget]
    return kept if fault == "by rank" else np.sort(kept, axis=-1)


# ------------------------------------------------------------------------------------------------------ other libraries


def synchronising(scores, budget, protected, valid, /, *, backend):
    """Reads the largest score on the host, as a way of protecting tokens."""
    highest = float(scores.max()) if scores.numel() else 0.0
    if protected is not None:
        scores = scores.masked_fill(protected, highest + 1)
    return backend.xp.sort(primitives.portable_top_k(scores, budget, None, backend=backend), axis=-1)


def without_device(scores, budget, protected, valid, /, *, backend):
    """Makes its tiers wherever the library makes arrays by default."""
    xp = backend.xp
    tiers = xp.ones(scores.shape, dtype=xp.int32)
    return xp.sort(primitives.portable_top_k(scores, budget, tiers, backend=backend), axis=-1)


def elsewhere(importance, graph, /, *, signal, rounds, accumulation, strength, backend):
    """Right values, on the wrong device."""
    return array_api_strict.asarray(importance, copy=True).to_device(array_api_strict.Device("CPU_DEVICE"))


def by_numpy(scores, budget, protected, valid, /, *, backend):
    """Return an array of another library."""
    return select(
        scores.numpy(),
        budget,
        None if protected is None else protected.numpy(),
        None if valid is None else valid.numpy(),
        backend=backend,
    )


def unordered_top_k(scores, k, tiers, /, *, backend):
    """torch.topk as it is: any order among equal scores."""
    finite = TORCH.xp.nan_to_num(scores, nan=-3.0e38)
    return finite.topk(k).indices


def never_widens() -> Any:
    """NumPy, where `astype` to float32 gives back what came."""
    namespace = ModuleType("never_widens")

    def astype(x, dtype, /, **options):
        return x if x.dtype == np.float16 else NUMPY.xp.astype(x, dtype, **options)

    vars(namespace).update({name: getattr(NUMPY.xp, name) for name in dir(NUMPY.xp)} | {"astype": astype})
    return namespace


# ------------------------------------------------------------------------------------- at size, in precision, in memory

# The right forms, each to be spoiled by a wrapper below: of kernels, the mistakes are in what stands around the loop.
RIGHT: dict[str, Callable[..., Any]] = {
    "top_k": NUMPY.top_k,
    "segment_product": NUMPY.segment_product,
    "segment_sum": NUMPY.segment_sum,
    "sum_rows": NUMPY.sum_rows,
    "received_attention": portable_received_attention,
    "build_graph": NUMPY.build_graph,
    "propagate": portable_propagate,
    "degree": portable_degree,
    "distance": portable_distance,
    "fuse": portable_fuse,
    "pagerank": portable_pagerank,
    "select": portable_select,
}


def is_float(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def each_array(change, x):
    """Change an array, or every array of a Graph."""
    if isinstance(x, Graph):
        fields = {name: change(getattr(x, name)) for name in ("sources", "neighbors", "weights")}
        return Graph(**fields, num_tokens=x.num_tokens)
    return change(x) if isinstance(x, np.ndarray) else x


def on_inputs(change):
    """Spoil a step by what it reads."""
    return lambda step: lambda *args, **options: step(*(each_array(change, x) for x in args), **options)


def on_result(change):
    """Spoil a step by what it gives."""
    return lambda step: lambda *args, **options: each_array(change, step(*args, **options))


def rounded(bits):
    """Keep so many bits of a float, as products in TF32 (10) and bfloat16 (7) do."""

    def change(x):
        if not is_float(x):
            return x
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent).astype(x.dtype)

    return change


def in_float32(step):
    """Compute float64 in float32, and give it as float64 again."""

    def wrong(*args, **options):
        wide = any(
            (is_float(x) and x.dtype == np.float64) or (isinstance(x, Graph) and x.weights.dtype == np.float64)
            for x in args
        )
        narrow = [each_array(lambda a: a.astype(np.float32) if is_float(a) else a, x) for x in args]
        result = step(*narrow, **options)
        return each_array(lambda a: a.astype(np.float64) if wide and is_float(a) else a, result)

    return wrong


def flushed(x):
    """Take subnormal numbers for zero."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.zeros_like(x), x) if is_float(x) else x


def rows_beyond(most):
    """A grid of so many rows: the others hold what the first row holds."""

    def change(x):
        if x.ndim < 2 or x.shape[0] <= most:
            return x
        x = x.copy()
        x[most:] = x[0]
        return x

    return on_result(change)


def third_axis_lost(step):
    """Two leading axes: of three, the first is taken for 1."""

    def change(x):
        if x.ndim < 4 or x.shape[0] < 2:
            return x
        x = x.copy()
        x[1:] = x[:1]
        return x

    return on_result(change)(step)


def one_buffer(step):
    """One output for all calls of a shape."""
    buffers: dict[Any, Any] = {}

    def change(x):
        buffer = buffers.setdefault((x.shape, x.dtype), np.empty_like(x))
        buffer[...] = x
        return buffer

    return on_result(change)(step)


def shared_scratch(step):
    """Scratch memory that all threads share: whoever comes between finds his input replaced."""
    scratch: dict[Any, Any] = {}

    def change(x):
        if not is_float(x):
            return x
        buffer = scratch.setdefault((x.shape, x.dtype), np.empty_like(x))
        buffer[...] = x
        time.sleep(1e-4)
        return buffer.copy()

    return on_inputs(change)(step)


def remembered(step):
    """Remember results by the identity of the first array."""
    memory: dict[Any, Any] = {}

    def wrong(first, *args, **options):
        key = (id(first), first.shape, tuple(x for x in args if isinstance(x, int)), tuple(sorted(map(str, options))))
        key += tuple(str(options.get(name)) for name in ("signal", "accumulation", "fusion", "num_sources"))
        if key not in memory:
            memory[key] = (first, step(first, *args, **options))
        return memory[key][1]

    return wrong


def as_stored(x):
    """Read the memory as if it were dense and in order, whatever the strides say."""
    base = x.base if isinstance(x.base, np.ndarray) and x.base.dtype == x.dtype else None
    if base is None or x.flags.c_contiguous or not x.size:
        return x
    return np.resize(base.ravel(order="K"), x.shape)


def in_place(step):
    """Use the inputs as scratch memory, and put them back."""

    def wrong(first, *args, **options):
        if first.size:
            before = first.copy()
            first[...] = 0
            first[...] = before
        return step(first, *args, **options)

    return wrong


def with_errors(step):
    """Let NumPy warn of overflow, in spite of the guard."""

    def wrong(*args, **options):
        with np.errstate(all="warn"):
            return step(*args, **options)

    return wrong


# Mistakes of one primitive or step each.


def wrapping_index(step):
    return on_result(lambda x: x & 0xFFFF)(step)


def unsorted_beyond(most):
    def spoil(step):
        def wrong(scores, k, *args, **options):
            found = step(scores, k, *args, **options)
            if k <= most:
                return found
            return np.concatenate([found[..., :most], found[..., most:][..., ::-1]], axis=-1)

        return wrong

    return spoil


def nan_as(value):
    """Rank NaN as a number."""
    return on_inputs(lambda x: np.where(np.isnan(x), np.asarray(value, x.dtype), x) if is_float(x) else x)


def negative_nan_first(step):
    """Ranks by bits, in which a NaN of negative sign is the least, or the first of all."""

    def wrong(scores, k, tiers, /, *, backend):
        odd = np.isnan(scores) & np.signbit(scores)
        return step(np.where(odd, np.asarray(np.inf, scores.dtype), scores), k, tiers, backend=backend)

    return wrong


def padded_by_minus_infinity(step):
    """Fills rows up to a multiple of 8 with minus infinity, and finds the filling before NaN."""

    def wrong(scores, k, tiers, /, *, backend):
        num = -scores.shape[-1] % 8
        wider = [(0, 0)] * (scores.ndim - 1) + [(0, num)]
        padded = np.pad(scores, wider, constant_values=-np.inf)
        more = None if tiers is None else np.pad(tiers, wider, constant_values=tiers.dtype.type(1))
        return step(padded, k, more, backend=backend)

    return wrong


def nan_index_out_of_range(step):
    def wrong(scores, k, tiers, /, *, backend):
        found = step(scores, k, tiers, backend=backend)
        return np.where(np.isnan(np.take_along_axis(scores, found, axis=-1)), found + scores.shape[-1], found)

    return wrong


def tiers_of_two_bits_as_one(step):
    return lambda scores, k, tiers, /, **options: step(scores, k, None if tiers is None else tiers > 0, **options)


def number_before(index):
    """Count, for each value, those of its segment before it."""
    order = np.argsort(index, axis=-1, kind="stable")
    ordered = np.take_along_axis(index, order, axis=-1)
    place = np.broadcast_to(np.arange(index.shape[-1]), index.shape)
    is_first = np.diff(ordered, axis=-1, prepend=-2) != 0
    first = np.maximum.accumulate(np.where(is_first, place, 0), axis=-1)
    before = np.empty_like(place)
    np.put_along_axis(before, order, place - first, axis=-1)
    return before


def segments_of(most):
    """Room for so many values a segment."""

    def spoil(step):
        def wrong(values, index, num_segments, /, *, backend):
            neutral = 1 if step is RIGHT["segment_product"] else 0
            some = np.where(number_before(index) < most, values, np.asarray(neutral, values.dtype))
            return step(some, index, num_segments, backend=backend)

        return wrong

    return spoil


def into_as(change):
    """Spoil where rows go."""
    return lambda step: lambda rows, into, *args, **options: step(rows, change(into), *args, **options)


def slots_of(most):
    """Room for so many rows a slot."""
    return into_as(lambda into: np.where(number_before(into) < most, into, -1))


def last_run(into):
    """Take slots for sorted: only the last run of equal ones is added."""
    if not into.size:
        return into
    run = np.cumsum(np.diff(into, axis=-1, prepend=into[..., :1]) != 0, axis=-1)
    same = into[..., None] == into[..., None, :]
    return np.where(run == np.max(np.where(same, run[..., None, :], 0), axis=-1), into, -1)


def running_sum(step):
    """Sums as differences of one sum over all rows in the order of their slots."""

    def wrong(rows, into, num_slots, /, *, backend):
        order = np.argsort(into, axis=-1, kind="stable")
        sums = np.cumsum(np.take_along_axis(rows, order[..., None], axis=-2), axis=-2, dtype=rows.dtype)
        sums = np.concatenate([np.zeros_like(sums[..., :1, :]), sums], axis=-2)
        below = np.sum(into[..., None, :] < np.arange(num_slots + 1)[:, None], axis=-1)
        return np.diff(np.take_along_axis(sums, below[..., None], axis=-2), axis=-2)

    return wrong


def nowhere_times_zero(step):
    """What goes nowhere goes into the first slot, times 0."""

    def wrong(rows, into, num_slots, /, *, backend):
        with np.errstate(all="ignore"):
            rows = rows * (into >= 0)[..., None].astype(rows.dtype)
        return step(rows, np.maximum(into, 0), num_slots, backend=backend)

    return wrong


def entries_of_the_result(most):
    """So many entries of every row of the result; the others are 0."""
    return on_result(lambda x: np.where(np.arange(x.shape[-1]) < most, x, np.zeros_like(x)))


def edges_up_to(most):
    """So many values in all; the others are lost."""
    return lambda step: lambda values, index, n, /, **options: step(values[..., :most], index[..., :most], n, **options)


def logarithms(step):
    """A product as the exponential of a sum of logarithms."""

    def wrong(values, index, num_segments, /, *, backend):
        with np.errstate(all="ignore"):
            logs = np.log(np.abs(values)).astype(values.dtype)
        result = np.exp(RIGHT["segment_sum"](logs, index, num_segments, backend=backend))
        odd = RIGHT["segment_sum"]((values < 0).astype(values.dtype), index, num_segments, backend=backend) % 2
        return np.where(odd == 1, -result, result).astype(values.dtype)

    return wrong


def index_as_int64(step):
    """Reads the memory of an index as 64 bits, whatever its dtype."""

    def wrong(values, index, num_segments, /, *, backend):
        if index.dtype != np.int64 and index.shape[-1] % 2 == 0 and index.flags.c_contiguous:
            index = np.repeat(index.view(np.int64) % num_segments, 2, axis=-1)
        return step(values, index, num_segments, backend=backend)

    return wrong


def attention(fault):
    """The received attention at once, with a mistake."""

    def wrong(queries, keys, valid, /, *, block_size, backend):
        batch, query_heads, num_queries, head_size = queries.shape
        kv_heads, num_tokens = keys.shape[1:3]
        groups = query_heads // kv_heads
        if fault == "two groups at most" and groups > 2:
            queries = queries.reshape(batch, kv_heads, groups, num_queries, head_size).copy()
            queries[:, :, 2:] = queries[:, :, :1]
            queries = queries.reshape(batch, query_heads, num_queries, head_size)
        if fault == "last block lost" and num_queries % block_size and num_queries > block_size:
            num_queries -= num_queries % block_size
        if fault == "entries beyond the 64th ignored":
            queries, keys = queries[..., :64], keys[..., :64]
        position = np.arange(num_tokens - queries.shape[2], num_tokens)[:num_queries, None]
        q = queries[:, :, :num_queries].reshape(batch, kv_heads, groups, num_queries, -1)
        asks = np.take(valid, position[:, 0], axis=-1)[:, :, None, :, None]
        if fault != "infinite keys count":
            valid = valid & np.all(np.isfinite(keys), axis=-1)
        if fault != "infinite queries ask":
            asks = asks & np.all(np.isfinite(q), axis=-1)[..., None]
            q = np.where(np.isfinite(q), q, 0)
        seen = np.where(valid[..., None], keys, 0)
        scale = {"scale of heads of 3": 3, "scale of heads of 64": 64}.get(fault, head_size)
        logits = q @ np.swapaxes(seen, -1, -2)[:, :, None] / np.asarray(np.sqrt(scale), keys.dtype)
        sees = (np.arange(num_tokens) <= position) & valid[:, :, None, None, :]
        sees = sees & asks
        if fault == "the largest logit of all subtracted":
            highest = np.max(logits, axis=-1, keepdims=True)
        else:
            highest = np.max(np.where(sees, logits, -np.inf), axis=-1, keepdims=True)
        highest = np.where(np.isfinite(highest), highest, 0).astype(keys.dtype)
        with np.errstate(all="ignore"):
            weight = np.exp(logits - (0 if fault == "no logit subtracted" else highest)) * sees
            total = np.sum(weight, axis=-1, keepdims=True)
            share = weight / (total if fault in ("no logit subtracted",) else np.where(total > 0, total, 1))
        result = np.sum(np.where(sees, share, 0), axis=-2).astype(keys.dtype)
        if fault == "tokens beyond the 64th ignored":
            result[..., 64:] = 0
        if fault == "batch of one squeezed" and batch == 1:
            return result[0]
        if fault == "a mean over the queries":
            result = result / max(1, num_queries)
        return result

    return lambda step: wrong


def graph_options(**change):
    """Another count than asked for, filled up with edges of weight 0."""

    def spoil(step):
        def wrong(keys, importance, valid, /, **options):
            graph = step(keys, importance, valid, **options)
            weights = graph.weights.copy()
            weights[..., change.get("num_sources", weights.shape[-2]) :, :] = 0
            weights[..., change.get("num_neighbors", weights.shape[-1]) :] = 0
            if weights.shape[-1] * weights.shape[-2] > change.get("edges", 2**62):
                weights.reshape(*weights.shape[:-2], -1)[..., change["edges"] :] = 0
            return Graph(sources=graph.sources, neighbors=graph.neighbors, weights=weights, num_tokens=graph.num_tokens)

        return wrong

    return spoil


def keys_as(change):
    """Spoil the keys, and nothing else."""
    return lambda step: lambda keys, *args, **options: step(change(keys), *args, **options)


def second_as(change):
    """Spoil the second argument, and nothing else."""
    return lambda step: lambda first, second, *args, **options: step(first, change(second), *args, **options)


def hypotenuse(keys):
    """Lengths without over- and underflow: keys of all lengths have directions."""
    largest = np.max(np.abs(keys), axis=-1, keepdims=True, initial=0)
    usable = (largest > 0) & np.isfinite(largest)
    return np.where(usable, keys / np.where(usable, largest, 1), keys).astype(keys.dtype)


def longer_by(epsilon):
    """Divide by the length and a little more, so that short keys get shorter directions."""

    def change(keys):
        with np.errstate(all="ignore"):
            length = np.sqrt(np.sum(keys * keys, axis=-1, keepdims=True))
            # One more entry takes up what the direction lacks: equal to a division by the longer length.
            return np.where(np.isfinite(length) & (length < epsilon), 0, keys).astype(keys.dtype)

    return change


def entries_up_to(most):
    return lambda keys: keys[..., :most]


def tokens_up_to(most):
    """Keys beyond are not compared."""
    return lambda keys: np.where(np.arange(keys.shape[-2])[:, None] < most, keys, 0).astype(keys.dtype)


def sources_in_keys_dtype(step):
    return lambda keys, importance, *args, **options: step(keys, importance.astype(keys.dtype), *args, **options)


def far_from_the_end(step):
    """Excludes sources and padding by a number of -4 in place of a mask: short keys reach above it."""

    def wrong(keys, importance, valid, /, *, num_sources, num_neighbors, chunk_size, backend):
        sources = np.sort(NUMPY.top_k(importance, num_sources, ~valid, backend=NUMPY), axis=-1)
        with np.errstate(all="ignore"):
            length = np.sqrt(np.sum(keys * keys, axis=-1, keepdims=True))
            usable = (length > 0) & np.isfinite(length)
            directions = np.where(usable, keys / np.where(usable, length, 1), 0).astype(keys.dtype)
        bias = np.where(valid, 0, -4).astype(keys.dtype)
        np.put_along_axis(bias, sources, -4, axis=-1)
        of = np.take_along_axis(directions, sources[..., None], axis=-2)
        similarity = of @ np.swapaxes(directions, -1, -2) + bias[..., None, :]
        weight = np.where(similarity < -2, -1, np.clip(similarity, 0, 1)).astype(keys.dtype)
        neighbors = np.argsort(-weight, axis=-1, kind="stable")[..., :num_neighbors]
        weights = np.maximum(np.take_along_axis(weight, neighbors, axis=-1), 0)
        weights = weights * np.take_along_axis(valid, sources, axis=-1)[..., None]
        return Graph(sources=sources, neighbors=neighbors, weights=weights, num_tokens=valid.shape[-1])

    return wrong


def edges_as(change):
    """Spoil the graph that is propagated: ``change(importance, neighbors, weights)``, flat edges."""

    def spoil(step):
        def wrong(importance, graph, /, **options):
            shape = graph.weights.shape
            edges = (*shape[:-2], shape[-2] * shape[-1])
            weights = change(graph, graph.neighbors.reshape(edges), graph.weights.reshape(edges).copy())
            graph = Graph(
                sources=graph.sources,
                neighbors=graph.neighbors,
                weights=weights.reshape(shape),
                num_tokens=graph.num_tokens,
            )
            return step(importance, graph, **options)

        return wrong

    return spoil


def no_edges_to_sources(graph, neighbors, weights):
    hits = np.any(neighbors[..., None] == graph.sources[..., None, :], axis=-1)
    return np.where(hits, 0, weights)


def repeated_edges_once(graph, neighbors, weights):
    earlier = (neighbors[..., None, :] == neighbors[..., :, None]) & np.tri(neighbors.shape[-1], k=-1, dtype=bool)
    return np.where(np.any(earlier & (weights[..., None, :] > 0), axis=-1), 0, weights)


def edges_beyond(most):
    def change(graph, neighbors, weights):
        weights[..., most:] = 0
        return weights

    return change


def capped(name, most):
    """An option that counts no further."""
    return lambda step: lambda *args, **options: step(*args, **options | {name: min(options[name], most)})


def clipped_after_the_product(step):
    """The bound of a factor, once for all of them."""

    def wrong(importance, graph, /, *, signal, rounds, accumulation, strength, backend):
        found = step(
            importance,
            graph,
            signal=signal,
            rounds=rounds,
            accumulation=accumulation,
            strength=strength,
            backend=backend,
        )
        if signal != "decay" or accumulation == "sum":
            return found
        fixed = (importance == 0) | ~np.isfinite(importance)
        least = np.where(importance > 0, importance * np.asarray(1e-6, importance.dtype), found)
        return np.where(fixed, found, np.maximum(found, least)).astype(found.dtype)

    return wrong


def as_wide_as(place):
    """The result has the dtype of one input, not of the wider one."""

    def spoil(step):
        def wrong(importance, other, *args, **options):
            result = step(importance, other, *args, **options)
            like = (importance, other.weights if isinstance(other, Graph) else other)[place]
            return result.astype(like.dtype)

        return wrong

    return spoil


def within_range(x):
    """Saturate in place of an infinity."""
    return np.nan_to_num(x, nan=np.nan) if is_float(x) else x


def infinity_is_nan(x):
    return np.where(np.isinf(x), np.nan, x).astype(x.dtype) if is_float(x) else x


def powers_from(least):
    """A larger bound of a power than 1e-24."""

    def spoil(step):
        def wrong(importance, distance, valid, /, *, fusion, exponent, backend):
            if fusion != "power":
                return step(importance, distance, valid, fusion=fusion, exponent=exponent, backend=backend)
            nearest = np.maximum(distance, np.asarray(least ** (1 / exponent), distance.dtype))
            return step(importance, nearest, valid, fusion=fusion, exponent=exponent, backend=backend)

        return wrong

    return spoil


def by_logarithm(step):
    """A power as the exponential of a logarithm, in the fast and rough way of some libraries."""

    def wrong(importance, distance, valid, /, *, fusion, exponent, backend):
        result = step(importance, distance, valid, fusion=fusion, exponent=exponent, backend=backend)
        return result * np.asarray(1 + 3e-5, result.dtype) if fusion == "power" and exponent > 2 else result

    return wrong


def one_minus_the_cosine(keys, valid, /, *, backend):
    return 1 - portable_degree(keys, valid, backend=backend)


def padding_is_near(step):
    return lambda keys, valid, /, **options: np.where(valid, step(keys, valid, **options), 0).astype(keys.dtype)


def ranks_in_float16(step):
    def wrong(importance, distance, valid, /, *, fusion, exponent, backend):
        result = step(importance, distance, valid, fusion=fusion, exponent=exponent, backend=backend)
        return result if fusion == "power" else np.where(valid, result.astype(np.float16), result).astype(result.dtype)

    return wrong


def nan_counts_as_0(step):
    """A token whose importance is NaN takes part, and gets it back."""

    def wrong(importance, keys, valid, /, **options):
        found = step(np.where(np.isnan(importance), 0, importance).astype(importance.dtype), keys, valid, **options)
        return np.where(np.isnan(importance), np.nan, found).astype(found.dtype)

    return wrong


def nothing_below(least):
    """Scores that small are no importance."""
    return lambda step: (
        lambda importance, *args, **options: step(
            np.where(np.abs(importance) < least, 0, importance).astype(importance.dtype), *args, **options
        )
    )


def unequal_at_the_end(x):
    """A remainder that is added up in another order."""
    x = x.copy()
    x[..., -1:] *= np.asarray(1 + np.finfo(x.dtype).eps, x.dtype)
    return x


def keys_without_direction_take_no_part(step):
    return lambda importance, keys, valid, /, **options: step(
        importance, keys, valid & np.any(keys != 0, axis=-1), **options
    )


def namespace_of(**changed):
    """NumPy's namespace, with other functions in place of some; None takes one away."""
    namespace = ModuleType("changed")
    names = {name: getattr(NUMPY.xp, name) for name in dir(NUMPY.xp)} | changed
    vars(namespace).update({name: value for name, value in names.items() if value is not None})
    return namespace


def exclusive_sum(x, /, *, axis):
    return NUMPY.xp.cumulative_sum(x, axis=axis) - x


def half_up(x, /):
    return np.floor(x + np.asarray(0.5, x.dtype))


def rough_exp(x, /):
    return np.exp(x * np.asarray(1 + 1e-4, x.dtype))


def flat_mean(x, /, *, axis=None, keepdims=False):
    return np.mean(x, axis=axis[0] if isinstance(axis, tuple) else axis, keepdims=keepdims)


def unstable_argsort(x, /, *, axis=-1, descending=False, stable=True):
    """Descending by turning an ascending order round, which turns ties round as well."""
    order = np.argsort(x, axis=axis, kind="stable")
    return np.flip(order, axis=axis) if descending else order


def undirected_argsort(x, /, *, axis=-1, stable=True):
    return np.argsort(x, axis=axis, kind="stable")


# ---------------------------------------------------------------------------------------------------------------- table

STEPS: dict[str, Callable[..., Any]] = {
    "top_k": top_k,
    "segment_product": partial(segment, ufunc=np.multiply),
    "segment_sum": partial(segment, ufunc=np.add),
    "sum_rows": sum_rows,
    "received_attention": received_attention,
    "build_graph": build_graph,
    "propagate": propagate,
    "degree": degree,
    "fuse": fuse,
    "pagerank": pagerank,
    "select": select,
}


def replaced(backend: Backend, **fields: Any) -> Backend:
    return Subject(**fields_of(backend) | fields)


def faults_of(step: str, caught: dict[str, str]) -> list[Fault]:
    right = replaced(NUMPY, **{step: STEPS[step]})
    return [
        Fault(
            name=f"{step}: {name}",
            wrong=replaced(NUMPY, **{step: partial(STEPS[step], fault=name)}),
            right=right,
            caught_by=f"test_{claim}",
        )
        for name, claim in caught.items()
    ]


def spoiled(step: str, claims: dict[str, dict[str, Callable[..., Any]]]) -> list[Fault]:
    """Faults of the right forms: what must fail, and by name what was done to the step."""
    return [
        Fault(
            name=f"{step}: {name}",
            wrong=replaced(NUMPY, **{step: spoil(RIGHT[step])}),
            right=replaced(NUMPY, **{step: RIGHT[step]}),
            caught_by=f"test_{claim}",
            error=(AssertionError, ValueError, RuntimeWarning),
        )
        for claim, faults in claims.items()
        for name, spoil in faults.items()
    ]


def namespaces(claims: dict[str, dict[str, dict[str, Any]]]) -> list[Fault]:
    """Faults of the namespace itself, under the portable forms."""
    portable = dict.fromkeys(OPTIONAL)
    return [
        Fault(
            name=f"namespace: {name}",
            wrong=replaced(NUMPY, xp=namespace_of(**changed), **portable),
            right=replaced(NUMPY, **portable),
            caught_by=f"test_{claim}",
        )
        for claim, faults in claims.items()
        for name, changed in faults.items()
    ]


# What can go wrong with every step alike; primitives get arrays that were made for them, and so new ones every time.
MEMORY = {
    "results_outlive_the_next_call": {"one buffer for all results": one_buffer},
    "an_array_changed_in_place_is_read_again": {"results remembered by identity": remembered},
    "four_threads_at_once": {"scratch memory for all threads": shared_scratch},
    "layouts_never_matter": {
        "strides ignored": on_inputs(as_stored),
        "inputs as scratch memory": in_place,
    },
}

FAULTS = [
    *spoiled(
        "top_k",
        {
            "long_rows_are_ranked": {
                "indices of 16 bits": wrapping_index,
                "unsorted beyond the 1024th": unsorted_beyond(1024),
                "rows beyond the 64th": rows_beyond(64),
                "three tiers at most": tiers_of_two_bits_as_one,
                "two leading axes": third_axis_lost,
            },
            "scores_one_bit_apart_keep_their_order": {
                "in bfloat16": on_inputs(rounded(7)),
                "in TF32": on_inputs(rounded(10)),
                "in 20 bits": on_inputs(rounded(20)),
                "float64 in float32": in_float32,
            },
            "special_scores_have_their_places": {
                "subnormal numbers are 0": on_inputs(flushed),
                "negative NaN first": negative_nan_first,
                "NaN as minus infinity": nan_as(-np.inf),
                "NaN as the lowest number": nan_as(-3e38),
                "NaN as 0": nan_as(0),
                "filled up with minus infinity": padded_by_minus_infinity,
                "index out of range behind NaN": nan_index_out_of_range,
            },
        }
        | MEMORY,
    ),
    *spoiled(
        "segment_product",
        {
            "segments_of_many_values": {
                "32 values a segment": segments_of(32),
                "65,536 values": edges_up_to(65_536),
                "1,024 values": edges_up_to(1024),
                "rows beyond the 64th": rows_beyond(64),
                "by logarithms": logarithms,
                "factors in TF32": on_inputs(rounded(10)),
                "float64 in float32": in_float32,
                "indices of 32 bits as 64": index_as_int64,
                "two leading axes": third_axis_lost,
            },
        }
        | {name: faults for name, faults in MEMORY.items() if "in_place" not in name},
    ),
    *spoiled(
        "segment_sum",
        {
            "segments_of_many_values": {
                "32 values a segment": segments_of(32),
                "65,536 values": edges_up_to(65_536),
                "rows beyond the 64th": rows_beyond(64),
                "terms in bfloat16": on_inputs(rounded(7)),
                "float64 in float32": in_float32,
            },
            "merges_conserve_mass": {"2 values a segment": segments_of(2)},
        }
        | {name: faults for name, faults in MEMORY.items() if "in_place" not in name},
    ),
    *spoiled(
        "sum_rows",
        {
            "sums_of_many_rows": {
                "32 rows a slot": slots_of(32),
                "65,536 rows": into_as(lambda into: np.where(np.arange(into.shape[-1]) < 65_536, into, -1)),
                "entries beyond the 64th ignored": entries_of_the_result(64),
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
                "terms in TF32": on_inputs(rounded(10)),
                "terms in bfloat16": on_inputs(rounded(7)),
                "float64 in float32": in_float32,
                "indices of 32 bits as 64": index_as_int64,
            },
            "a_row_alone_in_its_slot_stays_bit_for_bit": {
                "differences of a running sum": running_sum,
                "sums in 20 bits": on_result(rounded(20)),
            },
            "rows_that_go_nowhere_are_not_counted": {"nowhere times zero": nowhere_times_zero},
            "the_order_of_rows_never_matters_beyond_rounding": {"slots taken for sorted": into_as(last_run)},
            "merges_conserve_mass": {"2 rows a slot": slots_of(2)},
        }
        | MEMORY,
    ),
    *spoiled(
        "received_attention",
        {
            "attention_received_in_real_shapes": {
                name: attention(name)
                for name in (
                    "two groups at most",
                    "last block lost",
                    "entries beyond the 64th ignored",
                    "scale of heads of 3",
                    "scale of heads of 64",
                    "the largest logit of all subtracted",
                    "no logit subtracted",
                    "tokens beyond the 64th ignored",
                    "batch of one squeezed",
                    "a mean over the queries",
                )
            }
            | {"products in TF32": on_inputs(rounded(10)), "float64 in float32": in_float32},
            "attention_leaves_out_what_is_not_finite": {
                name: attention(name) for name in ("infinite keys count", "infinite queries ask")
            },
            "results_outlive_the_next_call": MEMORY["results_outlive_the_next_call"],
            "layouts_never_matter": {"strides ignored": on_inputs(as_stored)},
        },
    ),
    *spoiled(
        "build_graph",
        {
            "graphs_of_long_rows": {
                "8 neighbors at most": graph_options(num_neighbors=8),
                "32 neighbors at most": graph_options(num_neighbors=32),
                "16 sources at most": graph_options(num_sources=16),
                "256 sources at most": graph_options(num_sources=256),
                "65,536 edges at most": graph_options(edges=65_536),
                "entries beyond the 16th ignored": keys_as(entries_up_to(16)),
                "entries beyond the 64th ignored": keys_as(entries_up_to(64)),
                "tokens beyond the 1024th not compared": keys_as(tokens_up_to(1024)),
                "tokens beyond the 65,536th not compared": keys_as(tokens_up_to(65_536)),
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
            },
            "graphs_of_real_head_sizes": {
                "products in TF32": keys_as(rounded(10)),
                "products in bfloat16": keys_as(rounded(7)),
                "float64 in float32": in_float32,
            },
            "keys_of_all_lengths": {
                "lengths without overflow": keys_as(hypotenuse),
                "keys shorter than 1e-12 are zero": keys_as(longer_by(1e-12)),
            },
            "short_keys_never_make_edges_to_sources_or_padding": {"a number for a mask": far_from_the_end},
            "mixed_dtypes_have_the_wider_result": {"sources ranked in the dtype of the keys": sources_in_keys_dtype},
        }
        | MEMORY,
    ),
    *spoiled(
        "propagate",
        {
            "propagation_over_large_graphs": {
                "weights in TF32": on_inputs(rounded(10)),
                "float64 in float32": in_float32,
                "65,536 edges at most": edges_as(edges_beyond(65_536)),
                "64 edges at most": edges_as(edges_beyond(64)),
                "8 rounds at most": capped("rounds", 8),
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
            },
            "duplicates_of_several_sources_fall_by_a_factor_each": {
                "clipped after the product": clipped_after_the_product,
                "underflow to 0": on_result(flushed),
            },
            "graphs_made_by_hand": {
                "no edges to sources": edges_as(no_edges_to_sources),
                "repeated edges count once": edges_as(repeated_edges_once),
            },
            "mixed_dtypes_have_the_wider_result": {
                "as wide as the importance": as_wide_as(0),
                "as wide as the weights": as_wide_as(1),
            },
            "results_beyond_the_range_are_infinite_or_zero": {
                "saturated": on_result(within_range),
                "infinity is NaN": on_result(infinity_is_nan),
            },
            "values_never_warn": {"warnings of overflow": with_errors},
        }
        | MEMORY,
    ),
    *spoiled(
        "distance",
        {
            "distances_keep_their_digits": {
                "one minus the cosine": lambda step: one_minus_the_cosine,
                "the cosine": lambda step: portable_degree,
                "less than 1e-5 is nothing": on_result(lambda x: np.where(x < 1e-5, 0, x).astype(x.dtype)),
                "padding is near": padding_is_near,
                "products in bfloat16": keys_as(rounded(7)),
            },
        }
        | MEMORY,
    ),
    *spoiled(
        "degree",
        {
            "degrees_of_long_rows": {
                "1,024 tokens in the mean": keys_as(tokens_up_to(1024)),
                "entries beyond the 64th ignored": keys_as(entries_up_to(64)),
                "products in TF32": keys_as(rounded(10)),
                "products in bfloat16": keys_as(rounded(7)),
                "float64 in float32": in_float32,
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
            },
            "keys_of_all_lengths": {
                "lengths without overflow": keys_as(hypotenuse),
                "keys shorter than 1e-12 are zero": keys_as(longer_by(1e-12)),
            },
            "values_never_warn": {"warnings of overflow": with_errors},
        }
        | MEMORY,
    ),
    *spoiled(
        "fuse",
        {
            "fusion_of_long_rows": {
                "ranks in half precision": ranks_in_float16,
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
                "scores in TF32": on_inputs(rounded(10)),
                "powers by logarithms": by_logarithm,
                "float64 in float32": in_float32,
            },
            "powers_of_small_distances_keep_their_digits": {
                "powers from 1e-12": powers_from(1e-12),
                "powers from 1e-16": powers_from(1e-16),
                "exponents up to 16": capped("exponent", 16),
            },
            "results_beyond_the_range_are_infinite_or_zero": {
                "saturated": on_result(within_range),
                "infinity is NaN": on_result(infinity_is_nan),
            },
            "mixed_dtypes_have_the_wider_result": {
                "as wide as the importance": as_wide_as(0),
            },
            "values_never_warn": {"warnings of overflow": with_errors},
        }
        | MEMORY,
    ),
    *spoiled(
        "pagerank",
        {
            "pagerank_of_long_rows": {
                "1,024 tokens compared": second_as(tokens_up_to(1024)),
                "65,536 tokens compared": second_as(tokens_up_to(65_536)),
                "entries beyond the 64th ignored": second_as(entries_up_to(64)),
                "products in TF32": second_as(rounded(10)),
                "products in bfloat16": second_as(rounded(7)),
                "float64 in float32": in_float32,
                "8 rounds at most": capped("rounds", 8),
                "rows beyond the 64th": rows_beyond(64),
                "two leading axes": third_axis_lost,
                "equal tokens that are not": on_result(unequal_at_the_end),
            },
            "pagerank_of_odd_rows": {
                "NaN counts as 0": nan_counts_as_0,
                "keys without direction take no part": keys_without_direction_take_no_part,
            },
            "pagerank_grows_with_the_importance": {
                "sums overflow": lambda step: pagerank,
                "less than 1e-12 is nothing": nothing_below(1e-12),
                "saturated": on_result(within_range),
                "infinity is NaN": on_result(infinity_is_nan),
            },
            "keys_of_all_lengths": {
                "lengths without overflow": second_as(hypotenuse),
                "keys shorter than 1e-12 are zero": second_as(longer_by(1e-12)),
            },
            "mixed_dtypes_have_the_wider_result": {
                "as wide as the importance": as_wide_as(0),
                "as wide as the keys": as_wide_as(1),
            },
            "values_never_warn": {"warnings of overflow": with_errors},
        }
        | MEMORY,
    ),
    *spoiled(
        "select",
        {
            "long_rows_are_selected": {
                "rows beyond the 64th": rows_beyond(64),
                "positions of 16 bits": wrapping_index,
                "two leading axes": third_axis_lost,
            },
            "scores_one_bit_apart_keep_their_order": {
                "in bfloat16": on_inputs(rounded(7)),
                "float64 in float32": in_float32,
            },
            "special_scores_have_their_places": {
                "subnormal numbers are 0": on_inputs(flushed),
                "NaN as minus infinity": nan_as(-np.inf),
            },
        }
        | MEMORY,
    ),
    *namespaces(
        {
            "the_namespace_has_what_is_used": {
                f"without {name}": {name: None}
                for name in (
                    "cumulative_sum",
                    "log",
                    "round",
                    "stack",
                    "exp",
                    "searchsorted",
                    "take_along_axis",
                    "bool",
                )
            }
            | {"argsort cannot descend": {"argsort": undirected_argsort}},
            "every_policy_keeps_what_numpy_keeps": {
                "sum up to the one before": {"cumulative_sum": exclusive_sum},
                "halves rounded up": {"round": half_up},
                "exponentials to four digits": {"exp": rough_exp},
                "a mean over one axis of several": {"mean": flat_mean},
            },
            "long_rows_are_ranked": {"descending by turning round": {"argsort": unstable_argsort}},
        }
    ),
    *faults_of(
        "top_k",
        {
            "unstable": "top_k_agrees_with_the_oracle",
            "NaN first": "top_k_agrees_with_the_oracle",
            "NaN as a number": "minus_zero_equals_zero_and_nan_is_last",
            "-0.0 below 0.0": "minus_zero_equals_zero_and_nan_is_last",
            "lowest first": "top_k_agrees_with_the_oracle",
            "tiers ignored": "top_k_ranks_rows_and_tiers_apart",
            "wrong axis": "top_k_ranks_rows_and_tiers_apart",
            "ascending positions": "top_k_agrees_with_the_oracle",
            "32-bit indices": "top_k_agrees_with_the_oracle",
        },
    ),
    *faults_of(
        "segment_product",
        {
            "last write wins": "segment_product_multiplies_what_shares_an_index",
            "empty segments are 0": "segment_product_multiplies_what_shares_an_index",
            "rows share segments": "a_batch_is_the_stack_of_its_rows",
            "last edge lost": "propagation_agrees_with_the_oracle",
        },
    ),
    *faults_of("segment_sum", {"last write wins": "segment_sum_adds_what_shares_an_index"}),
    *faults_of(
        "sum_rows",
        {
            "last row wins": "sum_rows_adds_what_goes_into_a_slot",
            "last row lost": "sum_rows_adds_what_goes_into_a_slot",
            "heads share slots": "sum_rows_adds_what_goes_into_a_slot",
            "slots without rows are NaN": "sum_rows_adds_what_goes_into_a_slot",
            "nowhere is the first slot": "rows_that_go_nowhere_are_not_counted",
            "nowhere is the last slot": "rows_that_go_nowhere_are_not_counted",
            "a mean for a sum": "merges_conserve_mass",
        },
    ),
    *faults_of(
        "received_attention",
        dict.fromkeys(
            ("looks ahead", "starts at the first position", "padding asks", "not scaled", "heads dealt out in turns"),
            "received_attention_agrees_with_the_oracle",
        ),
    ),
    *faults_of(
        "build_graph",
        {
            "sources unsorted": "graph_agrees_with_the_oracle",
            "one source too few": "graph_agrees_with_the_oracle",
            "decayed sources": "no_edge_leads_to_a_source_or_to_padding",
            "self edge": "no_edge_leads_to_a_source_or_to_padding",
            "neighbor off by one": "graph_agrees_with_the_oracle",
            "later neighbor first": "graph_agrees_with_the_oracle",
            "least similar": "graph_of_general_keys_lies_within_the_margin",
            "negative cosine kept": "graph_of_general_keys_lies_within_the_margin",
            "dot product for cosine": "graph_of_general_keys_lies_within_the_margin",
            "zero key is NaN": "a_key_without_direction_has_no_edges",
            "padding scored": "appended_padding_never_matters",
            "padding is a source": "appended_padding_never_matters",
            "chunk boundary lost": "chunk_size_never_matters",
            "weights in half precision": "graph_agrees_with_the_oracle",
        },
    ),
    *faults_of(
        "propagate",
        {
            "product for sum": "propagation_agrees_with_the_oracle",
            "sum for product": "propagation_agrees_with_the_oracle",
            "strongest source only": "propagation_agrees_with_the_oracle",
            "strength ignored": "propagation_of_general_numbers_is_close_to_the_oracle",
            "rounds ignored": "two_rounds_are_one_round_twice",
            "one round too many": "propagation_agrees_with_the_oracle",
            "sign flipped": "decay_never_raises_and_enhance_never_lowers",
            "no smallest factor": "a_duplicate_of_a_source_decays_to_the_bottom",
            "smallest factor 1e-3": "a_duplicate_of_a_source_decays_to_the_bottom",
            "computed as a difference": "a_duplicate_of_a_source_decays_to_the_bottom",
            "weights not clipped": "weights_outside_the_unit_interval_are_clipped",
            "infinities multiplied": "decay_never_raises_and_enhance_never_lowers",
            "normalised": "the_product_is_scale_invariant",
            ">= for > 0": "evict_sends_what_an_edge_reaches_to_minus_infinity",
            "evict by zero": "evict_sends_what_an_edge_reaches_to_minus_infinity",
            "input mutated": "inputs_are_not_written_to",
            "scores narrowed": "propagation_agrees_with_the_oracle",
        },
    ),
    *faults_of(
        "degree",
        {
            "zero key is NaN": "degree_lies_between_minus_one_and_one",
            "dot product for cosine": "degree_ignores_padding_and_the_length_of_keys",
            "padding in the mean": "degree_ignores_padding_and_the_length_of_keys",
            "padding counted": "degree_agrees_with_the_oracle",
            "padding has a degree": "degree_lies_between_minus_one_and_one",
            "a sum for a mean": "a_duplicate_raises_the_degree",
            "cosine with the mean": "degree_of_exact_numbers_is_exact",
            "mean over the rows": "a_batch_is_the_stack_of_its_rows",
            "others only": "degree_agrees_with_the_oracle",
            "in half precision": "degree_agrees_with_the_oracle",
            "not clipped": "degree_lies_between_minus_one_and_one",
        },
    ),
    *faults_of(
        "fuse",
        {
            "later of equals first": "fusion_agrees_with_the_oracle",
            "equals share a rank": "fusion_agrees_with_the_oracle",
            "descending ranks": "fusion_agrees_with_the_oracle",
            "lower rank": "fusion_agrees_with_the_oracle",
            "sum of ranks": "fusion_agrees_with_the_oracle",
            "mean rounded": "fusion_agrees_with_the_oracle",
            "padding ranked": "fusion_never_touches_what_is_not_valid",
            "padding scored": "fusion_never_touches_what_is_not_valid",
            "padding in the minimum": "fusion_never_touches_what_is_not_valid",
            "degree for distance": "eviction_by_degree_agrees_with_the_oracle",
            "least of all is 0": "fusion_agrees_with_the_oracle",
            "negative scores multiplied": "fusion_agrees_with_the_oracle",
            "exponent ignored": "powers_of_general_numbers_are_close_to_the_oracle",
            "one factor too many": "fusion_agrees_with_the_oracle",
            "no smallest power": "among_duplicates_the_importance_decides",
            "no largest power": "among_duplicates_the_importance_decides",
            "infinities in the minimum": "fusion_agrees_with_the_oracle",
        },
    ),
    *faults_of(
        "pagerank",
        {
            "padding takes part": "pagerank_never_touches_what_takes_no_part",
            "padding is 0": "pagerank_never_touches_what_takes_no_part",
            "dot product for cosine": "pagerank_agrees_with_the_oracle",
            "negative cosines clipped": "pagerank_agrees_with_the_oracle",
            "no loops": "pagerank_agrees_with_the_oracle",
            "least of all is 0": "pagerank_agrees_with_the_oracle",
            "not shifted": "pagerank_agrees_with_the_oracle",
            "flat is nothing": "pagerank_agrees_with_the_oracle",
            "one round too many": "pagerank_agrees_with_the_oracle",
            "one round too few": "pagerank_agrees_with_the_oracle",
            "damping upside down": "eviction_by_pagerank_agrees_with_the_oracle",
            "flow not scaled": "pagerank_only_moves_importance",
            "no teleport": "pagerank_only_moves_importance",
            "size lost": "pagerank_is_scale_invariant",
            "in half precision": "pagerank_agrees_with_the_oracle",
        },
    ),
    *faults_of(
        "select",
        {
            "one too few": "exactly_the_budget_is_kept",
            "by rank": "exactly_the_budget_is_kept",
            ">= at the cut": "selection_agrees_with_the_oracle",
            "padding kept": "protected_tokens_are_kept_first",
            "protection ignored": "protected_tokens_are_kept_first",
            "protection by a sentinel score": "protected_tokens_are_kept_first",
            "padding protected": "selection_agrees_with_the_oracle",
        },
    ),
    Fault(
        name="torch: unordered top-k",
        wrong=replaced(TORCH, top_k=unordered_top_k),
        right=TORCH,
        caught_by="test_top_k_agrees_with_the_oracle",
    ),
    Fault(
        name="torch: result of another library",
        wrong=replaced(TORCH, select=by_numpy),
        right=TORCH,
        caught_by="test_selection_agrees_with_the_oracle",
    ),
    Fault(
        name="numpy: half precision not widened",
        wrong=replaced(NUMPY, xp=never_widens()),
        right=NUMPY,
        caught_by="test_every_dtype_is_computed_in_float32_or_wider",
    ),
    Fault(
        name="strict: forgotten device",
        wrong=replaced(strict.DEVICE1, select=without_device),
        right=strict.DEVICE1,
        caught_by="test_selection_agrees_with_the_oracle",
        error=ValueError,
    ),
    Fault(
        name="strict: result on another device",
        wrong=replaced(strict.DEVICE1, propagate=elsewhere),
        right=strict.DEVICE1,
        caught_by="test_propagation_agrees_with_the_oracle",
    ),
]
