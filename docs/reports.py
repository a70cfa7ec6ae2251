"""Build the full reports in results/ from the records beside them: pages and figures, which git ignores.

Sphinx has them built before it reads the pages. They are built again when records, code or a library have changed.
"""

from __future__ import annotations

import gzip
import tempfile
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from graphkv import evaluation, workbench
from graphkv.core.files import write_whole
from graphkv.evaluation.records import Record, read_header, read_records
from graphkv.evaluation.report import make_report

__all__ = ["RESULTS", "VERSIONS", "build", "records"]

RESULTS = Path(__file__).parent / "results"
# The metrics that each report shows.
RUNS = {"baselines": ("nll",), "standard": ("nll", "match")}
# What decides, besides records and code, about every byte of a report.
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("matplotlib", "numpy", "scipy"))


def records(packed: str) -> list[Record]:
    """Read records that are stored compressed."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "records.jsonl").write_bytes(gzip.decompress((RESULTS / packed).read_bytes()))
        return read_records(Path(scratch))


def build() -> dict[str, str]:
    """Build what is not current.

    Returns
    -------
    dict of str to str
        The SHA-256 of every file, by its path in ``results``.
    """
    return {path: digest for run in RUNS for path, digest in _build(run).items()}


def _build(run: str) -> dict[str, str]:
    folder = RESULTS / run
    stamp, origin = folder / "report.stamp", _origin(folder)
    found = _digests(folder)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp(origin, found):
        return found
    markdown, pictures = make_report(records(f"{run}/records.jsonl.gz"), read_header(folder), metrics=RUNS[run])
    stamp.unlink(missing_ok=True)
    (folder / "figures").mkdir(exist_ok=True)
    contents = {"report.md": markdown.encode(), **pictures}
    found = _digests(folder)
    for path, content in contents.items():
        # Whole or not at all, and not again where nothing changes: another build may be reading.
        if found.get(f"{run}/{path}") != sha256(content).hexdigest():
            write_whole(folder / path, partial(Path.write_bytes, data=content))
    for path in found.keys() - {f"{run}/{path}" for path in contents}:
        (RESULTS / path).unlink(missing_ok=True)
    found = _digests(folder)
    stamp.write_text(_stamp(origin, found), encoding="utf-8")
    return found


def _origin(folder: Path) -> str:
    """Digest everything that a report is made from."""
    rooms = [Path(place) for room in (evaluation, workbench) for place in room.__path__]
    code = [Path(__file__), *sorted(path for room in rooms for path in room.rglob("*.py"))]
    parts = [path.read_bytes() for path in (folder / "records.jsonl.gz", folder / "run.json", *code)]
    return sha256(b"".join(sha256(part).digest() for part in (VERSIONS.encode(), *parts))).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """Digest the report that is there."""
    paths = sorted([*folder.glob("report.md"), *folder.glob("figures/*.svg")])
    return {path.relative_to(RESULTS).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


def _stamp(origin: str, digests: dict[str, str]) -> str:
    """Name what a report was made from and what came out."""
    return "\n".join([origin, *(f"{digest}  {path}" for path, digest in digests.items())]) + "\n"
