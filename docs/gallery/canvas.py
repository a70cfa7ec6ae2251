"""Pictures as plain SVG text: the same numbers give the same bytes, and colors follow a light or a dark screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from palette import BASE, FAINT, OTHER, color

__all__ = ["BASE", "FAINT", "OTHER", "Picture", "color", "main"]

STYLE = (
    "text{fill:#1b1d21}.soft{fill:#5c6068}.line{stroke:#8a8d93}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e3}.soft{fill:#a3a7ad}}"
)


class Picture:
    """Shapes that are added one by one.

    Parameters
    ----------
    width, height : int
    title : str
        For readers who cannot see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
        ]

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, soft: bool = False) -> None:
        """Write a line of text."""
        kind = ' class="soft"' if soft else ""
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{kind}>{escape(text)}</text>'
        )

    def rect(self, x: float, y: float, width: float, height: float, fill: str, *, opacity: float = 1) -> None:
        """Draw a box."""
        seen = "" if opacity == 1 else f' opacity="{opacity:.2f}"'
        self.shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{seen}/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str, *, filled: bool = True) -> None:
        """Draw a dot or a ring."""
        look = f'fill="{fill}"' if filled else f'fill="none" stroke="{fill}" stroke-width="1.2"'
        self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {look}/>')

    def line(self, points: Sequence[tuple[float, float]], stroke: str, *, width: float = 2, dash: str = "") -> None:
        """Draw straight lines from point to point."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashed}/>')

    def svg(self) -> str:
        """Return the finished picture."""
        return "\n".join([*self.shapes, "</svg>"]) + "\n"


def main(draw: Callable[[], Picture], script: str) -> None:
    """Write a picture beside its script."""
    path = Path(script).with_suffix(".svg")
    path.write_text(draw().svg(), encoding="utf-8")
    print(f"wrote {path.name}")
