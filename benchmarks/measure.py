"""Time in turns, and memory in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["ROOT", "Contest", "Row", "child", "in_turns", "peak_memory"]

ROOT = Path(__file__).parents[1]
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two calls to compare.

    Attributes
    ----------
    name : str
        What the row is called, and how a child process finds the contest.
    make : callable
        ``make(tiny)`` gives the two calls on arrays of their own; `tiny` asks for the smallest sizes.
    of, to : str
        What the two calls do.
    at_most, at_least : float, optional
        Target of the ratio ``of / to``.
    memory_at_most : float, optional
        Target of the extra peak memory of `of`, in MB.
    memory_share_at_most : float, optional
        Target of that memory as a share of the memory of `to`.
    measure_memory : bool
        Whether memory is of interest.
    synchronize : callable, optional
        Waits for the device.
    """

    name: str
    make: Callable[[bool], tuple[Call, Call]]
    of: str
    to: str
    at_most: float | None = None
    at_least: float | None = None
    memory_at_most: float | None = None
    memory_share_at_most: float | None = None
    measure_memory: bool = False
    synchronize: Call = field(default=lambda: None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Times in seconds, memory in MB (10^6 bytes); None was not measured.

    `load` is the machine's load average when the row was measured: above the number of cores, others were at work, and
    a step of many short parallel calls suffers more from that than one long call.
    """

    name: str
    of: str = ""
    to: str = ""
    seconds: float | None = None
    seconds_to: float | None = None
    ratio: float | None = None
    unit: str = "x"
    target: str = ""
    met: bool | None = None
    memory: float | None = None
    memory_to: float | None = None
    memory_target: str = ""
    memory_met: bool | None = None
    note: str = ""
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 1))


def in_turns(contest: Contest, rounds: int, *, tiny: bool = False) -> tuple[float, float, float]:
    """Run both calls in turns. Gives the median seconds of each, and the median of the ratios of neighbors in time."""
    calls = contest.make(tiny)
    for call in calls:
        call()
    contest.synchronize()
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        # Whoever goes first finds another machine than who follows.
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            calls[side]()
            contest.synchronize()
            seconds[side].append(time.perf_counter() - start)
    ratios = [of / to for of, to in zip(*seconds, strict=True)]
    return median(seconds[0]), median(seconds[1]), median(ratios)


def peak_memory(contest: Contest, side: int, device: str, *, tiny: bool = False) -> float:
    """Return by how many MB one call raises the peak memory: in a fresh process, on Linux for the CPU."""
    # What a library sets up once is no memory of the call.
    contest.make(True)[side]()
    call = contest.make(tiny)[side]
    if device == "cpu":
        # What the inputs' making left behind in the high-water mark goes: Linux sets it back to what is held now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water()
        call()
        return _high_water() - before
    import torch  # noqa: PLC0415 - only where torch is measured

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6


def _high_water() -> float:
    """Return the most memory that this process has held so far, in MB."""
    # Not resource.getrusage: its maximum is handed down from the parent process.
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def child(*arguments: str, python: str = sys.executable) -> str:
    """Run the interpreter with these arguments in a process of its own. Gives the last line that it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]
