"""Arrays of one call are on one device, and devices in one process have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import graphkv
from graphkv import H2O, Absorb, Backend, BackendError, Given, Graph, KNorm, Memory, Precision, Probe
from graphkv.adapters.smallkv import SmallKV, match_heads
from graphkv.core.backend import load
from graphkv.core.precision import Quantized, demote, dequantize
from tests.support import strict
from tests.support.policies import every_policy


@dataclass(frozen=True)
class Places:
    """A library, and what makes its arrays in one place and in another."""

    backend: Backend
    here: Callable[[np.ndarray], Any]
    there: Callable[[np.ndarray], Any]


def strict_places() -> Places:
    return Places(strict.STRICT, strict.xp.asarray, strict.on("device1"))


def torch_places() -> Places:
    import torch

    return Places(load("torch"), torch.from_numpy, lambda x: torch.from_numpy(x).to("meta"))


PLACES = {"strict": strict_places} | ({"torch": torch_places} if find_spec("torch") else {})
each_library = pytest.mark.parametrize("places", [pytest.param(make, id=name) for name, make in PLACES.items()])

KEYS, ROWS = np.ones((1, 2, 6, 4), "float32"), np.ones((1, 2, 6), "float32")
QUERIES, MASK = np.ones((1, 2, 6, 4), "float32"), np.ones((1, 2, 6), bool)
PLACE = np.zeros((1, 2, 1), "int64")
EDGE = np.zeros((1, 2, 1, 1), "int64")


def evicted(places: Places) -> Any:
    keys = places.here(KEYS)
    policy = Absorb(KNorm(budget=3), weights="count")
    return graphkv.evict(policy, keys, values=keys, queries=keys, backend=places.backend)


# Each door: the arrays that it takes, the one first whose device the others must have, and the call.
DOORS: dict[str, tuple[dict[str, np.ndarray], Callable[..., Any]]] = {
    "build_graph": (
        {"keys": KEYS, "importance": ROWS, "valid": MASK},
        lambda p, keys, importance, valid: graphkv.build_graph(
            keys, importance, valid=valid, num_sources=1, num_neighbors=1, backend=p.backend
        ),
    ),
    "propagate": (
        {"importance": ROWS, "sources": PLACE, "neighbors": EDGE, "weights": EDGE.astype("float32")},
        lambda p, importance, **x: graphkv.propagate(importance, Graph(**x, num_tokens=6), backend=p.backend),
    ),
    "select": (
        {"scores": ROWS, "protected": MASK, "valid": MASK},
        lambda p, scores, **x: graphkv.select(scores, 2, **x, backend=p.backend),
    ),
    "degree": (
        {"keys": KEYS, "valid": MASK},
        lambda p, keys, valid: graphkv.degree(keys, valid=valid, backend=p.backend),
    ),
    "fuse": (
        {"importance": ROWS, "degree": ROWS, "valid": MASK},
        lambda p, importance, degree, valid: graphkv.fuse(importance, degree, valid=valid, backend=p.backend),
    ),
    "pagerank": (
        {"importance": ROWS, "keys": KEYS, "valid": MASK},
        lambda p, importance, keys, valid: graphkv.pagerank(importance, keys, valid=valid, backend=p.backend),
    ),
    "evict": (
        {
            "keys": KEYS,
            "values": KEYS,
            "queries": QUERIES,
            "attention": np.ones((1, 2, 6, 6), "float32"),
            "valid": MASK,
            "positions": np.ones((1, 2, 6), "int64"),
            "unrotated_keys": KEYS,
            "mass": ROWS,
        },
        lambda p, keys, **x: graphkv.evict(KNorm(budget=2), keys, **x, backend=p.backend),
    ),
    "probes": (
        {
            "keys": KEYS,
            "probes[0].queries": QUERIES,
            "probes[0].keys": KEYS,
            "probes[0].valid": np.ones((1, 6), bool),
            "probes[0].about": MASK,
            "probes[0].before": np.ones((1, 2, 6), "int64"),
        },
        lambda p, keys, **x: graphkv.evict(
            KNorm(budget=2), keys, probes=Probe(**{n.partition(".")[2]: a for n, a in x.items()}), backend=p.backend
        ),
    ),
    "state": (
        {"keys": KEYS, "state.tokens['attention']": ROWS[..., :5, None], "state.tokens['queries']": ROWS[..., :5]},
        lambda p, keys, **x: graphkv.observe(
            H2O(budget=2),
            keys,
            queries=p.here(QUERIES[..., -1:, :]),
            state=Memory(tokens={n.split("'")[1]: a for n, a in x.items()}),
            backend=p.backend,
        ),
    ),
    "given": (
        {"keys": KEYS, "importance": ROWS, "protected": MASK},
        lambda p, keys, **x: graphkv.evict(Given(budget=2, **x), keys, backend=p.backend),
    ),
    "smallkv": (
        {"keys": KEYS, "importance": ROWS},
        lambda p, keys, importance: graphkv.evict(SmallKV(budget=2, importance=[importance]), keys, backend=p.backend),
    ),
    "match_heads": (
        {"large": ROWS, "small": ROWS, "valid": np.ones((1, 6), bool)},
        lambda p, large, small, valid: match_heads(large, small, valid=valid, num_tokens=2, backend=p.backend),
    ),
    "apply": ({"kept": None, "x": KEYS}, lambda p, x: evicted(p).apply(x)),
    "compress": ({"kept": None, "x": KEYS}, lambda p, x: evicted(p).compress(p.here(KEYS), x)),
    "quantized": (
        {"codes": np.ones((2, 4), "uint8"), "scale": np.ones((2, 1), "float32"), "offset": np.ones((2, 1), "float32")},
        lambda p, **x: dequantize(Quantized(**x), Precision(bits=2), backend=p.backend),
    ),
    "demote": (
        {"x": KEYS, "levels": np.ones((1, 2, 6), "int64"), "balance": np.ones((1, 2, 4), "float32")},
        lambda p, x, levels, balance: demote(x, levels, Precision(bits=2), balance=balance, backend=p.backend),
    ),
}
CASES = [(door, odd) for door, (arrays, _) in DOORS.items() for odd in list(arrays)[1:]]


def called(places: Places, door: str, odd: str | None) -> Any:
    arrays, call = DOORS[door]
    made = {
        name: (places.there if name == odd else places.here)(x.copy()) for name, x in arrays.items() if x is not None
    }
    return call(places, **made)


@each_library
@pytest.mark.parametrize(("door", "odd"), CASES, ids=[f"{door}-{odd}" for door, odd in CASES])
def test_an_array_on_another_device_is_named(places, door, odd):
    places = places()
    called(places, door, None)
    here, there = (make(ROWS.copy()).device for make in (places.here, places.there))

    with pytest.raises(BackendError) as caught:
        called(places, door, odd)

    assert str(caught.value) == f"{odd} must be on the device of {next(iter(DOORS[door][0]))}, {here}; got {there}"


def kept_of_all(places: Places, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    keys, values, queries = (random.normal(size=(2, heads, 12, 4)).astype("float32") for heads in (2, 2, 4))
    return {
        name: graphkv.evict(
            policy,
            put(keys),
            values=put(values),
            queries=put(queries),
            probes=put(queries),
            layer=1,
            num_layers=4,
            backend=places.backend,
        ).kept
        for name, policy in every_policy(5).items()
    }


@each_library
def test_devices_take_turns_in_one_process(places):
    places = places()
    here, there = (make(ROWS.copy()).device for make in (places.here, places.there))

    first = kept_of_all(places, places.here)
    second = kept_of_all(places, places.there)
    third = kept_of_all(places, places.here)

    assert len(first) >= 75
    assert {x.device for x in [*first.values(), *third.values()]} == {here}
    assert {x.device for x in second.values()} == {there}
    for name, kept in first.items():
        assert places.backend.to_numpy(kept).tolist() == places.backend.to_numpy(third[name]).tolist(), name
