"""What each policy kept of the document, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .prompt import Prompt
from .result import Result

__all__ = ["draw"]

KEPT = LinearSegmentedColormap.from_list("kept", ["#f4f4f2", "#9ecae1", "#08519c"])
SUPPRESSED = "#e6550d"
FACT = "#238b45"
# One picture column per token would be finer than the paper; this many bins across are not.
BINS = 360


def draw(path: Path, results: list[Result], prompt: Prompt) -> None:
    """Draw one panel per policy, tokens from left to right and layers from top to bottom.

    Parameters
    ----------
    path : pathlib.Path
        Where the PNG goes.
    results : list of Result
    prompt : Prompt
    """
    num_layers, _, num_tokens = results[0].kept.shape
    figure = Figure(figsize=(11, 0.9 + 1.55 * len(results)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.linspace(0, num_tokens, min(BINS, num_tokens) + 1).astype(int)
    for panel, result in zip(panels, results, strict=True):
        image = panel.imshow(
            _binned(result.kept, edges),
            cmap=KEPT,
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
            extent=(0, num_tokens, num_layers - 0.5, -0.5),
        )
        share = _binned(result.suppressed, edges)
        if share.any():
            # One layer of solid color whose opacity is the share of suppressed tokens.
            opacity = np.clip(0.35 + 0.65 * share / share.max(), 0, 1) * (share > 0)
            panel.imshow(
                np.ones_like(share),
                cmap=ListedColormap([SUPPRESSED]),
                alpha=opacity,
                aspect="auto",
                interpolation="nearest",
                extent=(0, num_tokens, num_layers - 0.5, -0.5),
            )
        least, most = min(result.tokens_kept_per_layer), max(result.tokens_kept_per_layer)
        count = f"{least}" if least == most else f"{least} to {most}"
        dropped = int(result.suppressed.sum())
        more = f", {dropped} choices suppressed by the graph" if dropped else ""
        panel.set_title(f"{result.policy}: {count} of {num_tokens} tokens per layer{more}", loc="left", fontsize=9)
        panel.set_ylabel("layer", fontsize=8)
        panel.tick_params(labelsize=7)
        if prompt.fact is not None:
            for position in prompt.fact:
                panel.axvline(position, color=FACT, linewidth=0.8)
    panels[-1].set_xlabel("position in the prompt (tokens)", fontsize=8)
    bar = figure.colorbar(image, ax=list(panels), shrink=min(1.0, 2 / len(results)), pad=0.01)
    bar.set_label("share of KV heads that kept the token", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    legend: list[Any] = []
    if any(result.suppressed.any() for result in results):
        legend.append(Patch(color=SUPPRESSED, label="suppressed: the base alone would have kept it"))
    if prompt.fact is not None:
        legend.append(Line2D([], [], color=FACT, label="the fact"))
    if legend:
        figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _binned(mask: Any, edges: Any) -> Any:
    """Average a (layers, heads, N) mask over heads and over the tokens of each bin."""
    return np.add.reduceat(mask.mean(axis=1), edges[:-1], axis=-1) / np.diff(edges)
