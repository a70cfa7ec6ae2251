"""Write the tables of all policies into policies.md, from the catalog and from what the classes declare.

``python docs/support.py`` rewrites the tables between their marks, ``--check`` only checks that they are current.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import fields
from pathlib import Path
from typing import Any

from marked import renew

from graphkv import LESS, AttentionGate, Random
from graphkv.adapters.attention_gate import Gate
from graphkv.adapters.catalog import ENTRIES, Entry
from graphkv.adapters.less import Kernel
from graphkv.core import Cost, LayerShape, Policy, Requirements, Wrapper
from graphkv.core.files import StoredArray

STAGES = [
    "observe",
    "score",
    "protection",
    "rescore",
    "choose",
    "merge",
    "remains",
    "answer",
    "wants",
    "share_out",
    "voters",
    "join",
    "layer_budget",
    "at",
]
PAGE = Path(__file__).parent / "policies.md"
SHAPE = LayerShape(num_tokens=8192, query_heads=32, kv_heads=8, head_size=128, budget=512)
# Sizes of weights, with nothing in them: two heads of width 16; 512 hidden channels and 8 features.
SIZES = {"query_heads": 32, "kv_heads": 8, "H": 2, "F": 256, "A": 16, "D": 128, "W": 512, "R": 8}


def hollow(kind: type[Any]) -> Any:
    """Return weights that have shapes only."""
    shapes = {name: tuple(SIZES[axis] for axis in axes) for name, axes in kind.AXES.items()}
    return kind(**{name: StoredArray(shape=shape, data=array("f")) for name, shape in shapes.items()})


WEIGHTS = {AttentionGate: {"gates": [hollow(Gate)]}, LESS: {"kernels": [hollow(Kernel)]}}
# Costs nothing, so that a wrapper's cost is its own.
BASE = Random(budget=512)


def name_of(entry: Entry) -> str:
    """Return the class as a link."""
    return f"{{py:class}}`graphkv.{entry.policy.__name__}`"


def row(*cells: str) -> str:
    """Join the cells of one row."""
    return f"| {' | '.join(cells)} |"


def policies() -> str:
    """Render what each policy ranks by and protects, in Markdown."""
    lines = [row("policy", "`--policy`", "importance", "protects", "paper"), row(*["---"] * 5)]
    for entry in ENTRIES:
        command = f"`{'+' * entry.is_wrapper}{entry.name}`" if entry.name else "-"
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else "-"
        lines.append(row(name_of(entry), command, entry.importance, entry.protects, paper))
    return "\n".join(lines) + "\n"


def support() -> str:
    """Render what each policy needs and costs, in Markdown."""
    header = ("policy", "values", "queries", "memory", "couples", "extra MFLOP", "largest temporary")
    return "\n".join([row(*header), row(*["---"] * len(header)), *map(_support, ENTRIES)]) + "\n"


def systems() -> str:
    """Render which stages each policy defines, and what its values were checked against, in Markdown."""
    lines = [row("policy", "paper", "stages of its own", "needs", "checked against"), row(*["---"] * 5)]
    for entry in ENTRIES:
        own = [stage for stage in STAGES if getattr(entry.policy, stage) is not getattr(Policy, stage)]
        if entry.is_wrapper:
            own = [stage for stage in own if getattr(entry.policy, stage) is not getattr(Wrapper, stage)]
        needs = _needs(entry.policy.requirements)
        lines.append(
            row(
                name_of(entry),
                entry.paper or "-",
                ", ".join(f"`{stage}`" for stage in own) or "-",
                ", ".join(needs) or ("those of its base" if entry.is_wrapper else "keys"),
                entry.checked,
            )
        )
    return "\n".join(lines) + "\n"


def _needs(own: Requirements) -> list[str]:
    """List the fields that differ from those of a policy which needs nothing."""
    found = [field.name for field in fields(own) if getattr(own, field.name) != field.default]
    return [f"{name} ({own.queries})" if name == "queries" else name.replace("_", " ") for name in found]


def _support(entry: Entry) -> str:
    """Render one policy."""
    own: Requirements = entry.policy.requirements
    # Options that no policy has by default may hold other policies, whose costs are theirs.
    made: Policy | None = None
    weights = WEIGHTS.get(entry.policy, {})
    if weights or not (entry.holds_arrays or entry.needed(BASE)):
        made = entry.make(BASE if entry.is_wrapper else SHAPE.budget, **weights)
    cost = made.cost(SHAPE) if made else Cost()
    return row(
        name_of(entry) + " (adds)" * entry.is_wrapper,
        "yes" if own.values else "-",
        "probes" if own.probes else own.queries if own.queries != "none" else "-",
        "yes" if own.state else "-",
        "heads" if own.couples_heads else "layers" if own.wants else "-",
        f"{cost.flops / 1e6:.1f}" if cost.flops else "-",
        f"{cost.bytes / 1e6:.1f} MB" if cost.bytes else "-",
    )


if __name__ == "__main__":
    sys.exit(renew(PAGE, {"policies table": policies(), "support table": support(), "systems table": systems()}))
