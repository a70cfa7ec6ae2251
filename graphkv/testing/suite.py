"""Properties that every backend must have: one claim a function, on drawn inputs, over a ``backend`` fixture.

The fixture must have pytest's ``session`` scope and give a `graphkv.Backend` (or a `graphkv.testing.Subject`). The
option ``--graphkv-backend`` brings one; see `graphkv.testing` for writing it by hand.

Fixed examples are in `graphkv.testing.examples`, and run with this module.

Claims about values are held against `graphkv.testing.oracle`, which is Python loops; the margin rule for inexact
inputs is in `graphkv.testing.asserts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import graphkv

from ..core import primitives
from ..core.attention import received_attention
from ..core.backend import Backend, load
from ..core.eviction import Eviction, evict
from ..core.extras import needs
from ..core.fusion import degree, fuse
from ..core.graph import build_graph
from ..core.graphkv import GraphKV
from ..core.pagerank import pagerank
from ..core.propagation import propagate
from ..core.selection import select
from ..core.signals import Bar, Decay, Degree, Enhance, PageRank, Signal
from ..core.types import Array, Graph
from . import asserts, oracle
from .examples import *  # noqa: F403 - properties of this module too, and the first to run

with needs("graphkv.testing.suite", "testing"):
    from hypothesis import assume, example, given, settings
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays

    from . import strategies
    from .strategies import Edges, Layer

# A library may compile at its first call.
unhurried = settings(deadline=None)
EXAMPLES = settings.default.max_examples if settings.default else 5
# Every example is a loop over all dtypes.
several = settings(deadline=None, max_examples=max(min(5, EXAMPLES), EXAMPLES // 5))
# Loops over 10^4 tokens take their time; under the default profile that is still some examples.
large = settings(deadline=None, max_examples=max(min(5, EXAMPLES), EXAMPLES // 20))

FLOATS = ("float32", "float64")
ALL_DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8")
ACCUMULATIONS = st.sampled_from(["product", "sum"])
SIGNALS = st.sampled_from(["decay", "enhance", "evict"])
FACTORS: dict[str, type[Signal]] = {"decay": Decay, "enhance": Enhance}
# Two bits each, so that products stay exact.
STRENGTHS = st.sampled_from([1.0, 0.5])
FUSIONS = st.sampled_from(["power", "max_rank", "mean_rank"])
# Multiples of 1/16 below 1, where a distance of 0 is clipped: with 9 bits of score, two factors stay exact.
EXACT_DEGREES = st.integers(-16, 15).map(lambda i: i / 16)
DRAWS = st.data()


# ------------------------------------------------------------------------------------------------- top_k and segments


@unhurried
@given(data=DRAWS, scores=strategies.scores((7,)), dtype=st.sampled_from(FLOATS))
@example(data=None, scores=np.zeros(7), dtype="float32")
def test_top_k_agrees_with_the_oracle(backend: Backend, data: Any, scores: NDArray[Any], dtype: str) -> None:
    """Higher score first, then lower index; NaN after every number, and -0.0 is 0.0."""
    k = 3 if data is None else data.draw(st.integers(0, 7))
    x = asserts.make(backend, scores, dtype)

    found = primitives.top_k(x, k, backend=backend)

    asserts.equal(found, _int(oracle.top_k(scores.tolist(), k)), backend=backend, like=x)


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), num_tokens=st.integers(0, 9), dtype=st.sampled_from(FLOATS))
def test_top_k_ranks_rows_and_tiers_apart(
    backend: Backend, data: Any, leading: tuple[int, ...], num_tokens: int, dtype: str
) -> None:
    """A lower tier comes first, whatever the score."""
    shape = (*leading, num_tokens)
    scores = data.draw(strategies.scores(shape))
    tiers = data.draw(arrays(np.int32, shape, elements=st.integers(0, 3), fill=st.nothing()))
    k = data.draw(st.integers(0, num_tokens))
    x = asserts.make(backend, scores, dtype)

    found = primitives.top_k(x, k, asserts.make(backend, tiers), backend=backend)

    wanted = np.zeros((*leading, k), dtype=np.int64)
    for row in np.ndindex(*leading):
        wanted[row] = oracle.top_k(scores[row].tolist(), k, tiers[row].tolist())
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), dtype=st.sampled_from(FLOATS))
def test_segment_product_multiplies_what_shares_an_index(
    backend: Backend, data: Any, leading: tuple[int, ...], dtype: str
) -> None:
    """Duplicates multiply, rows are apart, and a segment without values is 1."""
    values, index, num_segments = data.draw(_segments(leading, st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0])))
    x = asserts.make(backend, values, dtype)

    found = primitives.segment_product(x, asserts.make(backend, index), num_segments, backend=backend)

    wanted = np.ones((*leading, num_segments), dtype=dtype)
    for *row, e in np.ndindex(*values.shape):
        wanted[(*row, index[(*row, e)])] *= values[(*row, e)]
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), dtype=st.sampled_from(FLOATS))
def test_segment_sum_adds_what_shares_an_index(
    backend: Backend, data: Any, leading: tuple[int, ...], dtype: str
) -> None:
    """Duplicates add, rows are apart, and a segment without values is 0."""
    values, index, num_segments = data.draw(_segments(leading, strategies.exact()))
    x = asserts.make(backend, values, dtype)

    found = primitives.segment_sum(x, asserts.make(backend, index), num_segments, backend=backend)

    wanted = np.zeros((*leading, num_segments), dtype=dtype)
    for *row, e in np.ndindex(*values.shape):
        wanted[(*row, index[(*row, e)])] += values[(*row, e)]
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), size=st.sampled_from([1, 3]), dtype=st.sampled_from(FLOATS))
def test_sum_rows_adds_what_goes_into_a_slot(
    backend: Backend, data: Any, leading: tuple[int, ...], size: int, dtype: str
) -> None:
    """Rows of one slot add, -1 goes nowhere, heads are apart, and a slot without rows is 0."""
    _, into, num_slots = data.draw(_segments(leading, strategies.exact()))
    into = into - data.draw(arrays(np.int64, into.shape, elements=st.integers(0, 1), fill=st.nothing()))
    rows = data.draw(strategies.scores((*into.shape, size), elements=strategies.exact()))
    x = asserts.make(backend, rows, dtype)

    found = primitives.sum_rows(x, asserts.make(backend, into), num_slots, backend=backend)

    wanted = np.zeros((*leading, num_slots, size), dtype=dtype)
    for *row, j in np.ndindex(*into.shape):
        if into[(*row, j)] >= 0:
            wanted[(*row, into[(*row, j)])] += rows[(*row, j)].astype(dtype)
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, num_tokens=st.integers(0, 7), groups=st.integers(1, 2), dtype=st.sampled_from(FLOATS))
def test_received_attention_agrees_with_the_oracle(
    backend: Backend, data: Any, num_tokens: int, groups: int, dtype: str
) -> None:
    """Causal, softmax over what a query sees, padding left out whatever it holds, and blocks make no difference."""
    batch, kv_heads, head_size = 2, 2, 3
    rows = (batch, kv_heads * groups, data.draw(st.integers(0, num_tokens)), head_size)
    queries = data.draw(arrays(np.float64, rows, elements=strategies.general()))
    keys = data.draw(arrays(np.float64, (batch, kv_heads, num_tokens, head_size), elements=strategies.general()))
    valid = data.draw(arrays(np.bool_, (batch, kv_heads, num_tokens), fill=st.nothing()))
    x = asserts.make(backend, np.where(valid[..., None], keys, np.nan), dtype)

    found = received_attention(
        asserts.make(backend, queries, dtype),
        x,
        asserts.make(backend, valid),
        block_size=data.draw(st.integers(1, 4)),
        backend=backend,
    )

    wanted = np.zeros((batch, kv_heads, groups, num_tokens), dtype=asserts.wide(backend, dtype))
    for b, h, g in np.ndindex(*wanted.shape[:-1]):
        wanted[b, h, g] = oracle.received(queries[b, h * groups + g].tolist(), keys[b, h].tolist(), valid[b, h])
    asserts.close(found, wanted, backend=backend, like=x, scale=1.0)


# -------------------------------------------------------------------------------------------------------- build_graph


@unhurried
@given(layer=strategies.layers(), dtype=st.sampled_from(FLOATS))
def test_graph_agrees_with_the_oracle(backend: Backend, layer: Layer, dtype: str) -> None:
    """Sources, neighbors and weights, exactly: ties, zero keys, padding, K above N, chunks and empty batches."""
    keys, graph = _graph(backend, layer, dtype)

    asserts.graph_equal(graph, *_oracle_graph(layer, asserts.wide(backend, dtype)), backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(keys=strategies.general_keys, leading=st.sampled_from([(), (2,)]), min_tokens=1))
def test_graph_of_general_keys_lies_within_the_margin(backend: Backend, layer: Layer) -> None:
    """Weights are the cosines to within the tolerance, and no better neighbor is left out."""
    keys, graph = _graph(backend, layer, "float32")

    sources, neighbors, weights = _oracle_graph(layer, "float32")
    asserts.equal(graph.sources, sources, backend=backend, like=keys)
    asserts.close(graph.weights, weights, backend=backend, like=keys, scale=1.0)
    found, edge = asserts.values(backend, graph.neighbors), asserts.values(backend, graph.weights)
    valid = np.ones(layer.importance.shape, np.bool_) if layer.valid is None else layer.valid
    for *row, k in np.ndindex(*sources.shape):
        source, real = sources[(*row, k)], neighbors[(*row, k)] != oracle.FREE
        cosines = [max(0.0, oracle.cosine(layer.keys[(*row, source)], key)) for key in layer.keys[tuple(row)]]
        eligible = [j for j in range(layer.num_tokens) if valid[(*row, j)] and j not in sources[tuple(row)]]
        if valid[(*row, source)]:
            asserts.chosen(found[(*row, k)][real].tolist(), cosines, eligible=eligible, dtype="float32")
            wanted = np.asarray([cosines[j] for j in found[(*row, k)][real]])
            np.testing.assert_allclose(edge[(*row, k)][real], wanted, rtol=0, atol=asserts.tolerance("float32"))


@unhurried
@given(layer=strategies.layers(min_tokens=2))
def test_no_edge_leads_to_a_source_or_to_padding(backend: Backend, layer: Layer) -> None:
    """Nor does one start at padding; such edges may fill a row with weight 0."""
    _, graph = _graph(backend, layer)

    sources, neighbors = asserts.values(backend, graph.sources), asserts.values(backend, graph.neighbors)
    weights = asserts.values(backend, graph.weights)
    for *row, k, m in np.argwhere(weights > 0).tolist():
        token, source = neighbors[(*row, k, m)], sources[(*row, k)]
        assert token not in sources[tuple(row)]
        assert layer.valid is None or (layer.valid[(*row, token)] and layer.valid[(*row, source)])
    assert np.all((weights >= 0) & (weights <= 1))


@unhurried
@given(layer=strategies.layers(keys=strategies.general_keys, leading=st.just(()), min_tokens=2), data=DRAWS)
def test_a_key_without_direction_has_no_edges(backend: Backend, layer: Layer, data: Any) -> None:
    """A zero key, and one that holds an infinity or NaN, has weight 0 to all."""
    token = data.draw(st.integers(0, layer.num_tokens - 1))
    layer.keys[token] = data.draw(st.sampled_from([0.0, -0.0]))
    layer.keys[token, 0] = data.draw(st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan]))

    _, graph = _graph(backend, layer)

    sources, neighbors = asserts.values(backend, graph.sources), asserts.values(backend, graph.neighbors)
    weights = asserts.values(backend, graph.weights)
    assert np.all(weights[sources == token] == 0)
    assert np.all(weights[neighbors == token] == 0)
    assert np.all((weights >= 0) & (weights <= 1))


@unhurried
@given(layer=strategies.layers(min_tokens=1))
def test_chunk_size_never_matters(backend: Backend, layer: Layer) -> None:
    """The graph is the same for every chunk size."""
    _, whole = _graph(backend, _replaced(layer, chunk_size=None))

    for chunk_size in {1, 2, 3, layer.num_tokens - 1 or 1, layer.num_tokens, layer.chunk_size or 1}:
        keys, chunked = _graph(backend, _replaced(layer, chunk_size=chunk_size))

        _same_graph(chunked, whole, backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(min_tokens=1), data=DRAWS)
def test_appended_padding_never_matters(backend: Backend, layer: Layer, data: Any) -> None:
    """Whatever padding holds, infinities and NaN included: graph, scores and choice stay the same."""
    num_tokens, num_padding = layer.num_tokens, data.draw(st.integers(1, 3))
    # K and M are clipped by N, padding included; without clipping there is nothing but values to differ.
    num_sources = min(layer.num_sources, num_tokens)
    layer = _replaced(layer, num_sources=num_sources, num_neighbors=min(layer.num_neighbors, num_tokens - num_sources))
    junk = data.draw(strategies.special())
    valid = np.ones(layer.importance.shape, np.bool_) if layer.valid is None else layer.valid
    longer_valid = _append(valid, num_padding, False)
    padded = _replaced(
        layer,
        keys=_append(layer.keys, num_padding, junk, axis=-2),
        importance=_append(layer.importance, num_padding, data.draw(strategies.special())),
        valid=longer_valid,
        protected=None if layer.protected is None else _append(layer.protected, num_padding, True),
    )
    budget = min(layer.budget, num_tokens)

    keys, graph = _graph(backend, layer)
    _, longer = _graph(backend, padded)
    scores, longer_scores = _scores(backend, layer, graph), _scores(backend, padded, longer)

    asserts.equal(longer_scores[..., :num_tokens], scores, backend=backend, like=keys)
    kept = asserts.values(backend, _selected(backend, _replaced(layer, valid=valid), scores, budget))
    longer_kept = asserts.values(backend, _selected(backend, padded, longer_scores, budget))
    for row in np.ndindex(*layer.leading):
        # Which padding fills a row that has too few valid tokens has no effect and may differ.
        assert _links(backend, longer, row) == _links(backend, graph, row)
        assert _chosen_valid(longer_kept[row], longer_valid[row]) == _chosen_valid(kept[row], valid[row])


@unhurried
@given(data=DRAWS, num_tokens=st.integers(1, 8))
def test_graph_follows_a_permutation_of_distinct_tokens(backend: Backend, data: Any, num_tokens: int) -> None:
    """With distinct scores, sources move with their tokens and keep the weights of their edges."""
    fixed = st.just(())
    layer = data.draw(strategies.layers(leading=fixed, min_tokens=num_tokens, max_tokens=num_tokens))
    layer = _replaced(layer, importance=data.draw(strategies.distinct_scores((num_tokens,))))
    order = np.asarray(data.draw(st.permutations(range(num_tokens))), dtype=np.int64)

    keys, graph = _graph(backend, layer)
    _, moved = _graph(backend, layer.take(order))

    origin = order[asserts.values(backend, moved.sources)]
    back = np.argsort(origin)
    valid = np.ones(num_tokens, np.bool_) if layer.valid is None else layer.valid
    asserts.equal(graph.sources, origin[back], backend=backend, like=keys)
    # Ties between neighbors may fall otherwise; the weights of a row do not depend on how.
    asserts.equal(graph.weights, asserts.values(backend, moved.weights)[back], backend=backend, like=keys)
    assert np.all(asserts.values(backend, graph.weights)[~valid[origin[back]]] == 0)


# ---------------------------------------------------------------------------------------------------------- propagate


@unhurried
@given(
    data=DRAWS,
    leading=strategies.leading_shapes(),
    signal=SIGNALS,
    accumulation=ACCUMULATIONS,
    strength=STRENGTHS,
    dtype=st.sampled_from(FLOATS),
)
def test_propagation_agrees_with_the_oracle(
    backend: Backend, data: Any, leading: tuple[int, ...], signal: str, accumulation: str, strength: float, dtype: str
) -> None:
    """Every signal, accumulation and strength, exactly: scores of either sign, ties, infinities and NaN."""
    rounds = 1 if accumulation == "sum" else data.draw(st.sampled_from([1, 2, 1, 0]))
    # 8 bits of score and 3 a factor: three edges in one round or two rounds of two fill float32.
    edges = data.draw(
        strategies.edges(leading, data.draw(strategies.token_counts()), max_sources=3 if rounds < 2 else 2)
    )
    importance = data.draw(strategies.scores((*leading, edges.num_tokens)))
    options: dict[str, Any] = {"signal": signal, "rounds": rounds, "accumulation": accumulation, "strength": strength}

    x, found = _propagated(backend, importance, edges, dtype, **options)

    wanted = _oracle_scores(importance, edges, **options).astype(asserts.wide(backend, dtype))
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, signal=SIGNALS, accumulation=ACCUMULATIONS, strength=strategies.unit())
def test_propagation_of_general_numbers_is_close_to_the_oracle(
    backend: Backend, data: Any, signal: str, accumulation: str, strength: float
) -> None:
    """Within the tolerance of the score."""
    rounds = 1 if accumulation == "sum" else data.draw(st.integers(0, 4))
    edges = _edges_of_any_weight(backend, data)
    importance = data.draw(strategies.scores((2, edges.num_tokens), elements=strategies.general()))
    options: dict[str, Any] = {"signal": signal, "rounds": rounds, "accumulation": accumulation, "strength": strength}

    x, found = _propagated(backend, importance, edges, "float32", **options)

    wanted = _oracle_scores(importance, edges, **options).astype(np.float32)
    asserts.close(found, wanted, backend=backend, like=x, scale=importance)


@unhurried
@given(data=DRAWS, signal=SIGNALS, accumulation=ACCUMULATIONS, nothing=st.sampled_from(["T", "K", "M", "g"]))
def test_propagation_of_nothing_returns_the_importance_bit_for_bit(
    backend: Backend, data: Any, signal: str, accumulation: str, nothing: str
) -> None:
    """No rounds, no sources, no neighbors or no strength: signed zeros, NaN and all."""
    most: dict[str, Any] = {"K": {"max_sources": 0}, "M": {"max_neighbors": 0}}.get(nothing, {})
    edges = data.draw(strategies.edges((2,), data.draw(st.integers(0, 6)), **most))
    importance = data.draw(strategies.scores((2, edges.num_tokens)))
    rounds = 0 if nothing == "T" and accumulation == "product" else 1
    strength = 0.0 if nothing == "g" or (nothing == "T" and rounds == 1) else 1.0

    x, found = _propagated(
        backend, importance, edges, signal=signal, rounds=rounds, accumulation=accumulation, strength=strength
    )

    asserts.identical(found, x, backend=backend, like=x)


@unhurried
@given(data=DRAWS, signal=SIGNALS, accumulation=ACCUMULATIONS, strength=strategies.unit())
def test_tokens_without_edges_keep_their_importance_bit_for_bit(
    backend: Backend, data: Any, signal: str, accumulation: str, strength: float
) -> None:
    """Sources among them."""
    edges = _edges_of_any_weight(backend, data)
    importance = data.draw(strategies.scores((2, edges.num_tokens)))

    x, found = _propagated(backend, importance, edges, signal=signal, accumulation=accumulation, strength=strength)

    kept = ~_reached(edges)
    before, after = asserts.values(backend, x), asserts.values(backend, found)
    np.testing.assert_array_equal(after[kept], before[kept])
    number = kept & ~np.isnan(before)
    np.testing.assert_array_equal(np.signbit(after[number]), np.signbit(before[number]))


@unhurried
@given(data=DRAWS, accumulation=ACCUMULATIONS, strength=strategies.unit(), rounds=st.integers(1, 3))
def test_decay_never_raises_and_enhance_never_lowers(
    backend: Backend, data: Any, accumulation: str, strength: float, rounds: int
) -> None:
    """For scores of either sign, infinities included."""
    edges = _edges_of_any_weight(backend, data)
    elements = st.one_of(strategies.general(), st.sampled_from([np.inf, -np.inf, 0.0]))
    importance = data.draw(strategies.scores((2, edges.num_tokens), elements=elements))
    options: dict[str, Any] = {
        "accumulation": accumulation,
        "strength": strength,
        "rounds": rounds if accumulation != "sum" else 1,
    }

    x, lower = _propagated(backend, importance, edges, signal="decay", **options)
    _, higher = _propagated(backend, importance, edges, signal="enhance", **options)

    before = asserts.values(backend, x)
    assert np.all(asserts.values(backend, lower) <= before)
    assert np.all(asserts.values(backend, higher) >= before)


@unhurried
@given(data=DRAWS, signal=st.sampled_from(["decay", "enhance"]), exponent=st.integers(-6, 6))
def test_the_product_is_scale_invariant(backend: Backend, data: Any, signal: str, exponent: int) -> None:
    """Scores twice as large stay twice as large, and the same tokens are chosen."""
    # Below 1, so that nothing is near the smallest float32, where scaling rounds.
    weights = st.floats(0, 0.9375, width=32)
    edges = data.draw(strategies.edges((2,), data.draw(strategies.token_counts(1)), weights=weights))
    importance = data.draw(strategies.scores((2, edges.num_tokens), elements=strategies.general()))
    rounds = data.draw(st.integers(1, 3))

    x, found = _propagated(backend, importance, edges, signal=signal, rounds=rounds)
    _, scaled = _propagated(backend, importance * 2.0**exponent, edges, signal=signal, rounds=rounds)

    wanted = asserts.values(backend, found) * np.float32(2.0**exponent)
    asserts.equal(scaled, wanted, backend=backend, like=x)
    budget = data.draw(strategies.budgets(edges.num_tokens))
    asserts.equal(
        select(scaled, budget, backend=backend), select(found, budget, backend=backend), backend=backend, like=x
    )


@unhurried
@given(data=DRAWS, signal=SIGNALS)
def test_two_rounds_are_one_round_twice(backend: Backend, data: Any, signal: str) -> None:
    """For scores of at least 0, where a round is a plain product."""
    edges = data.draw(strategies.edges((2,), data.draw(strategies.token_counts(1)), max_sources=2))
    importance = np.abs(data.draw(strategies.scores((2, edges.num_tokens), elements=strategies.exact())))

    x, twice = _propagated(backend, importance, edges, signal=signal, rounds=2)
    _, once = _propagated(backend, importance, edges, signal=signal)

    again = propagate(once, _as_graph(backend, edges), signal=signal, backend=backend)
    asserts.equal(twice, again, backend=backend, like=x)


@unhurried
@given(data=DRAWS, accumulation=ACCUMULATIONS, strength=st.floats(0.125, 1))
def test_evict_sends_what_an_edge_reaches_to_minus_infinity(
    backend: Backend, data: Any, accumulation: str, strength: float
) -> None:
    """And nothing else; an edge of weight 0 reaches nothing."""
    edges = _edges_of_any_weight(backend, data)
    importance = data.draw(strategies.scores((2, edges.num_tokens)))

    x, found = _propagated(backend, importance, edges, signal="evict", accumulation=accumulation, strength=strength)

    wanted = np.where(_reached(edges), -np.inf, asserts.values(backend, x)).astype(np.float32)
    asserts.identical(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, signal=SIGNALS, accumulation=ACCUMULATIONS)
def test_weights_outside_the_unit_interval_are_clipped(
    backend: Backend, data: Any, signal: str, accumulation: str
) -> None:
    """A weight above 1 counts as 1; one below 0, or NaN, is no edge."""
    wild = st.sampled_from([0.5, 1.0, 1.5, np.inf, -0.5, -np.inf, np.nan, -0.0])
    edges = data.draw(strategies.edges((2,), data.draw(strategies.token_counts(1)), weights=wild))
    tame = Edges(**{**vars(edges), "weights": np.clip(np.nan_to_num(edges.weights, nan=0.0), 0, 1)})
    importance = data.draw(strategies.scores((2, edges.num_tokens), elements=strategies.exact()))

    x, found = _propagated(backend, importance, edges, signal=signal, accumulation=accumulation)
    _, wanted = _propagated(backend, importance, tame, signal=signal, accumulation=accumulation)

    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, num_duplicates=st.integers(1, 4), num_others=st.integers(1, 4))
def test_a_duplicate_of_a_source_decays_to_the_bottom(
    backend: Backend, data: Any, num_duplicates: int, num_others: int
) -> None:
    """Below all others, still above 0, and among duplicates in order of the base importance."""
    num_tokens = 1 + num_duplicates + num_others
    source = strategies.EXACT_KEYS[-1]
    scales = data.draw(strategies.scores((num_duplicates,), elements=st.sampled_from([0.5, 1.0, 4.0])))
    others = data.draw(strategies.exact_keys((num_others,)))
    # The cosines of the pool are multiples of 1/16, so a token that is no duplicate keeps 1/16 of its score.
    assume(all(oracle.cosine(source, other) < 1 for other in others))
    keys = np.concatenate([source[None], scales[:, None] * source, others])
    importance = 1 + np.abs(data.draw(strategies.scores((num_tokens,), elements=strategies.exact())))
    importance[0] = 4.0
    layer = _layer(keys, importance, num_sources=1, num_neighbors=num_tokens)

    x, graph = _graph(backend, layer)
    found = propagate(asserts.make(backend, importance, "float32"), graph, backend=backend)

    after = asserts.values(backend, found)
    duplicates = after[1 : 1 + num_duplicates]
    base = importance[1 : 1 + num_duplicates]
    assert np.all(duplicates > 0)
    assert np.max(duplicates) < np.min(after[1 + num_duplicates :])
    np.testing.assert_allclose(duplicates, base * oracle.SMALLEST_FACTOR, rtol=asserts.tolerance("float32"))
    np.testing.assert_array_equal(np.argsort(-duplicates, kind="stable"), np.argsort(-base, kind="stable"))
    lowest = 1 + oracle.top_k(base.tolist(), num_duplicates)[-1]
    kept = _int([token for token in range(num_tokens) if token != lowest])
    asserts.equal(select(found, num_tokens - 1, backend=backend), kept, backend=backend, like=x)


# ---------------------------------------------------------------------------------------------------- degree and fuse


@unhurried
@given(layer=strategies.layers() | strategies.layers(keys=strategies.general_keys), dtype=st.sampled_from(FLOATS))
def test_degree_agrees_with_the_oracle(backend: Backend, layer: Layer, dtype: str) -> None:
    """The mean cosine of all pairs, padding left out: zero keys, duplicates, opposites and empty batches."""
    keys, found = _degree(backend, layer, dtype)

    wanted = _oracle_degree(layer).astype(asserts.wide(backend, dtype))
    asserts.close(found, wanted, backend=backend, like=keys, scale=1.0)


@unhurried
@given(data=DRAWS, num_tokens=st.sampled_from([1, 2, 4, 8]))
def test_degree_of_exact_numbers_is_exact(backend: Backend, data: Any, num_tokens: int) -> None:
    """A mean over 1, 2, 4 or 8 exact keys rounds nowhere."""
    fixed = strategies.layers(leading=st.just((2,)), min_tokens=num_tokens, max_tokens=num_tokens)
    layer = _replaced(data.draw(fixed), valid=None)

    keys, found = _degree(backend, layer)

    asserts.equal(found, _oracle_degree(layer).astype(np.float32), backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(keys=strategies.general_keys, min_tokens=1), data=DRAWS)
def test_degree_lies_between_minus_one_and_one(backend: Backend, layer: Layer, data: Any) -> None:
    """Whatever the keys; padding and keys without a direction have the degree 0."""
    odd = st.sampled_from([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-30])
    token = data.draw(st.integers(0, layer.num_tokens - 1))
    layer.keys[..., token, :] = 0
    layer.keys[..., token, 0] = data.draw(odd)

    _, found = _degree(backend, layer)

    degrees = asserts.values(backend, found)
    assert np.all((degrees >= -1) & (degrees <= 1))
    if layer.valid is not None:
        assert np.all(degrees[~layer.valid] == 0)
    if abs(layer.keys[..., token, :]).max(initial=0) != 1:
        assert np.all(degrees[..., token] == 0)


@unhurried
@given(layer=strategies.layers(min_tokens=1), data=DRAWS)
def test_degree_ignores_padding_and_the_length_of_keys(backend: Backend, layer: Layer, data: Any) -> None:
    """Appended padding of any kind, and keys made longer or shorter one by one, change nothing."""
    valid = np.ones(layer.importance.shape, np.bool_) if layer.valid is None else layer.valid
    num_padding = data.draw(st.integers(1, 3))
    padded = _replaced(
        layer,
        keys=_append(layer.keys, num_padding, data.draw(strategies.special()), axis=-2),
        valid=_append(valid, num_padding, False),
    )
    exponents = data.draw(arrays(np.int64, layer.importance.shape, elements=st.integers(-6, 6), fill=st.nothing()))
    scaled = _replaced(layer, keys=layer.keys * 2.0 ** exponents[..., None])

    keys, found = _degree(backend, layer)
    _, longer = _degree(backend, padded)
    _, same = _degree(backend, scaled)

    # Sums of exact keys round nowhere, but compiled for another shape a division may: XLA's does on a GPU.
    asserts.close(longer[..., : layer.num_tokens], found, backend=backend, like=keys, scale=1.0)
    asserts.equal(same, found, backend=backend, like=keys)


@unhurried
@given(data=DRAWS, num_tokens=st.integers(1, 8))
def test_degree_follows_a_permutation_of_tokens(backend: Backend, data: Any, num_tokens: int) -> None:
    """Positions decide nothing, so equal keys have equal degrees."""
    layer = data.draw(strategies.layers(leading=st.just(()), min_tokens=num_tokens, max_tokens=num_tokens))
    order = np.asarray(data.draw(st.permutations(range(num_tokens))), dtype=np.int64)

    keys, found = _degree(backend, layer)
    _, moved = _degree(backend, layer.take(order))

    asserts.equal(moved, asserts.values(backend, found)[order], backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(leading=st.just(()), min_tokens=1), data=DRAWS)
def test_a_duplicate_raises_the_degree(backend: Backend, layer: Layer, data: Any) -> None:
    """One more of the same kind: N tokens of mean cosine c become N + 1 of (N c + 1) / (N + 1)."""
    layer = _replaced(layer, valid=None)
    token = data.draw(st.integers(0, layer.num_tokens - 1))
    assume(np.any(layer.keys[token]))
    more = _replaced(layer, keys=np.concatenate([layer.keys, 2 * layer.keys[token : token + 1]]))

    x, found = _degree(backend, layer)
    _, raised = _degree(backend, more)

    before, after = asserts.values(backend, found)[token], asserts.values(backend, raised)
    wanted = (layer.num_tokens * before + 1) / (layer.num_tokens + 1)
    assert after[token] > before or before == 1
    assert abs(after[token] - wanted) <= asserts.tolerance(x.dtype)
    assert after[token] == after[-1]


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), fusion=FUSIONS, dtype=st.sampled_from(FLOATS))
def test_fusion_agrees_with_the_oracle(
    backend: Backend, data: Any, leading: tuple[int, ...], fusion: str, dtype: str
) -> None:
    """Powers and ranks, exactly: scores of either sign, ties, infinities, NaN, and masks."""
    num_tokens = data.draw(strategies.token_counts())
    importance = data.draw(strategies.scores((*leading, num_tokens)))
    degrees = data.draw(strategies.scores((*leading, num_tokens), elements=EXACT_DEGREES | st.just(np.nan)))
    valid = data.draw(strategies.masks((*leading, num_tokens)))
    options: dict[str, Any] = {"fusion": fusion, "exponent": data.draw(st.integers(1, 2))}

    x, found = _fused(backend, importance, degrees, valid, dtype, **options)

    wanted = _oracle_fusion(importance, degrees, valid, **options).astype(asserts.wide(backend, dtype))
    asserts.equal(found, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, exponent=st.integers(1, 16))
def test_powers_of_general_numbers_are_close_to_the_oracle(backend: Backend, data: Any, exponent: int) -> None:
    """Within the tolerance of the score, degrees beyond [-1, 1] clipped."""
    shape = (2, data.draw(strategies.token_counts(1)))
    importance = data.draw(strategies.scores(shape, elements=strategies.general()))
    degrees = data.draw(strategies.scores(shape, elements=st.floats(-1.25, 1.25, width=32)))

    x, found = _fused(backend, importance, degrees, None, exponent=exponent)

    wanted = _oracle_fusion(importance, degrees, None, exponent=exponent).astype(np.float32)
    # Bits of a small factor are lost in 1 - c: what counts is the size of the scores.
    asserts.close(found, wanted, backend=backend, like=x, scale=np.max(np.abs(importance), axis=-1, keepdims=True))


@unhurried
@given(data=DRAWS, fusion=FUSIONS, exponent=st.integers(-6, 6))
def test_fusion_is_scale_invariant(backend: Backend, data: Any, fusion: str, exponent: int) -> None:
    """Powers grow with the importance, ranks stay the same."""
    shape = (2, data.draw(strategies.token_counts(1)))
    importance = data.draw(strategies.scores(shape, elements=strategies.exact()))
    degrees = data.draw(strategies.scores(shape, elements=EXACT_DEGREES))

    x, found = _fused(backend, importance, degrees, None, fusion=fusion)
    _, scaled = _fused(backend, importance * 2.0**exponent, degrees, None, fusion=fusion)

    scale = np.float32(2.0**exponent) if fusion == "power" else np.float32(1)
    asserts.equal(scaled, asserts.values(backend, found) * scale, backend=backend, like=x)


@unhurried
@given(
    data=DRAWS,
    num_tokens=st.integers(2, 9),
    power=st.sampled_from([(1.0, 1), (-1.0, 200), (1.0, 16), (0.5, 200), (0.0, 7), (-0.5, 3)]),
)
def test_among_duplicates_the_importance_decides(
    backend: Backend, data: Any, num_tokens: int, power: tuple[float, int]
) -> None:
    """Powers of one distance keep the order of the base, also where they would be 0 or overflow."""
    degree_of_all, exponent = power
    importance = data.draw(strategies.distinct_scores((num_tokens,)))
    importance = np.abs(importance) if data.draw(st.booleans()) else importance
    degrees = np.full((num_tokens,), degree_of_all)
    budget = data.draw(st.integers(1, num_tokens - 1))

    x, found = _fused(backend, importance, degrees, None, exponent=exponent)

    kept = select(found, budget, backend=backend)
    asserts.equal(kept, _int(oracle.select(importance.tolist(), budget)), backend=backend, like=x)


@unhurried
@given(data=DRAWS, leading=strategies.leading_shapes(), fusion=FUSIONS)
def test_fusion_never_touches_what_is_not_valid(
    backend: Backend, data: Any, leading: tuple[int, ...], fusion: str
) -> None:
    """It keeps its importance bit for bit, and what it holds does not change the others."""
    shape = (*leading, data.draw(strategies.token_counts(1)))
    importance = data.draw(strategies.scores(shape))
    degrees = data.draw(strategies.scores(shape, elements=EXACT_DEGREES))
    valid = data.draw(arrays(np.bool_, shape, elements=st.booleans(), fill=st.nothing()))
    other = np.where(valid, importance, data.draw(strategies.special()))
    other_degrees = np.where(valid, degrees, data.draw(strategies.special()))

    x, found = _fused(backend, importance, degrees, valid, fusion=fusion)
    y, changed = _fused(backend, other, other_degrees, valid, fusion=fusion)

    before = asserts.values(backend, found)
    asserts.identical(
        found, np.where(valid, before, asserts.values(backend, x)).astype(np.float32), backend=backend, like=x
    )
    wanted = np.where(valid, before, asserts.values(backend, y)).astype(np.float32)
    asserts.equal(changed, wanted, backend=backend, like=x)


# ----------------------------------------------------------------------------------------------------------- pagerank


@unhurried
@given(
    data=DRAWS,
    layer=strategies.layers() | strategies.layers(keys=strategies.general_keys),
    damping=st.sampled_from([0.15, 0.5, 1.0]),
    rounds=st.integers(1, 4),
    dtype=st.sampled_from(FLOATS),
)
def test_pagerank_agrees_with_the_oracle(
    backend: Backend, data: Any, layer: Layer, damping: float, rounds: int, dtype: str
) -> None:
    """Over all pairs: zero keys, duplicates, opposites, scores of either sign, infinities, NaN, padding, no tokens."""
    x, found = _ranked(backend, layer, dtype, damping=damping, rounds=rounds)

    wanted = _oracle_pagerank(layer, damping=damping, rounds=rounds).astype(asserts.wide(backend, dtype))
    asserts.close(found, wanted, backend=backend, like=x, scale=_largest(wanted))


@unhurried
@given(layer=strategies.layers(keys=strategies.general_keys), nothing=st.sampled_from(["damping", "rounds"]))
def test_pagerank_of_nothing_returns_the_importance_bit_for_bit(backend: Backend, layer: Layer, nothing: str) -> None:
    """No damping or no rounds: signed zeros, NaN and all."""
    options: dict[str, Any] = {nothing: 0}

    x, found = _ranked(backend, layer, **options)

    asserts.identical(found, x, backend=backend, like=x)


@unhurried
@given(layer=strategies.layers(min_tokens=1), data=DRAWS)
def test_pagerank_never_touches_what_takes_no_part(backend: Backend, layer: Layer, data: Any) -> None:
    """Padding keeps its importance bit for bit, as infinities and NaN do, and what it holds does not matter."""
    valid = data.draw(arrays(np.bool_, layer.importance.shape, elements=st.booleans(), fill=st.nothing()))
    layer = _replaced(layer, valid=valid)
    junk = data.draw(strategies.special())
    other = _replaced(
        layer,
        importance=np.where(valid, layer.importance, junk),
        keys=np.where(valid[..., None], layer.keys, data.draw(strategies.special())),
    )

    x, found = _ranked(backend, layer)
    y, changed = _ranked(backend, other)

    before, after = asserts.values(backend, x), asserts.values(backend, found)
    takes_part = valid & np.isfinite(before)
    asserts.identical(found, np.where(takes_part, after, before).astype(np.float32), backend=backend, like=x)
    wanted = np.where(valid, after, asserts.values(backend, y)).astype(np.float32)
    asserts.identical(changed, wanted, backend=backend, like=x)


@unhurried
@given(data=DRAWS, num_tokens=st.integers(1, 8), damping=st.sampled_from([0.15, 0.5, 1.0]))
def test_pagerank_only_moves_importance(backend: Backend, data: Any, num_tokens: int, damping: float) -> None:
    """Where none is negative and some is above 0 the sum stays, and no score is negative."""
    layer = data.draw(strategies.layers(leading=st.just((2,)), min_tokens=num_tokens, max_tokens=num_tokens))
    importance = np.abs(data.draw(strategies.scores((2, num_tokens), elements=strategies.general())))
    importance[:, 0] += 1
    layer = _replaced(layer, importance=importance, valid=None)

    _, found = _ranked(backend, layer, damping=damping)

    scores = asserts.values(backend, found)
    assert np.all(scores >= 0)
    np.testing.assert_allclose(np.sum(scores, axis=-1), np.sum(importance, axis=-1), rtol=asserts.tolerance("float32"))


@unhurried
@given(data=DRAWS, num_tokens=st.integers(1, 8), exponent=st.integers(-6, 6))
def test_pagerank_is_scale_invariant(backend: Backend, data: Any, num_tokens: int, exponent: int) -> None:
    """Scores twice as large stay twice as large, and keys may be longer or shorter one by one."""
    layer = data.draw(strategies.layers(leading=st.just((2,)), min_tokens=num_tokens, max_tokens=num_tokens))
    importance = data.draw(strategies.scores((2, num_tokens), elements=strategies.exact()))
    # All alike, they would be nothing, which has no size.
    importance[:, 0] = 3.0
    lengths = 2.0 ** data.draw(arrays(np.int64, (2, num_tokens), elements=st.integers(-6, 6), fill=st.nothing()))
    layer = _replaced(layer, importance=importance, valid=None)
    scaled = _replaced(layer, importance=importance * 2.0**exponent, keys=layer.keys * lengths[..., None])

    x, found = _ranked(backend, layer)
    _, again = _ranked(backend, scaled)

    asserts.equal(again, asserts.values(backend, found) * np.float32(2.0**exponent), backend=backend, like=x)


@unhurried
@given(data=DRAWS, num_tokens=st.integers(2, 8), damping=st.sampled_from([0.15, 0.5, 1.0]))
def test_equal_tokens_have_equal_pagerank(backend: Backend, data: Any, num_tokens: int, damping: float) -> None:
    """Wherever they are, bit for bit, so that the lower index is kept of them."""
    fixed = strategies.layers(
        keys=strategies.general_keys, leading=st.just(()), min_tokens=num_tokens, max_tokens=num_tokens
    )
    layer = _replaced(data.draw(fixed), valid=None)
    first, second = data.draw(st.permutations(range(num_tokens)))[:2]
    layer.keys[second], layer.importance[second] = layer.keys[first], layer.importance[first]

    x, found = _ranked(backend, layer, damping=damping)

    scores = asserts.values(backend, found)
    asserts.identical(found[second : second + 1], scores[first : first + 1], backend=backend, like=x)


@unhurried
@given(layer=strategies.layers(leading=st.sampled_from([(2, 2), (3,)]), min_tokens=1), dtype=st.sampled_from(FLOATS))
def test_pagerank_of_a_batch_is_that_of_its_rows(backend: Backend, layer: Layer, dtype: str) -> None:
    """No row knows of another."""
    _, found = _ranked(backend, layer, dtype)

    together = asserts.values(backend, found)
    for row in np.ndindex(*layer.leading):
        one, alone = _ranked(backend, layer.take(row), dtype)
        asserts.close(alone, together[row], backend=backend, like=one, scale=_largest(together[row]))


@several
@given(layer=strategies.layers(min_tokens=1, elements=st.integers(0, 100).map(float)))
def test_pagerank_is_computed_in_float32_or_wider(backend: Backend, layer: Layer) -> None:
    """Half precision and integers give what their float32 values give, in float32; float64 stays."""
    layer = _replaced(layer, keys=np.abs(layer.keys))
    for dtype in [dtype for dtype in ALL_DTYPES if asserts.supports(backend, dtype)]:
        wide = asserts.wide(backend, dtype)

        x, found = _ranked(backend, layer, dtype)
        _, wanted = _ranked(backend, layer, wide)

        asserts.equal(found, asserts.values(backend, wanted), backend=backend, like=x)
        assert found.dtype == getattr(backend.xp, wide)


@unhurried
@given(
    data=DRAWS,
    layer=strategies.layers(leading=st.sampled_from([(1, 1), (2, 2)]), min_tokens=2, elements=strategies.exact()),
    damping=st.sampled_from([0.15, 0.5]),
)
def test_eviction_by_pagerank_agrees_with_the_oracle(backend: Backend, data: Any, layer: Layer, damping: float) -> None:
    """Only what may still be chosen takes part; there is no graph, and the kept tokens are the best within the cut."""
    layer = _replaced(layer, budget=data.draw(st.integers(1, layer.num_tokens - 1)))

    keys, found = _evicted(backend, layer, _num_protected(data, layer), PageRank(damping=damping, rounds=3))

    scores = np.zeros(layer.importance.shape)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        scores[row] = oracle.evict(
            one.keys.tolist(),
            one.importance.tolist(),
            one.budget,
            protected=_list(one.protected),
            valid=_list(one.valid),
            signal="pagerank",
            damping=damping,
            rounds=3,
        ).scores
    assert found.graph is None
    asserts.close(found.scores, scores.astype(np.float32), backend=backend, like=keys, scale=_largest(scores))
    kept = asserts.values(backend, found.kept)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        is_open = np.ones(layer.num_tokens, np.bool_) if one.valid is None else one.valid
        is_open = is_open if one.protected is None else is_open & ~one.protected
        among = [token for token in kept[row].tolist() if is_open[token]]
        asserts.chosen(among, scores[row].tolist(), eligible=np.flatnonzero(is_open).tolist(), dtype="float32")


def _ranked(backend: Backend, layer: Layer, dtype: str = "float32", **options: Any) -> tuple[Array, Array]:
    """Rank a layer's tokens. Gives the importance too, as the library holds it."""
    x, keys = asserts.make(backend, layer.importance, dtype), asserts.make(backend, layer.keys, dtype)
    return x, pagerank(x, keys, valid=_mask(backend, layer.valid), backend=backend, **options)


def _oracle_pagerank(layer: Layer, **options: Any) -> NDArray[Any]:
    scores = np.zeros(layer.importance.shape)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        scores[row] = oracle.pagerank(one.importance.tolist(), one.keys.tolist(), valid=_list(one.valid), **options)
    return scores


def _largest(scores: NDArray[Any]) -> NDArray[Any]:
    """What rounding is measured by: a row's largest score."""
    number = np.where(np.isfinite(scores), np.abs(scores), 0)
    return np.broadcast_to(np.max(number, axis=-1, keepdims=True, initial=0), scores.shape)


# ------------------------------------------------------------------------------------------------------------- select


@unhurried
@given(layer=strategies.layers(), dtype=st.sampled_from(FLOATS))
def test_selection_agrees_with_the_oracle(backend: Backend, layer: Layer, dtype: str) -> None:
    """Ties, NaN, infinities, masks, and budgets of 0, 1, N and above."""
    scores = asserts.make(backend, layer.importance, dtype)

    found = _selected(backend, layer, scores)

    asserts.equal(found, _oracle_selection(layer), backend=backend, like=scores)


@unhurried
@given(layer=strategies.layers())
def test_exactly_the_budget_is_kept(backend: Backend, layer: Layer) -> None:
    """B unique positions a row, ascending, whatever the scores and masks."""
    scores = asserts.make(backend, layer.importance)

    found = asserts.values(backend, _selected(backend, layer, scores))

    assert found.shape == (*layer.leading, min(layer.budget, layer.num_tokens))
    assert np.all(np.diff(found, axis=-1) > 0)
    assert np.all((found >= 0) & (found < max(layer.num_tokens, 1)))


@unhurried
@given(layer=strategies.layers())
def test_kept_sets_grow_with_the_budget(backend: Backend, layer: Layer) -> None:
    """One more token of budget keeps what was kept, and one more."""
    scores = asserts.make(backend, layer.importance)

    smaller = asserts.values(backend, _selected(backend, layer, scores))
    larger = asserts.values(backend, _selected(backend, layer, scores, layer.budget + 1))

    for row in np.ndindex(*layer.leading):
        assert set(smaller[row].tolist()) <= set(larger[row].tolist())


@unhurried
@given(layer=strategies.layers(), data=DRAWS)
def test_protected_tokens_are_kept_first(backend: Backend, layer: Layer, data: Any) -> None:
    """Protection beats any score, infinities included, but not padding; padding comes last."""
    importance = np.where(data.draw(st.booleans()), -np.inf, layer.importance)
    if layer.protected is not None:
        importance = np.where(layer.protected, importance, np.inf)

    kept = asserts.values(backend, _selected(backend, layer, asserts.make(backend, importance)))

    valid = np.ones(layer.importance.shape, np.bool_) if layer.valid is None else layer.valid
    protected = np.zeros_like(valid) if layer.protected is None else layer.protected & valid
    for row in np.ndindex(*layer.leading):
        in_kept = np.isin(np.arange(layer.num_tokens), kept[row])
        budget = kept.shape[-1]
        assert np.sum(in_kept & protected[row]) == min(budget, np.sum(protected[row]))
        assert np.sum(in_kept & valid[row]) == min(budget, np.sum(valid[row]))


@unhurried
@given(layer=strategies.layers(elements=st.sampled_from([0.0, -0.0, 1.0, -np.inf, np.nan])))
def test_minus_zero_equals_zero_and_nan_is_last(backend: Backend, layer: Layer) -> None:
    """Scores that differ in nothing else choose the same tokens; NaN loses to minus infinity."""
    unsigned = np.where(layer.importance == 0, 0.0, layer.importance)
    as_nan = _replaced(layer, protected=None, valid=None)

    found = _selected(backend, layer, asserts.make(backend, layer.importance))
    wanted = _selected(backend, layer, asserts.make(backend, unsigned))
    kept = asserts.values(backend, _selected(backend, as_nan, asserts.make(backend, layer.importance)))

    asserts.equal(found, wanted, backend=backend, like=found)
    is_nan = np.isnan(layer.importance)
    for row in np.ndindex(*layer.leading):
        numbers = np.sum(~is_nan[row])
        assert np.sum(~is_nan[row][kept[row]]) == min(kept.shape[-1], numbers)


@unhurried
@given(data=DRAWS, num_tokens=st.integers(1, 9))
def test_selection_follows_a_permutation_of_distinct_scores(backend: Backend, data: Any, num_tokens: int) -> None:
    """Where no two scores are equal, positions decide nothing."""
    scores = data.draw(strategies.distinct_scores((num_tokens,)))
    order = np.asarray(data.draw(st.permutations(range(num_tokens))), dtype=np.int64)
    budget = data.draw(strategies.budgets(num_tokens))
    x = asserts.make(backend, scores)

    kept = select(x, budget, backend=backend)
    moved = select(asserts.make(backend, scores[order]), budget, backend=backend)

    asserts.equal(kept, np.sort(order[asserts.values(backend, moved)]), backend=backend, like=x)


# -------------------------------------------------------------------------------------------- rows, inputs and dtypes


@unhurried
@given(layer=strategies.layers(leading=st.just((2, 3)), min_tokens=1), data=DRAWS)
def test_rows_follow_a_permutation_of_batch_and_heads(backend: Backend, layer: Layer, data: Any) -> None:
    """All three steps."""
    rows = np.ix_(data.draw(st.permutations(range(2))), data.draw(st.permutations(range(3))))

    keys, graph, scores, kept = _three_steps(backend, layer)
    _, moved, moved_scores, moved_kept = _three_steps(backend, layer.take(rows))

    for name in ("sources", "neighbors", "weights"):
        wanted = asserts.values(backend, getattr(graph, name))[rows]
        asserts.equal(getattr(moved, name), wanted, backend=backend, like=keys)
    asserts.equal(moved_scores, asserts.values(backend, scores)[rows], backend=backend, like=keys)
    asserts.equal(moved_kept, asserts.values(backend, kept)[rows], backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(leading=st.sampled_from([(2, 2), (3,)]), min_tokens=1))
def test_a_batch_is_the_stack_of_its_rows(backend: Backend, layer: Layer) -> None:
    """All steps."""
    keys, graph, scores, kept = _three_steps(backend, layer)
    degrees = asserts.values(backend, _degree(backend, layer)[1])

    for row in np.ndindex(*layer.leading):
        one_keys, one, one_scores, one_kept = _three_steps(backend, layer.take(row))
        for name in ("sources", "neighbors", "weights"):
            wanted = asserts.values(backend, getattr(graph, name))[row]
            asserts.equal(getattr(one, name), wanted, backend=backend, like=one_keys)
        asserts.equal(one_scores, asserts.values(backend, scores)[row], backend=backend, like=keys)
        asserts.equal(one_kept, asserts.values(backend, kept)[row], backend=backend, like=keys)
        _, one_degrees = _degree(backend, layer.take(row))
        asserts.close(one_degrees, degrees[row], backend=backend, like=keys, scale=1.0)


@unhurried
@given(data=DRAWS, signal=SIGNALS, accumulation=ACCUMULATIONS, dtype=st.sampled_from(FLOATS))
def test_inputs_are_not_written_to(backend: Backend, data: Any, signal: str, accumulation: str, dtype: str) -> None:
    """Every array that goes in holds the same values afterwards."""
    layer = data.draw(strategies.layers(leading=st.just((2,)), min_tokens=1))
    edges = data.draw(strategies.edges((2,), layer.num_tokens))
    keys = asserts.make(backend, layer.keys, dtype)
    importance = asserts.make(backend, layer.importance, dtype)
    masks = {name: _mask(backend, getattr(layer, name)) for name in ("valid", "protected")}
    graph = _as_graph(backend, edges, dtype)

    build_graph(
        keys,
        importance,
        num_sources=layer.num_sources,
        num_neighbors=layer.num_neighbors,
        valid=masks["valid"],
        backend=backend,
    )
    propagate(importance, graph, signal=signal, accumulation=accumulation, backend=backend)
    degrees = degree(keys, valid=masks["valid"], backend=backend)
    before = np.array(asserts.values(backend, degrees))
    fuse(importance, degrees, fusion=data.draw(FUSIONS), valid=masks["valid"], backend=backend)
    pagerank(importance, keys, valid=masks["valid"], backend=backend)
    select(importance, layer.budget, **masks, backend=backend)

    asserts.identical(degrees, before, backend=backend, like=keys)
    asserts.equal(keys, layer.keys.astype(dtype), backend=backend, like=keys)
    asserts.identical(importance, layer.importance.astype(dtype), backend=backend, like=keys)
    for name, mask in masks.items():
        if mask is not None:
            asserts.equal(mask, getattr(layer, name), backend=backend, like=keys)
    for name in ("sources", "neighbors"):
        asserts.equal(getattr(graph, name), getattr(edges, name), backend=backend, like=keys)
    asserts.equal(graph.weights, edges.weights.astype(dtype), backend=backend, like=keys)


@several
@given(
    layer=strategies.layers(min_tokens=1, elements=st.integers(0, 100).map(float)), other=st.sampled_from(ALL_DTYPES)
)
def test_every_dtype_is_computed_in_float32_or_wider(backend: Backend, layer: Layer, other: str) -> None:
    """Half precision and integers give what their float32 values give, in float32; float64 stays."""
    # Whole numbers, the same in every dtype; unsigned keys are the pool's magnitudes.
    layer = _replaced(layer, keys=np.abs(layer.keys))
    known = [dtype for dtype in ALL_DTYPES if asserts.supports(backend, dtype)]
    for dtype in known:
        for keys_dtype in {dtype, other} & set(known):
            wide = asserts.wide(backend, keys_dtype), asserts.wide(backend, dtype)

            keys, graph, scores, kept = _three_steps(backend, layer, keys_dtype, dtype)
            _, wide_graph, wide_scores, wide_kept = _three_steps(backend, layer, *wide)

            _same_graph(graph, wide_graph, backend=backend, like=keys)
            asserts.equal(scores, wide_scores, backend=backend, like=keys)
            asserts.equal(kept, wide_kept, backend=backend, like=keys)
            assert graph.weights.dtype == getattr(backend.xp, wide[0])
            found = _degree_and_fuse(backend, layer, keys_dtype, dtype)
            for actual, wanted in zip(found, _degree_and_fuse(backend, layer, *wide), strict=True):
                asserts.equal(actual, wanted, backend=backend, like=keys)


# -------------------------------------------------------------------------------------------------------- whole layers


@unhurried
@given(
    data=DRAWS,
    layer=strategies.layers(leading=st.sampled_from([(1, 1), (2, 2), (0, 1)]), elements=strategies.exact()),
    source_ratio=st.sampled_from([0.3, 0.0, 1.0, 0.5]),
    neighbors=st.one_of(st.integers(0, 3), st.sampled_from([0.0, 0.4, 1.0])),
    signal=SIGNALS,
    accumulation=ACCUMULATIONS,
)
def test_eviction_agrees_with_the_oracle(
    backend: Backend,
    data: Any,
    layer: Layer,
    source_ratio: float,
    neighbors: int | float,
    signal: str,
    accumulation: str,
) -> None:
    """GraphKV over a given importance: counts from the open tokens, candidates only, sources fixed or chosen anew."""
    # Few sources, so that three bits a factor stay exact; duplicates are clipped, which a tolerance must cover.
    rounds = 1 if accumulation == "sum" else data.draw(st.integers(0, 2))
    num_protected = _num_protected(data, layer)
    recompute = data.draw(st.booleans()) if accumulation == "product" else False
    options: dict[str, Any] = {
        "source_ratio": source_ratio,
        "neighbors": neighbors,
        "signal": signal,
        "rounds": rounds,
        "accumulation": accumulation,
        "strength": 0.5,
        "recompute_sources": recompute,
    }

    if signal == "evict":  # which has no use for the other options
        options = {name: options[name] for name in ("signal", "source_ratio", "neighbors")}
        value: Signal = Bar(source_ratio=source_ratio, neighbors=neighbors)
    else:
        value = FACTORS[signal](**{name: option for name, option in options.items() if name != "signal"})

    keys, found = _evicted(backend, layer, num_protected, value)

    wanted = np.zeros((*layer.leading, min(layer.budget, layer.num_tokens)), dtype=np.int64)
    scores = np.zeros(layer.importance.shape, dtype=np.float64)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        if layer.num_tokens <= layer.budget:
            wanted[row] = range(layer.num_tokens)
            continue
        choice = oracle.evict(
            one.keys.tolist(),
            one.importance.tolist(),
            one.budget,
            protected=_list(one.protected),
            num_protected=num_protected,
            valid=_list(one.valid),
            **options,
        )
        wanted[row], scores[row] = choice.kept, choice.scores
    assert found.budget == layer.budget
    if found.scores is not None:
        asserts.equal(found.scores, scores.astype(np.float32), backend=backend, like=keys)
    asserts.equal(found.kept, wanted, backend=backend, like=keys)


@unhurried
@given(data=DRAWS, num_tokens=st.sampled_from([2, 4, 8]), fusion=FUSIONS, exponent=st.integers(1, 2))
def test_eviction_by_degree_agrees_with_the_oracle(
    backend: Backend, data: Any, num_tokens: int, fusion: str, exponent: int
) -> None:
    """The mean is over all tokens, minima and ranks are among those that may still be chosen; there is no graph."""
    layer = data.draw(
        strategies.layers(leading=st.sampled_from([(1, 1), (2, 2)]), min_tokens=num_tokens, max_tokens=num_tokens)
    )
    # Exact degrees need a power of two of tokens. An exact duplicate of all others is clipped, which is not exact.
    layer = _replaced(layer, valid=None, budget=data.draw(st.integers(1, num_tokens - 1)))
    assume(np.max(_oracle_degree(layer)) < 1)
    options: dict[str, Any] = {"fusion": fusion}
    if fusion == "power":
        options["exponent"] = exponent

    keys, found = _evicted(backend, layer, _num_protected(data, layer), Degree(**options))

    wanted = np.zeros((*layer.leading, layer.budget), dtype=np.int64)
    scores = np.zeros(layer.importance.shape)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        choice = oracle.evict(
            one.keys.tolist(),
            one.importance.tolist(),
            one.budget,
            protected=_list(one.protected),
            signal="degree",
            **options,
        )
        wanted[row], scores[row] = choice.kept, choice.scores
    assert found.graph is None
    asserts.close(found.scores, scores.astype(np.float32), backend=backend, like=keys)
    if fusion != "power" or exponent == 1:
        asserts.equal(found.kept, wanted, backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(leading=st.sampled_from([(1, 1), (2, 2), (0, 1)])), trailing=st.sampled_from([(), (3,)]))
def test_eviction_gathers_what_is_kept(backend: Backend, layer: Layer, trailing: tuple[int, ...]) -> None:
    """``Eviction.apply`` on arrays with and without trailing axes."""
    keys, found = _evicted(backend, layer, 0, Decay())
    shape = (*layer.importance.shape, *trailing)
    table = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)

    gathered = found.apply(asserts.make(backend, table))

    kept = asserts.values(backend, found.kept).reshape(*found.kept.shape, *(1 for _ in trailing))
    wanted = np.take_along_axis(table, np.broadcast_to(kept, (*found.kept.shape, *trailing)), axis=2)
    asserts.equal(gathered, wanted, backend=backend, like=keys)


@unhurried
@given(layer=strategies.layers(), signal=SIGNALS, dtype=st.sampled_from(FLOATS))
def test_a_layer_agrees_with_numpy(backend: Backend, layer: Layer, signal: str, dtype: str) -> None:
    """All three steps return what graphkv's own NumPy backend returns."""
    assume(asserts.wide(backend, dtype) == dtype)
    numpy = load("numpy")

    keys, graph, scores, kept = _three_steps(backend, layer, dtype, dtype, signal=signal)
    _, *wanted = _three_steps(numpy, layer, dtype, dtype, signal=signal)

    asserts.graph_equal(graph, wanted[0].sources, wanted[0].neighbors, wanted[0].weights, backend=backend, like=keys)
    asserts.close(scores, wanted[1], backend=backend, like=keys)
    asserts.equal(kept, wanted[2], backend=backend, like=keys)


@large
@given(layer=strategies.large_layers())
def test_large_rows_agree_with_the_oracle(backend: Backend, layer: Layer) -> None:
    """Hundreds of tokens, thousands where the Hypothesis profile asks for many examples."""
    keys, graph = _graph(backend, layer)

    asserts.graph_equal(graph, *_oracle_graph(layer, "float32"), backend=backend, like=keys)
    scores = asserts.make(backend, layer.importance, "float32")
    asserts.equal(_selected(backend, layer, scores), _oracle_selection(layer), backend=backend, like=keys)


# ---------------------------------------------------------------------------------------------- how the claims are put


def _int(x: Any) -> NDArray[np.int64]:
    return np.asarray(x, dtype=np.int64)


def _replaced(layer: Layer, **fields: Any) -> Layer:
    return Layer(**{**vars(layer), **fields})


def _layer(keys: NDArray[Any], importance: NDArray[Any], **fields: Any) -> Layer:
    usual: dict[str, Any] = {"valid": None, "protected": None, "budget": 0, "chunk_size": None}
    return Layer(keys=keys, importance=importance, **{**usual, **fields})


def _append(x: NDArray[Any], count: int, value: Any, axis: int = -1) -> NDArray[Any]:
    shape = list(x.shape)
    shape[axis] = count
    return np.concatenate([x, np.full(shape, value, dtype=x.dtype)], axis=axis)


@st.composite
def _segments(
    draw: st.DrawFn, leading: tuple[int, ...], elements: st.SearchStrategy[float]
) -> tuple[NDArray[Any], NDArray[np.int64], int]:
    num_segments = draw(st.integers(1, 5))
    shape = (*leading, draw(st.integers(0, 8)))
    values = draw(strategies.scores(shape, elements=elements))
    return (
        values,
        draw(arrays(np.int64, shape, elements=st.integers(0, num_segments - 1), fill=st.nothing())),
        num_segments,
    )


def _list(mask: NDArray[np.bool_] | None) -> list[bool] | None:
    return None if mask is None else [bool(flag) for flag in mask]


def _mask(backend: Backend, mask: NDArray[np.bool_] | None) -> Array | None:
    return None if mask is None else asserts.make(backend, mask)


def _graph(
    backend: Backend, layer: Layer, dtype: str = "float32", importance_dtype: str | None = None
) -> tuple[Array, Graph]:
    """Build a layer's graph. Gives the keys too, on whose device everything must be."""
    keys = asserts.make(backend, layer.keys, dtype)
    graph = build_graph(
        keys,
        asserts.make(backend, layer.importance, importance_dtype or dtype),
        num_sources=layer.num_sources,
        num_neighbors=layer.num_neighbors,
        valid=_mask(backend, layer.valid),
        chunk_size=layer.chunk_size,
        backend=backend,
    )
    return keys, graph


def _same_graph(graph: Graph, expected: Graph, /, *, backend: Backend, like: Array) -> None:
    for name in ("sources", "neighbors", "weights"):
        asserts.equal(getattr(graph, name), getattr(expected, name), backend=backend, like=like)


def _links(backend: Backend, graph: Graph, row: tuple[int, ...]) -> dict[tuple[int, int], float]:
    """Return a row's edges that have an effect."""
    sources, neighbors = asserts.values(backend, graph.sources)[row], asserts.values(backend, graph.neighbors)[row]
    weights = asserts.values(backend, graph.weights)[row]
    return {(int(sources[k]), int(neighbors[k, m])): float(weights[k, m]) for k, m in np.argwhere(weights > 0).tolist()}


def _chosen_valid(kept: NDArray[Any], valid: NDArray[np.bool_]) -> list[int]:
    return [token for token in kept.tolist() if valid[token]]


def _oracle_graph(layer: Layer, dtype: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    num_sources = min(layer.num_sources, layer.num_tokens)
    num_neighbors = min(layer.num_neighbors, layer.num_tokens - num_sources)
    shape = (*layer.leading, num_sources, num_neighbors)
    sources, neighbors = np.zeros(shape[:-1], dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weights = np.zeros(shape, dtype=dtype)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        edges = oracle.build_graph(
            one.keys.tolist(),
            one.importance.tolist(),
            num_sources=one.num_sources,
            num_neighbors=one.num_neighbors,
            valid=_list(one.valid),
        )
        sources[row] = edges.sources
        # Reshaped, because no sources and no neighbors are the same empty list.
        neighbors[row] = np.reshape(edges.neighbors, shape[-2:])
        weights[row] = np.reshape(edges.weights, shape[-2:])
    return sources, neighbors, weights


def _as_graph(backend: Backend, edges: Edges, dtype: str = "float32") -> Graph:
    return Graph(
        sources=asserts.make(backend, edges.sources),
        neighbors=asserts.make(backend, edges.neighbors),
        weights=asserts.make(backend, edges.weights, dtype),
        num_tokens=edges.num_tokens,
    )


def _edges_of_any_weight(backend: Backend, data: Any) -> Edges:
    """Draw edges of two rows with any weights in [0, 1]."""
    edges: Edges = data.draw(strategies.edges((2,), data.draw(strategies.token_counts(1)), weights=strategies.unit()))
    if not asserts.flushes(backend, "float32"):
        return edges
    # Whoever takes subnormal numbers for zero has no such edge.
    is_normal = edges.weights >= np.finfo(np.float32).tiny
    return replace(edges, weights=np.where(is_normal, edges.weights, 0))


def _propagated(
    backend: Backend, importance: NDArray[Any], edges: Edges, dtype: str = "float32", **options: Any
) -> tuple[Array, Array]:
    """Propagate over given edges. Gives the importance too, as the library holds it."""
    x = asserts.make(backend, importance, dtype)
    return x, propagate(x, _as_graph(backend, edges, dtype), backend=backend, **options)


def _oracle_scores(importance: NDArray[Any], edges: Edges, **options: Any) -> NDArray[Any]:
    scores = np.zeros(importance.shape, dtype=np.float64)
    for row in np.ndindex(*importance.shape[:-1]):
        scores[row] = oracle.propagate(
            importance[row].tolist(), edges.neighbors[row].tolist(), edges.weights[row].tolist(), **options
        )
    return scores


def _reached(edges: Edges) -> NDArray[np.bool_]:
    """Mark the tokens that have an incoming edge."""
    reached = np.zeros((*edges.sources.shape[:-1], edges.num_tokens), dtype=np.bool_)
    for at in _positive(edges):
        reached[(*at[:-2], edges.neighbors[at])] = True
    return reached


def _positive(edges: Edges) -> Iterator[tuple[int, ...]]:
    return (tuple(at) for at in np.argwhere(edges.weights > 0).tolist())


def _degree(backend: Backend, layer: Layer, dtype: str = "float32") -> tuple[Array, Array]:
    """Return a layer's degrees, and the keys, on whose device they must be."""
    keys = asserts.make(backend, layer.keys, dtype)
    return keys, degree(keys, valid=_mask(backend, layer.valid), backend=backend)


def _degree_and_fuse(backend: Backend, layer: Layer, keys_dtype: str, dtype: str) -> tuple[Array, Array]:
    _, degrees = _degree(backend, layer, keys_dtype)
    importance = asserts.make(backend, layer.importance, dtype)
    return degrees, fuse(importance, degrees, valid=_mask(backend, layer.valid), backend=backend)


def _oracle_degree(layer: Layer) -> NDArray[Any]:
    degrees = np.zeros(layer.importance.shape)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        degrees[row] = oracle.degree(one.keys.tolist(), valid=_list(one.valid))
    return degrees


def _fused(
    backend: Backend,
    importance: NDArray[Any],
    degrees: NDArray[Any],
    valid: NDArray[np.bool_] | None,
    dtype: str = "float32",
    **options: Any,
) -> tuple[Array, Array]:
    """Fuse given degrees. Gives the importance too, as the library holds it."""
    x = asserts.make(backend, importance, dtype)
    given_degrees = asserts.make(backend, degrees, dtype)
    return x, fuse(x, given_degrees, valid=_mask(backend, valid), backend=backend, **options)


def _oracle_fusion(
    importance: NDArray[Any], degrees: NDArray[Any], valid: NDArray[np.bool_] | None, **options: Any
) -> NDArray[Any]:
    scores = np.zeros(importance.shape)
    for row in np.ndindex(*importance.shape[:-1]):
        mask = None if valid is None else _list(valid[row])
        scores[row] = oracle.fuse(importance[row].tolist(), degrees[row].tolist(), valid=mask, **options)
    return scores


def _scores(backend: Backend, layer: Layer, graph: Graph, dtype: str = "float32", signal: str = "decay") -> Array:
    return propagate(asserts.make(backend, layer.importance, dtype), graph, signal=signal, backend=backend)


def _selected(backend: Backend, layer: Layer, scores: Array, budget: int | None = None) -> Array:
    return select(
        scores,
        layer.budget if budget is None else budget,
        protected=_mask(backend, layer.protected),
        valid=_mask(backend, layer.valid),
        backend=backend,
    )


def _oracle_selection(layer: Layer) -> NDArray[np.int64]:
    kept = np.zeros((*layer.leading, min(layer.budget, layer.num_tokens)), dtype=np.int64)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        kept[row] = oracle.select(
            one.importance.tolist(), one.budget, protected=_list(one.protected), valid=_list(one.valid)
        )
    return kept


def _three_steps(
    backend: Backend, layer: Layer, keys_dtype: str = "float32", dtype: str = "float32", signal: str = "decay"
) -> tuple[Array, Graph, Array, Array]:
    keys, graph = _graph(backend, layer, keys_dtype, dtype)
    scores = _scores(backend, layer, graph, dtype, signal)
    return keys, graph, scores, _selected(backend, layer, scores)


def _num_protected(data: Any, layer: Layer) -> int:
    """Draw how many tokens a policy says are protected: none where it protects none."""
    return 0 if layer.protected is None else data.draw(st.integers(0, layer.num_tokens))


def _evicted(backend: Backend, layer: Layer, num_protected: int, signal: Signal) -> tuple[Array, Eviction]:
    keys = asserts.make(backend, layer.keys, "float32")
    # A budget of 0 is not one: a policy keeps something, or the caller does not evict.
    base = graphkv.Given(
        budget=layer.budget,
        importance=asserts.make(backend, layer.importance, "float32"),
        protected=_mask(backend, layer.protected),
        num_protected=num_protected,
    )
    return keys, evict(GraphKV(base, signal), keys, valid=_mask(backend, layer.valid), backend=backend)


# What a re-export brings: the properties.
__all__ = [name for name in dir() if name.startswith("test_")]
