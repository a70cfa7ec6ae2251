"""The command ``graphkv tune``: a preset for a model and its tasks, chosen on one split and reported on the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...core import checks
from ...core.budgets import allocate, cut_again, tokens_of
from ...core.errors import ArgumentError
from ...core.policy import Policy
from ...naming.names import base_name, is_preset, is_press
from ...naming.policies import make_preset
from ...naming.presets import Preset, load_preset, write_preset
from ...workbench.files import check_folder
from ...workbench.model import check_device
from ...workbench.progress import print_table, show_steps, table_console
from ..prompts.haystack import prompt_text
from ..records import Record, Run, read_records
from ..runs.config import Config, budget_of
from ..runs.grid import run_grid
from ..runs.prompt_run import PromptRun
from ..runs.provenance import identity_of, session_now
from ..runs.tables import print_tables
from ..runs.workers import load
from ..runs.worklist import written_prompts
from ..statistics import METRICS, compare
from .objective import Candidates, Objective
from .search import search

__all__ = ["main"]

GOALS = ("nll", "kl", "match", "score")
# What the held-out report compares a preset with, beside its base: the paper's setting and ours.
GRAPHS = ("graphkv", "degree")
# Layer budgets to start from, beside those of a preset.
STARTS = ("base", "pyramid-infer")


def main(
    config: Config,
    *,
    held_out: int,
    metric: str,
    evaluations: int,
    graph_groups: int,
    group_size: int,
    seed: int,
    start: str,
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
        Metric to improve: ``nll``, ``kl``, ``match`` or ``score``.
    evaluations, graph_groups, group_size, seed
        As in `search`.
    start : str
        Layer budgets to start from: ``base``, ``pyramid-infer``, or a preset with ``layer_budgets`` of its own.
    threads : int or None
        Threads of PyTorch. None: one per core.
    output : pathlib.Path
        Folder for ``preset.toml`` and the two runs, ``tuning`` and ``held-out``.
    """
    config = _with_tokens(config)
    (budget,), base = config.budgets, config.policies[-1]
    checks.choice("metric", metric, GOALS)
    if not isinstance(budget, int) or budget >= min(config.lengths):
        raise ArgumentError(f"--budget must be below every --length, {min(config.lengths)}; got {budget}")
    if base_name(base) != base or is_preset(base) or is_press(base):
        raise ArgumentError(f"--base must be a policy without a graph, such as snapkv; got {base!r}")
    if start not in STARTS and not is_preset(start):
        raise ArgumentError(f"--start must be {', '.join(STARTS)} or a preset, a .toml file; got {start!r}")
    if start != "base" and not group_size:
        raise ArgumentError(f"--start must be base with --group-size 0, which searches no layer budgets; got {start!r}")
    check_device(config.device, config.dtype)
    check_folder(output)
    threads = threads or os.cpu_count() or 1
    console = Console(stderr=True)
    how = {"evaluations": evaluations, "graph_groups": graph_groups, "group_size": group_size, "seed": seed}
    loss, best, model_name = _search(config, base, metric, how, start, threads, output / "tuning", console)
    about = {
        "model": model_name,
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
    held_out_config = replace(config, split="held-out", prompts=held_out, policies=policies)
    run_grid(held_out_config, output=output / "held-out", console=console, workers=1, threads=threads)
    records, tables = read_records(output / "held-out"), table_console()
    print_tables(records, tables)
    print_table(tables, _comparison(records, metric, str(path), base))
    print(f"Preset:  {path}")


def _with_tokens(config: Config) -> Config:
    """Return the settings with a budget in tokens: a percentage is of the one length that there is."""
    (budget,) = config.budgets
    if isinstance(budget, int):
        return config
    if len(config.lengths) > 1:
        raise ArgumentError(f"--budget must be a number of tokens with more than one --length; got {budget!r}")
    return replace(config, budgets=(tokens_of(budget_of(budget), config.lengths[0]),))


def _search(
    config: Config,
    base: str,
    metric: str,
    how: dict[str, int],
    start_from: str,
    threads: int,
    output: Path,
    console: Console,
) -> tuple[float, Preset, str]:
    """Search on the tuning split; return the least loss, its preset and the name of the model."""
    (sinks,) = config.sinks
    budget = int(budget_of(config.budgets[0]))
    model, tokenizer = load(config, threads)
    text = prompt_text(None if config.text is None else Path(config.text))
    prompts = written_prompts(model, tokenizer, text, config)
    start = Preset(base=base, sinks=sinks)
    policy = make_preset(start, budget)
    most, num_layers = min(config.lengths), int(model.config.num_hidden_layers)
    if how["group_size"]:
        start = replace(start, layer_budgets=_first_budgets(start_from, policy, budget, most, num_layers))
    asked = {"metric": metric, **how} | ({} if start_from == "base" else {"start": list(start.layer_budgets)})
    identity = {**identity_of(config, model, text), "search": asked}
    run = Run(output, identity, session_now())
    runs = [PromptRun(model=model, tokenizer=tokenizer, prompt=prompt, config=config) for prompt in prompts]
    objective = Objective([Candidates(run=each, base=policy) for each in runs], model, run, metric)
    least: list[float] = []
    with show_steps(console) as show:

        def evaluate(presets: Sequence[Preset]) -> list[float]:
            found = objective(presets)
            least.append(min([*found, *least[-1:]]))
            done = len(objective.found) - 1
            show(f"{done} of about {how['evaluations']} candidates, best {least[-1]:.4f}")
            return found

        loss, best = search(
            evaluate,
            start,
            num_layers=num_layers,
            budget=budget,
            least=min(policy.protection(budget).count, budget),
            most=most,
            **how,
        )
    return loss, best, identity["model"]["name"]


def _first_budgets(start: str, policy: Policy, budget: int, most: int, num_layers: int) -> tuple[int, ...]:
    """Return the layer budgets that the search starts from, which add up exactly."""
    if start == "base":
        return tuple(policy.layer_budget(most, layer, num_layers) for layer in range(num_layers))
    named = start == "pyramid-infer"
    shares: Sequence[float] = cut_again(num_layers) if named else load_preset(Path(start)).layer_budgets
    if len(shares) != num_layers:
        raise ArgumentError(
            f"--start must have layer_budgets for each of the model's {num_layers} layers; {start} has {len(shares)}"
        )
    return tuple(allocate(shares, num_layers * budget, most, min(policy.protection(budget).count, budget)))


def _comparison(records: Sequence[Record], metric: str, preset: str, base: str) -> Table:
    """Compare a preset with its base, and with the untuned graphs over it."""
    table = Table(title=f"The preset on the held-out split: differences in {metric}, paired", title_justify="left")
    for name in ("task", "mode", "length", "compared with", "difference", "verdict"):
        table.add_column(name, no_wrap=True)
    for baseline in (base, *(f"{base}+{graph}" for graph in GRAPHS)):
        for found in compare(records, metric, {preset: baseline}):
            difference, cell = found.difference, found.cell
            shown = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
            table.add_row(cell.task, cell.mode, str(cell.length), baseline, shown, found.verdict)
    return table
