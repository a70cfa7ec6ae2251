"""The stages of a policy: their order, what each may decide, and what the door refuses before the first one."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from graphkv import (
    CAKE,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    Choice,
    Decay,
    Given,
    GraphKV,
    KNorm,
    Layer,
    LayerBudgets,
    Memory,
    Merge,
    PerLayer,
    Policy,
    Protection,
    Requirements,
    SnapKV,
    StreamingLLM,
    Wrapper,
    evict,
    observe,
    wants,
)
from graphkv.core import Cost, LayerShape
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(5)
KEYS = RNG.normal(size=(2, 2, 12, 4))
QUERIES = RNG.normal(size=(2, 4, 12, 4))
LEFT = np.arange(12) >= np.asarray([0, 3])[:, None]


@dataclass(frozen=True, kw_only=True)
class Noting(Policy):
    """Writes down which stage ran, with which budget; keeps what came first."""

    notes: list
    requirements: ClassVar[Requirements] = Requirements(queries="new", state=("sums",))

    def observe(self, layer, memory):
        self.notes.append(("observe", layer.num_new))
        return Memory({"sums": layer.xp.zeros_like(layer.keys[..., 0])})

    def score(self, layer, memory):
        self.notes.append(("score", sorted(memory.tokens)))
        return -layer.xp.cumulative_sum(layer.xp.ones_like(layer.keys[..., 0]), axis=-1)

    def protection(self, budget):
        self.notes.append(("protection", budget))
        return Protection(last=1)

    def rescore(self, found, layer, budget):
        self.notes.append(("rescore", budget))
        return replace(found, scores=found.scores + 100)

    def choose(self, found, layer, budget):
        self.notes.append(("choose", budget))
        assert float(found.scores.max()) == float(found.importance.max()) + 100
        return super().choose(found, layer, budget)

    def merge(self, choice, found, layer, memory):
        self.notes.append(("merge", tuple(choice.kept.shape)))
        ones = layer.xp.ones_like(layer.keys[..., 0])
        into = layer.xp.zeros(layer.valid.shape, dtype=layer.xp.int64)
        return Merge(into=into, key_weights=ones, value_weights=ones, mass=ones[..., : choice.kept.shape[-1]])


@pytest.mark.parametrize("wrap", [lambda base: base, Wrapper, lambda base: GraphKV(Wrapper(base), Decay(neighbors=0))])
def test_the_stages_run_in_the_order_of_the_contract_and_wrappers_forward_them_all(wrap):
    notes = []
    policy = wrap(Noting(budget=5, notes=notes))

    done = evict(policy, KEYS, queries=QUERIES, budget=4)

    names = [name for name, _ in notes]
    # GraphKV asks once more how many tokens are protected.
    assert [name for place, name in enumerate(names) if name not in names[:place]] == [
        "observe", "score", "protection", "rescore", "choose", "merge",
    ]  # fmt: skip
    assert {detail for name, detail in notes if name in ("protection", "rescore", "choose")} == {4}
    assert done.kept.tolist() == [[[0, 1, 2, 11]] * 2] * 2
    assert done.merge.mass.shape == (2, 2, 4)
    assert done.state.tokens["sums"].shape == (2, 2, 4)


def test_with_room_for_everything_a_policy_only_remembers():
    notes = []
    done = evict(Noting(budget=12, notes=notes), KEYS, queries=QUERIES)

    assert notes == [("observe", 12)]
    assert (done.importance, done.merge, done.kept.shape) == (None, None, (2, 2, 12))
    assert observe(Noting(budget=1, notes=notes), KEYS, queries=QUERIES).num_tokens == 12
    assert observe(KNorm(budget=1), KEYS) is None
    with pytest.raises(ArgumentError, match="queries must hold all 12 new positions for Noting; got none"):
        observe(Noting(budget=1, notes=notes), KEYS)


@each_library
@pytest.mark.parametrize("protection", [Protection(first=2), Protection(last=3), Protection(window=3),
                                        Protection(first=1, last=2), Protection(first=2, window=1)])  # fmt: skip
def test_a_protection_counts_what_it_marks(backend, protection):
    layer = Layer(make(backend, KEYS), valid=make(backend, LEFT, bool), backend=backend)

    mask = backend.to_numpy(protection.mask(layer))

    assert (mask.sum(axis=-1) == protection.count).all()
    assert not (mask & ~LEFT[:, None]).any()
    for row, start in ((0, 0), (1, 3)):
        marked = np.nonzero(mask[row, 0])[0]
        newest = protection.newest
        assert marked.tolist() == [*range(start, start + protection.first), *range(12 - newest, 12)]


def test_a_window_is_positions_and_recents_are_tokens():
    holes = np.ones((2, 12), dtype=bool)
    holes[:, 9:] = False
    layer = Layer(KEYS, valid=holes)

    assert Protection(window=4).mask(layer)[0, 0].nonzero()[0].tolist() == [8]
    assert Protection(last=4).mask(layer)[0, 0].nonzero()[0].tolist() == [5, 6, 7, 8]
    assert Protection().mask(layer) is None


def test_a_budget_of_the_call_replaces_the_policys():
    for budget, kept in ((3, 3), (0, 0), (0.5, 6), (12, 12), (99, 12)):
        assert evict(KNorm(budget=7), KEYS, budget=budget).kept.shape[-1] == kept
    assert evict(KNorm(budget=7), KEYS, budget=0.5, tokens_seen=20).kept.shape[-1] == 10
    same = evict(KNorm(budget=5), KEYS)
    assert np.array_equal(evict(GraphKV(KNorm(budget=9)), KEYS, budget=5).protected, same.protected)
    graph = evict(GraphKV(StreamingLLM(budget=9, num_sinks=1)), KEYS, budget=6).graph
    # P = 6 - 1, of which 0.3 are sources.
    assert graph.num_sources == 1
    for wrong in (-1, 1.5, 0.0, "many", True):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=r"budget (must|as a share must)"):
            evict(KNorm(budget=7), KEYS, budget=wrong)


def test_a_budget_that_contradicts_settled_ones_is_refused():
    policy = GraphKV(LayerBudgets(KNorm(budget=7), budgets=(6, 3)))
    call = {"layer": 1, "num_layers": 2}

    assert evict(policy, KEYS, **call, budget=3).budget == 3
    # With room for everything there is nothing to contradict.
    assert evict(policy, KEYS, **call, budget=12).kept.shape[-1] == 12
    message = r"budget must be 3, as GraphKV\(LayerBudgets\(KNorm\)\) has settled, or left out; got 5"
    with pytest.raises(ArgumentError, match=message):
        evict(policy, KEYS, **call, budget=5)


def test_the_policy_of_a_layer_is_looked_up_once_and_below_wrappers_too():
    base = KNorm(budget=6)
    graphs = PerLayer(base, policies=(base, GraphKV(base)))

    for policy in (graphs, Wrapper(graphs)):
        found = [evict(policy, KEYS, layer=layer, num_layers=2) for layer in range(2)]
        assert [each.graph is None for each in found] == [True, False]


def test_every_need_is_checked_before_anything_is_computed():
    @dataclass(frozen=True, kw_only=True)
    class Needy(Policy):
        requirements: ClassVar[Requirements] = Requirements(
            values=True, unrotated_keys=True, queries="window", logits=True
        )

        def num_queries(self, num_tokens):
            return 3

        def score(self, layer, memory):
            raise AssertionError("nothing may be scored")

    policy, given = Wrapper(Needy(budget=4)), {}
    for name, value, message in (
        ("values", KEYS, r"values must be given for Wrapper\(Needy\); got None"),
        ("unrotated_keys", KEYS, r"unrotated_keys must be given for Wrapper\(Needy\); got None"),
        ("attention", np.ones((2, 4, 3, 12)), r"queries must hold the last 3 positions for Wrapper\(Needy\); got none"),
        ("queries", QUERIES[:, :, :2], r"queries must hold the last 3 positions for Wrapper\(Needy\); got none"),
        ("queries", QUERIES[:, :, :3], r"queries must hold the last 3 positions for Wrapper\(Needy\); got 2"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evict(policy, KEYS, **given)
        given[name] = value
    with pytest.raises(AssertionError, match="nothing may be scored"):
        evict(policy, KEYS, **given)


def test_what_layers_want_is_asked_where_the_policy_says_so():
    found = wants(CAKE(budget=6, window=3), KEYS, queries=QUERIES)
    assert found.shape == (2,)
    assert wants(KNorm(budget=6), KEYS) is None
    assert wants(LayerBudgets(CAKE(budget=6, window=3), budgets=(6,)), KEYS) is None
    with pytest.raises(ArgumentError, match="queries must hold the last 3 positions for CAKE; got none"):
        wants(CAKE(budget=6, window=3), KEYS)
    assert KNorm(budget=6).share_out([1.0, 5.0], 12) == [6, 6]


def test_heads_keep_their_own_numbers_by_the_scores_of_the_stage_that_settles_them():
    base = GraphKV(KNorm(budget=4))
    above, below = evict(GraphKV(AdaKV(KNorm(budget=4))), KEYS), evict(AdaKV(base), KEYS)
    alone = evict(AdaKV(KNorm(budget=4)), KEYS)

    assert np.array_equal(above.counts, alone.counts)
    assert above.counts.sum() == below.counts.sum() == 2 * 2 * 4
    assert ((above.kept >= 0).sum(axis=-1) == above.counts).all()
    assert isinstance(above.choice, Choice)


@each_library
def test_given_scores_choose_and_given_marks_protect(backend):
    scores, marks = RNG.normal(size=(2, 2, 12)), np.zeros((2, 2, 12), dtype=bool)
    marks[..., 5] = True
    keys = make(backend, KEYS)

    plain = evict(Given(budget=3, importance=make(backend, scores)), keys, backend=backend)
    marked = Given(budget=3, importance=make(backend, scores), protected=make(backend, marks, bool), num_protected=1)
    forced = evict(GraphKV(marked, Decay(source_ratio=0.5)), keys, backend=backend)

    best = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :3], axis=-1)
    assert backend.to_numpy(plain.kept).tolist() == best.tolist()
    assert (backend.to_numpy(forced.kept) == 5).any(axis=-1).all()
    # P = 3 - 1, of which one half is a source.
    assert forced.graph.num_sources == 1


def test_given_says_what_is_wrong():
    with pytest.raises(ArgumentError, match=r"importance must have shape \(2, 2, 12\) like keys; got \(2, 2, 11\)"):
        evict(Given(budget=3, importance=KEYS[:, :, 1:, 0]), KEYS)
    with pytest.raises(ArgumentError, match="num_protected must be 0 without protected; got 2"):
        Given(budget=3, importance=KEYS[..., 0], num_protected=2)
    with pytest.raises(ArgumentTypeError, match="protected must be bool"):
        evict(Given(budget=3, importance=KEYS[..., 0], protected=KEYS[..., 0]), KEYS)
    with pytest.raises(BackendError, match="importance"):
        evict(Given(budget=3, importance=[1.0]), KEYS)


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"values": KEYS[:, :, 1:]}, ArgumentError, "values must have shape"),
        ({"positions": KEYS[..., 0]}, ArgumentTypeError, "positions must be an array of integers"),
        ({"positions": np.ones((2, 2, 11), int)}, ArgumentError, "positions must have shape"),
        ({"num_new": 13}, ArgumentError, "num_new must be at most N=12; got 13"),
        ({"layer": 2, "num_layers": 2}, ArgumentError, "layer must be below num_layers=2; got 2"),
        ({"valid": KEYS[..., 0]}, ArgumentTypeError, "valid must be bool"),
    ],
)
def test_a_layer_is_checked_when_it_is_made(facts, error, message):
    with pytest.raises(error, match=message):
        Layer(KEYS, **facts)


def test_a_layer_holds_floats_of_32_bits_or_wider_and_one_row_of_padding_per_head():
    layer = Layer(KEYS.astype(np.float16), queries=QUERIES, valid=LEFT, positions=np.zeros((2, 2, 12), np.int32))

    assert (layer.keys.dtype, layer.queries.dtype, layer.positions.dtype) == (np.float32, np.float64, np.int32)
    assert (layer.valid.shape, layer.num_tokens, layer.num_new) == ((2, 2, 12), 12, 12)


def test_costs_add_up_in_work_and_compare_in_memory():
    shape = LayerShape(num_tokens=100, query_heads=4, kv_heads=2, head_size=8, budget=20)

    assert Cost(3, 5).then(Cost(4, 2)) == Cost(7, 5)
    assert Wrapper(SnapKV(budget=20)).cost(shape) == SnapKV(budget=20).cost(shape)
