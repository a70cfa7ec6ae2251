"""The streamed graph of NumPy and torch is the portable one, index by index, and never holds a K x N array."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from graphkv import build_graph, select
from graphkv.backends import host, streamed
from graphkv.core.backend import load

FIELDS = ("sources", "neighbors", "weights")


def both(name, keys, importance, **options):
    """Return the graph of a backend, and that of the same without its override."""
    backend = load(name)
    keys, importance = backend.xp.asarray(keys), backend.xp.asarray(importance)
    if options.get("valid") is not None:
        options["valid"] = backend.xp.asarray(options["valid"])
    backends = backend, dataclasses.replace(backend, build_graph=None)
    return [build_graph(keys, importance, backend=each, **options) for each in backends]


def assert_same(graphs):
    for field in FIELDS:
        ours, portable = (np.asarray(getattr(graph, field)) for graph in graphs)
        np.testing.assert_array_equal(ours, portable, err_msg=field)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("seed", range(12))
def test_streaming_gives_the_portable_graph(name, dtype, seed):
    """Keys of ones and minus ones make cosines exact and nearly all of them ties; padding, chunks and odd sizes."""
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(1, 400))
    rows = (2, int(rng.integers(1, 4)))
    keys = rng.choice([-1.0, 1.0], (*rows, num_tokens, 16)).astype(dtype)
    keys[..., rng.integers(0, num_tokens), :] = rng.choice([0.0, 1e-30, np.inf, np.nan])

    graphs = both(
        name,
        keys,
        rng.choice([0.0, 1.0, 2.0], (*rows, num_tokens)).astype("float32"),
        num_sources=int(rng.integers(1, num_tokens + 1)),
        num_neighbors=int(rng.integers(1, 40)),
        valid=rng.random((*rows, num_tokens)) < rng.choice([1.0, 0.9, 0.2]),
        chunk_size=int(rng.choice([1, 7, 33, 64, 100, 4096])),
    )

    assert_same(graphs)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("buffer_size", [1, 100, 10_000])
def test_the_size_of_the_buffer_changes_nothing(name, buffer_size, monkeypatch):
    monkeypatch.setattr(streamed, "BUFFER_SIZE", buffer_size)
    rng = np.random.default_rng(0)
    keys = rng.choice([-1.0, 1.0], (5, 300, 16)).astype("float32")

    assert_same(both(name, keys, rng.random((5, 300)), num_sources=20, num_neighbors=6))


def test_many_neighbors_in_one_block_are_all_found():
    """The best M of a source may all stand in one block, where a maximum per block shows only one of them."""
    keys = np.tile(np.eye(2, 16, dtype="float32")[1], (500, 1))
    keys[0] = keys[64:80] = np.eye(2, 16, dtype="float32")[0]

    graph = build_graph(keys, np.arange(500, 0, -1, dtype="float32"), num_sources=1, num_neighbors=16)

    assert graph.neighbors.tolist() == [list(range(64, 80))]


@pytest.mark.parametrize("num_sources", [1, 50])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_products_and_directions_never_exceed_the_buffer(name, num_sources, monkeypatch):
    """Many sources make many products; few sources of many rows make many directions."""
    sizes = []
    module = __import__(f"graphkv.backends.{name}", fromlist=["_nearest"])

    def watched(keys, sources, is_padding, *, width, height, **options):
        sizes.extend(per_token * width * height for per_token in (sources.shape[1], keys.shape[2] + 1))
        return nearest(keys, sources, is_padding, width=width, height=height, **options)

    nearest = module._nearest
    backend = load(name)
    xp = backend.xp
    backend = dataclasses.replace(
        backend,
        build_graph=lambda *arrays, **options: streamed.build_graph(*arrays, nearest=watched, block_size=32, **options),
    )
    monkeypatch.setattr(streamed, "BUFFER_SIZE", 4096)

    build_graph(xp.ones((6, 3000, 4)), xp.ones((6, 3000)), num_sources=num_sources, num_neighbors=2, backend=backend)

    assert max(sizes) <= 4096
    assert sizes


def test_numpy_keeps_no_more_memory_than_the_buffer(monkeypatch):
    """What a thread keeps for its next graph: products and directions of at most the buffer."""
    numpy = load("numpy")
    found = {}

    def in_a_thread():
        rng = np.random.default_rng(0)
        for num_rows, num_tokens, num_sources in ((64, 2000, 1), (2, 4000, 500)):
            keys = rng.normal(size=(num_rows, num_tokens, 15)).astype("float32")
            build_graph(keys, keys[..., 0], num_sources=num_sources, num_neighbors=2, backend=numpy)
        found.update(host.scratch.buffers)

    monkeypatch.setattr(streamed, "BUFFER_SIZE", 1 << 16)
    # A thread of its own has no memory from other tests.
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()

    assert {name: buffer.size <= 1 << 16 for name, buffer in found.items()} == {"directions": True, "products": True}


def test_torch_can_be_mapped_and_compiled_on_a_cpu():
    """NumPy must not reach for memory that is not there."""
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    mapped = torch.vmap(lambda row: select(row, 5))(scores)
    assert mapped.tolist() == select(scores, 5).tolist()

    backend = load("torch")
    keys = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(1))

    def step(keys, importance):
        graph = build_graph(keys, importance, num_sources=5, num_neighbors=3, backend=backend)
        return graph.neighbors

    torch._dynamo.reset()
    whole = torch.compile(step, backend="eager", fullgraph=True)
    assert whole(keys, keys[..., 0]).tolist() == step(keys, keys[..., 0]).tolist()


def test_keys_that_record_gradients_are_taken():
    keys = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

    graph = build_graph(keys, torch.arange(100.0).view(2, 50), num_sources=3, num_neighbors=2)

    graph.weights.sum().backward()
    assert torch.any(keys.grad != 0)
    with torch.no_grad():
        again = build_graph(keys, torch.arange(100.0).view(2, 50), num_sources=3, num_neighbors=2)
    torch.testing.assert_close(graph.weights.detach(), again.weights)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_cosines_that_rounding_lifts_above_one_are_ties(name):
    """Clipped before they are ranked: among edges of weight 1, the lower token comes first."""
    xp = load(name).xp
    rng = np.random.default_rng(0)
    key = rng.normal(size=64).astype("float32")
    keys = np.concatenate([[key], key * rng.uniform(0.1, 10, (300, 1))]).astype("float32")

    graph = build_graph(
        xp.asarray(keys), xp.asarray(-np.arange(301, dtype="float32")), num_sources=1, num_neighbors=300
    )

    weights, neighbors = np.asarray(graph.weights)[0], np.asarray(graph.neighbors)[0]
    tied = neighbors[weights == 1]
    assert 50 < tied.size < 300
    assert tied.tolist() == sorted(tied.tolist())


# A matrix product promises no such thing. It is so where all chunks have one shape, on the machines that we know.
@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(1000, None), (4113, None), (1000, 300)])
def test_equal_keys_have_equal_weights_wherever_they_are(name, num_tokens, chunk_size):
    rng = np.random.default_rng(num_tokens)
    keys = rng.normal(size=(2, num_tokens, 64)).astype("float32")
    duplicates = rng.permutation(num_tokens)[: num_tokens // 10]
    keys[:, duplicates] = keys[:, duplicates[:1]]
    importance = rng.random((2, num_tokens)).astype("float32")
    importance[:, duplicates] = 0

    for graph in both(name, keys, importance, num_sources=25, num_neighbors=num_tokens - 25, chunk_size=chunk_size):
        weights, neighbors = np.asarray(graph.weights), np.asarray(graph.neighbors)
        for row, source in np.ndindex(2, 25):
            of_duplicates = weights[row, source][np.isin(neighbors[row, source], duplicates)]
            assert len(set(of_duplicates.tolist())) == 1


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("crowd", [0, 50])
def test_tokens_are_ranked_without_a_second_partial_sort_where_no_two_are_equal(name, crowd, monkeypatch):
    """Whoever reaches the lowest of the best blocks is ranked; a crowd of those in one block is ranked another way."""
    found = []
    above = host._above
    monkeypatch.setattr(host, "_above", lambda *given: found.append(above(*given)) or found[-1])
    keys = np.random.default_rng(0).normal(size=(2, 1500, 16)).astype("float32")
    # All near the first token, which is the source; no chunk of tokens and no block of 64 begins after them.
    keys[:, 64 : 64 + crowd] = keys[:, :1] + 0.1 * keys[:, 64 : 64 + crowd]
    importance = np.zeros((2, 1500), dtype="float32")
    importance[:, 0] = 1

    ours, portable = both(name, keys, importance, num_sources=1, num_neighbors=6)

    # Threads rank a row each.
    assert {each is None for each in found} == {crowd > 0}
    for field in ("sources", "neighbors"):
        np.testing.assert_array_equal(np.asarray(getattr(ours, field)), np.asarray(getattr(portable, field)))
    np.testing.assert_allclose(np.asarray(ours.weights), np.asarray(portable.weights), rtol=2e-6)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_sources_and_kept_tokens_are_those_of_the_ranking(name):
    """One partial sort, where neither padding, protection nor NaN comes before the scores."""
    backend = load(name)
    rng = np.random.default_rng(0)
    scores = rng.choice([-np.inf, -1.0, -0.0, 0.0, 0.5, np.inf], (4, 90)).astype("float32")
    with_nan = np.where(rng.random((4, 90)) < 0.1, np.float32(np.nan), scores)
    for each in (scores, with_nan):
        for budget in (1, 17, 89, 90):
            expected = select(backend.xp.asarray(each), budget, backend=dataclasses.replace(backend, select=None))
            assert select(backend.xp.asarray(each), budget, backend=backend).tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "block"), [("numpy", 32), ("torch", 64)])
def test_tokens_of_no_weight_come_before_those_that_may_not_be_neighbors(name, block):
    """As many blocks hold a candidate as neighbors are asked for, and none of these points the source's way."""
    keys = -np.ones((256, 8), dtype="float32")
    keys[130] = 1
    valid = np.isin(np.arange(256), np.arange(128, 128 + 2 * block))

    graphs = both(name, keys, -abs(np.arange(256) - 130).astype("float32"), num_sources=1, num_neighbors=2, valid=valid)

    assert np.asarray(graphs[0].neighbors).tolist() == [[128, 129]]
    assert_same(graphs)
