"""The command ``graphkv report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.errors import ArgumentError
from ...core.files import Content
from ...workbench.files import check_folder, write_files
from ..records import RECORDS, read_records
from ..shards import merge_runs, merged_files
from .page import make_page
from .sections import make_report

__all__ = ["main"]


def main(folders: Sequence[Path], *, output: Path | None, metrics: Sequence[str] = (), effect: float = 0.1) -> None:
    """Write the report of a run, or of several of the same settings.

    Parameters
    ----------
    folders : sequence of pathlib.Path
        Folders of runs, finished or not.
    output : pathlib.Path or None
        Folder for ``report.md``, ``report.html`` and ``figures``, and of several runs for all their records. None:
        ``report`` in the folder of the run.
    metrics : sequence of str
        Metrics to report, see `METRICS`. Default: NLL, and scores or right answers.
    effect : float
        Difference to compute the number of prompts needed for.

    Raises
    ------
    ArgumentError
        If the runs do not belong together, or the folder holds other records.
    """
    if output is None and len(folders) > 1:
        raise ArgumentError(
            f"--output must be given for a report of several runs; got {len(folders)} runs and no folder"
        )
    output = output or folders[0] / "report"
    check_folder(output)
    records, header = merge_runs(folders)
    markdown, pictures = make_report(records, header, metrics=metrics, effect=effect)
    files: dict[str, Content] = {**pictures, "report.md": markdown, "report.html": make_page(markdown, pictures)}
    if len(folders) > 1:
        if (output / RECORDS).exists() and not set(read_records(output)) <= set(records):
            raise ArgumentError(f"--output {output} must hold no other run; it has records that are in none of these")
        files |= merged_files(records, header)
    write_files(output, files)
    print(f"Markdown: {output / 'report.md'}\nPage:     {output / 'report.html'}")
