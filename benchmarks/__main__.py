"""Measure, print one table, and write ``results.json``: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from statistics import median

import torch

import graphkv

from .contests import contests
from .measure import ROOT, Contest, Row, child, in_turns, peak_memory

RESULTS = Path(__file__).parent / "results.json"
LIBRARIES = ("kvpress", "numpy", "torch", "transformers")
IMPORT_TARGET = 0.060


def machine(device: str) -> dict[str, str]:
    """Describe the class of the machine, and the versions of what ran."""
    kind = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        kind = models[0].partition(":")[2].strip() if models else kind
    versions = {name: metadata.version(name) for name in LIBRARIES if util.find_spec(name)}
    versions["graphkv"] = graphkv.__version__
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": f"{kind}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
    }


def measured(contest: Contest, rounds: int, device: str, *, tiny: bool) -> Row:
    """Run one contest."""
    seconds, seconds_to, ratio = in_turns(contest, rounds, tiny=tiny)
    target, met = "", None
    if contest.at_most is not None:
        target, met = f"at most {contest.at_most:g} x", ratio <= contest.at_most
    if contest.at_least is not None:
        target, met = f"at least {contest.at_least:g} x", ratio >= contest.at_least
    memory = memory_to = memory_met = None
    memory_target = ""
    if contest.measure_memory:
        flags = ["--device", device, "--threads", str(torch.get_num_threads()), *(["--tiny"] * tiny)]
        memory, memory_to = (
            float(child("-m", "benchmarks", "--memory", contest.name, str(side), *flags)) for side in (0, 1)
        )
        if contest.memory_at_most is not None:
            memory_target, memory_met = f"at most {contest.memory_at_most:g} MB", memory <= contest.memory_at_most
        if contest.memory_share_at_most is not None:
            share = contest.memory_share_at_most
            memory_target, memory_met = f"at most {share:g} x", memory <= share * memory_to
    return Row(
        name=contest.name,
        of=contest.of,
        to=contest.to,
        seconds=seconds,
        seconds_to=seconds_to,
        ratio=ratio,
        target=target,
        met=met,
        memory=memory,
        memory_to=memory_to,
        memory_target=memory_target,
        memory_met=memory_met,
    )


def with_kvpress(contest: Contest, arguments: argparse.Namespace) -> Row:
    """Run a contest with kvpress in the interpreter that has it."""
    if util.find_spec("kvpress"):
        return measured(contest, arguments.rounds, arguments.device, tiny=arguments.tiny)
    python = Path(arguments.kvpress_python)
    if not python.exists():
        return Row(name=contest.name, note="NOT MEASURED: no environment with kvpress, see make .venv-kvpress")
    flags = ["--rounds", str(arguments.rounds), "--device", arguments.device, "--threads", str(arguments.threads)]
    flags += ["--tiny"] * arguments.tiny
    return Row(**json.loads(child("-m", "benchmarks", "--one", contest.name, *flags, python=str(python))))


def import_time(rounds: int) -> Row:
    """Time ``import graphkv`` in fresh interpreters."""
    statement = "from time import perf_counter as now; start = now(); import graphkv; print(now() - start)"
    seconds = median(float(child("-c", statement)) for _ in range(rounds))
    return Row(
        name="import graphkv",
        of="import graphkv",
        seconds=seconds,
        target=f"at most {1000 * IMPORT_TARGET:g} ms",
        met=seconds <= IMPORT_TARGET,
    )


def end_to_end(given: argparse.Namespace) -> list[Row]:
    """Measure on SmolLM2."""
    from . import model  # noqa: PLC0415 - transformers is loaded only for these rows

    return model.rows(given.rounds, contexts=(128,), long_context=128) if given.tiny else model.rows(given.rounds)


EXTRA: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "import graphkv": lambda given: [import_time(given.rounds)],
    "SmolLM2": end_to_end,
}


def show(rows: list[Row]) -> None:
    """Print the table."""
    # The environment with kvpress, which prints no table, need not have rich; nor need a machine with a GPU.
    if not util.find_spec("rich"):
        print("\n".join(f"{row.name}: {row.ratio}" for row in rows))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="graphkv: ratios, medians of runs in turns; extra peak memory")
    for heading in ("measure", "time", "compared with", "ratio", "target", "memory", "compared with", "target"):
        table.add_column(heading)
    for row in rows:
        times = [
            f"{1000 * seconds:,.1f} ms" if seconds is not None else "" for seconds in (row.seconds, row.seconds_to)
        ]
        sizes = ["" if x is None else f"{x:,.0f} MB" for x in (row.memory, row.memory_to)]
        ratio = f"{row.ratio:.2f} {row.unit}" if row.ratio is not None else ""
        verdicts = [
            text + {True: " (met)", False: " (MISSED)", None: ""}[met]
            for text, met in ((row.target, row.met), (row.memory_target, row.memory_met))
        ]
        name = row.name + (f" [{row.note}]" if row.note else "")
        table.add_row(escape(name), times[0], f"{times[1]} {row.to}", ratio, verdicts[0], *sizes, verdicts[1])
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def save(rows: list[Row], output: Path, where: dict[str, str]) -> None:
    """Write the rows in place of those of the same names; rows of another machine or other versions go."""
    kept = []
    if output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        names = {row.name for row in rows}
        kept = [row for row in before["rows"] if row["name"] not in names] if before["machine"] == where else []
    result = {"machine": where, "rows": sorted([*kept, *map(asdict, rows)], key=lambda row: row["name"])}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--rounds", type=int, default=15, help="turns of every row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch; NumPy's are set by OPENBLAS_NUM_THREADS")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether everything runs, not how fast")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--kvpress-python", default=str(ROOT / ".venv-kvpress/bin/python"))
    # For processes that this program starts itself.
    parser.add_argument("--memory", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--one", metavar="ROW", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks."""
    given = parse(arguments)
    torch.set_num_threads(given.threads)
    known = contests(given.device)
    if given.memory:
        name, side = given.memory
        print(peak_memory(known[name], int(side), given.device, tiny=given.tiny))
        return 0
    if given.one:
        print(json.dumps(asdict(measured(known[given.one], given.rounds, given.device, tiny=given.tiny))))
        return 0
    if given.list:
        print("\n".join([*known, *EXTRA]))
        return 0

    rows = []
    for name, contest in known.items():
        if given.only in name:
            print(name, file=sys.stderr)
            run = with_kvpress(contest, given) if name.startswith("kvpress") else None
            rows.append(run or measured(contest, given.rounds, given.device, tiny=given.tiny))
    for name, extra in EXTRA.items():
        if given.only in name and given.device == "cpu":
            print(name, file=sys.stderr)
            rows += extra(given)
    show(rows)
    save(rows, given.output, machine(given.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
