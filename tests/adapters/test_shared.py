"""One kept set for all heads, and whole blocks, against loops."""

from itertools import pairwise
from math import ceil, fsum, inf, nan

import numpy as np
import pytest

from graphkv import (
    CAKE,
    H2O,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Bar,
    ChunkKV,
    Decay,
    Given,
    GraphKV,
    KeyDiff,
    KNorm,
    LayerShares,
    Lossless,
    PerLayer,
    PyramidKV,
    Shared,
    SmallKV,
    SnapKV,
    evict,
    evict_layers,
    observe,
)
from graphkv.adapters.blocks import block_means, block_of
from graphkv.adapters.shared import shares
from tests.support.arrays import NUMPY, each_backend, each_library, make

RNG = np.random.default_rng(31)
KEYS = RNG.normal(size=(2, 3, 30, 6))
QUERIES = RNG.normal(size=(2, 6, 30, 6))
VALID = np.arange(30) >= np.asarray([[0], [11]])
SNAPKV = SnapKV(budget=12, window=4, kernel_size=3, num_sinks=1)


def shares_by_loops(scores, takes_part):
    lowest = min([0.0, *(score for score, takes in zip(scores, takes_part, strict=True) if takes)])
    parts = [score - lowest if takes else 0.0 for score, takes in zip(scores, takes_part, strict=True)]
    total = fsum(parts)
    return [part / total if total else 0.0 for part in parts]


def shared_by_loops(scores, protected, valid):
    """Scores and protection of one row for all heads, from [head][token]."""
    tokens = range(len(valid))
    held = [valid[j] and any(row[j] for row in protected) for j in tokens]
    rows = []
    for row in scores:
        open_part = shares_by_loops(row, [valid[j] and not held[j] for j in tokens])
        held_part = shares_by_loops(row, held)
        rows.append([held_part[j] if held[j] else open_part[j] for j in tokens])
    return [fsum(row[j] for row in rows) / len(rows) for j in tokens], held


def kept_by_loops(scores, held, valid, budget, block):
    """Positions of whole blocks of one row: the last, shorter one, then by protection, mean and place."""
    real = [j for j, is_valid in enumerate(valid) if is_valid and budget]
    blocks = [real[start : start + block] for start in range(0, len(real), block)]
    kept = blocks.pop() if blocks and len(blocks[-1]) < block else []
    blocks.sort(key=lambda each: (not any(held[j] for j in each), -fsum(scores[j] for j in each) / block, each[0]))
    return sorted(kept + [j for each in blocks[: (budget - len(kept)) // block] for j in each])


def run(policy, backend, **options):
    arrays = {"queries": make(backend, QUERIES), "valid": make(backend, VALID, bool), "backend": backend}
    return evict(policy, make(backend, KEYS), **arrays, **options)


@each_backend
@pytest.mark.parametrize(
    "base", [SNAPKV, KNorm(budget=12, num_sinks=2), GraphKV(SNAPKV)], ids=["snapkv", "knorm", "graph"]
)
@pytest.mark.parametrize(
    ("budget", "block"), [(0, 1), (1, 1), (3, 1), (12, 1), (29, 1), (0, 4), (4, 4), (5, 4), (12, 4), (29, 8)]
)
def test_the_kept_set_is_that_of_loops(backend, base, budget, block):
    alone, done = run(base, backend, budget=budget), run(Shared(base, block=block), backend, budget=budget)

    scores, protected = (backend.to_numpy(x).astype(float) for x in (alone.scores, alone.protected))
    for row in range(2):
        valid = VALID[row].tolist()
        expected, held = shared_by_loops(scores[row].tolist(), protected[row].tolist(), valid)
        found = backend.to_numpy(done.scores)[row]
        np.testing.assert_allclose(
            found[:, VALID[row]], np.tile(np.asarray(expected)[VALID[row]], (3, 1)), rtol=1e-4, atol=1e-7
        )
        assert backend.to_numpy(done.protected)[row].tolist() == [held] * 3
        kept = kept_by_loops(expected, held, valid, budget, block)
        for head in backend.to_numpy(done.kept)[row].tolist():
            if block == 1 and len(kept) < budget:
                # More budget than tokens: padding fills it up, as everywhere.
                assert [j for j in head if valid[j]] == kept
            else:
                assert head == kept + [-1] * (len(head) - len(kept))
        if block > 1:
            assert backend.to_numpy(done.counts)[row].tolist() == [len(kept)] * 3
    assert done.kept.shape[-1] == budget
    assert (done.counts is None) is (block == 1)


@each_library
def test_blocks_begin_at_the_first_token_and_means_leave_padding_out(backend):
    valid = np.asarray([[False, True, True, True, True, True], [True, False, True, False, True, True]])
    values = make(backend, [[9.0, 1.0, 3.0, 5.0, 5.0, 8.0], [1.0, 9.0, 2.0, 9.0, 3.0, 4.0]])
    mask = make(backend, valid, bool)

    numbers = backend.to_numpy(block_of(mask, 2, xp=backend.xp))
    means = backend.to_numpy(block_means(values, mask, 2, xp=backend.xp))

    assert numbers[valid].tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 1]
    assert means[valid].tolist() == [2.0, 2.0, 5.0, 5.0, 8.0, 1.5, 1.5, 3.5, 3.5]


@each_backend
def test_equal_blocks_stay_in_order_and_no_block_is_torn(backend):
    policy = Shared(Given(budget=7, importance=make(backend, np.ones((1, 2, 13)))), block=3)

    done = evict(policy, make(backend, np.ones((1, 2, 13, 1))), backend=backend)

    # Token 12 is the shorter block; 6 of the 6 tokens that are left make two.
    assert backend.to_numpy(done.kept).tolist() == [[[0, 1, 2, 3, 4, 5, 12]] * 2]
    assert backend.to_numpy(done.counts).tolist() == [[7, 7]]
    fewer = evict(policy, make(backend, np.ones((1, 2, 13, 1))), backend=backend, budget=6)
    assert backend.to_numpy(fewer.kept).tolist() == [[[0, 1, 2, 12, -1, -1]] * 2]


def test_protected_tokens_of_any_head_bring_their_whole_block():
    protected = np.zeros((1, 2, 12), dtype=bool)
    protected[0, 0, 5] = protected[0, 1, 10] = True
    scores = np.tile(np.arange(12.0)[::-1], (1, 2, 1))

    done = evict(Shared(Given(budget=8, importance=scores, protected=protected), block=4), np.ones((1, 2, 12, 1)))

    assert done.kept.tolist() == [[[4, 5, 6, 7, 8, 9, 10, 11]] * 2]
    assert done.protected.tolist() == [[protected[0].any(axis=0).tolist()] * 2]


@each_backend
def test_no_head_counts_more_for_larger_scores_or_for_its_window(backend):
    """A factor of one head changes nothing, and places in the window are not compared with attention."""
    done, scaled = run(Shared(SNAPKV), backend), run(Shared(Doubling(SNAPKV)), backend)

    np.testing.assert_allclose(backend.to_numpy(scaled.scores), backend.to_numpy(done.scores), rtol=1e-5)
    assert backend.to_numpy(scaled.kept).tolist() == backend.to_numpy(done.kept).tolist()


class Doubling(GraphKV):
    """The base's scores, those of the first head times 1,024."""

    def rescore(self, found, layer, budget):
        factor = make(layer.backend, np.asarray([1024.0, 1.0, 1.0])[:, None])
        found = self.base.rescore(found, layer, budget)
        return type(found)(importance=found.importance, scores=found.scores * factor, protected=found.protected)


@each_backend
def test_one_head_keeps_what_its_base_keeps(backend):
    for base in (SNAPKV, KeyDiff(budget=12), GraphKV(SNAPKV)):
        arrays = {"queries": make(backend, QUERIES[:, :2]), "valid": make(backend, VALID, bool), "backend": backend}
        alone, done = (evict(each, make(backend, KEYS[:, :1]), **arrays) for each in (base, Shared(base)))

        assert backend.to_numpy(done.kept).tolist() == backend.to_numpy(alone.kept).tolist()


@each_backend
@pytest.mark.parametrize("block", [1, 4])
def test_what_is_on_top_may_part_the_heads_but_not_the_kept_set(backend, block):
    for policy in (
        GraphKV(Shared(SNAPKV, block=block), Decay(source_ratio=0.5, neighbors=6)),
        Shared(GraphKV(SNAPKV, Decay(source_ratio=0.5, neighbors=6)), block=block),
        GraphKV(Shared(SNAPKV, block=block), Bar()),
    ):
        kept = backend.to_numpy(run(policy, backend).kept)

        assert (kept == kept[:, :1]).all()
    parted = backend.to_numpy(run(GraphKV(Shared(SNAPKV), Decay(source_ratio=0.5, neighbors=6)), backend).scores)
    assert (parted != parted[:, :1]).any()


@each_backend
def test_heads_with_paddings_of_their_own_keep_the_same_places(backend):
    valid = np.broadcast_to(np.arange(30) >= np.asarray([0, 28, 5])[:, None], (2, 3, 30)).copy()
    for block in (1, 4):
        policy = Shared(KNorm(budget=12), block=block)
        done = evict(policy, make(backend, KEYS), valid=make(backend, valid, bool), backend=backend)

        kept = backend.to_numpy(done.kept)
        assert (kept == kept[:, :1]).all()


@each_library
def test_shares_of_odd_numbers(backend):
    rows = [[inf, 1.0, 3.0], [nan, -1.0, 1.0], [3e38, 3e38, 0.0], [-3e38, 3e38, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]

    found = backend.to_numpy(shares(make(backend, rows), make(backend, np.ones((6, 3)), bool), xp=backend.xp))

    expected = [[inf, 0.25, 0.75], [nan, 0.0, 1.0], [0.5, 0.5, 0], [0, 2 / 3, 1 / 3], [1 / 3] * 3, [0.0] * 3]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_token_that_is_nothing_in_one_head_comes_last():
    scores = np.asarray([[[nan, 1.0, 0.0], [9.0, 0.0, 1.0]], [[-inf, 1.0, 0.0], [9.0, 0.0, 1.0]]])

    assert evict(Shared(Given(budget=2, importance=scores)), np.ones((2, 2, 3, 1))).kept.tolist() == [[[1, 2]] * 2] * 2


def test_a_budget_below_a_block_and_wrong_options_are_refused():
    with pytest.raises(ArgumentError, match="budget must be 0 or at least one block of 16 tokens; got 12"):
        evict(Shared(SNAPKV, block=16), KEYS, queries=QUERIES)
    assert evict(Shared(SNAPKV, block=16), KEYS, queries=QUERIES, budget=0).kept.shape == (2, 3, 0)
    with pytest.raises(ArgumentError, match="block must be at least 1; got 0"):
        Shared(SNAPKV, block=0)
    with pytest.raises(ArgumentTypeError, match="block must be an integer"):
        Shared(SNAPKV, block=1.5)
    with pytest.raises(ArgumentError, match=r"base must keep equally many tokens in every KV head; GraphKV\(AdaKV"):
        Shared(GraphKV(AdaKV(SNAPKV)))
    with pytest.raises(ArgumentError, match="base must choose by its scores alone where blocks are kept"):
        Shared(Shared(SNAPKV, block=2), block=4)
    with pytest.raises(ArgumentTypeError, match="base must be a Policy"):
        Shared("snapkv")


def test_what_is_kept_never_exceeds_the_budget_nor_misses_a_block():
    rng = np.random.default_rng(3)
    for _ in range(200):
        tokens, block = int(rng.integers(1, 40)), int(rng.integers(1, 9))
        budget = int(rng.integers(block, 50))
        pads = rng.integers(0, tokens, (3, 1))
        valid = np.arange(tokens) >= pads
        scores = rng.choice([0.0, 1.0, 2.5], size=(3, 2, tokens))
        policy = Shared(Given(budget=budget, importance=scores), block=block)

        done = evict(policy, np.ones((3, 2, tokens, 1)), valid=valid, backend=NUMPY)

        if done.counts is None:
            continue
        for row, total in enumerate(tokens - pads[:, 0]):
            count = int(done.counts[row, 0])
            assert count <= budget
            assert count == total or count % block == total % block
            assert count == total or budget - count < block
            assert ceil(count / block) * block >= count - total % block


LAYERS = [
    {"keys": RNG.normal(size=(2, 3, 30, 6)), "queries": RNG.normal(size=(2, 6, 30, 6)), "valid": VALID}
    for _ in range(3)
]


def layers_of(backend):
    kinds = {"valid": bool}
    return [{name: make(backend, x, kinds.get(name, np.float32)) for name, x in facts.items()} for facts in LAYERS]


@each_backend
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("base", [SNAPKV, GraphKV(SNAPKV)], ids=["snapkv", "graph"])
def test_layers_keep_one_set_by_the_mean_of_all(backend, base, block):
    policy = Shared(base, over="layers", block=block)
    layers = layers_of(backend)

    done = evict_layers(policy, layers, backend=backend)

    alone = [
        evict(
            base,
            facts["keys"],
            queries=facts["queries"],
            valid=facts["valid"],
            layer=place,
            num_layers=3,
            backend=backend,
        )
        for place, facts in enumerate(layers)
    ]
    for row in range(2):
        valid, means = VALID[row].tolist(), []
        for each in alone:
            scores, protected = (backend.to_numpy(x)[row].tolist() for x in (each.scores, each.protected))
            mean, held = shared_by_loops(scores, protected, valid)
            means.append(mean)
        kept = kept_by_loops([fsum(column) / 3 for column in zip(*means, strict=True)], held, valid, 12, block)
        for each in done:
            for head in backend.to_numpy(each.kept)[row].tolist():
                assert [j for j in head if j >= 0] == kept
    assert backend.to_numpy(done[0].scores).tolist() == backend.to_numpy(done[2].scores).tolist()
    assert (backend.to_numpy(alone[0].kept) != backend.to_numpy(alone[1].kept)).any()


def test_layers_that_share_must_be_evicted_together_with_one_budget():
    policy = Shared(SNAPKV, over="layers")
    layers = layers_of(NUMPY)

    assert policy.needs().couples_layers
    assert policy.needs().all_layers
    assert not Shared(SNAPKV).needs().all_layers
    # A model of one layer has no others.
    assert (
        evict(policy, KEYS, queries=QUERIES).kept.tolist() == evict(Shared(SNAPKV), KEYS, queries=QUERIES).kept.tolist()
    )
    with pytest.raises(
        ArgumentError, match=r"by evict_layers: with Shared\(SnapKV\) layer 1 keeps what the layers \[0, 1, 2\] choose"
    ):
        evict(policy, KEYS, queries=QUERIES, layer=1, num_layers=3)
    with pytest.raises(
        ArgumentError, match=r"layers must have one budget .* with Shared\(PyramidKV\); layers\[1\] has"
    ):
        evict_layers(Shared(PyramidKV(budget=12, window=4), over="layers"), layers)
    with pytest.raises(ArgumentError, match=r"one \(batch, kv_heads, N\)"):
        evict_layers(policy, [*layers[:2], {"keys": KEYS[:, :2], "queries": QUERIES[:, :4]}])
    with pytest.raises(ArgumentError, match="base must give all layers one budget"):
        Shared(CAKE(budget=12), over="layers")
    with pytest.raises(ArgumentError, match="over must be one of"):
        Shared(SNAPKV, over="rows")
    with pytest.raises(ArgumentError, match=r"layers\[1\] must have keys; got \['queries'\]"):
        evict_layers(policy, [layers[0], {"queries": QUERIES}])
    with pytest.raises(ArgumentError, match="queries must hold the last 4 positions"):
        evict_layers(policy, [*layers[:2], {"keys": KEYS}])
    assert evict_layers(policy, []) == ()


def test_a_group_of_layers_cannot_share_with_all_unless_all_do():
    shared = Shared(SNAPKV, over="layers")
    with pytest.raises(ArgumentError, match=r"policies\[1\] must choose for its layer alone"):
        PerLayer(SNAPKV, policies=(SNAPKV, shared))
    layers = layers_of(NUMPY)
    for policy in (Shared(PerLayer(SNAPKV, policies=(SNAPKV, GraphKV(SNAPKV))), over="layers"),
                   PerLayer(shared, policies=(shared, GraphKV(shared)))):  # fmt: skip
        done = evict_layers(policy, layers)
        assert done[0].kept.tolist() == done[2].kept.tolist()


def test_what_fits_and_what_shares_nothing_is_as_in_single_calls():
    layers = layers_of(NUMPY)

    whole = evict_layers(Shared(SNAPKV, over="layers"), layers, budget=30)
    assert [each.kept.shape for each in whole] == [(2, 3, 30)] * 3
    for policy in (PyramidKV(budget=12, window=4), AdaKV(SNAPKV), H2O(budget=12)):
        for place, each in enumerate(evict_layers(policy, layers)):
            facts = {name: x for name, x in layers[place].items() if name != "keys"}
            one = evict(policy, layers[place]["keys"], layer=place, num_layers=3, **facts)
            assert each.kept.tolist() == one.kept.tolist()


def test_a_memory_stays_with_its_layer():
    layers = layers_of(NUMPY)
    policy = Shared(H2O(budget=12), over="layers")

    done = evict_layers(policy, layers)

    for each, facts in zip(done, layers, strict=True):
        alone = observe(policy, facts["keys"], queries=facts["queries"], valid=facts["valid"])
        assert each.state.tokens["attention"].tolist() == each.apply(alone.tokens["attention"]).tolist()
    with pytest.raises(ArgumentError, match="state must be None for Shared"):
        evict_layers(Shared(SNAPKV, over="layers"), [{**facts, "state": done[0].state} for facts in layers])


def nested_by_loops(backend, base, budgets):
    """What each layer keeps, one after the other, of what the last one kept."""
    kept, allowed = [], VALID
    for layer, budget in zip(layers_of(backend), budgets, strict=True):
        done = run_layer(backend, Shared(base), layer, budget=budget)
        scores, rows = backend.to_numpy(done.scores)[:, 0], []
        protected = backend.to_numpy(done.protected)[:, 0]
        for row in range(2):
            among = np.flatnonzero(allowed[row]).tolist()
            best = sorted(among, key=lambda j, row=row: (not protected[row, j], -scores[row, j], j))[:budget]
            rows.append(sorted(best))
        kept.append(rows)
        allowed = np.asarray([np.isin(np.arange(30), row) for row in rows])
    return kept


def run_layer(backend, policy, layer, **options):
    facts = {name: x for name, x in layer.items() if name != "keys"}
    return evict(policy, layer["keys"], **facts, **options, backend=backend)


@each_backend
@pytest.mark.parametrize("base", [SNAPKV, GraphKV(SNAPKV), KeyDiff(budget=12, num_sinks=2)], ids=repr)
def test_nested_layers_choose_from_what_the_layer_below_keeps(backend, base):
    budgets = [19, 13, 13, 7][: len(layers_of(backend))]
    layers = [{**layer, "budget": budget} for layer, budget in zip(layers_of(backend), budgets, strict=True)]

    done = evict_layers(Shared(base, nested=True), layers, backend=backend)
    free = evict_layers(Shared(base), layers, backend=backend)

    expected, own = nested_by_loops(backend, base, budgets), set()
    for each, alone, rows in zip(done, free, expected, strict=True):
        kept = backend.to_numpy(each.kept)
        assert (kept == kept[:, :1]).all()
        assert [row[VALID[number][row]].tolist() for number, row in enumerate(kept[:, 0])] == rows
        own.add(kept.tolist() == backend.to_numpy(alone.kept).tolist())
    assert own == {True, False}


def test_nested_budgets_are_shared_out_as_in_pyramid_infer():
    layers = layers_of(NUMPY)
    policy = LayerShares.pyramid_infer(GraphKV(Shared(SNAPKV, nested=True)), len(layers), least=0.5)

    done = evict_layers(policy, layers)

    sets = [[set(row) for row in each.kept[:, 0].tolist()] for each in done]
    assert sum(each.kept.shape[-1] for each in done) == 12 * len(layers)
    assert all(upper[0] < lower[0] for lower, upper in pairwise(sets))


def test_nested_layers_over_what_fits_and_at_the_ends():
    layers = [{**layer, "valid": None} for layer in layers_of(NUMPY)]
    policy = Shared(SNAPKV, nested=True)
    for budgets in ([50, 30, 5], [30, 29, 0], [12, 12, 12], [1, 1, 0]):
        given = [{**layer, "budget": budget} for layer, budget in zip(layers, budgets, strict=False)]
        done = evict_layers(policy, given)
        assert [each.kept.shape[-1] for each in done] == [min(30, budget) for budget in budgets[: len(done)]]
        for lower, upper in pairwise(done):
            assert np.isin(upper.kept[0, 0], lower.kept[0, 0]).all()


def test_nested_layers_of_equal_scores_and_without_numbers():
    scores = [np.asarray([[[nan, 1.0, 1.0, 1.0]]]), np.asarray([[[9.0, 9.0, 9.0, nan]]])]
    layers = [{"keys": np.ones((1, 1, 4, 2)), "budget": budget} for budget in (2, 2)]
    policy = SmallKV(budget=2, importance=scores, num_recent=0)

    first, second = evict_layers(Shared(policy, nested=True), layers)

    assert first.kept.tolist() == second.kept.tolist() == [[[1, 2]]]


def test_nested_layers_that_cannot_be_are_refused():
    layers = layers_of(NUMPY)
    for wrong, message in (
        (lambda: Shared(SNAPKV, over="layers", nested=True), "nested must be False where all layers keep one set"),
        (
            lambda: Shared(SNAPKV, block=4, nested=True),
            "nested must be False where blocks are kept; got True with block=4",
        ),
        (lambda: Shared(Lossless(SNAPKV), nested=True), "where layers are nested; Lossless"),
        (lambda: Shared(ChunkKV(SNAPKV, reuse=2), nested=True), "where layers are nested; ChunkKV"),
        (
            lambda: evict_layers(Shared(SNAPKV, nested=True), [{**layers[0], "budget": 5}, {**layers[1], "budget": 6}]),
            "budget must not grow from layer to layer where they are nested; got 6 above 5",
        ),
        (
            lambda: run_layer(NUMPY, Shared(SNAPKV, nested=True), {**layers[1], "layer": 1, "num_layers": 2}),
            "evict_layers",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            wrong()
    with pytest.raises(ArgumentTypeError, match="nested must be True or False"):
        Shared(SNAPKV, nested=1)
