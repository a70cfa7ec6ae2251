"""The table of the sweep's results, docs/models.json: one row per model and release.

``python -m tests.models.table`` sweeps over all models of the installed transformers and writes its rows. The newest
release has all rows, older ones those that differ; null is a model that a release does not have.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import transformers

from tests.models.sweep import names, sweep

PATH = Path(__file__).parents[2] / "docs" / "models.json"
Cells = dict[str, str]
Rows = dict[str, Cells | None]
# Where in transformers an error came from is no result.
PLACE = re.compile(r" \(\w+\.py:\d+\)$")


def release() -> str:
    """Return the installed release, without its last number."""
    return ".".join(transformers.__version__.split(".")[:2])


def cells(model_type: str, name: str) -> Cells:
    """Sweep over one model; return its kinds of layers, and result and reason by implementation and input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = sweep(model_type, name)
    found = {where: PLACE.sub("", ": ".join(filter(None, each))) for where, each in row.results.items()}
    return {"layers": row.kinds} | found


def read() -> dict[str, Rows]:
    """Return all rows of all releases, newest first."""
    stored: dict[str, Rows] = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    newest = next(iter(stored.values()), {})
    return {number: newest | rows for number, rows in stored.items()}


def write(table: dict[str, Rows]) -> None:
    """Store all rows of the newest release, and of others what differs."""
    order = sorted(table, key=lambda number: [int(part) for part in number.split(".")], reverse=True)
    newest = table[order[0]]
    stored = {order[0]: {name: row for name, row in newest.items() if row is not None}}
    for number in order[1:]:
        rows = dict.fromkeys(newest) | table[number]
        stored[number] = {name: row for name, row in rows.items() if row != newest.get(name)}
    PATH.write_text(json.dumps(stored, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def main() -> None:
    """Sweep over everything in two processes."""
    transformers.logging.set_verbosity_error()
    pairs = names()
    with ProcessPoolExecutor(2) as pool:
        rows = pool.map(cells, *zip(*pairs, strict=True), chunksize=4)
        found: Rows = {f"{model_type} {name}": row for (model_type, name), row in zip(pairs, rows, strict=True)}
    write(read() | {release(): found})


if __name__ == "__main__":
    sys.exit(main())
