"""Write the golden vectors; with ``--check``, only say whether the files are up to date.

The arguments of every case stand here. What is expected is computed by the NumPy backend, as the case says and once
more with the portable bodies of `graphkv.core`; a case without tolerance must come out the same in float64, unless it
is about the range of its dtype.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import e, inf, nan, sqrt
from typing import Any

import numpy as np
import vectors

from graphkv.backends.numpy import BACKEND

PORTABLE = replace(BACKEND, top_k=None, segment_product=None, segment_sum=None, sum_rows=None)
CLOSE = {"relative": 1e-5, "absolute": 1e-6}
TIGHT = {"relative": 1e-5, "absolute": 0.0}
# The rule of cases that float64 would answer otherwise.
RANGE = "a length over- and underflows in the arithmetic of the keys"


def numbers(data: Any, dtype: str = "float32", shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Make an array argument."""
    made = np.asarray(data, dtype=dtype)
    made = made if shape is None else made.reshape(shape)
    return {"dtype": dtype, "shape": list(made.shape), "data": vectors.encode(made.tolist())}


def mask(data: Any) -> dict[str, Any]:
    """Make a mask argument from 0 and 1."""
    return numbers(data, "bool")


def case(step: str, name: str, rule: str, tolerance: dict[str, float] | None = None, **given: Any) -> dict[str, Any]:
    """Make a case without its expected result."""
    return {"name": name, "rule": rule, "step": step, "tolerance": tolerance, "arguments": given}


# --- order -----------------------------------------------------------------------------------------------------------


def rank(name: str, rule: str, scores: Any, k: int, tiers: Any = None, dtype: str = "float32") -> dict[str, Any]:
    """Make a case of the order."""
    scores = scores if isinstance(scores, dict) else numbers(scores, dtype)
    tiers = None if tiers is None else numbers(tiers, "int32")
    return case("rank", name, rule, scores=scores, k=k, tiers=tiers)


def order_cases() -> list[dict[str, Any]]:
    """Cover section 2 of the specification: one total order."""
    high, ties = "higher score first", "equal scores: lower index first"
    zero, none = "-0.0 equals 0.0", "NaN after every number"
    return [
        rank("distinct", high, [0.5, 2, -1, 1, 0], 5),
        rank("best_two", high, [0.5, 2, -1, 1, 0], 2),
        rank("all_equal", ties, [1, 1, 1, 1, 1], 3),
        rank("plateaus", ties, [0, 2, 1, 2, 0, 1, 2, 0], 8),
        rank("tie_at_the_cut", ties, [3, 1, 1, 2, 1], 3),
        rank("minus_zero_first", zero, [-0.0, 0.0, -0.0, 0.0], 4),
        rank("zeros_between_signs", zero, [0.0, -0.5, -0.0, 0.5], 4),
        rank("nan_last", none, [nan, 1, nan, 0, -2], 5),
        rank("nan_below_minus_infinity", none, [nan, -inf, inf, 0, nan, -inf], 6),
        rank("all_nan", none, [nan, nan, nan], 2),
        rank("infinities", "infinities are ordinary extremes", [1, inf, -inf, inf, 0, -inf], 6),
        rank("tiers_first", "lower tier before higher score", [1, 5, 3, 4, 2], 5, [1, 1, 0, 2, 0]),
        rank("nan_stays_in_its_tier", "NaN last within its tier", [nan, 5, 1, nan], 4, [0, 1, 0, 1]),
        rank("tie_across_tiers", "lower tier before lower index", [1, 1, 1, 1], 4, [1, 0, 1, 0]),
        rank("rows_are_independent", "leading axes", [[[1, 2, 3], [3, 2, 1]], [[2, 2, 2], [nan, 0, 1]]], 2),
        rank("k_zero", "shapes never depend on values", [1, 2], 0),
        rank("k_above_n", "at most N indices", [1, 3, nan, 2], 6),
        rank("k_above_n_with_tiers", "at most N indices", [[1, 3, 2], [2, 2, 2]], 4, [[1, 1, 0], [2, 0, 1]]),
        rank("no_tokens", "shapes never depend on values", numbers([], shape=(0,)), 0),
        rank("no_rows", "shapes never depend on values", numbers([], shape=(0, 3)), 2),
        rank("float64_is_not_narrowed", "arithmetic", [1, 1 + 2**-40, 1, 1 - 2**-40], 4, dtype="float64"),
        rank("half_is_widened", "arithmetic", [0.5, 2, 2, 65504], 4, dtype="float16"),
        rank("integers_become_float32", "arithmetic", [2**24, 2**24 + 1, 2**24 + 2, -3], 4, dtype="int64"),
    ]


# --- build_graph -----------------------------------------------------------------------------------------------------

# Keys of length 2 and 4, so that every cosine with an axis is an exact multiple of 1/4.
AXES = [[0.0] * i + [2.0] + [0.0] * (4 - i) for i in range(5)]
A, B = AXES[0], AXES[1]
TOKENS = {
    "3/4, 1/2": [3.0, 2.0, 1.0, 1.0, 1.0],
    "1/2, 3/4": [2.0, 3.0, 1.0, 1.0, 1.0],
    "1/4, 3/4": [1.0, 3.0, 2.0, 1.0, 1.0],
    "-3/4, 1/2": [-3.0, 2.0, 1.0, 1.0, 1.0],
    "1/2, 1/2": [1.0, 1.0, 1.0, 1.0, 0.0],
    "0, 1/2": [0.0, 1.0, 1.0, 1.0, 1.0],
}
# The newest token is an axis, and the tokens before it resemble it.
RECENT = [TOKENS["0, 1/2"], B, *list(TOKENS.values())[4:2:-1], *list(TOKENS.values())[2::-1], A]
KEYS = [*list(TOKENS.values())[:3], A, *list(TOKENS.values())[3:5], B, TOKENS["0, 1/2"]]
IMPORTANCE = [1, 2, 3, 9, 4, 5, 8, 6]


def build(name: str, rule: str, keys: Any = KEYS, importance: Any = IMPORTANCE, **given: Any) -> dict[str, Any]:
    """Make a case of build_graph: two sources with two neighbors unless said otherwise."""
    dtype = given.pop("dtype", "float32")
    keys = keys if isinstance(keys, dict) else numbers(keys, dtype)
    importance = importance if isinstance(importance, dict) else numbers(importance, dtype)
    options = {"num_sources": 2, "num_neighbors": 2, "valid": None, "chunk_size": None} | given
    if isinstance(options["valid"], list):
        options["valid"] = mask(options["valid"])
    tolerance = options.pop("tolerance", None)
    return case("build_graph", name, rule, tolerance, keys=keys, importance=importance, **options)


def graph_cases() -> list[dict[str, Any]]:
    """Cover section 3.1."""
    counts, fill, weigh = "K is clipped to N, M to N - K", "fillers have weight 0", "w = max(0, cos), at most 1"
    chunks = "chunk_size does not matter"
    four = KEYS[:4]
    return [
        build("two_sources", "the K highest are sources"),
        build("one_source", "the K highest are sources", num_sources=1, num_neighbors=3),
        build("equal_weights", "equal weights: lower index first", num_sources=1, num_neighbors=4),
        build("equal_importance", "equal importance: lower index first", importance=[1, 1, 1, 1, 1, 1, 1, 1]),
        build("minus_zero", "-0.0 equals 0.0", importance=[-0.0, 0.0, -1, -0.0, 0.0, -1, -1, -1]),
        build("nan_importance", "NaN after every number", importance=[nan, 2, nan, 9, 4, nan, 1, 0]),
        build("only_nan_left", "NaN after every number", importance=[nan, 1, nan, nan, nan, nan, nan, nan]),
        build("infinite_importance", "infinities are ordinary extremes", importance=[-inf, 2, 3, inf, 4, 5, inf, 6]),
        build("sources_are_no_neighbors", "sources never decay each other", keys=[A, A, A, B], importance=[4, 3, 2, 1]),
        build("sources_ascend", "sources stand in ascending order", importance=[9, 1, 2, 3, 4, 5, 6, 10]),
        build("negative_cosine", weigh, [A, KEYS[4], KEYS[5], B], [9, 1, 2, 3], num_sources=1, num_neighbors=3),
        build("zero_key", weigh, [A, [0] * 5, KEYS[0], [0] * 5], [9, 1, 2, 3], num_sources=1, num_neighbors=3),
        build("zero_key_as_source", weigh, [[0] * 5, A, KEYS[0], B], [9, 8, 2, 3], num_neighbors=2),
        build("infinite_and_nan_keys", weigh, [A, [inf, 0, 0, 0, 0], [nan] * 5, KEYS[0]], [9, 1, 2, 3]),
        build(
            "key_length_float32",
            RANGE,
            [A, [2.0**100, 0, 0, 0, 0], KEYS[0], [2.0**-100, 0, 0, 0, 0], [2.0**100, 0, 0, 0, 0], KEYS[1]],
            [9, 8, 2, 7, 3, 4],
            num_sources=3,
        ),
        build(
            "key_length_float64",
            RANGE,
            [A, [2.0**600, 0, 0, 0, 0], KEYS[0], [2.0**-600, 0, 0, 0, 0], [2.0**600, 0, 0, 0, 0], KEYS[1]],
            [9, 8, 2, 7, 3, 4],
            num_sources=3,
            dtype="float64",
        ),
        build("no_dimensions", weigh, numbers([], shape=(4, 0)), [1, 2, 3, 4]),
        build("duplicate_of_a_source", weigh, [A, KEYS[0], A, [8, 0, 0, 0, 0]], [9, 1, 2, 3], num_sources=1),
        build("k_zero", counts, num_sources=0),
        build("m_zero", counts, num_neighbors=0),
        build("k_is_n", counts, four, [1, 2, 3, 4], num_sources=4),
        build("k_above_n", counts, four, [1, 2, 3, 4], num_sources=9),
        build("m_is_n_less_k", counts, four, [1, 2, 3, 4], num_sources=1, num_neighbors=3),
        build("m_above_n_less_k", counts, four, [1, 2, 3, 4], num_sources=1, num_neighbors=9),
        build("one_token", counts, [A], [1]),
        build("no_tokens", counts, numbers([], shape=(0, 5)), numbers([], shape=(0,))),
        build("no_rows", counts, numbers([], shape=(0, 4, 5)), numbers([], shape=(0, 4))),
        build("padding", "invalid tokens take no part", valid=[1, 1, 0, 1, 1, 1, 0, 1]),
        build("fewer_valid_than_k", fill, valid=[0, 0, 0, 1, 0, 0, 0, 0]),
        build("fewer_eligible_than_m", fill, valid=[1, 0, 0, 1, 0, 0, 1, 0]),
        build("nothing_valid", fill, valid=[0] * 8),
        build("valid_nan_before_invalid", "invalid after NaN", importance=[nan] * 8, valid=[0, 0, 0, 1, 0, 1, 1, 1]),
        build("chunk_1", chunks, num_neighbors=4, chunk_size=1),
        build("chunk_3", chunks, num_neighbors=4, chunk_size=3),
        build("chunk_8", chunks, num_neighbors=4, chunk_size=8),
        build("chunk_1_with_padding", chunks, valid=[1, 1, 0, 1, 1, 1, 0, 1], num_neighbors=4, chunk_size=1),
        build("chunk_2_ties", chunks, [A, A, A, A, A], [5, 1, 2, 3, 4], num_sources=1, num_neighbors=2, chunk_size=2),
        build(
            "batch_of_rows",
            "leading axes",
            [[KEYS[:4]], [KEYS[4:]]],
            [[[1, 2, 3, 4]], [[4, 4, 4, 4]]],
            valid=[[[1, 1, 1, 1]], [[1, 1, 0, 1]]],
            num_sources=1,
        ),
        build("float64", "arithmetic", dtype="float64"),
        build("half_keys", "arithmetic", numbers(KEYS, "float16"), numbers(IMPORTANCE, "float16")),
        build("integer_importance", "arithmetic", KEYS, numbers(IMPORTANCE, "int64")),
        build(
            "importance_wider_than_keys",
            "arithmetic",
            KEYS,
            numbers([1, 1 + 2**-40, 1 - 2**-40, 1, 0, 0, 0, 1 + 2**-39], "float64"),
        ),
        build("keys_wider_than_importance", "arithmetic", numbers(KEYS, "float64"), numbers(IMPORTANCE)),
        build(
            "general_numbers",
            weigh,
            [[1, 0.3, -2], [0.9, 0.25, -1.5], [-1, 2, 0.5], [0.1, 0.2, -0.3], [2, 1, -1], [0.7, -0.6, -1]],
            [1, 5, 2, 4, 3, 0],
            tolerance=CLOSE,
            dtype="float64",
        ),
    ]


# --- propagate -------------------------------------------------------------------------------------------------------


def graph(sources: Any, neighbors: Any, weights: Any, num_tokens: int, dtype: str = "float32") -> dict[str, Any]:
    """Make a graph argument."""
    return {
        "sources": numbers(sources, "int64"),
        "neighbors": numbers(neighbors, "int64"),
        "weights": numbers(weights, dtype),
        "num_tokens": num_tokens,
    }


# Tokens 0 and 1 are sources; 2 hangs on both, 3 and 4 on one, 5 on none.
EDGES = graph([0, 1], [[2, 3], [4, 2]], [[0.5, 0.25], [1.0, 0.75]], 6)


def spread(name: str, rule: str, importance: Any, edges: Any = None, **given: Any) -> dict[str, Any]:
    """Make a case of propagate: decay, one round, product, strength 1 unless said otherwise."""
    importance = importance if isinstance(importance, dict) else numbers(importance)
    tolerance = given.pop("tolerance", None)
    options = {"signal": "decay", "rounds": 1, "accumulation": "product", "strength": 1.0} | given
    edges = EDGES if edges is None else edges
    return case("propagate", name, rule, tolerance, importance=importance, graph=edges, **options)


def propagate_cases() -> list[dict[str, Any]]:
    """Cover section 3.2."""
    up = [8, 4, 2, 1, 0, 0.5]
    down = [-8, -4, -2, -1, 0, -0.5]
    mixed = [inf, -inf, nan, -inf, inf, nan]
    soft = graph([0, 1], [[2, 3], [4, 2]], [[0.5, 0.25], [0.5, 0.75]], 6)
    twin = graph([0], [[1, 2, 3]], [[1.0, 1.0, 1.0]], 5)
    # Two edges from the one source to token 1; each token of the other graph is reached, the sources too.
    double = graph([0], [[1, 1, 2]], [[0.5, 0.25, 0.5]], 4)
    all_ways = graph([0, 1], [[0, 1], [0, 2]], [[0.25, 0.5], [0.5, 0.5]], 4)
    # 16 edges to each of the tokens 2 to 5: one round multiplies by 2^16 or by 2^-16.
    many = [[2] * 8 + [3] * 8 + [4] * 8 + [5] * 8] * 2
    large = [1, 1, 2.0**100, -(2.0**100), 0, inf]
    twice = "an edge that stands twice counts twice"
    anyone = "an edge reaches whomever it names"
    power = "F to the power T, then times s"
    none = "weight 0 has no effect"
    same = "returns the importance exactly"
    clip = "a weight outside [0, 1] is clipped, NaN is no edge"
    return [
        spread("product", "product", up, soft),
        spread("sum", "sum", up, soft, accumulation="sum"),
        spread("two_rounds", "F to the power T", up, soft, rounds=2),
        spread("three_rounds", "F to the power T", up, soft, rounds=3),
        spread("half_strength", "strength", up, soft, strength=0.5),
        spread("sum_half_strength", "strength", up, soft, accumulation="sum", strength=0.5),
        spread("negative_scores", "decay always lowers", down, soft),
        spread("negative_scores_two_rounds", "decay always lowers", down, soft, rounds=2),
        spread("negative_scores_sum", "decay always lowers", down, soft, accumulation="sum"),
        spread("sum_below_zero", "the sum's factor may be negative", up, accumulation="sum"),
        spread("enhance", "enhance always raises", up, signal="enhance"),
        spread("enhance_negative_scores", "enhance always raises", down, signal="enhance"),
        spread("enhance_two_rounds", "enhance always raises", up, soft, signal="enhance", rounds=2),
        spread("enhance_sum", "enhance always raises", up, signal="enhance", accumulation="sum"),
        spread("evict", "evict", up, signal="evict"),
        spread("evict_negative_scores", "evict", down, signal="evict"),
        spread("evict_two_rounds", "evict", up, signal="evict", rounds=2),
        spread("evict_half_strength", "evict", up, signal="evict", strength=0.5),
        spread("no_rounds", same, down, rounds=0),
        spread("no_strength", same, down, strength=0.0),
        spread("no_strength_evict", same, up, signal="evict", strength=0.0),
        spread("no_rounds_evict", same, up, signal="evict", rounds=0),
        spread("k_zero", same, up, graph(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2)), 6)),
        spread("m_zero", same, up, graph([0, 1], np.zeros((2, 0)), np.zeros((2, 0)), 6)),
        spread("infinite_scores", "0, infinity and NaN stay", mixed),
        spread("infinite_scores_enhance", "0, infinity and NaN stay", mixed, signal="enhance"),
        spread("infinite_scores_evict", "evict", mixed, signal="evict"),
        spread("fillers_decay", none, up, graph([0, 1], [[1, 2], [0, 0]], [[0, 0.5], [0, 0]], 6)),
        spread("fillers_evict", none, up, graph([0, 1], [[1, 2], [0, 0]], [[0, 0.5], [0, 0]], 6), signal="evict"),
        spread("same_edge_twice", twice, [8, 4, 2, 1], double),
        spread("same_edge_twice_sum", twice, [8, 4, 2, 1], double, accumulation="sum"),
        spread("same_edge_twice_enhance", twice, [8, 4, 2, 1], double, signal="enhance"),
        spread("edge_to_a_source", anyone, [8, 4, 2, 1], all_ways),
        spread("edge_to_a_source_sum", anyone, [8, 4, 2, 1], all_ways, accumulation="sum"),
        spread("edge_to_a_source_evict", anyone, [8, 4, 2, 1], all_ways, signal="evict"),
        spread(
            "enhance_overflow",
            power,
            [1, 1, 2.0**-100, -(2.0**-100), 0, -inf],
            graph([0, 1], many, np.ones((2, 32)), 6),
            signal="enhance",
            rounds=70,
        ),
        spread("decay_underflow", power, large, graph([0, 1], many, np.full((2, 32), 0.5), 6), rounds=70),
        spread("duplicate", "a decay factor is at least 1e-6", [4, 2, 1, 2, 3], twin, tolerance=TIGHT),
        spread(
            "duplicate_two_rounds", "a decay factor is at least 1e-6", [4, 2, 1, 2, 3], twin, rounds=2, tolerance=TIGHT
        ),
        spread(
            "duplicate_of_two_sources",
            "a decay factor is at least 1e-6",
            [4, 4, 1, 2],
            graph([0, 1], [[2], [2]], [[1.0], [1.0]], 4),
            tolerance=TIGHT,
        ),
        spread("duplicate_in_the_sum", "the sum has no floor", [4, 2, 1, 2, 3], twin, accumulation="sum"),
        spread(
            "weights_are_clipped",
            clip,
            up,
            graph([0, 1], [[2, 3], [4, 5]], [[2.0, -0.5], [nan, 0.5]], 6),
            tolerance=TIGHT,
        ),
        spread(
            "weights_are_clipped_sum",
            clip,
            up,
            graph([0, 1], [[2, 3], [4, 5]], [[2.0, -0.5], [nan, 0.5]], 6),
            accumulation="sum",
            strength=0.5,
        ),
        spread(
            "weights_are_clipped_enhance",
            clip,
            up,
            graph([0, 1], [[2, 3], [4, 5]], [[2.0, -0.5], [nan, 0.5]], 6),
            signal="enhance",
        ),
        spread(
            "weights_are_clipped_evict",
            clip,
            up,
            graph([0, 1], [[2, 3], [4, 5]], [[2.0, -0.5], [nan, 0.5]], 6),
            signal="evict",
        ),
        spread(
            "general_numbers",
            "product",
            numbers([0.9, 0.1, 0.7, -0.3], "float64"),
            graph([0], [[2, 3]], [[0.7, 0.6]], 4, "float64"),
            tolerance=CLOSE,
            strength=0.3,
        ),
        spread("half_importance", "arithmetic", numbers(up, "float16"), soft),
        spread("integer_importance", "arithmetic", numbers([8, 4, 2, 1, 0, -3], "int64"), soft),
        spread("float64_importance", "arithmetic", numbers(up, "float64"), soft),
        spread(
            "float64_weights",
            "arithmetic",
            up,
            graph([0, 1], [[2, 3], [4, 2]], [[0.5, 0.25], [0.5, 0.75]], 6, "float64"),
        ),
        spread(
            "batch_of_rows",
            "leading axes",
            [[[8, 4, 2]], [[-8, 4, 2]]],
            graph([[[0]], [[1]]], [[[[1, 2]]], [[[0, 2]]]], [[[[0.5, 0.25]]], [[[0.5, 0.0]]]], 3),
        ),
        spread(
            "no_rows",
            "leading axes",
            numbers([], shape=(0, 6)),
            graph(np.zeros((0, 2)), np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), 6),
        ),
    ]


# --- degree and fuse -------------------------------------------------------------------------------------------------


def compare(name: str, rule: str, keys: Any, valid: Any = None, **given: Any) -> dict[str, Any]:
    """Make a case of degree."""
    keys = keys if isinstance(keys, dict) else numbers(keys, given.pop("dtype", "float32"))
    return case("degree", name, rule, keys=keys, valid=None if valid is None else mask(valid), **given)


def degree_cases() -> list[dict[str, Any]]:
    """Cover the degree; a mean over 1, 2, 4 or 8 of these keys is exact."""
    mean, none = "the mean cosine with all tokens, itself included", "a key without direction has the cosine 0"
    left_out = "padding has no part, and the degree 0"
    return [
        compare("eight_keys", mean, KEYS),
        compare("four_keys", mean, KEYS[:4]),
        compare("one_key", mean, [A]),
        compare("two_that_differ", mean, [A, B]),
        compare("opposites", mean, [A, [-4, 0, 0, 0, 0]]),
        compare("duplicates", mean, [A, B, A, A]),
        compare("all_the_same", mean, [TOKENS["1/2, 1/2"]] * 4),
        compare("length_does_not_matter", mean, [A, B, [8, 0, 0, 0, 0], [0.25, 0, 0, 0, 0]]),
        compare("zero_key", none, [A, [0] * 5, A, B]),
        compare("infinite_and_nan_keys", none, [A, [inf, 0, 0, 0, 0], [nan] * 5, A]),
        compare("key_length_float32", RANGE, [A, [2.0**100, 0, 0, 0, 0], [2.0**-100, 0, 0, 0, 0], A]),
        compare("key_length_float64", RANGE, [A, [2.0**600, 0, 0, 0, 0], [2.0**-600, 0, 0, 0, 0], A], dtype="float64"),
        compare("no_dimensions", none, numbers([], shape=(4, 0))),
        compare("no_tokens", "shapes never depend on values", numbers([], shape=(0, 5))),
        compare("no_rows", "shapes never depend on values", numbers([], shape=(0, 4, 5))),
        compare("padding", left_out, KEYS, [1, 0, 0, 1, 0, 1, 1, 0]),
        compare("padding_of_nan", left_out, [A, [nan] * 5, B, [inf] * 5], [1, 0, 1, 0]),
        compare("nothing_valid", left_out, KEYS[:4], [0] * 4),
        compare("batch_of_rows", "leading axes", [[KEYS[:4]], [KEYS[4:]]], [[[1, 1, 1, 1]], [[1, 1, 0, 0]]]),
        compare("float64", "arithmetic", KEYS, dtype="float64"),
        compare("half", "arithmetic", numbers(KEYS, "float16")),
        compare(
            "general_numbers",
            mean,
            [[1, 0.3, -2], [0.9, 0.25, -1.5], [-1, 2, 0.5], [0.1, 0.2, -0.3], [2, 1, -1], [0.7, -0.6, -1]],
            [1, 1, 1, 0, 1, 1],
            tolerance=CLOSE,
            dtype="float64",
        ),
    ]


def join(name: str, rule: str, importance: Any, degree: Any, **given: Any) -> dict[str, Any]:
    """Make a case of fuse: the square of the distance unless said otherwise."""
    importance = importance if isinstance(importance, dict) else numbers(importance)
    degree = degree if isinstance(degree, dict) else numbers(degree)
    options = {"fusion": "power", "exponent": 2, "valid": None} | given
    if isinstance(options["valid"], list):
        options["valid"] = mask(options["valid"])
    tolerance = options.pop("tolerance", None)
    return case("fuse", name, rule, tolerance, importance=importance, degree=degree, **options)


def fuse_cases() -> list[dict[str, Any]]:
    """Cover the fusion of importance and degree."""
    up, down, odd = [8, 6, 4, 2, 1, 0], [-8, -6, -4, -2, -1, 0], [inf, -inf, nan, 3, -1, -0.0]
    apart = [0.5, 0.75, -0.5, 0.5, 0.0, 0.25]
    some = [1, 0, 1, 1, 0, 1]
    power, lift = "s times the power of 1 - c", "the least of negative importance becomes 0"
    best, both = "the higher of the two ranks", "the mean of the two ranks"
    ties, stays = "equal values: lower index ranks higher", "invalid tokens keep their importance"
    wild = "a degree outside [-1, 1] is clipped, NaN counts as 0"
    ranks = {"fusion": "max_rank"}, {"fusion": "mean_rank"}
    return [
        join("power", power, up, apart),
        join("exponent_1", power, up, apart, exponent=1),
        join("exponent_3", power, up, apart, exponent=3),
        join("no_degree", power, up, [0] * 6),
        join("negative_scores", lift, down, apart),
        join("mixed_signs", lift, [4, -2, 1, -1, 0, 2], apart),
        join("special_scores", "infinity and NaN stay, and are no minimum", odd, apart),
        join("only_special_scores", "infinity and NaN stay, and are no minimum", [inf, nan, -inf], [0.5] * 3),
        join("wild_degrees", wild, up, [-2, -inf, nan, 0.5, -1.5, -1]),
        join("all_the_same", "a power is at least 1e-24", [3, 1, 2], [1.0, 1.0, 2.0], tolerance=TIGHT),
        join("all_the_same_16", "a power is at least 1e-24", [3, 1, 2], [1.0, 1.0, 0.99], exponent=16, tolerance=TIGHT),
        join("opposite_100", "a power is at most 1e24", [3, 0, 2], [-1, -1, 0.5], exponent=100, tolerance=TIGHT),
        join("max_rank", best, up, apart, **ranks[0]),
        join("mean_rank", both, up, apart, **ranks[1]),
        join("max_rank_negative", best, down, apart, **ranks[0]),
        join("mean_rank_negative", both, down, apart, **ranks[1]),
        join("max_rank_ties", ties, [1, 2, 1, 2], [0.5, 0.25, 0.25, 0.5], **ranks[0]),
        join("mean_rank_ties", ties, [1, 2, 1, 2], [0.5, 0.25, 0.25, 0.5], **ranks[1]),
        join("max_rank_all_equal", ties, [1] * 4, [0.5] * 4, **ranks[0]),
        join("mean_rank_all_equal", ties, [1] * 4, [0.5] * 4, **ranks[1]),
        join("max_rank_special", "NaN has the lowest rank", odd, apart, **ranks[0]),
        join("mean_rank_special", "NaN has the lowest rank", odd, apart, **ranks[1]),
        join("mean_rank_wild_degrees", wild, up, [-2, -inf, nan, 0.5, -1.5, -1], **ranks[1]),
        join("power_padding", stays, down, apart, valid=[0, 0, 1, 1, 0, 1]),
        join("max_rank_padding", stays, up, apart, valid=some, **ranks[0]),
        join("mean_rank_padding", stays, up, apart, valid=some, **ranks[1]),
        join("power_nothing_valid", stays, odd, apart, valid=[0] * 6),
        join("max_rank_nothing_valid", stays, odd, apart, valid=[0] * 6, **ranks[0]),
        join("power_no_tokens", "leading axes", numbers([], shape=(0,)), numbers([], shape=(0,))),
        join("max_rank_no_rows", "leading axes", numbers([], shape=(0, 3)), numbers([], shape=(0, 3)), **ranks[0]),
        join("power_rows", "leading axes", [[[1, 2]], [[-1, 2]]], [[[0.5, 0.0]], [[0.5, 0.5]]]),
        join("mean_rank_rows", "leading axes", [[[1, 2]], [[-1, 2]]], [[[0.5, 0.0]], [[0.5, 0.5]]], **ranks[1]),
        join("half", "arithmetic", numbers(up, "float16"), numbers(apart, "float16")),
        join("integer_importance", "arithmetic", numbers(up, "int64"), apart),
        join("float64_degree", "arithmetic", up, numbers(apart, "float64")),
        join("float64_importance", "arithmetic", numbers(up, "float64"), apart, **ranks[0]),
        join(
            "general_numbers",
            power,
            numbers([0.9, 0.1, 0.7, -0.3], "float64"),
            numbers([0.7, 0.6, 0.1, -0.2], "float64"),
            exponent=5,
            tolerance=CLOSE,
        ),
    ]


# --- pagerank --------------------------------------------------------------------------------------------------------


def flow(name: str, rule: str, importance: Any, keys: Any, **given: Any) -> dict[str, Any]:
    """Make a case of pagerank: half of everything flows, in two rounds, unless said otherwise."""
    dtype = given.pop("dtype", "float32")
    importance = importance if isinstance(importance, dict) else numbers(importance, dtype)
    keys = keys if isinstance(keys, dict) else numbers(keys, dtype)
    options = {"damping": 0.5, "rounds": 2, "valid": None} | given
    if isinstance(options["valid"], list):
        options["valid"] = mask(options["valid"])
    tolerance = options.pop("tolerance", CLOSE)
    return case("pagerank", name, rule, tolerance, importance=importance, keys=keys, **options)


def pagerank_cases() -> list[dict[str, Any]]:
    """Cover PageRank: it divides by sums, so most results are compared within a tolerance."""
    up = [8, 6, 4, 2, 1, 0, 3, 5]
    down = [-1, -2, -3, -9, -4, -5, -8, -6]
    rule, lift = "importance flows between all pairs, and teleports", "the least of negative importance becomes 0"
    none, flat = "a key without direction has the cosine 0", "where nothing is important all tokens are alike"
    left_out, same = "invalid tokens take no part and keep their importance", "no damping or no rounds changes nothing"
    stays = "infinity and NaN stay, and their tokens take no part"
    return [
        flow("eight_keys", rule, up, KEYS),
        flow("one_round", rule, up, KEYS, rounds=1),
        flow("ten_rounds", rule, up, KEYS, damping=0.15, rounds=10),
        flow("no_teleport", rule, up, KEYS, damping=1.0),
        flow("one_key", rule, [3], [A]),
        flow("opposites", rule, [1, 3], [A, [-4, 0, 0, 0, 0]]),
        flow("duplicates", rule, [1, 1, 2, 1], [A, B, A, A]),
        flow("length_does_not_matter", rule, [4, 3, 2, 1], [A, B, [8, 0, 0, 0, 0], [0.25, 0, 0, 0, 0]]),
        flow("negative_scores", lift, down, KEYS),
        flow("mixed_signs", lift, [4, -2, 1, -1, 0, 2, -2, 3], KEYS),
        flow("all_zero", flat, [0] * 8, KEYS),
        flow("all_equal_and_negative", flat, [-3] * 8, KEYS),
        flow("zero_key", none, [4, 3, 2, 1], [A, [0] * 5, A, B]),
        flow("infinite_and_nan_keys", none, [4, 3, 2, 1], [A, [inf, 0, 0, 0, 0], [nan] * 5, A]),
        flow("special_scores", stays, [inf, -inf, nan, 3, 1, -0.0, 2, 5], KEYS),
        flow("only_special_scores", stays, [inf, nan, -inf], KEYS[:3], tolerance=None),
        flow("padding", left_out, up, KEYS, valid=[1, 0, 0, 1, 0, 1, 1, 0]),
        flow("padding_of_nan", left_out, [2, 9, 1, -9], [A, [nan] * 5, B, [inf] * 5], valid=[1, 0, 1, 0]),
        flow("nothing_valid", left_out, up, KEYS, valid=[0] * 8, tolerance=None),
        flow("no_damping", same, [-0.0, 1, nan, inf], KEYS[:4], damping=0.0, tolerance=None),
        flow("no_rounds", same, [-0.0, 1, nan, inf], KEYS[:4], rounds=0, tolerance=None),
        flow("no_tokens", "leading axes", numbers([], shape=(0,)), numbers([], shape=(0, 5)), tolerance=None),
        flow("no_rows", "leading axes", numbers([], shape=(0, 3)), numbers([], shape=(0, 3, 5)), tolerance=None),
        flow("rows", "leading axes", [[[4, 3, 2, 1]], [[0, 1, 2, -3]]], [[KEYS[:4]], [KEYS[4:]]]),
        flow("half", "arithmetic", numbers(up, "float16"), numbers(KEYS, "float16")),
        flow("integer_importance", "arithmetic", numbers(up, "int64"), KEYS),
        flow("float64_keys", "arithmetic", up, numbers(KEYS, "float64")),
        flow("float64_importance", "arithmetic", numbers(up, "float64"), KEYS),
    ]


# --- select ----------------------------------------------------------------------------------------------------------


def choose(name: str, rule: str, scores: Any, budget: int, protected: Any = None, valid: Any = None) -> dict[str, Any]:
    """Make a case of select."""
    scores = scores if isinstance(scores, dict) else numbers(scores)
    masks = {
        "protected": None if protected is None else mask(protected),
        "valid": None if valid is None else mask(valid),
    }
    return case("select", name, rule, scores=scores, budget=budget, **masks)


def select_cases() -> list[dict[str, Any]]:
    """Cover section 3.3."""
    five = [0.5, 2, -1, 2, 0]
    size, first, last = "exactly min(B, N)", "protected tokens first", "invalid tokens last"
    return [
        choose("budget_0", size, five, 0),
        choose("budget_1", size, five, 1),
        choose("budget_3", size, five, 3),
        choose("budget_n", size, five, 5),
        choose("budget_above_n", size, five, 6),
        choose("no_tokens", size, numbers([], shape=(0,)), 3),
        choose("no_rows", size, numbers([], shape=(0, 3)), 2),
        choose("ascending", "ascending positions", [9, 1, 8, 2, 7], 3),
        choose("ties", "equal scores: lower index first", [1, 2, 1, 2, 1], 3),
        choose("zeros", "-0.0 equals 0.0", [-0.0, 0.0, -1, 0.0], 2),
        choose("nan", "NaN after every number", [nan, -inf, nan, 1], 3),
        choose("infinities", "infinities are ordinary extremes", [-inf, 0, inf, -inf], 3),
        choose("protected", first, five, 2, protected=[0, 0, 1, 0, 0]),
        choose("protected_fill_the_budget", first, five, 2, protected=[1, 0, 1, 0, 1]),
        choose("protected_ties", first, [1, 1, 1, 1], 2, protected=[0, 1, 1, 1]),
        choose("protected_nan", first, [nan, 5, 4, 3], 2, protected=[1, 0, 0, 0]),
        choose("protected_minus_infinity", first, [-inf, 5, 4, -inf], 2, protected=[1, 0, 0, 0]),
        choose("padding", last, [9, 8, 1, 2, 3], 3, valid=[0, 0, 1, 1, 1]),
        choose("padding_fills_the_rest", last, [9, 8, 1, 2, 7], 4, valid=[0, 0, 1, 1, 0]),
        choose("nothing_valid", last, [1, 3, 2], 2, valid=[0, 0, 0]),
        choose("nan_before_padding", last, [9, nan, nan, 8], 2, valid=[0, 1, 1, 0]),
        choose("protected_padding_is_padding", last, [9, 1, 2, 3], 2, protected=[1, 0, 0, 0], valid=[0, 1, 1, 1]),
        choose("three_groups", last, [5, 9, 1, 7, 2, 8], 4, protected=[0, 1, 1, 0, 0, 0], valid=[1, 0, 1, 1, 1, 0]),
        choose("rows_differ", "leading axes", [[[3, 2, 1]], [[1, 2, 3]]], 1, valid=[[[0, 1, 1]], [[1, 1, 1]]]),
        choose("integers_become_float32", "arithmetic", numbers([2**24, 2**24 + 1, 2**24 + 2], "int64"), 2),
        choose("half", "arithmetic", numbers([0.5, 2, 2, 1], "float16"), 2),
        choose("float64", "arithmetic", numbers([1, 1 + 2**-40, 1 - 2**-40, 1], "float64"), 2),
    ]


# --- counts ----------------------------------------------------------------------------------------------------------


def count_cases() -> list[dict[str, Any]]:
    """Cover budgets (section 4) and the counts of GraphKV: decimal numbers, not their binary neighbors."""
    budgets = [
        (0.9, 100), (0.145, 100), (0.5, 1), (0.5, 5), (0.3, 5), (0.1, 4), (0.29, 100), (0.57, 100), (1.0, 7), (0.2, 0),
        (1e-9, 1000), (64, 100), (0, 100), (101, 100), (1, 0),
    ]  # fmt: skip
    counts = [
        (0.3, 480), (0.3, 2), (0.3, 3), (0.3, 10), (0.29, 100), (0.7, 10), (0.0, 480), (1.0, 9), (2, 9), (12, 9),
        (2, 0), (0, 9),
    ]  # fmt: skip
    half, down = "floor(f N + 1/2) of the decimal number; an int as it is", "floor, at least 1 above 0; an int as it is"
    return [
        *(case("budget_tokens", f"budget_{f}_of_{n}", half, budget=f, num_tokens=n) for f, n in budgets),
        *(case("ratio_count", f"count_{f}_of_{n}", down, amount=f, total=n) for f, n in counts),
    ]


# --- the worked figure -----------------------------------------------------------------------------------------------

FIGURE_IMPORTANCE = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]
TO_4 = [0.10, 0.21, 0.16, 1.0, 0.40, 0.50, 0.0]
TO_7 = [0.05, 0.03, 0.70, 0.0, 0.23, 0.60, 1.0]


def decimals(data: Any) -> dict[str, Any]:
    """Make an array argument of float32 that is written as it stands in the paper: the reader rounds it."""
    return numbers(data) | {"data": data}


def figure_cases() -> list[dict[str, Any]]:
    """Cover section 3.4: the paper's method figure, from keys that have its similarities to the last kept token."""
    keys = [[a, b, sqrt(max(0.0, 1 - a * a - b * b))] for a, b in zip(TO_4, TO_7, strict=True)]
    importance = decimals(FIGURE_IMPORTANCE)
    edges = graph([3, 6], [[5, 4], [2, 5]], np.zeros((2, 2)), 7) | {"weights": decimals([[0.5, 0.4], [0.7, 0.6]])}
    rule = "the paper's method figure"
    cases = [build("graph", rule, decimals(keys), importance, tolerance=CLOSE)]
    for how, rounds in (("sum", 1), ("product", 1), ("product", 2)):
        name = f"{how}_{rounds}"
        cases.append(spread(name, rule, importance, edges, accumulation=how, rounds=rounds, tolerance=CLOSE))
    for how, scores in (
        ("base", FIGURE_IMPORTANCE),
        ("sum", [0.1, 0.6, 0.09, 1.2, 0.18, -0.07, 1.1]),
        ("product", [0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1]),
    ):
        cases.append(choose(f"keep_by_{how}", rule, decimals(scores), 3))
    return cases


# --- policies --------------------------------------------------------------------------------------------------------


def evict(name: str, rule: str, policy: dict[str, Any], keys: Any, **given: Any) -> dict[str, Any]:
    """Make a case of evict."""
    tolerance = given.pop("tolerance", None)
    options = {"values": None, "queries": None, "attention": None, "layer": 0, "num_layers": 1, "valid": None} | given
    return case("evict", name, rule, tolerance, policy=policy, keys=keys, **options)


def policy_cases() -> list[dict[str, Any]]:
    """Cover section 4 for the policies of this release; every option is spelled out."""
    eight = numbers([[KEYS]])
    two = numbers([[KEYS], [KEYS]])
    recent, two_recent = numbers([[RECENT]]), numbers([[RECENT], [RECENT]])
    left = mask([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    streaming = {"name": "StreamingLLM", "budget": 4, "num_sinks": 1}
    draw = {"name": "Random", "budget": 3, "seed": 7}
    snap = {
        "name": "SnapKV", "budget": 4, "window": 2, "kernel_size": 1, "pooling": "avg", "group_reduction": "mean",
        "num_sinks": 0,
    }  # fmt: skip
    # Two query heads, two window rows; multiples of 1/8 that add up to 1.
    rows = numbers(
        [
            [
                [[0.25, 0, 0.125, 0.125, 0, 0.375, 0.125, 0], [0.125, 0, 0.25, 0, 0.125, 0.25, 0.125, 0.125]],
                [[0, 0.5, 0.125, 0, 0.25, 0, 0.125, 0], [0.125, 0.25, 0, 0.125, 0.25, 0, 0.125, 0.125]],
            ]
        ]
    )
    options = {
        "name": "Decay", "source_ratio": 0.7, "neighbors": 2, "rounds": 1, "accumulation": "product", "strength": 1.0,
        "recompute_sources": False,
    }  # fmt: skip
    square, highest = {"name": "Degree", "exponent": 2, "fusion": "power"}, {"name": "Degree", "fusion": "max_rank"}
    graph = {"name": "GraphKV", "base": streaming}
    decay, apart, ranks = graph | {"signal": options}, graph | {"signal": square}, graph | {"signal": highest}

    spread_out = graph | {"signal": {"name": "PageRank", "damping": 0.5, "rounds": 2}}
    barred = graph | {"signal": {"name": "Bar", "source_ratio": 0.7, "neighbors": 2}}
    middle = graph | {"signal": highest | {"fusion": "mean_rank"}}

    def sent(**changes: Any) -> dict[str, Any]:
        return graph | {"signal": options | changes}

    pairs = mask([[1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
    wide = numbers([[[row[i : i + 1] * 5 for row in KEYS] for i in range(2)]])
    generator = random.Random(2509)
    queries = numbers([[[[generator.randint(-8, 8) / 4 for _ in range(5)] for _ in range(2)] for _ in range(2)]])
    window, fits = "the observation window votes", "N <= budget keeps everything"
    counts, same = "K and M are counted from what is open", "no graph gives the base"
    return [
        evict("streaming", "sinks and the newest", streaming, eight),
        evict("streaming_no_sinks", "sinks and the newest", streaming | {"num_sinks": 0}, eight),
        evict("streaming_budget_below_sinks", "protected tokens fill the budget", streaming | {"num_sinks": 6}, eight),
        evict("streaming_padding", "padding is not counted", streaming, two, valid=left),
        evict("streaming_float_budget", "float budgets", streaming | {"budget": 0.3}, eight),
        evict("budget_0", "exactly the budget", streaming | {"budget": 0}, eight),
        evict("budget_1", "exactly the budget", streaming | {"budget": 1}, eight),
        evict("budget_n", fits, streaming | {"budget": 8}, eight),
        evict("budget_above_n", fits, streaming | {"budget": 9}, eight),
        evict("budget_all", fits, streaming | {"budget": 1.0}, eight),
        evict("random", "the draw of seed, layer and head", draw, wide),
        evict("random_layer", "the draw of seed, layer and head", draw, wide, layer=1, num_layers=2),
        evict("random_seed", "the draw of seed, layer and head", draw | {"seed": 8}, wide),
        evict("random_padding", "padding does not shift the draw", draw, two, valid=left),
        evict("snapkv", window, snap, eight, attention=rows),
        evict("snapkv_max_heads", window, snap | {"group_reduction": "max"}, eight, attention=rows),
        evict("snapkv_sum_heads", window, snap | {"group_reduction": "sum"}, eight, attention=rows),
        evict("snapkv_max_pooling", window, snap | {"pooling": "max", "kernel_size": 3}, eight, attention=rows),
        evict("snapkv_avg_pooling", window, snap | {"kernel_size": 3}, eight, attention=rows, tolerance=CLOSE),
        evict("snapkv_sinks", window, snap | {"num_sinks": 1}, eight, attention=rows),
        evict(
            "snapkv_budget_below_window",
            "protected tokens fill the budget",
            snap | {"budget": 1},
            eight,
            attention=rows,
        ),
        evict("snapkv_queries", window, snap, eight, queries=queries, tolerance=CLOSE),
        evict(
            "snapkv_queries_padding",
            window,
            snap,
            two,
            valid=left,
            tolerance=CLOSE,
            queries=numbers([vectors.decode(queries["data"])[0]] * 2),
        ),
        evict("graphkv", "decay over the base", decay, recent),
        evict("graphkv_sum", "decay over the base", sent(accumulation="sum"), recent),
        evict("graphkv_enhance", "signals", sent(name="Enhance"), recent),
        evict("graphkv_evict", "signals", barred, recent),
        evict("graphkv_two_rounds", "fixed sources", sent(rounds=2), recent),
        evict(
            "graphkv_recompute",
            "sources chosen anew",
            sent(name="Enhance", rounds=2, recompute_sources=True),
            recent,
        ),
        evict("graphkv_strength", "strength", sent(strength=0.5), recent),
        evict("graphkv_padding", "padding is not counted", decay, two_recent, valid=left),
        evict("graphkv_no_sources", same, sent(source_ratio=0.0), recent),
        evict("graphkv_no_neighbors", same, sent(neighbors=0), recent),
        evict("graphkv_no_rounds", same, sent(rounds=0), recent),
        evict("graphkv_nothing_open", counts, decay | {"base": streaming | {"num_sinks": 4}}, recent),
        evict("graphkv_one_source_at_least", counts, sent(source_ratio=0.1), recent),
        evict("graphkv_neighbor_share", counts, sent(neighbors=0.7), recent),
        evict(
            "graphkv_over_snapkv",
            counts,
            sent(source_ratio=0.5, neighbors=1) | {"base": snap},
            recent,
            attention=rows,
        ),
        evict("graphkv_over_random", "decay over the base", decay | {"base": draw}, recent, tolerance=CLOSE),
        evict("graphkv_degree", "the degree signal", apart, eight),
        evict("graphkv_degree_cube", "the degree signal", graph | {"signal": square | {"exponent": 3}}, eight),
        evict("graphkv_degree_max_rank", "the degree signal", ranks, eight),
        evict("graphkv_degree_mean_rank", "the degree signal", middle, eight),
        evict("graphkv_degree_padding", "padding is not counted", apart, two, valid=pairs),
        evict("graphkv_degree_padding_ranks", "padding is not counted", ranks, two, valid=pairs),
        evict("graphkv_degree_over_snapkv", "the degree signal", apart | {"base": snap}, eight, attention=rows),
        evict(
            "graphkv_degree_over_graphkv",
            "the degree signal",
            apart | {"base": sent(neighbors=1, source_ratio=0.5)},
            eight,
        ),
        evict(
            "graphkv_degree_unrotated",
            "unrotated keys are compared where the policy says so",
            apart | {"unrotated": True},
            recent,
            unrotated_keys=eight,
        ),
        evict(
            "graphkv_unrotated",
            "unrotated keys are compared where the policy says so",
            decay | {"unrotated": True},
            eight,
            unrotated_keys=recent,
        ),
        evict("graphkv_pagerank", "the PageRank signal", spread_out, eight, tolerance=CLOSE),
        evict("graphkv_pagerank_padding", "padding is not counted", spread_out, two, valid=pairs, tolerance=CLOSE),
        evict(
            "graphkv_pagerank_over_snapkv",
            "the PageRank signal",
            spread_out | {"base": snap},
            eight,
            attention=rows,
            tolerance=CLOSE,
        ),
        evict("graphkv_degree_fits", fits, apart | {"base": streaming | {"budget": 8}}, eight),
        evict("graphkv_fits", fits, decay | {"base": streaming | {"budget": 8}}, recent),
    ]


# --- merges -----------------------------------------------------------------------------------------------------------


def add(name: str, rule: str, rows: Any, into: Any, num_slots: int, dtype: str = "float32") -> dict[str, Any]:
    """Make a case of sum_rows."""
    rows = rows if isinstance(rows, dict) else numbers(rows, dtype)
    into = into if isinstance(into, dict) else numbers(into, "int64")
    return case("sum_rows", name, rule, rows=rows, into=into, num_slots=num_slots)


def sum_cases() -> list[dict[str, Any]]:
    """Cover the primitive of merges."""
    sums, none, order = "rows add up in their slot", "-1 goes nowhere", "the order of tokens does not matter"
    rows = [[1, 0.5], [2, -1], [4, 0.25], [8, 0]]
    return [
        add("two_slots", sums, rows, [0, 1, 0, 1], 2),
        add("one_slot", sums, rows, [0, 0, 0, 0], 1),
        add("each_its_own", sums, rows, [0, 1, 2, 3], 4),
        add("backwards", order, rows[::-1], [1, 0, 1, 0], 2),
        add("nowhere", none, rows, [-1, 0, -1, 0], 1),
        add("all_nowhere", none, rows, [-1, -1, -1, -1], 2),
        add("empty_slots", "a slot without rows is 0", rows, [2, 2, 2, 2], 4),
        add("no_slots", "shapes never depend on values", rows, [-1, -1, -1, -1], 0),
        add("no_tokens", "shapes never depend on values", numbers([], shape=(0, 2)), numbers([], "int64", (0,)), 2),
        add("no_entries", "shapes never depend on values", numbers([], shape=(3, 0)), [0, 1, 1], 2),
        add("infinite_and_nan", sums, [[inf, 1], [1, nan], [-inf, 2], [2, 3]], [0, 1, 2, 3], 4),
        add("nan_goes_nowhere", none, [[nan, nan], [1, 2]], [-1, 0], 1),
        add("rows_are_independent", "leading axes", [rows, rows[::-1]], [[0, 1, 0, 1], [-1, 0, 1, 1]], 2),
        add("float64_is_not_narrowed", "arithmetic", [[1, 2], [2**-40, 0]], [0, 0], 1, "float64"),
        add("half_is_widened", "arithmetic", [[65504, 1], [65504, 0.5]], [0, 0], 1, "float16"),
    ]


def merge_cases() -> list[dict[str, Any]]:
    """Cover policies that merge: what is kept, what its keys and values become, what it counts as."""
    # Tokens 3 and 5 resemble the kept 6 and 7 most; 4 is a duplicate of 6.
    twin = [A, KEYS[4], KEYS[0], KEYS[1], B, KEYS[2], B, TOKENS["0, 1/2"]]
    content = [[float(2**i), -float(i)] for i in range(8)]
    keys, values = numbers([[twin]]), numbers([[content]])
    two, two_values = numbers([[twin], [twin]]), numbers([[content], [content]])
    left = mask([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    base = {"name": "StreamingLLM", "budget": 3, "num_sinks": 1}
    absorb = {"name": "Absorb", "base": base, "threshold": 0.75, "weights": "count", "window": 2}
    d2o = {
        "name": "D2O", "base": base, "weights": "exponential", "own_weight": 2.0, "statistic": "max", "momentum": 0.5,
        "targets": "not_sinks", "mass": "count", "layer_budgets": "exact", "variance": "normalized", "window": 2,
    }  # fmt: skip
    # The two presets of D2O, with one sink in place of four.
    heavy = {
        "name": "H2O", "budget": 4, "num_sinks": 1, "num_recent": 1, "group_reduction": "sum", "age_normalized": False,
        "block_size": 64,
    }  # fmt: skip
    paper = d2o | {
        "base": heavy, "own_weight": e, "momentum": 0.7, "mass": "one", "variance": "raw", "window": 32,
    }  # fmt: skip
    official = paper | {
        "base": heavy | {"budget": 3}, "weights": "mean", "statistic": "mean", "momentum": 0.5,
        "targets": "all", "layer_budgets": "code", "variance": "normalized",
    }  # fmt: skip
    merger = {"name": "KVMerger", "base": base, "heavy": 1, "threshold": 0.5, "sigma": 1.0, "mass": "count"}
    weighted = {"name": "WeightedKV", "base": base, "mass": "one", "window": 2}
    generator = random.Random(2510)
    queries = numbers([[[[generator.randint(-8, 8) / 4 for _ in range(5)] for _ in range(2)] for _ in range(2)]])
    both = numbers([vectors.decode(queries["data"])[0]] * 2)
    # Queries of all tokens, for attention that is summed over all of them.
    drawn = [[[generator.randint(-8, 8) / 4 for _ in range(5)] for _ in range(8)] for _ in range(2)]
    whole, wholes = numbers([drawn]), numbers([drawn, drawn])
    nearest, one, runs = "a dropped token goes into the most similar kept one", "one member", "runs of like neighbors"
    right = "a dropped value goes into the next kept token"
    moving = "the threshold moves with what was merged"
    presets = "the choices of the paper and of its official code, with one sink"

    def made(name: str, rule: str, policy: dict[str, Any], **given: Any) -> dict[str, Any]:
        options = {"keys": keys, "values": values, "queries": queries, "tolerance": CLOSE} | given
        return evict(name, rule, policy, options.pop("keys"), **options)

    return [
        made("absorb_by_count", nearest, absorb),
        made("absorb_by_attention", nearest, absorb | {"weights": "attention"}),
        made("absorb_duplicates_only", nearest, absorb | {"threshold": 1.0}),
        made("absorb_everything", nearest, absorb | {"threshold": -1.0}),
        made("absorb_ties", "equal similarity: lower index first", absorb, keys=numbers([[[A] * 8]])),
        made("absorb_nothing", one, absorb, keys=numbers([[[A, *[[-x for x in A]] * 5, A, B]]])),
        made("absorb_padding", "padding goes nowhere", absorb, keys=two, values=two_values, queries=both, valid=left),
        made("absorb_fits", "N <= budget keeps everything", absorb | {"base": base | {"budget": 8}}),
        made("absorb_keeps_nothing", "exactly the budget", absorb | {"base": base | {"budget": 0}}),
        made("d2o", moving, d2o),
        made("d2o_mean", moving, d2o | {"statistic": "mean"}),
        made("d2o_padding", "padding goes nowhere", d2o, keys=two, values=two_values, queries=both, valid=left),
        made("d2o_paper", presets, paper, queries=whole),
        made("d2o_paper_padding", presets, paper, keys=two, values=two_values, queries=wholes, valid=left),
        made("d2o_official", presets, official, queries=whole),
        made("d2o_official_padding", presets, official, keys=two, values=two_values, queries=wholes, valid=left),
        made("kvmerger", runs, merger),
        made("kvmerger_all", runs, merger | {"threshold": -1.0}),
        made("kvmerger_padding", "padding goes nowhere", merger, keys=two, values=two_values, queries=both, valid=left),
        made("weightedkv", right, weighted),
        made("weightedkv_attention", right, weighted | {"mass": "attention"}),
        made("weightedkv_padding", right, weighted, keys=two, values=two_values, queries=both, valid=left),
    ]


# --- errors ----------------------------------------------------------------------------------------------------------


def error_cases() -> list[dict[str, Any]]:
    """Cover section 6: what is refused, before any arithmetic."""
    up = [8, 4, 2, 1, 0, 0.5]
    rule = "options out of range"
    kinds = "wrong types"
    shapes = "shapes that disagree"
    once = "a sum is for one round only, whatever the signal"
    foreign = "options of another fusion"
    base = {"name": "GraphKV", "base": {"name": "StreamingLLM", "budget": 2, "num_sinks": 0}}
    return [
        spread("iterated_sum", once, up, accumulation="sum", rounds=2),
        spread("sum_without_rounds", once, up, accumulation="sum", rounds=0),
        spread("sum_without_rounds_evict", once, up, accumulation="sum", rounds=0, signal="evict"),
        spread("iterated_sum_evict", once, up, accumulation="sum", rounds=2, signal="evict"),
        spread("iterated_sum_without_strength", once, up, accumulation="sum", rounds=2, strength=0.0),
        spread("strength_above_1", rule, up, strength=1.5),
        spread("strength_nan", rule, up, strength="NaN"),
        spread("unknown_signal", rule, up, signal="forget"),
        spread("unknown_accumulation", rule, up, accumulation="mean"),
        spread("negative_rounds", rule, up, rounds=-1),
        spread("float_rounds", kinds, up, rounds=1.5),
        spread("another_n", shapes, up[:5]),
        spread("graph_does_not_broadcast", shapes, [up, up]),
        spread("bool_importance", kinds, mask([1, 0, 1, 1, 0, 1])),
        choose("negative_budget", rule, [1, 2], -1),
        choose("float_budget_in_select", kinds, [1, 2], 0.5),
        choose("another_mask", shapes, [1, 2, 3], 1, valid=[1, 1]),
        choose("no_axis", shapes, numbers(1.0), 1),
        choose("mask_does_not_broadcast", shapes, [[1, 2, 3], [3, 2, 1]], 1, valid=[1, 1, 1]),
        choose("bool_scores", kinds, mask([1, 0, 1]), 1),
        build("negative_sources", rule, num_sources=-1),
        build("negative_neighbors", rule, num_neighbors=-1),
        build("float_sources", kinds, num_sources=0.5),
        build("chunk_0", rule, chunk_size=0),
        build("another_n_of_importance", shapes, importance=[1, 2]),
        build("mask_of_numbers", kinds, valid=numbers([1] * 8)),
        compare("mask_of_keys", shapes, KEYS[:2], [1, 1, 1]),
        compare("keys_without_tokens", shapes, numbers([1, 2])),
        join("unknown_fusion", rule, [1, 2], [0, 0], fusion="sum"),
        join("exponent_0", rule, [1, 2], [0, 0], exponent=0),
        join("exponent_0_of_ranks", rule, [1, 2], [0, 0], exponent=0, fusion="max_rank"),
        join("float_exponent", kinds, [1, 2], [0, 0], exponent=2.0),
        join("another_n_of_degrees", shapes, [1, 2], [0, 0, 0]),
        flow("damping_above_1", rule, [1, 2], [A, B], damping=1.5),
        flow("damping_of_a_word", kinds, [1, 2], [A, B], damping="much"),
        flow("negative_rounds_of_pagerank", rule, [1, 2], [A, B], rounds=-1),
        flow("another_n_of_keys", shapes, [1, 2], [A, B, A]),
        flow("mask_of_another_n", shapes, [1, 2], [A, B], valid=[1, 1, 1]),
        evict(
            "exponent_of_ranks",
            foreign,
            base | {"signal": {"name": "Degree", "fusion": "max_rank", "exponent": 2}},
            numbers([[KEYS]]),
        ),
        evict("share_above_1", rule, {"name": "StreamingLLM", "budget": 1.5, "num_sinks": 0}, numbers([[KEYS]])),
        evict("share_0", rule, {"name": "StreamingLLM", "budget": 0.0, "num_sinks": 0}, numbers([[KEYS]])),
        evict(
            "layer_out_of_range",
            rule,
            {"name": "StreamingLLM", "budget": 2, "num_sinks": 0},
            numbers([[KEYS]]),
            layer=1,
        ),
    ]


FILES = {
    "order": ("The one total order: ties, zeros, NaN, infinities, tiers.", order_cases),
    "build_graph": ("Step 1: sources, edges, weights, fillers.", graph_cases),
    "propagate": ("Step 2: signals, accumulation, rounds, strength.", propagate_cases),
    "degree": ("The degree signal: the mean cosine with all tokens.", degree_cases),
    "fuse": ("The degree signal: importance and distance in one score.", fuse_cases),
    "pagerank": ("The PageRank signal: importance that flows between like tokens.", pagerank_cases),
    "select": ("Step 3: exactly the budget, protected first, padding last.", select_cases),
    "sum_rows": ("The primitive of merges: rows add up in slots.", sum_cases),
    "figure": ("The worked example of the paper's method figure.", figure_cases),
    "counts": ("From shares to numbers of tokens.", count_cases),
    "policies": ("One layer by policy: StreamingLLM, Random, SnapKV and GraphKV over them.", policy_cases),
    "merging": ("One layer by policies that merge: Absorb, D2O, KVMerger and WeightedKV.", merge_cases),
    "errors": ("What must be refused. The names are the exceptions of graphkv; translate them.", error_cases),
}


def in_float64(item: dict[str, Any]) -> dict[str, Any]:
    """Return the case with float64 in place of float32."""
    return json.loads(json.dumps(item["arguments"]).replace('"float32"', '"float64"'))


def work_out(item: dict[str, Any]) -> dict[str, Any]:
    """Add what is expected, after two more computations agree."""
    given = copy.deepcopy(item)
    # A case with a tolerance is worked out in float64, so that its numbers are the true ones.
    wide = given | {"arguments": in_float64(given)}
    expected = vectors.run(given, BACKEND)
    others = [(given, PORTABLE), (wide, BACKEND), (wide, PORTABLE)]
    for other, backend in others[:1] if item["rule"] == RANGE else others:
        got = json.loads(json.dumps(vectors.run(other, backend)).replace('"float64"', '"float32"'))
        plain = json.loads(json.dumps(expected).replace('"float64"', '"float32"'))
        lines = vectors.differences(plain, got, item["tolerance"])
        if lines:
            raise AssertionError(f"{item['name']} is not exact: {lines}")
    if item["tolerance"] is not None:
        expected = rounded(merge(expected, vectors.run(wide, BACKEND)))
    return item | {"expected": expected}


def merge(narrow: Any, wide: Any) -> Any:
    """Return the numbers of `wide` with the dtypes of `narrow`."""
    if isinstance(narrow, dict):
        return {key: narrow[key] if key == "dtype" else merge(narrow[key], wide[key]) for key in narrow}
    return wide


def rounded(data: Any) -> Any:
    """Keep 12 digits, so that another processor's last bits do not show."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    return float(f"{data:.12g}") if isinstance(data, float) else data


def text(data: Any, indent: int = 0) -> str:
    """Write JSON with short lists and objects on one line."""
    line = json.dumps(data)
    if len(line) + indent <= 110 or not isinstance(data, dict | list) or not data:
        return line
    pad = " " * (indent + 1)
    if isinstance(data, dict):
        body = [f"{pad}{json.dumps(key)}: {text(value, indent + 1)}" for key, value in data.items()]
        return "{\n" + ",\n".join(body) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(pad + text(value, indent + 1) for value in data) + "\n" + " " * indent + "]"


def documents() -> dict[str, str]:
    """Work out all files."""
    found = {}
    for name, (about, cases) in FILES.items():
        worked = [work_out(item) for item in cases()]
        names = [item["name"] for item in worked]
        if len(set(names)) != len(names):
            raise AssertionError(f"{name}: a case name stands twice")
        found[name] = text({"version": 1, "about": about, "cases": worked}) + "\n"
    return found


def is_current(name: str, new: str) -> bool:
    """Compare a file with what it should be: text, or numbers within a tenth of a case's tolerance."""
    path = vectors.HERE / f"{name}.json"
    if not path.exists():
        return False
    old = path.read_text(encoding="utf-8")
    if old == new:
        return True
    a, b = json.loads(old), json.loads(new)
    if [{**c, "expected": 0} for c in a["cases"]] != [{**c, "expected": 0} for c in b["cases"]]:
        return False
    for x, y in zip(a["cases"], b["cases"], strict=True):
        tolerance = x["tolerance"] and {key: value / 10 for key, value in x["tolerance"].items()}
        if vectors.differences(x["expected"], y["expected"], tolerance):
            return False
    return True


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    stale = []
    for name, new in documents().items():
        if check:
            stale += [] if is_current(name, new) else [f"{name}.json"]
        else:
            (vectors.HERE / f"{name}.json").write_text(new, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/vectors/generate.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
