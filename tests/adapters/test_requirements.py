"""What policies declare about their needs and costs."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from graphkv import (
    D2O,
    TOVA,
    Absorb,
    AdaKV,
    ArgumentError,
    Decay,
    Degree,
    GraphKV,
    KVMerger,
    Policy,
    Random,
    SnapKV,
    WeightedKV,
    evict,
)
from graphkv.core import LayerShape, Requirements, Wrapper
from tests.support.arrays import NUMPY

SHAPE = LayerShape(num_tokens=100, query_heads=6, kv_heads=2, head_size=8, budget=20, batch=3)


def test_the_cost_of_window_attention_is_that_of_its_product_and_softmax():
    policy = SnapKV(budget=20, window=10)

    assert policy.cost(SHAPE).flops == 3 * 6 * 10 * 100 * (2 * 8 + 5)
    assert policy.cost(SHAPE).bytes == 4 * 3 * 6 * 10 * 100


def test_a_graph_adds_its_cost_to_that_of_the_base():
    policy = GraphKV(
        SnapKV(budget=20, window=10), Decay(neighbors=1, source_ratio=0.5, rounds=2, recompute_sources=True)
    )

    # P = 20 - 10, so K = 5; a graph for each of two rounds.
    assert policy.cost(SHAPE).flops == policy.base.cost(SHAPE).flops + 2 * 3 * 2 * 100 * 8 * (2 * 5 + 3)
    assert policy.cost(SHAPE).bytes == policy.base.cost(SHAPE).bytes
    # Places of 6 x (100 + 2) similarities are more than the keys.
    assert GraphKV(Random(budget=20)).cost(SHAPE).bytes == 8 * 3 * 2 * 6 * (100 + 2)


def test_the_degree_signal_costs_seven_operations_an_entry_of_the_keys():
    policy = GraphKV(Random(budget=20), Degree())

    assert policy.cost(SHAPE).flops == 3 * 2 * 100 * 8 * 7
    assert policy.cost(SHAPE).bytes == 4 * 3 * 2 * 100 * 8
    assert policy.needs() == GraphKV(Random(budget=20)).needs()


def test_needs_join_those_of_the_base():
    @dataclass(frozen=True)
    class Valued(Wrapper):
        requirements: ClassVar[Requirements] = Requirements(values=True, state=("sums",))

    found = Valued(GraphKV(SnapKV(budget=20))).needs()

    assert (found.values, found.queries, found.state) == (True, "window", ("sums",))
    assert Requirements(queries="all").joined(Requirements(queries="window")).queries == "all"


def test_masses_are_needed_where_any_part_that_merges_says_so():
    base = SnapKV(budget=20)
    for policy, masses in (
        (WeightedKV(base), False),
        (WeightedKV(base, mass="attention"), True),
        (D2O(base, layer_budgets="base"), True),
        (D2O.paper(20), False),
        (KVMerger(base), True),
        (KVMerger(base, mass="values"), False),
        (GraphKV(WeightedKV(base)), False),
        (GraphKV(Absorb(base)), True),
        (WeightedKV(Absorb(base)), True),
    ):
        assert policy.needs().merges
        assert policy.needs().masses is masses
    # Nothing is promised by who does not merge.
    assert GraphKV(base).needs().masses
    assert Requirements(masses=False).joined(Requirements()).masses


def test_a_wrapper_couples_heads_when_it_or_its_base_does():
    assert GraphKV(TOVA(budget=20)).needs().couples_heads
    assert AdaKV(SnapKV(budget=20)).needs().couples_heads
    assert not GraphKV(SnapKV(budget=20)).needs().couples_heads


def test_a_policy_that_declares_no_queries_runs_without_them_and_others_say_so():
    keys = NUMPY.xp.ones((1, 1, 6, 2))

    assert evict(Random(budget=2), keys).kept.shape == (1, 1, 2)
    with pytest.raises(ArgumentError, match=r"queries must hold the last 6 positions for SnapKV; got none"):
        evict(SnapKV(budget=2), keys)


def test_requirements_are_of_the_class():
    assert isinstance(Policy.requirements, Requirements)
    assert SnapKV.requirements.queries == "window"


def test_a_wrapper_forwards_every_stage():
    """A method of Policy that Wrapper forgot would silently be the default, whatever the base does."""
    stages = {name for name, value in vars(Policy).items() if callable(value) and not name.startswith("_")}

    assert {"observe", "score", "protection", "rescore", "choose", "merge", "wants", "share_out", "at"} <= stages
    assert stages <= set(vars(Wrapper))
