"""SnapKV against published choices and a loop; the baselines against their definitions."""

import json
from math import exp, sqrt
from pathlib import Path

import numpy as np
import pytest

from graphkv import Random, SnapKV, StreamingLLM, evict
from tests.support.arrays import each_backend, make

VECTORS = json.loads((Path(__file__).parent / "snapkv_vectors.json").read_text())["cases"]


@each_backend
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['pooling']}{case['kernel_size']}-{case['budget']}")
def test_snapkv_keeps_what_the_public_code_keeps(backend, case):
    policy = SnapKV(**{name: case[name] for name in ("budget", "window", "kernel_size", "pooling", "group_reduction")})

    decision = evict(policy, make(backend, case["keys"]), queries=make(backend, case["queries"]), backend=backend)

    kept, scores = backend.to_numpy(decision.kept), backend.to_numpy(decision.scores)
    for row in np.ndindex(kept.shape[:-1]):
        ours, theirs = set(kept[row].tolist()), set(np.asarray(case["kept"])[row].tolist())
        # A maximum pools plateaus of equal scores. Where one crosses the cut, the public code leaves the choice to
        # torch.topk, which promises no order; ours is the lower position.
        for mine, other in zip(sorted(ours - theirs), sorted(theirs - ours), strict=True):
            assert case["pooling"] == "max"
            assert scores[row][mine] == scores[row][other]
            assert mine < other


def test_at_most_two_vector_rows_hang_on_a_tie():
    """The tie clause above must not hide a wrong score."""
    rows = [
        (number, row)
        for number, case in enumerate(VECTORS)
        for row in np.ndindex(np.asarray(case["kept"]).shape[:-1])
        if evict(
            SnapKV(**{name: case[name] for name in ("budget", "window", "kernel_size", "pooling")}),
            np.asarray(case["keys"], dtype="f4"),
            queries=np.asarray(case["queries"], dtype="f4"),
        )
        .kept[row]
        .tolist()
        != np.asarray(case["kept"])[row].tolist()
    ]
    assert rows == [(3, (0, 0)), (3, (0, 1))]


def test_snapkvs_official_preset_differs_by_its_pooling():
    """Maximum pooling lifts the neighbors of a peak to its height; an average of seven does not."""
    official, default = SnapKV.official(40), SnapKV(budget=40)
    assert {name for name, value in vars(official).items() if value != vars(default)[name]} == {"pooling"}
    keys = np.zeros((1, 1, 60, 2))
    keys[0, 0, 10, 0] = 9.0
    queries = np.broadcast_to([1.0, 0.0], (1, 1, 32, 2)).copy()

    peaks = [evict(policy, keys, queries=queries).importance[0, 0, 7:14] for policy in (official, default)]

    assert np.ptp(peaks[0]) == 0
    assert peaks[0][0] > 6 * peaks[1][3]


def snapkv_by_loops(keys, queries, window, kernel_size, pooling, reduction):
    """SnapKV's importance of the past, one number at a time; keys (H, N, D), queries (G H, Q, D)."""
    heads, tokens, size = len(keys), len(keys[0]), len(keys[0][0])
    groups = len(queries) // heads
    result = []
    for head in range(heads):
        votes = []
        for member in range(groups):
            received = [0.0] * (tokens - window)
            for w in range(window):
                query = queries[head * groups + member][len(queries[0]) - window + w]
                seen = range(tokens - window + w + 1)
                weights = [
                    exp(sum(a * b for a, b in zip(query, keys[head][j], strict=True)) / sqrt(size)) for j in seen
                ]
                for j in range(tokens - window):
                    received[j] += weights[j] / sum(weights)
            votes.append(received)
        reduce = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}[reduction]
        vote = [reduce([member[j] for member in votes]) for j in range(tokens - window)]
        pooled = []
        for j in range(tokens - window):
            near = [vote[i] for i in range(j - kernel_size // 2, j + kernel_size // 2 + 1) if 0 <= i < len(vote)]
            pooled.append(sum(near) / kernel_size if pooling == "avg" else max(near))
        result.append(pooled)
    return result


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "max", "sum"])
@pytest.mark.parametrize(("pooling", "kernel_size"), [("avg", 1), ("avg", 5), ("max", 3), ("max", 41), ("avg", 41)])
def test_snapkv_equals_loops(backend, reduction, pooling, kernel_size):
    rng = np.random.default_rng(3)
    keys, queries = rng.normal(size=(1, 2, 17, 4)), rng.normal(size=(1, 6, 6, 4))
    policy = SnapKV(budget=9, window=4, kernel_size=kernel_size, pooling=pooling, group_reduction=reduction)

    decision = evict(
        policy, make(backend, keys, np.float64), queries=make(backend, queries, np.float64), backend=backend
    )

    expected = snapkv_by_loops(keys[0].tolist(), queries[0].tolist(), 4, kernel_size, pooling, reduction)
    np.testing.assert_allclose(backend.to_numpy(decision.importance)[0, :, :13], expected, rtol=1e-12)


@each_backend
def test_snapkv_takes_attention_rows_instead_of_queries(backend):
    rng = np.random.default_rng(3)
    keys, queries = rng.normal(size=(1, 2, 17, 4)), rng.normal(size=(1, 6, 4, 4))
    logits = np.einsum("bhgqd,bhnd->bhgqn", queries.reshape(1, 2, 3, 4, 4), keys) / 2
    logits = np.where(np.arange(17) <= np.arange(13, 17)[:, None], logits, -np.inf)
    rows = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    policy = SnapKV(budget=9, window=4, kernel_size=3)

    by_queries = evict(policy, make(backend, keys), queries=make(backend, queries), backend=backend)
    by_rows = evict(policy, make(backend, keys), attention=make(backend, rows.reshape(1, 6, 4, 17)), backend=backend)

    np.testing.assert_allclose(
        backend.to_numpy(by_rows.scores), backend.to_numpy(by_queries.scores), rtol=1e-5, atol=1e-7
    )


def test_a_prompt_shorter_than_the_window_keeps_its_newest_tokens():
    keys = np.ones((1, 1, 6, 2))

    assert evict(SnapKV(budget=4, window=32), keys, queries=np.ones((1, 1, 6, 2))).kept.tolist() == [[[2, 3, 4, 5]]]


def test_a_wholly_padded_row_is_still_filled_exactly():
    keys = np.ones((1, 1, 6, 2))
    decision = evict(SnapKV(budget=4, window=2), keys, queries=keys, valid=np.zeros((1, 6), dtype=bool))

    assert decision.kept.shape == (1, 1, 4)
    assert np.isfinite(decision.scores).all()


@each_backend
@pytest.mark.parametrize(("budget", "kept"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 8, 9])])
def test_streaming_llm_keeps_sinks_then_the_newest(backend, budget, kept):
    decision = evict(StreamingLLM(budget=budget, num_sinks=3), make(backend, np.ones((1, 1, 10, 2))), backend=backend)

    assert backend.to_numpy(decision.kept).tolist() == [[kept]]


@each_backend
def test_random_is_the_same_on_every_backend_and_differs_by_seed_layer_and_head(backend):
    def kept(**options):
        seed, layer = options.get("seed", 0), options.get("layer", 0)
        keys = make(backend, np.ones((2, 2, 40, 2)))
        return backend.to_numpy(
            evict(Random(budget=5, seed=seed), keys, layer=layer, num_layers=2, backend=backend).kept
        )

    assert kept().tolist() == evict(Random(budget=5), np.ones((2, 2, 40, 2)), num_layers=2).kept.tolist()
    assert kept()[0].tolist() == kept()[1].tolist()
    assert kept()[0, 0].tolist() != kept()[0, 1].tolist()
    assert kept().tolist() != kept(seed=1).tolist()
    assert kept().tolist() != kept(layer=1).tolist()


def test_random_draws_anew_at_every_eviction_of_a_cache():
    """With one set of draws the same place would lose its token at every step."""
    policy, keys = Random(budget=20, seed=3), np.ones((1, 1, 21, 2))

    dropped = [
        (set(range(21)) - set(evict(policy.renewed(number), keys).kept[0, 0].tolist())).pop() for number in range(420)
    ]

    assert policy.renewed(0) is policy
    # 20 of each on average; 4.4 is the standard deviation.
    assert all(3 < dropped.count(place) < 40 for place in range(21))


def test_random_reaches_every_token():
    kept = [evict(Random(budget=5, seed=seed), np.ones((1, 1, 20, 1))).kept[0, 0].tolist() for seed in range(200)]

    counts = np.bincount(np.ravel(kept), minlength=20)
    # 50 expected each, standard deviation 6.
    assert counts.min() > 25
    assert counts.max() < 80
