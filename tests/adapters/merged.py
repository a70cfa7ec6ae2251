"""Merges by loops, and attention to what was merged: the measure of every method that merges."""

import math

import numpy as np

from graphkv import evict
from tests.adapters import loops


def cosine(a, b):
    lengths = math.sqrt(loops.dot(a, a)) * math.sqrt(loops.dot(b, b))
    return loops.dot(a, b) / lengths if lengths else 0.0


def nearest(keys, i, targets):
    """The most similar of some tokens, the lower one among equals, and its cosine."""
    best = max(targets, key=lambda j: (cosine(keys[i], keys[j]), -j))
    return best, cosine(keys[i], keys[best])


def average(rows, weights):
    total = sum(weights)
    return sum(weight * row for weight, row in zip(weights, rows, strict=True)) / total


def output(query, keys, values, mass):
    """The output of attention in which each key counts as often as its mass says."""
    weights = [m * math.exp(loops.dot(query, k) / math.sqrt(len(k))) for k, m in zip(keys, mass, strict=True)]
    return average(values, weights)


def window_attention(layer, row, window):
    """The mean attention that each token of a KV head receives from those of the last queries that see it."""
    (b, h), keys, queries = row, layer["keys"], layer["queries"]
    valid, mass = layer["valid"][b], layer.get("mass", np.ones(keys.shape[:3]))[b, h]
    num_tokens, groups = keys.shape[2], queries.shape[1] // keys.shape[1]
    found = np.zeros(num_tokens)
    for j in np.flatnonzero(valid):
        seen_by = [p for p in range(max(j, num_tokens - window), num_tokens) if valid[p]]
        rows = []
        for g in range(groups):
            for p in seen_by:
                query = queries[b, h * groups + g, queries.shape[2] - num_tokens + p]
                others = [i for i in range(p + 1) if valid[i]]
                weights = {i: mass[i] * math.exp(loops.dot(query, keys[b, h, i]) / 2) for i in others}
                rows.append(weights[j] / sum(weights.values()))
        found[j] = loops.mean(rows) if rows else 0.0
    return found


def example(*, num_tokens=18, padding=4, seed=0, noise=0.3):
    """Keys in four bunches and of size four, so that many are similar; the second row is padded on the left."""
    random = np.random.default_rng(seed)
    bunches = random.normal(size=(4, 4))
    keys = bunches[random.integers(0, 4, (2, 2, num_tokens))] + noise * random.normal(size=(2, 2, num_tokens, 4))
    return {
        "keys": keys,
        "values": random.normal(size=(2, 2, num_tokens, 3)),
        "queries": random.normal(size=(2, 4, num_tokens, 4)),
        "valid": np.arange(num_tokens) >= np.asarray([[0], [padding]]),
    }


def run(library, policy, layer, **given):
    """The eviction, and what it makes of keys and values, as NumPy arrays."""
    arrays = {name: library.make(x.astype(np.float32) if x.dtype == float else x) for name, x in layer.items()}
    keys, values = arrays["keys"], arrays["values"]
    done = evict(policy, arrays.pop("keys"), **arrays, **given, backend=library.backend)
    slots = [library.host(x) for x in done.compress(keys, values)]
    return done, *slots


def kept_of(done, library, row):
    """The kept tokens of a row."""
    return [j for j in library.host(done.kept)[row].tolist() if j >= 0]
