"""Answers in this process, or in a pool of worker processes.

Small models keep one core busy and no more: with eviction in between, two processes of one thread are faster than one
process of two.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from time import monotonic, sleep
from types import TracebackType
from typing import Any

import torch

from ...workbench.model import load_model
from ...workbench.progress import silence_transformers
from ..prompts.prompts import Prompt
from ..records import Record, Run, Timing
from .config import Config
from .prompt_run import evaluate

__all__ = ["Workers", "load"]

Answered = tuple[list[Record], list[Timing]]

# What a worker holds: model, tokenizer and configuration.
_mine: tuple[Any, Any, Config] | None = None


def load(config: Config, threads: int) -> tuple[Any, Any]:
    """Load model and tokenizer, without messages of their libraries."""
    silence_transformers()
    torch.set_num_threads(threads)
    return load_model(config.model, lambda step: None, device=config.device, dtype=config.dtype)


class Workers:
    """Processes that answer prompts, in the order in which these are given.

    Parameters
    ----------
    model, tokenizer
        For a single worker, which is this process; each of several loads its own.
    config : Config
    workers, threads : int
        Processes, and threads of PyTorch in each.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Config, workers: int, threads: int) -> None:
        self.here = (model, tokenizer, config)
        self.pool: ProcessPoolExecutor | None = None
        self.futures: list[Future[Answered]] = []
        if workers > 1:
            self.here = (None, None, config)
            # Not forked: a process with running threads cannot be copied safely.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, _start, (config, threads))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is None:
            return
        # Only this attribute knows them, and shutdown() forgets it.
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=error is None, cancel_futures=True)
        if error is None:
            return
        # They would finish the prompts at hand first, which can take minutes; a later run begins these again. But no
        # worker may end before the pool has forgotten the other prompts: it would find that it cannot answer them.
        deadline = monotonic() + 5
        while any(not (each.done() or each.running()) for each in self.futures) and monotonic() < deadline:
            sleep(0.01)
        for process in processes:
            process.terminate()

    def answer(self, prompts: list[Prompt], run: Run) -> Iterator[Prompt]:
        """Append the records that are missing to a run; yield every prompt that is done."""
        known = [frozenset(key for key in run.done if key.startswith(f"{prompt.name}|")) for prompt in prompts]
        if self.pool is None:
            model, tokenizer, config = self.here
            answered: Iterator[Answered] = (
                _evaluate(model, tokenizer, config, prompt, done) for prompt, done in zip(prompts, known, strict=True)
            )
        else:
            with _deaf_to_interrupts():
                self.futures = [self.pool.submit(_answer, *each) for each in zip(prompts, known, strict=True)]
            answered = (future.result() for future in self.futures)
        for prompt, (records, timings) in zip(prompts, answered, strict=True):
            run.append(records, timings)
            yield prompt


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Begin processes that no Ctrl-C reaches, because this one ends them: else each prints a traceback of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What a signal does is handed on to new processes only where it is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start(config: Config, threads: int) -> None:
    """Begin a worker."""
    global _mine  # noqa: PLW0603 - a pool has no other place for it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine = (*load(config, threads), config)


def _end_with_parent() -> None:
    """Leave no worker behind when a run is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(prompt: Prompt, done: frozenset[str]) -> Answered:
    if _mine is None:
        raise RuntimeError("the worker has not been started")
    return _evaluate(*_mine, prompt, done)


def _evaluate(model: Any, tokenizer: Any, config: Config, prompt: Prompt, done: frozenset[str]) -> Answered:
    timings: list[Timing] = []
    return evaluate(model, tokenizer, prompt, config, done, timings), timings
