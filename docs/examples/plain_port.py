"""A port of the specification to plain Python lists, which runs the golden vectors of the core steps.

It was written only from the documentation pages (specification, vectors, porting, glossary) and the vector files, by
someone who had not seen the source, and shares no code with the library. Since then two things have changed: how
`direction` computes the length of a key, which the pages had not said, and `degree`, `fuse` and `pagerank`, which came
later and are by the library's authors.

The first half computes one row at a time and has no dtypes: every number is a Python float. The second half reads the
vectors, calls the first for each row, and compares.

    python docs/examples/plain_port.py
"""

import json
import struct
import sys
from fractions import Fraction
from math import floor, inf, isfinite, isnan, prod, sqrt
from pathlib import Path

CORE = ("order", "build_graph", "propagate", "degree", "fuse", "pagerank", "select", "sum_rows", "figure", "counts")
SMALLEST_FACTOR = 1e-6
SMALLEST_POWER, LARGEST_POWER = 1e-24, 1e24


# The method, for one row.


def order(scores, tiers=None):
    """Token indices, best first: lower tier, numbers before NaN, higher score, lower index."""

    def place(j):
        nan = isnan(scores[j])
        return (tiers[j] if tiers else 0, nan, 0.0 if nan else -scores[j], j)

    return sorted(range(len(scores)), key=place)


def build_graph(keys, importance, num_sources, num_neighbors, valid=None, narrow=False):
    """Step 1: the sources, ascending, and for each of them its neighbors and their weights, by descending weight.

    `narrow` says that the keys are not float64, so that their lengths have the range of float32.
    """
    tokens = range(len(importance))
    valid = valid or [True for _ in tokens]
    num_sources = min(num_sources, len(tokens))
    num_neighbors = min(num_neighbors, len(tokens) - num_sources)
    sources = sorted(order(importance, [0 if ok else 1 for ok in valid])[:num_sources])
    chosen = set(sources)
    eligible = [j for j in tokens if valid[j] and j not in chosen]
    directions = [direction(key, narrow) for key in keys]
    neighbors, weights = [], []
    for source in sources:
        edges = []
        if valid[source]:
            similar = [cosine(directions[source], directions[j]) for j in eligible]
            edges = [(eligible[place], similar[place]) for place in order(similar)[:num_neighbors]]
        edges += [(source, 0.0)] * (num_neighbors - len(edges))  # fillers
        neighbors.append([j for j, _ in edges])
        weights.append([weight for _, weight in edges])
    return {"sources": sources, "neighbors": neighbors, "weights": weights, "num_tokens": len(tokens)}


def direction(key, narrow):
    """The key at length one, or None if its length, as the arithmetic has it, is zero, infinite or NaN."""
    square = sum(x * x for x in key)
    in_range = to_float32(square) if narrow else square
    return [x / sqrt(square) for x in key] if in_range > 0 and isfinite(in_range) else None


def to_float32(x):
    """The nearest number of float32; infinity where Python would raise."""
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return inf


def cosine(a, b):
    """The weight of an edge between two directions: their cosine, clipped to [0, 1]."""
    if a is None or b is None:
        return 0.0
    return min(1.0, max(0.0, sum(x * y for x, y in zip(a, b, strict=True))))


def propagate(importance, graph, signal="decay", rounds=1, accumulation="product", strength=1.0):
    """Step 2: the scores after the sources have sent their signal to their neighbors."""
    if accumulation == "sum" and rounds != 1:
        raise ValueError("a sum is defined for one round only")
    reaching = [[] for _ in importance]  # for each token the weights of the edges that reach it
    for neighbors, weights in zip(graph["neighbors"], graph["weights"], strict=True):
        for j, weight in zip(neighbors, weights, strict=True):
            if weight > 0:  # not so for NaN
                reaching[j].append(min(1.0, weight))
    sign = 1.0 if signal == "enhance" else -1.0
    scores = []
    for score, weights in zip(importance, reaching, strict=True):
        if not weights or rounds == 0 or strength == 0:
            scores.append(score)
        elif signal == "evict":
            scores.append(-inf)
        elif score == 0 or not isfinite(score):
            scores.append(score)
        else:
            if accumulation == "sum":
                factor = 1.0 + sign * strength * sum(weights)
            else:
                factor = prod(max(SMALLEST_FACTOR, 1.0 + sign * strength * weight) for weight in weights)
            factor = power(factor, rounds)
            scores.append(score * factor if score > 0 else score - abs(score) * (1.0 - factor))
    return scores


def power(factor, rounds):
    """The factor to the power of rounds; infinity where Python would raise."""
    try:
        return factor**rounds
    except OverflowError:
        return inf


def degree(keys, valid=None, narrow=False):
    """The mean cosine of each key with all keys, by way of the mean direction."""
    valid = valid or [True for _ in keys]
    directions = [direction(key, narrow) if ok else None for key, ok in zip(keys, valid, strict=True)]
    usable = [one for one in directions if one is not None]
    mean = [sum(parts) / sum(valid) for parts in zip(*usable, strict=True)]
    return [0.0 if one is None else sum(x * m for x, m in zip(one, mean, strict=True)) for one in directions]


def fuse(importance, degrees, fusion="power", exponent=8, valid=None):
    """The scores from the importance and from the distance to the other tokens."""
    if fusion not in ("power", "max_rank", "mean_rank") or exponent < 1:
        raise ValueError("fusion must be power, max_rank or mean_rank, and exponent at least 1")
    tokens = [j for j in range(len(importance)) if valid is None or valid[j]]
    distances = [1.0 - (0.0 if isnan(c) else min(1.0, max(-1.0, c))) for c in degrees]
    scores = list(importance)
    lowest = min([0.0] + [importance[j] for j in tokens if isfinite(importance[j])])
    by_importance = ranks([importance[j] for j in tokens])
    by_distance = ranks([distances[j] for j in tokens])
    for j, first, second in zip(tokens, by_importance, by_distance, strict=True):
        if fusion == "power":
            factor = min(LARGEST_POWER, max(SMALLEST_POWER, power(distances[j], exponent)))
            scores[j] = (importance[j] - lowest) * factor
        else:
            scores[j] = float(max(first, second)) if fusion == "max_rank" else (first + second) / 2
    return scores


def ranks(values):
    """The rank of each value, 1 for the worst."""
    found = [0 for _ in values]
    for place, j in enumerate(order(values)):
        found[j] = len(values) - place
    return found


def pagerank(importance, keys, damping=0.15, rounds=10, valid=None, narrow=False):
    """The scores after importance has flowed between like tokens, by way of one sum of directions a round."""
    if damping == 0 or rounds == 0:
        return list(importance)
    tokens = [j for j in range(len(keys)) if (valid is None or valid[j]) and isfinite(importance[j])]
    found = {j: direction(keys[j], narrow) for j in tokens}
    directions = {j: one or [0.0 for _ in keys[j]] for j, one in found.items()}
    lowest = min([0.0] + [importance[j] for j in tokens])
    size = sum(importance[j] - lowest for j in tokens)
    home = {j: (importance[j] - lowest) / size if size else 1.0 / len(tokens) for j in tokens}
    central = home
    for _ in range(rounds if tokens else 0):
        weighted = [[central[j] * x for x in directions[j]] for j in tokens]
        anchor = [sum(parts) for parts in zip(*weighted, strict=True)]
        here = sum(central.values())
        near = {j: here + sum(x * a for x, a in zip(directions[j], anchor, strict=True)) for j in tokens}
        total = sum(near.values())
        central = {j: damping * near[j] / total + (1 - damping) * home[j] for j in tokens}
    return [central[j] * (size or 1.0) if j in central else importance[j] for j in range(len(keys))]


def select(scores, budget, protected=None, valid=None):
    """Step 3: the tokens that are kept, ascending."""
    protected = protected or [False for _ in scores]
    valid = valid or [True for _ in scores]
    tiers = [(0 if first else 1) if ok else 2 for first, ok in zip(protected, valid, strict=True)]
    return sorted(order(scores, tiers)[:budget])


def sum_rows(rows, into, num_slots, size):
    """The sum of the rows of `size` numbers that go into each slot; -1 goes nowhere."""
    members = [[row for row, slot in zip(rows, into, strict=True) if slot == place] for place in range(num_slots)]
    return [[sum(row[d] for row in member) for d in range(size)] for member in members]


def budget_tokens(budget, num_tokens):
    """A budget in tokens: an integer as it is, a share rounded, halves up, as the decimal number that was written."""
    if isinstance(budget, int):
        return budget
    return floor(Fraction(repr(budget)) * num_tokens + Fraction(1, 2))


def ratio_count(amount, total):
    """A count: an integer as it is, a share rounded down, but at least 1 of what is not nothing."""
    if isinstance(amount, int):
        return amount
    return max(1, floor(Fraction(repr(amount)) * total)) if amount and total else 0


# The vectors.


def read(value, narrow=False):
    """Nested lists with words as floats; integers and half precision rounded to float32 if `narrow`."""
    if isinstance(value, list):
        return [read(part, narrow) for part in value]
    if isinstance(value, str):
        return float(value)
    return to_float32(value) if narrow else value


def rows(array, lead, numbers=False):
    """The rows of an array whose leading axes are `lead`, last axis fastest; None for each if there is no array."""
    if array is None:
        return [None] * prod(lead)
    found = [read(array["data"], narrow=numbers and array["dtype"] not in ("float32", "float64"))]
    for _ in lead:
        found = [row for part in found for row in part]
    return found


def pack(results, lead, length):
    """An array as the vectors write it, of one list per row."""
    remaining = iter(results)

    def nest(shape):
        return [nest(shape[1:]) for _ in range(shape[0])] if shape else next(remaining)

    return {"shape": [*lead, length], "data": nest(lead)}


def run_rank(scores, k, tiers):
    """The first k of the order."""
    *lead, num_tokens = scores["shape"]
    found = [order(*row)[:k] for row in zip(rows(scores, lead, numbers=True), rows(tiers, lead), strict=True)]
    return {"order": pack(found, lead, min(k, num_tokens))}


def run_build_graph(keys, importance, num_sources, num_neighbors, valid, chunk_size):
    """The graph without what the specification leaves open; `chunk_size` never matters."""
    *lead, num_tokens = importance["shape"]
    num_sources = min(num_sources, num_tokens)
    num_neighbors = min(num_neighbors, num_tokens - num_sources)
    found = []
    for key, score, ok in zip(
        rows(keys, lead, numbers=True), rows(importance, lead, numbers=True), rows(valid, lead), strict=True
    ):
        graph = build_graph(key, score, num_sources, num_neighbors, ok, narrow=keys["dtype"] != "float64")
        edges = []
        for source, neighbors, weights in zip(graph["sources"], graph["neighbors"], graph["weights"], strict=True):
            edges += [[source, j, weight] for j, weight in zip(neighbors, weights, strict=True) if weight > 0]
        found.append({"sources": [i for i in graph["sources"] if ok is None or ok[i]], "edges": edges})
    neighbors_shape = [*lead, num_sources, num_neighbors]
    return {"sources_shape": [*lead, num_sources], "neighbors_shape": neighbors_shape, "rows": found}


def run_propagate(importance, graph, **options):
    """The scores after propagation."""
    *lead, num_tokens = importance["shape"]
    found = []
    edges = zip(rows(graph["neighbors"], lead), rows(graph["weights"], lead, numbers=True), strict=True)
    for row, (neighbors, weights) in zip(rows(importance, lead, numbers=True), edges, strict=True):
        found.append(propagate(row, {"neighbors": neighbors, "weights": weights}, **options))
    return {"scores": pack(found, lead, num_tokens)}


def run_degree(keys, valid):
    """The degrees."""
    *lead, num_tokens, _ = keys["shape"]
    narrow = keys["dtype"] != "float64"
    found = [degree(*row, narrow) for row in zip(rows(keys, lead, numbers=True), rows(valid, lead), strict=True)]
    return {"degree": pack(found, lead, num_tokens)}


def run_fuse(importance, degree, valid, **options):
    """The fused scores."""
    *lead, num_tokens = importance["shape"]
    inputs = zip(rows(importance, lead, numbers=True), rows(degree, lead, numbers=True), rows(valid, lead), strict=True)
    found = [fuse(score, degrees, valid=ok, **options) for score, degrees, ok in inputs]
    return {"scores": pack(found, lead, num_tokens)}


def run_pagerank(importance, keys, valid, **options):
    """The scores by PageRank."""
    *lead, num_tokens = importance["shape"]
    narrow = "float64" not in (keys["dtype"], importance["dtype"])
    inputs = zip(rows(importance, lead, numbers=True), rows(keys, lead, numbers=True), rows(valid, lead), strict=True)
    found = [pagerank(score, key, valid=ok, narrow=narrow, **options) for score, key, ok in inputs]
    return {"scores": pack(found, lead, num_tokens)}


def run_select(scores, budget, protected, valid):
    """The kept tokens."""
    *lead, num_tokens = scores["shape"]
    masks = zip(rows(scores, lead, numbers=True), rows(protected, lead), rows(valid, lead), strict=True)
    found = [select(row, budget, first, ok) for row, first, ok in masks]
    return {"kept": pack(found, lead, min(budget, num_tokens))}


def run_sum_rows(**given):
    """The sums."""
    *lead, _, size = given["rows"]["shape"]
    inputs = zip(rows(given["rows"], lead, numbers=True), rows(given["into"], lead), strict=True)
    found = [sum_rows(*row, given["num_slots"], size) for row in inputs]
    return {"sums": {"shape": [*lead, given["num_slots"], size], "data": pack(found, lead, size)["data"]}}


STEPS = {
    "rank": run_rank,
    "build_graph": run_build_graph,
    "propagate": run_propagate,
    "degree": run_degree,
    "fuse": run_fuse,
    "pagerank": run_pagerank,
    "select": run_select,
    "sum_rows": run_sum_rows,
    "budget_tokens": lambda **arguments: {"count": budget_tokens(**arguments)},
    "ratio_count": lambda **arguments: {"count": ratio_count(**arguments)},
}


def run(case):
    """The result of one case in the form of its `expected`, without dtypes."""
    return STEPS[case["step"]](**case["arguments"])


def same(expected, got, tolerance):
    """Whether a result is the expected one; dtypes do not count, and null stands for any value."""
    if expected is None:
        return True
    if isinstance(expected, dict):
        names = expected.keys() - {"dtype"}
        fits = isinstance(got, dict) and names == got.keys() - {"dtype"}
        return fits and all(same(expected[name], got[name], tolerance) for name in names)
    if isinstance(expected, list):
        fits = isinstance(got, list) and len(expected) == len(got)
        return fits and all(same(one, other, tolerance) for one, other in zip(expected, got, strict=True))
    return isinstance(got, (int, float, str)) and close(read(expected), read(got), tolerance)


def close(expected, got, tolerance):
    """Whether a number is the expected one."""
    if expected == got or (isnan(expected) and isnan(got)):
        return True
    if tolerance is None or isinstance(expected, int) or not isfinite(expected):  # indices and infinities are exact
        return False
    return abs(got - expected) <= tolerance["absolute"] + tolerance["relative"] * abs(expected)


def main():
    """Run all core vectors; 0 if every case passes, otherwise 1."""
    folder = Path(__file__).parents[1] / "vectors"
    failed = False
    for name in CORE:
        cases = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cases"]
        wrong = [case["name"] for case in cases if not same(case["expected"], run(case), case["tolerance"])]
        print(f"{name}.json: {len(cases) - len(wrong)} of {len(cases)} cases passed", *wrong)
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
