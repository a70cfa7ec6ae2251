"""Read the golden vectors and run them on a backend of graphkv.

``python docs/vectors/vectors.py`` runs all files on NumPy; ``--backend mypkg.backend:BACKEND`` on yours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

import graphkv
from graphkv.core import budgets, primitives

HERE = Path(__file__).parent
WORDS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf"), "-0.0": -0.0}
POLICIES = {
    kind.__name__: kind
    for kind in (
        graphkv.Absorb,
        graphkv.D2O,
        graphkv.GraphKV,
        graphkv.H2O,
        graphkv.KVMerger,
        graphkv.Random,
        graphkv.SnapKV,
        graphkv.StreamingLLM,
        graphkv.WeightedKV,
    )
}
SIGNALS = {
    kind.__name__: kind for kind in (graphkv.Bar, graphkv.Decay, graphkv.Degree, graphkv.Enhance, graphkv.PageRank)
}


class NotApplicableError(Exception):
    """The library of the backend has no such dtype."""


def load() -> dict[str, list[dict[str, Any]]]:
    """Read all files: name -> cases."""
    files = sorted(path for path in HERE.glob("*.json") if path.name != "schema.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["cases"] for path in files}


def decode(data: Any) -> Any:
    """Turn nested lists of numbers and of the words for special numbers into nested lists of numbers."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    return WORDS.get(data, data) if isinstance(data, str) else data


def encode(data: Any) -> Any:
    """Turn nested lists of numbers into what JSON can hold."""
    if isinstance(data, list):
        return [encode(item) for item in data]
    if isinstance(data, float):
        if math.isnan(data):
            return "NaN"
        if data in (float("inf"), float("-inf")):
            return "Infinity" if data > 0 else "-Infinity"
        if data == 0 and str(data).startswith("-"):
            return "-0.0"
    return data


def array(value: dict[str, Any], backend: graphkv.Backend) -> Any:
    """Make an array of the backend from ``{"dtype": ..., "shape": ..., "data": ...}``."""
    wanted = np.asarray(decode(value["data"]), dtype=value["dtype"]).reshape(value["shape"])
    try:
        made = (getattr(backend, "from_numpy", None) or backend.xp.asarray)(wanted)
        is_there = str(value["dtype"]) in str(made.dtype)
    except (TypeError, ValueError) as error:
        raise NotApplicableError(f"{value['dtype']} in {backend.name}") from error
    if not is_there and value["dtype"].startswith("float"):
        raise NotApplicableError(f"{value['dtype']} in {backend.name}")
    return made


def arguments(case: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    """Decode the arguments of a case: arrays, a graph, a policy, or plain values."""
    found = {}
    for name, value in case["arguments"].items():
        if name == "graph":
            fields = {key: array(value[key], backend) for key in ("sources", "neighbors", "weights")}
            found[name] = graphkv.Graph(**fields, num_tokens=value["num_tokens"])
        elif name == "policy":
            found[name] = policy(value)
        else:
            found[name] = array(value, backend) if isinstance(value, dict) else decode(value)
    return found


def policy(value: dict[str, Any]) -> graphkv.Policy:
    """Make a policy from ``{"name": ..., **fields}``; the field ``base`` is a policy again, ``signal`` a signal."""
    fields = {key: policy(field) if key == "base" else field for key, field in value.items() if key != "name"}
    if "signal" in fields:
        options = dict(fields["signal"])
        fields["signal"] = SIGNALS[options.pop("name")](**options)
    kind = POLICIES[value["name"]]
    return kind(fields.pop("base"), **fields) if "base" in fields else kind(**fields)


def run(case: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    """Run one case and give its result in the form of ``expected``."""
    try:
        # Some cases are about numbers too large for their dtype, of which NumPy would warn.
        with np.errstate(over="ignore"):
            return STEPS[case["step"]](arguments(case, backend), backend)
    except graphkv.GraphKVError as error:
        return {"error": type(error).__name__}


def _rank(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    scores = primitives.widen(given["scores"], xp=backend.xp)
    # As in the three steps, a count is clipped before the primitive sees it.
    k = min(given["k"], scores.shape[-1])
    return {"order": shown(primitives.top_k(scores, k, given["tiers"], backend=backend), backend)}


def _build_graph(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    keys, importance = given.pop("keys"), given.pop("importance")
    return edges(graphkv.build_graph(keys, importance, **given, backend=backend), given["valid"], backend)


def _propagate(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    importance, graph = given.pop("importance"), given.pop("graph")
    return {"scores": shown(graphkv.propagate(importance, graph, **given, backend=backend), backend)}


def _degree(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    return {"degree": shown(graphkv.degree(given.pop("keys"), **given, backend=backend), backend)}


def _fuse(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    importance, degree = given.pop("importance"), given.pop("degree")
    return {"scores": shown(graphkv.fuse(importance, degree, **given, backend=backend), backend)}


def _pagerank(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    importance, keys = given.pop("importance"), given.pop("keys")
    return {"scores": shown(graphkv.pagerank(importance, keys, **given, backend=backend), backend)}


def _select(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    scores, budget = given.pop("scores"), given.pop("budget")
    return {"kept": shown(graphkv.select(scores, budget, **given, backend=backend), backend)}


def _sum_rows(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    rows = primitives.widen(given["rows"], xp=backend.xp)
    return {"sums": shown(primitives.sum_rows(rows, given["into"], given["num_slots"], backend=backend), backend)}


def _evict(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    chosen, keys = given.pop("policy"), given.pop("keys")
    found = graphkv.evict(chosen, keys, **given, backend=backend)
    result = {"budget": found.budget, "kept": shown(found.kept, backend)}
    if found.merge is not None:
        merged = found.compress(keys, given["values"])
        for name, x in zip(("keys", "values", "log_mass"), (*merged, found.log_mass()), strict=True):
            result[name] = shown(x, backend)
    if found.importance is not None:
        valid = given["valid"]
        mask = None if valid is None else backend.to_numpy(valid)
        if mask is not None and mask.ndim == 2:
            mask = np.broadcast_to(mask[:, None, :], found.importance.shape)
        for name in ("importance", "scores"):
            result[name] = shown(getattr(found, name), backend, valid=mask)
    if found.graph is not None:
        shape = found.graph.weights.shape
        result["num_sources"], result["num_neighbors"] = int(shape[-2]), int(shape[-1])
    return result


def _tokens(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    return {"count": budgets.tokens_of(given["budget"], given["num_tokens"])}


def _count(given: dict[str, Any], backend: graphkv.Backend) -> dict[str, Any]:
    return {"count": budgets.count_of(given["amount"], given["total"])}


STEPS = {
    "rank": _rank,
    "build_graph": _build_graph,
    "propagate": _propagate,
    "degree": _degree,
    "fuse": _fuse,
    "pagerank": _pagerank,
    "select": _select,
    "sum_rows": _sum_rows,
    "evict": _evict,
    "budget_tokens": _tokens,
    "ratio_count": _count,
}


def shown(x: Any, backend: graphkv.Backend, *, valid: Any = None) -> dict[str, Any]:
    """Return an array as ``{"dtype": ..., "shape": ..., "data": ...}``; null where `valid` is False."""
    host = np.asarray(backend.to_numpy(x))
    data = host.astype(object)
    if valid is not None:
        data[~valid] = None
    return {"dtype": str(host.dtype), "shape": list(host.shape), "data": encode(data.tolist())}


def edges(graph: graphkv.Graph, valid: Any, backend: graphkv.Backend) -> dict[str, Any]:
    """Return a graph as its shapes, and for each row its valid sources and its edges of weight above 0."""
    sources, neighbors, weights = (backend.to_numpy(x) for x in (graph.sources, graph.neighbors, graph.weights))
    mask = np.ones((*sources.shape[:-1], graph.num_tokens), bool) if valid is None else backend.to_numpy(valid)
    rows = []
    for row in np.ndindex(sources.shape[:-1]):
        found = [
            [int(source), int(neighbor), float(weight)]
            for source, *edge in zip(sources[row], neighbors[row], weights[row], strict=True)
            for neighbor, weight in zip(*edge, strict=True)
            if weight > 0
        ]
        rows.append({"sources": [int(i) for i in sources[row] if mask[row][i]], "edges": found})
    return {
        "dtype": str(weights.dtype),
        "sources_shape": list(sources.shape),
        "neighbors_shape": list(neighbors.shape),
        "rows": rows,
    }


def differences(expected: Any, got: Any, tolerance: dict[str, float] | None, where: str = "") -> list[str]:
    """Return where a result differs from what is expected: null matches anything, numbers within the tolerance."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            return [f"{where or 'result'}: expected {sorted(expected)}, got {sorted(got)}"]
        return [line for key in expected for line in differences(expected[key], got[key], tolerance, f"{where}.{key}")]
    if isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            return [f"{where}: expected {len(expected)} items, got {len(got)}"]
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance, f"{where}[{i}]")]
    return [] if _same(expected, got, tolerance, where) else [f"{where}: expected {expected}, got {got}"]


def _same(expected: Any, got: Any, tolerance: dict[str, float] | None, where: str) -> bool:
    if expected is None:
        return True
    if where.endswith("dtype"):
        # A library without 64-bit integers gives 32-bit ones.
        return expected == got or (expected == "int64" and got == "int32")
    if isinstance(expected, str) and expected not in WORDS:
        return expected == got
    a, b = decode(expected), decode(got)
    if a == b or str(a) == str(b) == "nan":
        return True
    if tolerance is None or isinstance(a, int) or math.isinf(a):  # indices and infinities are exact
        return False
    return abs(a - b) <= tolerance["absolute"] + tolerance["relative"] * abs(a)


def main() -> int:
    """Run every file on one backend and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="graphkv.backends.numpy:BACKEND", help="MODULE:NAME")
    module, _, name = parser.parse_args().backend.partition(":")
    backend = getattr(importlib.import_module(module), name or "BACKEND")
    failed = 0
    for file, cases in load().items():
        passed, skipped = 0, []
        for case in cases:
            try:
                lines = differences(case["expected"], run(case, backend), case["tolerance"])
            except NotApplicableError as error:
                skipped.append(str(error))
                continue
            for line in lines:
                print(f"{file}: {case['name']}: {line}")
            passed += not lines
            failed += bool(lines)
        print(f"{file}: {passed} of {len(cases)} cases passed, {len(skipped)} not applicable {sorted(set(skipped))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
