"""A run on disk: the records of its examples, and their provenance."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..core.errors import ArgumentError
from ..core.files import read_file, write_file

__all__ = [
    "HEADER",
    "RECORDS",
    "SCHEMA",
    "TIMINGS",
    "Record",
    "Run",
    "Timing",
    "as_json",
    "differences",
    "read_header",
    "read_records",
    "read_timings",
    "short",
]

# Raised whenever a field changes its meaning. Runs of an older schema can be read, and not continued.
# 2: caches are measured; a budget is what was asked for. In 1, no record says how large its cache was.
SCHEMA = 2
RECORDS = "records.jsonl"
PACKED = RECORDS + ".gz"
HEADER = "run.json"
TIMINGS = "timings.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One question to one prompt, in one mode, under one policy at one budget.

    Attributes
    ----------
    prompt : str
        Name of the prompt, such as ``needle+continuation/4096/10017``. All policies see the same prompt, so this is
        what pairs them.
    task : str
        ``needle``, ``continuation``, ... or the data set of a row.
    kind : str or None
        What was hidden: ``number``, ``word`` or ``uuid``.
    question : int
        Index among the prompt's questions.
    length : int or None
        Tokens of the prompt before the question, as asked for. None for rows of a data set, which come as they are.
    num_tokens : int
        Tokens in the cache when it was evicted.
    depth : float or None
        Depth of the needle in [0, 1]: tokens before it as a share of `length`.
    split : str or None
        ``tuning`` or ``held-out``. None for rows of a data set.
    seed : int or None
        Seed of the prompt.
    mode : str
        ``aware``, ``agnostic`` or ``protected``.
    policy : str
    budget : int or None
        Tokens to keep per KV head in the average layer, as asked for; where the prompt is protected, of all others.
        None for ``full``.
    sinks : int or None
        First tokens to keep before all others. None for ``full``.
    answer_tokens : int
        Tokens that `nll`, `kl` and `match` are about.
    nll : float
        Mean negative log-likelihood per answer token, in nats.
    kl : float
        Mean KL divergence from the full cache's next-token distribution to this one, in nats. 0 for ``full``.
    match : bool
        Whether every answer token is the most likely one after those before it.
    metric : str
        How `score` is computed, see `graphkv.evaluation.metrics`.
    score : float or None
        The metric of `text`, in [0, 1]. None where nothing was generated.
    text : str or None
        What greedy decoding generated.
    output_error : float or None
        Relative error of the attention outputs, averaged over layers and heads. None where not asked for.
    attention_mass : float or None
        Share of the full cache's attention on kept tokens. None where not asked for.
    redundancy : float or None
        Mean cosine of two different kept keys of a head, averaged over layers and heads: the lower, the more diverse.
        None in runs that did not measure it.
    tokens_kept : float or None
        Tokens in the cache after the eviction, measured: mean over KV heads and over the layers that can be evicted.
        None in runs that did not measure it.
    cache_bytes : int or None
        Bytes of all keys and values that the cache stores then, measured: padding of shorter heads and layers that
        cannot be evicted included. Where it is evicted again and again, the most that it stored while the answer was
        generated. None in runs that did not measure it.
    generated : int or None
        Tokens that were generated, in a run that evicts while a model answers (`Config.every`). `tokens_kept` is after
        the last eviction then. None in other runs.
    """

    prompt: str
    task: str
    kind: str | None
    question: int
    length: int | None
    num_tokens: int
    depth: float | None
    split: str | None
    seed: int | None
    mode: str
    policy: str
    budget: int | None
    sinks: int | None
    answer_tokens: int
    nll: float
    kl: float
    match: bool
    metric: str
    score: float | None = None
    text: str | None = None
    output_error: float | None = None
    attention_mass: float | None = None
    redundancy: float | None = None
    tokens_kept: float | None = None
    cache_bytes: int | None = None
    generated: int | None = None

    @property
    def key(self) -> str:
        """The identity of this record in its run."""
        return record_key(self.prompt, self.question, self.mode, self.policy, self.budget, self.sinks)

    @property
    def is_off_budget(self) -> bool:
        """Whether the cache was measured and kept another number of tokens than the budget."""
        if self.budget is None or self.tokens_kept is None:
            return False
        if self.mode == "protected":
            # The prompt comes on top, with the token that asks; a short answer does not fill the rest.
            return self.tokens_kept > self.num_tokens + 1 + self.budget
        return self.tokens_kept != self.budget

    def line(self) -> str:
        """Return the line of JSON, with its newline."""
        values = {"key": self.key, **asdict(self)}
        if self.generated is None:
            # Runs that are continued from before there was such a field keep their bytes.
            del values["generated"]
        return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long one answer took. Apart from its record, whose bytes are the same every time.

    Attributes
    ----------
    key : str
        Of the record.
    tokens : int
        Tokens generated.
    seconds : float
        Its share of the forward passes, and the evictions of its own cache; reading the prompt is not in it.
    """

    key: str
    tokens: int
    seconds: float


NAMES = frozenset(field.name for field in fields(Record))


def record_key(prompt: str, question: int, mode: str, policy: str, budget: int | None, sinks: int | None) -> str:
    """Join what identifies a record."""
    return "|".join(str(part) for part in (prompt, question, mode, policy, budget, sinks))


def read_records(folder: Path | str, /) -> list[Record]:
    """Read the records of a run, in the order in which they were written.

    Parameters
    ----------
    folder : pathlib.Path or str
        Folder of the run, whose records may be packed by gzip. A last line that was cut off in the middle is left out.

    Raises
    ------
    ArgumentError
        If there is no run, or a line is not a valid record.
    """
    folder = Path(folder)
    path = folder / RECORDS
    if not path.exists() and (folder / PACKED).exists():
        path = folder / PACKED
    elif not path.exists():
        raise ArgumentError(f"{folder} must be the folder of a run of graphkv eval; it has no {RECORDS}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.name == PACKED else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{path} cannot be read: {reason}") from error
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_timings(folder: Path | str, /) -> dict[str, Timing]:
    """Read how long the answers of a run took, by the key of the record; nothing where no run wrote it.

    Raises
    ------
    ArgumentError
        If the file cannot be read, or a line is not a timing.
    """
    path = Path(folder) / TIMINGS
    if not path.exists():
        return {}
    # An answer that was given twice, because a run was interrupted, counts as the second time.
    return {timing.key: timing for timing in map(_timing, read_file(path, str(folder)).split("\n")[:-1])}


def _timing(line: str) -> Timing:
    try:
        return Timing(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{TIMINGS} must hold a timing on every line; got {line[:80]!r}") from error


def read_header(folder: Path | str, /) -> dict[str, Any]:
    """Read the provenance of a run: its configuration, hashes and sessions.

    Parameters
    ----------
    folder : pathlib.Path or str
        Folder of the run.

    Raises
    ------
    ArgumentError
        If there is no run, or its ``run.json`` is damaged.
    """
    path = Path(folder) / HEADER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArgumentError(f"{folder} must be the folder of a run of graphkv eval; it has no {HEADER}") from error
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ArgumentError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} is damaged: it must hold an object")
    return found


def _parse(line: bytes, where: str) -> Record:
    try:
        values = json.loads(line)
        return Record(**{name: value for name, value in values.items() if name != "key"})
    except (ValueError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{where} must be a record of schema {SCHEMA} or older; got {line[:80]!r}") from error


class Run:
    """A folder that records are appended to.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it does not exist. A run in it is continued.
    identity : dict
        What the numbers depend on: configuration and SHA-256 of model and text. Values of JSON.
    session : dict
        Versions, commit, machine and time of this session. Values of JSON.

    Raises
    ------
    ArgumentError
        If the folder holds a run of another identity, or cannot be written.

    Attributes
    ----------
    done : set of str
        Keys of the records in the folder.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], session: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / RECORDS
        self.done: set[str] = set()
        header = folder / HEADER
        # As it comes back from JSON, so that tuples and lists compare alike.
        identity = json.loads(json.dumps({"schema": SCHEMA, **identity}))
        sessions: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / PACKED).exists() and not self.path.exists():
                raise ArgumentError(f"--output {folder} holds {PACKED}; unpack it to continue the run")
            if header.exists():
                sessions = self._continue(header, identity)
            elif self.path.exists():
                raise ArgumentError(f"--output {folder} holds {RECORDS} but no {HEADER}; it cannot be continued")
            write_file(header, as_json({**identity, "sessions": [*sessions, session]}))
            self.path.touch()
        except OSError as error:
            raise ArgumentError(f"--output {folder} cannot be written: {error.strerror or error}") from error

    def _continue(self, header: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
        """Check that the run in the folder is the same, note its records and cut off a torn last line."""
        try:
            known = json.loads(header.read_text(encoding="utf-8"))
            sessions: list[dict[str, Any]] = known.pop("sessions")
        except (ValueError, KeyError, AttributeError) as error:
            raise ArgumentError(f"{header} is damaged and the run cannot be continued: {error}") from error
        for name, old, new in differences(known, identity):
            raise ArgumentError(
                f"--output {self.folder} holds another run: {name} is {short(old)} there, {short(new)} now; "
                "choose another folder or the same settings"
            )
        if self.path.exists():
            records = read_records(self.folder)
            self.done = {record.key for record in records}
            if len(self.done) < len(records):
                raise ArgumentError(f"{self.path} must hold every example once; some are there twice")
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)
        return sessions

    def append(self, records: Iterable[Record], timings: Iterable[Timing] = ()) -> None:
        """Write the records that are missing, through to the disk.

        Parameters
        ----------
        records : iterable of Record
        timings : iterable of Timing
            Of the same answers, for a file of their own.
        """
        new = [record for record in records if record.key not in self.done]
        if not new:
            return
        lines = [json.dumps(asdict(timing)) + "\n" for timing in timings]
        try:
            if lines:
                with (self.folder / TIMINGS).open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(record.line() for record in new)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArgumentError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.done.update(record.key for record in new)


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """List what differs, down to the single setting."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in differences(old.get(key), new.get(key), key)
        ]
    return [] if old == new else [(name, old, new)]


def short(value: Any) -> str:
    """Return a value as JSON of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def as_json(content: dict[str, Any]) -> str:
    """Return the text of ``run.json``."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
