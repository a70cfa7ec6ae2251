"""What only a device can show: order of work, ties in real sorts, streams, memory."""

from __future__ import annotations

import numpy as np
import pytest

from graphkv import Decay, Degree, GraphKV, Random, SnapKV, StreamingLLM, build_graph, evict, propagate, select
from tests.gpu.conftest import no_waiting

pytestmark = pytest.mark.gpu

POLICIES = {
    "snapkv": SnapKV(budget=128, window=16, num_sinks=2),
    "streaming": StreamingLLM(budget=128),
    "random": Random(budget=128),
    "graphkv": GraphKV(SnapKV(budget=128, window=16), Decay(neighbors=4, rounds=2)),
    "graphkv-recompute": GraphKV(SnapKV(budget=128, window=16), Decay(neighbors=1, rounds=2, recompute_sources=True)),
    "graphkv-degree": GraphKV(SnapKV(budget=128, window=16), Degree()),
}


def layer(num_tokens: int = 600) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    keys = random.normal(size=(2, 2, num_tokens, 16)).astype(np.float32)
    return keys, random.normal(size=(2, 4, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_evict_keeps_what_numpy_keeps(gpu, policy):
    keys, queries = layer()
    expected = evict(policy, keys, queries=queries)

    found = evict(policy, gpu.make(keys), queries=gpu.make(queries))

    kept = gpu.host(found.kept)
    np.testing.assert_allclose(gpu.host(found.scores), expected.scores, rtol=1e-3, atol=1e-5)
    for row in np.ndindex(kept.shape[:-1]):
        odd = sorted(set(kept[row].tolist()) ^ set(expected.kept[row].tolist()))
        values = expected.scores[row][odd]
        assert not odd or np.ptp(values) <= 1e-3 * np.max(np.abs(values)), (row, odd, values)


def test_results_are_on_the_device_of_the_input(gpu):
    keys = gpu.make(layer()[0])

    graph = build_graph(keys, keys[..., 0], num_sources=9, num_neighbors=5)

    for result in (graph.sources, graph.neighbors, graph.weights, propagate(keys[..., 0], graph)):
        assert result.device == keys.device


def test_twenty_runs_give_the_same_bits(gpu):
    keys = gpu.make(layer(400)[0])
    importance = keys[..., 0] * keys[..., 0]

    def run() -> list[bytes]:
        # Many sources share each neighbor, so an order that changes would show.
        graph = build_graph(keys, importance, num_sources=60, num_neighbors=200)
        results = [propagate(importance, graph, rounds=2, strength=0.1)]
        results += [propagate(importance, graph, accumulation="sum", strength=0.1), select(results[0], 99)]
        return [gpu.host(x).tobytes() for x in (graph.sources, graph.neighbors, graph.weights, *results)]

    first = run()

    assert all(run() == first for _ in range(20))


@pytest.mark.parametrize("num_tokens", [20, 1000, 5000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_ties_go_to_the_lower_index(gpu, num_tokens, dtype):
    scores = np.tile(np.asarray([0.0, -0.0, 1.0, np.nan, -np.inf], dtype=dtype), num_tokens // 5)
    ones, zeros = range(2, num_tokens, 5), (i for i in range(num_tokens) if i % 5 < 2)

    kept = gpu.host(select(gpu.make(scores), num_tokens // 2)).tolist()

    assert kept == sorted([*ones, *zeros][: num_tokens // 2])


def test_subnormal_scores_keep_their_order(gpu):
    scores = np.asarray([0.0, 1e-40, -1e-40, 2e-40, -0.0], dtype=np.float32)

    assert gpu.host(select(gpu.make(scores), 2)).tolist() == [1, 3]
    assert gpu.host(select(gpu.make(scores), 4)).tolist() == [0, 1, 3, 4]


def test_half_precision_is_widened_before_anything_else(gpu):
    keys = layer(200)[0].astype(np.float16)
    wide = keys.astype(np.float32)
    options = {"num_sources": 9, "num_neighbors": 5}

    half = build_graph(gpu.make(keys), gpu.make(keys[..., 0]), **options)
    full = build_graph(gpu.make(wide), gpu.make(wide[..., 0]), **options)

    assert half.weights.dtype == gpu.backend.xp.float32
    assert gpu.host(half.weights).tobytes() == gpu.host(full.weights).tobytes()
    assert gpu.host(half.neighbors).tobytes() == gpu.host(full.neighbors).tobytes()


def test_inputs_are_not_written(gpu):
    keys, queries = map(gpu.make, layer())
    before = gpu.host(keys).tobytes(), gpu.host(queries).tobytes()

    evict(POLICIES["graphkv"], keys, queries=queries)

    assert (gpu.host(keys).tobytes(), gpu.host(queries).tobytes()) == before


def _stream(gpu):
    if gpu.backend.name == "cupy":
        import cupy

        return cupy.cuda.Stream(non_blocking=True)
    import torch

    return torch.cuda.stream(torch.cuda.Stream())


def _wait(gpu) -> None:
    if gpu.backend.name == "cupy":
        import cupy

        cupy.cuda.Device().synchronize()
    else:
        import torch

        torch.cuda.synchronize()


def test_two_streams_do_not_disturb_each_other_only_on_a_device(gpu):
    first, second = gpu.make(layer(4000)[0]), gpu.make(layer(4000)[0][..., ::-1].copy())
    policy = GraphKV(Random(budget=500), Decay(neighbors=4))
    expected = [gpu.host(evict(policy, keys).scores) for keys in (first, second)]
    _wait(gpu)

    found = []
    for keys in (first, second) * 5:
        with _stream(gpu):
            found.append(evict(policy, keys).scores)
    _wait(gpu)

    for turn, scores in enumerate(found):
        assert gpu.host(scores).tobytes() == expected[turn % 2].tobytes()


def _peak_of(gpu, call) -> int:
    """Bytes that a call took from the pool, beyond what was there."""
    _wait(gpu)
    if gpu.backend.name == "cupy":
        import cupy

        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        call()
        _wait(gpu)
        return pool.total_bytes() - before
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    _wait(gpu)
    return torch.cuda.max_memory_allocated() - before


def test_no_square_of_the_tokens_is_made_only_on_a_device(gpu):
    num_tokens, num_sources, chunk_size = 32768, 256, 2048
    keys = gpu.make(np.random.default_rng(0).normal(size=(num_tokens, 64)).astype(np.float32))
    importance = keys[..., 0]
    options = {"num_sources": num_sources, "num_neighbors": 8, "chunk_size": chunk_size}
    build_graph(keys, importance, **options)  # the workspaces of the libraries

    peak = _peak_of(gpu, lambda: build_graph(keys, importance, **options))

    # Key copies, and a few dozen arrays of K x chunk; N x N would be 4 GiB.
    assert peak < 8 * keys.nbytes + 64 * num_sources * chunk_size * 8


def test_torch_waits_for_nothing_only_on_a_device(gpu):
    if gpu.backend.name != "torch":
        pytest.skip("only torch can say when it waits; for CuPy the stand-in's log does")
    keys, queries = map(gpu.make, layer())

    with no_waiting():
        # Random is left out: it brings a table from the host, and that copy waits.
        found = [evict(POLICIES[name], keys, queries=queries).kept for name in POLICIES if name != "random"]

    assert all(kept.shape == (2, 2, 128) for kept in found)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "random"])
def test_an_eviction_is_captured_and_replayed_only_on_a_device(gpu, name):
    """A CUDA graph replays all launches at once; it takes what waits for nothing and has fixed shapes."""
    if gpu.backend.name != "torch":
        pytest.skip("graphs are captured with torch only")
    import torch

    keys, queries = map(gpu.make, layer())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for a call or two on a stream aside first
        for _ in range(2):
            evict(POLICIES[name], keys, queries=queries)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evict(POLICIES[name], keys, queries=queries)
    others = [gpu.make(x[..., ::-1].copy()) for x in layer()]
    keys.copy_(others[0])
    queries.copy_(others[1])

    graph.replay()

    wanted = evict(POLICIES[name], others[0], queries=others[1])
    np.testing.assert_array_equal(gpu.host(found.kept), gpu.host(wanted.kept))
    np.testing.assert_array_equal(gpu.host(found.scores), gpu.host(wanted.scores))


def test_a_second_device_only_on_a_device(gpu):
    if gpu.backend.name == "cupy":
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("there is one CUDA device")
        with cupy.cuda.Device(1):
            keys = gpu.make(layer()[0])
            kept = evict(POLICIES["streaming"], keys).kept
    else:
        import torch

        if torch.cuda.device_count() < 2:
            pytest.skip("there is one CUDA device")
        keys = gpu.make(layer()[0]).to("cuda:1")
        kept = evict(POLICIES["streaming"], keys).kept

    assert kept.device == keys.device
    assert gpu.host(kept)[0, 0, :4].tolist() == [0, 1, 2, 3]
