"""The figures of a report, as SVG: narrow enough for a phone screen, in colors that everybody can tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...naming.names import FULL
from ..statistics import Interval

__all__ = [
    "Curve",
    "Gain",
    "Place",
    "SizedCurve",
    "draw_diversity",
    "draw_gains",
    "draw_heat_maps",
    "draw_quality",
    "draw_sizes",
]

WIDTH = 4.3
# Okabe and Ito's colors, the ones with enough contrast on white and on near-black, with a shape for each.
COLORS = ("#3d8fd1", "#d55e00", "#009e73", "#cc79a7", "#b08b00", "#8a6fd0")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.", "--", ":")
INK, PAPER, FAINT = "#1b1d21", "#ffffff", "#8a8d93"
# Their replacements on a dark screen.
DARK = {INK: "#e6e6e3", PAPER: "#15171b", FAINT: "#8f939b"}


class Curve(NamedTuple):
    """The quality of one policy: a mean with its interval per budget; None where there are no records."""

    label: str
    points: Mapping[int, Interval | None]


class SizedCurve(NamedTuple):
    """The quality of one policy by the tokens that it kept, a pair per budget."""

    label: str
    points: Sequence[tuple[float, Interval]]


class Gain(NamedTuple):
    """The gain of one variant over its base at one budget, positive is better; None where there are no records."""

    base: str
    variant: str
    budget: int
    found: Interval | None


class Place(NamedTuple):
    """Redundancy and quality of one policy."""

    base: str
    variant: str
    redundancy: float
    quality: Interval


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """Yield an empty figure and a buffer, which holds the drawing afterwards."""
    look = {
        "axes.edgecolor": FAINT,
        "axes.facecolor": PAPER,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.labelsize": 8.5,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "figure.facecolor": PAPER,
        "font.size": 8.5,
        "grid.alpha": 0.25,
        "grid.color": FAINT,
        "hatch.color": FAINT,
        "hatch.linewidth": 0.6,
        "legend.fontsize": 8,
        "svg.fonttype": "path",
        # Equal figures are equal files.
        "svg.hashsalt": "graphkv",
        "text.color": INK,
        "xtick.color": INK,
        "xtick.labelsize": 8,
        "ytick.color": INK,
        "ytick.labelsize": 8,
    }
    buffer = io.BytesIO()
    # Not the settings of the reader's own matplotlibrc.
    with style.context(look, after_reset=True):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, buffer
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None})


def _with_both_themes(svg: bytes) -> bytes:
    """Let the colors of ink and paper follow the screen."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    element = f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>"
    return svg.replace(b"<defs>", f"{element}\n<defs>".encode(), 1)


def _look(variants: Sequence[str], variant: str) -> dict[str, Any]:
    """Return the color and shape of a variant, the same in every figure; after six, old colors get other shapes."""
    turn, place = divmod(list(variants).index(variant), len(COLORS))
    return {"color": COLORS[place], "marker": MARKERS[(place + turn) % len(MARKERS)]}


def _numbers(axis: Any, values: Sequence[int]) -> None:
    """Label a logarithmic axis with the budgets themselves."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _facets(figure: Figure, names: Sequence[str], **shared: Any) -> dict[str, Any]:
    """Make one panel per name, two in a row."""
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    panels = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
        # The panel above it is the lowest of its column now.
        panels[len(names) - 2].xaxis.set_tick_params(labelbottom=True)
    for name, panel in zip(names, panels, strict=False):
        panel.set_title(name, loc="left")
    return dict(zip(names, panels, strict=False))


def draw_quality(
    bases: Mapping[str, Sequence[Curve]],
    references: Mapping[str, Sequence[Curve]],
    variants: Sequence[str],
    *,
    label: str,
) -> bytes:
    """Draw quality against budget, one panel per base, with intervals.

    Parameters
    ----------
    bases : mapping of str to sequence of Curve
        The curves of a base's variants, labeled with their names.
    references : mapping of str to sequence of Curve
        Curves that are in a panel for comparison: the full cache, random eviction.
    variants : sequence of str
        All variants of the report, so that a color means the same everywhere.
    label : str
        Of the vertical axis.

    Returns
    -------
    bytes
        SVG.
    """
    curves = [curve for panels in (references, bases) for panel in panels.values() for curve in panel]
    budgets = sorted({budget for curve in curves for budget in curve.points})
    rows = -(-len(bases) // 2)
    shown = next(iter(references.values()), ())
    with _drawing(1.55 * rows + 0.75) as (figure, buffer):
        panels = _facets(figure, list(bases), sharex=True, sharey=True)
        for base, panel in panels.items():
            for curve in references[base]:
                dash = "-" if curve.label == FULL else (0, (1, 2))
                _draw_curve(panel, curve, 1, color=FAINT, linestyle=dash, linewidth=1.1, marker="_", alpha=0.55)
            for place, curve in enumerate(bases[base]):
                look = _look(variants, curve.label)
                dash = DASHES[list(variants).index(curve.label) % len(DASHES)]
                # Points at one budget are side by side, so that their intervals can be seen.
                _draw_curve(panel, curve, 1 + 0.045 * place, **look, linestyle=dash, linewidth=1.2, markersize=3.8)
            panel.set_xscale("log", base=2)
            _numbers(panel.xaxis, budgets)
            panel.set_xlim(budgets[0] * 0.85, budgets[-1] * 1.25)
        figure.supxlabel("budget (tokens per KV head)", fontsize=8.5)
        figure.supylabel(label, fontsize=8.5)
        _legend(figure, _variant_handles(variants, lines=True) + _reference_handles(shown))
    return _with_both_themes(buffer.getvalue())


def draw_sizes(
    bases: Mapping[str, Sequence[SizedCurve]],
    references: Sequence[SizedCurve],
    variants: Sequence[str],
    *,
    label: str,
) -> bytes:
    """Draw quality against the tokens that were kept, one panel per base, with intervals.

    Parameters
    ----------
    bases : mapping of str to sequence of SizedCurve
        The curves of a base's variants, labeled with their names.
    references : sequence of SizedCurve
        Points that are in every panel: the full cache, random eviction.
    variants : sequence of str
        All variants of the report.
    label : str
        Of the vertical axis.

    Returns
    -------
    bytes
        SVG.
    """
    with _drawing(1.55 * -(-len(bases) // 2) + 0.75) as (figure, buffer):
        panels = _facets(figure, list(bases), sharex=True, sharey=True)
        for base, panel in panels.items():
            for curve in references:
                _draw_sized(panel, curve, color=FAINT, linestyle=":", linewidth=1.1, marker="_", alpha=0.55)
            for curve in bases[base]:
                dash = DASHES[list(variants).index(curve.label) % len(DASHES)]
                _draw_sized(panel, curve, **_look(variants, curve.label), linestyle=dash, linewidth=1.2, markersize=3.8)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        figure.supxlabel("tokens kept per KV head", fontsize=8.5)
        figure.supylabel(label, fontsize=8.5)
        _legend(figure, _variant_handles(variants, lines=True) + _reference_handles(references))
    return _with_both_themes(buffer.getvalue())


def _draw_sized(panel: Any, curve: SizedCurve, **look: Any) -> None:
    """Draw means and intervals, joined in the order of their sizes."""
    points = sorted(curve.points, key=lambda point: point[0])
    arms = [_arms(found) if isfinite(found.low) else (0.0, 0.0) for _, found in points]
    if points:
        panel.errorbar(
            [kept for kept, _ in points], [found.mean for _, found in points], yerr=np.array(arms).T,
            elinewidth=0.9, **look,
        )  # fmt: skip


def _draw_curve(panel: Any, curve: Curve, shift: float, **look: Any) -> None:
    """Draw means and intervals; the line breaks where there are no records."""
    budgets = sorted(curve.points)
    found = [curve.points[budget] for budget in budgets]
    means = np.array([np.nan if point is None else point.mean for point in found])
    errors = np.array(
        [(0, 0) if point is None or not isfinite(point.low) else _arms(point) for point in found], dtype=float
    ).T
    panel.errorbar(np.array(budgets) * shift, means, yerr=errors, elinewidth=0.9, **look)


def _arms(point: Interval) -> tuple[float, float]:
    return max(0.0, point.mean - point.low), max(0.0, point.high - point.mean)


def _variant_handles(variants: Sequence[str], *, lines: bool = False) -> list[Line2D]:
    return [
        Line2D(
            [], [], **_look(variants, name), label=name, markersize=4.5,
            linestyle=DASHES[place % len(DASHES)] if lines else "none",
        )
        for place, name in enumerate(variants)
    ]  # fmt: skip


def _reference_handles(references: Sequence[Curve | SizedCurve]) -> list[Line2D]:
    return [
        Line2D([], [], color=FAINT, linestyle="-" if curve.label == FULL else (0, (1, 2)), label=curve.label)
        for curve in references
    ]


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    columns = 3 if max(len(str(handle.get_label())) for handle in handles) < 16 else 1
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=2.4)


def draw_gains(gains: Sequence[Gain], variants: Sequence[str], *, label: str) -> bytes:
    """Draw the gain of every variant over its base, with intervals: a row per base and budget.

    Parameters
    ----------
    gains : sequence of Gain
        Positive is better. None is shown as missing.
    variants : sequence of str
        All variants of the report.
    label : str
        The metric, with its unit.

    Returns
    -------
    bytes
        SVG.
    """
    shown = [name for name in variants if any(gain.variant == name for gain in gains)]
    bases = list(dict.fromkeys(gain.base for gain in gains))
    heights: dict[tuple[str, int], float] = {}
    titles: dict[str, float] = {}
    for base in bases:
        titles[base] = len(titles) + len(heights)
        for budget in dict.fromkeys(gain.budget for gain in gains if gain.base == base):
            heights[base, budget] = len(titles) + len(heights)
    with _drawing(0.2 * (len(titles) + len(heights)) + 1.4) as (figure, buffer):
        panel = figure.subplots()
        panel.axvline(0, color=INK, linewidth=0.9)
        for gain in gains:
            dodge = 0.62 * ((shown.index(gain.variant) + 0.5) / len(shown) - 0.5)
            where = heights[gain.base, gain.budget] + dodge
            _draw_gain(panel, where, gain.found, _look(variants, gain.variant))
        for base, where in titles.items():
            # On paper of its own, because the line of zero may pass behind it.
            panel.text(
                0.01, where, base, transform=panel.get_yaxis_transform(), va="center", fontsize=8.5,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        panel.set_yticks(list(heights.values()), [str(budget) for _, budget in heights])
        panel.set_ylim(len(titles) + len(heights) - 0.4, -0.6)
        panel.grid(visible=False, axis="y")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_xlabel(f"{label}\nworse  \N{LEFTWARDS ARROW}    \N{RIGHTWARDS ARROW}  better")
        panel.set_ylabel("budget")
        _legend(figure, [handle for handle in _variant_handles(variants) if handle.get_label() in shown])
    return _with_both_themes(buffer.getvalue())


def _draw_gain(panel: Any, where: float, found: Interval | None, look: dict[str, Any]) -> None:
    """Draw a mean with its interval: filled where the interval excludes zero, better and worse alike."""
    if found is None:
        panel.annotate(
            "missing", (0, where), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6.5,
            color=FAINT, style="italic",
        )  # fmt: skip
        return
    arms = np.array([_arms(found)]).T if isfinite(found.low) else None
    fill = look["color"] if isfinite(found.low) and found.excludes_zero() else PAPER
    panel.errorbar(
        [found.mean], [where], xerr=arms, linestyle="none", markersize=4, elinewidth=1.1, markerfacecolor=fill, **look
    )


def draw_heat_maps(maps: Mapping[str, Mapping[str, Any]], lengths: Sequence[str], *, label: str) -> bytes:
    """Draw quality by length and depth: a row of maps per policy, a map per budget.

    Parameters
    ----------
    maps : mapping of str to mapping of str to array, shape (depths, lengths)
        Per policy and budget; entries in [0, 1], NaN where there are no records.
    lengths : sequence of str
        Names of the columns of a map.
    label : str
        The quantity that colors show.

    Returns
    -------
    bytes
        SVG.
    """
    budgets = list(dict.fromkeys(budget for row in maps.values() for budget in row))
    with _drawing(1.45 * len(maps) + 0.85) as (figure, buffer):
        grid = figure.subplots(len(maps), len(budgets), squeeze=False, sharex=True, sharey=True)
        image = None
        for place, (policy, row) in enumerate(maps.items()):
            for column, (budget, panel) in enumerate(zip(budgets, grid[place], strict=True)):
                panel.patch.set_hatch("////")
                panel.patch.set_edgecolor(FAINT)
                panel.grid(visible=False)
                if budget in row:
                    image = panel.imshow(
                        np.ma.masked_invalid(row[budget]),
                        cmap="cividis",
                        vmin=0,
                        vmax=1,
                        aspect="auto",
                        extent=(-0.5, len(lengths) - 0.5, 1, 0),
                        interpolation="nearest",
                    )
                words = [policy] * (column == 0) + [budget] * (place == 0)
                panel.set_title("\n".join(words), loc="left", fontsize=8)
                panel.set_xticks(range(len(lengths)), lengths, rotation=90)
                panel.set_yticks([0, 0.5, 1])
        figure.supylabel("depth of the needle", fontsize=8.5)
        grid[-1][len(budgets) // 2].set_xlabel("prompt (tokens)")
        if image is not None:
            figure.colorbar(image, ax=list(grid.ravel()), location="bottom", shrink=0.6, aspect=30, label=label)
    return _with_both_themes(buffer.getvalue())


def draw_diversity(
    places: Mapping[str, Sequence[Place]],
    variants: Sequence[str],
    *,
    full: float | None,
    label: str,
) -> bytes:
    """Draw quality against how alike the kept keys are: a panel per budget, a line from every base to its variants.

    Parameters
    ----------
    places : mapping of str to sequence of Place
        Per budget.
    variants : sequence of str
        All variants of the report.
    full : float or None
        The redundancy of the full cache.
    label : str
        Of the vertical axis.

    Returns
    -------
    bytes
        SVG.
    """
    rows = -(-len(places) // 2)
    with _drawing(1.9 * rows + 0.75) as (figure, buffer):
        panels = _facets(figure, list(places), sharex=True, sharey=True)
        for budget, panel in panels.items():
            if full is not None:
                panel.axvline(full, color=FAINT, linewidth=1, linestyle="-")
            for base in dict.fromkeys(place.base for place in places[budget]):
                _draw_family(panel, [place for place in places[budget] if place.base == base], variants)
            panel.margins(x=0.22, y=0.12)
        figure.supxlabel("mean cosine of two kept keys (left: more diverse)", fontsize=8.5)
        figure.supylabel(label, fontsize=8.5)
        line = [] if full is None else [Line2D([], [], color=FAINT, label="all keys")]
        _legend(figure, _variant_handles(variants) + line)
    return _with_both_themes(buffer.getvalue())


def _draw_family(panel: Any, places: Sequence[Place], variants: Sequence[str]) -> None:
    """Draw a base with its name, its variants, and lines to them."""
    first = places[0]
    panel.annotate(
        first.base, (first.redundancy, first.quality.mean), xytext=(4, 4), textcoords="offset points", fontsize=6.5
    )
    for place in places:
        panel.plot(
            [first.redundancy, place.redundancy], [first.quality.mean, place.quality.mean],
            color=FAINT, linewidth=0.7, zorder=1,
        )  # fmt: skip
        arms = np.array([_arms(place.quality)]).T if isfinite(place.quality.low) else None
        look = _look(variants, place.variant)
        # Intervals of means, much wider than those of differences, stay in the background.
        panel.errorbar(
            [place.redundancy], [place.quality.mean], yerr=arms, linestyle="none", markersize=4, elinewidth=0.8,
            ecolor=(look["color"], 0.35), **look,
        )  # fmt: skip
