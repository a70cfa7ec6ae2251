"""Backends that are wrong on purpose, one mistake each; `test_kit` proves that the kit sees every one.

The steps are written once more here, plainly and in NumPy, with the places where a porter may slip marked by the
name of the slip. Without a fault they are right, which `test_kit` proves too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import array_api_strict
import numpy as np

from graphkv import Backend, Graph
from graphkv.core import primitives
from graphkv.core.backend import load
from graphkv.testing import Subject
from tests import strict
from tests.subjects import NUMPY, fields_of

TORCH = load("torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A wrong backend, the right one that it was made from, and the property that must fail."""

    name: str
    wrong: Backend
    right: Backend
    caught_by: str
    error: type[Exception] = AssertionError


# ---------------------------------------------------------------------------------------------------------- primitives


def top_k(scores, k, tiers=None, /, *, xp, fault=""):
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


def segment(values, index, num_segments, /, *, xp, ufunc, fault=""):
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


def received_attention(queries, keys, valid, /, *, block_size, xp, fault=""):
    groups = queries.shape[1] // keys.shape[1]
    total = np.zeros((*keys.shape[:2], groups, keys.shape[2]), keys.dtype)
    num_queries, num_tokens = queries.shape[2], keys.shape[2]
    for b, h, i in np.ndindex(*queries.shape[:3]):
        kv_head = h % keys.shape[1] if fault == "heads dealt out in turns" else h // groups
        position = num_tokens - num_queries + i
        sees = valid[b, kv_head].copy()
        if fault != "looks ahead":
            sees[position + 1 :] = False
        if fault == "starts at the first position":
            sees[i + 1 :] = False
        if fault != "padding asks" and not valid[b, kv_head, position]:
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
    sources = top_k(importance, num_sources, tier, xp=np)
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
    order = top_k(values, values.shape[-1], ~valid if fault != "padding ranked" else np.zeros(valid.shape, int), xp=np)
    place = np.argsort(order, axis=-1)
    if fault == "later of equals first":
        place = np.argsort(np.lexsort((-np.arange(values.shape[-1]) + 0 * place, -values, ~valid), axis=-1), axis=-1)
    if fault == "equals share a rank":
        place = np.sum((values[..., None, :] > values[..., None]) & valid[..., None, :], axis=-1)
    return (place + 1 if fault == "descending ranks" else np.sum(valid, axis=-1, keepdims=True) - place).astype(float)


def fuse(importance, degrees, valid, /, *, fusion, exponent, backend, fault=""):
    dtype = np.result_type(importance, degrees)
    score = importance.astype(dtype)
    degrees = degrees if fault == "NaN degree kept" else np.nan_to_num(degrees, nan=0.0, posinf=1, neginf=-1)
    distance = 1 - (degrees if fault == "degree not clipped" else np.clip(degrees, -1, 1))
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
    order = top_k(scores, scores.shape[-1], tier, xp=np)
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
    return backend.xp.sort(primitives.top_k(scores, budget, xp=backend.xp), axis=-1)


def without_device(scores, budget, protected, valid, /, *, backend):
    """Makes its tiers wherever the library makes arrays by default."""
    xp = backend.xp
    tiers = xp.ones(scores.shape, dtype=xp.int32)
    return xp.sort(primitives.top_k(scores, budget, tiers, xp=xp), axis=-1)


def elsewhere(importance, graph, /, *, signal, rounds, accumulation, strength, backend):
    """Right values, on the wrong device."""
    return array_api_strict.asarray(importance, copy=True).to_device(array_api_strict.Device("CPU_DEVICE"))


def by_numpy(scores, budget, protected, valid, /, *, backend):
    """Gives an array of another library."""
    return select(
        scores.numpy(),
        budget,
        None if protected is None else protected.numpy(),
        None if valid is None else valid.numpy(),
        backend=backend,
    )


def unordered_top_k(scores, k, tiers=None, /, *, xp):
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


# ---------------------------------------------------------------------------------------------------------------- table

STEPS: dict[str, Callable[..., Any]] = {
    "top_k": top_k,
    "segment_product": partial(segment, ufunc=np.multiply),
    "segment_sum": partial(segment, ufunc=np.add),
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


FAULTS = [
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
            "NaN degree kept": "fusion_agrees_with_the_oracle",
            "degree not clipped": "powers_of_general_numbers_are_close_to_the_oracle",
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
