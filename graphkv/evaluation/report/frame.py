"""The frame of a report: what it is about, its summary, and how the numbers were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ...workbench.text import listed
from .. import statistics
from ..records import Record
from ..statistics import gain_of
from .document import Document
from .results import RunResults
from .wording import capital, code

__all__ = ["write_front", "write_method", "write_summary"]


def write_front(document: Document, results: RunResults, /) -> None:
    """Write the title, and what was measured."""
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
    shards = results.header.get("shards")
    if shards:
        document.text(f"> Shards that are missing, of {shards['of']}: {listed(shards['missing'])}.")
    if config.get("prompts") and not config.get("data"):
        wanted = config["prompts"] * len(config["tasks"]) * len(config["lengths"])
        if prompts < wanted:
            document.text(f"> This run is not finished: {prompts} of {wanted} prompts have been answered.")


def write_summary(document: Document, results: RunResults, /) -> None:
    """Count the verdicts of all comparisons."""
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


def write_method(document: Document, results: RunResults, /) -> None:
    """Write how the numbers were made, and the provenance of the run."""
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
