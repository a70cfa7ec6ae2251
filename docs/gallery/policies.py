"""Which positions each policy keeps: the same keys and queries, 200 tokens, a budget of 40."""

import numpy as np
from canvas import FAINT, Picture, color, main

import graphkv
from graphkv import Degree, GraphKV, evict

TOKENS, BUDGET = 200, 40

rng = np.random.default_rng(7)
queries = rng.normal(size=(1, 2, TOKENS, 16)) * 1.5
keys = rng.normal(size=(1, 1, TOKENS, 16))
values = rng.normal(size=(1, 1, TOKENS, 16))
keys[..., 0, :] *= 0.2  # a sink: a short key
keys[..., 60:85, :] = keys[..., 60:61, :] + 0.15 * keys[..., 60:85, :]  # a passage that repeats itself
queries[..., -32:, :] += 0.5 * keys[..., 60:61, :]  # and that the end of the text asks for

POLICIES = {
    "streaming-llm": graphkv.StreamingLLM(budget=BUDGET, num_sinks=4),
    "random": graphkv.Random(budget=BUDGET, num_sinks=4),
    "knorm": graphkv.KNorm(budget=BUDGET, num_sinks=4),
    "keydiff": graphkv.KeyDiff(budget=BUDGET, num_sinks=4),
    "tova": graphkv.TOVA(budget=BUDGET),
    "h2o": graphkv.H2O(budget=BUDGET),
    "expected-attention": graphkv.ExpectedAttention(budget=BUDGET),
    "snapkv": graphkv.SnapKV(budget=BUDGET, window=16),
    "snapkv+graphkv": GraphKV(graphkv.SnapKV(budget=BUDGET, window=16)),
    "snapkv+degree": GraphKV(graphkv.SnapKV(budget=BUDGET, window=16), Degree()),
}


def kept() -> dict[str, np.ndarray]:
    """Evict once with each."""
    return {name: evict(policy, keys, values=values, queries=queries).kept[0, 0] for name, policy in POLICIES.items()}


def draw() -> Picture:
    """Draw a strip per policy."""
    picture = Picture(620, 40 + 24 * len(POLICIES), "Kept positions of 200 tokens, by policy")
    left, step = 136, 2.4
    picture.text(left + 60 * step, 14, "a passage that repeats itself", soft=True)
    picture.line([(left + 60 * step, 20), (left + 85 * step, 20)], FAINT, width=3)
    for row, (name, positions) in enumerate(kept().items()):
        y = 30 + 24 * row
        picture.text(left - 8, y + 12, name, anchor="end")
        picture.rect(left, y, TOKENS * step, 16, FAINT, opacity=0.35)
        for token in positions.tolist():
            picture.rect(left + token * step, y, step, 16, color(name))
    picture.text(left, 36 + 24 * len(POLICIES), "position 0", soft=True)
    picture.text(left + TOKENS * step, 36 + 24 * len(POLICIES), str(TOKENS), anchor="end", soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
