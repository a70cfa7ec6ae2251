"""Which of many near-equal tokens stay: one layer, one head, sixty tokens, a budget of twelve."""

import numpy as np
from canvas import FAINT, Picture, color, main

from graphkv import build_graph, degree, fuse, propagate, select

TOKENS, DUPLICATES, BUDGET = 60, 24, 12

rng = np.random.default_rng(4)
# The first 24 tokens say nearly the same: their keys point one way, and each is scored highly.
angles = np.concatenate([rng.normal(1.1, 0.05, DUPLICATES), np.linspace(0, 2 * np.pi, TOKENS - DUPLICATES)])
keys = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
importance = np.concatenate([rng.uniform(0.6, 1.0, DUPLICATES), rng.uniform(0.1, 0.6, TOKENS - DUPLICATES)])


def choices() -> dict[str, np.ndarray]:
    """Fill the budget from the importance alone, after the paper's decay, and after ours."""
    graph = build_graph(keys, importance, num_sources=4, num_neighbors=5)
    return {
        "snapkv": select(importance, BUDGET),
        "snapkv+graphkv": select(propagate(importance, graph), BUDGET),
        "snapkv+degree": select(fuse(importance, degree(keys), exponent=1), BUDGET),
    }


def draw() -> Picture:
    """Draw the keys as directions; a filled dot is kept, and the further out, the more important."""
    picture = Picture(620, 250, "Near-equal tokens that the base alone, the paper's method and the degree keep")
    names = {"snapkv": "the base alone", "snapkv+graphkv": "the paper's method", "snapkv+degree": "ours, the degree"}
    for place, (name, kept) in enumerate(choices().items()):
        x, y = 105 + 205 * place, 118
        for token in range(TOKENS):
            reach = 35 + 60 * importance[token]
            stays = token in kept
            point = x + reach * keys[token, 0], y - reach * keys[token, 1]
            picture.circle(*point, 4.5 if stays else 3.5, color(name) if stays else FAINT, filled=stays)
        same = int((kept < DUPLICATES).sum())
        picture.text(x, 18, names[name], anchor="middle", size=14)
        picture.text(x, 240, f"{same} of {BUDGET} kept are near-equal", anchor="middle", soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
