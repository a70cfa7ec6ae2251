"""The steps as plain loops: one row, one token, one edge at a time.

This is the authority on values. It is written from the equations of the specification and shares no code with
`graphkv.core`: rows are sequences of Python floats (which are float64), and nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import exp, inf, isfinite, isnan, sqrt

__all__ = [
    "FREE",
    "Choice",
    "Edges",
    "build_graph",
    "cosine",
    "degree",
    "evict",
    "fuse",
    "pagerank",
    "propagate",
    "received",
    "select",
    "top_k",
]

SMALLEST_FACTOR = 1e-6
SMALLEST_POWER, LARGEST_POWER = 1e-24, 1e24

FREE = -1
"""Stands for a neighbor that the specification leaves open: an edge of weight 0 that fills a row."""


@dataclass(frozen=True, kw_only=True)
class Edges:
    """The graph of one row.

    Attributes
    ----------
    sources : list of int
        K positions, ascending.
    neighbors : list of list of int
        K x M positions, or `FREE`.
    weights : list of list of float
        K x M.
    """

    sources: list[int]
    neighbors: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What `evict` decides for one row.

    Attributes
    ----------
    kept : list of int
        Positions, ascending.
    scores : list of float
        What the choice ranked by.
    """

    kept: list[int]
    scores: list[float]


def top_k(scores: Sequence[float], k: int, tiers: Sequence[int] | None = None) -> list[int]:
    """Rank tokens: lower tier, then numbers before NaN, then higher score, then lower index."""

    def rank(token: int) -> tuple[int, bool, float, int]:
        score = scores[token]
        tier = 0 if tiers is None else int(tiers[token])
        return tier, isnan(score), 0.0 if isnan(score) else -score, token

    return sorted(range(len(scores)), key=rank)[:k]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of two keys; 0 if one of them has no direction."""
    dot = square_a = square_b = 0.0
    for x, y in zip(a, b, strict=True):
        dot += x * y
        square_a += x * x
        square_b += y * y
    if square_a in (0, inf) or square_b in (0, inf) or isnan(square_a) or isnan(square_b):
        return 0.0
    return dot / (sqrt(square_a) * sqrt(square_b))


def received(
    queries: Sequence[Sequence[float]], keys: Sequence[Sequence[float]], valid: Sequence[bool] | None = None
) -> list[float]:
    """Sum the causal softmax attention that each key gets from the queries of one head, the last positions."""
    valid = [True] * len(keys) if valid is None else [bool(flag) for flag in valid]
    total = [0.0] * len(keys)
    for position, query in enumerate(queries, start=len(keys) - len(queries)):
        seen = [j for j in range(position + 1) if valid[j]]
        if not valid[position]:
            continue
        logits = [sum(x * y for x, y in zip(query, keys[j], strict=True)) / sqrt(len(query)) for j in seen]
        weights = [exp(logit - max(logits)) for logit in logits]
        for j, weight in zip(seen, weights, strict=True):
            total[j] += weight / sum(weights)
    return total


def build_graph(
    keys: Sequence[Sequence[float]],
    importance: Sequence[float],
    *,
    num_sources: int,
    num_neighbors: int,
    valid: Sequence[bool] | None = None,
) -> Edges:
    """Link the most important valid tokens to the valid tokens that resemble them most."""
    num_tokens = len(importance)
    valid = [True] * num_tokens if valid is None else [bool(flag) for flag in valid]
    num_sources = min(num_sources, num_tokens)
    num_neighbors = min(num_neighbors, num_tokens - num_sources)
    sources = sorted(top_k(importance, num_sources, [0 if flag else 1 for flag in valid]))
    neighbors: list[list[int]] = []
    weights: list[list[float]] = []
    for source in sources:
        # A source is chosen among valid tokens; an invalid one only fills the row, and links nothing.
        eligible = [j for j in range(num_tokens) if valid[source] and valid[j] and j not in sources]
        weight = [min(1.0, max(0.0, cosine(keys[source], keys[j]))) for j in eligible]
        best = top_k(weight, num_neighbors)
        fill = num_neighbors - len(best)
        neighbors.append([eligible[e] for e in best] + [FREE] * fill)
        weights.append([weight[e] for e in best] + [0.0] * fill)
    return Edges(sources=sources, neighbors=neighbors, weights=weights)


def propagate(
    importance: Sequence[float],
    neighbors: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    *,
    signal: str = "decay",
    rounds: int = 1,
    accumulation: str = "product",
    strength: float = 1.0,
) -> list[float]:
    """Send the sources' signal along every edge."""
    if rounds == 0 or strength == 0:
        return list(importance)
    incoming: list[list[float]] = [[] for _ in importance]
    for of_source, with_weight in zip(neighbors, weights, strict=True):
        for j, w in zip(of_source, with_weight, strict=True):
            if w > 0:  # neither NaN nor a fill
                incoming[j].append(min(1.0, w))
    result = []
    for score, arriving in zip(importance, incoming, strict=True):
        if not arriving:
            result.append(score)
        elif signal == "evict":
            result.append(-inf)
        elif isnan(score) or score == 0 or not isfinite(score):
            result.append(score)
        else:
            power = _factor(arriving, signal, accumulation, strength) ** rounds
            result.append(score * power if score >= 0 else score - abs(score) * (1 - power))
    return result


def _factor(arriving: Sequence[float], signal: str, accumulation: str, strength: float) -> float:
    """F of one token."""
    sign = {"decay": -1, "enhance": +1}[signal]
    factor = 1.0
    for w in arriving:
        if accumulation == "sum":
            factor += sign * strength * w
        else:
            factor *= max(1 + sign * strength * w, SMALLEST_FACTOR)
    return factor


def degree(keys: Sequence[Sequence[float]], *, valid: Sequence[bool] | None = None) -> list[float]:
    """Return the mean cosine of every valid key with all valid keys, one pair at a time."""
    tokens = [j for j in range(len(keys)) if valid is None or valid[j]]
    result = [0.0] * len(keys)
    for j in tokens:
        for i in tokens:
            result[j] += cosine(keys[i], keys[j]) / len(tokens)
    return result


def fuse(
    importance: Sequence[float],
    degree: Sequence[float],
    *,
    fusion: str = "power",
    exponent: int = 1,
    valid: Sequence[bool] | None = None,
) -> list[float]:
    """Put importance and distance from the others together, among the valid tokens."""
    tokens = [j for j in range(len(importance)) if valid is None or valid[j]]
    distance = [1.0 - (0.0 if isnan(c) else min(1.0, max(-1.0, c))) for c in degree]
    result = list(importance)
    if fusion == "power":
        lowest = min([0.0] + [importance[j] for j in tokens if isfinite(importance[j])])
        for j in tokens:
            if isfinite(importance[j]):
                power = min(max(distance[j] ** exponent, SMALLEST_POWER), LARGEST_POWER)
                result[j] = (importance[j] - lowest) * power
        return result
    # The best first, so a token that has k others behind it has the rank k + 1.
    by_importance = [tokens[place] for place in top_k([importance[j] for j in tokens], len(tokens))]
    by_distance = [tokens[place] for place in top_k([distance[j] for j in tokens], len(tokens))]
    for j in tokens:
        ranks = [len(tokens) - order.index(j) for order in (by_importance, by_distance)]
        result[j] = float(max(ranks)) if fusion == "max_rank" else sum(ranks) / 2
    return result


def pagerank(
    importance: Sequence[float],
    keys: Sequence[Sequence[float]],
    *,
    damping: float = 0.15,
    rounds: int = 10,
    valid: Sequence[bool] | None = None,
) -> list[float]:
    """Let importance flow between all pairs of tokens that take part, and teleport back to where it was."""
    if damping == 0 or rounds == 0:
        return list(importance)
    tokens = [j for j in range(len(keys)) if (valid is None or valid[j]) and isfinite(importance[j])]
    lowest = min([0.0] + [importance[j] for j in tokens])
    teleport = {j: importance[j] - lowest for j in tokens}
    size = sum(teleport.values())
    if size == 0:
        teleport, size = dict.fromkeys(tokens, 1.0), 1.0
    total = sum(teleport.values())
    teleport = {j: share / total for j, share in teleport.items()}
    central = dict(teleport)
    for _ in range(rounds):
        arriving = {j: sum((1 + cosine(keys[i], keys[j])) / 2 * central[i] for i in tokens) for j in tokens}
        total = sum(arriving.values())
        central = {j: damping * arriving[j] / total + (1 - damping) * teleport[j] for j in tokens}
    return [central[j] * size if j in central else importance[j] for j in range(len(keys))]


def select(
    scores: Sequence[float],
    budget: int,
    *,
    protected: Sequence[bool] | None = None,
    valid: Sequence[bool] | None = None,
) -> list[int]:
    """Keep the first `budget` of: protected valid tokens, other valid tokens, invalid tokens."""
    tiers = []
    for token in range(len(scores)):
        if valid is not None and not valid[token]:
            tiers.append(2)
        elif protected is not None and protected[token]:
            tiers.append(0)
        else:
            tiers.append(1)
    return sorted(top_k(scores, budget, tiers))


def evict(
    keys: Sequence[Sequence[float]],
    importance: Sequence[float],
    budget: int,
    *,
    protected: Sequence[bool] | None = None,
    num_protected: int = 0,
    valid: Sequence[bool] | None = None,
    source_ratio: float = 0.3,
    neighbors: int | float = 1,
    rounds: int = 1,
    signal: str = "decay",
    accumulation: str = "product",
    strength: float = 1.0,
    recompute_sources: bool = False,
    fusion: str = "power",
    exponent: int = 1,
    damping: float = 0.15,
) -> Choice:
    """Evict by GraphKV over a given importance, in a row of more tokens than budget."""
    open_tokens = max(0, budget - num_protected)
    num_sources = _count(source_ratio, open_tokens)
    num_neighbors = _count(neighbors, open_tokens)
    candidate = []
    for token in range(len(importance)):
        is_valid = valid is None or bool(valid[token])
        is_protected = protected is not None and bool(protected[token])
        candidate.append(is_valid and not is_protected)
    scores = list(importance)
    if signal == "degree":
        apart = degree(keys, valid=valid)
        scores = fuse(scores, apart, fusion=fusion, exponent=exponent, valid=candidate)
        return Choice(kept=select(scores, budget, protected=protected, valid=valid), scores=scores)
    if signal == "pagerank":
        scores = pagerank(scores, keys, damping=damping, rounds=rounds, valid=candidate)
        return Choice(kept=select(scores, budget, protected=protected, valid=valid), scores=scores)
    for _ in range(rounds if recompute_sources else 1):
        edges = build_graph(keys, scores, num_sources=num_sources, num_neighbors=num_neighbors, valid=candidate)
        scores = propagate(
            scores,
            edges.neighbors,
            edges.weights,
            signal=signal,
            rounds=min(rounds, 1) if recompute_sources else rounds,
            accumulation=accumulation,
            strength=strength,
        )
    return Choice(kept=select(scores, budget, protected=protected, valid=valid), scores=scores)


def _count(amount: int | float, open_tokens: int) -> int:
    """Return a count, or the share of the open tokens: rounded down, at least 1 above 0."""
    if open_tokens == 0:
        return 0
    if isinstance(amount, int):
        return amount
    return max(1, int(Fraction(repr(amount)) * open_tokens)) if amount > 0 else 0
