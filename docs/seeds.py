"""Check the numbers of seeds in README.md and in the quickstart against results/seeds.json.

``python docs/seeds.py FOLDER`` writes that file: from the runs ``graphkv demo --seed N --output FOLDER/N`` for N from 0
to 9, and from the quickstart's script, which it runs with the same seeds. ``--check`` only compares: it needs no model.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from claims import missing

DOCS = Path(__file__).parent
README, QUICKSTART = DOCS.parent / "README.md", DOCS / "guide" / "quickstart.md"
FOUND = DOCS / "results" / "seeds.json"
SEEDS = range(10)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHOWN = {
    "full": "the full cache",
    "random": "random",
    "snapkv": "`snapkv`",
    "snapkv+degree(fusion=max_rank,unrotated=True)": "`snapkv+degree(fusion=max_rank,unrotated=True)` (recommended)",
    "snapkv+graphkv": "`snapkv+graphkv` (the paper)",
    "snapkv+degree": "`snapkv+degree` (ours)",
    "knorm": "`knorm`",
    "knorm+graphkv": "`knorm+graphkv` (the paper)",
    "knorm+degree": "`knorm+degree` (ours)",
}
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "all")
KEPT = ("policy", "answer", "answer_is_correct", "expected_answer_nll")


def pack(folder: Path) -> dict[str, Any]:
    """Return what the runs found, without what differs from machine to machine."""
    reports = [json.loads((folder / str(seed) / "report.json").read_text(encoding="utf-8")) for seed in SEEDS]
    demo = [
        [
            {
                **{name: part[name] for name in ("title", "cached_tokens", "budget", "must_contain")},
                "results": [{name: result[name] for name in KEPT} for result in part["results"]],
            }
            for part in report["parts"]
        ]
        for report in reports
    ]
    return {"versions": reports[0]["versions"], "demo": demo, "quickstart": [quickstart(seed) for seed in SEEDS]}


def quickstart(seed: int) -> dict[str, str]:
    """Run the script of the quickstart with a seed; return the answer by the name of the cache."""
    (script, *_) = re.findall(
        r"^```python\n(.*?)^```", QUICKSTART.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    model = import_module("graphkv.workbench.model")._converted_default(print)
    script = script.replace(HUB_ID, str(model)).replace("random.Random(1)", f"random.Random({seed})")
    printed = StringIO()
    with redirect_stdout(printed):
        exec(script, {"__name__": "quickstart"})
    lines = [line.split(": ", 1) for line in printed.getvalue().splitlines() if re.match(r" *[A-Za-z ]+: ", line)]
    return {name.strip(): answer for name, answer in lines}


def rows(demo: list[list[dict[str, Any]]]) -> Iterable[str]:
    """Make the rows of the table in README.md."""
    parts = list(zip(*demo, strict=True))
    smaller = [sum(part["cached_tokens"] / part["budget"] for part in seeds) / len(seeds) for seeds in parts]
    yield "| | log, {:.1f} times smaller | running text, {:.1f} times smaller |".format(*smaller)
    for place, result in enumerate(demo[0][0]["results"]):
        cells = []
        for seeds in parts:
            found = [part["results"][place] for part in seeds]
            nll = sum(each["expected_answer_nll"] for each in found) / len(found)
            cells.append(f"{sum(each['answer_is_correct'] for each in found)}, {nll:.2f}")
        yield f"| {' | '.join([SHOWN[result['policy']], *cells])} |"


def sentence(found: list[dict[str, str]]) -> str:
    """Make the sentence of the quickstart."""
    right = {name: WORDS[sum("Harbor Street" in answers[name] for answers in found)] for name in found[0]}
    return (
        f"With the seeds 0 to 9 in the script, the full cache was right for {right['everything']}, ours for "
        f"{right['ours']}, SnapKV for {right['SnapKV']} and the paper's method for {right['the paper']}."
    )


def main() -> int:
    """Write the file if there are runs; return how many rows and sentences are not those of the file."""
    if sys.argv[1:] not in ([], ["--check"]):
        FOUND.write_text(json.dumps(pack(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    said = ((README, list(rows(found["demo"]))), (QUICKSTART, [sentence(found["quickstart"])]))
    wrong = [(page.name, line) for page, lines in said for line in missing(page.read_text(encoding="utf-8"), lines)]
    for page, line in wrong:
        print(f"{page} does not say what {FOUND.name} says: {line}")
    return min(1, len(wrong))


if __name__ == "__main__":
    sys.exit(main())
