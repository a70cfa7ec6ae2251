"""The graph step beside a process that computes: ``python -m benchmarks.busy`` shows how many times as long it takes.

Each turn times the step with nothing beside it and then beside one busy loop, which is a process of its own, started
and stopped here. What is idle otherwise is up to whoever calls it: the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from .contests import MIDDLE, SHAPES, TINY, Shape, bare_product, graph_step
from .measure import Call

__all__ = ["main"]


@contextmanager
def busy_loop() -> Iterator[None]:
    """Keep one core busy from another process."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def seconds(call: Call, rounds: int) -> float:
    """Return the median time of a call."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def beside(call: Call, rounds: int, turns: int) -> tuple[float, float, float]:
    """Return the median seconds of a call alone and beside a busy loop, and the median of the ratios of the turns."""
    call()
    pairs = []
    for _ in range(turns):
        alone = seconds(call, rounds)
        with busy_loop():
            pairs.append((alone, seconds(call, rounds)))
    alone, busy = (median(each) for each in zip(*pairs, strict=True))
    return alone, busy, median(busy / alone for alone, busy in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Print one line per call."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy")
    parser.add_argument("--library", choices=("torch", "numpy"), default="torch")
    parser.add_argument("--threads", type=int, default=2, help="of torch; NumPy's are set by OPENBLAS_NUM_THREADS")
    parser.add_argument("--rounds", type=int, default=7, help="calls per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether everything runs, not how fast")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shapes: tuple[Shape, ...] = (SHAPES[2], Shape(8, 4096, 128, 64), Shape(8, 8192, 128, 64), MIDDLE)
    for shape in (TINY,) if given.tiny else shapes:
        for name, make in (("graph step", graph_step), ("bare product", bare_product)):
            alone, busy, ratio = beside(make(shape, given.library, "cpu"), given.rounds, given.turns)
            times = f"{1e3 * alone:8.1f} ms alone {1e3 * busy:8.1f} ms beside a busy loop {ratio:6.1f} x"
            print(f"{name:12}, {given.library}: {shape}: {times}, load {os.getloadavg()[0]:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
