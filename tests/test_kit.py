"""The kit itself: it catches seeded faults, passes their right counterparts, and its oracle agrees with hand-worked
numbers.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from dataclasses import fields
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings

import graphkv
from graphkv import Backend, Graph, propagate, select
from graphkv.core.backend import load
from graphkv.testing import (
    Subject,
    asserts,
    describe,
    examples,
    namespace,
    oracle,
    policies,
    strategies,
    suite,
    truth,
    variants,
)
from tests.support import strict
from tests.support.faults import FAULTS, namespace_of, replaced
from tests.support.subjects import fields_of


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
    assert len(FAULTS) >= 250
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_kit_catches(properties, fault):
    with pytest.raises(fault.error):
        getattr(properties, fault.caught_by)(backend=fault.wrong)


CONTROLS = {(tuple(vars(fault.right).items()), fault.caught_by): fault for fault in FAULTS}.values()


@pytest.mark.parametrize("fault", CONTROLS, ids=lambda fault: f"{fault.name.partition(':')[0]}: {fault.caught_by}")
def test_the_kit_passes_the_same_without_the_fault(properties, fault):
    getattr(properties, fault.caught_by)(backend=fault.right)


def test_the_portable_variant_brings_no_form_of_its_own():
    _, portable = variants(load("torch"))

    brought = {field.name for field in fields(Backend) if getattr(portable, field.name) is not None}

    assert brought == {"name", "xp", "to_numpy", "library", "guard", "detach", "refuse"}


# Of the faults that a drawn example finds: which of the fixed ones find them too.
SETTLED = {
    "top_k": ("special_scores_have_their_places", "scores_one_bit_apart_keep_their_order"),
    "segment_product": ("segments_of_many_values",),
    "segment_sum": ("segments_of_many_values",),
    "sum_rows": ("sums_of_many_rows", "a_row_alone_in_its_slot_stays_bit_for_bit"),
    "received_attention": ("attention_received_in_real_shapes",),
    "build_graph": (
        "graphs_of_real_head_sizes",
        "keys_of_all_lengths",
        "batches_and_axes_of_one_stay",
        "graphs_of_long_rows",
    ),
    "propagate": (
        "graphs_made_by_hand",
        "duplicates_of_several_sources_fall_by_a_factor_each",
        "results_beyond_the_range_are_infinite_or_zero",
        "layouts_never_matter",
    ),
    "degree": ("keys_of_all_lengths", "degrees_of_long_rows", "batches_and_axes_of_one_stay"),
    "fuse": (
        "powers_of_small_distances_keep_their_digits",
        "batches_and_axes_of_one_stay",
        "results_beyond_the_range_are_infinite_or_zero",
        "fusion_of_long_rows",
        "special_scores_have_their_places",
    ),
    "pagerank": ("pagerank_of_odd_rows",),
    "select": ("special_scores_have_their_places", "long_rows_are_selected"),
    "torch": ("special_scores_have_their_places",),
    "numpy": ("every_dtype_is_computed_as_its_float32_values",),
    "strict": ("special_scores_have_their_places", "graphs_made_by_hand"),
}
DRAWN = [fault for fault in FAULTS if fault.caught_by not in examples.__all__]


@pytest.mark.parametrize("fault", DRAWN, ids=lambda fault: fault.name)
def test_chance_decides_nothing(fault):
    failed = []
    for claim in SETTLED[fault.name.partition(":")[0]]:
        try:
            getattr(examples, f"test_{claim}")(backend=fault.wrong)
        except fault.error:
            failed.append(claim)
            break

    assert failed, "no fixed example fails, so another seed may let the fault pass"


def test_examples_take_nothing_but_a_backend():
    # No strategy and no seed: whoever fails one, fails it always.
    assert len(examples.__all__) >= 25
    assert all(list(inspect.signature(getattr(examples, name)).parameters) == ["backend"] for name in examples.__all__)
    assert set(examples.__all__) < set(suite.__all__)


# ------------------------------------------------------------------------------------ truth on long rows, the namespace


@given(layer=strategies.layers(min_tokens=1))
def test_truth_agrees_with_the_oracle(layer):
    counts = {"num_sources": layer.num_sources, "num_neighbors": layer.num_neighbors}
    sources, neighbors, weights = truth.build_graph(layer.keys, layer.importance, **counts, valid=layer.valid)
    degrees = truth.degree(layer.keys, valid=layer.valid)
    ranked = truth.pagerank(layer.importance, layer.keys, damping=0.5, rounds=3, valid=layer.valid)
    kept = truth.select(layer.importance, layer.budget, protected=layer.protected, valid=layer.valid)
    for row in np.ndindex(*layer.leading):
        one = layer.take(row)
        mask = None if one.valid is None else one.valid.tolist()
        edges = oracle.build_graph(one.keys.tolist(), one.importance.tolist(), **counts, valid=mask)
        assert sources[row].tolist() == edges.sources
        assert neighbors[row].tolist() == edges.neighbors
        assert weights[row].tolist() == edges.weights
        np.testing.assert_allclose(degrees[row], oracle.degree(one.keys.tolist(), valid=mask), atol=1e-12)
        wanted = oracle.pagerank(one.importance.tolist(), one.keys.tolist(), damping=0.5, rounds=3, valid=mask)
        np.testing.assert_allclose(ranked[row], wanted, rtol=1e-9, atol=1e-9)
        protected = None if one.protected is None else one.protected.tolist()
        assert kept[row].tolist() == oracle.select(one.importance.tolist(), one.budget, protected=protected, valid=mask)
        for signal, accumulation in (
            ("decay", "product"),
            ("enhance", "product"),
            ("evict", "product"),
            ("decay", "sum"),
        ):
            options = {"signal": signal, "accumulation": accumulation}
            found = truth.propagate(one.importance, np.maximum(neighbors[row], 0), weights[row], **options)
            wanted = oracle.propagate(one.importance.tolist(), edges.neighbors, edges.weights, **options)
            np.testing.assert_allclose(found, wanted, rtol=1e-12)
        for fusion in ("power", "max_rank", "mean_rank"):
            found = truth.fuse(one.importance, degrees[row], fusion=fusion, exponent=3, valid=one.valid)
            wanted = oracle.fuse(one.importance.tolist(), degrees[row].tolist(), fusion=fusion, exponent=3, valid=mask)
            np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_truth_on_attention_agrees_with_the_oracle():
    random = np.random.default_rng(0)
    queries, keys = random.normal(size=(2, 4, 5, 3)), random.normal(size=(2, 2, 9, 3))
    valid = random.random((2, 2, 9)) < 0.7
    found = truth.received(queries, keys, valid)
    for b, h, g in np.ndindex(2, 2, 2):
        wanted = oracle.received(queries[b, 2 * h + g].tolist(), keys[b, h].tolist(), valid[b, h].tolist())
        np.testing.assert_allclose(found[b, h, g], wanted, rtol=1e-9)


def used_of_the_namespace():
    """Every name of the namespace in the core and the adapters, with the keywords that it is given."""
    used = {}
    for folder in ("core", "adapters"):
        for path in (Path(graphkv.__file__).parent / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for name, keywords in names_in(node):
                    used.setdefault(name, set()).update(keywords)
    return used


def names_in(node):
    def of_namespace(name):
        return (isinstance(name, ast.Name) and name.id == "xp") or (
            isinstance(name, ast.Attribute) and name.attr == "xp"
        )

    if isinstance(node, ast.Attribute) and of_namespace(node.value):
        yield node.attr, set()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and of_namespace(node.func.value):
        yield node.func.attr, {keyword.arg for keyword in node.keywords if keyword.arg}


def test_the_list_of_names_is_what_the_source_uses():
    listed = {}
    for call in namespace.CALLS:
        for node in ast.walk(ast.parse(call)):
            if isinstance(node, ast.Name) and node.id not in ("x", "i", "s", "m", "device"):
                listed.setdefault(node.id, set())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                listed.setdefault(node.func.id, set()).update(keyword.arg for keyword in node.keywords)
    used = used_of_the_namespace()

    assert set(listed) == set(used)
    # Reductions are also called by another name, so the list may have a keyword more.
    assert {name: used[name] - listed[name] for name in used if used[name] - listed[name]} == {}


def test_what_a_namespace_lacks_is_said_in_one_list():
    without = next(fault.wrong for fault in FAULTS if fault.name == "namespace: without log")
    without = replaced(without, xp=namespace_of(log=None, round=None))

    assert [line.partition("(")[0] for line in namespace.missing(without)] == ["log", "round"]
    assert namespace.missing(load("numpy")) == []


def test_every_public_policy_is_shipped_to_the_kit():
    public = {name for name in graphkv.__all__ if inspect.isclass(getattr(graphkv, name))}
    kinds = {name for name in public if issubclass(getattr(graphkv, name), graphkv.Policy)}
    concrete = {name for name in kinds if not inspect.isabstract(getattr(graphkv, name))}
    # A wrapper that changes nothing is none yet, and four hold arrays of one library.
    concrete -= {"Wrapper", "Given", "SmallKV", "AttentionGate", "LESS"}

    assert {type(policy).__name__ for policy in policies.shipped(12).values()} == concrete


def test_arrays_need_no_device():
    class WithoutDevice(np.ndarray):
        @property
        def device(self):
            raise AttributeError("device")

    subject = Subject(
        **fields_of(load("numpy")) | {"from_numpy": lambda x: np.array(x).view(WithoutDevice), "title": "no device"}
    )
    x = asserts.make(subject, np.zeros(3))

    assert describe([subject]) == "graphkv backends: no device (None)"
    asserts.equal(x, np.zeros(3), backend=subject, like=x)


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
    asserts.close(x, x + np.asarray([1e-13, 0, 0, 0]), **like)
    with pytest.raises(AssertionError):
        asserts.equal(x, np.asarray([1.0, nan, 0.0, -inf]), **like)
    with pytest.raises(AssertionError, match="sign of zero"):
        asserts.identical(x, np.asarray([1.0, nan, 0.0, inf]), **like)
    with pytest.raises(AssertionError):
        asserts.close(x, np.asarray([1 + 1e-11, nan, 0.0, inf]), **like)
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
