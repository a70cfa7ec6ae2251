"""Intervals, tests and sample sizes against known cases."""

import numpy as np
import pytest
from scipy import stats

from graphkv import ArgumentError
from graphkv.evaluation import statistics
from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Cell, compare, interval, prompts_needed, summarize, table, wilcoxon


def record(prompt, policy, nll, *, budget=8, question=0, **changes):
    is_full = policy == "full"
    values = {
        "prompt": prompt, "task": "needle", "kind": None, "question": question, "length": 64, "num_tokens": 64,
        "depth": None, "split": "held-out", "seed": 1, "mode": "aware", "policy": policy,
        "budget": None if is_full else budget, "sinks": None if is_full else 4, "answer_tokens": 3, "nll": nll,
        "kl": 0.0, "match": True, "metric": "exact",
    }  # fmt: skip
    return Record(**values | changes)


CELL = Cell("needle", "aware", 64, 8, 4)


def test_an_interval_covers_the_mean_it_estimates_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = sum(found.low <= 1 <= found.high for found in (interval(rng.exponential(size=40)) for _ in range(100)))

    # A bootstrap over 40 skewed values falls a little short of 95 %.
    assert 86 <= covered <= 99


def test_an_interval_of_many_normal_values_is_the_textbook_one():
    values = np.random.default_rng(1).normal(size=2000)
    found = interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)

    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert found == interval(values)


def test_intervals_without_spread():
    assert interval([2.0, 2.0, 2.0]) == statistics.Interval(mean=2.0, low=2.0, high=2.0, count=3)
    alone = interval([2.0])
    assert (alone.mean, alone.low, alone.high) == (2.0, -np.inf, np.inf)
    assert not alone.excludes_zero()


def test_wilcoxon_is_that_of_scipy_and_survives_no_differences():
    differences = [0.3, -0.1, 0.5, 0.7, 0.2, 0.9, 0.4, 0.6]

    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)
    # Exact: of 256 signings, 2 sums of negative ranks are below 1 or equal to it, on both sides.
    assert wilcoxon(differences) == pytest.approx(4 / 256)
    assert wilcoxon([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    # Paired t-test, two-sided 5 %, power 80 %: the values of published tables (Cohen 1988).
    ("effect", "needed"),
    [(0.2, 199), (0.5, 34), (0.8, 15)],
)
def test_prompts_needed_are_those_of_published_tables(effect, needed):
    assert prompts_needed(1.0, effect) == needed
    assert prompts_needed(3.0, -3 * effect) == needed


def test_that_many_prompts_do_find_the_effect():
    rng = np.random.default_rng(2)
    found = sum(stats.ttest_1samp(rng.normal(0.5, 1, size=34), 0).pvalue < 0.05 for _ in range(2000))

    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_prompts_needed_for_nothing():
    assert prompts_needed(0.0, 1.0) == 2
    with pytest.raises(ArgumentError, match="effect must not be 0"):
        prompts_needed(1.0, 0.0)


def test_policies_are_compared_prompt_by_prompt():
    # Prompts differ by far more than policies do.
    level = {"a": 1.0, "b": 5.0, "c": 9.0, "d": 30.0, "e": 2.0, "f": 8.0}
    records = [record(prompt, "snapkv", value) for prompt, value in level.items()]
    gains = [0.11, 0.08, 0.1, 0.12, 0.09, 0.1]
    records += [
        record(prompt, "snapkv+graphkv", value - gain)
        for (prompt, value), gain in zip(level.items(), gains, strict=True)
    ]
    # Answered by one of them only: left out.
    records.append(record("g", "snapkv", 100.0))

    (found,) = compare(records, "nll")

    assert (found.cell, found.policy, found.baseline) == (CELL, "snapkv+graphkv", "snapkv")
    assert found.difference.count == 6
    assert found.difference.mean == pytest.approx(-0.1)
    assert -0.12 < found.difference.low < found.difference.high < -0.08
    assert found.verdict == "better"
    assert found.p_value == pytest.approx(2 / 64)
    assert found.deviation == pytest.approx(np.std(gains, ddof=1))


def test_more_is_better_for_scores():
    records = [record(str(n), "a", 0.0, match=n % 4 == 0) for n in range(12)]
    records += [record(str(n), "a+graphkv", 0.0, match=True) for n in range(12)]

    (found,) = compare(records, "match")
    assert found.verdict == "better"
    assert compare(records, "nll")[0].verdict == "open"


def test_questions_of_one_prompt_count_once():
    records = [record("a", "x", 1.0), record("a", "x", 3.0, question=1), record("b", "x", 8.0)]

    assert table(records, "nll") == {CELL: {"x": {"a": 2.0, "b": 8.0}}}
    assert summarize(records, "nll")[CELL]["x"].mean == 5.0
    assert summarize(records, "nll")[CELL]["x"].count == 2


def test_the_full_cache_stands_in_every_cell():
    records = [record("a", "full", 1.0), record("a", "x", 2.0), record("a", "x", 3.0, budget=16)]

    found = table(records, "nll")
    assert [list(policies) for policies in found.values()] == [["full", "x"], ["full", "x"]]
    assert {cell.budget for cell in found} == {8, 16}
    assert [c.difference.mean for c in compare(records, "nll", {"x": "full"})] == [1.0, 2.0]


def test_metrics_that_were_not_measured_are_left_out():
    assert table([record("a", "x", 1.0)], "score") == {}
    with pytest.raises(ArgumentError, match="metric must be one of nll"):
        table([], "speed")
