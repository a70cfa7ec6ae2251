"""Tables between marks on a page, for the scripts beside it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["renew"]


def renew(page: Path, tables: Mapping[str, str], /) -> int:
    """Rewrite the tables of a page between ``% name: begin`` and ``% name: end``; with ``--check``, only compare.

    Parameters
    ----------
    page : Path
    tables : mapping of str to str
        Markdown by name.

    Returns
    -------
    int
        1 if the page was to be checked and is not current, else 0.
    """
    text = current = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"% {name}: begin\n", f"% {name}: end\n"
        head, rest = current.split(begin)
        _, tail = rest.split(end)
        current = f"{head}{begin}\n{table}\n{end}{tail}"
    if "--check" not in sys.argv:
        page.write_text(current, encoding="utf-8")
        return 0
    if current != text:
        print(f"{page.name} is not current: run python docs/{Path(sys.argv[0]).name}")
    return int(current != text)
