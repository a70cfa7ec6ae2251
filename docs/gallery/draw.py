"""Draw every picture of the gallery; with ``--check``, only say whether they are up to date."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
EXAMPLES = ("duplicates", "policies", "signals", "layers", "heads", "batch", "memory", "budgets")


def main() -> int:
    """Write the pictures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a picture is out of date")
    check = parser.parse_args().check
    warnings.simplefilter("ignore")
    stale = []
    for name in EXAMPLES:
        path = HERE / f"{name}.svg"
        svg = importlib.import_module(name).draw().svg()
        if not check:
            path.write_text(svg, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != svg:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/gallery/draw.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
