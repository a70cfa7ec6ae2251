"""Budgets: shares against all claims in a row, the cascade, and what the public code of CAKE does."""

import random
from fractions import Fraction
from itertools import pairwise

import pytest

from graphkv import ArgumentError, ArgumentTypeError
from graphkv.core.budgets import adjust, allocate, cascade


def by_all_claims(preferences, total, most, least):
    """Line up every single token's claim and serve from the front."""
    claims = sorted(
        (-Fraction(share) / (2 * token - 1), token, layer)
        for layer, share in enumerate(preferences)
        for token in range(least + 1, most + 1)
    )
    result = [least] * len(preferences)
    for _, _, layer in claims[: max(0, total - least * len(preferences))]:
        result[layer] += 1
    return result


def random_preferences(rng, layers):
    kind = rng.randrange(4)
    if kind == 0:
        return [rng.choice([0.0, 0.0, 1.0, 2.0]) for _ in range(layers)]
    if kind == 1:
        return [float(rng.randrange(5)) for _ in range(layers)]
    return [rng.lognormvariate(0, rng.choice([0.2, 1.0, 2.0, 8.0])) for _ in range(layers)]


def test_shares_are_those_of_the_highest_claims():
    rng = random.Random(3)
    for _ in range(600):
        layers, least = rng.randrange(1, 8), rng.choice([0, 0, 3])
        most = least + rng.randrange(0, 20)
        total = rng.randrange(0, layers * most + 5)
        preferences = random_preferences(rng, layers)

        assert allocate(preferences, total, most, least) == by_all_claims(preferences, total, most, least)


def test_shares_add_up_in_ten_thousand_cases():
    rng = random.Random(4)
    for _ in range(10_000):
        layers, least = rng.randrange(1, 9), rng.choice([0, 0, 30])
        most = least + rng.randrange(0, 3000)
        total = rng.randrange(0, layers * most + 100)
        found = allocate(random_preferences(rng, layers), total, most, least)

        assert sum(found) == min(max(total, layers * least), layers * most)
        assert min(found) >= least
        assert max(found) <= most


def test_a_cascade_is_exact_at_every_step_never_grows_and_ends_at_the_static_shares():
    rng = random.Random(5)
    for _ in range(150):
        layers, most = rng.randrange(1, 12), rng.randrange(1, 400)
        total = rng.randrange(1, layers * most + 50)
        preferences = random_preferences(rng, layers)
        steps = cascade(preferences, total, most, 0)

        for number, shares in enumerate(steps):
            assert sum(shares) == min(total, (number + 1) * most)
        for before, after in pairwise(steps):
            assert all(b <= a for a, b in zip(before, after, strict=False))
        assert steps[-1] == allocate(preferences, total, most, 0)


def test_extreme_preferences_are_shared_out_too():
    assert allocate([1e300, 1e-300, 5e-324, 0.0], 10, 4) == [4, 4, 2, 0]
    assert allocate([0.0, 0.0, 0.0], 8, 10) == [3, 3, 2]
    assert allocate([0.0, 5.0], 12, 10) == [2, 10]
    assert allocate([1.0, 1.0], 5, 10) == [3, 2]
    assert allocate([1.0], 0, 10) == [0]
    assert allocate([], 5, 10) == []


def test_adjust_is_that_of_the_public_code_and_drifts():
    assert adjust([5.9, 3.2, 1.1, 20.0], 30, 12) == [9, 6, 3, 12]
    # Too many: evenly from the layers above 1.
    assert adjust([1.9, 2.5, 5.0, 5.0], 9, 12) == [1, 0, 4, 4]
    # 2 layers, 40 tokens in all, 12 in each at most: the lack of 16 is added above the limit, and clipped later.
    assert sum(min(share, 12) for share in adjust([39.0, 1.0], 40, 12)) == 24
    # What is clipped goes evenly to the other layers, whatever they prefer; proportional shares do not.
    assert adjust([30.0, 9.0, 1.0], 40, 18) == [18, 15, 7]
    assert allocate([30.0, 9.0, 1.0], 40, 18) == [18, 18, 4]


def test_the_cascade_of_the_public_code_asks_evicted_tokens_back():
    preferences, held, wanted = [16.0, 1.0, 16.0, 1.0], [20] * 4, []
    for layers in range(1, 5):
        parts = [share / sum(preferences[:layers]) * 36 for share in preferences[:layers]]
        wanted.append([min(20, share) for share in adjust(parts, 36, 20)])
        held[:layers] = [min(pair) for pair in zip(held, wanted[-1], strict=False)]

    # Layer 1 is cut to 1 token when the third layer joins, and may have 2 with the fourth.
    assert wanted == [[20], [20, 16], [18, 1, 17], [17, 2, 16, 1]]
    assert (held, sum(held)) == ([17, 1, 16, 1], 35)
    assert cascade(preferences, 36, 20) == [[20], [20, 16], [18, 1, 17], [17, 1, 17, 1]]


def test_allocations_are_checked():
    with pytest.raises(ArgumentError, match=r"preferences\[1\] must be finite"):
        allocate([1.0, float("nan")], 3, 5)
    with pytest.raises(ArgumentError, match="least must be at most most=2"):
        allocate([1.0], 3, 2, 3)
    with pytest.raises(ArgumentTypeError, match="total"):
        allocate([1.0], 3.5, 5)
