"""Pictures of what was kept of a prompt, layer by layer."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..integrations.transformers import Fate
from ..naming.names import FULL
from .findings import Findings
from .result import Part

__all__ = ["draw", "draw_findings"]

KEPT = LinearSegmentedColormap.from_list("kept", ["#f4f4f2", "#9ecae1", "#08519c"])
SINKING = LinearSegmentedColormap.from_list("suppressed", ["#f4f4f2", "#fdae6b", "#e6550d", "#7f2704"])
SUPPRESSED = "#e6550d"
FACT = "#238b45"
BLUE, DROPPED = "#08519c", "#a3a8b0"
DPI = 150
# One picture column per token would be finer than the paper; this many bins across are not.
BINS = 360


def draw(path: Path, part: Part) -> None:
    """Draw one panel per policy that evicts, tokens from left to right and layers from top to bottom.

    Parameters
    ----------
    path : pathlib.Path
        Where the PNG goes.
    part : Part
    """
    results = [result for result in part.results if result.policy != FULL] or part.results
    num_tokens = results[0].kept.shape[-1]
    figure = Figure(figsize=(11, 1.7 + 1.55 * len(results)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        image = _draw_share(panel, _binned(result.kept), result.kept.shape, cmap=KEPT, vmin=0, vmax=1)
        least, most = min(result.tokens_kept_per_layer), max(result.tokens_kept_per_layer)
        count = f"{least}" if least == most else f"{least} to {most}"
        right = {None: "", True: ", answers right", False: ", answers wrong"}[result.answer_is_correct]
        nll = "" if result.expected_answer_nll is None else f"; NLL {result.expected_answer_nll:.2f}"
        panel.set_title(
            f"{result.policy}: {count} of {num_tokens:,} tokens per layer{right}{nll}", loc="left", fontsize=9
        )
        _mark(panel, part.prompt.fact)
    panels[-1].set_xlabel("position in the prompt (tokens)", fontsize=8)
    _add_bar(figure, image, list(panels), min(1.0, 2 / len(results)), "share of KV heads that kept the token")
    legend: list[Any] = [Patch(facecolor=KEPT(1.0), label="kept"), Patch(facecolor=KEPT(0.0), label="dropped")]
    if part.prompt.fact is not None:
        legend.append(Line2D([], [], color=FACT, label="begin and end of the fact that is asked for"))
    figure.legend(handles=legend, loc="outside lower left", ncols=len(legend), fontsize=8, frameon=False)
    question = textwrap.shorten(part.prompt.question, 90, placeholder=" ...")
    figure.suptitle(
        f"Which tokens each policy kept of {part.title}, layer by layer\n{question}", x=0.01, ha="left", fontsize=10
    )
    figure.savefig(path, format="png")


def draw_findings(path: Path, findings: Findings) -> None:
    """Draw what one policy did: maps of kept and suppressed tokens; then redundancy, counts per head, and scores.

    Parameters
    ----------
    path : pathlib.Path
        Where the PNG goes, 1800 x 1500 pixels.
    findings : Findings
    """
    figure = Figure(figsize=(12, 10), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.15))
    shape, kept, suppressed = findings.fates.shape, findings.fates >= Fate.KEPT, findings.fates == Fate.SUPPRESSED
    for place, (mask, colors, name) in enumerate(
        (
            (kept, KEPT, f"{findings.title}: kept of {shape[-1]:,} tokens"),
            (suppressed, SINKING, f"suppressed, {suppressed.sum():,} times: the importance alone would have kept it"),
        )
    ):
        panel = figure.add_subplot(grid[place, :])
        share = _binned(mask)
        # Few tokens are suppressed: their map has a scale of its own.
        most = 1.0 if mask is kept else max(float(share.max()), 1 / shape[1])
        image = _draw_share(panel, share, shape, cmap=colors, vmin=0, vmax=most)
        panel.set_title(name, loc="left", fontsize=10)
        _mark(panel, findings.fact)
        _add_bar(figure, image, [panel], 1.0, "share of KV heads")
    panel.set_xlabel("position in the prompt (tokens)", fontsize=8)
    if findings.fact is not None:
        fact = [Line2D([], [], color=FACT, label="the fact")]
        figure.legend(handles=fact, loc="outside upper right", fontsize=8, frameon=False)
    _draw_redundancy(figure.add_subplot(grid[2, 0]), findings)
    _draw_counts(figure.add_subplot(grid[2, 1]), kept, suppressed)
    _draw_scores(figure.add_subplot(grid[2, 2]), findings)
    figure.savefig(path, format="png")


def _draw_share(panel: Any, share: Any, shape: tuple[int, int, int], **options: Any) -> Any:
    """Draw a share per layer and bin, from masks of shape (layers, heads, N); return the image."""
    num_layers, _, num_tokens = shape
    panel.set_ylabel("layer", fontsize=8)
    panel.tick_params(labelsize=7)
    extent = (0, num_tokens, num_layers - 0.5, -0.5)
    return panel.imshow(share, aspect="auto", interpolation="nearest", extent=extent, **options)


def _mark(panel: Any, fact: tuple[int, int] | None) -> None:
    for position in fact or ():
        panel.axvline(position, color=FACT, linewidth=0.8)


def _add_bar(figure: Any, image: Any, panels: list[Any], shrink: float, label: str) -> None:
    bar = figure.colorbar(image, ax=panels, shrink=shrink, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_redundancy(panel: Any, findings: Findings) -> None:
    """Draw each layer's mean cosine before and after: an open and a full dot, with a line between them."""
    before, after = findings.redundancy.T
    layers = np.arange(len(before))
    panel.vlines(layers, before, after, color=DROPPED, linewidth=1.2)
    panel.plot(layers, before, "o", color=BLUE, markerfacecolor="white", markersize=5, label="before")
    panel.plot(layers, after, "o", color=BLUE, markersize=5, label="after")
    _label(panel, "redundancy of the keys", "layer", "mean cosine of two keys")


def _draw_counts(panel: Any, kept: Any, suppressed: Any) -> None:
    """Draw how many tokens each head of each layer kept and suppressed."""
    for counts, mark, color, name in (
        (kept.sum(axis=-1), "_", BLUE, "kept"),
        (suppressed.sum(axis=-1), "x", SUPPRESSED, "suppressed"),
    ):
        layers = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
        panel.plot(layers.ravel(), counts.ravel(), mark, color=color, markersize=5, label=name)
    panel.set_ylim(bottom=0)
    _label(panel, "tokens per head, a mark each", "layer", "tokens")


def _draw_scores(panel: Any, findings: Findings) -> None:
    """Draw the scores of one head over its importance; on the diagonal the graph changed nothing."""
    layer, head = findings.chosen
    before, after = findings.importance[layer, head], findings.scores[layer, head]
    fates, is_drawn = findings.fates[layer, head], findings.competes[layer, head] & np.isfinite(before + after)
    if is_drawn.any() and (before[is_drawn] > 0).all() and (after[is_drawn] > 0).all():
        panel.set_xscale("log")
        panel.set_yscale("log")
    for fate, mark, color, name in (
        (Fate.DROPPED, ".", DROPPED, "dropped"),
        (Fate.KEPT, "o", BLUE, "kept"),
        (Fate.SUPPRESSED, "x", SUPPRESSED, "suppressed"),
    ):
        chosen = is_drawn & (fates == fate)
        panel.plot(before[chosen], after[chosen], mark, color=color, markersize=4, label=name, alpha=0.8)
    stays = is_drawn & (fates == Fate.KEPT)
    if stays.any():
        panel.axhline(after[stays].min(), color=BLUE, linewidth=0.8, linestyle="--", label="the last one kept")
    _label(panel, f"layer {layer}, head {head}: every token that was ranked", "importance", "score after the graph")


def _label(panel: Any, title: str, across: str, up: str) -> None:
    panel.set_title(title, loc="left", fontsize=9)
    panel.set_xlabel(across, fontsize=8)
    panel.set_ylabel(up, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)


def _binned(mask: Any, num_bins: int = BINS) -> Any:
    """Average a (layers, heads, N) mask over heads and over the tokens of each bin."""
    num_tokens = mask.shape[-1]
    edges = np.linspace(0, num_tokens, min(num_bins, num_tokens) + 1).astype(int)
    return np.add.reduceat(mask.mean(axis=1), edges[:-1], axis=-1) / np.diff(edges)
