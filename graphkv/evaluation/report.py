"""The command ``graphkv report``: what a run found, as Markdown and as a page that can be sent to somebody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ..core import checks
from ..core.errors import ArgumentError
from . import plots, statistics
from .page import make_page
from .presets import Preset
from .records import Record, read_header, read_records
from .statistics import FULL, METRICS, Comparison, Interval

__all__ = ["main", "make_report"]

# What stands on the axes.
LABELS = {
    "nll": "NLL per answer token (nats)",
    "kl": "KL from the full cache (nats)",
    "match": "share of right answers",
    "score": "score of the generated answers",
    "output_error": "error of the attention outputs",
    "attention_mass": "attention on kept tokens",
    "redundancy": "mean cosine of two kept keys",
}
MODES = {
    "aware": "query-aware: the question is in the cache when it is evicted",
    "agnostic": "query-agnostic: the question comes after the eviction",
}
ALONE = "no graph"
RANDOM = "random"
MISSING = "missing"
DEPTHS = 10


def main(folder: Path, *, output: Path | None, metrics: Sequence[str] = (), effect: float = 0.1) -> None:
    """Write the report of a run.

    Parameters
    ----------
    folder : pathlib.Path
        Of the run, finished or not.
    output : pathlib.Path or None
        Folder for ``report.md``, ``report.html`` and ``figures``. None: ``report`` in `folder`.
    metrics : sequence of str
        What to report, see `METRICS`. Default: NLL, and scores or right answers.
    effect : float
        Difference for which the number of prompts needed is given.
    """
    markdown, pictures = make_report(read_records(folder), read_header(folder), metrics=metrics, effect=effect)
    output = output or folder / "report"
    try:
        (output / "figures").mkdir(parents=True, exist_ok=True)
        for path, picture in pictures.items():
            (output / path).write_bytes(picture)
        (output / "report.md").write_text(markdown, encoding="utf-8")
        (output / "report.html").write_text(make_page(markdown, pictures), encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"--output {output} cannot be written: {error.strerror or error}") from error
    print(f"Markdown: {output / 'report.md'}\nPage:     {output / 'report.html'}")


def make_report(
    records: Sequence[Record], header: Mapping[str, Any], *, metrics: Sequence[str] = (), effect: float = 0.1
) -> tuple[str, dict[str, bytes]]:
    """Give the Markdown of a report, and the figures that it shows.

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
    study = Study(records=records, header=header, metrics=tuple(metrics), effect=effect)
    document = Document()
    _write_front(document, study)
    for part in study.parts:
        _write_part(document, study, part)
    _write_method(document, study)
    return document.markdown(), document.pictures


class Family(NamedTuple):
    """Where a policy belongs: to its base, as one of its variants."""

    base: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """What may be compared: one split, mode, task and number of sinks."""

    split: str | None
    mode: str
    task: str
    sinks: int | None
    records: Sequence[Record]
    metrics: tuple[str, ...]
    budgets: tuple[int, ...]
    pairs: Mapping[str, str]

    @cached_property
    def lengths(self) -> list[int | None]:
        """All lengths of prompts."""
        return sorted({record.length for record in self.records}, key=lambda length: length or 0)

    def expects(self, length: int | None, budget: int) -> bool:
        """Whether a budget leaves something to evict."""
        return length is None or budget < length

    @cached_property
    def means(self) -> dict[str, dict[tuple[int | None, int], dict[str, Interval]]]:
        """Per metric, length and budget: mean and interval of every policy."""
        return {
            metric: {
                (cell.length, cell.budget): found
                for cell, found in statistics.summarise(self.records, metric).items()
                if cell.budget is not None
            }
            for metric in (*self.metrics, "redundancy")
        }

    @cached_property
    def comparisons(self) -> dict[str, dict[tuple[int | None, int | None, str], Comparison]]:
        """Per metric: every policy with its base, by length, budget and policy."""
        return {
            metric: {
                (found.cell.length, found.cell.budget, found.policy): found
                for found in (statistics.compare(self.records, metric, self.pairs) if self.pairs else ())
            }
            for metric in self.metrics
        }


@dataclass(frozen=True, kw_only=True)
class Study:
    """A run, sorted for its report."""

    records: Sequence[Record]
    header: Mapping[str, Any]
    metrics: tuple[str, ...]
    effect: float

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings of the run."""
        found: Mapping[str, Any] = self.header.get("config", {})
        return found

    @cached_property
    def policies(self) -> list[str]:
        """All policies, those without any record included."""
        return list(dict.fromkeys([*self.config.get("policies", ()), *(record.policy for record in self.records)]))

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """All budgets, those without any record included."""
        found = {record.budget for record in self.records if record.budget is not None}
        return tuple(sorted(found | set(self.config.get("budgets", ()))))

    @cached_property
    def families(self) -> dict[str, Family]:
        """Base and variant of every policy."""
        result = {}
        for name in self.policies:
            base, plus, graph = name.partition("+")
            preset = self.header.get("presets", {}).get(name)
            if preset is None:
                result[name] = Family(base, graph if plus else ALONE)
            else:
                result[name] = Family(Preset(**preset).base_name, Path(name).stem)
        return result

    @cached_property
    def variants(self) -> list[str]:
        """All variants of bases, in their order."""
        return list(dict.fromkeys([ALONE, *(family.variant for family in self.families.values())]))

    @cached_property
    def bases(self) -> list[str]:
        """All bases but the full cache and random eviction, which all others are seen against."""
        found = dict.fromkeys(family.base for family in self.families.values())
        return [base for base in found if base not in (FULL, RANDOM)] or [base for base in found if base != FULL]

    @cached_property
    def parts(self) -> list[Part]:
        """Everything that is compared within itself only: splits, modes, tasks and sinks."""
        evicted = [record for record in self.records if record.policy != FULL]
        kinds = dict.fromkeys((record.split, record.mode, record.task, record.sinks) for record in evicted)
        modes = list(MODES)
        pairs = {name: family.base for name, family in self.families.items() if family.variant != ALONE}
        result = []
        for split, mode, task, sinks in sorted(kinds, key=lambda kind: (str(kind[0]), modes.index(kind[1]))):
            records = [
                record
                for record in self.records
                if (record.split, record.mode, record.task) == (split, mode, task) and record.sinks in (None, sinks)
            ]
            result.append(
                Part(
                    split=split,
                    mode=mode,
                    task=task,
                    sinks=sinks,
                    records=records,
                    metrics=self.metrics or _metrics_of(records),
                    budgets=self.budgets,
                    pairs=pairs,
                )
            )
        return result

    @cached_property
    def adjusted(self) -> dict[tuple[Any, ...], float]:
        """P-values of all comparisons of a split and metric, adjusted for their number (Benjamini and Hochberg)."""
        groups: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], float]]] = {}
        for part in self.parts:
            for metric, comparisons in part.comparisons.items():
                found = groups.setdefault((part.split, metric), [])
                found += [(_identity(part, comparison), comparison.p_value) for comparison in comparisons.values()]
        return {
            key: float(value)
            for found in groups.values()
            if found
            for (key, _), value in zip(found, stats.false_discovery_control([p for _, p in found]), strict=True)
        }

    def references(self, part: Part, metric: str, length: int | None) -> list[plots.Curve]:
        """Give the curves that every panel shows."""
        return [
            self.curve(part, metric, length, name, name)
            for name in (FULL, RANDOM)
            if any(name in cell for cell in part.means[metric].values())
        ]

    def curve(self, part: Part, metric: str, length: int | None, policy: str, label: str) -> plots.Curve:
        """Give the quality of a policy by budget."""
        budgets = [budget for budget in self.budgets if part.expects(length, budget)]
        found = {budget: part.means[metric].get((length, budget), {}).get(policy) for budget in budgets}
        return plots.Curve(label, found)

    def members(self, base: str) -> dict[str, str]:
        """Give the policies of a base: variant to name, the base alone first."""
        found = {family.variant: name for name, family in self.families.items() if family.base == base}
        return dict(sorted(found.items(), key=lambda item: self.variants.index(item[0])))


def _metrics_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Choose what to report of a task: likelihood, and scores where there are any, else right answers."""
    found = list(records)
    if any(record.score is not None for record in found):
        return ("nll", "score")
    # A continuation is right or wrong in no useful sense.
    return ("nll", "match") if any(record.metric != "none" for record in found) else ("nll",)


def _identity(part: Part, found: Comparison) -> tuple[Any, ...]:
    return (part.split, found.metric, *found.cell, found.policy)


@dataclass
class Document:
    """Markdown under way."""

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def heading(self, level: int, text: str) -> None:
        """Begin a section."""
        self.lines += [f"{'#' * level} {text}", ""]

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]

    def table(self, names: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
        """Add a table whose first columns hold words, the others numbers."""
        self.lines.append(_row(names))
        self.lines.append(_row([*("---" for _ in names[:words]), *("---:" for _ in names[words:])]))
        self.lines += [_row(row) for row in rows]
        self.lines.append("")

    def figures(self, drawn: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
        """Add figures side by side, each with its caption and a function that draws it."""
        images = []
        for caption, draw in drawn:
            path = f"figures/{len(self.pictures) + 1:03d}.svg"
            self.pictures[path] = draw()
            images.append(f"![{caption}]({path})")
        if images:
            self.text("\n".join(images))

    def markdown(self) -> str:
        """Give the whole."""
        return "\n".join(self.lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# Words.


def _shown(found: Interval | None) -> str:
    """Write a mean with its interval."""
    if found is None:
        return MISSING
    if not isfinite(found.low):
        return f"{found.mean:.3f} (1 prompt)"
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _gain(found: Comparison) -> Interval:
    """Turn a difference such that more is better."""
    difference = found.difference
    if METRICS[found.metric]:
        return difference
    return Interval(mean=-difference.mean, low=-difference.high, high=-difference.low, count=difference.count)


def _emphasised(gain: Interval) -> str:
    """Write a gain, bold where its interval excludes zero, on whichever side."""
    text = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    if not isfinite(gain.low):
        return f"{gain.mean:+.3f} (1 prompt)"
    return f"**{text}**" if gain.excludes_zero() else text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _length(length: int | None) -> str:
    return "any" if length is None else str(length)


def _code(name: str) -> str:
    return f"`{name}`"


# Sections.


def _write_front(document: Document, study: Study) -> None:
    config, model = study.config, study.header.get("model", {}).get("name", "unknown model")
    prompts = len({record.prompt for record in study.records})
    document.heading(1, f"Cache eviction on {model}")
    document.text(
        f"{len(study.records)} records of {prompts} prompts; {len(study.policies)} policies; budgets of "
        f"{_listed(study.budgets)} tokens per KV head. All policies answer the same prompts from caches of the same "
        "size, so differences are taken prompt by prompt. Intervals are 95 % bootstrap intervals over prompts. Bold "
        "marks gains and losses alike whose interval excludes zero."
    )
    for reason, count in study.header.get("data", {}).get("skipped", {}).items():
        document.text(f"Rows that were skipped, because {reason}: {count}.")
    if config.get("prompts") and not config.get("data"):
        wanted = config["prompts"] * len(config["tasks"]) * len(config["lengths"])
        if prompts < wanted:
            document.text(f"> This run is not finished: {prompts} of {wanted} prompts have been answered.")
    document.heading(2, "Summary")
    document.text(
        "In how many cells (length and budget) the graph's gain over its base, or its loss, is larger than chance "
        "explains. Of cells without any effect, about 5 % would show one; *adjusted* counts those with q < 0.05 "
        "(Benjamini-Hochberg over all comparisons of a split and metric)."
    )
    for split in dict.fromkeys(part.split for part in study.parts):
        names = ["policy", "mode", "task", "metric", "better", "open", "worse", "adjusted better", "adjusted worse"]
        rows = list(_summary(study, split))
        if rows:
            document.text(f"{_capital(split)} split:" if split else "All rows:")
            document.table(names, rows, words=4)
    if not any(part.pairs for part in study.parts):
        document.text("The run has no policy with a graph and its base.")


def _summary(study: Study, split: str | None) -> Iterable[list[str]]:
    """Count verdicts per part, metric and policy."""
    for part in (part for part in study.parts if part.split == split):
        for metric, comparisons in part.comparisons.items():
            for policy in part.pairs:
                found = [comparison for (_, _, name), comparison in comparisons.items() if name == policy]
                if not found:
                    continue
                verdicts = [comparison.verdict for comparison in found]
                sure = [
                    _gain(comparison).mean > 0
                    for comparison in found
                    if study.adjusted[_identity(part, comparison)] < 0.05
                ]
                counts = [
                    *(verdicts.count(word) for word in ("better", "open", "worse")),
                    sum(sure),
                    len(sure) - sum(sure),
                ]
                task = (
                    part.task
                    if len({other.sinks for other in study.parts}) == 1
                    else f"{part.task}, {part.sinks} sinks"
                )
                yield [_code(policy), part.mode, task, metric, *map(str, counts)]


def _write_part(document: Document, study: Study, part: Part) -> None:
    first = next(other for other in study.parts if (other.split, other.mode) == (part.split, part.mode))
    if part is first:
        split = f"{part.split} split, " if part.split else ""
        document.heading(2, (split + f"query-{part.mode}").capitalize())
        document.text(f"{_capital(MODES[part.mode])}.")
    document.heading(3, f"{part.task}, {part.sinks} sinks, query-{part.mode}")
    _write_quality(document, study, part)
    _write_gains(document, study, part)
    _write_needles(document, study, part)
    _write_diversity(document, study, part)


def _direction(metric: str) -> str:
    return f"{'higher' if METRICS[metric] else 'lower'} is better"


def _where(part: Part, length: int | None) -> str:
    return f"{part.task}, query-{part.mode}, prompts of {_length(length)} tokens"


def _write_quality(document: Document, study: Study, part: Part) -> None:
    document.heading(4, "Quality against budget")
    for metric in part.metrics:
        document.figures(
            (
                f"{_capital(LABELS[metric])} against budget: {_where(part, length)}. "
                "Grey: full cache and random eviction.",
                _quality_figure(study, part, metric, length),
            )
            for length in part.lengths
            if any(part.expects(length, budget) for budget in part.budgets)
        )
    for metric in part.metrics:
        document.text(f"{_capital(LABELS[metric])}, {_direction(metric)}. Mean and interval over prompts.")
        names = ["policy", "prompt", "prompts", *(f"budget {budget}" for budget in part.budgets)]
        document.table(names, _quality_rows(study, part, metric))


def _quality_figure(study: Study, part: Part, metric: str, length: int | None) -> Callable[[], bytes]:
    panels = {
        base: [study.curve(part, metric, length, name, variant) for variant, name in study.members(base).items()]
        for base in study.bases
    }
    references = [] if RANDOM in study.bases else study.references(part, metric, length)
    return lambda: plots.draw_quality(
        panels, references, study.variants, label=f"{LABELS[metric]}\n{_direction(metric)}"
    )


def _quality_rows(study: Study, part: Part, metric: str) -> Iterable[list[str]]:
    for length in part.lengths:
        for policy in study.policies:
            cells = [part.means[metric].get((length, budget), {}).get(policy) for budget in part.budgets]
            counts = sorted({found.count for found in cells if found is not None})
            count = MISSING if not counts else f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
            shown = [
                _shown(found) if part.expects(length, budget) else "\N{EN DASH}"
                for budget, found in zip(part.budgets, cells, strict=True)
            ]
            yield [_code(policy), _length(length), count, *shown]


def _write_gains(document: Document, study: Study, part: Part) -> None:
    if not part.pairs:
        return
    document.heading(4, "Gain of the graph over its base")
    for metric in part.metrics:
        document.figures(
            (
                f"Gain in {LABELS[metric]} over the base, paired by prompt: {_where(part, length)}. Filled: the "
                "interval excludes zero.",
                _gain_figure(study, part, metric, length),
            )
            for length in part.lengths
            if any(part.expects(length, budget) for budget in part.budgets)
        )
    for metric in part.metrics:
        document.text(
            f"Gain in {LABELS[metric]}, positive is better. p: Wilcoxon's signed-rank test; q: p adjusted. Last "
            f"column: prompts that find a difference of {study.effect:g} with a power of 80 %."
        )
        names = ["policy", "prompt", "budget", "gain", "verdict", "p", "q", "prompts", f"for {study.effect:g}"]
        document.table(names, _gain_rows(study, part, metric))


def _cells(part: Part, length: int | None) -> Iterable[tuple[str, int]]:
    """Give policy and budget of all comparisons that there should be."""
    return ((policy, budget) for policy in part.pairs for budget in part.budgets if part.expects(length, budget))


def _gain_figure(study: Study, part: Part, metric: str, length: int | None) -> Callable[[], bytes]:
    gains = []
    for policy, budget in _cells(part, length):
        found = part.comparisons[metric].get((length, budget, policy))
        family = study.families[policy]
        gains.append(plots.Gain(family.base, family.variant, budget, None if found is None else _gain(found)))
    return lambda: plots.draw_gains(gains, study.variants, label=f"gain in {LABELS[metric]}")


def _gain_rows(study: Study, part: Part, metric: str) -> Iterable[list[str]]:
    for length in part.lengths:
        for policy, budget in _cells(part, length):
            start = [_code(policy), _length(length), str(budget)]
            found = part.comparisons[metric].get((length, budget, policy))
            if found is None:
                yield [*start, MISSING, *("" for _ in range(5))]
                continue
            q = study.adjusted[_identity(part, found)]
            alone = found.difference.count < 2
            needed = "" if alone else str(statistics.prompts_needed(found.deviation, study.effect))
            yield [
                *start, _emphasised(_gain(found)), found.verdict, _probability(found.p_value), _probability(q),
                str(found.difference.count), needed,
            ]  # fmt: skip


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _write_needles(document: Document, study: Study, part: Part) -> None:
    records = [record for record in part.records if record.depth is not None and record.length is not None]
    metric = next((name for name in part.metrics if name in ("score", "match")), None)
    if not records or metric is None:
        return
    document.heading(4, "Needles by length and depth")
    document.text(
        "Each field is the mean over the prompts of one length with the needle at one tenth of the depth; hatched "
        "fields have no prompt. The rightmost map is that of the full cache."
    )
    lengths = [length for length in part.lengths if length is not None]
    document.figures(
        (
            f"{_capital(LABELS[metric])} by prompt length and depth, per budget: {part.task}, query-{part.mode}, "
            f"{base} and its variants.",
            _needle_figure(study, part, records, metric, base, lengths),
        )
        for base in study.bases
    )


def _needle_figure(
    study: Study, part: Part, records: Sequence[Record], metric: str, base: str, lengths: Sequence[int]
) -> Callable[[], bytes]:
    full = _heat_map([record for record in records if record.policy == FULL], metric, lengths)
    maps = {}
    for name in study.members(base).values():
        mine = [record for record in records if record.policy == name]
        by_budget = {
            str(budget): _heat_map([record for record in mine if record.budget == budget], metric, lengths)
            for budget in part.budgets
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


def _write_diversity(document: Document, study: Study, part: Part) -> None:
    if all(record.redundancy is None for record in part.records):
        return
    document.heading(4, "Diversity against quality")
    metric = part.metrics[0]
    document.figures(
        (
            f"{_capital(LABELS[metric])} against the mean cosine of two kept keys, averaged over layers and heads: "
            f"{_where(part, length)}. Grey lines lead from a base to its variants; the vertical one is the full cache.",
            _diversity_figure(study, part, metric, length),
        )
        for length in part.lengths
        if any(part.means["redundancy"].get((length, budget)) for budget in part.budgets)
    )


def _diversity_figure(study: Study, part: Part, metric: str, length: int | None) -> Callable[[], bytes]:
    places: dict[str, list[plots.Place]] = {}
    full = None
    for budget in part.budgets:
        quality, alike = (part.means[name].get((length, budget), {}) for name in (metric, "redundancy"))
        full = alike[FULL].mean if FULL in alike else full
        found = [
            plots.Place(base, variant, alike[name].mean, quality[name])
            for base in dict.fromkeys(family.base for family in study.families.values() if family.base != FULL)
            for variant, name in study.members(base).items()
            if name in alike and name in quality
        ]
        if found:
            places[f"budget {budget}"] = found
    label = f"{LABELS[metric]}\n{_direction(metric)}"
    return lambda: plots.draw_diversity(places, study.variants, full=full, label=label)


def _write_method(document: Document, study: Study) -> None:
    document.heading(2, "How the numbers were made")
    document.text(
        "The unit is the prompt; several questions of one kind to a prompt count once, with their mean. Intervals are "
        "bias-corrected and accelerated bootstrap intervals (Efron 1987) with "
        f"{statistics.RESAMPLES} resamples; gains are paired by prompt. p-values are those of Wilcoxon's signed-rank "
        "test, two-sided, zeros ranked by Pratt's rule; q-values adjust them within a split and metric. The number of "
        "prompts needed is that of a paired t-test at 5 %, two-sided, from the spread that was measured. Prompts are "
        "cut from one text and may overlap, which no interval knows. Cells of different budgets and lengths share "
        "prompts and are no independent evidence."
    )
    config = {name: value for name, value in study.config.items() if value is not None}
    if config:
        document.table(["setting", "value"], [[name, _code(json.dumps(value))] for name, value in config.items()])
    identity = {
        "model": study.header.get("model", {}).get("sha256"),
        "text": study.header.get("text", {}).get("sha256"),
        "data": study.header.get("data", {}).get("sha256"),
    }
    rows = [[f"SHA-256 of the {name}", _code(value)] for name, value in identity.items() if value]
    for session in study.header.get("sessions", ()):
        versions = ", ".join(f"{name} {number}" for name, number in session.get("versions", {}).items())
        machine = ", ".join(f"{name} {value}" for name, value in session.get("machine", {}).items() if value)
        rows.append([f"session of {session.get('started')}", f"commit {session.get('commit')}; {versions}; {machine}"])
    if rows:
        document.table(["made with", ""], rows)


def _listed(values: Sequence[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
