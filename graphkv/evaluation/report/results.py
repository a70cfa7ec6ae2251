"""The records of a run, sorted for its report: sections, policies with their families, comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from ...naming import names
from ...naming.names import FULL
from ...naming.presets import Preset
from .. import statistics
from ..records import Record
from ..statistics import Comparison, Interval
from .plots import Curve, SizedCurve
from .wording import MODES

__all__ = ["RANDOM", "RunResults", "Section"]

ALONE = "no graph"
RANDOM = "random"
# Of the budget: whoever keeps less has found a budget of its own.
LEAST_SHARE = 0.98


class PolicyFamily(NamedTuple):
    """The base of a policy, and which variant of it the policy is."""

    base: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Records that may be compared: one split, mode, task and number of sinks."""

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
        """Return whether a budget leaves something to evict."""
        return length is None or budget < length

    @cached_property
    def means(self) -> dict[str, dict[tuple[int | None, int], dict[str, Interval]]]:
        """Per metric, length and budget: mean and interval of every policy."""
        return {
            metric: {
                (cell.length, cell.budget): found
                for cell, found in statistics.summarize(self.records, metric).items()
                if cell.budget is not None
            }
            for metric in (*self.metrics, "redundancy")
        }

    def counts(self, metric: str, length: int | None) -> set[int]:
        """Return over how many prompts of a length the means are."""
        cells = [found for (its_length, _), found in self.means[metric].items() if its_length == length]
        return {mean.count for found in cells for mean in found.values()}

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

    @cached_property
    def unequal_sizes(self) -> dict[tuple[int | None, int], dict[str, tuple[list[float], list[float]]]]:
        """Tokens and bytes per prompt of every policy, by length and budget, where not all caches have one size."""
        tokens, sizes = (statistics.table(self.records, metric) for metric in ("tokens_kept", "cache_bytes"))
        result = {}
        for cell, kept in tokens.items():
            room = sizes.get(cell, {})
            found = {name: (list(kept[name].values()), list(room[name].values())) for name in kept if name in room}
            if cell.budget is not None and _differ(cell.budget, [found[name] for name in found if name != FULL]):
                result[cell.length, cell.budget] = found
        return result

    @cached_property
    def tokens(self) -> dict[tuple[int | None, int], dict[str, float]]:
        """Tokens per KV head that every policy kept, averaged over prompts, by length and budget."""
        return {
            (cell.length, cell.budget): {name: sum(kept.values()) / len(kept) for name, kept in found.items()}
            for cell, found in statistics.table(self.records, "tokens_kept").items()
            if cell.budget is not None
        }

    @cached_property
    def finds_budgets(self) -> bool:
        """Whether a policy kept noticeably fewer tokens than it might: then qualities at one budget say little."""
        return any(
            kept < LEAST_SHARE * budget
            for (_, budget), found in self.tokens.items()
            for name, kept in found.items()
            if name != FULL
        )

    def key(self, found: Comparison, /) -> tuple[Any, ...]:
        """Return what identifies a comparison in its run."""
        return (self.split, found.metric, *found.cell, found.policy)


def _differ(budget: int, found: Sequence[tuple[list[float], list[float]]]) -> bool:
    """Return whether a cache kept another number of tokens than the budget, or takes more bytes than another."""
    tokens, sizes = ({each for values in pair for each in values} for pair in zip(*found, strict=True))
    return tokens != {budget} or len(sizes) > 1


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """The records of a run, sorted for its report."""

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
    def evicted(self) -> list[Record]:
        """All records but those of the full cache."""
        return [record for record in self.records if record.policy != FULL]

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """All budgets, those without any record included."""
        found = {record.budget for record in self.records if record.budget is not None}
        # A percentage is another number of tokens at each length: those of the records are all there are.
        return tuple(sorted(found | {each for each in self.config.get("budgets", ()) if isinstance(each, int)}))

    @cached_property
    def families(self) -> dict[str, PolicyFamily]:
        """Base and variant of every policy."""
        result = {}
        for name in self.policies:
            base, *wrappers = names.split(name)
            preset = self.header.get("presets", {}).get(name)
            if preset is None:
                result[name] = PolicyFamily(base, "+".join(wrappers) or ALONE)
            else:
                result[name] = PolicyFamily(Preset(**preset).base, Path(name).stem)
        return result

    @cached_property
    def variants(self) -> list[str]:
        """All variants of bases, in their order."""
        return list(dict.fromkeys([ALONE, *(family.variant for family in self.families.values())]))

    @cached_property
    def bases(self) -> list[str]:
        """All bases but the full cache and random eviction, the references of all others."""
        found = dict.fromkeys(family.base for family in self.families.values())
        return [base for base in found if base not in (FULL, RANDOM)] or [base for base in found if base != FULL]

    @cached_property
    def sections(self) -> list[Section]:
        """Everything that is compared within itself only: splits, modes, tasks and sinks."""
        kinds = dict.fromkeys((record.split, record.mode, record.task, record.sinks) for record in self.evicted)
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
                Section(
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
        for section in self.sections:
            for metric, comparisons in section.comparisons.items():
                found = groups.setdefault((section.split, metric), [])
                found += [(section.key(comparison), comparison.p_value) for comparison in comparisons.values()]
        return {
            key: float(value)
            for found in groups.values()
            if found
            for (key, _), value in zip(found, stats.false_discovery_control([p for _, p in found]), strict=True)
        }

    def references(self, section: Section, metric: str, length: int | None) -> list[Curve]:
        """Return the curves that every panel shows."""
        return [
            self.curve(section, metric, length, name, name)
            for name in (FULL, RANDOM)
            if any(name in cell for cell in section.means[metric].values())
        ]

    def curve(self, section: Section, metric: str, length: int | None, policy: str, label: str) -> Curve:
        """Return the quality of a policy by budget."""
        budgets = [budget for budget in self.budgets if section.expects(length, budget)]
        found = {budget: section.means[metric].get((length, budget), {}).get(policy) for budget in budgets}
        return Curve(label, found)

    def sized_curve(self, section: Section, metric: str, length: int | None, policy: str, label: str) -> SizedCurve:
        """Return the quality of a policy by the tokens that it kept."""
        found = self.curve(section, metric, length, policy, label).points
        kept = {budget: section.tokens.get((length, budget), {}).get(policy) for budget in found}
        return SizedCurve(label, [(x, y) for budget, y in found.items() if y is not None and (x := kept[budget])])

    def members(self, base: str) -> dict[str, str]:
        """Return the policies of a base: variant to name, the base alone first."""
        found = {family.variant: name for name, family in self.families.items() if family.base == base}
        return dict(sorted(found.items(), key=lambda item: self.variants.index(item[0])))


def _metrics_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Choose what to report of a task: likelihood, and scores where there are any, else right answers."""
    found = list(records)
    if any(record.score is not None for record in found):
        return ("nll", "score")
    # A continuation is right or wrong in no useful sense.
    return ("nll", "match") if any(record.metric != "none" for record in found) else ("nll",)
