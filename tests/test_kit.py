"""The kit itself: it catches seeded faults, passes their right counterparts, and its oracle agrees with hand-worked
numbers.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from math import inf, nan

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from graphkv import Graph, propagate, select
from graphkv.core.backend import load
from graphkv.testing import asserts, oracle, strategies, suite
from tests import strict
from tests.faults import FAULTS


@pytest.fixture(scope="module")
def properties():
    """The suite once more, without shrinking: that a fault is caught is enough."""
    before = settings.default
    settings.register_profile(
        "faults", before, max_examples=100, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False
    )
    settings.load_profile("faults")
    spec = importlib.util.spec_from_file_location("graphkv.testing.suite_for_faults", suite.__file__)
    fresh = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = fresh
    try:
        spec.loader.exec_module(fresh)
        yield fresh
    finally:
        del sys.modules[spec.name]
        settings.register_profile("restored", before)
        settings.load_profile("restored")


def test_there_are_enough_faults():
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_kit_catches(properties, fault):
    with pytest.raises(fault.error):
        getattr(properties, fault.caught_by)(backend=fault.wrong)


CONTROLS = {(tuple(vars(fault.right).items()), fault.caught_by): fault for fault in FAULTS}.values()


@pytest.mark.parametrize("fault", CONTROLS, ids=lambda fault: f"{fault.name.partition(':')[0]}: {fault.caught_by}")
def test_the_kit_passes_the_same_without_the_fault(properties, fault):
    getattr(properties, fault.caught_by)(backend=fault.right)


# ------------------------------------------------------------------------------------------------ the oracle, by hand


def test_oracle_ranks_by_score_then_index_with_nan_last():
    assert oracle.top_k([1.0, nan, inf, -inf, 1.0, -0.0, 0.0], 7) == [2, 0, 4, 5, 6, 3, 1]
    assert oracle.top_k([1.0, 2.0, 3.0], 2, [1, 0, 0]) == [2, 1]
    assert oracle.top_k([], 0) == []


def test_oracle_cosine():
    assert oracle.cosine([3.0, 4.0], [4.0, 3.0]) == 24 / 25
    assert oracle.cosine([1.0, 0.0], [-2.0, 0.0]) == -1
    assert oracle.cosine([0.0, 0.0], [1.0, 0.0]) == 0
    assert oracle.cosine([inf, 1.0], [1.0, 0.0]) == 0
    assert oracle.cosine([nan, 1.0], [1.0, 0.0]) == 0


def test_oracle_links_sources_to_others_only():
    # Token 0 and 1 are the sources; 2 is parallel to 0, 3 at 60 degrees to it in the sense of 3-4-5, 4 is opposite.
    keys = [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]

    edges = oracle.build_graph(keys, [9.0, 8.0, 1.0, 1.0, 1.0], num_sources=2, num_neighbors=2)

    assert edges.sources == [0, 1]
    assert edges.neighbors == [[2, 3], [3, 2]]
    assert edges.weights == [[1.0, 0.6], [0.8, 0.0]]


def test_oracle_fills_rows_with_edges_of_weight_zero():
    keys = [[1.0], [1.0], [1.0]]

    edges = oracle.build_graph(keys, [1.0, 2.0, 3.0], num_sources=9, num_neighbors=9, valid=[True, False, False])
    few = oracle.build_graph(keys, [1.0, 2.0, 3.0], num_sources=1, num_neighbors=2, valid=[True, True, False])

    assert (edges.sources, edges.neighbors, edges.weights) == ([0, 1, 2], [[], [], []], [[], [], []])
    assert (few.sources, few.neighbors, few.weights) == ([1], [[0, oracle.FREE]], [[1.0, 0.0]])


def test_oracle_decays_either_sign_away_from_the_top():
    options = {"neighbors": [[1, 2]], "weights": [[0.25, 1.0]]}

    assert oracle.propagate([4.0, 8.0, 2.0], **options) == [4.0, 6.0, 2e-6]
    assert oracle.propagate([4.0, -8.0, -2.0], **options) == [4.0, -10.0, -2.0 - 2.0 * (1 - 1e-6)]
    assert oracle.propagate([4.0, 8.0, 2.0], signal="enhance", rounds=2, **options) == [4.0, 12.5, 8.0]
    assert oracle.propagate([4.0, 8.0, 2.0], signal="evict", **options) == [4.0, -inf, -inf]
    assert oracle.propagate([4.0, 8.0, 2.0], strength=0.5, **options) == [4.0, 7.0, 1.0]


def test_oracle_adds_or_multiplies_what_two_sources_send():
    options = {"neighbors": [[2], [2]], "weights": [[0.5], [0.75]]}

    assert oracle.propagate([9.0, 9.0, 8.0], **options) == [9.0, 9.0, 1.0]
    assert oracle.propagate([9.0, 9.0, 8.0], accumulation="sum", **options) == [9.0, 9.0, -2.0]
    assert oracle.propagate([9.0, 9.0, 8.0], rounds=2, **options) == [9.0, 9.0, 0.125]


def test_oracle_selects_protected_then_valid_then_the_rest():
    scores = [5.0, 4.0, 3.0, 9.0, -inf]
    masks = {"protected": [False, False, False, True, True], "valid": [True, True, True, False, True]}

    assert [oracle.select(scores, budget, **masks) for budget in range(6)] == [
        [],
        [4],
        [0, 4],
        [0, 1, 4],
        [0, 1, 2, 4],
        [0, 1, 2, 3, 4],
    ]


def test_oracle_counts_of_a_policy():
    # 12 open tokens at 0.3 give 3 sources (rounded down); a share above 0 gives at least 1, nothing open gives none.
    keys = [[1.0]] * 20
    importance = [float(20 - i) for i in range(20)]

    def decayed(**options):
        return sum(a != b for a, b in zip(oracle.evict(keys, importance, **options).scores, importance, strict=True))

    assert decayed(budget=16, num_protected=4, source_ratio=0.3, neighbors=2) == 2
    assert decayed(budget=16, num_protected=4, source_ratio=0.3, neighbors=0.5) == 6
    assert decayed(budget=2, source_ratio=0.3, neighbors=5) == 5
    assert decayed(budget=4, num_protected=4, source_ratio=0.3, neighbors=5) == 0
    assert decayed(budget=4, source_ratio=0.0, neighbors=5) == 0


# The method figure of the paper, tokens 1..7 at positions 0..6: importance, and the weights of the two sources.
IMPORTANCE = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]
FIGURE = {"neighbors": [[5, 4], [2, 5]], "weights": [[0.50, 0.40], [0.70, 0.60]]}


def test_oracle_gives_the_scores_of_the_paper_s_figure():
    assert oracle.propagate(IMPORTANCE, accumulation="sum", **FIGURE) == pytest.approx(
        [0.1, 0.6, 0.09, 1.2, 0.18, -0.07, 1.1]
    )
    assert oracle.propagate(IMPORTANCE, **FIGURE) == pytest.approx([0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1])


def test_oracle_keeps_the_tokens_of_the_paper_s_figure():
    for accumulation in ("sum", "product"):
        assert oracle.select(oracle.propagate(IMPORTANCE, accumulation=accumulation, **FIGURE), 3) == [1, 3, 6]
    assert oracle.select(IMPORTANCE, 3) == [3, 5, 6]


def test_backends_give_the_paper_s_figure(backend):
    importance = asserts.make(backend, np.asarray(IMPORTANCE))
    graph = Graph(
        sources=asserts.make(backend, np.asarray([3, 6])),
        neighbors=asserts.make(backend, np.asarray(FIGURE["neighbors"])),
        weights=asserts.make(backend, np.asarray(FIGURE["weights"])),
        num_tokens=7,
    )

    for accumulation, wanted in (
        ("sum", [0.1, 0.6, 0.09, 1.2, 0.18, -0.07, 1.1]),
        ("product", [0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1]),
    ):
        scores = propagate(importance, graph, accumulation=accumulation, backend=backend)
        asserts.close(scores, np.asarray(wanted), backend=backend, like=importance, scale=1.0)
        kept = select(scores, 3, backend=backend)
        asserts.equal(kept, np.asarray([1, 3, 6]), backend=backend, like=importance)


# --------------------------------------------------------------------------------------------- asserts and strategies


def test_asserts_look_at_library_dtype_shape_and_device_before_values():
    numpy, torch = load("numpy"), load("torch")
    x, t = np.zeros(3), asserts.make(torch, np.zeros(3))

    asserts.equal(t, np.zeros(3), backend=torch, like=t)
    with pytest.raises(AssertionError, match="library 'numpy', should be 'torch'"):
        asserts.equal(x, np.zeros(3), backend=torch, like=t)
    with pytest.raises(TypeError, match="expected must be an array of 'numpy'"):
        asserts.equal(x, t, backend=numpy, like=x)
    with pytest.raises(AssertionError, match="dtype float32, should be"):
        asserts.equal(x.astype(np.float32), np.zeros(3), backend=numpy, like=x)
    with pytest.raises(AssertionError, match=r"shape \(3,\), should be \(1, 3\)"):
        asserts.equal(x, np.zeros((1, 3)), backend=numpy, like=x)
    here, there = asserts.make(strict.STRICT, np.zeros(3)), asserts.make(strict.DEVICE1, np.zeros(3))
    with pytest.raises(AssertionError, match=r"on device .*CPU_DEVICE.*, should be on .*device1"):
        asserts.equal(here, np.zeros(3), backend=strict.STRICT, like=there)


def test_asserts_compare_values():
    numpy, x = load("numpy"), np.asarray([1.0, nan, -0.0, inf])
    like = {"backend": numpy, "like": x}

    asserts.equal(x, np.asarray([1.0, nan, 0.0, inf]), **like)
    asserts.identical(x, x.copy(), **like)
    asserts.close(x, x + np.asarray([1e-9, 0, 0, 0]), **like)
    with pytest.raises(AssertionError):
        asserts.equal(x, np.asarray([1.0, nan, 0.0, -inf]), **like)
    with pytest.raises(AssertionError, match="sign of zero"):
        asserts.identical(x, np.asarray([1.0, nan, 0.0, inf]), **like)
    with pytest.raises(AssertionError):
        asserts.close(x, np.asarray([1.001, nan, 0.0, inf]), **like)
    with pytest.raises(AssertionError):
        asserts.close(x, np.asarray([1.0, 1.0, 0.0, inf]), **like)
    with pytest.raises(AssertionError):
        asserts.close(x, np.asarray([1.0, nan, 0.0, 1.0]), **like)


def test_margin_rule():
    scores = [1.0, 1 - 1e-6, 0.5, 0.0]

    asserts.chosen([1], scores, eligible=[0, 1, 2, 3], dtype="float32")
    with pytest.raises(AssertionError, match="dropped a token"):
        asserts.chosen([1], scores, eligible=[0, 1, 2, 3], dtype="float64")
    with pytest.raises(AssertionError, match="dropped a token"):
        asserts.chosen([0, 2], scores, eligible=[0, 1, 2, 3], dtype="float32")
    with pytest.raises(AssertionError, match="not to be chosen"):
        asserts.chosen([0], scores, eligible=[1, 2], dtype="float32")


def test_exact_keys_make_no_rounding_error():
    keys = strategies.EXACT_KEYS
    cosines = np.asarray([[oracle.cosine(a, b) for b in keys.tolist()] for a in keys.tolist()])

    np.testing.assert_array_equal(cosines, np.round(cosines * 16) / 16)
    assert {0.0, 0.125, 0.5, 0.75, 1.0, -1.0} <= set(cosines.ravel().tolist())
    lengths = np.linalg.norm(keys, axis=-1)
    assert set(lengths.tolist()) == {0.0, 1.0, 2.0, 4.0, 8.0}


@given(layer=strategies.layers())
def test_layers_are_drawn_in_agreement(layer):
    shape = (*layer.leading, layer.num_tokens)

    assert layer.keys.shape == (*shape, 16)
    assert all(mask is None or (mask.shape == shape and mask.dtype == bool) for mask in (layer.valid, layer.protected))
    assert 0 <= layer.budget <= layer.num_tokens + 1


@given(edges=strategies.edges((2,), 6))
def test_edges_are_drawn_as_a_graph_has_them(edges):
    for row in range(2):
        sources = edges.sources[row].tolist()
        assert sources == sorted(set(sources))
        for k in range(len(sources)):
            real = edges.neighbors[row, k][edges.weights[row, k] > 0].tolist()
            assert len(real) == len(set(real))
            assert not set(real) & set(sources)


def test_the_kit_has_the_claims_that_it_promises():
    assert len(suite.__all__) >= 35
    assert all(inspect.getdoc(getattr(suite, name)) for name in suite.__all__)
