"""What holds for every policy, alone and under GraphKV, after a prompt and per step of decoding."""

from dataclasses import replace

import numpy as np
import pytest

from graphkv import (
    CAOTE,
    H2O,
    SAGEKV,
    Decay,
    ExpectedAttention,
    GraphKV,
    RoCo,
    SnapKV,
    StreamingLLM,
    evict,
)
from graphkv.core import LayerShape
from graphkv.core.budgets import tokens_of
from tests.adapters.decoding import decode
from tests.support.arrays import BACKENDS, NUMPY, each_library, make
from tests.support.policies import every_base

RNG = np.random.default_rng(29)
# Keys in loose clusters, so that graphs have edges.
CENTRES = RNG.normal(size=(2, 2, 5, 8))
KEYS = CENTRES[:, :, RNG.integers(0, 5, size=40)] + 0.3 * RNG.normal(size=(2, 2, 40, 8))
VALUES, QUERIES = RNG.normal(size=(2, 2, 40, 4)), RNG.normal(size=(2, 6, 40, 8))
PROTECTED = {
    H2O(budget=12): 6,
    H2O(budget=12, num_recent=0, group_reduction="max", age_normalized=True): 0,
    RoCo(budget=12, num_varying=0.5, num_sinks=1, num_recent=2): 6,
    SAGEKV(budget=12, num_sinks=2): 7,
    ExpectedAttention(budget=12, num_sinks=2): 2,
    CAOTE(H2O(budget=12)): 6,
    CAOTE(SnapKV(budget=12, window=1, kernel_size=3), fast=True): 1,
    CAOTE(ExpectedAttention.official(12)): 4,
}
BASES = {repr(base).replace("budget=12", ""): base for base in PROTECTED} | every_base(12)
# Its draws go by the head's number, so heads that change places do not take their tokens along.
del BASES["random"]
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
each_special = pytest.mark.parametrize("base", PROTECTED, ids=repr)


def run(policy, backend, tokens=slice(None), batch=slice(None), dtype=np.float64, **more):
    arrays = {"values": VALUES, "queries": QUERIES}
    arrays = {name: make(backend, x[batch, :, tokens], dtype) for name, x in arrays.items()}
    arrays["probes"] = make(backend, QUERIES[batch], dtype)
    return evict(policy, make(backend, KEYS[batch, :, tokens], dtype), **arrays, backend=backend, **more)


def with_budget(base, budget):
    """The same policy at another budget."""
    if isinstance(base, CAOTE):
        return CAOTE(with_budget(base.base, budget), fast=base.fast)
    return replace(base, budget=budget)


@each_library
@each_special
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV], ids=["alone", "graph"])
@pytest.mark.parametrize("budget", [0, 1, 2, 5, 12, 39, 40, 41, 0.5])
def test_exactly_the_budget_is_kept_in_ascending_order(backend, base, wrap, budget):
    kept = backend.to_numpy(run(wrap(with_budget(base, budget)), backend).kept)

    assert kept.shape == (2, 2, min(40, tokens_of(budget, 40)))
    assert (np.diff(kept, axis=-1) > 0).all()


@each_special
def test_the_protected_are_counted_and_kept(base):
    decision = run(base, NUMPY)

    assert base.protection(12).count == PROTECTED[base]
    protected = np.zeros((2, 2, 40), bool) if decision.protected is None else decision.protected
    assert (protected.sum(axis=-1) == PROTECTED[base]).all()
    assert np.take_along_axis(protected, decision.kept, -1).sum() == protected.sum()


@each_base
def test_a_budget_below_the_protected_is_filled_from_them(base):
    smaller = with_budget(base, 1)
    decision = run(smaller, NUMPY)

    if smaller.protection(1).count > 0:
        assert np.take_along_axis(decision.protected, decision.kept, -1).all()
    else:
        assert base.num_sinks == 0 if hasattr(base, "num_sinks") else isinstance(base, CAOTE)


@each_library
@each_base
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV], ids=["alone", "graph"])
def test_every_library_keeps_the_same(backend, base, wrap):
    found, expected = run(wrap(base), backend), run(wrap(base), NUMPY)

    np.testing.assert_array_equal(backend.to_numpy(found.kept), expected.kept)
    np.testing.assert_allclose(backend.to_numpy(found.scores), expected.scores, rtol=1e-9, atol=1e-12)


@each_library
@each_base
def test_a_graph_without_sources_is_the_base_at_every_step(backend, base):
    for options in ({"source_ratio": 0.0}, {"neighbors": 0}, {"rounds": 0}, {"strength": 0.0}):
        graph = GraphKV(base, Decay(**options))
        for (alone, kept), (with_graph, also_kept) in zip(
            decode(base, KEYS, QUERIES, 30, backend, values=VALUES),
            decode(graph, KEYS, QUERIES, 30, backend, values=VALUES),
            strict=True,
        ):
            np.testing.assert_array_equal(kept, also_kept)
            np.testing.assert_array_equal(backend.to_numpy(alone.scores), backend.to_numpy(with_graph.scores))


@each_library
@each_base
def test_a_graph_lowers_scores_after_the_prompt_and_at_every_step(backend, base):
    policy = GraphKV(base)
    steps = decode(policy, KEYS, QUERIES, 30, backend, values=VALUES)

    assert len(steps) == 11
    for decision, stored in steps:
        importance, scores = backend.to_numpy(decision.importance), backend.to_numpy(decision.scores)
        assert stored.shape == (2, 2, 12)
        assert decision.graph.num_sources == max(1, int(0.3 * (12 - base.protection(12).count)))
        assert (scores <= importance).all()
        assert (scores < importance).any()
    alone = decode(base, KEYS, QUERIES, 30, backend, values=VALUES)
    assert any((mine != theirs).any() for (_, mine), (_, theirs) in zip(steps, alone, strict=True))


@each_library
@each_base
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV], ids=["alone", "graph"])
def test_a_left_padded_row_keeps_what_it_keeps_alone(backend, base, wrap):
    pads = 7
    valid = np.arange(40) >= np.asarray([0, pads])[:, None]
    # What stands in the padding must not matter.
    keys, values, queries = KEYS.copy(), VALUES.copy(), QUERIES.copy()
    keys[1, :, :pads], values[1, :, :pads], queries[1, :, :pads] = 50, -50, 50

    together = decode(wrap(base), keys, queries, 30, backend, values=values, valid=valid)
    alone = decode(
        wrap(base), keys[1:, :, pads:], queries[1:, :, pads:], 30 - pads, backend, values=values[1:, :, pads:]
    )

    for (_, kept), (_, expected) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(kept[1:] - pads, expected)


@each_library
@each_base
def test_a_wholly_padded_row_is_still_filled(backend, base):
    valid = make(backend, np.zeros((2, 40)), bool)

    for policy in (base, GraphKV(base)):
        decision = run(policy, backend, valid=valid)
        assert tuple(decision.kept.shape) == (2, 2, 12)
        assert np.isfinite(backend.to_numpy(decision.scores)).all()


@each_library
@each_base
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV], ids=["alone", "graph"])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 12])
def test_a_prompt_that_fits_is_kept_whole(backend, base, wrap, num_tokens):
    decision = run(wrap(base), backend, slice(0, num_tokens))

    assert backend.to_numpy(decision.kept).tolist() == [[list(range(num_tokens))] * 2] * 2
    assert decision.scores is None
    if base.needs().state:
        assert {sums.shape[2] for sums in decision.state.tokens.values()} == {num_tokens}
    else:
        assert decision.state is None


@each_library
@each_base
@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_short_prompts_are_evicted_too(backend, base, num_tokens):
    for policy in (with_budget(base, num_tokens - 1), GraphKV(with_budget(base, num_tokens - 1))):
        decision = run(policy, backend, slice(0, num_tokens))
        assert tuple(decision.kept.shape) == (2, 2, num_tokens - 1)


@each_base
def test_rows_of_the_batch_and_heads_do_not_touch_each_other(base):
    whole = run(base, NUMPY).kept

    for batch in range(2):
        np.testing.assert_array_equal(run(base, NUMPY, batch=slice(batch, batch + 1)).kept, whole[batch : batch + 1])
    queries = QUERIES[:, [3, 4, 5, 0, 1, 2]]
    swapped = evict(base, KEYS[:, ::-1], values=VALUES[:, ::-1], queries=queries, probes=queries)
    np.testing.assert_array_equal(swapped.kept, whole[:, ::-1])


@each_base
def test_equal_query_heads_are_as_good_as_one(base):
    kept = [
        evict(base, KEYS, values=VALUES, queries=queries, probes=queries).kept
        for queries in (QUERIES[:, ::3], np.repeat(QUERIES[:, ::3], 3, axis=1))
    ]

    np.testing.assert_array_equal(*kept)


@each_base
def test_half_precision_is_widened_and_nothing_is_written_to(base):
    arrays = [x.astype("f2") for x in (KEYS, VALUES, QUERIES)]
    for x in arrays:
        x.setflags(write=False)
    keys, values, queries = arrays

    half = evict(base, keys, values=values, queries=queries, probes=queries)

    assert half.scores.dtype == np.float32
    assert all(sums.dtype == np.float32 for sums in (half.state.tokens if half.state else {}).values())
    queries = queries.astype("f4")
    wide = evict(base, keys.astype("f4"), values=values.astype("f4"), queries=queries, probes=queries)
    np.testing.assert_array_equal(half.scores, wide.scores)


@each_base
def test_declared_costs_grow_as_the_method_says(base):
    short, long = (LayerShape(num_tokens=n, query_heads=6, kv_heads=2, head_size=8, budget=12) for n in (4096, 8192))
    quadratic = base.needs().state or type(base).__name__ in ("KVzip", "RKV")
    assert base.cost(long).flops == pytest.approx((4 if quadratic else 2) * base.cost(short).flops, rel=1e-3)
    assert base.cost(long).flops > 0 or base == StreamingLLM(budget=12, num_sinks=2)
    # Never a square of N in memory.
    assert base.cost(long).bytes == 2 * base.cost(short).bytes


@each_base
@pytest.mark.parametrize("backend", ["torch", "torch:portable"])
def test_no_value_is_read_on_the_host(base, backend):
    """Tensors of torch's meta device have shapes and no values."""
    torch = pytest.importorskip("torch")

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    windowed = base.needs().queries == "window"
    for policy in (base, GraphKV(base)):
        state = None
        for num_tokens, num_queries in ((40, 40), (13, 1)):
            decision = evict(
                policy,
                empty(2, 2, num_tokens, 8),
                values=empty(2, 2, num_tokens, 4),
                queries=empty(2, 6, max(num_queries, base.num_queries(num_tokens)) if windowed else num_queries, 8),
                probes=empty(2, 6, 3, 8),
                valid=empty(2, num_tokens, dtype=torch.bool),
                state=state,
                backend=BACKENDS[backend],
            )
            state = decision.state
            assert decision.kept.device.type == "meta"
            assert decision.kept.shape == (2, 2, 12)


@each_library
@each_base
def test_padding_is_never_protected(backend, base):
    # Two valid tokens, fewer than most policies protect.
    valid = np.broadcast_to(np.arange(40) >= 38, (2, 40))

    decision = run(base, backend, valid=make(backend, valid, bool))

    assert set(range(38, 40)) <= set(backend.to_numpy(decision.kept)[1, 1].tolist())
    if decision.protected is not None:
        assert not backend.to_numpy(decision.protected)[..., :38].any()
