"""A policy's running state: who grows it, who carries it, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest

from graphkv import ArgumentError, Policy, evict
from tests.arrays import each_library, make


@dataclass(frozen=True, kw_only=True)
class Counter(Policy):
    """Counts calls per token, once as a number and once as a pair of numbers; keeps what came first."""

    def observe(self, inputs):
        xp = inputs.xp
        single = xp.zeros(inputs.valid.shape, dtype=xp.float32, device=inputs.keys.device)
        old = inputs.state or {"single": single, "pair": xp.stack([single, single], axis=-1)}
        return {"single": old["single"] + 1, "pair": old["pair"] + 10 * (1 + inputs.num_seen)}

    def score(self, inputs):
        return inputs.state["single"]


@each_library
def test_state_travels_with_the_kept_tokens_whatever_its_trailing_axes(backend):
    def call(num_tokens, state):
        keys = make(backend, np.ones((1, 2, num_tokens, 3)))
        return evict(Counter(budget=3), keys, queries=keys[:, :, :1, :], state=state, backend=backend)

    first = call(4, None)
    second = call(5, first.state)

    assert {name: tuple(sums.shape) for name, sums in first.state.items()} == {
        "single": (1, 2, 3),
        "pair": (1, 2, 3, 2),
    }
    # Three kept tokens were seen before, two are new; the first three are kept again.
    assert backend.to_numpy(second.scores).tolist() == [[[2, 2, 2, 1, 1]] * 2]
    assert backend.to_numpy(second.state["pair"]).tolist() == [[[[50, 50]] * 3] * 2]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"single": np.ones((1, 2, 7))}, r"state\['single'\] must have shape"),
        ({"single": np.ones((1, 3, 4))}, r"state\['single'\] must have shape"),
        ({"single": np.ones((1, 2))}, r"state\['single'\] must have shape"),
        ({"single": np.ones((1, 2, 4)), "pair": np.ones((1, 2, 3, 2))}, "one number of tokens S"),
    ],
)
def test_a_state_of_another_shape_is_refused(state, message):
    with pytest.raises(ArgumentError, match=message):
        evict(Counter(budget=3), np.ones((1, 2, 6, 3)), state=state)
