"""Tokens that were read only to ask: what a layer takes, and the most attention that they give, against loops."""

from dataclasses import dataclass, replace
from math import exp, sqrt
from typing import ClassVar

import numpy as np
import pytest

from graphkv import ArgumentError, GraphKV, Layer, Policy, Probe, Requirements, evict, observe, wants
from graphkv.core.attention import highest_attention
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(23)
KEYS, QUERIES, OWN = (RNG.normal(size=shape) for shape in ((2, 2, 9, 4), (2, 6, 5, 4), (2, 2, 5, 4)))
VALID = np.arange(9) >= np.asarray([[0], [3]])
BEFORE = np.sort(RNG.integers(1, 30, size=(2, 2, 9)), axis=-1)[..., ::-1].copy()


def most_by_loops(probe, keys, seen, sees_itself, mass=None):
    """The most attention of one row, one number at a time; probe arrays without batch, keys (H, N, D), seen (H, N)."""
    heads, tokens, size = keys.shape
    mass = np.ones((heads, tokens)) if mass is None else mass
    result = np.zeros((heads, tokens))
    for query_head, queries in enumerate(probe.queries):
        head = query_head // (len(probe.queries) // heads)
        for i, query in enumerate(queries):
            if probe.valid is not None and not probe.valid[i]:
                continue

            def weight(key):
                return exp(sum(a * b for a, b in zip(query, key, strict=True)) / sqrt(size))  # noqa: B023

            def is_near(distance):
                return probe.window is None or distance < probe.window

            before = range(tokens, 0, -1) if probe.before is None else probe.before[head]
            weights = [
                mass[head][j] * weight(keys[head][j]) if seen[head][j] and is_near(before[j] + i) else 0.0
                for j in range(tokens)
            ]
            total = sum(weights)
            if sees_itself and probe.keys is not None:
                total += sum(
                    weight(probe.keys[head][j])
                    for j in range(i + 1)
                    if (probe.valid is None or probe.valid[j]) and is_near(i - j)
                )
            for j in range(tokens):
                result[head, j] = max(result[head, j], weights[j] / total if total else 0.0)
    return result


PROBES = {
    "queries alone": Probe(queries=QUERIES),
    "with keys": Probe(queries=QUERIES, keys=OWN),
    "padded": Probe(queries=QUERIES, keys=OWN, valid=np.asarray([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)),
    "window": Probe(queries=QUERIES, keys=OWN, window=4),
    "window over what is left": Probe(queries=QUERIES, keys=OWN, window=14, before=BEFORE),
}


def of_row(probe, row):
    arrays = {name: x for name, x in vars(probe).items() if name != "window" and x is not None}
    return replace(probe, **{name: x[row] for name, x in arrays.items()})


def in_library(probe, backend):
    def made(name, x):
        dtype = {"valid": bool, "about": bool, "before": np.int64}.get(name, np.float64)
        return make(backend, x, dtype)

    return replace(
        probe, **{name: made(name, x) for name, x in vars(probe).items() if name != "window" and x is not None}
    )


@each_library
@pytest.mark.parametrize("block_size", [2, 64])
@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("name", PROBES)
def test_the_most_attention_equals_loops(backend, name, sees_itself, block_size):
    probe = PROBES[name]
    layer = Layer(
        make(backend, KEYS, np.float64),
        valid=make(backend, VALID, bool),
        probes=in_library(probe, backend),
        backend=backend,
    )

    found = highest_attention(
        layer.probes[0], layer.keys, layer.valid, sees_itself=sees_itself, block_size=block_size, xp=layer.xp
    )

    seen = np.broadcast_to(VALID[:, None], (2, 2, 9))
    for row in range(2):
        expected = most_by_loops(of_row(probe, row), KEYS[row], seen[row], sees_itself)
        np.testing.assert_allclose(backend.to_numpy(found)[row], expected, rtol=1e-12)


@each_library
@pytest.mark.parametrize("sees_itself", [True, False])
def test_a_merged_token_counts_as_often_as_its_mass_says(backend, sees_itself):
    """The probe's own tokens count once; without a mass a token is not there."""
    mass, probe = RNG.uniform(0.5, 4, size=(2, 2, 9)), PROBES["with keys"]
    mass[:, :, 4] = 0
    layer = Layer(
        make(backend, KEYS, np.float64),
        valid=make(backend, VALID, bool),
        mass=make(backend, mass, np.float64),
        probes=in_library(probe, backend),
        backend=backend,
    )

    found = highest_attention(
        layer.probes[0], layer.keys, layer.valid, mass=layer.mass, sees_itself=sees_itself, block_size=2, xp=layer.xp
    )

    for row in range(2):
        seen = np.broadcast_to(VALID[row], (2, 9))
        expected = most_by_loops(of_row(probe, row), KEYS[row], seen, sees_itself, mass[row])
        np.testing.assert_allclose(backend.to_numpy(found)[row], expected, rtol=1e-10)


def test_infinite_keys_and_queries_count_as_padding():
    keys, queries, own = KEYS.copy(), QUERIES.copy(), OWN.copy()
    keys[0, :, 2], queries[0, :, 1], own[0, :, 1] = np.inf, np.nan, -np.inf

    found = highest_attention(
        Probe(queries=queries, keys=own), keys, np.ones((2, 2, 9), bool), sees_itself=True, block_size=2, xp=np
    )

    padded = Probe(queries=QUERIES[0], keys=OWN[0], valid=np.arange(5) != 1)
    expected = most_by_loops(padded, KEYS[0], np.broadcast_to(np.arange(9) != 2, (2, 9)), True)
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


@dataclass(frozen=True, kw_only=True)
class Asking(Policy):
    requirements: ClassVar[Requirements] = Requirements(probes=True)

    def score(self, layer, memory):
        scores = [
            highest_attention(probe, layer.keys, layer.valid, sees_itself=True, block_size=8, xp=layer.xp)
            for probe in layer.probes
        ]
        return sum(scores[1:], scores[0])


def test_a_policy_that_asks_is_refused_where_nothing_was_asked():
    for probes in (None, [], ()):
        with pytest.raises(ArgumentError, match=r"probes must be given for GraphKV\(Asking\); got None"):
            evict(GraphKV(Asking(budget=4)), KEYS, probes=probes)
    # What fits is not scored.
    assert evict(Asking(budget=9), KEYS).kept.shape == (2, 2, 9)
    assert not Requirements().joined(Requirements()).probes
    assert Requirements().joined(Requirements(probes=True)).probes


def test_an_array_is_the_queries_of_one_probe():
    kept = [
        evict(Asking(budget=4), KEYS, probes=probes).kept.tolist()
        for probes in (QUERIES, Probe(queries=QUERIES), [Probe(queries=QUERIES)])
    ]

    assert kept[0] == kept[1] == kept[2]
    assert evict(Asking(budget=4), KEYS, probes=[Probe(queries=QUERIES), Probe(queries=QUERIES[:, :, :1])]).kept.size


def test_half_precision_is_widened_and_a_mask_of_rows_goes_to_every_head():
    probe = Probe(queries=QUERIES.astype("f2"), keys=OWN.astype("f2"), about=VALID)

    layer = Layer(KEYS.astype("f2"), probes=probe)

    assert layer.probes[0].queries.dtype == layer.probes[0].keys.dtype == np.float32
    assert layer.probes[0].about.shape == (2, 2, 9)
    assert Layer(KEYS).probes == ()


def test_the_other_doors_take_probes():
    assert observe(Asking(budget=4), KEYS, probes=QUERIES) is None
    assert wants(Asking(budget=4), KEYS, probes=QUERIES) is None
