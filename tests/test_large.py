"""Places and sizes beyond 2^31, which 32 bits do not count: right, or refused in one line."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graphkv import (
    Absorb,
    AdaKV,
    ArgumentError,
    Backend,
    Degree,
    Graph,
    GraphKV,
    KeyDiff,
    KNorm,
    PageRank,
    SnapKV,
    build_graph,
    evict,
    pagerank,
    propagate,
    select,
)
from graphkv.backends import streamed
from graphkv.core import merging, primitives
from graphkv.core.backend import load
from graphkv.core.policy import Policy
from tests.support.subjects import NUMPY

torch_only = pytest.mark.skipif(not find_spec("torch"), reason="torch's meta device")
jax_only = pytest.mark.skipif(not find_spec("jax"), reason="no JAX")

POLICIES: dict[str, Policy] = {
    "knorm": KNorm(budget=512),
    "keydiff": KeyDiff(budget=512),
    "snapkv": SnapKV(budget=512),
    "snapkv+adakv": AdaKV(SnapKV(budget=512)),
    "knorm+degree": GraphKV(KNorm(budget=512), Degree(fusion="max_rank")),
    "knorm+pagerank": GraphKV(KNorm(budget=512), PageRank()),
}


# 2^37 entries; and 2^33 tokens of one row, whose places need more than 32 bits.
@torch_only
@pytest.mark.parametrize("shape", [(1, 8, 2**27, 128), (1, 1, 2**33, 2)], ids=["entries", "tokens"])
@pytest.mark.parametrize("name", POLICIES)
def test_torch_goes_through_with_places_of_64_bits(name, shape):
    import torch

    policy = POLICIES[name]
    keys = torch.empty(shape, device="meta")

    done = evict(policy, keys, values=keys, queries=torch.empty((*shape[:2], 64, shape[-1]), device="meta"))

    width = policy.layer_budget(shape[2], 0, 1) * (shape[1] if name == "snapkv+adakv" else 1)
    assert (tuple(done.kept.shape), done.kept.dtype) == ((*shape[:2], width), torch.int64)
    assert tuple(done.apply(keys).shape) == (*shape[:2], width, shape[3])


# Both ways of the graph beyond 2^31: entries, and places, which share an integer with a similarity up to 2^32.
@torch_only
@pytest.mark.parametrize("shape", [(1, 8, 2**21, 256), (1, 1, 2**32, 2), (1, 1, 2**32 + 1, 2)])
def test_torch_builds_graphs_with_places_of_64_bits(shape):
    import torch

    keys = torch.empty(shape, device="meta")

    graph = build_graph(keys, keys[..., 0], num_sources=1, num_neighbors=1)

    assert (tuple(graph.neighbors.shape), graph.neighbors.dtype) == ((*shape[:2], 1, 1), torch.int64)


def test_places_that_share_an_integer_with_a_similarity_have_room(monkeypatch):
    """Above 2^32 tokens the portable form is called, here above 40."""
    random, called = np.random.default_rng(0), []
    portable = streamed.portable_build_graph
    monkeypatch.setattr(streamed, "PLACES", 40)
    monkeypatch.setattr(streamed, "portable_build_graph", lambda *x, **y: called.append(x) or portable(*x, **y))

    for number in (40, 41):
        keys = random.normal(size=(number, 4)).astype("float32")
        build_graph(keys, keys[:, 0], num_sources=3, num_neighbors=2)

    assert [len(arrays[0]) for arrays in called] == [41]


class Narrow:
    """NumPy with integers that count to 50 only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(NUMPY.xp, name)

    @staticmethod
    def iinfo(dtype: Any) -> Any:
        return SimpleNamespace(max=50)


NARROW = Backend(name="narrow", library="numpy", xp=Narrow(), to_numpy=np.asarray)


@pytest.mark.parametrize("shape", [(7, 3, 11), (60, 1), (1, 50)])
def test_segments_of_more_rows_than_places_are_the_same(shape):
    random = np.random.default_rng(1)
    values, index = random.normal(size=shape), random.integers(0, 9, size=shape)

    for reduce in (primitives.portable_segment_sum, primitives.portable_segment_product):
        found = reduce(values, index, 9, backend=NARROW)
        np.testing.assert_array_equal(found, reduce(values, index, 9, backend=NUMPY))


def test_more_slots_than_float32_counts_are_the_same(monkeypatch):
    kept = np.asarray([[0, 1, 4, 5, 7, 8, 11, -1]])
    expected = merging.slots(kept, 12, backend=NUMPY)
    added, segment_sum = [], primitives.segment_sum

    def noticing(values, *given, **options):
        added.append(float(values.max()))
        return segment_sum(values, *given, **options)

    monkeypatch.setattr(merging, "EXACT", 4)
    monkeypatch.setattr(primitives, "segment_sum", noticing)

    assert merging.slots(kept, 12, backend=NUMPY).tolist() == expected.tolist()
    assert max(added) < merging.EXACT
    assert expected.tolist() == [[0, 1, -1, -1, 2, 3, -1, 4, 5, -1, -1, 6]]


def test_more_entries_than_places_are_refused_by_name():
    scores = np.ones((1, 51), "float32")

    with pytest.raises(ArgumentError) as caught:
        select(scores, 2, backend=NARROW)

    assert str(caught.value) == "scores must have at most 50 entries along an axis, to have indices; got (1, 51)"


@jax_only
def test_jax_refuses_what_its_integers_do_not_count():
    import jax

    def shaped(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, "float32")

    long = "must have at most 2147483647 entries along an axis, to have indices; got "
    for call, arrays in (
        (lambda keys, x: build_graph(keys, x, num_sources=2, num_neighbors=2), ((1, 2**31, 2), (1, 2**31))),
        (lambda x: select(x, 3), ((1, 2**31),)),
        (lambda keys: evict(AdaKV(KNorm(budget=5)), keys).kept, ((1, 8, 2**28, 2),)),
    ):
        with pytest.raises(ArgumentError, match=long):
            jax.eval_shape(call, *(shaped(*shape) for shape in arrays))


@jax_only
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
def test_jax_counts_places_row_by_row_where_all_rows_have_more_than_its_integers():
    """Flat, these had 2^32 places: an OverflowError of JAX's, or indices that wrapped."""
    import jax

    def shaped(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    policy, rows = Absorb(KNorm(budget=5), weights="count"), (4096, 2**20)

    def merged(keys: Any) -> Any:
        return evict(policy, keys, values=keys, queries=keys[:, :, -1:]).compress(keys, keys)

    assert jax.eval_shape(merged, shaped(64, 8, 2**16, 128))[0].shape == (64, 8, 5, 128)
    edges = shaped(4096, 2, 2, dtype="int32")
    graph = Graph(sources=shaped(4096, 2, dtype="int32"), neighbors=edges, weights=shaped(4096, 2, 2), num_tokens=2**20)
    assert jax.eval_shape(propagate, shaped(*rows), graph).shape == rows
    assert jax.eval_shape(pagerank, shaped(*rows), shaped(*rows, 2)).shape == rows
    columns = shaped(*rows, dtype="int32")
    total = jax.eval_shape(
        lambda x, into: primitives.segment_sum(x, into, 2**20, backend=load("jax")), shaped(*rows), columns
    )
    assert total.shape == rows
