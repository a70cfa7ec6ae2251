"""Write the tables of models.md from models.json, which the sweep of tests/models writes.

``python docs/models.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from marked import renew

HERE = Path(__file__).parent
STORED = json.loads((HERE / "models.json").read_text(encoding="utf-8"))
MORE = " with a picture or sound"
WORDS = {
    "EQUAL": "equal",
    "REFUSED": "refused",
    "WARNED": "not evicted, said",
    "NOT OFFERED": "-",
    "PLAIN FAILS": "does not run",
    "PLAIN DIFFERS": "equal to one pass",
    "WRONG": "**wrong**",
    "CRASH": "**crash**",
    "NOTHING": "**nothing**",
    "NO REFERENCE": "**not checked**",
}
Row = dict[str, str]


def split(cell: str) -> tuple[str, str]:
    """Part a cell into its result and its reason."""
    result, _, reason = cell.partition(": ")
    return result, reason


def reasons() -> list[str]:
    """Return all reasons of all releases, the most frequent first; models call themselves by name in some."""
    found: Counter[str] = Counter()
    for rows in STORED.values():
        for model, row in rows.items():
            found.update(reason_of(model, cell) for cell in (row or {}).values() if split(cell)[1])
    return [reason for reason, _ in sorted(found.items(), key=lambda each: (-each[1], each[0])) if reason]


def reason_of(model: str, cell: str) -> str:
    """Return the reason of a cell, without names that are the model's own."""
    result, reason = split(cell)
    reason = reason.replace(model.split(" ")[1], "the model")
    reason = re.sub(r"the attention of \w+", "its attention", reason)
    reason = re.sub(r"\b[A-Z]\w*(Attention|MLA)\b", "its attention", reason)
    reason = re.sub(r"one of its own, \w+", "one of its own", reason)
    return reason if result in WORDS else ""


def shown(model: str, row: Row, end: str, numbers: dict[str, int]) -> str:
    """Put the cells of one kind of input into words, both implementations in one where they agree."""
    words = {}
    for implementation in ("sdpa", "eager", "-"):
        cell = row.get(implementation if implementation == "-" else implementation + end)
        if cell is None or (implementation == "-" and end):
            continue
        number = numbers.get(reason_of(model, cell))
        words[implementation] = WORDS[split(cell)[0]] + (f" [{number}]" if number else "")
    words = {implementation: text for implementation, text in words.items() if text != "-"}
    if len(words) == 2 and len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(text if name == "-" else f"{name}: {text}" for name, text in words.items())


def table(numbers: dict[str, int]) -> str:
    """Render the rows of the newest release."""
    lines = ["| model | type | layers | text | with a picture or sound |", "| --- | --- | --- | --- | --- |"]
    for model, row in next(iter(STORED.values())).items():
        model_type, name = model.split(" ")
        cells = [name, model_type, row["layers"], *(shown(model, row, end, numbers) for end in ("", MORE))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def others(numbers: dict[str, int]) -> str:
    """Render what differs in other releases."""
    newest = next(iter(STORED.values()))
    lines = ["| release | model | type | text | with a picture or sound |", "| --- | --- | --- | --- | --- |"]
    for number, rows in list(STORED.items())[1:]:
        for model, row in rows.items():
            if row and {**row, "layers": ""} != {**newest.get(model, {}), "layers": ""}:
                model_type, name = model.split(" ")
                cells = [number, name, model_type, *(shown(model, row, end, numbers) for end in ("", MORE))]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def counts() -> str:
    """Count results by release; a model counts once, by its worst result with text."""
    order = list(WORDS)
    lines = [
        "| release | models | " + " | ".join(WORDS[each].strip("*") for each in order if each != "NOT OFFERED") + " |"
    ]
    lines.append("| --- " * (len(order) + 1) + "|")
    newest = next(iter(STORED.values()))
    for number, rows in STORED.items():
        found = Counter(worst(row) for row in {**newest, **rows}.values() if row)
        cells = [str(found[each]) for each in order if each != "NOT OFFERED"]
        lines.append(f"| {number} | {found.total()} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def worst(row: Row) -> str:
    """Return the result of a row that comes last in the order of `WORDS`, apart from what is not offered."""
    results = [split(cell)[0] for name, cell in row.items() if name != "layers"]
    return max((each for each in results if each != "NOT OFFERED"), key=list(WORDS).index)


def listed(numbers: dict[str, int]) -> str:
    """Render the reasons."""
    return "\n".join(f"- [{number}] `{reason}`" for reason, number in numbers.items()) + "\n"


def main() -> int:
    """Rewrite the page, or check it."""
    numbers = {reason: number for number, reason in enumerate(reasons(), 1)}
    tables = {
        "counts": counts(),
        "models": table(numbers),
        "other releases": others(numbers),
        "reasons": listed(numbers),
    }
    return renew(HERE / "models.md", tables)


if __name__ == "__main__":
    sys.exit(main())
