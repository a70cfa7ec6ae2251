"""The command ``graphkv tune``: a preset for a model and its tasks, chosen on one split and reported on the other."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..core import checks
from ..core.errors import ArgumentError
from ..core.policy import Policy
from ..integrations.transformers import observing
from . import app, statistics
from .config import Config
from .names import base_name
from .policies import make_preset
from .presets import SUFFIX, Preset, write_preset
from .records import Record, Run, read_records
from .runner import Reading, Site
from .search import search
from .statistics import METRICS
from .team import load
from .text import default_text, read_text

__all__ = ["Bench", "Losses", "main"]

GOALS = ("nll", "kl", "match", "score")
# What the held-out report compares a preset with, beside its base: the paper's setting and ours.
GRAPHS = ("graphkv", "degree")


@dataclass(frozen=True, kw_only=True)
class Bench(Reading):
    """A prompt that stays read while candidates come and go."""

    base: Policy
    done: frozenset[str] = frozenset()

    def _policies(self, budget: int, sinks: int) -> dict[str, Policy]:
        # Decides how many queries the caches keep, and which sums: candidates share their base.
        return {"base": self.base}

    @cached_property
    def _read(self) -> tuple[list[Site], list[Record]]:
        asked = [(mode, index) for index, question in enumerate(self.prompt.questions) for mode in question.modes]
        sites = list(self._sites(sorted(pair for pair in asked if pair[0] in self.config.modes)))
        return sites, [record for site in sites for record in self._answer_from_full(site)]

    def answer(self, candidates: Mapping[str, Policy]) -> list[Record]:
        """Give the records of the full cache and of all candidates.

        Parameters
        ----------
        candidates : mapping of str to Policy
            By the names that records have.
        """
        (budget,), (sinks,) = self.config.budgets, self.config.sinks
        sites, records = self._read
        records = list(records)
        for site in sites:
            batches: dict[tuple[int, ...], list[Any]] = {}
            for name, policy in candidates.items():
                cache = self._shrink(site, name, policy, budget)
                batches.setdefault(tuple(layer.num_stored for layer in cache.attention_layers), []).append(
                    (name, cache)
                )
            for group in batches.values():
                for start in range(0, len(group), self.config.batch):
                    records += self._answer_batch(site, budget, sinks, group[start : start + self.config.batch])
        return records


@dataclass
class Losses:
    """The loss of presets, evaluated on prompts once and then read from the run's records.

    Attributes
    ----------
    benches : sequence of Bench
    model : model of transformers
    run : Run
    metric : str
    found : dict of str to list of Record
        What is there already, by candidate.
    """

    benches: Sequence[Bench]
    model: Any
    run: Run
    metric: str
    found: dict[str, list[Record]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sort(read_records(self.run.folder))

    def _sort(self, records: Sequence[Record]) -> None:
        for record in records:
            self.found.setdefault(record.policy, []).append(record)

    def __call__(self, presets: Sequence[Preset]) -> list[float]:
        """Evaluate a generation, all of it if anything of it is missing: numbers depend on who is in a batch."""
        names = [name_of(preset) for preset in presets]
        wanted = {bench.prompt.name for bench in self.benches}
        there = all({record.prompt for record in self.found.get(name, ())} == wanted for name in names)
        if not there:
            (budget,), (sinks,) = self.benches[0].config.budgets, self.benches[0].config.sinks
            policies = {
                name: make_preset(preset, budget, sinks=sinks) for name, preset in zip(names, presets, strict=True)
            }
            with observing(self.model), torch.inference_mode():
                records = [record for bench in self.benches for record in bench.answer(policies)]
            new = [record for record in records if record.key not in self.run.done]
            self.run.append(new)
            self._sort(new)
        return [self.loss(name) for name in names]

    def loss(self, name: str) -> float:
        """Average a metric over prompts, then over tasks and lengths; turn it such that less is better."""
        cells: dict[tuple[Any, ...], list[float]] = {}
        for record in self.found[name]:
            value = getattr(record, self.metric)
            if value is not None:
                cells.setdefault((record.task, record.length), []).append(float(value))
        if not cells:
            raise ArgumentError(f"--metric {self.metric} must be measured by the tasks; it is not")
        mean = float(np.mean([np.mean(values) for values in cells.values()]))
        return -mean if METRICS[self.metric] else mean


def name_of(preset: Preset) -> str:
    """Name a candidate by what it is."""
    content = json.dumps(replace(preset, about={}).as_toml(), sort_keys=True)
    return f"candidate-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def main(
    config: Config,
    *,
    held_out: int,
    metric: str,
    evaluations: int,
    graph_groups: int,
    group_size: int,
    seed: int,
    threads: int | None,
    output: Path,
) -> None:
    """Search for a preset and report it.

    Parameters
    ----------
    config : Config
        Of the tuning split, with one policy (the base), one budget, one mode and one number of sinks.
    held_out : int
        Prompts per task and length to report on.
    metric : str
        What to improve: ``nll``, ``kl``, ``match`` or ``score``.
    evaluations, graph_groups, group_size, seed
        As in `search`.
    threads : int or None
        Threads of PyTorch. None: one per core.
    output : pathlib.Path
        Folder for ``preset.toml`` and the two runs, ``tuning`` and ``held-out``.
    """
    (budget,), (sinks,), base = config.budgets, config.sinks, config.policies[-1]
    checks.choice("metric", metric, GOALS)
    if budget >= min(config.lengths):
        raise ArgumentError(f"--budget must be below every --length, {min(config.lengths)}; got {budget}")
    if base_name(base) != base or base.endswith(SUFFIX):
        raise ArgumentError(f"--base must be a policy without a graph, such as snapkv; got {base!r}")
    threads = threads or os.cpu_count() or 1
    text = default_text() if config.text is None else read_text(Path(config.text))
    model, tokenizer = load(config, threads)
    prompts = app.written_prompts(model, tokenizer, text, config)
    start = Preset(base=base, sinks=sinks)
    policy = make_preset(start, budget)
    how = {"metric": metric, "evaluations": evaluations, "graph_groups": graph_groups, "group_size": group_size}
    identity = {**app.identity_of(config, model, text), "search": {**how, "seed": seed}}
    run = Run(output / "tuning", identity, app.session_now())
    benches = [Bench(model=model, tokenizer=tokenizer, prompt=prompt, config=config, base=policy) for prompt in prompts]
    most, num_layers = min(config.lengths), int(model.config.num_hidden_layers)
    if group_size:
        shares = tuple(policy.layer_budget(most, layer, num_layers) for layer in range(num_layers))
        start = replace(start, layer_budgets=shares)
    losses = Losses(benches, model, run, metric)
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("Starting")
        least: list[float] = []

        def evaluate(presets: Sequence[Preset]) -> list[float]:
            found = losses(presets)
            least.append(min([*found, *least[-1:]]))
            done = len(losses.found) - 1
            progress.update(task, description=f"{done} of about {evaluations} candidates, best {least[-1]:.4f}")
            if not errors.is_terminal:
                errors.print(f"{done} of about {evaluations} candidates, best {least[-1]:.4f}", highlight=False)
            return found

        bounds = {"least": min(policy.protection(budget).count, budget), "most": most}
        loss, best = search(
            evaluate,
            start,
            num_layers=num_layers,
            budget=budget,
            evaluations=evaluations,
            graph_groups=graph_groups,
            group_size=group_size,
            seed=seed,
            **bounds,
        )
    about = {
        "model": identity["model"]["name"],
        "tasks": list(config.tasks),
        "lengths": list(config.lengths),
        "mode": config.modes[0],
        "budget": budget,
        "prompts": config.prompts,
        "split": config.split,
        "seed": seed,
        "metric": metric,
        "value": -loss if METRICS[metric] else loss,
    }
    path = output / "preset.toml"
    write_preset(path, replace(best, about=about))
    policies = (base, *(f"{base}+{graph}" for graph in GRAPHS), str(path))
    report = replace(config, split="held-out", prompts=held_out, policies=policies)
    app.main(report, output=output / "held-out", workers=1, threads=threads)
    # A file has no width; a table needs one.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_comparison(read_records(output / "held-out"), metric, str(path), base))
    print(f"Preset:  {path}")


def _comparison(records: Sequence[Record], metric: str, preset: str, base: str) -> Table:
    """Compare a preset with its base, and with the untuned graphs over it."""
    table = Table(title=f"The preset on the held-out split: differences in {metric}, paired", title_justify="left")
    for name in ("task", "mode", "length", "compared with", "difference", "verdict"):
        table.add_column(name, no_wrap=True)
    for baseline in (base, *(f"{base}+{graph}" for graph in GRAPHS)):
        for found in statistics.compare(records, metric, {preset: baseline}):
            difference, cell = found.difference, found.cell
            shown = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
            table.add_row(cell.task, cell.mode, str(cell.length), baseline, shown, found.verdict)
    return table
