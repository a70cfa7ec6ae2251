"""One color for each policy, in every picture of these pages: readable on white and on near-black, and by everybody."""

from __future__ import annotations

__all__ = ["BASE", "COLORS", "FAINT", "OTHER", "color"]

# Okabe and Ito's, darkened or lightened where they had too little contrast.
BASE, OTHER, FAINT = "#3d8fd1", "#8a8d93", "#c4c7cc"
COLORS = {
    "graphkv": "#d55e00",
    "degree": "#009e73",
    "pagerank": "#cc79a7",
    "keydiff": "#8a6fd0",
    "knorm": "#b08b00",
    "full": OTHER,
    "random": OTHER,
}


def color(policy: str) -> str:
    """Choose the color of a policy by its name on the command line; a wrapper goes before its base."""
    for part in reversed(policy.split("+")):
        if part in COLORS:
            return COLORS[part]
    return BASE
