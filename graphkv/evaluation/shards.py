"""Shards: the prompts of one run dealt out to many machines, and the records of several runs put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ..core import checks
from ..core.errors import ArgumentError
from .records import HEADER, RECORDS, Record, as_json, differences, read_header, read_records, short

__all__ = ["Shard", "merge_runs", "merged_files"]

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One of the parts of a grid: whole prompts, so that each is read once.

    Prompts are dealt in rounds, one to each shard. Each round begins one shard later than the last: lengths follow each
    other in cycles, and one shard would get all the long prompts else.

    Parameters
    ----------
    number : int
        From 1 to `of`.
    of : int
        Shards in all.

    Raises
    ------
    ArgumentError
        If the number is outside its range.

    Examples
    --------
    >>> [Shard(number, 3).deal("abcdefg") for number in (1, 2, 3)]
    [['a', 'f'], ['b', 'd'], ['c', 'e', 'g']]
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        checks.count("shards", self.of, minimum=1)
        if not 1 <= checks.count("shard", self.number) <= self.of:
            raise ArgumentError(f"--shard must be between 1/{self.of} and {self.of}/{self.of}; got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str, /) -> Shard:
        """Read the text of ``--shard``, such as ``3/16``.

        Raises
        ------
        ArgumentError
            If it is not two numbers, or the first is outside its range.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and int(of)):
            raise ArgumentError(f"--shard must be a number and how many there are, such as 3/16; got {text!r}")
        return cls(int(number), int(of))

    def deal(self, prompts: Sequence[T], /) -> list[T]:
        """Return the prompts that are this shard's, in their order."""
        return [prompt for place, prompt in enumerate(prompts) if self._owner(place) == self.number]

    def place(self, turn: int, /) -> int:
        """Return where this shard's prompt of a round, counted from 0, stands among all prompts."""
        return turn * self.of + (self.number - 1 - turn) % self.of

    def _owner(self, place: int) -> int:
        return (place + place // self.of) % self.of + 1


def merge_runs(folders: Sequence[Path | str], /) -> tuple[list[Record], dict[str, Any]]:
    """Put together the records of several runs of the same settings.

    Parameters
    ----------
    folders : sequence of pathlib.Path or str
        Folders of runs, finished or not, in any order. One is a run as it is.

    Returns
    -------
    records : list of Record
        Each once. Those of shards are in the order of the run that was not dealt out.
    header : dict
        The provenance that all share, with everybody's sessions. ``shards`` names those that are missing, if any is.

    Raises
    ------
    ArgumentError
        If there is no run in a folder, settings differ, or two runs have different records of one example.
    """
    headers = [read_header(folder) for folder in folders]
    sessions = [session for header in headers for session in header.pop("sessions", [])]
    found = [header.pop("shard", None) for header in headers]
    shards = [None if shard is None else Shard(**shard) for shard in found]
    for folder, header in zip(folders[1:], headers[1:], strict=True):
        for name, one, other in differences(headers[0], header):
            raise ArgumentError(
                f"{folder} must be a run of the settings of {folders[0]}; {name} is {short(other)} in it, {short(one)} "
                "there"
            )
    if len({shard and shard.of for shard in shards}) > 1:
        parts = ", ".join(
            f"{folder} is {shard or 'a whole run'}" for folder, shard in zip(folders, shards, strict=True)
        )
        raise ArgumentError(f"the runs must be shards of one division; {parts}")
    records = _joined([(folder, shard, read_records(folder)) for folder, shard in zip(folders, shards, strict=True)])
    header = {**headers[0], "sessions": sessions}
    if shards[0] is not None:
        missing = sorted(set(range(1, shards[0].of + 1)) - {shard.number for shard in shards if shard is not None})
        if missing:
            header["shards"] = {"of": shards[0].of, "missing": missing}
    return records, header


def _joined(runs: Sequence[tuple[Path | str, Shard | None, list[Record]]]) -> list[Record]:
    """Order the prompts of all runs, and keep each record once."""
    prompts: list[tuple[int, Path | str, list[Record]]] = []
    for folder, shard, records in runs:
        for turn, (_, prompt) in enumerate(groupby(records, key=lambda record: record.prompt)):
            prompts.append((0 if shard is None else shard.place(turn), folder, list(prompt)))
    kept: dict[str, tuple[Record, Path | str]] = {}
    for _, folder, answered in sorted(prompts, key=lambda prompt: prompt[0]):
        for record in answered:
            known, where = kept.setdefault(record.key, (record, folder))
            if known != record:
                raise ArgumentError(f"{where} and {folder} must agree; they have different records of {record.key}")
    return [record for record, _ in kept.values()]


def merged_files(records: Sequence[Record], header: dict[str, Any], /) -> dict[str, str]:
    """Return the files of a run that has these records, by name: what one machine would have written."""
    return {RECORDS: "".join(record.line() for record in records), HEADER: as_json(header)}
