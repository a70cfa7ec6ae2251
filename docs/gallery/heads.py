"""How Ada-KV shares a layer's budget out over its heads, from even to free."""

import numpy as np
from canvas import FAINT, Picture, color, main

from graphkv import AdaKV, SnapKV, evict

TOKENS, BUDGET, HEADS = 300, 60, 6

rng = np.random.default_rng(3)
keys = rng.normal(size=(1, HEADS, TOKENS, 16))
# Some heads look at few tokens, and some at many.
queries = rng.normal(size=(1, HEADS, 32, 16)) * np.asarray([3.0, 2.2, 1.6, 1.0, 0.5, 0.2])[:, None, None]
FLOORS = (1.0, 0.5, 0.2, 0.0)


def budgets() -> dict[float, list[int]]:
    """Evict with four floors: the share of an average head's budget that every head keeps in any case."""
    found = {}
    for floor in FLOORS:
        done = evict(AdaKV(SnapKV(budget=BUDGET, window=8), floor=floor), keys, queries=queries)
        found[floor] = done.counts[0].tolist()
    return found


def draw() -> Picture:
    """Draw a group of bars per floor, a bar per head."""
    picture = Picture(620, 210, "Budgets of six heads under Ada-KV with four floors")
    picture.line([(20, 170 - 60), (610, 170 - 60)], FAINT, width=1, dash="4 3")
    picture.text(610, 104, "even", anchor="end", size=12, soft=True)
    for place, (floor, sizes) in enumerate(budgets().items()):
        for head, size in enumerate(sizes):
            x = 20 + 150 * place + 21 * head
            picture.rect(x, 170 - size, 17, size, color("snapkv"), opacity=1 - 0.12 * head)
            picture.text(x + 8.5, 166 - size, str(size), anchor="middle", size=11)
        picture.text(20 + 150 * place + 62, 188, f"floor {floor:g}", anchor="middle")
        picture.text(20 + 150 * place + 62, 203, f"{sum(sizes)} in all", anchor="middle", size=12, soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
