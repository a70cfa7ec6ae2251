"""The sections of a report, as Markdown with figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...core import checks
from ...core.errors import ArgumentError
from ...naming.names import FULL
from .. import statistics
from ..records import Record
from ..statistics import METRICS, gain_of
from . import plots
from .document import Document
from .frame import write_front, write_method, write_summary
from .results import RANDOM, RunResults, Section
from .wording import (
    LABELS,
    MISSING,
    MODES,
    capital,
    code,
    direction,
    gain_words,
    length_words,
    mean_words,
    probability_words,
    prompt_words,
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
    write_front(document, results)
    _write_answer(document, results)
    write_summary(document, results)
    for section in results.sections:
        _write_section(document, results, section)
    write_method(document, results)
    return document.markdown(), document.pictures


def _write_answer(document: Document, results: RunResults) -> None:
    """Begin with the one figure that answers what the report is for: all policies, in all modes of the first task."""
    first = max(results.sections, key=lambda one: len(_modes_of(results, one)), default=None)
    if first is None:
        return
    modes = _modes_of(results, first)
    # Where most budgets leave something to evict; of equals, the longest prompts.
    length = max(first.lengths, key=lambda one: (sum(first.expects(one, each) for each in first.budgets), one or 0))
    metric = first.metrics[0]
    sides = " left, ".join(f"query-{section.mode}" for section in modes) + (" right" if len(modes) > 1 else "")
    document.figures(
        [
            (
                f"{capital(LABELS[metric])} against budget: {first.task}, {sides}, prompts of {length_words(length)} "
                "tokens",
                f"{_means(first, metric, length)}, with their intervals. Grey: full cache and random eviction. All "
                "other tasks and lengths are below.",
                _answer_figure(results, modes, metric, length),
            )
        ]
    )


def _modes_of(results: RunResults, section: Section) -> list[Section]:
    """Return the sections that differ from one in the mode only, itself among them."""
    same = (section.split, section.task, section.sinks)
    return [other for other in results.sections if (other.split, other.task, other.sinks) == same]


def _answer_figure(
    results: RunResults, modes: Sequence[Section], metric: str, length: int | None
) -> Callable[[], bytes]:
    panels, references = {}, {}
    for base in results.bases:
        for section in modes:
            name = f"{base}, {section.mode}"
            members = results.members(base).items()
            panels[name] = [results.curve(section, metric, length, policy, variant) for variant, policy in members]
            references[name] = [] if RANDOM in results.bases else results.references(section, metric, length)
    label = f"{LABELS[metric]}\n{direction(metric)}"
    return lambda: plots.draw_quality(panels, references, results.variants, label=label)


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


def _means(section: Section, metric: str, length: int | None) -> str:
    """Write which direction is better, and over how many prompts the means of a figure are."""
    return f"{capital(direction(metric))}; means over {prompt_words(section.counts(metric, length))}"


def _write_quality(document: Document, results: RunResults, section: Section) -> None:
    document.heading(4, "Quality against budget")
    for metric in section.metrics:
        document.figures(
            (
                f"{capital(LABELS[metric])} against budget: {_where(section, length)}",
                f"{_means(section, metric, length)}, with their intervals. Grey: full cache and random eviction.",
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
    label = f"{LABELS[metric]}\n{direction(metric)}"
    return lambda: plots.draw_quality(panels, dict.fromkeys(panels, references), results.variants, label=label)


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
    if section.finds_budgets:
        _write_found(document, results, section)


def _write_found(document: Document, results: RunResults, section: Section) -> None:
    """Compare policies that find their budgets by what they kept."""
    document.heading(4, "Quality against tokens kept")
    document.text(
        "Where a policy finds its budgets itself, or keeps less than its budget for another reason, qualities at one "
        "budget are not at one size. Here every policy stands where its cache was measured."
    )
    for metric in section.metrics:
        document.figures(
            (
                f"{capital(LABELS[metric])} against tokens kept per KV head: {_where(section, length)}",
                f"{_means(section, metric, length)}, with their intervals. Grey: full cache and random eviction.",
                _sized_figure(results, section, metric, length),
            )
            for length in section.lengths
            if any((length, budget) in section.tokens for budget in section.budgets)
        )
    names = ["policy", "prompt", "kept", "budget", *(capital(LABELS[metric]) for metric in section.metrics)]
    document.table(names, _found_rows(results, section))


def _sized_figure(results: RunResults, section: Section, metric: str, length: int | None) -> Callable[[], bytes]:
    panels = {
        base: [
            results.sized_curve(section, metric, length, name, variant)
            for variant, name in results.members(base).items()
        ]
        for base in results.bases
    }
    references = [
        results.sized_curve(section, metric, length, curve.label, curve.label)
        for curve in ([] if RANDOM in results.bases else results.references(section, metric, length))
    ]
    return lambda: plots.draw_sizes(
        panels, references, results.variants, label=f"{LABELS[metric]}\n{direction(metric)}"
    )


def _found_rows(results: RunResults, section: Section) -> Iterable[list[str]]:
    """List all policies of a length, the smallest cache first."""
    for length in section.lengths:
        found = [
            (kept, str(budget), policy, [section.means[metric][length, budget][policy] for metric in section.metrics])
            for (its_length, budget), cell in section.tokens.items()
            for policy, kept in cell.items()
            if its_length == length
            and policy != FULL
            and all(policy in section.means[metric].get((length, budget), {}) for metric in section.metrics)
        ]
        for kept, budget, policy, qualities in sorted(found, key=lambda row: (row[0], results.policies.index(row[2]))):
            yield [code(policy), length_words(length), f"{kept:.1f}", budget, *map(mean_words, qualities)]


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
                f"Gain in {LABELS[metric]} over the base: {_where(section, length)}",
                f"Right of zero is better; {prompt_words(section.counts(metric, length))}, paired. Filled: the "
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
    prompts = prompt_words({count for length in lengths for count in section.counts(metric, length)})
    document.figures(
        (
            f"{capital(LABELS[metric])} by prompt length and depth, per budget: {section.task}, query-{section.mode}, "
            f"{base} and its variants",
            f"{capital(direction(metric))}, and brighter; {prompts} per length. Hatched: no prompt.",
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
            f"{_where(section, length)}",
            f"{_means(section, metric, length)}; further left is more diverse. Grey lines lead from a base to its "
            "variants; the vertical one is the full cache.",
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
