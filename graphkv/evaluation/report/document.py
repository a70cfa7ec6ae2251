"""A Markdown document with figures, under construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Document"]


@dataclass
class Document:
    """A Markdown document that grows.

    Attributes
    ----------
    lines : list of str
    pictures : dict of str to bytes
        By their paths in the document.
    """

    lines: list[str] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def heading(self, level: int, text: str) -> None:
        """Begin a section."""
        self.lines += [f"{'#' * level} {text}", ""]

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]

    def table(self, names: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
        """Add a table whose first columns hold words, the others numbers."""
        self.lines.append(_row(names))
        self.lines.append(_row([*("---" for _ in names[:words]), *("---:" for _ in names[words:])]))
        self.lines += [_row(row) for row in rows]
        self.lines.append("")

    def figures(self, drawn: Iterable[tuple[str, str, Callable[[], bytes]]]) -> None:
        """Add figures, each with what it shows, how to read it, and a function that draws it.

        What it shows is its description too, for readers who do not see it; both stand below it as its caption.
        """
        for title, reading, draw in drawn:
            number = len(self.pictures) + 1
            path = f"figures/{number:03d}.svg"
            self.pictures[path] = draw()
            self.text(f"![{title}]({path})\n*Figure {number}. {title}. {reading}*")

    def markdown(self) -> str:
        """Return the whole."""
        return "\n".join(self.lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
