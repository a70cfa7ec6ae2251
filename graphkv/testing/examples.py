"""Fixed examples of what every backend must do at the sizes of real models, and where mistakes hide.

`suite` brings these properties along. Every input is the same in every run, so a backend that fails here always fails.
Long rows are compared with `graphkv.testing.truth`.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import graphkv

from ..core import primitives
from ..core.attention import received_attention
from ..core.backend import Backend, load
from ..core.eviction import Eviction, evict
from ..core.fusion import degree, distance, fuse
from ..core.graph import build_graph
from ..core.pagerank import pagerank
from ..core.propagation import propagate
from ..core.selection import select
from ..core.types import Array, Graph
from . import asserts, namespace, oracle, policies, truth

TINY = {"float32": 2.0**-126, "float64": 2.0**-1022}
SIGNALS = ("decay", "enhance", "evict")
FUSIONS = ("power", "max_rank", "mean_rank")
# NaN of either sign (x86 makes a negative one of 0/0), infinities, zeros, subnormal numbers and large ones.
SPECIAL = np.asarray(
    [1.0, -np.nan, 3e38, np.nan, -np.inf, 0.0, 1e-45, np.inf, -0.0, -1e-45, 1e-40, 2e-40, -3e38, -1.0, np.inf, -np.inf]
)


def test_the_namespace_has_what_is_used(backend: Backend) -> None:
    """All names and keywords that the portable forms and the policies use; what is missing is said in one list."""
    missing = namespace.missing(backend)

    assert not missing, "the namespace lacks:\n" + "\n".join(missing)


# ---------------------------------------------------------------------------------------------------- order, selection


def test_long_rows_are_ranked(backend: Backend) -> None:
    """Thousands of tokens, a hundred rows, k above 1,024: ties, tiers and NaN."""
    for shape, k in (((3000,), 1500), ((70_000,), 2000), ((100, 65), 33), ((2, 2, 3, 1025), 1025), ((33,), 32)):
        random = np.random.default_rng(k)
        scores = random.integers(-200, 200, shape) / 64
        scores[random.random(shape) < 0.01] = np.nan
        tiers = random.integers(0, 4, shape, dtype=np.int32)
        for dtype in _dtypes(backend):
            x = asserts.make(backend, scores, dtype)
            # Two tiers are sometimes a mask.
            for some in (None, tiers, tiers > 1):
                found = primitives.top_k(x, k, None if some is None else asserts.make(backend, some), backend=backend)
                asserts.equal(found, truth.top_k(scores, k, some), backend=backend, like=x)


def test_long_rows_are_selected(backend: Backend) -> None:
    """As long as caches are, with masks; the best of thousands and all but one."""
    for shape, budget in (
        ((3000,), 1500),
        ((70_000,), 2049),
        ((100, 65), 64),
        ((2, 2, 3, 1025), 1024),
        ((4097,), 4096),
    ):
        random = np.random.default_rng(budget)
        scores = random.integers(-200, 200, shape) / 64
        scores[random.random(shape) < 0.01] = np.nan
        masks = {"protected": random.random(shape) < 0.1, "valid": random.random(shape) < 0.9}
        for dtype in _dtypes(backend):
            x = asserts.make(backend, scores, dtype)
            for some in ({}, masks):
                found = select(x, budget, **_made(backend, some), backend=backend)
                asserts.equal(found, truth.select(scores, budget, **some), backend=backend, like=x)


def test_scores_one_bit_apart_keep_their_order(backend: Backend) -> None:
    """Neighbors among the floats, of either sign and of any size: in ranking, selection, sources and ranks."""
    places = np.random.default_rng(23).permutation(600)
    for dtype in _dtypes(backend):
        step = np.finfo(dtype).eps
        for scale in (1.0, -1.0, 2.0**-100, 2.0**100):
            scores = scale * (1 + places * step)
            x = asserts.make(backend, scores, dtype)

            order = truth.top_k(scores, 600)
            asserts.equal(primitives.top_k(x, 600, backend=backend), order, backend=backend, like=x)
            kept = select(x, 300, backend=backend)
            asserts.equal(kept, np.sort(order[:300]), backend=backend, like=x)
            for keys_dtype in _dtypes(backend):
                keys = asserts.make(backend, np.ones((600, 2)), keys_dtype)
                graph = build_graph(keys, x, num_sources=200, num_neighbors=1, backend=backend)
                asserts.equal(graph.sources, np.sort(order[:200]), backend=backend, like=keys)
            ranks = fuse(x, asserts.make(backend, np.zeros(600), dtype), fusion="mean_rank", backend=backend)
            wanted = truth.fuse(scores.astype(dtype), np.zeros(600, dtype), fusion="mean_rank")
            asserts.equal(ranks, wanted.astype(dtype), backend=backend, like=x)


def test_special_scores_have_their_places(backend: Backend) -> None:
    """NaN of either sign, infinities, zeros and subnormal numbers in one row, down to its last place."""
    rows = (
        SPECIAL,
        np.tile(SPECIAL, 3)[::-1].copy(),
        np.full(33, np.nan),
        np.full(33, -np.inf),
        np.resize([np.nan, -np.inf], 33),
        np.asarray([np.nan, 1.0, np.nan]),
        np.arange(33) * 2e-45,
    )
    for dtype in _dtypes(backend):
        for given_scores in rows:
            scores = given_scores.astype(dtype)
            x, num_tokens = asserts.make(backend, scores, dtype), scores.shape[0]
            for tiers in (None, np.arange(num_tokens, dtype=np.int32) % 3):
                made = None if tiers is None else asserts.make(backend, tiers)
                for k in (num_tokens, 2):
                    found = primitives.top_k(x, k, made, backend=backend)
                    asserts.equal(found, truth.top_k(scores, k, tiers), backend=backend, like=x)
            masks = {"valid": np.arange(num_tokens) % 3 > 0, "protected": np.arange(num_tokens) % 4 == 1}
            for budget in (num_tokens, num_tokens - 1, 1):
                for some in ({}, masks):
                    kept = select(x, budget, **_made(backend, some), backend=backend)
                    asserts.equal(kept, truth.select(scores, budget, **some), backend=backend, like=x)
            keys = asserts.make(backend, np.ones((num_tokens, 2)), dtype)
            graph = build_graph(keys, x, num_sources=num_tokens // 2, num_neighbors=1, backend=backend)
            wanted = np.sort(truth.top_k(scores, num_tokens // 2))
            asserts.equal(graph.sources, wanted, backend=backend, like=keys)
            for fusion in ("max_rank", "mean_rank"):
                for valid in (None, masks["valid"]):
                    ranks = fuse(x, x, fusion=fusion, **_made(backend, {"valid": valid}), backend=backend)
                    expected = truth.fuse(scores, scores, fusion=fusion, valid=valid).astype(dtype)
                    asserts.equal(ranks, expected, backend=backend, like=x)


# ------------------------------------------------------------------------------------------------ segments, attention


def test_segments_of_many_values(backend: Backend) -> None:
    """Hundreds of values in one segment, tens of thousands in all, a hundred rows; to the dtype's last bits."""
    for leading, num_values, num_segments in (
        ((), 70_000, 64),
        ((), 2000, 3000),
        ((100,), 300, 7),
        ((2, 2, 3), 65, 33),
        ((), 1025, 2),
    ):
        random = np.random.default_rng(num_values)
        shape = (*leading, num_values)
        index = random.integers(0, num_segments, shape)
        index[..., ::3] = num_segments - 1
        integers = random.integers(-8, 9, shape).astype(np.float64)
        # Signs and, of a few, powers of two: products of them round nowhere and stay in range, whatever their order.
        powers = random.choice([-1.0, 1.0], shape)
        powers[..., :20] *= 2.0 ** random.integers(-2, 3, (*leading, 20))
        general = 1 + random.normal(size=shape) / 64
        for dtype in _dtypes(backend):
            for index_dtype in ("int64", "int32"):
                for kind, exact in (("product", powers), ("sum", integers)):
                    x = asserts.make(backend, exact, dtype)
                    found = _segment(backend, kind)(x, asserts.make(backend, index, index_dtype), num_segments)
                    wanted = _segments(kind, exact, index, num_segments).astype(dtype)
                    asserts.equal(found, wanted, backend=backend, like=x)
            if num_values > 1024:
                continue  # the rounding of this many factors is not the backend's fault
            for kind in ("product", "sum"):
                narrow = general.astype(dtype)
                x = asserts.make(backend, narrow, dtype)
                found = _segment(backend, kind)(x, asserts.make(backend, index), num_segments)
                expected = _segments(kind, narrow.astype(np.float64), index, num_segments)
                asserts.close(found, expected.astype(dtype), backend=backend, like=x, scale=1.0)


def test_sums_of_many_rows(backend: Backend) -> None:
    """Heads of 128, hundreds of rows in one slot, tens of thousands in all; to the dtype's last bits."""
    for leading, num_rows, num_slots, size in (
        ((), 70_000, 64, 1),
        ((), 2000, 3000, 3),
        ((100,), 60, 7, 3),
        ((2, 2, 3), 17, 9, 128),
        ((1, 2), 300, 2, 80),
    ):
        random = np.random.default_rng(num_rows)
        shape = (*leading, num_rows)
        into = random.integers(-1, num_slots, shape)
        into[..., ::3] = num_slots - 1
        integers = random.integers(-8, 9, (*shape, size)).astype(np.float64)
        general = random.normal(size=(*shape, size))
        for dtype in _dtypes(backend):
            for index_dtype in ("int64", "int32") if num_rows < 100 else ("int64",):
                x = asserts.make(backend, integers, dtype)
                index = asserts.make(backend, into, index_dtype)
                found = primitives.sum_rows(x, index, num_slots, backend=backend)
                asserts.equal(found, _rows(integers, into, num_slots).astype(dtype), backend=backend, like=x)
            if num_rows > 2000:
                continue  # the rounding of this many terms is not the backend's fault
            narrow = general.astype(dtype)
            x = asserts.make(backend, narrow, dtype)
            found = primitives.sum_rows(x, asserts.make(backend, into), num_slots, backend=backend)
            wide = narrow.astype(np.float64)
            wanted, scale = _rows(wide, into, num_slots).astype(dtype), _rows(np.abs(wide), into, num_slots)
            asserts.close(found, wanted, backend=backend, like=x, scale=scale)


def test_a_row_alone_in_its_slot_stays_bit_for_bit(backend: Backend) -> None:
    """Whatever the others hold, far larger numbers among them; and slots without a row are 0."""
    random = np.random.default_rng(16)
    rows = random.normal(size=(2, 60, 5)) * 10.0 ** random.integers(-20, 20, (2, 60, 1))
    into = np.stack([random.permutation(90)[:60] for _ in range(2)])
    for dtype in _dtypes(backend):
        x = asserts.make(backend, rows, dtype)
        found = primitives.sum_rows(x, asserts.make(backend, into), 90, backend=backend)
        wanted = np.zeros((2, 90, 5), dtype)
        np.put_along_axis(wanted, into[..., None], rows.astype(dtype), axis=1)
        asserts.identical(found, wanted, backend=backend, like=x)


def test_rows_that_go_nowhere_are_not_counted(backend: Backend) -> None:
    """As padding goes nowhere, which may hold an infinity or NaN; and where all do, there is nothing."""
    random = np.random.default_rng(17)
    for leading in ((), (2, 3)):
        rows = random.integers(-8, 9, (*leading, 30, 4)).astype(np.float64)
        into = random.integers(-1, 5, (*leading, 30))
        into[..., -3:] = -1
        wanted = _rows(rows, into, 5)
        for junk in (np.nan, np.inf, -np.inf, 1e30):
            spoiled = np.where(into[..., None] < 0, junk, rows)
            for dtype in _dtypes(backend):
                x = asserts.make(backend, spoiled, dtype)
                found = primitives.sum_rows(x, asserts.make(backend, into), 5, backend=backend)
                asserts.equal(found, wanted.astype(dtype), backend=backend, like=x)
                nowhere = asserts.make(backend, np.full_like(into, -1))
                found = primitives.sum_rows(x, nowhere, 5, backend=backend)
                asserts.equal(found, np.zeros(wanted.shape, dtype), backend=backend, like=x)


def test_the_order_of_rows_never_matters_beyond_rounding(backend: Backend) -> None:
    """Rows in the order of their slots, in the opposite one and in none have the same sums."""
    random = np.random.default_rng(18)
    rows, into = random.normal(size=(2, 200, 3)), np.sort(random.integers(-1, 9, (2, 200)), axis=-1)
    for dtype in _dtypes(backend):
        wide = rows.astype(dtype).astype(np.float64)
        wanted, scale = _rows(wide, into, 9).astype(dtype), _rows(np.abs(wide), into, 9)
        for order in (np.arange(200), np.arange(200)[::-1], random.permutation(200)):
            x = asserts.make(backend, rows[:, order], dtype)
            found = primitives.sum_rows(x, asserts.make(backend, into[:, order]), 9, backend=backend)
            asserts.close(found, wanted, backend=backend, like=x, scale=scale)


def test_merges_conserve_mass(backend: Backend) -> None:
    """Each token that is kept or absorbed counts once and padding never, and averages of a constant are that constant.

    What nothing is absorbed into stays bit for bit.
    """
    num_tokens, budget = 40, 6
    random = np.random.default_rng(19)
    shape = (2, 2, num_tokens)
    # Tokens of a kind have one direction, different kinds are orthogonal; of some kinds no token is kept.
    kind, valid = random.integers(0, 8, shape), random.random(shape) < 0.8
    keys = np.eye(8)[kind] * 2.0 ** random.integers(-2, 3, shape)[..., None]
    keys[~valid] = np.nan
    importance = random.permutation(np.prod(shape)).reshape(shape)
    values = np.concatenate([random.normal(size=(*shape, 4)), np.full((*shape, 1), 3.25)], axis=-1)
    values[~valid] = np.nan
    kept = truth.select(importance.astype(np.float64), budget, valid=valid)
    slots = np.tile(np.arange(budget), (*shape[:2], 1))
    into = np.full(shape, -1)
    for b, h, j in np.argwhere(valid).tolist():
        same = slots[b, h][kind[b, h][kept[b, h]] == kind[b, h, j]]
        into[b, h, j] = same[0] if same.size else -1
    np.put_along_axis(into, kept, slots, axis=-1)
    mass = _rows(np.ones((*shape, 1)), into, budget)
    for dtype in _dtypes(backend):
        narrow = values.astype(dtype)
        x, v = asserts.make(backend, keys, dtype), asserts.make(backend, narrow, dtype)
        base = graphkv.Given(budget=budget, importance=asserts.make(backend, importance.astype(np.float64), dtype))
        given_valid = asserts.make(backend, valid)
        done = evict(graphkv.Absorb(base, weights="count"), x, values=v, valid=given_valid, backend=backend)

        asserts.equal(done.kept, kept, backend=backend, like=x)
        assert done.merge is not None
        asserts.equal(done.merge.into, into, backend=backend, like=x)
        assert done.mass is not None
        asserts.equal(done.mass, mass[..., 0].astype(dtype), backend=backend, like=x)
        merged_keys, merged = done.compress(x, v)
        asserts.identical(merged_keys, done.apply(x), backend=backend, like=x)
        wide = np.where(valid[..., None], narrow, 0).astype(np.float64)
        asserts.close(merged, (_rows(wide, into, budget) / mass).astype(dtype), backend=backend, like=x, scale=4.0)
        alone = mass[..., 0] == 1
        assert 0 < np.sum(alone) < alone.size
        copied = np.take_along_axis(narrow, kept[..., None], axis=-2)
        np.testing.assert_array_equal(asserts.values(backend, merged)[alone], copied[alone])


def test_attention_received_in_real_shapes(backend: Backend) -> None:
    """Batches of one, many groups, heads of 64 and 128, hundreds of tokens, odd blocks, and logits of a thousand."""
    for batch, kv_heads, groups, num_tokens, num_queries, head_size, block, factor in (
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 2, 4, 100, 30, 8, 20, 1),
        (3, 1, 2, 65, 65, 64, 64, 1),
        (1, 4, 3, 300, 33, 128, 32, 1),
        (2, 2, 1, 20, 20, 16, 7, 1),
        (1, 1, 8, 129, 129, 4, 1000, 1),
        (1, 2, 2, 40, 40, 4, 16, 1000),
    ):
        random = np.random.default_rng(num_tokens)
        queries = random.normal(size=(batch, kv_heads * groups, num_queries, head_size))
        keys = random.normal(size=(batch, kv_heads, num_tokens, head_size))
        # The largest logits of all, for keys too late to be seen.
        keys[..., -1, :] = 8 * queries[:, ::groups, 0]
        valid = random.random((batch, kv_heads, num_tokens)) < 0.9
        valid[..., -1] = True
        for dtype in _dtypes(backend):
            # However large, multiples of 1/4 have products that are the same in every arithmetic.
            exact = factor > 1
            q = np.round(queries * 4) * factor / 4 if exact else queries
            k = np.round(keys * 4) / 4 if exact else keys
            q, k = q.astype(dtype), k.astype(dtype)
            x = asserts.make(backend, np.where(valid[..., None], k, np.nan), dtype)

            found = received_attention(
                asserts.make(backend, q, dtype), x, asserts.make(backend, valid), block_size=block, backend=backend
            )

            wanted = truth.received(q, k, valid).astype(dtype)
            asserts.close(found, wanted, backend=backend, like=x, scale=1.0)


def test_attention_leaves_out_what_is_not_finite(backend: Backend) -> None:
    """A key with an infinity or NaN receives nothing and spoils nothing, a query with one gives nothing."""
    random = np.random.default_rng(40)
    queries, keys = random.normal(size=(1, 4, 20, 4)), random.normal(size=(1, 2, 40, 4))
    keys[0, 0, 5, 1], keys[0, 0, 30, 0], keys[0, 1, 7] = np.inf, -np.inf, np.nan
    queries[0, 0, 4, 2], queries[0, 3, 19, 0] = np.inf, np.nan
    valid = np.arange(80).reshape(1, 2, 40) % 9 > 0
    for dtype in _dtypes(backend):
        x = asserts.make(backend, keys, dtype)

        found = received_attention(
            asserts.make(backend, queries, dtype), x, asserts.make(backend, valid), block_size=16, backend=backend
        )

        wanted = truth.received(queries.astype(dtype), keys.astype(dtype), valid).astype(dtype)
        asserts.close(found, wanted, backend=backend, like=x, scale=1.0)


# -------------------------------------------------------------------------------------------------------------- graphs


def test_graphs_of_long_rows(backend: Backend) -> None:
    """Exactly, ties included: keys of plus and minus one, tens of sources and neighbors, a hundred rows."""
    for leading, num_tokens, head_size, num_sources, num_neighbors, chunk_size in (
        ((), 3000, 64, 40, 20, None),
        ((), 70_000, 16, 5, 3, None),
        ((), 1000, 16, 300, 250, 300),
        ((100,), 40, 16, 3, 4, None),
        ((2, 2, 3), 130, 64, 9, 33, 64),
        ((2,), 4099, 16, 17, 9, 1000),
        ((1, 1), 1025, 256, 1, 1024, None),
        ((1,), 33, 4, 32, 1, 5),
    ):
        random = np.random.default_rng(num_tokens)
        shape = (*leading, num_tokens)
        keys = random.choice([-1.0, 1.0], (*shape, head_size))
        keys *= 2.0 ** random.integers(-3, 4, (*shape, 1))
        importance = random.integers(-500, 500, shape) / 64
        # The first token is a source, and the last but one its duplicate.
        importance[..., 0], keys[..., -2, :] = 99, keys[..., 0, :]
        for valid in (None, random.random(shape) < 0.9) if num_tokens < 70_000 else (None,):
            counts: dict[str, Any] = {"num_sources": num_sources, "num_neighbors": num_neighbors}
            sources, neighbors, weights = truth.build_graph(keys, importance, **counts, valid=valid)
            for dtype in _dtypes(backend)[: 1 if num_tokens > 4099 else 2]:
                x = asserts.make(backend, keys, dtype)
                graph = build_graph(
                    x,
                    asserts.make(backend, importance, dtype),
                    **counts,
                    chunk_size=chunk_size,
                    **_made(backend, {"valid": valid}),
                    backend=backend,
                )
                asserts.graph_equal(graph, sources, neighbors, weights.astype(dtype), backend=backend, like=x)


def test_graphs_of_real_head_sizes(backend: Backend) -> None:
    """Cosines are those of the dtype: to 1e-5 in float32 and 1e-12 in float64, near-duplicates among them."""
    for head_size in (64, 80, 128, 3):
        random = np.random.default_rng(head_size)
        keys = random.normal(size=(2, 300, head_size))
        keys[:, 100:200] = keys[:, :100] + 1e-2 * random.normal(size=(2, 100, head_size))
        importance = random.normal(size=(2, 300))
        for dtype in _dtypes(backend):
            x, narrow = asserts.make(backend, keys, dtype), keys.astype(dtype)
            graph = build_graph(
                x, asserts.make(backend, importance, dtype), num_sources=30, num_neighbors=12, backend=backend
            )
            _graph_is_close(backend, graph, narrow, importance.astype(dtype), dtype, like=x)


def test_keys_of_all_lengths(backend: Backend) -> None:
    """Edges and degrees are there exactly where the sum of the squares is positive and finite in the dtype."""
    # Powers of two, so that every square is a number of the dtype or out of its range.
    exponents = {"float32": (0, 62, 66, 100, -60, -80, 3, 20), "float64": (0, 500, 530, -500, -600, 100, -100, 20)}
    for head_size in (1, 2, 4, 64):
        for dtype in _dtypes(backend):
            directions = np.random.default_rng(5).choice([-1.0, 1.0], (24, head_size))
            keys = directions * 2.0 ** np.resize(np.asarray(exponents[dtype], dtype=np.float64), (24, 1))
            importance = np.arange(24.0)[::-1].copy()
            x = asserts.make(backend, keys, dtype)

            with np.errstate(all="ignore"):
                graph = build_graph(
                    x, asserts.make(backend, importance, dtype), num_sources=8, num_neighbors=16, backend=backend
                )
                found = degree(x, backend=backend)
                ranked = pagerank(x[..., 0], x, damping=0.5, backend=backend)

            sources, neighbors, weights = truth.build_graph(
                keys, importance, num_sources=8, num_neighbors=16, dtype=dtype
            )
            # Of the lengths, a square root rounds those of heads of two; nothing else rounds.
            asserts.equal(graph.sources, sources, backend=backend, like=x)
            asserts.close(graph.weights, weights.astype(dtype), backend=backend, like=x, scale=1.0)
            if head_size != 2:
                asserts.equal(graph.neighbors, neighbors, backend=backend, like=x)
            asserts.close(found, truth.degree(keys, dtype=dtype).astype(dtype), backend=backend, like=x, scale=1.0)
            wanted = truth.pagerank(keys[..., 0], keys, damping=0.5, dtype=dtype)
            asserts.close(ranked, wanted.astype(dtype), backend=backend, like=x, scale=_largest(wanted))


def test_short_keys_never_make_edges_to_sources_or_padding(backend: Backend) -> None:
    """Keys whose squares lose their last bits have longer directions than one; a token's candidacy is not a number."""
    for head_size in (2, 64):
        for dtype in _dtypes(backend):
            keys = np.full((6, head_size), 2.6e-23 if dtype == "float32" else 2.3e-162)
            keys[0, 0] = 3e-23 if dtype == "float32" else 3e-162
            importance = np.asarray([9.0, 8.0, 1.0, 1.0, 1.0, 1.0])
            valid = np.asarray([True, True, True, False, True, True])
            x = asserts.make(backend, keys, dtype)

            with np.errstate(all="ignore"):
                graph = build_graph(
                    x,
                    asserts.make(backend, importance, dtype),
                    num_sources=2,
                    num_neighbors=4,
                    valid=asserts.make(backend, valid),
                    backend=backend,
                )

            weights = asserts.values(backend, graph.weights)
            reached = asserts.values(backend, graph.neighbors)[weights > 0]
            assert not set(reached.tolist()) & {0, 1, 3}, f"edges of weight {weights[weights > 0]} lead to {reached}"
            assert np.all((weights >= 0) & (weights <= 1))


def test_degrees_of_long_rows(backend: Backend) -> None:
    """To the dtype's last bits, on rows and heads of real sizes; exactly, for keys of plus and minus one."""
    for leading, num_tokens, head_size in (((), 3000, 128), ((2, 2, 3), 65, 64), ((100,), 20, 8), ((1,), 4096, 64)):
        random = np.random.default_rng(num_tokens)
        shape = (*leading, num_tokens)
        keys = random.normal(size=(*shape, head_size)) + 1
        signs = random.choice([-1.0, 1.0, 1.0], (*shape, head_size))
        for valid in (None, random.random(shape) < 0.8):
            for dtype in _dtypes(backend):
                made = _made(backend, {"valid": valid})
                narrow = keys.astype(dtype)
                x = asserts.make(backend, narrow, dtype)
                wanted = truth.degree(narrow, valid=valid, dtype=dtype).astype(dtype)
                asserts.close(degree(x, **made, backend=backend), wanted, backend=backend, like=x, scale=1.0)
                if num_tokens == 4096 and valid is None:
                    # Of that many numbers even squares of differences from the mean are exact.
                    few = signs[..., :16, :]
                    exact = truth.degree(few, dtype=dtype).astype(dtype)
                    found = degree(asserts.make(backend, few, dtype), backend=backend)
                    asserts.equal(found, exact, backend=backend, like=x)


def test_distances_keep_their_digits(backend: Backend) -> None:
    """Where all keys are nearly the same, one minus the cosine would be rounding noise; with a zero key, and masked."""
    random = np.random.default_rng(0)
    noise, common = random.normal(size=(2, 700, 32)), random.normal(size=(2, 1, 32))
    for dtype in _dtypes(backend):
        for size in (1e-1, 1e-2, 1e-3):
            keys = (common + size * noise * np.geomspace(0.1, 1, 700)[:, None]).astype(dtype)
            for valid in (None, np.arange(700) % 3 > 0):
                mask = None if valid is None else np.broadcast_to(valid, keys.shape[:2]).copy()
                x, made = asserts.make(backend, keys, dtype), _made(backend, {"valid": mask})
                wanted = truth.distance(keys, valid=mask, dtype=dtype)
                found = distance(x, **made, backend=backend)
                # The rounding of a unit key, against its small difference from the mean.
                asserts.close(found, wanted.astype(dtype), backend=backend, like=x, scale=np.sqrt(wanted))
                one, few = asserts.values(backend, degree(x, **made, backend=backend)), asserts.values(backend, found)
                assert np.allclose(one, 1 - few, atol=1e-6)
            keys[:, 5] = 0
            found = asserts.values(backend, distance(asserts.make(backend, keys, dtype), backend=backend))
            assert np.all(found[:, 5] == 1)
            assert np.allclose(found, 1 - truth.degree(keys, dtype=dtype), rtol=1e-3)


# --------------------------------------------------------------------------------------------------- propagate, fuse


def test_propagation_over_large_graphs(backend: Backend) -> None:
    """Tens of thousands of edges, hundreds at one token, a hundred rows, many rounds; to the dtype's last bits."""
    for leading, num_tokens, num_sources, num_neighbors, rounds in (
        ((), 3000, 40, 20, 1),
        ((), 128, 300, 250, 1),
        ((), 400, 300, 1, 2),
        ((100,), 40, 3, 4, 3),
        ((2, 2, 3), 65, 9, 17, 20),
    ):
        random = np.random.default_rng(num_tokens)
        shape = (*leading, num_sources, num_neighbors)
        importance = random.normal(size=(*leading, num_tokens))
        neighbors = random.integers(0, num_tokens, shape)
        if num_neighbors == 1:
            neighbors[..., :] = 7
        weights = random.random(shape) / (8 * max(1, num_sources * num_neighbors * rounds // num_tokens))
        weights[random.random(shape) < 0.1] = 0
        for dtype in _dtypes(backend):
            score, edge = importance.astype(dtype), weights.astype(dtype)
            x = asserts.make(backend, score, dtype)
            graph = _graph(backend, neighbors, edge, num_tokens, dtype)
            for signal in SIGNALS:
                for accumulation, strength in (("product", 1.0), ("product", 0.5), ("sum", 1.0)):
                    options: dict[str, Any] = {"signal": signal, "accumulation": accumulation, "strength": strength}
                    options["rounds"] = 1 if accumulation == "sum" else rounds
                    found = propagate(x, graph, **options, backend=backend)
                    wanted = truth.propagate(score, neighbors, edge, **options).astype(dtype)
                    asserts.close(found, wanted, backend=backend, like=x, scale=np.abs(score))


def test_duplicates_of_several_sources_fall_by_a_factor_each(backend: Backend) -> None:
    """A factor of 1e-6 for each of them and each round, and 0 where float32 ends; a negative score doubles."""
    neighbors, weights = np.asarray([[2, 3, 4], [2, 3, 5]]), np.ones((2, 3))
    weights[1, 1] = 0.5
    importance = np.asarray([5.0, 4.0, 1.0, 1.0, 1.0, -1.0, 2.0])
    for dtype in _dtypes(backend):
        x = asserts.make(backend, importance, dtype)
        graph = _graph(backend, neighbors, weights, 7, dtype)
        for rounds in (1, 2, 3, 7, 50):
            for strength in (1.0, 0.5):
                found = propagate(x, graph, rounds=rounds, strength=strength, backend=backend)
                options: dict[str, Any] = {"rounds": rounds, "strength": strength, "dtype": dtype}
                wanted = truth.propagate(importance, neighbors, weights, **options).astype(dtype)
                _close_in_range(found, wanted, dtype, importance, backend=backend, like=x)


def test_graphs_made_by_hand(backend: Backend) -> None:
    """An edge reaches the token that it names: a source, its own, one token twice; weights of any size are clipped."""
    neighbors = np.asarray([[0, 1, 2], [0, 2, 2], [4, 4, 3]])
    tame = np.asarray([[0.5, 0.25, 0.75], [0.5, 0.5, 0.25], [0.25, 0.25, 0.0]])
    wild = np.asarray([[1.5, -0.25, np.nan], [np.inf, -np.inf, 0.5], [2.0, 1.0, np.nan]])
    importance = np.asarray([4.0, -2.0, 1.0, 8.0, 16.0])
    for index_dtype in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"):
        if not _holds(backend, index_dtype):
            continue
        for weights in (tame, wild) if index_dtype == "int64" else (tame,):
            x = asserts.make(backend, importance, "float32")
            graph = Graph(
                sources=asserts.make(backend, np.asarray([0, 1, 2]), index_dtype),
                neighbors=asserts.make(backend, neighbors, index_dtype),
                weights=asserts.make(backend, weights, "float32"),
                num_tokens=5,
            )
            for signal in SIGNALS:
                for accumulation in ("product", "sum"):
                    options: dict[str, Any] = {"signal": signal, "accumulation": accumulation}
                    found = propagate(x, graph, **options, backend=backend)
                    wanted = truth.propagate(importance, neighbors, weights, **options).astype("float32")
                    _close_in_range(found, wanted, "float32", importance, backend=backend, like=x)


def test_mixed_dtypes_have_the_wider_result(backend: Backend) -> None:
    """What is float64 is computed in float64, whatever else is given; sources are ranked in the scores' dtype."""
    if "float64" not in _dtypes(backend):
        return
    random = np.random.default_rng(64)
    score, edge = 1 + random.random(50), random.random((8, 5))
    neighbors = random.integers(8, 50, (8, 5))
    for one, other in (("float32", "float64"), ("float64", "float32")):
        x, narrow = asserts.make(backend, score, one), score.astype(one)
        graph = _graph(backend, neighbors, edge.astype(other), 50, other)
        for signal in ("decay", "enhance"):
            for accumulation in ("product", "sum"):
                options: dict[str, Any] = {"signal": signal, "accumulation": accumulation, "strength": 1 / 3}
                found = propagate(x, graph, **options, backend=backend)
                wanted = truth.propagate(narrow, neighbors, edge.astype(other), **options)
                asserts.close(found, wanted, backend=backend, like=x, scale=np.abs(score))
        found = propagate(x, graph, signal="evict", backend=backend)
        wanted = truth.propagate(narrow, neighbors, edge, signal="evict").astype(one)
        asserts.identical(found, wanted, backend=backend, like=x)
        degrees = np.clip(score - 1.5, -1, 1).astype(other)
        for fusion in FUSIONS:
            fused = fuse(x, asserts.make(backend, degrees, other), fusion=fusion, exponent=5, backend=backend)
            wanted = truth.fuse(narrow, degrees.astype(np.float64), fusion=fusion, exponent=5)
            asserts.close(fused, wanted, backend=backend, like=x)
        keys = random.normal(size=(50, 8)).astype(other)
        found = pagerank(x, asserts.make(backend, keys, other), damping=0.5, backend=backend)
        wanted = truth.pagerank(narrow, keys, damping=0.5, dtype="float64")
        asserts.close(found, wanted, backend=backend, like=x)
        importance = 1 + random.permutation(50) * np.finfo(other).eps
        keys = random.normal(size=(50, 8)).astype(one)
        x = asserts.make(backend, keys, one)
        graph = build_graph(
            x, asserts.make(backend, importance, other), num_sources=9, num_neighbors=4, backend=backend
        )
        _graph_is_close(backend, graph, keys, importance.astype(other), one, like=x, num_sources=9, num_neighbors=4)


def test_every_dtype_is_computed_as_its_float32_values(backend: Backend) -> None:
    """Half precision and integers give what their values give in float32, and results are float32."""
    keys = np.random.default_rng(8).integers(0, 5, (40, 16))
    importance = np.arange(100, 60, -1)
    for dtype in ("float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8"):
        if not asserts.supports(backend, dtype):
            continue
        x, score = asserts.make(backend, keys, dtype), asserts.make(backend, importance, dtype)
        wide, wide_score = asserts.make(backend, keys, "float32"), asserts.make(backend, importance, "float32")
        found, wanted = (
            build_graph(k, s, num_sources=9, num_neighbors=4, backend=backend)
            for k, s in ((x, score), (wide, wide_score))
        )
        for name in ("sources", "neighbors", "weights"):
            asserts.equal(getattr(found, name), getattr(wanted, name), backend=backend, like=x)
        for signal in SIGNALS:
            scores = propagate(score, found, signal=signal, backend=backend)
            expected = propagate(wide_score, found, signal=signal, backend=backend)
            asserts.equal(scores, expected, backend=backend, like=x)
        asserts.equal(degree(x, backend=backend), degree(wide, backend=backend), backend=backend, like=x)
        ranked, expected = (pagerank(s, k, backend=backend) for k, s in ((x, score), (wide, wide_score)))
        asserts.equal(ranked, expected, backend=backend, like=x)
        for fusion in FUSIONS:
            fused = fuse(score, score, fusion=fusion, backend=backend)
            expected = fuse(wide_score, wide_score, fusion=fusion, backend=backend)
            asserts.equal(fused, expected, backend=backend, like=x)
        asserts.equal(select(score, 9, backend=backend), _indices(range(9)), backend=backend, like=x)


def test_results_beyond_the_range_are_infinite_or_zero(backend: Backend) -> None:
    """And never NaN: large and small scores, factors that overflow, and what is too small for the dtype."""
    importance = np.asarray([1.0, 1e38, -1e38, 1e-30, -1e-30, 0.0, 3e38, -3e38, np.inf, -np.inf, 2e-38, 2.0])
    num_tokens = importance.shape[0]
    neighbors = np.tile(np.arange(1, num_tokens), (4, 1))
    for dtype in _dtypes(backend):
        score = importance.astype(dtype)
        x = asserts.make(backend, score, dtype)
        for weight in (1.0, 0.75, 2.0**-20):
            weights = np.full(neighbors.shape, weight)
            graph = _graph(backend, neighbors, weights, num_tokens, dtype)
            for signal in ("decay", "enhance"):
                for rounds in (1, 2, 60):
                    with np.errstate(all="ignore"):
                        options: dict[str, Any] = {"signal": signal, "rounds": rounds}
                        found = propagate(x, graph, **options, backend=backend)
                        wanted = truth.propagate(score, neighbors, weights, **options, dtype=dtype).astype(dtype)
                    _close_in_range(found, wanted, dtype, score, backend=backend, like=x)
        for exponent in (1, 8, 20, 200):
            for level in (-1.0, -0.5, 0.0, 0.5, 1 - 1e-2, 1.0):
                degrees = np.full(num_tokens, level).astype(dtype)
                for keep in (slice(None), importance >= 0):
                    some = score[keep]
                    y = asserts.make(backend, some, dtype)
                    with np.errstate(all="ignore"):
                        fused = fuse(y, asserts.make(backend, degrees[keep], dtype), exponent=exponent, backend=backend)
                        wanted = _fused_in_range(some, degrees[keep], exponent, dtype)
                    _close_in_range(fused, wanted, dtype, some, backend=backend, like=y)


def test_powers_of_small_distances_keep_their_digits(backend: Backend) -> None:
    """Down to the bound of 1e-24 and not above it, for large exponents too; relative to the result, however small."""
    distances = np.asarray([1e-2, 5e-3, 2e-3, 1.5e-3, 0.5, 1.0, 1.75, 2.0, 1e-1, 0.0, 1e-6])
    for dtype in _dtypes(backend):
        degrees = (1 - distances).astype(dtype)
        for importance in (np.linspace(1, 2, 11), np.linspace(-1, 1, 11)):
            score = importance.astype(dtype)
            x = asserts.make(backend, score, dtype)
            for exponent in (1, 2, 3, 8, 17, 20, 50, 100):
                fused = fuse(x, asserts.make(backend, degrees, dtype), exponent=exponent, backend=backend)
                wanted = truth.fuse(score, degrees, exponent=exponent).astype(dtype)
                asserts.close(fused, wanted, backend=backend, like=x, scale=_rounding(exponent) * np.abs(wanted))


def test_fusion_of_long_rows(backend: Backend) -> None:
    """Ranks of thousands, exactly, and powers to the dtype's last bits; a hundred rows, three leading axes, masks."""
    for shape in ((3000,), (100, 33), (2, 2, 3, 65)):
        random = np.random.default_rng(shape[-1])
        importance, degrees = random.normal(size=shape), random.uniform(-1.2, 1.2, shape)
        ties = random.integers(-20, 20, shape) / 16
        for dtype in _dtypes(backend):
            for valid in (None, random.random(shape) < 0.8):
                made = _made(backend, {"valid": valid})
                for score in (importance.astype(dtype), ties.astype(dtype), np.abs(importance).astype(dtype)):
                    x, c = asserts.make(backend, score, dtype), degrees.astype(dtype)
                    for fusion in FUSIONS:
                        for exponent in (1, 8) if fusion == "power" else (8,):
                            fused = fuse(
                                x,
                                asserts.make(backend, c, dtype),
                                fusion=fusion,
                                exponent=exponent,
                                **made,
                                backend=backend,
                            )
                            wanted = truth.fuse(score, c, fusion=fusion, exponent=exponent, valid=valid).astype(dtype)
                            asserts.close(fused, wanted, backend=backend, like=x)


def test_pagerank_of_long_rows(backend: Backend) -> None:
    """To the dtype's last bits, on rows and heads of real sizes, many rounds; equal tokens far apart come out equal."""
    for leading, num_tokens, head_size, damping, rounds in (
        ((), 3000, 128, 0.15, 10),
        ((), 70_000, 16, 0.5, 3),
        ((2, 2, 3), 65, 64, 0.9, 1),
        ((100,), 33, 8, 1.0, 2),
        ((1,), 4097, 80, 0.9, 40),
    ):
        random = np.random.default_rng(num_tokens)
        shape = (*leading, num_tokens)
        # Two halves that resemble themselves, so that rounds matter; the first has the importance.
        keys = random.normal(size=(*shape, head_size)) + 2
        keys[..., num_tokens // 2 :, :] -= 4
        importance = random.normal(size=shape)
        importance[..., : num_tokens // 2] += 2
        keys[..., -1, :], importance[..., -1] = keys[..., 0, :], importance[..., 0]
        for valid in (None, random.random(shape) < 0.8):
            for dtype in _dtypes(backend):
                narrow, score = keys.astype(dtype), importance.astype(dtype)
                x = asserts.make(backend, score, dtype)
                options: dict[str, Any] = {"damping": damping, "rounds": rounds}
                made = _made(backend, {"valid": valid})
                found = pagerank(x, asserts.make(backend, narrow, dtype), **options, **made, backend=backend)
                wanted = truth.pagerank(score, narrow, **options, valid=valid, dtype=dtype).astype(dtype)
                asserts.close(found, wanted, backend=backend, like=x, scale=_largest(wanted))
                if valid is None:
                    scores = asserts.values(backend, found)
                    np.testing.assert_array_equal(scores[..., -1], scores[..., 0])


def test_pagerank_of_odd_rows(backend: Backend) -> None:
    """Flat, negative, infinite and NaN importance, tokens alone, padding of any kind, keys without a direction."""
    odd = np.asarray([3.0, np.nan, -1.0, np.inf, 2.0, 0.0, -np.inf, 5.0])
    keys = np.random.default_rng(8).choice([-1.0, 1.0], (8, 4))
    keys[2], keys[5] = 0, keys[4]
    spoiled = keys.copy()
    spoiled[0, 1], spoiled[4, 2] = np.inf, np.nan
    opposite = np.tile(keys[:1], (8, 1)) * np.where(np.arange(8) % 2, -1, 1)[:, None]
    masks = (None, np.arange(8) % 3 > 0, np.arange(8) == 2, np.zeros(8, np.bool_))
    for dtype in _dtypes(backend):
        for importance in (odd, -np.abs(odd), np.zeros(8), np.full(8, 7.0), np.full(8, -7.0), np.arange(8.0)):
            for some in (keys, spoiled, opposite):
                for valid in masks:
                    for damping, rounds in ((0.5, 3), (1.0, 2)):
                        options: dict[str, Any] = {"damping": damping, "rounds": rounds}
                        x = asserts.make(backend, importance, dtype)
                        made = _made(backend, {"valid": valid})
                        found = pagerank(x, asserts.make(backend, some, dtype), **options, **made, backend=backend)
                        wanted = truth.pagerank(importance, some, **options, valid=valid, dtype=dtype).astype(dtype)
                        asserts.close(found, wanted, backend=backend, like=x, scale=_largest(wanted))


def test_pagerank_grows_with_the_importance(backend: Backend) -> None:
    """Of any size: sums of a row that the dtype cannot hold among them, and scores beyond its range are infinite."""
    random = np.random.default_rng(15)
    keys, importance = random.normal(size=(40, 16)), random.normal(size=40) / 4
    for dtype in _dtypes(backend):
        k, score = asserts.make(backend, keys, dtype), importance.astype(dtype)
        wanted = truth.pagerank(score, keys.astype(dtype), damping=0.5, dtype=dtype)
        for share in (-0.75, -0.25, 0, 0.25, 0.99):
            scale = 2.0 ** round(share * np.finfo(dtype).maxexp)
            x = asserts.make(backend, score * np.asarray(scale, dtype), dtype)
            found = pagerank(x, k, damping=0.5, backend=backend)
            expected = (wanted * scale).astype(dtype)
            asserts.close(found, expected, backend=backend, like=x, scale=_largest(expected))
        most = np.finfo(dtype).max
        x = asserts.make(backend, np.asarray([most, -most, most, 0.0]), dtype)
        found = asserts.values(backend, pagerank(x, k[:4, ...], damping=0.5, backend=backend))
        assert np.all(found > 0), f"the score of one is {found}"
        assert np.isinf(found[0])


# ------------------------------------------------------------------------------------ arrays: layout, lifetime, threads


def test_layouts_never_matter(backend: Backend) -> None:
    """Transposed, strided, broadcast and read-only arrays give what fresh ones give."""
    xp, steps = backend.xp, _Steps.of(backend, leading=(2, 3), num_tokens=33, seed=1)
    for layout in (_transposed, _strided, _locked):
        changed = dataclasses.replace(steps, arrays={name: layout(x, xp) for name, x in steps.arrays.items()})
        _same_results(changed.run(), steps.run(), backend)
    # One row for all heads, as `evict` itself broadcasts a mask of padding.
    rows = {name: x[:, :1, ...] for name, x in steps.arrays.items()}
    spread = {name: xp.broadcast_to(x, steps.arrays[name].shape) for name, x in rows.items()}
    copied = {name: xp.asarray(x, copy=True) for name, x in spread.items()}
    found, wanted = (dataclasses.replace(steps, arrays=arrays).run() for arrays in (spread, copied))
    _same_results(found, wanted, backend)


def test_results_outlive_the_next_call(backend: Backend) -> None:
    """What a call gave is still the same after other calls of the same shapes."""
    first, second = (_Steps.of(backend, leading=(2, 3), num_tokens=33, seed=seed) for seed in (1, 2))
    found = first.run()
    before = {name: np.array(asserts.values(backend, x)) for name, x in found.items()}

    second.run()

    for name, x in found.items():
        np.testing.assert_array_equal(asserts.values(backend, x), before[name], err_msg=name)


def test_an_array_changed_in_place_is_read_again(backend: Backend) -> None:
    """Nothing is remembered of an array: with other values in it, the same object gives other results."""
    first, second = (_Steps.of(backend, leading=(2, 3), num_tokens=33, seed=seed) for seed in (1, 2))
    first.run()
    for name, x in first.arrays.items():
        try:
            x[...] = second.arrays[name]
        except (RuntimeError, TypeError, ValueError):
            return  # these arrays do not change

    _same_results(first.run(), second.run(), backend)


def test_four_threads_at_once(backend: Backend) -> None:
    """The same results as one after the other."""
    steps = [_Steps.of(backend, leading=(2, 3), num_tokens=65, seed=seed) for seed in range(4)]
    wanted = [{name: asserts.values(backend, x) for name, x in step.run().items()} for step in steps]
    start = threading.Barrier(len(steps))
    errors: list[BaseException] = []

    def work(place: int) -> None:
        try:
            start.wait()
            results = [steps[place].run() for _ in range(4)]
            # A run sums rows once only: side by side, so that the threads meet there too.
            start.wait()
            sums = [steps[place].sum_of_rows() for _ in range(8)]
            # Here, because a lazy library may compute only where it was asked to.
            for found in results:
                _same_results(found, wanted[place], backend)
            for found in sums:
                _same_results({"sum of rows": found}, {"sum of rows": wanted[place]["sum of rows"]}, backend)
        except BaseException as error:  # reported below, in the test's own thread
            errors.append(error)
            start.abort()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(steps))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors[0]


def test_batches_and_axes_of_one_stay(backend: Backend) -> None:
    """Shapes are kept, whatever is 1 or 0: batch, heads, tokens, sources, neighbors."""
    shapes = [(leading, 9) for leading in ((), (1, 1), (2, 2, 3), (3, 1), (2, 0))]
    # Rows of one and two tokens with some of these only: a library may compile for every shape.
    shapes += [(leading, num_tokens) for leading in ((), (2, 3)) for num_tokens in (1, 2)]
    for leading, num_tokens in shapes:
        steps = _Steps.of(backend, leading=leading, num_tokens=num_tokens, seed=3, num_sources=1, num_neighbors=1)
        _same_results(steps.run(), _Steps.of(load("numpy"), **steps.made_from).run(), backend)


def test_values_never_warn(backend: Backend) -> None:
    """No value is refused, and so none is complained about: huge, tiny, infinite and NaN ones in every step."""
    values = np.asarray([1e30, -1e30, 1e-30, np.inf, -np.inf, np.nan, 0.0, 3e38, 1e-45, 1.0, -3e38, 1e20])
    num_tokens = values.shape[0]
    neighbors = np.tile(np.arange(num_tokens), (3, 1))
    for dtype in _dtypes(backend):
        with np.errstate(all="warn"), warnings.catch_warnings():
            warnings.simplefilter("error")
            x = asserts.make(backend, values, dtype)
            keys = asserts.make(backend, values[:, None] * np.asarray([1.0, -0.5, 3.0]), dtype)
            build_graph(keys, x, num_sources=4, num_neighbors=5, backend=backend)
            degrees = degree(keys, backend=backend)
            pagerank(x, keys, backend=backend)
            graph = _graph(backend, neighbors, np.tile(values, (3, 1)), num_tokens, dtype)
            for signal in SIGNALS:
                for rounds in (1, 7):
                    propagate(x, graph, signal=signal, rounds=rounds, backend=backend)
                propagate(x, graph, signal=signal, accumulation="sum", backend=backend)
            for fusion in FUSIONS:
                fuse(x, degrees, fusion=fusion, backend=backend)
                fuse(degrees, x, fusion=fusion, backend=backend)
            for damping in (0.5, 1.0):
                pagerank(x, keys, damping=damping, backend=backend)
            select(x, 5, backend=backend)


# ------------------------------------------------------------------------------------------------------------ policies


def test_every_policy_keeps_what_numpy_keeps(backend: Backend) -> None:
    """All of graphkv's policies: a prompt and three steps, with padding, and scores within the tolerance."""
    for name, policy in policies.shipped(12).items():
        try:
            _follow(policy, backend)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------- how the claims are put


def _dtypes(backend: Backend) -> list[str]:
    return [dtype for dtype in ("float32", "float64") if asserts.supports(backend, dtype)]


def _indices(places: Iterable[int]) -> NDArray[np.int64]:
    return np.asarray(list(places), dtype=np.int64)


def _holds(backend: Backend, dtype: str) -> bool:
    return asserts.supports(backend, dtype) and hasattr(backend.xp, dtype)


def _segment(backend: Backend, kind: str) -> Callable[[Array, Array, int], Array]:
    reduce = {"product": primitives.segment_product, "sum": primitives.segment_sum}[kind]
    return partial(reduce, backend=backend)


def _segments(kind: str, values: NDArray[Any], index: NDArray[Any], num_segments: int) -> NDArray[np.float64]:
    identity, ufunc = {"product": (1.0, np.multiply), "sum": (0.0, np.add)}[kind]
    result = np.full((*values.shape[:-1], num_segments), identity)
    for row in np.ndindex(*values.shape[:-1]):
        ufunc.at(result[row], index[row], values[row])
    return result


def _rows(rows: NDArray[Any], into: NDArray[Any], num_slots: int) -> NDArray[np.float64]:
    """Add the rows of each slot in float64; -1 goes nowhere."""
    result = np.zeros((*into.shape[:-1], num_slots + 1, rows.shape[-1]))
    for row in np.ndindex(*into.shape[:-1]):
        np.add.at(result[row], into[row], rows[row])
    return result[..., :num_slots, :]


def _made(backend: Backend, masks: Mapping[str, NDArray[np.bool_] | None]) -> dict[str, Array]:
    return {name: asserts.make(backend, mask) for name, mask in masks.items() if mask is not None}


def _graph(backend: Backend, neighbors: NDArray[Any], weights: NDArray[Any], num_tokens: int, dtype: str) -> Graph:
    sources = np.broadcast_to(np.arange(neighbors.shape[-2]), neighbors.shape[:-1])
    return Graph(
        sources=asserts.make(backend, sources),
        neighbors=asserts.make(backend, neighbors),
        weights=asserts.make(backend, weights, dtype),
        num_tokens=num_tokens,
    )


def _graph_is_close(
    backend: Backend,
    graph: Graph,
    keys: NDArray[Any],
    importance: NDArray[Any],
    dtype: str,
    *,
    like: Array,
    num_sources: int = 30,
    num_neighbors: int = 12,
) -> None:
    """Check a graph of general keys: the sources, the weights, and that each neighbor has the weight it is given."""
    sources, _, weights = truth.build_graph(
        keys, importance, num_sources=num_sources, num_neighbors=num_neighbors, dtype=dtype
    )
    asserts.equal(graph.sources, sources, backend=backend, like=like)
    asserts.close(graph.weights, weights.astype(dtype), backend=backend, like=like, scale=1.0)
    found = asserts.values(backend, graph.neighbors)
    assert np.all(np.diff(np.sort(found, axis=-1), axis=-1) > 0), "a neighbor twice"
    assert not np.any(found[..., None] == sources[..., None, None, :]), "an edge to a source"
    own = np.clip(np.take_along_axis(truth.cosines(keys, sources, dtype), found, axis=-1), 0, 1)
    asserts.close(graph.weights, own.astype(dtype), backend=backend, like=like, scale=1.0)


def _rounding(exponent: int) -> float:
    """Return how much further a product of this many factors may be off than one factor."""
    return max(1.0, exponent / 16)


def _largest(scores: NDArray[Any]) -> NDArray[Any]:
    """What errors of importance that flows are relative to: the largest finite score of each row."""
    size = np.max(np.abs(np.where(np.isfinite(scores), scores, 0)), axis=-1, keepdims=True, initial=0)
    return np.broadcast_to(size, scores.shape)


def _close_in_range(
    found: Array, wanted: NDArray[Any], dtype: str, score: NDArray[Any], *, backend: Backend, like: Array
) -> None:
    """Compare numbers relative to themselves, but for the last bits of what is subnormal, factors of a score among it.

    A library that flushes subnormal numbers to 0 may do so.
    """
    least = TINY[dtype] if asserts.flushes(backend, dtype) else np.finfo(dtype).smallest_subnormal
    with np.errstate(all="ignore"):
        lost = 4 * float(least) * np.maximum(1, np.abs(score.astype(np.float64))) / asserts.tolerance(dtype)
        scale = np.where(np.isfinite(wanted), np.maximum(4 * np.abs(wanted.astype(np.float64)), lost), 0)
        asserts.close(found, wanted, backend=backend, like=like, scale=scale)


def _fused_in_range(score: NDArray[Any], degrees: NDArray[Any], exponent: int, dtype: str) -> NDArray[Any]:
    """The truth on powers, with the difference to the least score in the dtype of the call, which may overflow."""
    number = np.where(np.isfinite(score), score, 0)
    lowest = np.minimum(np.min(number), np.zeros((), dtype))
    power = np.clip((1 - degrees.astype(np.float64)) ** exponent, oracle.SMALLEST_POWER, oracle.LARGEST_POWER)
    return np.asarray(((score - lowest).astype(np.float64) * power).astype(dtype))


def _transposed(x: Array, xp: Any) -> Array:
    """Store the first two axes in each other's place, as (batch, tokens, heads, D) turned round is."""
    order = (1, 0, *range(2, x.ndim))
    return xp.permute_dims(xp.asarray(xp.permute_dims(x, order), copy=True), order)


def _strided(x: Array, xp: Any) -> Array:
    """Store every entry twice along the last axis but read one."""
    twice = xp.reshape(xp.stack([x, x], axis=-1), (*x.shape[:-1], 2 * x.shape[-1]))
    return twice[..., ::2]


def _locked(x: Array, xp: Any) -> Array:
    """Forbid writing, where the library can."""
    copy = xp.asarray(x, copy=True)
    if isinstance(copy, np.ndarray):
        copy.flags.writeable = False
    return copy


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
    """All steps and primitives on one set of arrays, ties and masks included."""

    backend: Backend
    arrays: dict[str, Array]
    num_sources: int
    num_neighbors: int
    made_from: dict[str, Any]

    @classmethod
    def of(
        cls,
        backend: Backend,
        *,
        leading: tuple[int, ...],
        num_tokens: int,
        seed: int,
        num_sources: int = 5,
        num_neighbors: int = 4,
    ) -> _Steps:
        random, shape = np.random.default_rng(seed), (*leading, num_tokens)
        made_from = {
            "leading": leading,
            "num_tokens": num_tokens,
            "seed": seed,
            "num_sources": num_sources,
            "num_neighbors": num_neighbors,
        }
        num_sources = min(num_sources, num_tokens)
        num_neighbors = min(num_neighbors, num_tokens)
        edges = (*leading, num_sources, num_neighbors)
        arrays = {
            "keys": asserts.make(backend, random.choice([-1.0, 1.0], (*shape, 16)), "float32"),
            "importance": asserts.make(backend, random.integers(-99, 99, shape) / 64, "float32"),
            "valid": asserts.make(backend, random.random(shape) < 0.8),
            "protected": asserts.make(backend, random.random(shape) < 0.2),
            "degrees": asserts.make(backend, random.integers(-16, 16, shape) / 16, "float32"),
            "sources": asserts.make(backend, np.sort(random.integers(0, num_tokens, edges[:-1]), axis=-1)),
            "neighbors": asserts.make(backend, random.integers(0, num_tokens, edges)),
            "weights": asserts.make(backend, random.choice([0.0, 0.5, 0.75], edges), "float32"),
            "into": asserts.make(backend, random.integers(-1, 3, shape)),
        }
        return cls(
            backend=backend,
            arrays=arrays,
            num_sources=num_sources,
            num_neighbors=num_neighbors,
            made_from=made_from,
        )

    def run(self) -> dict[str, Array]:
        x, backend, xp = self.arrays, self.backend, self.backend.xp
        num_tokens = x["importance"].shape[-1]
        found: dict[str, Array] = {}
        graph = build_graph(
            x["keys"],
            x["importance"],
            num_sources=self.num_sources,
            num_neighbors=self.num_neighbors,
            valid=x["valid"],
            backend=backend,
        )
        found |= {"graph.sources": graph.sources, "graph.weights": graph.weights}
        by_hand = Graph(**{name: x[name] for name in ("sources", "neighbors", "weights")}, num_tokens=num_tokens)
        for signal in SIGNALS:
            found[signal] = propagate(x["importance"], by_hand, signal=signal, backend=backend)
        found["sum"] = propagate(x["importance"], by_hand, accumulation="sum", backend=backend)
        found["degree"] = degree(x["keys"], valid=x["valid"], backend=backend)
        found["distance"] = distance(x["keys"], valid=x["valid"], backend=backend)
        found["pagerank"] = pagerank(x["importance"], x["keys"], valid=x["valid"], backend=backend)
        for fusion in FUSIONS:
            found[fusion] = fuse(
                x["importance"], x["degrees"], fusion=fusion, exponent=2, valid=x["valid"], backend=backend
            )
        found["pagerank"] = pagerank(x["importance"], x["keys"], damping=0.5, valid=x["valid"], backend=backend)
        found["kept"] = select(
            x["importance"],
            num_tokens // 2,
            protected=x["protected"],
            valid=x["valid"],
            backend=backend,
        )
        found["order"] = primitives.top_k(x["importance"], num_tokens, x["valid"], backend=backend)
        edges = (*x["sources"].shape[:-1], self.num_sources * self.num_neighbors)
        values, index = xp.reshape(x["weights"], edges), xp.reshape(x["neighbors"], edges)
        for kind in ("product", "sum"):
            found[f"segment {kind}"] = _segment(backend, kind)(values, index, num_tokens)
        found["sum of rows"] = self.sum_of_rows()
        if x["keys"].ndim == 4 and x["keys"].shape[1]:
            found["received"] = received_attention(x["keys"], x["keys"], x["valid"], block_size=7, backend=backend)
        return found

    def sum_of_rows(self) -> Array:
        return primitives.sum_rows(self.arrays["keys"], self.arrays["into"], 3, backend=self.backend)


def _same_results(found: dict[str, Array], wanted: dict[str, Array], backend: Backend) -> None:
    """Compare what two runs gave; exactly, but for sums in another order."""
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        expected = wanted[name]
        if not isinstance(expected, np.ndarray):
            expected = asserts.values(backend, expected)
        try:
            asserts.close(x, expected, backend=backend, like=x, scale=1.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _inputs(step: int, batch: int, kv_heads: int, num_tokens: int) -> dict[str, NDArray[Any]]:
    """What a model would give: for the prompt all queries, afterwards that of the new token."""
    random = np.random.default_rng(100 + step)
    num_queries = num_tokens if step == 0 else 1
    shape = (batch, kv_heads, num_tokens if step == 0 else 1, 8)
    return {
        "keys": random.normal(size=shape),
        "values": random.normal(size=shape),
        "unrotated_keys": random.normal(size=shape),
        "probes": random.normal(size=(batch, 2 * kv_heads, 5, 8)),
        "queries": random.normal(size=(batch, 2 * kv_heads, num_queries, 8)),
    }


def _follow(policy: Any, backend: Backend, *, steps: int = 3) -> None:
    """Evict a prompt, then after each of some new tokens, on both backends from the same cache."""
    numpy, layer = load("numpy"), {"layer": 1, "num_layers": 4}
    batch, kv_heads, num_tokens = 2, 2, 30
    needs = policy.needs()
    cache: dict[str, NDArray[Any]] = {}
    valid = np.ones((batch, kv_heads, num_tokens), np.bool_)
    valid[1, :, :3] = False
    states: list[Any] = [None, None]
    asked: list[NDArray[Any]] = []
    for step in range(1 + steps):
        new = _inputs(step, batch, kv_heads, num_tokens)
        asked.append(new.pop("queries"))
        probes = new.pop("probes")
        # Afterwards the last few positions: some policies read a window, others what is new.
        queries = np.concatenate(asked, axis=2)[:, :, 0 if step == 0 else -6 :]
        cache = {name: np.concatenate([cache[name], x], axis=2) if step else x for name, x in new.items()}
        found: list[Eviction] = []
        for place, library in enumerate((backend, numpy)):
            given = {name: asserts.make(library, x, "float32") for name, x in cache.items()}
            if not needs.unrotated_keys:
                del given["unrotated_keys"]
            found.append(
                evict(
                    policy,
                    given.pop("keys"),
                    **given,
                    **layer,
                    queries=asserts.make(library, queries, "float32"),
                    probes=asserts.make(library, probes, "float32"),
                    valid=asserts.make(library, valid),
                    state=states[place],
                    backend=library,
                )
            )
        ours, theirs = found
        _same_eviction(ours, theirs, backend)
        states = [ours.state, theirs.state]
        # Where heads keep different numbers, the rest is padding.
        kept = np.asarray(theirs.kept)
        cache = {name: np.take_along_axis(x, np.maximum(kept, 0)[..., None], axis=2) for name, x in cache.items()}
        valid = np.take_along_axis(valid, np.maximum(kept, 0), axis=2) & (kept >= 0)
        valid = np.concatenate([valid, np.ones((batch, kv_heads, 1), np.bool_)], axis=2)


def _same_eviction(ours: Eviction, theirs: Eviction, backend: Backend) -> None:
    """Compare two decisions: the scores within the tolerance, and what is kept up to scores that are that close."""
    assert (ours.scores is None) == (theirs.scores is None)
    for name in ("importance", "scores"):
        x = getattr(ours, name)
        if x is not None:
            wanted = getattr(theirs, name)
            size = np.max(np.abs(np.where(np.isfinite(wanted), wanted, 0)), axis=-1, keepdims=True, initial=0)
            asserts.close(x, wanted, backend=backend, like=ours.kept, scale=np.broadcast_to(size, wanted.shape))
    for name in ("protected", "counts"):
        x = getattr(ours, name)
        assert (x is None) == (getattr(theirs, name) is None)
        if x is not None:
            asserts.equal(x, getattr(theirs, name), backend=backend, like=ours.kept)
    assert (ours.state is None) == (theirs.state is None)
    if ours.state is not None and theirs.state is not None:
        for kind in ("tokens", "layer"):
            for key, x in getattr(ours.state, kind).items():
                asserts.close(x, getattr(theirs.state, kind)[key], backend=backend, like=ours.kept, scale=1.0)
    assert (ours.merge is None) == (theirs.merge is None)
    if ours.merge is not None and theirs.merge is not None:
        # No cosine is closer to a threshold than the tolerance, either.
        asserts.equal(ours.merge.into, theirs.merge.into, backend=backend, like=ours.kept)
        for name in ("key_weights", "value_weights", "mass"):
            wanted = np.asarray(getattr(theirs.merge, name))
            scale = np.maximum(1.0, np.abs(wanted))
            asserts.close(getattr(ours.merge, name), wanted, backend=backend, like=ours.kept, scale=scale)
    # The inputs are always the same, and no two scores at a cut are closer than the tolerance.
    asserts.equal(ours.kept, theirs.kept, backend=backend, like=ours.kept)


__all__ = [name for name in list(globals()) if name.startswith("test_")]
