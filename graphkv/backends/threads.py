"""Threads of our own, in each of which PyTorch computes with one thread.

PyTorch splits every operation over its threads and waits for the slowest. Where another process computes, a thread may
be off its core for milliseconds, and a step of a hundred short operations waits a hundred times. Here every thread has
parts of the whole step to itself, and there is one wait, at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["count", "run"]

T = TypeVar("T")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def count() -> int:
    """Return how many threads PyTorch has in the calling thread: 1 where the number is not each thread's own."""
    return int(torch.get_num_threads()) if torch.backends.openmp.is_available() else 1  # type: ignore[no-untyped-call]


def run(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks, as many at a time as PyTorch has threads in the calling thread.

    Parameters
    ----------
    tasks : sequence of callable
        Nothing that is set per thread holds in them, such as modes of gradients and inference. Where there is one task
        or one thread, the calling thread runs them.

    Returns
    -------
    list
        What each returned, in their order.
    """
    size = count()
    if min(size, len(tasks)) <= 1:
        return [task() for task in tasks]
    with _lock:
        if size not in _pools:
            _pools[size] = ThreadPoolExecutor(size, "graphkv", initializer=_compute_alone)
        pool = _pools[size]
    return [future.result() for future in [pool.submit(task) for task in tasks]]


def _compute_alone() -> None:
    """Take one thread for whatever PyTorch computes in the calling thread, and in no other."""
    with _lock:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # It also set what threads that do not exist yet will have; a thread of no further use sets that back.
        helper = threading.Thread(target=torch.set_num_threads, args=(others,))
        helper.start()
        helper.join()


def _forget() -> None:
    """Begin anew in a forked process, which has none of the threads."""
    _pools.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    # Nothing forks while the lock is held, so that the child finds it free.
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)
