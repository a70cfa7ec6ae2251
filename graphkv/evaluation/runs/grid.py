"""The whole grid of a run, from settings to records on disk."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ...workbench.files import check_folder
from ...workbench.model import check_device
from ...workbench.progress import count_through
from ..prompts.haystack import prompt_text
from ..prompts.prompts import Prompt
from ..prompts.rows import Row, Rows, read_rows
from ..records import Run
from ..shards import Shard
from .config import Config
from .provenance import identity_of, session_now
from .workers import Workers, load
from .worklist import data_set_prompts, missing, written_prompts

__all__ = ["run_grid"]


def run_grid(
    config: Config,
    *,
    output: Path,
    console: Console,
    workers: int | None = None,
    threads: int | None = None,
    shard: Shard | None = None,
) -> Run:
    """Answer all prompts of a run, or those that are left of it.

    Parameters
    ----------
    config : Config
    output : pathlib.Path
        Folder of the run.
    console : rich.console.Console
        For progress.
    workers : int or None
        Processes that answer prompts, each with a model of its own. None: one per core for the default model, else 1.
    threads : int or None
        Threads of PyTorch in each worker, which the last bits of all numbers depend on. None: the cores shared out.
    shard : Shard or None
        The part of the prompts to answer. None: all.

    Returns
    -------
    Run
        Complete.
    """
    cores = os.cpu_count() or 1
    workers = workers or (cores if config.model is None and config.device == "cpu" else 1)
    threads = threads or max(1, cores // workers)
    check_device(config.device, config.dtype)
    check_folder(output)
    rows = None if config.data is None else read_rows(Path(config.data), config.metric)
    text = prompt_text(None if config.text is None else Path(config.text))
    model, tokenizer = load(config, threads)
    if rows is None:
        found = Rows(prompts=tuple(written_prompts(model, tokenizer, text, config)), cut=0)
    else:
        found = _prompts_of(rows, model, tokenizer, config, console)
    identity = identity_of(config, model, text, found.skipped)
    run = Run(output, identity if shard is None else {**identity, "shard": asdict(shard)}, session_now())
    prompts = found.prompts if shard is None else shard.deal(found.prompts)
    pending: list[Prompt] = [prompt for prompt in prompts if missing(prompt, config, run.done)]
    with Workers(model, tokenizer, config, min(workers, len(pending)), threads) as team:
        del model
        count_through(team.answer(pending, run), [len(prompt.ids) for prompt in pending], "prompts", console)
    return run


def _prompts_of(rows: list[Row], model: Any, tokenizer: Any, config: Config, console: Console) -> Rows:
    """Make the prompts of rows; report which of them are cut or left out."""
    found = data_set_prompts(model, tokenizer, rows, config)
    if found.cut:
        console.print(
            f"{found.cut} of {len(found.prompts)} contexts did not fit and lost their middle", highlight=False
        )
    for reason, lines in found.skipped.items():
        shown = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        console.print(f"Skipped {len(lines)} of {len(rows)} rows, because {reason}: line {shown}", highlight=False)
    return found
