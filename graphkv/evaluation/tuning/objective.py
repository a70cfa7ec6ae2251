"""The objective of a search: candidates, answered on the prompts of the tuning split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...core.errors import ArgumentError
from ...core.policy import Policy
from ...integrations.transformers import observing
from ...naming.policies import make_preset
from ...naming.presets import Preset
from ..records import Record, Run, read_records
from ..runs.config import budget_of
from ..runs.prompt_run import PromptRun
from ..runs.reading import ReadCache
from ..statistics import METRICS

__all__ = ["Candidates", "Objective", "name_of"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """A prompt that stays read, for one generation of candidates after the other.

    Attributes
    ----------
    run : PromptRun
        Of a configuration with one budget and one number of sinks.
    base : Policy
        All candidates have this base: it decides how many queries the caches keep, and which sums.
    """

    run: PromptRun
    base: Policy

    @cached_property
    def _read(self) -> tuple[list[ReadCache], list[Record]]:
        modes = self.run.config.modes
        asked = [(mode, index) for index, question in enumerate(self.run.prompt.questions) for mode in question.modes]
        caches = list(self.run.read(sorted(pair for pair in asked if pair[0] in modes), [self.base]))
        return caches, [record for read in caches for record in self.run.answer_from_full(read)]

    def answer(self, policies: Mapping[str, Policy]) -> list[Record]:
        """Answer from the full cache and from all candidates.

        Parameters
        ----------
        policies : mapping of str to Policy
            By the names in the records.
        """
        budget, (sinks,) = int(budget_of(self.run.config.budgets[0])), self.run.config.sinks
        caches, records = self._read
        return [*records, *(record for read in caches for record in self.run.answer(read, policies, budget, sinks))]


@dataclass
class Objective:
    """The losses of presets, evaluated on prompts once and read from the run's records from then on.

    Attributes
    ----------
    prompts : sequence of Candidates
    model : model of transformers
    run : Run
    metric : str
    found : dict of str to list of Record
        All records, by candidate.
    """

    prompts: Sequence[Candidates]
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
        """Compute the losses of a generation, all anew if any is missing: numbers depend on who is in a batch."""
        names = [name_of(preset) for preset in presets]
        wanted = {each.run.prompt.name for each in self.prompts}
        complete = all({record.prompt for record in self.found.get(name, ())} == wanted for name in names)
        if not complete:
            config = self.prompts[0].run.config
            budget, (sinks,) = int(budget_of(config.budgets[0])), config.sinks
            policies = {
                name: make_preset(preset, budget, sinks=sinks) for name, preset in zip(names, presets, strict=True)
            }
            with observing(self.model), torch.inference_mode():
                records = [record for each in self.prompts for record in each.answer(policies)]
            new = [record for record in records if record.key not in self.run.done]
            self.run.append(new)
            self._sort(new)
        return [self.loss(name) for name in names]

    def loss(self, name: str) -> float:
        """Average a metric over prompts, then over tasks and lengths; negate it where more is better."""
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
    """Return the name of a candidate in the records: a hash of its content."""
    content = json.dumps(replace(preset, about={}).as_toml(), sort_keys=True)
    return f"candidate-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
