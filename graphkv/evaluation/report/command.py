"""The command ``graphkv report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...workbench.files import check_folder, write_files
from ..records import read_header, read_records
from .page import make_page
from .sections import make_report

__all__ = ["main"]


def main(folder: Path, *, output: Path | None, metrics: Sequence[str] = (), effect: float = 0.1) -> None:
    """Write the report of a run.

    Parameters
    ----------
    folder : pathlib.Path
        Folder of the run, finished or not.
    output : pathlib.Path or None
        Folder for ``report.md``, ``report.html`` and ``figures``. None: ``report`` in `folder`.
    metrics : sequence of str
        Metrics to report, see `METRICS`. Default: NLL, and scores or right answers.
    effect : float
        Difference to compute the number of prompts needed for.
    """
    output = output or folder / "report"
    check_folder(output)
    markdown, pictures = make_report(read_records(folder), read_header(folder), metrics=metrics, effect=effect)
    write_files(output, {**pictures, "report.md": markdown, "report.html": make_page(markdown, pictures)})
    print(f"Markdown: {output / 'report.md'}\nPage:     {output / 'report.html'}")
