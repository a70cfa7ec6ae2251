"""A row keeps in a padded batch what it keeps alone."""

import numpy as np
from canvas import FAINT, Picture, color, main

from graphkv import Degree, GraphKV, SnapKV, evict

TOKENS, SHORT, BUDGET = 120, 70, 30

rng = np.random.default_rng(1)
keys = rng.normal(size=(2, 1, TOKENS, 8)).astype(np.float32)
queries = rng.normal(size=(2, 1, 16, 8)).astype(np.float32) * 2
valid = np.ones((2, TOKENS), dtype=bool)
valid[1, : TOKENS - SHORT] = False  # the second row is padded on the left
policy = GraphKV(SnapKV(budget=BUDGET, window=8), Degree())


def kept() -> dict[str, np.ndarray]:
    """Evict the batch, and the short row alone."""
    both = evict(policy, keys, queries=queries, valid=valid).kept[:, 0]
    alone = evict(policy, keys[1:, :, -SHORT:], queries=queries[1:]).kept[0, 0]
    return {"row 1 of the batch": both[0], "row 2 of the batch": both[1], "row 2 alone": alone + TOKENS - SHORT}


def draw() -> Picture:
    """Draw a strip per row."""
    picture = Picture(620, 110, "Kept positions of two rows of a batch, and of the second one alone")
    left, step = 140, 3.9
    for row, (name, positions) in enumerate(kept().items()):
        y = 10 + 30 * row
        start = 0 if row == 0 else TOKENS - SHORT
        picture.text(left - 8, y + 14, name, anchor="end")
        picture.rect(left + start * step, y, (TOKENS - start) * step, 20, FAINT, opacity=0.35)
        for token in positions.tolist():
            picture.rect(left + token * step, y, step - 0.5, 20, color("snapkv+degree"))
        if row == 1:
            picture.text(left + 4, y + 14, "padding", soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
