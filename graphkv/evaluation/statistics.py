"""Means, differences and intervals of records, paired by prompt.

Prompts are the units: all policies answer the same prompts, so differences are taken prompt by prompt, and a prompt
with several questions counts once, with their mean. Prompts cut from one text may overlap, which no interval knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..core.errors import ArgumentError
from ..naming.names import FULL, base_name
from .records import Record

__all__ = [
    "METRICS",
    "Cell",
    "Comparison",
    "Interval",
    "compare",
    "gain_of",
    "interval",
    "prompts_needed",
    "summarize",
    "table",
    "wilcoxon",
]

# What can be averaged, and whether more of it is better.
METRICS = {
    "nll": False,
    "kl": False,
    "match": True,
    "score": True,
    "output_error": False,
    "attention_mass": True,
    "redundancy": False,
    "tokens_kept": False,
    "cache_bytes": False,
}
RESAMPLES = 9999


class Cell(NamedTuple):
    """A place where policies are compared: everything but policy and prompt."""

    task: str
    mode: str
    length: int | None
    budget: int | None
    sinks: int | None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def excludes_zero(self) -> bool:
        """Return whether all of the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A policy against its baseline, prompt by prompt.

    Attributes
    ----------
    cell : Cell
    metric : str
    policy, baseline : str
    difference : Interval
        Policy less baseline.
    deviation : float
        Standard deviation of the differences, for `prompts_needed`.
    p_value : float
        Of Wilcoxon's signed-rank test, two-sided.
    verdict : str
        ``"better"`` or ``"worse"`` where the interval excludes zero, else ``"open"``.
    """

    cell: Cell
    metric: str
    policy: str
    baseline: str
    difference: Interval
    deviation: float
    p_value: float
    verdict: str


def table(records: Iterable[Record], metric: str, /) -> dict[Cell, dict[str, dict[str, float]]]:
    """Sort the values of a metric: per cell and policy, one number per prompt.

    The full cache has no budget; it is in every cell of its task, mode and length.

    Parameters
    ----------
    records : iterable of Record
    metric : str
        One of `METRICS`. Records without it are left out.

    Returns
    -------
    dict of Cell to dict of policy to dict of prompt to float
    """
    if metric not in METRICS:
        raise ArgumentError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    found: dict[Cell, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    full: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        value = getattr(record, metric)
        if value is None:
            continue
        cell = Cell(record.task, record.mode, record.length, record.budget, record.sinks)
        target = full[cell] if record.policy == FULL else found[cell][record.policy]
        target[record.prompt].append(float(value))
    result = {}
    for cell, policies in found.items():
        reference = full.get(cell._replace(budget=None, sinks=None))
        everybody = ({FULL: reference} if reference else {}) | policies
        result[cell] = {
            policy: {prompt: float(np.mean(values)) for prompt, values in prompts.items()}
            for policy, prompts in everybody.items()
        }
    return result


def summarize(records: Iterable[Record], metric: str, /) -> dict[Cell, dict[str, Interval]]:
    """Compute mean and interval of every policy in every cell."""
    return {
        cell: {policy: interval(list(values.values())) for policy, values in policies.items()}
        for cell, policies in table(records, metric).items()
    }


def compare(records: Iterable[Record], metric: str, pairs: Mapping[str, str] | None = None, /) -> list[Comparison]:
    """Compare policies with their baselines in every cell, on the prompts that both have answered.

    Parameters
    ----------
    records : iterable of Record
    metric : str
        One of `METRICS`.
    pairs : mapping of str to str, optional
        Policy to baseline. Default: every ``x+wrapper...`` to its ``x``.

    Returns
    -------
    list of Comparison
    """
    result = []
    for cell, policies in table(records, metric).items():
        chosen = pairs or {name: base_name(name) for name in policies if base_name(name) != name}
        for policy, baseline in chosen.items():
            if policy not in policies or baseline not in policies:
                continue
            common = [prompt for prompt in policies[policy] if prompt in policies[baseline]]
            if not common:
                continue
            differences = [policies[policy][prompt] - policies[baseline][prompt] for prompt in common]
            found = interval(differences)
            good = found.mean > 0 if METRICS[metric] else found.mean < 0
            result.append(
                Comparison(
                    cell=cell,
                    metric=metric,
                    policy=policy,
                    baseline=baseline,
                    difference=found,
                    deviation=float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0,
                    p_value=wilcoxon(differences),
                    verdict=("better" if good else "worse") if found.excludes_zero() else "open",
                )
            )
    return result


def gain_of(found: Comparison) -> Interval:
    """Return a difference turned such that positive is better."""
    difference = found.difference
    if METRICS[found.metric]:
        return difference
    return Interval(mean=-difference.mean, low=-difference.high, high=-difference.low, count=difference.count)


def interval(values: Sequence[float], /, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Compute the mean and its bias-corrected, accelerated bootstrap interval (Efron 1987).

    Parameters
    ----------
    values : sequence of float
        One per prompt. Of a single one the interval is infinite, of equal ones it has no width.
    level : float
    seed : int
        Of the resampling, so that equal values give equal intervals.
    """
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean=mean, low=-np.inf, high=np.inf, count=1)
    if np.ptp(array) == 0:
        return Interval(mean=mean, low=mean, high=mean, count=len(array))
    found = stats.bootstrap(
        (array,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(mean=mean, low=float(found.low), high=float(found.high), count=len(array))


def wilcoxon(differences: Sequence[float], /) -> float:
    """Compute the two-sided p-value of Wilcoxon's signed-rank test, zeros ranked as by Pratt; 1 if all are zero."""
    array = np.asarray(differences, dtype=float)
    return float(stats.wilcoxon(array, zero_method="pratt").pvalue) if array.any() else 1.0


def prompts_needed(deviation: float, effect: float, /, *, power: float = 0.8, level: float = 0.05) -> int:
    """Compute the number of prompts that a paired t-test needs to find a mean difference.

    Parameters
    ----------
    deviation : float
        Standard deviation of the differences.
    effect : float
        Mean difference to find, not 0.
    power : float
        Probability of finding it.
    level : float
        Probability of finding a difference where there is none, two-sided.

    Returns
    -------
    int
        At least 2.

    Examples
    --------
    Half a standard deviation:

    >>> prompts_needed(1.0, 0.5)
    34
    """
    if effect == 0:
        raise ArgumentError("effect must not be 0: no number of prompts shows a difference of nothing")
    if deviation == 0:
        return 2

    def reaches(count: int) -> bool:
        limit = stats.t.ppf(1 - level / 2, count - 1)
        shift = abs(effect) / deviation * sqrt(count)
        return bool(stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift) >= power)

    low, high = 1, 2
    while not reaches(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
