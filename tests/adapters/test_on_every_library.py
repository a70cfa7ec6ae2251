"""Every policy on every library: the public codes' choices, and what must hold whatever a policy scores by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphkv import H2O, Decay, GraphKV, KNorm, SnapKV, evict
from tests.support.policies import every_policy

FOLDER = Path(__file__).parent
NAMES = sorted(every_policy(4))
FEW = hypothesis.settings(deadline=None, derandomize=True, max_examples=15)


def cases(method):
    return json.loads((FOLDER / f"{method}_vectors.json").read_text())["cases"]


def chosen(library, policy, case):
    queries = library.make(np.asarray(case["queries"], dtype=np.float32)) if "queries" in case else None
    keys = library.make(np.asarray(case["keys"], dtype=np.float32))
    done = evict(policy, keys, queries=queries, backend=library.backend)
    return library.host(done.kept), library.host(done.scores)


@pytest.mark.parametrize("case", cases("snapkv"), ids=lambda case: f"{case['pooling']}{case['kernel_size']}")
def test_snapkv_vectors(library, case):
    policy = SnapKV(**{name: case[name] for name in ("budget", "window", "kernel_size", "pooling", "group_reduction")})

    kept, scores = chosen(library, policy, case)

    for row in np.ndindex(kept.shape[:-1]):
        ours, theirs = set(kept[row].tolist()), set(np.asarray(case["kept"])[row].tolist())
        # Plateaus of maximum pooling tie; the public code leaves those to torch.topk, here the lower position wins.
        assert len(ours) == len(theirs)
        assert np.ptp(scores[row][sorted(ours ^ theirs) or [0]]) == 0
        assert ours == theirs or case["pooling"] == "max"


@pytest.mark.parametrize("case", cases("h2o"), ids=lambda case: str(case["budget"]))
def test_h2o_vectors(library, case):
    policy = H2O(budget=case["budget"], num_recent=case["recent"], group_reduction=case["group_reduction"])

    assert chosen(library, policy, case)[0].tolist() == case["kept"]


@pytest.mark.parametrize("case", cases("knorm"), ids=lambda case: str(case["budget"]))
def test_knorm_vectors(library, case):
    assert chosen(library, KNorm(budget=case["budget"]), case)[0].tolist() == case["kept"]


def run(library, policy, layer, rows=slice(None), tokens=slice(None)):
    keys, values, queries, valid = layer
    with library.strictly():
        return evict(
            policy,
            library.make(keys[rows, :, tokens]),
            values=library.make(values[rows, :, tokens]),
            queries=library.make(queries[rows, :, tokens]),
            probes=library.make(queries[rows]),
            valid=library.make(valid[rows, tokens]),
            layer=1,
            num_layers=4,
            backend=library.backend,
        )


SHAPES = ((1, 1, 1), (7, 2, 1), (12, 2, 2))
# JAX compiles every operation anew for every shape and budget: there, this one only.
ON_JAX = (((12, 2, 2), 5),)


def is_jax(library):
    return library.backend.library == "jax"


def layers(library, budgets):
    """A layer, and a budget."""
    pairs = [(shape, budget) for shape in SHAPES for budget in budgets]
    return st.sampled_from(ON_JAX if is_jax(library) else pairs).flatmap(
        lambda pair: st.tuples(layers_of(*pair[0]), st.just(pair[1]))
    )


@st.composite
def layers_of(draw, num_tokens, kv_heads, groups):
    """Numbers from few values, so that keys repeat and scores tie; the second row is padded on the left."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = draw(st.sampled_from([[0.0, 1.0], [-1.0, 0.0, 0.5, 2.0], list(np.linspace(-1, 1, 41))]))
    shapes = ((2, kv_heads, num_tokens, 4), (2, kv_heads, num_tokens, 4), (2, kv_heads * groups, num_tokens, 4))
    keys, values, queries = (random.choice(numbers, size=shape).astype(np.float32) for shape in shapes)
    pads = draw(st.integers(0, num_tokens - 1))
    valid = np.arange(num_tokens) >= np.asarray([[0], [pads]])
    return keys, values, queries, valid


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(data=st.data())
def test_what_holds_for_every_policy(library, name, data):
    layer, budget = data.draw(layers(library, (0, 1, 5, 6, 7)))
    policy, valid = every_policy(budget)[name], layer[-1]
    num_tokens = valid.shape[-1]

    done = run(library, policy, layer)
    kept = library.host(done.kept)
    heads = None if done.counts is None else library.host(done.counts)

    budget = policy.layer_budget(num_tokens, 1, 4)
    assert done.budget == budget
    if heads is None:
        assert kept.shape[-1] == min(budget, num_tokens)
    elif policy.needs().automatic:
        assert (heads <= min(budget, num_tokens)).all()
    else:
        assert (heads.sum(-1) == budget * kept.shape[1]).all()
    protected = None if done.protected is None else library.host(done.protected)
    scores = None if done.scores is None else library.host(done.scores)
    for row in np.ndindex(kept.shape[:-1]):
        count = kept.shape[-1] if heads is None else heads[row]
        stays = kept[row][:count].tolist()
        assert (kept[row][count:] == -1).all()
        assert stays == sorted(set(stays))
        assert set(stays) <= set(range(num_tokens))
        if scores is None:
            continue
        # The order of the contract: protected, others, padding; then the score; then the position.
        real = valid[row[0]]
        held = np.zeros(num_tokens, dtype=bool) if protected is None else protected[row]
        numbers = np.where(np.isnan(scores[row]), -np.inf, scores[row])
        ranked = sorted(
            range(num_tokens), key=lambda j: (not real[j], not held[j], np.isnan(scores[row][j]), -numbers[j], j)
        )
        assert stays == sorted(ranked[:count])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("adakv", "graphkv"))])
@FEW
@given(data=st.data())
def test_a_graph_without_edges_is_the_base(library, name, data):
    layer, budget = data.draw(layers(library, (1, 5, 7)))
    base = every_policy(budget)[name]

    alone, wrapped = run(library, base, layer), run(library, GraphKV(base, Decay(neighbors=1, source_ratio=0.0)), layer)

    assert library.host(wrapped.kept).tolist() == library.host(alone.kept).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_scores_as_numpy_does(library, numpy_library, name):
    random = np.random.default_rng(5)
    # On JAX the shape of above, which is compiled already.
    num_tokens, dim, budget = (12, 4, 5) if is_jax(library) else (23, 8, 9)
    layer = [random.normal(size=(2, heads, num_tokens, dim)).astype(np.float32) for heads in (2, 2, 4)]
    layer.append(np.arange(num_tokens) >= np.asarray([[0], [3]]))
    policy = every_policy(budget)[name]
    if name.startswith("graphkv"):
        # Two libraries may draw the same edge a rounding apart; the exact tests of the graph are elsewhere.
        policy = replace(policy, signal=replace(policy.signal, strength=0.5))

    ours, reference = run(library, policy, layer), run(numpy_library, policy, layer)

    real = np.broadcast_to(layer[-1][:, None, :], reference.scores.shape)
    np.testing.assert_allclose(library.host(ours.scores)[real], reference.scores[real], rtol=2e-3, atol=1e-5)
    # How many tokens an automatic budget takes, and how heads share one.
    if reference.counts is not None:
        np.testing.assert_array_equal(library.host(ours.counts), reference.counts)
