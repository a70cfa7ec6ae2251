"""Attention and selection one number at a time, for oracles."""

from math import exp, sqrt


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    highest = max(logits)
    weights = [exp(x - highest) for x in logits]
    return [x / sum(weights) for x in weights]


def row(query, keys):
    """Attention of one query to all those keys."""
    return softmax([dot(query, key) / sqrt(len(query)) for key in keys])


def mean(numbers):
    return sum(numbers) / len(numbers)


REDUCE = {"mean": mean, "max": max, "sum": sum}


def best(scores, number, among):
    """The highest scores, the lower index first among equals."""
    return sorted(among, key=lambda j: (-scores[j], j))[:number]


class Head:
    """What one KV head stores, in lists: a key, an age and one list of received attention per query head and token."""

    def __init__(self, groups):
        self.groups = groups
        self.position, self.keys, self.received = [], [], []

    def add(self, position, key, queries):
        """A token comes, and its queries look at all that is stored, itself included."""
        self.position.append(position)
        self.keys.append(key)
        self.received.append([[] for _ in range(self.groups)])
        for member, query in enumerate(queries):
            for token, weight in zip(self.received, row(query, self.keys), strict=True):
                token[member].append(weight)

    def keep(self, kept):
        for name in ("position", "keys", "received"):
            setattr(self, name, [getattr(self, name)[j] for j in sorted(kept)])


def simulate(keys, queries, prompt, decide):
    """Positions that are stored after the prompt and after each later token, (steps, kv_heads) lists.

    keys (kv_heads, N, D), queries (query_heads, N, D). decide(head) gives the indices to keep, or None.
    """
    groups = len(queries) // len(keys)
    heads, steps = [Head(groups) for _ in keys], []
    for position in range(len(keys[0])):
        for number, head in enumerate(heads):
            mine = [queries[number * groups + member][position] for member in range(groups)]
            head.add(position, keys[number][position], mine)
            if position >= prompt - 1 and (kept := decide(head)) is not None:
                head.keep(kept)
        if position >= prompt - 1:
            steps.append([list(head.position) for head in heads])
    return steps
