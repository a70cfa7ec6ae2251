"""What smaller caches cost: our published records at prompts of 2,048 tokens."""

from canvas import Picture, color, main
from palette import OTHER
from reports import records

from graphkv.evaluation.statistics import summarize

LENGTH = 2048
PARTS = {
    "needles, question known": ("needle", "aware"),
    "needles, question unknown": ("needle", "agnostic"),
    "continuation": ("continuation", "agnostic"),
}
SHOWN = ("random", "snapkv", "snapkv+graphkv", "snapkv+degree", "keydiff")
DASHES = {"random": "2 3", "snapkv+graphkv": "6 3"}


def curves() -> dict[str, dict[str, dict[int, float]]]:
    """Read the mean NLL by part, policy and budget; None stands for the full cache."""
    found: dict[str, dict[str, dict[int, float]]] = {name: {} for name in PARTS}
    for cell, policies in summarize(records("standard/records.jsonl.gz"), "nll").items():
        for name, part in PARTS.items():
            if (cell.task, cell.mode, cell.length) == (*part, LENGTH) and cell.budget:
                for policy, one in policies.items():
                    found[name].setdefault(policy, {})[cell.budget] = one.mean
    return found


def draw() -> Picture:
    """Draw a panel per part."""
    picture = Picture(640, 270, "NLL of the right answer against the budget, three tasks")
    for place, (name, policies) in enumerate(curves().items()):
        left, floor, wide, tall = 36 + 210 * place, 190, 160, 150
        top = 6 if place < 2 else 4
        picture.text(left, 18, name)
        for mark in range(0, top + 1, 2):
            y = floor - tall * mark / top
            picture.line([(left, y), (left + wide, y)], OTHER, width=0.4)
            picture.text(left - 6, y + 4, str(mark), anchor="end", size=11, soft=True)
        full = floor - tall * next(iter(policies["full"].values())) / top
        picture.line([(left, full), (left + wide, full)], OTHER, width=1.5)
        budgets = sorted(policies["snapkv"])
        at = {budget: left + 8 + (wide - 16) * step / (len(budgets) - 1) for step, budget in enumerate(budgets)}
        for policy in SHOWN:
            points = [(at[budget], floor - tall * policies[policy][budget] / top) for budget in budgets]
            picture.line(points, color(policy), dash=DASHES.get(policy, ""))
            for point in points:
                picture.circle(*point, 2.6, color(policy))
        for budget, x in at.items():
            picture.text(x, floor + 16, str(budget), anchor="middle", size=11, soft=True)
    for place, policy in enumerate(("full", *SHOWN)):
        x = (20, 75, 155, 235, 365, 490)[place]
        picture.line([(x, 244), (x + 18, 244)], color(policy), dash=DASHES.get(policy, ""))
        picture.text(x + 22, 248, policy, size=11)
    picture.text(320, 226, "tokens kept per KV head", anchor="middle", size=12, soft=True)
    return picture


if __name__ == "__main__":
    main(draw, __file__)
