"""PyramidKV's two schedules."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, GraphKV, PyramidKV, SnapKV, evict
from graphkv.adapters.pyramidkv import layer_budgets
from tests.support.arrays import each_backend, make

VECTORS = json.loads((Path(__file__).parent / "pyramidkv_schedule.json").read_text())["cases"]


def past(layers, budget, window, tokens, **options):
    return [b - window for b in layer_budgets(layers, budget, tokens, least=window, schedule="code", **options)]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['layers']}-{case['budget']}-{case['tokens']}")
def test_the_code_schedule_is_that_of_the_public_code(case):
    found = past(case["layers"], case["budget"], case["window"], case["tokens"], beta=case["beta"])

    assert found == case["past_tokens_per_layer"]
    assert sum(found) == case["total"]


@pytest.mark.parametrize(
    ("sizes", "first", "last", "total"),
    [
        ((32, 512, 8, 4000), [983, 953, 923], [83, 53], 16576),
        ((32, 128, 8, 8000), [234, 227, 220], [24, 17], 4016),
        ((32, 128, 8, 245), [234, 227, 220], [24, 17], 4016),
        ((32, 512, 8, 1000), [504, 504, 504], [504, 504], 16128),
        ((32, 2048, 8, 3900), [2040, 2040, 2040], [2040, 2040], 65280),
        ((28, 1024, 32, 3000), [1935, 1866, 1797], [141, 72], 28098),
        ((28, 1024, 32, 2000), [1935, 1866, 1797], [141, 72], 28098),
        ((32, 128, 32, 8000), [188, 183, 178], [38, 33], 3536),
    ],
)
def test_the_code_schedule_in_known_places(sizes, first, last, total):
    found = past(*sizes)

    assert (found[:3], found[-2:], sum(found)) == (first, last, total)


def test_the_clip_of_the_code_schedule():
    # C = 40, C // beta = 2, first 78; 2 C <= n = 80 <= 2 C - 2 + 8, so first = 72 and last = 8.
    assert past(5, 48, 8, 80) == [72, 56, 40, 24, 8]
    assert past(5, 48, 8, 79) == [40] * 5
    assert past(5, 48, 8, 86)[0] == 78


@pytest.mark.parametrize("budget", range(20, 4097, 97))
def test_the_excess_of_the_code_schedule(budget):
    found = past(32, budget, 8, 10**6)
    average = budget - 8
    first, last = 2 * average - average // 20, average // 20

    assert sum(found) - 32 * average == 16 * ((first - last) % 31) <= 480
    # The exact one has none.
    assert sum(layer_budgets(32, budget, 10**6, least=8)) == 32 * budget


def test_the_code_schedule_is_defined_where_the_code_is_not():
    assert layer_budgets(1, 100, 4000, least=8, schedule="code") == [100]
    assert layer_budgets(3, 8, 4000, least=8, schedule="code") == [8, 8, 8]
    assert layer_budgets(3, 5, 4000, least=8, schedule="code") == [5, 5, 5]
    assert layer_budgets(3, 500, 400, least=8, schedule="code") == [500, 500, 500]


def test_the_exact_schedule_by_hand():
    # 16 to choose on average: 16 // 4 = 4 in the last layer, 28 in the first, 6 less in each.
    assert layer_budgets(5, 20, 1000, least=4, beta=4) == [32, 26, 20, 14, 8]
    # N = 26 leaves 22 in the first layer, so 10 in the last.
    assert layer_budgets(5, 20, 26, least=4, beta=4) == [26, 23, 20, 17, 14]
    # Steps of 24 / 3 = 8, and of 24 / 7.
    assert layer_budgets(4, 20, 1000, least=4, beta=4) == [32, 24, 16, 8]
    assert layer_budgets(8, 20, 1000, least=4, beta=4) == [32, 29, 25, 22, 18, 15, 11, 8]


def random_cases(count):
    rng = random.Random(5)
    for _ in range(count):
        budget = rng.choice([rng.randrange(0, 30), rng.randrange(0, 5000)])
        tokens = rng.choice([rng.randrange(0, 60), rng.randrange(0, 3 * budget + 2), rng.randrange(0, 200_000)])
        least = rng.choice([0, rng.randrange(0, 70), budget])
        yield rng.randrange(1, 100), budget, tokens, least, rng.choice([1, 2, 20, rng.randrange(1, 100)])


def test_the_exact_schedule_adds_up_in_ten_thousand_cases():
    pyramids = 0
    for layers, budget, tokens, least, beta in random_cases(10_000):
        found = layer_budgets(layers, budget, tokens, least=least, beta=beta)

        assert len(found) == layers
        assert sum(found) == layers * budget
        assert found == sorted(found, reverse=True)
        assert min(found) >= min(least, budget)
        assert max(found) <= max(tokens, budget)
        assert all(isinstance(b, int) for b in found)
        pyramids += found[0] > found[-1]
    assert pyramids > 2000


def test_the_exact_schedule_is_a_line():
    for layers, budget, tokens, least, beta in random_cases(2_000):
        found = layer_budgets(layers, budget, tokens, least=least, beta=beta)
        slope = (found[0] - found[-1]) / max(1, layers - 1)
        assert all(abs(b - (found[0] - layer * slope)) <= 0.5 + 1e-9 for layer, b in enumerate(found))
        if layers > 1 and least < budget < tokens:
            last = (budget - least) // beta
            assert found[-1] - least == max(last, 2 * (budget - least) - (tokens - least))


def test_shares_become_tokens_before_they_make_a_pyramid():
    policy = PyramidKV(budget=0.145, window=4, beta=3)

    found = [policy.layer_budget(100, layer, 3) for layer in range(3)]

    # 15 tokens, 11 to choose, 3 in the last layer.
    assert found == [23, 15, 7]


def test_sinks_are_covered_in_every_layer():
    policy = PyramidKV(budget=40, window=8, num_sinks=4, beta=100)

    assert [policy.layer_budget(1000, layer, 3) for layer in range(3)] == [68, 40, 12]
    # The public code knows no sinks: 32 past tokens in the average layer, none in the last.
    policy = PyramidKV(budget=40, window=8, num_sinks=4, beta=100, schedule="code")
    assert [policy.layer_budget(1000, layer, 3) for layer in range(3)] == [72, 40, 8]


@each_backend
@pytest.mark.parametrize("wrap", [lambda base: base, GraphKV])
@pytest.mark.parametrize("schedule", ["exact", "code"])
def test_a_layer_is_snapkv_with_the_layers_budget(backend, wrap, schedule):
    rng = np.random.default_rng(2)
    keys, queries = make(backend, rng.normal(size=(2, 2, 60, 4))), make(backend, rng.normal(size=(2, 4, 8, 4)))
    options = {"window": 4, "kernel_size": 3, "pooling": "max", "group_reduction": "sum", "num_sinks": 1}
    policy = PyramidKV(budget=20, beta=4, schedule=schedule, **options)
    budgets = []

    for layer in range(3):
        done = evict(wrap(policy), keys, queries=queries, layer=layer, num_layers=3, backend=backend)
        same = evict(wrap(SnapKV(budget=done.budget, **options)), keys, queries=queries, backend=backend)
        assert backend.to_numpy(done.kept).tolist() == backend.to_numpy(same.kept).tolist()
        budgets.append(done.budget)

    # 15 or, without sinks, 16 to choose: 3 or 4 in the last layer.
    assert budgets == {"exact": [32, 20, 8], "code": [32, 20, 8]}[schedule]


def test_official_and_default_differ_in_the_total():
    official, default = PyramidKV.official(512), PyramidKV(budget=512, window=8)

    assert isinstance(official, PyramidKV)
    assert sum(official.layer_budget(4000, layer, 32) for layer in range(32)) == 16576 + 32 * 8
    assert sum(default.layer_budget(4000, layer, 32) for layer in range(32)) == 32 * 512


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"beta": 0}, ArgumentError),
        ({"beta": 2.5}, ArgumentTypeError),
        ({"schedule": "linear"}, ArgumentError),
        ({"kernel_size": 4}, ArgumentError),
    ],
)
def test_options_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        PyramidKV(budget=10, **options)
    if "kernel_size" not in options:
        with pytest.raises(error, match=next(iter(options))):
            layer_budgets(2, 10, 100, **options)
