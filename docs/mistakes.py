"""Write the table of what a wrong argument raises into porting.md, and say which rows have golden vectors.

``python docs/mistakes.py`` rewrites the table between its marks, ``--check`` only says whether it is current.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marked import renew

__all__ = ["ROWS"]

PAGE = Path(__file__).parent / "porting.md"
CASES = Path(__file__).parent / "vectors" / "errors.json"
VALUE, TYPE, LIBRARY = "`ArgumentError`", "`ArgumentTypeError`", "`BackendError`"
# Argument, what is wrong with it, what is raised, and the cases that show it.
ROWS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "`num_sources`, `num_neighbors`, `rounds`, `budget` of `select`, `layer`, sizes of policies",
        "below 0, or `layer` not below `num_layers`",
        VALUE,
        (
            "negative_sources",
            "negative_neighbors",
            "negative_rounds",
            "negative_rounds_of_pagerank",
            "negative_budget",
            "layer_out_of_range",
        ),
    ),
    (
        "`chunk_size`, `exponent`, `window`",
        "below 1, also where the fusion ranks",
        VALUE,
        ("chunk_0", "exponent_0", "exponent_0_of_ranks"),
    ),
    (
        "all of these",
        "not an integer: 2.0, a bool, a word",
        TYPE,
        ("float_sources", "float_rounds", "float_budget_in_select", "float_exponent"),
    ),
    (
        "`strength`, `damping`",
        "outside of [0, 1], or NaN",
        VALUE,
        ("strength_above_1", "strength_nan", "damping_above_1"),
    ),
    ("`strength`, `damping`", "no real number", TYPE, ("damping_of_a_word",)),
    (
        "`budget` of a policy",
        "below 0; as a share, 0.0 or above 1",
        VALUE,
        ("share_above_1", "share_0"),
    ),
    ("`budget` of a policy, `source_ratio`, `neighbors`", "neither an integer nor a float", TYPE, ()),
    (
        "`signal`, `accumulation`, `fusion`, `pooling` and other words",
        "not one of those allowed, a number too",
        VALUE,
        ("unknown_signal", "unknown_accumulation", "unknown_fusion"),
    ),
    (
        '`rounds` with `accumulation` `"sum"`',
        "not 1",
        VALUE,
        (
            "iterated_sum",
            "iterated_sum_evict",
            "iterated_sum_without_strength",
            "sum_without_rounds",
            "sum_without_rounds_evict",
        ),
    ),
    ("`exponent` of a fusion that ranks, in a policy", "given", VALUE, ("exponent_of_ranks",)),
    (
        "arrays",
        "shapes that disagree in any axis: nothing is broadcast; no axis at all",
        VALUE,
        (
            "another_n",
            "graph_does_not_broadcast",
            "another_mask",
            "no_axis",
            "mask_does_not_broadcast",
            "another_n_of_importance",
            "mask_of_keys",
            "keys_without_tokens",
            "another_n_of_degrees",
            "another_n_of_keys",
            "mask_of_another_n",
        ),
    ),
    ("scores, importance, keys", "bool or complex", TYPE, ("bool_importance", "bool_scores")),
    ("`valid`, `protected`", "not bool", TYPE, ("mask_of_numbers",)),
    ("arrays", "of two libraries, or of none", LIBRARY, ()),
)


def cases() -> Mapping[str, Any]:
    """Read the golden vectors of errors, by name."""
    return {case["name"]: case for case in json.loads(CASES.read_text(encoding="utf-8"))["cases"]}


def table() -> str:
    """Render the table; a case that is in no row, or in a row of another error, is a mistake here."""
    left = dict(cases())
    lines = ["| argument | wrong is | raises | in `errors.json` |", "| --- | --- | --- | --- |"]
    for argument, wrong, error, names in ROWS:
        for name in names:
            if f"`{left.pop(name)['expected']['error']}`" != error:
                raise ValueError(f"{name} does not raise {error}")
        lines.append(f"| {argument} | {wrong} | {error} | {f'{len(names)} cases' if names else '-'} |")
    if left:
        raise ValueError(f"cases in no row: {', '.join(left)}")
    return "\n".join(lines).replace(" 1 cases ", " 1 case ") + "\n"


if __name__ == "__main__":
    sys.exit(renew(PAGE, {"mistakes": table()}))
