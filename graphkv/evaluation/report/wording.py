"""The wording of a report: labels, numbers with their intervals, lists."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite

from ..statistics import METRICS, Interval

__all__ = [
    "LABELS",
    "MISSING",
    "MODES",
    "capital",
    "code",
    "direction",
    "gain_words",
    "length_words",
    "mean_words",
    "probability_words",
    "prompt_words",
    "range_words",
]

# Labels of axes.
LABELS = {
    "nll": "NLL per answer token (nats)",
    "kl": "KL from the full cache (nats)",
    "match": "share of right answers",
    "score": "score of the generated answers",
    "output_error": "error of the attention outputs",
    "attention_mass": "attention on kept tokens",
    "redundancy": "mean cosine of two kept keys",
    "tokens_kept": "tokens kept per KV head",
    "cache_bytes": "bytes of keys and values",
}
MODES = {
    "aware": "query-aware: the question is in the cache when it is evicted",
    "agnostic": "query-agnostic: the question comes after the eviction",
    "protected": "prompt protected: only what the model writes is evicted",
}
MISSING = "missing"


def mean_words(found: Interval | None) -> str:
    """Write a mean with its interval."""
    if found is None:
        return MISSING
    if not isfinite(found.low):
        return f"{found.mean:.3f} (1 prompt)"
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def gain_words(gain: Interval) -> str:
    """Write a gain, bold where its interval excludes zero, on whichever side."""
    text = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    if not isfinite(gain.low):
        return f"{gain.mean:+.3f} (1 prompt)"
    return f"**{text}**" if gain.excludes_zero() else text


def capital(text: str) -> str:
    """Capitalize the first letter only."""
    return text[:1].upper() + text[1:]


def length_words(length: int | None) -> str:
    """Write a prompt's length; rows of a data set have any."""
    return "any" if length is None else str(length)


def code(name: str) -> str:
    """Write a name in code type."""
    return f"`{name}`"


def direction(metric: str) -> str:
    """Write which direction of a metric is better."""
    return f"{'higher' if METRICS[metric] else 'lower'} is better"


def probability_words(value: float) -> str:
    """Write a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def prompt_words(counts: Collection[int]) -> str:
    """Write how many prompts there are, where not all means are over as many."""
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{least} prompt{'s' * (least != 1)}" if least == most else f"{least} to {most} prompts"


def range_words(values: Collection[float], digits: int) -> str:
    """Write the mean of some values, with their range where they differ."""
    mean, least, most = (f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"
