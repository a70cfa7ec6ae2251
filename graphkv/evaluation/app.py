"""The command ``graphkv eval``: configuration, progress and tables around `evaluate`."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__
from ..core.errors import ArgumentError
from . import statistics
from .config import Config
from .data import Row, Rows, data_prompts, read_rows
from .model import DEFAULT_MODEL
from .presets import SUFFIX, load_preset
from .presses import PREFIX, fewest_tokens
from .records import Record, Run, read_records
from .runner import missing
from .tasks import Prompt, PromptMaker, seeds_of
from .team import Team, load
from .text import Text, default_text, read_text

__all__ = ["identity_of", "main", "session_now", "written_prompts"]

PACKAGES = ("numpy", "scipy", "tokenizers", "torch", "transformers")


def main(config: Config, *, output: Path, workers: int | None = None, threads: int | None = None) -> None:
    """Run an evaluation, or what is left of it, and print its tables.

    Parameters
    ----------
    config : Config
    output : pathlib.Path
        Folder of the run.
    workers : int or None
        Processes that answer prompts, each with a model of its own. None: one per core for the default model, else 1.
    threads : int or None
        Threads of PyTorch in each worker, which the last bits of all numbers depend on. None: the cores shared out.
    """
    cores = os.cpu_count() or 1
    workers = workers or (cores if config.model is None else 1)
    threads = threads or max(1, cores // workers)
    errors = Console(stderr=True)
    rows = None if config.data is None else read_rows(Path(config.data), config.metric)
    text = default_text() if config.text is None else read_text(Path(config.text))
    model, tokenizer = load(config, threads)
    if rows is None:
        prompts, skipped = written_prompts(model, tokenizer, text, config), {}
    else:
        found = _read(model, tokenizer, rows, config, errors)
        prompts, skipped = list(found.prompts), dict(found.skipped)
    run = Run(output, identity_of(config, model, text, skipped), session_now())
    pending = [prompt for prompt in prompts if missing(prompt, config, run.done)]
    with Team(model, tokenizer, config, min(workers, len(pending)), threads) as team:
        del model
        _show_progress(pending, team.answer(pending, run), errors)
    # A file has no width; a table needs one.
    console = Console(width=None if sys.stdout.isatty() else 140)
    records = read_records(output)
    for metric, title in (("nll", "NLL per answer token"), ("score", "score")):
        for table in _tables(records, metric, title):
            console.print(table)
    print(f"Records: {run.path}")


def written_prompts(model: Any, tokenizer: Any, text: Text, config: Config) -> list[Prompt]:
    """Make the prompts of tasks: all lengths of a seed before the next one, so that a broken-off run is balanced."""
    maker = PromptMaker(tokenizer, text)
    prompts = [
        maker.make(tasks, length, config.split, seed)
        for seed in seeds_of(config.split, config.seed, config.prompts)
        for tasks in config.tasks
        for length in config.lengths
    ]
    most = int(model.config.max_position_embeddings)
    for prompt in prompts:
        for question in prompt.questions:
            answer = max(len(question.answer), question.max_new_tokens if config.generate else 0)
            total = len(prompt.ids) + len(question.ids) + answer
            if total > most:
                raise ArgumentError(f"--length must fit into the model's {most} positions; {prompt.name} needs {total}")
    return prompts


def _read(model: Any, tokenizer: Any, rows: list[Row], config: Config, errors: Console) -> Rows:
    """Make the prompts of rows, and say which of them did not come whole or not at all."""
    least = {name: fewest_tokens(name) for name in config.policies if name.startswith(PREFIX)}
    found = data_prompts(rows, tokenizer, int(model.config.max_position_embeddings), least)
    if found.cut:
        errors.print(f"{found.cut} of {len(found.prompts)} contexts did not fit and lost their middle", highlight=False)
    for reason, lines in found.skipped.items():
        shown = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        errors.print(f"Skipped {len(lines)} of {len(rows)} rows, because {reason}: line {shown}", highlight=False)
    return found


def _show_progress(pending: list[Prompt], done: Iterable[Prompt], errors: Console) -> None:
    """Show how much is done and how long the rest will take."""
    columns = (
        TextColumn("{task.fields[count]} of " + f"{len(pending)} prompts"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # Prompts take minutes, so the estimate looks back on all of them.
    with Progress(*columns, console=errors, speed_estimate_period=86_400) as progress:
        bar = progress.add_task("", total=sum(len(prompt.ids) for prompt in pending), count=0)
        for count, prompt in enumerate(done, start=1):
            progress.update(bar, advance=len(prompt.ids), count=count)
            if not errors.is_terminal:
                left = progress.tasks[bar].time_remaining
                rest = "" if left is None else f", about {left / 60:.0f} min left"
                errors.print(f"{count} of {len(pending)} prompts{rest}", highlight=False)


def _tables(records: list[Record], metric: str, title: str) -> Iterable[Table]:
    """One table per task, mode and length: policies x budgets."""
    summary = statistics.summarise(records, metric)
    kinds = dict.fromkeys((cell.task, cell.mode, cell.length, cell.sinks) for cell in summary)
    for task, mode, length, sinks in kinds:
        cells = [
            cell for cell in summary if (cell.task, cell.mode, cell.length, cell.sinks) == (task, mode, length, sinks)
        ]
        table = Table(
            title=f"{task}, {mode}, {length or 'any'} tokens, {sinks} sinks: {title} with 95 % intervals",
            title_justify="left",
        )
        table.add_column("policy", no_wrap=True)
        for cell in cells:
            table.add_column(str(cell.budget), justify="right", no_wrap=True)
        for policy in summary[cells[0]]:
            table.add_row(policy, *(_shown(summary[cell].get(policy)) for cell in cells))
        yield table


def _shown(found: statistics.Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.3f}" if found.count < 2 else f"{found.mean:.3f} ({found.low:.2f} to {found.high:.2f})"


def identity_of(
    config: Config, model: Any, text: Text, skipped: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Everything that the numbers depend on and that stays the same in every session of a run."""
    data = None if config.data is None else hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    presets = {name: load_preset(Path(name)).as_toml() for name in config.policies if name.endswith(SUFFIX)}
    return {
        "config": config.as_json(),
        "model": {"name": config.model or DEFAULT_MODEL, "sha256": _hash_of(model), "dtype": str(model.dtype)},
        "text": {"name": text.name, "sha256": text.sha256()},
        "data": {"sha256": data}
        | ({"skipped": {why: len(lines) for why, lines in skipped.items()}} if skipped else {}),
        "threads": torch.get_num_threads(),
    } | ({"presets": presets} if presets else {})


def _hash_of(model: Any) -> str:
    """Give the SHA-256 of all parameters, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def session_now() -> dict[str, Any]:
    """What this session works with."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"graphkv": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
            if sys.platform != "win32"
            else None,
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """Give the commit of a checkout, with a mark where files differ from it; None for an installed package."""
    package = Path(__file__).resolve().parents[1]
    # An installed package may lie inside the checkout of something else.
    if _git(package, "rev-parse", "--show-toplevel") != str(package.parent):
        return None
    return _git(package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
