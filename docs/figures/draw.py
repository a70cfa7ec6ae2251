"""Draw the worked example of the specification, step by step; with ``--check``, only say whether it is up to date.

Plain SVG text, so that the same numbers give the same bytes with every version of every library.
"""

from __future__ import annotations

import argparse
import sys
from math import sqrt
from pathlib import Path

import numpy as np

from graphkv import build_graph, propagate, select

HERE = Path(__file__).parent
WIDTH, LEFT, STEP, BAR = 600, 54, 82, 46
SOURCE, NEIGHBOR, OTHER, KEPT, FAINT, INK = "#c2410c", "#2563eb", "#94a3b8", "#15803d", "#cbd5e1", "#0f172a"
DARK = (
    f'@media(prefers-color-scheme:dark){{[fill="{INK}"]{{fill:#e6e6e3}}[stroke="{INK}"]{{stroke:#e6e6e3}}'
    'rect[fill="#ffffff"]{fill:#131416}}'
)

IMPORTANCE = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]
TO_4 = [0.10, 0.21, 0.16, 1.0, 0.40, 0.50, 0.0]
TO_7 = [0.05, 0.03, 0.70, 0.0, 0.23, 0.60, 1.0]


def keys() -> np.ndarray:
    """Return keys of length one with the similarities of the paper's figure: (to token 4, to token 7, the rest)."""
    return np.asarray([[a, b, sqrt(max(0.0, 1 - a * a - b * b))] for a, b in zip(TO_4, TO_7, strict=True)])


def picture(title: str, height: int, body: list[str]) -> str:
    """Put shapes together; ink, and the paper behind labels, follow a light or a dark screen."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="17" fill="{INK}" text-anchor="middle">'
    )
    return "\n".join([head, f"<title>{title}</title>", f"<style>{DARK}</style>", *body, "</svg>"]) + "\n"


def words(x: float, y: float, text: str, **style: str) -> str:
    """Write a text."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{text}</text>'


def middle(token: int) -> float:
    """Return the x of a token."""
    return LEFT + STEP * token


def bars(scores: list[float], colors: list[str], floor: int, *, ghosts: list[float] | None = None) -> list[str]:
    """Draw a bar per token with its score above; a ghost shows the score before."""
    shapes = [f'<line x1="14" y1="{floor}" x2="{WIDTH - 14}" y2="{floor}" stroke="{INK}"/>']
    for token, (score, color) in enumerate(zip(scores, colors, strict=True)):
        x, top = middle(token) - BAR / 2, floor - 110 * score
        tallest = top
        if ghosts is not None and ghosts[token] != score:
            tallest = floor - 110 * ghosts[token]
            shapes.append(
                f'<rect x="{x:.1f}" y="{tallest:.1f}" width="{BAR}" height="{110 * ghosts[token]:.1f}" '
                f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="5 4"/>'
            )
        shapes.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{BAR}" height="{110 * score:.1f}" fill="{color}"/>')
        shapes.append(words(middle(token), tallest - 8, f"{score:.2g}"))
        shapes.append(words(middle(token), floor + 22, str(token + 1), font_weight="bold"))
    return shapes


def base(kept: list[int]) -> str:
    """Show the base scores and what they alone would keep."""
    colors = [KEPT if token in kept else OTHER for token in range(7)]
    body = bars(IMPORTANCE, colors, 190)
    body += [words(middle(token), 236, "kept", fill=KEPT) for token in kept]
    return picture("Base scores of the seven tokens; alone they keep tokens 4, 6 and 7", 254, body)


def graph(sources: list[int], edges: dict[tuple[int, int], float]) -> str:
    """Show every similarity of a source, the active edges in bold."""
    body, floor = [], 150
    for source, weights, side in ((sources[0], TO_4, -1), (sources[1], TO_7, 1)):
        for token, weight in enumerate(weights):
            if token in sources:
                continue
            active = (source, token) in edges
            reach = 26 + 30 * abs(source - token)
            y0 = floor + side * 20
            bend = y0 + side * reach
            stroke, wide = (SOURCE, 3) if active else (FAINT, 1.5)
            body.append(
                f'<path d="M {middle(source):.1f} {y0} Q {(middle(source) + middle(token)) / 2:.1f} {bend + side * 22} '
                f'{middle(token):.1f} {y0}" fill="none" stroke="{stroke}" stroke-width="{wide}"/>'
            )
            at = (middle(token) + middle(source)) / 2
            label = y0 + side * (reach + 22) / 2 + 5
            if active:
                body.append(
                    f'<rect x="{at - 19:.1f}" y="{label - 16:.1f}" width="38" height="21" rx="4" fill="#ffffff"/>'
                )
                body.append(words(at, label, f"{weight:.2f}", fill=SOURCE, font_weight="bold"))
    body.sort(key=lambda shape: (not shape.startswith("<path"), SOURCE in shape and shape.startswith("<path")))
    reached = {token for _, token in edges}
    for token in range(7):
        color = SOURCE if token in sources else NEIGHBOR if token in reached else OTHER
        body.append(f'<circle cx="{middle(token):.1f}" cy="{floor}" r="20" fill="{color}"/>')
        body.append(words(middle(token), floor + 6, str(token + 1), fill="#ffffff", font_weight="bold"))
    body.append(words(20, 32, "edges of source 4 above", text_anchor="start"))
    body.append(words(20, 318, "edges of source 7 below", text_anchor="start"))
    return picture("Sources 4 and 7; each has its two most similar tokens as neighbors", 336, body)


def decayed(scores: list[float], factors: dict[int, str]) -> str:
    """Show the scores before (dashed) and after."""
    colors = [SOURCE if token in (3, 6) else NEIGHBOR if token in factors else OTHER for token in range(7)]
    body = bars(scores, colors, 190, ghosts=IMPORTANCE)
    body += [words(middle(token), 236, text, fill=NEIGHBOR, font_size="15") for token, text in factors.items()]
    return picture("Scores after one round by product; dashed: before", 254, body)


def chosen(scores: list[float], kept: list[int]) -> str:
    """Show what the budget of three keeps."""
    body = bars(scores, [KEPT if token in kept else OTHER for token in range(7)], 190)
    body += [words(middle(token), 236, "kept", fill=KEPT) for token in kept]
    return picture("The three highest scores after propagation: tokens 2, 4 and 7", 254, body)


def pictures() -> dict[str, str]:
    """Work the example and draw it."""
    importance = np.asarray(IMPORTANCE)
    found = build_graph(keys(), importance, num_sources=2, num_neighbors=2)
    scores = propagate(importance, found)
    weight = {
        (int(source), int(token)): float(w)
        for source, tokens, weights in zip(found.sources, found.neighbors, found.weights, strict=True)
        for token, w in zip(tokens, weights, strict=True)
    }
    factors: dict[int, str] = {}
    for (_, token), w in sorted(weight.items()):
        factors[token] = factors.get(token, "") + f"\N{MULTIPLICATION SIGN}{1 - w:.1f}"
    return {
        "step-0-base": base(select(importance, 3).tolist()),
        "step-1-graph": graph(found.sources.tolist(), weight),
        "step-2-propagate": decayed(scores.tolist(), factors),
        "step-3-select": chosen(scores.tolist(), select(scores, 3).tolist()),
    }


def main() -> int:
    """Write the pictures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a picture is out of date")
    check = parser.parse_args().check
    stale = []
    for name, svg in pictures().items():
        path = HERE / f"{name}.svg"
        if not check:
            path.write_text(svg, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != svg:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python docs/figures/draw.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
