"""What bad input gets: the same class and the same words on every backend."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import graphkv
from graphkv import (
    ArgumentError,
    ArgumentTypeError,
    Backend,
    BackendError,
    BackendUnavailableError,
    Decay,
    Graph,
    GraphKV,
    GraphKVError,
    PageRank,
    Probe,
    Random,
    SnapKV,
    StreamingLLM,
)
from graphkv.core.backend import load
from graphkv.testing import asserts, label
from tests.support import strict
from tests.support.subjects import NUMPY

# Not the ids of the kit: only libraries differ in what they let through.
BUDGET = "budget must be a number of tokens as an integer, or a share above 0 and at most 1"
TORCH = [load("torch")] if find_spec("torch") else []
LIBRARIES = [NUMPY, *TORCH, strict.STRICT]


class Calls:
    """Calls with one argument wrong, the others right: two rows of N = 4 tokens, D = 3."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def array(self, *shape: int, dtype: str = "float32") -> Any:
        return asserts.make(self.backend, np.ones(shape), dtype)

    def complex(self, *shape: int) -> Any:
        return self.backend.xp.astype(self.array(*shape), self.backend.xp.complex64)

    def mask(self, *shape: int) -> Any:
        return asserts.make(self.backend, np.ones(shape, dtype=np.bool_))

    def graph(self, **fields: Any) -> Graph:
        usual = {
            "sources": self.array(2, 1, dtype="int64"),
            "neighbors": self.array(2, 1, 2, dtype="int64"),
            "weights": self.array(2, 1, 2),
            "num_tokens": 4,
        }
        return Graph(**usual | fields)

    def build(self, *arrays: Any, **options: Any) -> Any:
        keys, importance = arrays or (self.array(2, 4, 3), self.array(2, 4))
        usual = {"num_sources": 1, "num_neighbors": 2, "backend": self.backend}
        return graphkv.build_graph(keys, importance, **usual | options)

    def propagate(self, *arrays: Any, **options: Any) -> Any:
        importance, graph = arrays or (self.array(2, 4), self.graph())
        return graphkv.propagate(importance, graph, **{"backend": self.backend} | options)

    def degree(self, *arrays: Any, **options: Any) -> Any:
        (keys,) = arrays or (self.array(2, 4, 3),)
        return graphkv.degree(keys, **{"backend": self.backend} | options)

    def fuse(self, *arrays: Any, **options: Any) -> Any:
        importance, degree = arrays or (self.array(2, 4), self.array(2, 4))
        return graphkv.fuse(importance, degree, **{"backend": self.backend} | options)

    def select(self, *arguments: Any, **options: Any) -> Any:
        scores, budget = arguments or (self.array(2, 4), 2)
        return graphkv.select(scores, budget, **{"backend": self.backend} | options)

    def evict(self, *arguments: Any, **options: Any) -> Any:
        policy, keys = arguments or (StreamingLLM(budget=3), self.array(1, 2, 6, 3))
        return graphkv.evict(policy, keys, **{"backend": self.backend} | options)


@dataclass(frozen=True)
class Row:
    """One mistake and what it gets; `{library}` in the words is the library of the arrays."""

    call: Any
    error: type[GraphKVError]
    builtin: type[Exception]
    says: str


def value(call: Any, says: str) -> Row:
    return Row(call, ArgumentError, ValueError, says)


def kind(call: Any, says: str) -> Row:
    return Row(call, ArgumentTypeError, TypeError, says)


def library(call: Any, says: str) -> Row:
    return Row(call, BackendError, TypeError, says)


STEP_TABLE = {
    # ranks and shapes
    "keys without D": value(lambda c: c.build(c.array(4), c.array(4)), "keys must have shape (..., N, D); got (4,)"),
    "keys without N": value(lambda c: c.build(c.array(), c.array()), "keys must have shape (..., N, D); got ()"),
    "importance of another N": value(
        lambda c: c.build(c.array(2, 4, 3), c.array(2, 5)), "importance must have shape (2, 4) like keys; got (2, 5)"
    ),
    "importance of another batch": value(
        lambda c: c.build(c.array(2, 4, 3), c.array(4)), "importance must have shape (2, 4) like keys; got (4,)"
    ),
    "importance of no axes": value(
        lambda c: c.propagate(c.array(), c.graph()), "importance must have shape (..., N); got ()"
    ),
    "importance of another N than the graph": value(
        lambda c: c.propagate(c.array(2, 5), c.graph()), "importance must have shape (2, 4) like the graph; got (2, 5)"
    ),
    "scores of no axes": value(lambda c: c.select(c.array(), 1), "scores must have shape (..., N); got ()"),
    "valid of another shape": value(
        lambda c: c.build(valid=c.mask(4)), "valid must have the shape (2, 4) of importance; got (4,)"
    ),
    "valid of another shape in select": value(
        lambda c: c.select(valid=c.mask(2, 5)), "valid must have the shape (2, 4) of scores; got (2, 5)"
    ),
    "protected of another shape": value(
        lambda c: c.select(protected=c.mask(1, 4)), "protected must have the shape (2, 4) of scores; got (1, 4)"
    ),
    # dtypes
    "complex keys": kind(
        lambda c: c.build(c.complex(2, 4, 3), c.array(2, 4)), "keys must be real; got dtype complex64"
    ),
    "complex importance": kind(
        lambda c: c.build(c.array(2, 4, 3), c.complex(2, 4)), "importance must be real; got dtype complex64"
    ),
    "bool scores": kind(lambda c: c.select(c.mask(2, 4), 2), "scores must be real; got dtype bool"),
    "integer valid": kind(lambda c: c.build(valid=c.array(2, 4, dtype="int64")), "valid must be bool; got dtype int64"),
    "float protected": kind(lambda c: c.select(protected=c.array(2, 4)), "protected must be bool; got dtype float32"),
    "float neighbors": kind(
        lambda c: c.propagate(c.array(2, 4), c.graph(neighbors=c.array(2, 1, 2))),
        "neighbors must be an array of integers; got dtype float32",
    ),
    "complex weights": kind(
        lambda c: c.propagate(c.array(2, 4), c.graph(weights=c.complex(2, 1, 2))),
        "weights must be real; got dtype complex64",
    ),
    # counts
    "negative num_sources": value(lambda c: c.build(num_sources=-1), "num_sources must be at least 0; got -1"),
    "float num_sources": kind(lambda c: c.build(num_sources=2.0), "num_sources must be an integer; got 2.0"),
    "bool num_sources": kind(lambda c: c.build(num_sources=True), "num_sources must be an integer; got True"),
    "negative num_neighbors": value(lambda c: c.build(num_neighbors=-2), "num_neighbors must be at least 0; got -2"),
    "word for num_neighbors": kind(
        lambda c: c.build(num_neighbors="two"), "num_neighbors must be an integer; got 'two'"
    ),
    "chunk_size 0": value(lambda c: c.build(chunk_size=0), "chunk_size must be at least 1; got 0"),
    "float chunk_size": kind(lambda c: c.build(chunk_size=1.5), "chunk_size must be an integer; got 1.5"),
    "negative budget": value(lambda c: c.select(c.array(2, 4), -1), "budget must be at least 0; got -1"),
    "float budget": kind(lambda c: c.select(c.array(2, 4), 0.5), "budget must be an integer; got 0.5"),
    "no budget": kind(lambda c: c.select(c.array(2, 4), None), "budget must be an integer; got None"),
    "bool budget": kind(lambda c: c.select(c.array(2, 4), False), "budget must be an integer; got False"),
    "list for a budget": kind(lambda c: c.select(c.array(2, 4), [2]), "budget must be an integer; got list"),
    "negative rounds": value(lambda c: c.propagate(rounds=-1), "rounds must be at least 0; got -1"),
    "float rounds": kind(lambda c: c.propagate(rounds=1.0), "rounds must be an integer; got 1.0"),
    "bool rounds": kind(lambda c: c.propagate(rounds=True), "rounds must be an integer; got True"),
    # options
    "unknown signal": value(
        lambda c: c.propagate(signal="boost"), "signal must be one of ['decay', 'enhance', 'evict']; got 'boost'"
    ),
    "signal that is no word": value(
        lambda c: c.propagate(signal=None), "signal must be one of ['decay', 'enhance', 'evict']; got None"
    ),
    "unknown accumulation": value(
        lambda c: c.propagate(accumulation="max"), "accumulation must be one of ['product', 'sum']; got 'max'"
    ),
    "sum of two rounds": value(
        lambda c: c.propagate(accumulation="sum", rounds=2), "rounds must be 1 with accumulation 'sum'; got 2"
    ),
    "sum of no rounds": value(
        lambda c: c.propagate(accumulation="sum", rounds=0), "rounds must be 1 with accumulation 'sum'; got 0"
    ),
    "strength above 1": value(lambda c: c.propagate(strength=1.5), "strength must lie in [0, 1]; got 1.5"),
    "strength below 0": value(lambda c: c.propagate(strength=-0.5), "strength must lie in [0, 1]; got -0.5"),
    "strength NaN": value(lambda c: c.propagate(strength=float("nan")), "strength must lie in [0, 1]; got nan"),
    "strength infinite": value(lambda c: c.propagate(strength=float("inf")), "strength must lie in [0, 1]; got inf"),
    "strength as a word": kind(
        lambda c: c.propagate(strength="1"), "strength must be a real number in [0, 1]; got '1'"
    ),
    "strength bool": kind(lambda c: c.propagate(strength=True), "strength must be a real number in [0, 1]; got True"),
    "strength complex": kind(
        lambda c: c.propagate(strength=1j), "strength must be a real number in [0, 1]; got complex"
    ),
    "unknown fusion": value(
        lambda c: c.fuse(fusion="sum"), "fusion must be one of ['max_rank', 'mean_rank', 'power']; got 'sum'"
    ),
    "no degree": value(
        lambda c: graphkv.fuse(c.array(2, 4), backend=c.backend), "degree or distance must be given; got neither"
    ),
    "degree and distance": value(
        lambda c: c.fuse(distance=c.array(2, 4)), "degree or distance must be given; got both"
    ),
    "distance of another N": value(
        lambda c: graphkv.fuse(c.array(2, 4), distance=c.array(2, 5), backend=c.backend),
        "distance must have shape (2, 4) like importance; got (2, 5)",
    ),
    "exponent 0": value(lambda c: c.fuse(exponent=0), "exponent must be at least 1; got 0"),
    "float exponent": kind(lambda c: c.fuse(exponent=2.0), "exponent must be an integer; got 2.0"),
    # the degree signal
    "keys of one axis in degree": value(lambda c: c.degree(c.array(4)), "keys must have shape (..., N, D); got (4,)"),
    "complex keys in degree": kind(lambda c: c.degree(c.complex(2, 4, 3)), "keys must be real; got dtype complex64"),
    "valid of another shape in degree": value(
        lambda c: c.degree(valid=c.mask(2, 5)), "valid must have the shape (2, 4) of the tokens of keys; got (2, 5)"
    ),
    "integer valid in degree": kind(
        lambda c: c.degree(valid=c.array(2, 4, dtype="int64")), "valid must be bool; got dtype int64"
    ),
    "list for keys in degree": library(lambda c: c.degree([[1.0]]), "keys must be an array; got list"),
    "degree of another N": value(
        lambda c: c.fuse(c.array(2, 4), c.array(2, 5)), "degree must have shape (2, 4) like importance; got (2, 5)"
    ),
    "bool importance in fuse": kind(
        lambda c: c.fuse(c.mask(2, 4), c.array(2, 4)), "importance must be real; got dtype bool"
    ),
    "complex degree": kind(
        lambda c: c.fuse(c.array(2, 4), c.complex(2, 4)), "degree must be real; got dtype complex64"
    ),
    "valid of another shape in fuse": value(
        lambda c: c.fuse(valid=c.mask(4)), "valid must have the shape (2, 4) of importance; got (4,)"
    ),
    # graphs
    "graph without source axis": value(
        lambda c: c.graph(sources=c.array(dtype="int64")), "sources must have shape (..., K); got ()"
    ),
    "graph of other neighbors": value(
        lambda c: c.graph(neighbors=c.array(2, 3, 2, dtype="int64")),
        "neighbors must have shape (..., K, M) with sources of shape (2, 1); got (2, 3, 2)",
    ),
    "graph of other weights": value(
        lambda c: c.graph(weights=c.array(2, 1, 3)), "weights must have shape (2, 1, 2) like neighbors; got (2, 1, 3)"
    ),
    "graph of negative size": value(lambda c: c.graph(num_tokens=-1), "num_tokens must be at least 0; got -1"),
    "graph of float size": kind(lambda c: c.graph(num_tokens=4.0), "num_tokens must be an integer; got 4.0"),
    "graph of lists": library(lambda c: c.graph(sources=[[0], [0]]), "sources must be an array; got list"),
    "no graph": kind(lambda c: c.propagate(c.array(2, 4), None), "graph must be a Graph; got NoneType"),
    # libraries
    "list for keys": library(lambda c: c.build([[1.0]], c.array(1)), "keys must be an array; got list"),
    "number for scores": library(lambda c: c.select(3.0, 1), "scores must be an array; got float"),
    "list for a mask": library(lambda c: c.select(valid=[True] * 4), "valid must be an array; got list"),
    "number for importance": library(lambda c: c.propagate(1, c.graph()), "importance must be an array; got int"),
    "backend that is none": library(
        lambda c: c.select(backend=3), "backend must be a Backend, a name or None; got int"
    ),
    # whole layers
    "keys of three axes": value(
        lambda c: c.evict(StreamingLLM(budget=3), c.array(2, 6, 3)),
        "keys must have shape (batch, kv_heads, N, D); got (2, 6, 3)",
    ),
    "policy that is none": kind(lambda c: c.evict("snapkv", c.array(1, 2, 6, 3)), "policy must be a Policy; got str"),
    "values of another N": value(
        lambda c: c.evict(values=c.array(1, 2, 5, 3)), "values must have shape (1, 2, 6) like keys; got (1, 2, 5)"
    ),
    "queries of other heads": value(
        lambda c: c.evict(queries=c.array(1, 3, 6, 3)),
        "queries must have a multiple of the 2 KV heads of keys; got 3 heads",
    ),
    "queries of more positions": value(
        lambda c: c.evict(queries=c.array(1, 2, 7, 3)),
        "queries must cover at most the N=6 positions of keys; got 7",
    ),
    "queries of another head size": value(
        lambda c: c.evict(queries=c.array(1, 2, 6, 4)),
        "queries must have shape (batch, query_heads, Q, D) = (1, query_heads, Q, 3) like keys; got (1, 2, 6, 4)",
    ),
    "complex queries": kind(
        lambda c: c.evict(queries=c.complex(1, 2, 6, 3)), "queries must be real; got dtype complex64"
    ),
    "valid of another batch": value(
        lambda c: c.evict(valid=c.mask(2, 6)), "valid must have the shape (1, 6) of (batch, N); got (2, 6)"
    ),
    "unrotated keys of another head size": value(
        lambda c: c.evict(unrotated_keys=c.array(1, 2, 6, 4)),
        "unrotated_keys must have shape (1, 2, 6, 3) like keys; got (1, 2, 6, 4)",
    ),
    "missing unrotated keys": value(
        lambda c: c.evict(GraphKV(StreamingLLM(budget=3), unrotated=True), c.array(1, 2, 6, 3)),
        "unrotated_keys must be given for GraphKV(StreamingLLM); got None",
    ),
    "probe of other heads": value(
        lambda c: c.evict(probes=c.array(1, 3, 6, 3)),
        "probes[0].queries must have a multiple of the 2 KV heads of keys; got 3 heads",
    ),
    "probe without a query": value(
        lambda c: c.evict(probes=[Probe(queries=c.array(1, 2, 9, 3)), Probe(queries=c.array(1, 2, 0, 3))]),
        "probes[1].queries must hold at least one query; got shape (1, 2, 0, 3)",
    ),
    "probe with keys of another length": value(
        lambda c: c.evict(probes=Probe(queries=c.array(1, 4, 2, 3), keys=c.array(1, 2, 3, 3))),
        "probes[0].keys must have shape (1, 2, 2, 3) like keys and queries; got (1, 2, 3, 3)",
    ),
    "probe with padding of the text": value(
        lambda c: c.evict(probes=Probe(queries=c.array(1, 4, 2, 3), valid=c.mask(1, 6))),
        "probes[0].valid must have the shape (1, 2) of (batch, P); got (1, 6)",
    ),
    "probe about another text": value(
        lambda c: c.evict(probes=Probe(queries=c.array(1, 4, 2, 3), about=c.mask(1, 5))),
        "probes[0].about must have the shape (1, 6) of (batch, N); got (1, 5)",
    ),
    "probe with a window of nothing": value(
        lambda c: c.evict(probes=Probe(queries=c.array(1, 4, 2, 3), window=0)),
        "probes[0].window must be at least 1; got 0",
    ),
    "probe before half a position": kind(
        lambda c: c.evict(probes=Probe(queries=c.array(1, 4, 2, 3), before=c.array(1, 2, 6))),
        "probes[0].before must be an array of integers; got dtype float32",
    ),
    "probe that is a list": kind(lambda c: c.evict(probes=[[1.0]]), "probes[0] must be a Probe; got list"),
    "probe that is a number": library(lambda c: c.evict(probes=3.0), "probes[0].queries must be an array; got float"),
    "layer out of range": value(lambda c: c.evict(layer=2, num_layers=2), "layer must be below num_layers=2; got 2"),
    "no layers": value(lambda c: c.evict(num_layers=0), "num_layers must be at least 1; got 0"),
    "missing queries": value(
        lambda c: c.evict(SnapKV(budget=4, window=2), c.array(1, 2, 6, 3)),
        "queries must hold the last 2 positions for SnapKV; got none",
    ),
    "gathering another N": value(
        lambda c: c.evict().apply(c.array(1, 2, 7)),
        "x must have shape (batch, kv_heads, N, ...) = (1, 2, 6) + ...; got (1, 2, 7)",
    ),
}


def words_of(error: BaseException) -> str:
    """The message, with dtypes as the libraries agree to write them."""
    return re.sub(r"\b(torch|array_api_strict)\.(?=[a-z]+\d|bool)", "", str(error))


@pytest.mark.parametrize("subject", LIBRARIES, ids=label)
@pytest.mark.parametrize("row", STEP_TABLE.values(), ids=STEP_TABLE)
def test_a_mistake_gets_its_error(subject, row):
    with pytest.raises(row.error) as caught:
        row.call(Calls(subject))

    assert words_of(caught.value) == row.says
    assert type(caught.value) is row.error
    assert isinstance(caught.value, row.builtin)
    assert isinstance(caught.value, GraphKVError)


@pytest.mark.parametrize("subject", LIBRARIES, ids=label)
def test_the_right_calls_of_the_table_are_right(subject):
    calls = Calls(subject)

    assert calls.build().num_sources == 1
    assert calls.propagate().shape == (2, 4)
    assert calls.degree().shape == (2, 4)
    assert calls.fuse().shape == (2, 4)
    assert calls.select().shape == (2, 2)
    assert calls.evict().kept.shape == (1, 2, 3)


def test_what_is_wider_than_float64_is_refused_and_not_narrowed():
    if np.finfo(np.longdouble).bits <= 64:
        pytest.skip("long double is float64 on this machine")

    with pytest.raises(ArgumentTypeError, match=r"^scores must be float64 or narrower; got dtype \w+$"):
        graphkv.select(np.ones(3, dtype=np.longdouble), 1)


# --------------------------------------------------------------------------------------------------------- policies

POLICY_TABLE = {
    "negative budget": value(lambda: Random(budget=-1), "budget must be at least 0; got -1"),
    "budget of no share": value(lambda: Random(budget=0.0), f"{BUDGET}; got 0.0"),
    "budget of more than all": value(lambda: Random(budget=1.5), f"{BUDGET}; got 1.5"),
    "budget NaN": value(lambda: Random(budget=float("nan")), f"{BUDGET}; got nan"),
    "budget as a word": kind(lambda: Random(budget="all"), "budget must be an integer or a float share; got 'all'"),
    "budget bool": kind(lambda: Random(budget=True), "budget must be an integer or a float share; got True"),
    "base that is none": kind(lambda: GraphKV(None), "base must be a Policy; got NoneType"),
    "source_ratio above 1": value(
        lambda: GraphKV(Random(budget=4), Decay(neighbors=1, source_ratio=2)),
        "source_ratio must lie in [0, 1]; got 2.0",
    ),
    "neighbors negative": value(
        lambda: GraphKV(Random(budget=4), Decay(neighbors=-1)), "neighbors must be at least 0; got -1"
    ),
    "rounds of the sum": value(
        lambda: GraphKV(Random(budget=4), Decay(neighbors=1, accumulation="sum", rounds=3)),
        "rounds must be 1 with accumulation 'sum'; got 3",
    ),
    "signal that is a word": kind(lambda: GraphKV(Random(budget=4), signal="x"), "signal must be a Signal; got str"),
    "signal that is a class": kind(
        lambda: GraphKV(Random(budget=4), Decay), "signal must be a Signal; got the class Decay: call it"
    ),
    "damping of the signal above 1": value(lambda: PageRank(damping=2), "damping must lie in [0, 1]; got 2.0"),
    "rounds of PageRank": kind(lambda: PageRank(rounds=2.5), "rounds must be an integer; got 2.5"),
    "flag that is none": kind(
        lambda: GraphKV(Random(budget=4), Decay(neighbors=1, recompute_sources=1)),
        "recompute_sources must be True or False; got 1",
    ),
    "unrotated that is no flag": kind(
        lambda: GraphKV(Random(budget=4), unrotated="yes"), "unrotated must be True or False; got 'yes'"
    ),
    "even kernel": value(lambda: SnapKV(budget=4, kernel_size=4), "kernel_size must be odd; got 4"),
    "unknown pooling": value(
        lambda: SnapKV(budget=4, pooling="median"), "pooling must be one of ['avg', 'max']; got 'median'"
    ),
    "budget without a name": kind(
        lambda: Random(512),
        "Random must be called as Random(budget=..., num_sinks=..., seed=...); "
        "too many positional arguments in Random(512)",
    ),
    "options beside a budget without a name": kind(
        lambda: Random(512, seed=3),
        "Random must be called as Random(budget=..., num_sinks=..., seed=...); "
        "too many positional arguments in Random(512, seed=3)",
    ),
    "signal of a base": kind(
        lambda: Decay(Random(budget=4), neighbors=1),
        "Decay must be called as Decay(source_ratio=..., neighbors=..., rounds=..., accumulation=..., strength=..., "
        "recompute_sources=...); too many positional arguments in Decay(Random, neighbors=1)",
    ),
    "window 0": value(lambda: SnapKV(budget=4, window=0), "window must be at least 1; got 0"),
}


@pytest.mark.parametrize("row", POLICY_TABLE.values(), ids=POLICY_TABLE)
def test_a_policy_says_what_it_refuses(row):
    with pytest.raises(row.error) as caught:
        row.call()

    assert str(caught.value) == row.says
    assert isinstance(caught.value, row.builtin)


# -------------------------------------------------------------------------------------------------- libraries together

OTHER = {"numpy": [*TORCH, strict.STRICT][0], "torch": NUMPY, "strict": NUMPY}


@pytest.mark.parametrize("subject", LIBRARIES, ids=label)
def test_mixed_libraries_are_named(subject):
    calls, other = Calls(subject), Calls(OTHER[subject.name])

    for backend in (None, subject):
        with pytest.raises(BackendError) as caught:
            calls.build(calls.array(2, 4, 3), other.array(2, 4), backend=backend)
        assert str(caught.value) == (
            f"arrays must come from one library; got keys: {subject.library!r}, importance: {other.backend.library!r}"
        )
        with pytest.raises(BackendError, match=r"arrays must come from one library; got scores: .*, valid: "):
            calls.select(calls.array(2, 4), 2, valid=other.mask(2, 4), backend=backend)
    with pytest.raises(BackendError, match="arrays of a Graph must come from one library; got "):
        calls.graph(weights=other.array(2, 1, 2))


@pytest.mark.parametrize("subject", LIBRARIES, ids=label)
def test_arrays_of_another_library_than_the_backend_are_named(subject):
    other = Calls(OTHER[subject.name])

    with pytest.raises(BackendError) as caught:
        other.select(backend=subject)

    assert str(caught.value) == (
        f"scores must be an array of {subject.library!r} for backend {subject.name!r}; got {other.backend.library!r}"
    )


@pytest.mark.parametrize("subject", LIBRARIES, ids=label)
def test_an_unknown_backend_is_named(subject):
    with pytest.raises(BackendError, match=r"^backend must be one of \[.*'numpy'.*\].* or a Backend; got 'nonesuch'$"):
        Calls(subject).select(backend="nonesuch")


def test_a_library_without_a_known_backend_needs_one():
    strange = Calls(strict.STRICT)

    with pytest.raises(BackendError, match=r"^backend must be given for arrays of 'array_api_strict'; it is inferred"):
        strange.select(backend=None)


WITHOUT_TORCH = """
import sys

sys.modules["torch"] = None  # import torch now raises ImportError

import numpy as np
from graphkv import BackendUnavailableError, select

try:
    select(np.ones(3), 1, backend="torch")
except BackendUnavailableError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def test_a_missing_library_says_how_to_get_it():
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)

    assert found.stdout.startswith("backend 'torch' needs torch: pip install 'graphkv[torch]'")
    assert issubclass(BackendUnavailableError, GraphKVError)
