"""Search for a preset by CMA-ES: options of the graph per group of layers, then budgets, one group after the other.

The search of budgets follows EvolKV (arXiv:2509.08315): groups of successive layers from the bottom up, a fresh search
over the budgets inside each, the best of all groups so far carried on. Unlike there, every candidate keeps exactly as
many tokens as the budget says, so that its objective needs no term for the cache's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log

import cma
import numpy as np

from ...core import checks
from ...core.budgets import allocate
from ...core.fusion import EXPONENT
from ...core.pagerank import DAMPING
from ...naming.presets import Preset

__all__ = ["BudgetSpace", "Evaluate", "GraphSpace", "minimize", "search"]

# Losses of presets, lower is better.
Evaluate = Callable[[Sequence[Preset]], Sequence[float]]
# Wrappers, as in the names of policies.
SIGNALS = ("graphkv", "degree", "pagerank", "enhance", "bar")
NO_GRAPH = ""
MOST_NEIGHBORS = 16
MOST_ROUNDS = 3
MOST_EXPONENT = 32
# A layer's share is between the average divided and multiplied by this.
WIDEST = 4.0
STEP = 0.25


@dataclass(frozen=True, kw_only=True)
class GraphSpace:
    """Options of the graph for groups of layers, as points in the unit cube.

    Attributes
    ----------
    groups : int
        Groups of successive layers, each with seven options of its own: share of sources (0 to 1), neighbors (1 to 16,
        by their logarithm), rounds (0 to 3; 0 is no graph), strength (0 to 1), signal, and for two signals that have no
        use for these the exponent of the degree (1 to 32, by its logarithm) and the damping of PageRank (0 to 1).
    """

    groups: int

    def start(self) -> list[float]:
        """Return the point of `Degree()`, which did best over several bases."""
        signal = (SIGNALS.index("degree") + 0.5) / len(SIGNALS)
        exponent = log(EXPONENT, MOST_EXPONENT)
        return [0.3, log(2, MOST_NEIGHBORS), 1.5 / (MOST_ROUNDS + 1), 1.0, signal, exponent, DAMPING] * self.groups

    def place(self, preset: Preset, point: Sequence[float], /) -> Preset:
        """Put the options of a point into a preset."""
        return replace(
            preset, graph=tuple(self._wrapper(each) for each in np.reshape(point, (self.groups, 7)).tolist())
        )

    def _wrapper(self, point: Sequence[float]) -> str:
        sources, neighbors, rounds, strength, signal, exponent, damping = point
        name, num_rounds = SIGNALS[_step(signal, len(SIGNALS))], _step(rounds, MOST_ROUNDS + 1)
        if num_rounds == 0:
            return NO_GRAPH
        if name == "degree":
            return f"degree(exponent={round(MOST_EXPONENT**exponent)})"
        if name == "pagerank":
            return f"pagerank(damping={round(damping, 3)})"
        edges = f"source_ratio={round(sources, 3)}, neighbors={round(MOST_NEIGHBORS**neighbors)}"
        if name == "bar":
            return f"bar({edges})"
        return f"{name}({edges}, rounds={num_rounds}, strength={round(strength, 3)})"


def _step(value: float, steps: int) -> int:
    """Cut [0, 1] into equal steps."""
    return min(steps - 1, int(value * steps))


@dataclass(frozen=True, kw_only=True)
class BudgetSpace:
    """Budgets of some layers, as points in the unit cube; the other layers make room in proportion.

    Attributes
    ----------
    layers : range
        The layers whose budgets a point holds.
    budget : int
        Tokens per KV head in the average layer.
    least, most : int
        Bounds of a layer's budget.
    first : tuple of int or float
        Budgets of those layers to start from. Empty: the average.
    """

    layers: range
    budget: int
    least: int
    most: int
    first: tuple[int | float, ...] = ()

    def start(self) -> list[float]:
        """Return the point of the first budgets, as far as the cube reaches."""
        first = self.first or (self.budget,) * len(self.layers)
        points = [log(max(each, 1) / self.budget, WIDEST) / 2 + 0.5 for each in first]
        return [min(1.0, max(0.0, point)) for point in points]

    def place(self, preset: Preset, point: Sequence[float], /) -> Preset:
        """Put the budgets of a point into a preset; all layers together keep layers x budget tokens, exactly."""
        shares = [float(share) for share in preset.layer_budgets]
        for layer, value in zip(self.layers, point, strict=True):
            shares[layer] = self.budget * WIDEST ** (2 * float(value) - 1)
        total = len(shares) * self.budget
        return replace(preset, layer_budgets=tuple(allocate(shares, total, self.most, self.least)))


def minimize(
    evaluate: Evaluate, space: GraphSpace | BudgetSpace, best: tuple[float, Preset], *, evaluations: int, seed: int
) -> tuple[float, Preset]:
    """Search one space with CMA-ES, in whole generations.

    Parameters
    ----------
    evaluate : callable
        Returns the losses of a generation.
    space : GraphSpace or BudgetSpace
    best : tuple of float and Preset
        The best so far: what is not searched stays as it is there.
    evaluations : int
        At most this many candidates, but at least one generation.
    seed : int

    Returns
    -------
    loss : float
    preset : Preset
        The better of `best` and all candidates, the earlier one where they are equal.
    """
    fixed = best[1]
    options = {
        "bounds": [0, 1],
        "randn": np.random.RandomState(seed).randn,
        # Numbers come from `randn`; NumPy's global generator is left alone.
        "seed": float("nan"),
        "verbose": -9,
    }
    evolution = cma.CMAEvolutionStrategy(space.start(), STEP, options)
    for _ in range(max(1, evaluations // evolution.popsize)):
        points = evolution.ask()
        candidates = [space.place(fixed, np.clip(point, 0, 1)) for point in points]
        losses = [float(loss) for loss in evaluate(candidates)]
        evolution.tell(points, losses)
        found = min(range(len(losses)), key=losses.__getitem__)
        if losses[found] < best[0]:
            best = losses[found], candidates[found]
        if evolution.stop():
            break
    return best


def search(
    evaluate: Evaluate,
    start: Preset,
    *,
    num_layers: int,
    budget: int,
    least: int,
    most: int,
    evaluations: int,
    graph_groups: int = 3,
    group_size: int = 8,
    seed: int = 0,
) -> tuple[float, Preset]:
    """Search for the best preset over a base.

    Parameters
    ----------
    evaluate : callable
        Returns the losses of presets; lower is better.
    start : Preset
        The base without a graph, with the layer budgets to start from where they are searched. It is a candidate too.
    num_layers : int
    budget : int
        Tokens per KV head in the average layer.
    least, most : int
        Bounds of a layer's budget.
    evaluations : int
        About how many candidates to evaluate; half of them for each search where there are two.
    graph_groups : int
        Groups of layers with graph options of their own. 0: no graph.
    group_size : int
        Layers whose budgets are searched together. 0: budgets stay as they are.
    seed : int

    Returns
    -------
    loss : float
    preset : Preset
    """
    checks.count("evaluations", evaluations, minimum=1)
    checks.count("graph_groups", graph_groups)
    checks.count("group_size", group_size)
    spaces: list[GraphSpace | BudgetSpace] = []
    first = [start]
    if graph_groups:
        graph = GraphSpace(groups=min(graph_groups, num_layers))
        first.append(graph.place(start, graph.start()))
        spaces.append(graph)
    if group_size:
        spaces += [
            BudgetSpace(
                layers=range(low, min(low + group_size, num_layers)),
                budget=budget,
                least=least,
                most=most,
                first=start.layer_budgets[low : low + group_size],
            )
            for low in range(0, num_layers, group_size)
        ]
    losses = [float(loss) for loss in evaluate(first)]
    best = min(zip(losses, first, strict=True), key=lambda pair: pair[0])
    share = evaluations if not (graph_groups and group_size) else evaluations // 2
    groups = sum(isinstance(space, BudgetSpace) for space in spaces)
    for number, space in enumerate(spaces):
        mine = share if isinstance(space, GraphSpace) else share // groups
        best = minimize(evaluate, space, best, evaluations=mine, seed=seed + number)
    return best
