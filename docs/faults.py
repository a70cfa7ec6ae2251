"""Write the table of seeded mistakes into conformance.md, from the wrong backends that are kept with the tests.

``python docs/faults.py`` rewrites the table between its two marks, ``--check`` only says whether it is current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from marked import renew

from graphkv.testing import examples

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from tests.support.faults import FAULTS  # noqa: E402 - the tests are not installed

PAGE = DOCS / "conformance.md"
SHOWN = 3


def table() -> str:
    """Render the table in Markdown: a row for each step or namespace that is wrong."""
    kinds: dict[str, list[str]] = {}
    fixed: dict[str, int] = {}
    for fault in FAULTS:
        kind, _, name = fault.name.partition(": ")
        kinds.setdefault(kind, []).append(name)
        fixed[kind] = fixed.get(kind, 0) + (fault.caught_by in examples.__all__)
    lines = [
        "| wrong | mistakes | such as | caught in 20 of 20 runs | also by drawn inputs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, names in kinds.items():
        step = max(1, len(names) // SHOWN)
        shown = "; ".join(names[::step][:SHOWN])
        lines.append(f"| {kind} | {len(names)} | {shown} | {len(names)} | {len(names) - fixed[kind]} |")
    drawn = len(FAULTS) - sum(fixed.values())
    return "\n".join([*lines, f"| all | {len(FAULTS)} | | {len(FAULTS)} | {drawn} |"]) + "\n"


if __name__ == "__main__":
    sys.exit(renew(PAGE, {"faults": table()}))
