"""Write the tables of serving.md, from the records of the evaluation and from what ``make bench`` measured.

``python docs/serving.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from marked import renew
from reports import records
from systems import table

PAGE = Path(__file__).parent / "serving.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results-lmcache.json"
BASES = ("snapkv+degree", "keydiff")
FORMS = ("", "+shared", "+shared(over='layers')", "+shared(over='layers',block=16)")
NUM_TOKENS, KEPT, CORES = 32768, 8192, 8
PCIE, NETWORK, MEMORY = 64e9, 400e9 / 8, 80e9


class Size(NamedTuple):
    """A model, in bfloat16."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    weights: float

    @property
    def per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


MODELS = (Size("8B", 32, 8, 128, 16e9), Size("70B", 80, 8, 128, 140e9))


def rows(head: list[str], body: list[list[str]]) -> str:
    """Render a table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def shared() -> str:
    """Compare kept sets of each head with those that are shared."""
    names = {base + form for base in BASES for form in FORMS}
    read = [record for record in records("systems/records.jsonl.gz") if record.policy in names]
    return table(read, {base + form: base for base in BASES for form in FORMS[1:]}, full=False)


def measured() -> tuple[dict[str, float], float]:
    """Return the row of the benchmark and its seconds per token and layer."""
    read = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    (row,) = (each for each in read if each["name"].startswith("LMCache edit"))
    layers, tokens = (int(re.findall(pattern, row["name"])[0]) for pattern in (r"(\d+) layers", r"T (\d+)"))
    return row, row["seconds"] / layers / tokens


def edit() -> str:
    """Show what was measured."""
    row, rate = measured()
    copied = row["seconds_to"] / row["seconds"] * rate
    body = [[str(row["name"]), f"{1e3 * row['seconds']:.0f} ms", f"{1e9 * rate:.0f} ns", f"{1e9 * copied:.0f} ns"]]
    return rows(["", "time", "per token and layer", "a copy, per token and layer"], body)


def estimate() -> str:
    """Work out what editing costs and frees, from sizes and rates."""
    rate, body = measured()[1], []
    for model in MODELS:
        per_replica = 1 if model.weights < MEMORY else 4
        for gpus in (1, 8, 64):
            if gpus < per_replica:
                body.append([model.name, str(gpus), *["does not fit"] + ["-"] * 5])
                continue
            before, after = NUM_TOKENS * model.per_token, KEPT * model.per_token
            seconds = rate * model.layers * NUM_TOKENS / (CORES * per_replica)
            room = 0.9 * MEMORY * per_replica - model.weights
            replicas = gpus // per_replica
            body.append([
                model.name,
                str(gpus),
                f"{before / 1e9:.1f} to {after / 1e9:.1f} GB",
                f"{(before + after) / PCIE / per_replica:.2f} s",
                f"{(before + after) / (NETWORK * per_replica / 8):.2f} s",
                f"{seconds:.2f} s",
                f"{replicas / seconds:.1f}",
                f"{replicas * int(room // before)} to {replicas * int(room // after)}",
            ])  # fmt: skip
    head = ["model", "GPUs", "cache of a request", "over PCIe", "over the network", "edit", "edits per second"]
    return rows([*head, "requests that fit"], body)


if __name__ == "__main__":
    sys.exit(renew(PAGE, {"shared": shared(), "edit": edit(), "estimate": estimate()}))
