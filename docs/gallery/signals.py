"""The scores of seven tokens before and after each signal; 4 and 7 are the best."""

import numpy as np
from canvas import FAINT, Picture, color, main

from graphkv import Bar, Decay, Degree, Enhance, Given, GraphKV, PageRank, evict

IMPORTANCE = np.asarray([0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1])
# Cosines with token 4 and with token 7, as in the paper's figure; a third number makes the length one.
COSINES = np.asarray(
    [[0.1, 0.05], [0.21, 0.03], [0.16, 0.7], [1.0, 0.0], [0.4, 0.23], [0.5, 0.6], [0.0, 1.0]], dtype=float
)
KEYS = np.concatenate([COSINES, np.sqrt(np.maximum(0, 1 - (COSINES**2).sum(axis=-1, keepdims=True)))], axis=-1)
SIGNALS = {
    "graphkv": Decay(source_ratio=0.7, neighbors=2),
    "enhance": Enhance(source_ratio=0.7, neighbors=2),
    "bar": Bar(source_ratio=0.7, neighbors=2),
    "degree": Degree(exponent=4),
    "pagerank": PageRank(),
}


def scores() -> dict[str, np.ndarray]:
    """Score the tokens anew with each signal, and keep three."""
    base = Given(budget=3, importance=IMPORTANCE[None, None])
    return {name: evict(GraphKV(base, signal), KEYS[None, None]) for name, signal in SIGNALS.items()}


def draw() -> Picture:
    """Draw scores before (faint) and after, as shares of the best; a dot marks the three that stay."""
    picture = Picture(620, 60 * len(SIGNALS) + 20, "Scores of seven tokens before and after each signal")
    for row, (name, done) in enumerate(scores().items()):
        floor = 60 * row + 62
        picture.text(8, floor - 18, type(SIGNALS[name]).__name__, size=14)
        after = np.where(np.isfinite(done.scores[0, 0]), done.scores[0, 0], 0)
        for token in range(7):
            x = 120 + 70 * token
            before = 44 * IMPORTANCE[token] / IMPORTANCE.max()
            now = 44 * max(0.0, float(after[token])) / float(after.max())
            picture.rect(x, floor - before, 20, before, FAINT)
            picture.rect(x + 22, floor - now, 20, now, color(f"base+{name}"))
            if token in done.kept[0, 0]:
                picture.circle(x + 50, floor - 5, 4, color(f"base+{name}"))
            if row == 0:
                picture.text(x + 21, 12, f"token {token + 1}", anchor="middle", size=12, soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
