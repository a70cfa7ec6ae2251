"""The sections of a report, as Markdown with figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...core import checks
from ...core.errors import ArgumentError
from ...workbench.names import FULL
from ...workbench.text import listed
from .. import statistics
from ..records import Record
from ..statistics import METRICS
from . import plots
from .document import Document
from .results import RANDOM, RunResults, Section
from .wording import (
    LABELS,
    MISSING,
    MODES,
    capital,
    code,
    direction,
    gain_of,
    gain_words,
    length_words,
    mean_words,
    probability_words,
    range_words,
)

__all__ = ["make_report"]

DEPTHS = 10


def make_report(
    records: Sequence[Record], header: Mapping[str, Any], *, metrics: Sequence[str] = (), effect: float = 0.1
) -> tuple[str, dict[str, bytes]]:
    """Make the Markdown of a report, and the figures that it shows.

    Parameters
    ----------
    records : sequence of Record
    header : mapping
        The content of ``run.json``.
    metrics : sequence of str
    effect : float

    Returns
    -------
    markdown : str
    pictures : dict of str to bytes
        SVG, by their place relative to the Markdown.

    Raises
    ------
    ArgumentError
        If there are no records, or an option is wrong.
    """
    if not records:
        raise ArgumentError("the run must have at least one record; it has none yet")
    for metric in metrics:
        checks.choice("metric", metric, tuple(METRICS))
    if not effect > 0:
        raise ArgumentError(f"effect must be above 0; got {effect}")
    results = RunResults(records=records, header=header, metrics=tuple(metrics), effect=effect)
    document = Document()
    _write_front(document, results)
    for section in results.sections:
        _write_section(document, results, section)
    _write_method(document, results)
    return document.markdown(), document.pictures


def _write_front(document: Document, results: RunResults) -> None:
    config, model = results.config, results.header.get("model", {}).get("name", "unknown model")
    prompts = len({record.prompt for record in results.records})
    document.heading(1, f"Cache eviction on {model}")
    document.text(
        f"{len(results.records)} records of {prompts} prompts; {len(results.policies)} policies; budgets of "
        f"{listed(results.budgets)} tokens per KV head. All policies answer the same prompts, so differences are taken "
        "prompt by prompt. Intervals are 95 % bootstrap intervals over prompts. Bold marks gains and losses alike "
        "whose interval excludes zero."
    )
    document.text(_sizes_in_words(results.evicted))
    for reason, count in results.header.get("data", {}).get("skipped", {}).items():
        document.text(f"Rows that were skipped, because {reason}: {count}.")
    if config.get("prompts") and not config.get("data"):
        wanted = config["prompts"] * len(config["tasks"]) * len(config["lengths"])
        if prompts < wanted:
            document.text(f"> This run is not finished: {prompts} of {wanted} prompts have been answered.")
    document.heading(2, "Summary")
    document.text(
        "In how many cells (length and budget) the gain of a wrapped policy over its base, or its loss, is larger than "
        "chance explains. Of cells without any effect, about 5 % would show one; *adjusted* counts those with q < 0.05 "
        "(Benjamini-Hochberg over all comparisons of a split and metric)."
    )
    for split in dict.fromkeys(section.split for section in results.sections):
        names = ["policy", "mode", "task", "metric", "better", "open", "worse", "adjusted better", "adjusted worse"]
        rows = list(_summary(results, split))
        if rows:
            document.text(f"{capital(split)} split:" if split else "All rows:")
            document.table(names, rows, words=4)
    if not any(section.pairs for section in results.sections):
        document.text("The run has no policy with wrappers and its base.")


def _sizes_in_words(records: Sequence[Record]) -> str:
    """Write what the records tell of the sizes of their caches."""
    measured = [record for record in records if record.tokens_kept is not None]
    off = list(dict.fromkeys(code(record.policy) for record in measured if record.is_off_budget))
    text = "A budget is what was asked for."
    if len(measured) < len(records):
        count = f"{len(records) - len(measured)} of {len(records)}" if measured else f"All {len(records)}"
        text += f" {count} records of evicted caches were made without measuring the caches."
    if off:
        return (
            f"{text} Caches of {listed(off)} kept another number of tokens, see *Measured sizes*: their differences "
            "from other policies are not differences at equal size."
        )
    return f"{text} All caches that were measured kept that number of tokens." if measured else text


def _summary(results: RunResults, split: str | None) -> Iterable[list[str]]:
    """Count verdicts per section, metric and policy."""
    for section in (section for section in results.sections if section.split == split):
        for metric, comparisons in section.comparisons.items():
            for policy in section.pairs:
                found = [comparison for (_, _, name), comparison in comparisons.items() if name == policy]
                if not found:
                    continue
                verdicts = [comparison.verdict for comparison in found]
                sure = [
                    gain_of(comparison).mean > 0
                    for comparison in found
                    if results.adjusted[section.key(comparison)] < 0.05
                ]
                counts = [
                    *(verdicts.count(word) for word in ("better", "open", "worse")),
                    sum(sure),
                    len(sure) - sum(sure),
                ]
                task = (
                    section.task
                    if len({other.sinks for other in results.sections}) == 1
                    else f"{section.task}, {section.sinks} sinks"
                )
                yield [code(policy), section.mode, task, metric, *map(str, counts)]


def _write_section(document: Document, results: RunResults, section: Section) -> None:
    first = next(other for other in results.sections if (other.split, other.mode) == (section.split, section.mode))
    if section is first:
        split = f"{section.split} split, " if section.split else ""
        document.heading(2, (split + f"query-{section.mode}").capitalize())
        document.text(f"{capital(MODES[section.mode])}.")
    document.heading(3, f"{section.task}, {section.sinks} sinks, query-{section.mode}")
    _write_quality(document, results, section)
    _write_sizes(document, results, section)
    _write_gains(document, results, section)
    _write_needles(document, results, section)
    _write_diversity(document, results, section)


def _where(section: Section, length: int | None) -> str:
    return f"{section.task}, query-{section.mode}, prompts of {length_words(length)} tokens"


def _write_quality(document: Document, results: RunResults, section: Section) -> None:
    document.heading(4, "Quality against budget")
    for metric in section.metrics:
        document.figures(
            (
                f"{capital(LABELS[metric])} against budget: {_where(section, length)}. "
                "Grey: full cache and random eviction.",
                _quality_figure(results, section, metric, length),
            )
            for length in section.lengths
            if any(section.expects(length, budget) for budget in section.budgets)
        )
    for metric in section.metrics:
        document.text(f"{capital(LABELS[metric])}, {direction(metric)}. Mean and interval over prompts.")
        names = ["policy", "prompt", "prompts", *(f"budget {budget}" for budget in section.budgets)]
        document.table(names, _quality_rows(results, section, metric))


def _quality_figure(results: RunResults, section: Section, metric: str, length: int | None) -> Callable[[], bytes]:
    panels = {
        base: [results.curve(section, metric, length, name, variant) for variant, name in results.members(base).items()]
        for base in results.bases
    }
    references = [] if RANDOM in results.bases else results.references(section, metric, length)
    return lambda: plots.draw_quality(
        panels, references, results.variants, label=f"{LABELS[metric]}\n{direction(metric)}"
    )


def _quality_rows(results: RunResults, section: Section, metric: str) -> Iterable[list[str]]:
    for length in section.lengths:
        for policy in results.policies:
            cells = [section.means[metric].get((length, budget), {}).get(policy) for budget in section.budgets]
            counts = sorted({found.count for found in cells if found is not None})
            count = MISSING if not counts else f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
            shown = [
                mean_words(found) if section.expects(length, budget) else "\N{EN DASH}"
                for budget, found in zip(section.budgets, cells, strict=True)
            ]
            yield [code(policy), length_words(length), count, *shown]


def _write_sizes(document: Document, results: RunResults, section: Section) -> None:
    if not section.unequal_sizes:
        return
    document.heading(4, "Measured sizes")
    document.text(
        "Budgets at which not all caches have the same size. Tokens per KV head in the average layer, and keys and "
        "values in MB, slots that shorter heads leave unused included: mean over prompts, and range where they differ."
    )
    names = ["policy", "prompt", "budget", "tokens kept", "MB", "of the full cache"]
    document.table(names, _size_rows(results, section))


def _size_rows(results: RunResults, section: Section) -> Iterable[list[str]]:
    for (length, budget), found in section.unequal_sizes.items():
        for policy in (name for name in results.policies if name in found):
            tokens, sizes = found[policy]
            share = "" if FULL not in found else f"{np.mean(sizes) / np.mean(found[FULL][1]):.1%}"
            megabytes = range_words([size / 1e6 for size in sizes], 3)
            yield [code(policy), length_words(length), str(budget), range_words(tokens, 1), megabytes, share]


def _write_gains(document: Document, results: RunResults, section: Section) -> None:
    if not section.pairs:
        return
    document.heading(4, "Gain over the base")
    for metric in section.metrics:
        document.figures(
            (
                f"Gain in {LABELS[metric]} over the base, paired by prompt: {_where(section, length)}. Filled: the "
                "interval excludes zero.",
                _gain_figure(results, section, metric, length),
            )
            for length in section.lengths
            if any(section.expects(length, budget) for budget in section.budgets)
        )
    for metric in section.metrics:
        document.text(
            f"Gain in {LABELS[metric]}, positive is better. p: Wilcoxon's signed-rank test; q: p adjusted. Last "
            f"column: prompts that find a difference of {results.effect:g} with a power of 80 %."
        )
        names = ["policy", "prompt", "budget", "gain", "verdict", "p", "q", "prompts", f"for {results.effect:g}"]
        document.table(names, _gain_rows(results, section, metric))


def _cells(section: Section, length: int | None) -> Iterable[tuple[str, int]]:
    """Return policy and budget of all comparisons that there should be."""
    return (
        (policy, budget) for policy in section.pairs for budget in section.budgets if section.expects(length, budget)
    )


def _gain_figure(results: RunResults, section: Section, metric: str, length: int | None) -> Callable[[], bytes]:
    gains = []
    for policy, budget in _cells(section, length):
        found = section.comparisons[metric].get((length, budget, policy))
        family = results.families[policy]
        gains.append(plots.Gain(family.base, family.variant, budget, None if found is None else gain_of(found)))
    return lambda: plots.draw_gains(gains, results.variants, label=f"gain in {LABELS[metric]}")


def _gain_rows(results: RunResults, section: Section, metric: str) -> Iterable[list[str]]:
    for length in section.lengths:
        for policy, budget in _cells(section, length):
            start = [code(policy), length_words(length), str(budget)]
            found = section.comparisons[metric].get((length, budget, policy))
            if found is None:
                yield [*start, MISSING, *("" for _ in range(5))]
                continue
            q = results.adjusted[section.key(found)]
            alone = found.difference.count < 2
            needed = "" if alone else str(statistics.prompts_needed(found.deviation, results.effect))
            yield [
                *start, gain_words(gain_of(found)), found.verdict, probability_words(found.p_value),
                probability_words(q), str(found.difference.count), needed,
            ]  # fmt: skip


def _write_needles(document: Document, results: RunResults, section: Section) -> None:
    records = [record for record in section.records if record.depth is not None and record.length is not None]
    metric = next((name for name in section.metrics if name in ("score", "match")), None)
    if not records or metric is None:
        return
    document.heading(4, "Needles by length and depth")
    document.text(
        "Each field is the mean over the prompts of one length with the needle at one tenth of the depth; hatched "
        "fields have no prompt. The rightmost map is that of the full cache."
    )
    lengths = [length for length in section.lengths if length is not None]
    document.figures(
        (
            f"{capital(LABELS[metric])} by prompt length and depth, per budget: {section.task}, query-{section.mode}, "
            f"{base} and its variants.",
            _needle_figure(results, section, records, metric, base, lengths),
        )
        for base in results.bases
    )


def _needle_figure(
    results: RunResults, section: Section, records: Sequence[Record], metric: str, base: str, lengths: Sequence[int]
) -> Callable[[], bytes]:
    full = _heat_map([record for record in records if record.policy == FULL], metric, lengths)
    maps = {}
    for name in results.members(base).values():
        mine = [record for record in records if record.policy == name]
        by_budget = {
            str(budget): _heat_map([record for record in mine if record.budget == budget], metric, lengths)
            for budget in section.budgets
        }
        maps[name] = {**by_budget, FULL: full}
    return lambda: plots.draw_heat_maps(maps, [str(length) for length in lengths], label=LABELS[metric])


def _heat_map(records: Iterable[Record], metric: str, lengths: Sequence[int]) -> Any:
    """Average over the prompts of each depth and length, shape (depths, lengths)."""
    sums, counts = np.zeros((DEPTHS, len(lengths))), np.zeros((DEPTHS, len(lengths)))
    for record in records:
        value = getattr(record, metric)
        if value is None or record.depth is None or record.length is None:
            continue
        place = min(DEPTHS - 1, int(record.depth * DEPTHS)), lengths.index(record.length)
        sums[place] += float(value)
        counts[place] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _write_diversity(document: Document, results: RunResults, section: Section) -> None:
    if all(record.redundancy is None for record in section.records):
        return
    document.heading(4, "Diversity against quality")
    metric = section.metrics[0]
    document.figures(
        (
            f"{capital(LABELS[metric])} against the mean cosine of two kept keys, averaged over layers and heads: "
            f"{_where(section, length)}. Grey lines lead from a base to its variants; the vertical one is the full "
            "cache.",
            _diversity_figure(results, section, metric, length),
        )
        for length in section.lengths
        if any(section.means["redundancy"].get((length, budget)) for budget in section.budgets)
    )


def _diversity_figure(results: RunResults, section: Section, metric: str, length: int | None) -> Callable[[], bytes]:
    places: dict[str, list[plots.Place]] = {}
    full = None
    for budget in section.budgets:
        quality, alike = (section.means[name].get((length, budget), {}) for name in (metric, "redundancy"))
        full = alike[FULL].mean if FULL in alike else full
        found = [
            plots.Place(base, variant, alike[name].mean, quality[name])
            for base in dict.fromkeys(family.base for family in results.families.values() if family.base != FULL)
            for variant, name in results.members(base).items()
            if name in alike and name in quality
        ]
        if found:
            places[f"budget {budget}"] = found
    label = f"{LABELS[metric]}\n{direction(metric)}"
    return lambda: plots.draw_diversity(places, results.variants, full=full, label=label)


def _write_method(document: Document, results: RunResults) -> None:
    document.heading(2, "How the numbers were made")
    document.text(
        "The unit is the prompt; several questions of one kind to a prompt count once, with their mean. Intervals are "
        "bias-corrected and accelerated bootstrap intervals (Efron 1987) with "
        f"{statistics.RESAMPLES} resamples; gains are paired by prompt. p-values are those of Wilcoxon's signed-rank "
        "test, two-sided, zeros ranked by Pratt's rule; q-values adjust them within a split and metric. The number of "
        "prompts needed is that of a paired t-test at 5 %, two-sided, from the spread that was measured. Prompts are "
        "cut from one text and may overlap, which no interval knows. Cells of different budgets and lengths share "
        "prompts and are not independent evidence."
    )
    config = {name: value for name, value in results.config.items() if value is not None}
    if config:
        document.table(["setting", "value"], [[name, code(json.dumps(value))] for name, value in config.items()])
    identity = {
        "model": results.header.get("model", {}).get("sha256"),
        "text": results.header.get("text", {}).get("sha256"),
        "data": results.header.get("data", {}).get("sha256"),
    }
    rows = [[f"SHA-256 of the {name}", code(value)] for name, value in identity.items() if value]
    for session in results.header.get("sessions", ()):
        versions = ", ".join(f"{name} {number}" for name, number in session.get("versions", {}).items())
        machine = ", ".join(f"{name} {value}" for name, value in session.get("machine", {}).items() if value)
        rows.append([f"session of {session.get('started')}", f"commit {session.get('commit')}; {versions}; {machine}"])
    if rows:
        document.table(["made with", ""], rows)
