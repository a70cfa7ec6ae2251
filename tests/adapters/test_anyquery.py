"""The threshold of MPCache against loops, and RocketKV's split against its numbers."""

import numpy as np
import pytest

from graphkv import (
    H2O,
    AdaKV,
    AnyQuery,
    ArgumentError,
    ArgumentTypeError,
    ChunkKV,
    Degree,
    GraphKV,
    KNorm,
    Shared,
    SnapKV,
    StreamingLLM,
    evict,
)
from graphkv.adapters import anyquery
from graphkv.adapters.attention import last_rows
from graphkv.adapters.rocketkv import Split, split
from graphkv.core import Layer
from tests.support.arrays import each_backend, make

RNG = np.random.default_rng(43)
KEYS = RNG.normal(size=(2, 3, 30, 6))
QUERIES = 2 * RNG.normal(size=(2, 6, 30, 6))
VALID = np.arange(30) >= np.asarray([[0], [11]])


def strongest_by_loops(rows, valid, window):
    """The most that any of a row's last queries pays to each token; rows [head][query][token] of all positions."""
    tokens = len(valid)
    asked = window if isinstance(window, int) else max(1, int(round(100 * window) * sum(valid)) // 100)
    means = [[sum(head[q][j] for head in rows) / len(rows) for j in range(tokens)] for q in range(tokens)]
    return [max(means[q][j] for q in range(tokens - asked, tokens)) for j in range(tokens)]


@each_backend
@pytest.mark.parametrize("block", [2, 32])
@pytest.mark.parametrize("window", [1, 5, 0.2, 0.5, 1.0])
def test_tokens_stay_that_some_query_attends_to(backend, window, block, monkeypatch):
    monkeypatch.setattr(anyquery, "BLOCK", block)
    keys, queries, valid = make(backend, KEYS), make(backend, QUERIES), make(backend, VALID, bool)
    base = SnapKV(budget=1.0, window=4, kernel_size=3)

    rows = backend.to_numpy(last_rows(Layer(keys, queries=queries, valid=valid, backend=backend), 30))
    rows = rows.reshape(2, 6, 30, 30)
    for threshold, facts in ((0.12, {"queries": queries}), (0.2, {"attention": make(backend, rows)})):
        done = evict(AnyQuery(base, threshold, window), keys, valid=valid, backend=backend, **facts)
        for row in range(2):
            found = strongest_by_loops(rows[row].tolist(), VALID[row].tolist(), window)
            assert all(abs(x - threshold) > 1e-5 for x in found)
            kept = [j for j in range(30) if VALID[row, j] and (found[j] >= threshold or j >= 26)]
            assert backend.to_numpy(done.counts)[row].tolist() == [len(kept)] * 3
            for head in backend.to_numpy(done.kept)[row].tolist():
                assert head == kept + [-1] * (30 - len(kept))
        assert len(kept) < 19
        assert len(kept) > 4 or window in (1, 0.2)


@each_backend
def test_the_budget_bounds_and_scores_decide_among_those_that_may_stay(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)
    base = KNorm(budget=1.0, num_sinks=1)
    policy = AnyQuery(base, 0.12, 0.5)

    free = evict(policy, keys, queries=queries, backend=backend)
    bound = evict(policy, keys, queries=queries, backend=backend, budget=6)

    alone = backend.to_numpy(evict(base, keys, backend=backend, budget=29).scores)
    for row, head in np.ndindex(2, 3):
        allowed = [j for j in backend.to_numpy(free.kept)[row, head].tolist() if j >= 0]
        assert len(allowed) > 6
        best = sorted(allowed, key=lambda j, s=alone[row, head]: (j != 0, -s[j], j))[:6]
        assert backend.to_numpy(bound.kept)[row, head].tolist() == sorted(best)


def test_nothing_that_reaches_the_threshold_leaves_what_is_protected():
    done = evict(AnyQuery(StreamingLLM(budget=1.0, num_sinks=2), threshold=1.0, window=1), KEYS, queries=0 * QUERIES)

    assert done.counts.tolist() == [[2] * 3] * 2
    assert done.kept[..., :3].tolist() == [[[0, 1, -1]] * 3] * 2


@each_backend
def test_a_graph_and_a_shared_set_on_top_bring_nothing_back(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)
    policy = AnyQuery(SnapKV(budget=1.0, window=4, kernel_size=3), 0.12, 0.5)

    alone, *others = (
        evict(each, keys, queries=queries, backend=backend)
        for each in (
            policy,
            GraphKV(policy),
            GraphKV(policy, Degree(fusion="max_rank")),
            ChunkKV(policy, chunk=4),
            Shared(policy),
        )
    )

    for other in others:
        assert backend.to_numpy(other.kept).tolist() == backend.to_numpy(alone.kept).tolist()


def test_wrong_options_are_refused():
    base = KNorm(budget=1.0)
    with pytest.raises(ArgumentError, match="threshold must lie in"):
        AnyQuery(base, 1.5)
    with pytest.raises(ArgumentTypeError, match="window must be an integer or a float share"):
        AnyQuery(base, window="all")
    for window in (0, 0.0):
        with pytest.raises(ArgumentError, match="window"):
            AnyQuery(base, window=window)
    with pytest.raises(ArgumentError, match="base must choose by its scores alone"):
        AnyQuery(AdaKV(base))
    with pytest.raises(ArgumentError, match=r"queries must hold the last 6 positions for AnyQuery\(KNorm\)"):
        evict(AnyQuery(base), KEYS)
    done = evict(AnyQuery(H2O(budget=20)), KEYS, queries=QUERIES)
    kept, number = done.apply(KEYS), done.kept.shape[-1]
    for queries, given in ((None, "none"), (QUERIES[:, :, :1], 1)):
        with pytest.raises(ArgumentError, match=f"queries must hold the last {number // 5} positions .* got {given}"):
            evict(AnyQuery(H2O(budget=20)), kept, queries=queries, state=done.state)


@pytest.mark.parametrize(
    ("num_tokens", "budget", "expected"),
    [
        (32768, 512, (3191, 3, 61, 256)),
        (131072, 256, (1296, 3, 75, 128)),
        (131072, 1024, (6472, 3, 60, 512)),
        (8192, 4096, (6841, 1, 76, 2048)),
    ],
)
def test_the_split_of_rocketkv(num_tokens, budget, expected):
    found = split(num_tokens, budget)

    assert found == Split(*expected)
    assert SnapKV.rocketkv(budget, num_tokens) == SnapKV(
        budget=expected[0], window=32, kernel_size=63, pooling="max", group_reduction="sum"
    )


def test_the_split_keeps_what_fits_and_what_is_asked_for():
    assert split(100, 100) == split(100, 100, max_new_tokens=7) == (100, 1, 128, 50)
    assert split(100, 300, head_size=64) == (100, 1, 64, 150)
    assert split(32768, 512, max_new_tokens=4000).first_stage == 8000
    assert split(32768, 512, max_new_tokens=40000).first_stage == 32768
    for num_tokens in (1, 7, 1000, 123457):
        for budget in (1, 3, 64, 1000):
            found = split(num_tokens, budget, head_size=96)
            assert min(budget, num_tokens) <= found.first_stage <= num_tokens
            ratio = found.first_stage / budget
            assert found.page == (np.ceil(np.sqrt(ratio)) if np.ceil(np.sqrt(ratio)) <= ratio else 1)
            assert 0 <= found.channels <= 96
    with pytest.raises(ArgumentError, match="budget must be at least 1; got 0"):
        split(100, 0)
    with pytest.raises(ArgumentTypeError, match="num_tokens must be an integer"):
        SnapKV.rocketkv(512, 1e5)
