"""How policies share a budget of 128 tokens in the average layer out over 32 layers."""

from canvas import FAINT, Picture, main
from palette import BASE, COLORS

from graphkv import CAKE, LayerShares, PyramidKV, SnapKV

LAYERS, BUDGET, TOKENS = 32, 128, 4096


def budgets() -> dict[str, list[int]]:
    """Ask each policy for the budget of every layer. They add up to 32 x 128, exactly."""
    shares = LayerShares(
        SnapKV(budget=BUDGET, window=8), shares=tuple(2 if layer % 4 == 0 else 1 for layer in range(32))
    )
    pyramid = PyramidKV(budget=BUDGET, window=8)
    # Preferences are what a forward pass finds; here they rise and fall.
    cake = CAKE(budget=BUDGET, window=8).share_out([1 + min(layer, 31 - layer) for layer in range(32)], TOKENS)
    return {
        "SnapKV: all alike": [SnapKV(budget=BUDGET).layer_budget(TOKENS, layer, LAYERS) for layer in range(LAYERS)],
        "PyramidKV: fewer from layer to layer": [
            pyramid.layer_budget(TOKENS, layer, LAYERS) for layer in range(LAYERS)
        ],
        "CAKE: by what each layer prefers": list(cake),
        "LayerShares: in proportions of your own": [
            shares.layer_budget(TOKENS, layer, LAYERS) for layer in range(LAYERS)
        ],
    }


def draw() -> Picture:
    """Draw a panel per policy, a bar per layer."""
    picture = Picture(620, 330, "Budgets of 32 layers under four policies with the same total")
    colors = (BASE, COLORS["keydiff"], COLORS["knorm"], COLORS["pagerank"])
    for place, ((name, sizes), fill) in enumerate(zip(budgets().items(), colors, strict=True)):
        x, floor = 10 + 310 * (place % 2), 140 + 160 * (place // 2)
        picture.text(x, floor - 118, name)
        picture.line([(x, floor - 40), (x + 288, floor - 40)], FAINT, width=1, dash="4 3")
        for layer, size in enumerate(sizes):
            height = 40 * size / BUDGET
            picture.rect(x + 9 * layer, floor - height, 7, height, fill)
        picture.text(x, floor + 15, f"layer 0 to 31; {sum(sizes)} tokens in all", size=12, soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
