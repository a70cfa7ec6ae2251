"""RoCo against simulations with their own lists: our rule, and the public code's decoding mode."""

from math import sqrt

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, Memory, RoCo, evict
from graphkv.adapters.roco import deviation
from tests.adapters.decoding import decode
from tests.adapters.loops import best, mean, simulate
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(13)
KEYS, QUERIES = 2 * RNG.normal(size=(1, 2, 60, 4)), 2 * RNG.normal(size=(1, 6, 60, 4))


def statistics(head):
    """Mean and standard deviation of each stored token's attention, averaged over the query heads first."""
    means, deviations = [], []
    for token in head.received:
        row = [mean(members) for members in zip(*token, strict=True)]
        means.append(mean(row))
        deviations.append(sqrt(max(0.0, mean([a * a for a in row]) - mean(row) ** 2)))
    return means, deviations


def keep_varying(budget, num_varying, num_sinks, num_recent, seen=None):
    """Our rule: evict the lowest means among the tokens that neither vary nor are first or newest."""

    def decide(head):
        number = len(head.position)
        if number <= budget:
            return None
        means, deviations = statistics(head)
        always = {j for j in range(number) if j < num_sinks or j >= number - num_recent}
        varying = always | set(best(deviations, max(0, num_varying - len(always)), set(range(number)) - always))
        if seen is not None:
            seen.append(len(varying))
        chosen = best(means, budget, varying)
        return chosen + best(means, budget - len(chosen), set(range(number)) - varying)

    return decide


@each_library
@pytest.mark.parametrize(
    ("options", "num_varying"),
    [
        ({"num_varying": 0.5, "num_sinks": 1, "num_recent": 2}, 6),
        ({"num_varying": 7, "num_sinks": 0, "num_recent": 1}, 7),
        ({"num_varying": 0, "num_sinks": 0, "num_recent": 0}, 0),
        ({"num_varying": 1.0, "num_sinks": 2, "num_recent": 2}, 12),
        ({}, 14),
    ],
)
def test_every_decode_step_equals_a_simulation(backend, options, num_varying):
    counts = []
    rule = keep_varying(12, num_varying, options.get("num_sinks", 4), options.get("num_recent", 10), counts)
    expected = simulate(KEYS[0].tolist(), QUERIES[0].tolist(), 20, rule)

    steps = decode(RoCo(budget=12, block_size=7, **options), KEYS, QUERIES, 20, backend)

    assert [stored[0].tolist() for _, stored in steps] == expected
    # One eviction for the prompt, and one for each of 40 tokens, in each of two heads.
    assert len(counts) == 41 * 2


def test_the_options_keep_different_tokens():
    def last(**options):
        return decode(RoCo(budget=12, num_sinks=0, num_recent=2, **options), KEYS, QUERIES, 20, NUMPY)[-1][1].tolist()

    found = [last(num_varying=0), last(num_varying=0.5), last(num_varying=1.0)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def decode_as_the_public_code(budget):
    """The last 10 never leave; among the budget - int(0.3 budget) lowest deviations, the lowest mean goes."""

    def decide(head):
        number = len(head.position)
        if number <= budget:
            return None
        means, deviations = statistics(head)
        deviations[-10:] = [1e9] * 10
        feasible = sorted(range(number), key=lambda j: deviations[j])[: budget - int(0.3 * budget)]
        victim = min(feasible, key=lambda j: means[j])
        return [j for j in range(number) if j != victim]

    return decide


@pytest.mark.parametrize("budget", [30, 37])
def test_official_is_the_public_codes_decoding_mode(budget):
    expected = simulate(KEYS[0].tolist(), QUERIES[0].tolist(), 1, decode_as_the_public_code(budget))

    official = decode(RoCo.official(budget), KEYS, QUERIES, 1, NUMPY)
    default = decode(RoCo(budget=budget), KEYS, QUERIES, 1, NUMPY)

    assert [stored[0].tolist() for _, stored in official] == expected
    assert [stored[0].tolist() for _, stored in default] != expected


def test_where_official_and_default_differ():
    official, default = RoCo.official(40), RoCo(budget=40)

    assert (official.num_sinks, default.num_sinks) == (0, 4)
    # One more outside the feasible set, and the share is a float product rounded down.
    assert (official.protection(40).count, default.protection(40).count) == (13, 14)
    assert (RoCo.official(100).protection(100).count, RoCo(budget=100).protection(100).count) == (31, 30)


@each_library
def test_the_state_is_sums_squares_and_counts(backend):
    rows = np.asarray([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    two_heads = np.stack([rows, np.eye(3)])[None]

    decision = evict(
        RoCo(budget=3), make(backend, np.ones((1, 1, 3, 2))), attention=make(backend, two_heads), backend=backend
    )

    state = {name: backend.to_numpy(sums)[0, 0].tolist() for name, sums in decision.state.tokens.items()}
    # The mean of both query heads first: 1, .125 and .25 for token 0; .875 and .125 for 1; .625 for 2.
    assert state == {
        "attention": [1.375, 1.0, 0.625],
        "squares": [1 + 0.125**2 + 0.25**2, 0.875**2 + 0.125**2, 0.625**2],
        "queries": [3, 2, 1],
    }


@each_library
def test_a_prompt_in_chunks_has_the_sums_of_the_whole(backend):
    whole, _ = decode(RoCo(budget=60), KEYS, QUERIES, 60, backend)[-1]
    chunked, _ = decode(RoCo(budget=60), KEYS, QUERIES, 7, backend, chunk=6)[-1]

    for name, sums in whole.state.tokens.items():
        np.testing.assert_allclose(backend.to_numpy(chunked.state.tokens[name]), backend.to_numpy(sums), rtol=1e-12)


@each_library
def test_rounding_below_zero_is_no_deviation(backend):
    third = make(backend, [1 / 3, 0.5, 0.0])
    smaller = make(backend, [1 / 9 - 1e-6, 0.5, 0.0])

    found = backend.to_numpy(deviation(third, smaller, xp=backend.xp))

    assert found.tolist() == [0, 0.5, 0]


def test_equal_deviations_and_means_go_to_the_lower_position():
    decision = evict(
        RoCo(budget=4, num_varying=3, num_sinks=0, num_recent=1),
        np.ones((1, 1, 8, 2)),
        queries=np.zeros((1, 1, 8, 2)),
        state=Memory({name: np.zeros((1, 1, 7)) for name in ("attention", "squares", "queries")}),
    )

    # All that any token has is an eighth from the newest query.
    assert decision.protected[0, 0].tolist() == [True, True, False, False, False, False, False, True]
    assert decision.kept.tolist() == [[[0, 1, 2, 7]]]


def test_a_budget_below_the_protected_keeps_the_highest_means_of_them():
    rows = np.eye(6)[None, None].copy()
    rows[0, 0, 5] = [0, 0, 0, 0.4, 0.5, 0.1]

    decision = evict(RoCo(budget=2, num_sinks=0, num_recent=3), np.ones((1, 1, 6, 2)), attention=rows)

    # Means 1.4 / 3, 1.5 / 2 and 0.1.
    assert decision.kept.tolist() == [[[3, 4]]]


def test_roco_says_what_is_missing():
    with pytest.raises(ArgumentError, match="queries must hold all 60 new positions for RoCo; got none"):
        evict(RoCo(budget=9), KEYS)
    with pytest.raises(ArgumentError, match="queries must hold all 60 new positions for RoCo; got 5"):
        evict(RoCo(budget=9), KEYS, queries=QUERIES[:, :, :5])
    with pytest.raises(ArgumentError, match="state must hold"):
        evict(RoCo(budget=9), KEYS, state=Memory({"attention": KEYS[..., 0]}))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_varying": 1.5}, ArgumentError),
        ({"num_varying": "all"}, ArgumentTypeError),
        ({"num_sinks": -1}, ArgumentError),
        ({"num_recent": -1}, ArgumentError),
        ({"block_size": 0}, ArgumentError),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(error, match=next(iter(options))):
        RoCo(budget=9, **options)


def test_padding_takes_no_place_among_the_varying():
    # All deviations are 0, and padding comes first.
    decision = evict(
        RoCo(budget=4, num_varying=3, num_sinks=0, num_recent=1),
        np.ones((1, 1, 8, 2)),
        attention=np.zeros((1, 1, 8, 8)),
        valid=np.arange(8)[None] >= 3,
    )

    assert decision.protected[0, 0].tolist() == [False] * 3 + [True, True, False, False, True]
