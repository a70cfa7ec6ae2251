"""The three steps on plain Python lists: a port that follows the specification page rule by rule.

It shares no code with the library and imports nothing but the standard library.
``python docs/examples/plain_port.py`` runs the golden vectors on it.
"""

from __future__ import annotations

import json
import struct
import sys
from fractions import Fraction
from math import floor, inf, isfinite, isinf, isnan, nan, sqrt
from pathlib import Path

# --- The specification, one row at a time ---


def order(scores, tiers=None):
    """Rank all tokens, best first."""

    def place(j):
        number = 0.0 if isnan(scores[j]) else -scores[j]
        return (tiers[j] if tiers else 0, isnan(scores[j]), number, j)

    return sorted(range(len(scores)), key=place)


def weight(a, b):
    """Give the cosine of two keys, clipped to [0, 1]."""
    length_a, length_b = (sqrt(sum(x * x for x in key)) for key in (a, b))
    if not all(isfinite(length) and length > 0 for length in (length_a, length_b)):
        return 0.0
    cosine = sum((x / length_a) * (y / length_b) for x, y in zip(a, b, strict=True))
    return min(1.0, max(0.0, cosine))


def build_graph(keys, importance, num_sources, num_neighbors, valid=None):
    """Give sources (K), neighbors (K, M) and weights (K, M)."""
    num_tokens = len(importance)
    valid = valid or [True] * num_tokens
    num_sources = min(num_sources, num_tokens)
    num_neighbors = min(num_neighbors, num_tokens - num_sources)
    sources = sorted(order(importance, [0 if v else 1 for v in valid])[:num_sources])
    neighbors, weights = [], []
    for i in sources:
        to = [weight(keys[i], keys[j]) for j in range(num_tokens)]
        eligible = [valid[i] and valid[j] and j not in sources for j in range(num_tokens)]
        best = [j for j in order(to) if eligible[j]][:num_neighbors]
        fillers = [0] * (num_neighbors - len(best))
        neighbors.append(best + fillers)
        weights.append([to[j] for j in best] + [0.0] * len(fillers))
    return sources, neighbors, weights


def propagate(importance, neighbors, weights, signal, rounds, accumulation, strength):
    """Give the scores after `rounds` rounds."""
    if rounds == 0 or strength == 0:
        return list(importance)
    reached = [[] for _ in importance]
    for row, row_weights in zip(neighbors, weights, strict=True):
        for j, w in zip(row, row_weights, strict=True):
            if w > 0:  # a filler has no effect, and NaN is no edge
                reached[j].append(min(1.0, w))
    if signal == "evict":
        return [-inf if ws else s for s, ws in zip(importance, reached, strict=True)]
    sign = -1 if signal == "decay" else 1
    return [
        scale(s, factor(ws, sign * strength, accumulation), rounds) if ws else s
        for s, ws in zip(importance, reached, strict=True)
    ]


def factor(weights, signed_strength, accumulation):
    """Give F of a token that these weights reach."""
    if accumulation == "sum":
        return 1 + signed_strength * sum(weights)
    result = 1.0
    for w in weights:
        result *= max(1e-6, 1 + signed_strength * w)
    return result


def scale(s, f, rounds):
    """Multiply towards zero from above, away from zero below."""
    if s == 0 or isinf(s) or isnan(s):
        return s
    return s * f**rounds if s > 0 else s - abs(s) * (1 - f**rounds)


def select(scores, budget, protected=None, valid=None):
    """Give the positions that stay, ascending."""
    tiers = []
    for j in range(len(scores)):
        is_valid = valid[j] if valid else True
        tiers.append(2 if not is_valid else 0 if protected and protected[j] else 1)
    return sorted(order(scores, tiers)[:budget])


def budget_tokens(budget, num_tokens):
    """Give a budget in tokens: an integer, or a share rounded half up from the decimal number."""
    if isinstance(budget, int):
        return budget
    return floor(Fraction(repr(budget)) * num_tokens + Fraction(1, 2))


def ratio_count(amount, total):
    """Give a count: an integer, or a share rounded down, at least 1 above 0."""
    if isinstance(amount, int):
        return amount
    return max(1, floor(Fraction(repr(amount)) * total)) if amount > 0 else 0


# --- The golden vectors ---

WORDS = {"NaN": nan, "Infinity": inf, "-Infinity": -inf, "-0.0": -0.0}


def numbers(array):
    """Decode an array: words to numbers, integers and half precision to float32."""
    if array is None:
        return None

    def walk(data):
        if isinstance(data, list):
            return [walk(item) for item in data]
        number = float(WORDS.get(data, data))
        return number if array["dtype"] == "float64" else struct.unpack("f", struct.pack("f", number))[0]

    return walk(array["data"])


def as_index(array):
    """Decode an array of indices, tiers or truth values."""
    return None if array is None else array["data"]


def rows_of(data, depth):
    """List the rows of the leading axes, last axis fastest; `depth` axes belong to a row."""
    if data is None:
        return None
    return [data] if depth == 0 else [row for item in data for row in rows_of(item, depth - 1)]


def nested(rows, leading):
    """Undo `rows_of`."""
    for size in reversed(leading[1:]):
        rows = [rows[i : i + size] for i in range(0, len(rows), size)] if size else rows
    return rows if leading else rows[0]


def run(case):
    """Run one case of a core step; give the result like `expected`, without dtypes."""
    given, step = dict(case["arguments"]), case["step"]
    if step == "budget_tokens":
        return {"count": budget_tokens(given["budget"], given["num_tokens"])}
    if step == "ratio_count":
        return {"count": ratio_count(given["amount"], given["total"])}
    name = "scores" if "scores" in given else "importance"
    *leading, num_tokens = given[name]["shape"]
    scores = rows_of(numbers(given[name]), len(leading))

    def each(key, decode=as_index):
        rows = rows_of(decode(given.get(key)), len(leading))
        return [None] * len(scores) if rows is None else rows

    if step == "rank":
        got = [order(s, t)[: given["k"]] for s, t in zip(scores, each("tiers"), strict=True)]
        return {"order": {"shape": [*leading, min(given["k"], num_tokens)], "data": nested(got, leading)}}
    if step == "select":
        masks = zip(scores, each("protected"), each("valid"), strict=True)
        got = [select(s, given["budget"], p, v) for s, p, v in masks]
        return {"kept": {"shape": [*leading, min(given["budget"], num_tokens)], "data": nested(got, leading)}}
    if step == "propagate":
        given |= given.pop("graph")
        options = [given[key] for key in ("signal", "rounds", "accumulation", "strength")]
        graphs = zip(scores, each("neighbors"), each("weights", numbers), strict=True)
        got = [propagate(s, n, w, *options) for s, n, w in graphs]
        return {"scores": {"shape": [*leading, num_tokens], "data": nested(got, leading)}}
    rows = []
    num_sources = min(given["num_sources"], num_tokens)
    num_neighbors = min(given["num_neighbors"], num_tokens - num_sources)
    for keys, s, valid in zip(each("keys", numbers), scores, each("valid"), strict=True):
        sources, neighbors, weights = build_graph(keys, s, num_sources, num_neighbors, valid)
        triples = zip(sources, neighbors, weights, strict=True)
        edges = [[i, j, w] for i, js, ws in triples for j, w in zip(js, ws, strict=True) if w > 0]
        rows.append({"sources": [i for i in sources if not valid or valid[i]], "edges": edges})
    shapes = {"sources_shape": [*leading, num_sources], "neighbors_shape": [*leading, num_sources, num_neighbors]}
    return shapes | {"rows": rows}


CORE = ("order", "build_graph", "propagate", "select", "figure", "counts")


def same(expected, got, tolerance):
    """Compare a result with what is expected, but for dtypes."""
    if isinstance(expected, dict):
        keys = expected.keys() - {"dtype"}
        return keys == got.keys() and all(same(expected[key], got[key], tolerance) for key in keys)
    if isinstance(expected, list):
        return len(expected) == len(got) and all(same(a, b, tolerance) for a, b in zip(expected, got, strict=True))
    y = WORDS.get(expected, expected) if isinstance(expected, str) else expected
    if y == got or (isnan(y) and isnan(got)):
        return True
    return bool(tolerance) and abs(got - y) <= tolerance["absolute"] + tolerance["relative"] * abs(y)


def main():
    """Run all core vectors and print what fails."""
    folder, failed = Path(__file__).parents[1] / "vectors", 0
    for file in CORE:
        cases = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))["cases"]
        wrong = [case["name"] for case in cases if not same(case["expected"], run(case), case["tolerance"])]
        print(f"{file}: {len(cases) - len(wrong)} of {len(cases)} cases passed {wrong or ''}")
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
