"""A policy's running state: who grows it, who carries it, and what is refused."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from graphkv import (
    H2O,
    ArgumentError,
    ArgumentTypeError,
    GraphKV,
    KNorm,
    Memory,
    Policy,
    Requirements,
    evict,
    observe,
)
from graphkv.adapters import running
from tests.support.arrays import each_library, make


@dataclass(frozen=True, kw_only=True)
class Counter(Policy):
    """Counts calls per token, once as a number and once as a pair of numbers; keeps what came first."""

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=("calls", "pair", "single"))

    def observe(self, layer, memory):
        xp = layer.xp
        single, pair = running.grown(memory, layer, "single") + 1, self.pairs(memory, layer)
        calls = xp.zeros((layer.keys.shape[0],), device=layer.keys.device) if memory is None else memory.layer["calls"]
        return Memory(tokens={"single": single, "pair": pair}, layer={"calls": calls + 1})

    def pairs(self, memory, layer):
        xp, old = layer.xp, layer.num_tokens - layer.num_new
        both = [running.grown(None, layer, "pair")] * 2
        grown = xp.stack(both, axis=-1)
        if memory is not None:
            grown = xp.concat([memory.tokens["pair"], grown[:, :, old:, ...]], axis=2)
        return grown + 10 * (1 + old)

    def score(self, layer, memory):
        return memory.tokens["single"]


@each_library
def test_state_travels_with_the_kept_tokens_whatever_its_trailing_axes(backend):
    def call(num_tokens, state):
        keys = make(backend, np.ones((1, 2, num_tokens, 3)))
        return evict(Counter(budget=3), keys, queries=keys, state=state, backend=backend)

    first = call(4, None)
    second = call(5, first.state)

    assert {name: tuple(sums.shape) for name, sums in first.state.tokens.items()} == {
        "single": (1, 2, 3),
        "pair": (1, 2, 3, 2),
    }
    # Three kept tokens were seen before, two are new; the first three are kept again.
    assert backend.to_numpy(second.scores).tolist() == [[[2, 2, 2, 1, 1]] * 2]
    assert backend.to_numpy(second.state.tokens["pair"]).tolist() == [[[[50, 50]] * 3] * 2]
    # What belongs to the layer is not cut with the tokens.
    assert backend.to_numpy(second.state.layer["calls"]).tolist() == [2]


@each_library
def test_observing_alone_remembers_all_tokens_and_evicts_none(backend):
    keys = make(backend, np.ones((1, 2, 4, 3)))

    seen = observe(Counter(budget=3), keys, queries=keys, backend=backend)
    done = evict(Counter(budget=3), keys, state=seen, backend=backend)

    assert seen.num_tokens == 4
    # Nothing is new to the second call, so nothing is counted twice.
    assert backend.to_numpy(done.scores).tolist() == [[[1] * 4] * 2]


def memory(single, pair=None, calls=(0,)):
    pair = np.ones((*np.shape(single), 2)) if pair is None else pair
    return Memory(tokens={"single": single, "pair": pair}, layer={"calls": np.asarray(calls)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (memory(np.ones((1, 2, 7))), r"state.tokens\['single'\] must have shape"),
        (memory(np.ones((1, 3, 4))), r"state.tokens\['single'\] must have shape"),
        (memory(np.ones((1, 2))), r"state.tokens\['single'\] must have shape"),
        (memory(np.ones((1, 2, 4)), np.ones((1, 2, 3, 2))), "one number of tokens S"),
        (memory(np.ones((1, 2, 4)), calls=(0, 0)), r"state.layer\['calls'\] must have shape"),
        (Memory(tokens={"single": np.ones((1, 2, 4))}), r"state must hold \['calls', 'pair', 'single'\] for Counter"),
    ],
)
def test_a_state_of_another_shape_is_refused(state, message):
    keys = np.ones((1, 2, 6, 3))
    with pytest.raises(ArgumentError, match=message):
        evict(Counter(budget=3), keys, queries=keys, state=state)


@pytest.mark.parametrize("queries", [None, np.ones((1, 2, 6, 3))], ids=["no queries", "queries"])
def test_a_state_is_refused_by_a_policy_that_remembers_nothing(queries):
    keys = np.ones((1, 2, 6, 3))
    for policy in (KNorm(budget=3), KNorm(budget=9), GraphKV(KNorm(budget=3))):
        with pytest.raises(
            ArgumentError, match=r"state must be None for .*KNorm.*, which remembers nothing; got \['x'\]"
        ):
            evict(policy, keys, queries=queries, state=Memory(tokens={"x": keys[..., 0]}))
    with pytest.raises(ArgumentTypeError, match="state must be a Memory; got dict"):
        evict(H2O(budget=3), keys, queries=queries, state={"attention": keys[..., 0]})
    with pytest.raises(ArgumentError, match=r"state must hold \['attention', 'queries'\] for H2O; got \['x'\]"):
        evict(H2O(budget=3), keys, queries=queries, state=Memory(tokens={"x": keys[..., 0]}))


@dataclass(frozen=True, kw_only=True)
class Ages(Policy):
    """Counts the calls that each token has lived through, without a look at any query."""

    requirements: ClassVar[Requirements] = Requirements(state=("age",))

    def observe(self, layer, memory):
        return Memory(tokens={"age": running.grown(memory, layer, "age") + 1})

    def score(self, layer, memory):
        return memory.tokens["age"]


@each_library
def test_a_policy_without_queries_remembers_without_queries(backend):
    """From the first call on, whether it evicts or everything fits."""
    keys = make(backend, np.ones((1, 2, 4, 3)))
    for budget in (3, 9):
        first = evict(Ages(budget=budget), keys, backend=backend)
        kept = first.apply(keys)
        second = evict(Ages(budget=9), kept, state=first.state, backend=backend)
        assert backend.to_numpy(first.state.tokens["age"]).tolist() == [[[1] * min(budget, 4)] * 2]
        assert backend.to_numpy(second.state.tokens["age"]).tolist() == [[[1] * min(budget, 4)] * 2]


def test_new_tokens_without_their_queries_are_refused():
    keys = np.ones((1, 2, 6, 3))
    first = evict(H2O(budget=3), keys, queries=keys)
    with pytest.raises(ArgumentError, match="queries must hold all 3 new positions for H2O; got none"):
        evict(H2O(budget=3), keys, state=first.state)
    with pytest.raises(ArgumentError, match="queries must hold all 3 new positions for H2O; got 2"):
        evict(H2O(budget=9), keys, queries=keys[:, :, :2], state=first.state)
