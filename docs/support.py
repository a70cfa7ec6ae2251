"""Write the table of what each policy needs into policies.md, from what the classes declare.

``python docs/support.py`` rewrites the table between its two marks, ``--check`` only says whether it is current.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from marked import renew

import graphkv
from graphkv.core import Cost, LayerShape, Policy, Wrapper

PAGE = Path(__file__).parent / "policies.md"
SHAPE = LayerShape(num_tokens=8192, query_heads=32, kv_heads=8, head_size=128, budget=512)
# Fields without a default, beyond budget and base.
OPTIONS: dict[str, dict[str, Any]] = {
    "LayerBudgets": {"budgets": (512,)},
    "LayerShares": {"shares": (1,)},
    "PerLayer": {"policies": (graphkv.SnapKV(budget=512),)},
}


def policies() -> list[Policy]:
    """Return one value of every public policy but `Given`; wrappers are over SnapKV."""
    found = []
    for name in graphkv.__all__:
        kind = getattr(graphkv, name)
        if (
            not (isinstance(kind, type) and issubclass(kind, Policy))
            or inspect.isabstract(kind)
            or kind in (Wrapper, graphkv.Given)
        ):
            continue
        options = OPTIONS.get(name, {})
        make: Any = kind
        is_wrapper = issubclass(kind, Wrapper)
        found.append(make(graphkv.SnapKV(budget=512), **options) if is_wrapper else make(budget=512, **options))
    return found


def table() -> str:
    """Render the table in Markdown."""
    lines = [
        "| policy | values | queries | memory | couples | extra MFLOP | largest temporary |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for policy in policies():
        name, own = type(policy).__name__, policy.requirements
        over = isinstance(policy, Wrapper)
        cost, base = policy.cost(SHAPE), policy.base.cost(SHAPE) if over else Cost()
        # A wrapper's row shows what it adds to its base.
        flops, size = cost.flops - base.flops, cost.bytes if cost.bytes > base.bytes else 0
        cells = [
            f"{{py:class}}`graphkv.{name}`" + (" (adds)" if over else ""),
            "yes" if own.values else "-",
            own.queries if own.queries != "none" else "-",
            "yes" if own.state else "-",
            "heads" if own.couples_heads else "layers" if own.wants else "-",
            f"{flops / 1e6:.1f}" if flops else "-",
            f"{size / 2**20:.1f} MiB" if size else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the page, or check it."""
    return renew(PAGE, {"support table": table()})


if __name__ == "__main__":
    sys.exit(main())
