"""How many tokens a layer stores over a long answer: never evicted, evicted once, and again every 64 tokens."""

import torch
from canvas import Picture, color, main
from palette import OTHER
from transformers import LlamaConfig, LlamaForCausalLM

from graphkv import SnapKV
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache

PROMPT, ANSWER, BUDGET = 400, 400, 128


def stored(policy: SnapKV | None, every: int | None = None) -> list[int]:
    """Feed a tiny random model a prompt and then token by token, and count what its first layer stores."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    cache = EvictingCache(policy, every=every)
    counts = []
    with observing(model), torch.inference_mode():
        model(torch.zeros((1, PROMPT), dtype=torch.int64), **with_cache(model, cache))
        for _ in range(ANSWER):
            counts.append(cache.layers[0].num_stored)
            model(torch.zeros((1, 1), dtype=torch.int64), **with_cache(model, cache))
    return counts


def draw() -> Picture:
    """Draw the three curves."""
    picture = Picture(620, 280, "Tokens stored while an answer is written, with and without evictions")
    left, floor, wide, tall = 60, 235, 380, 210
    top = PROMPT + ANSWER
    for count in (0, 200, 400, 600, 800):
        y = floor - tall * count / top
        picture.line([(left, y), (left + wide, y)], OTHER, width=0.4)
        picture.text(left - 8, y + 4, str(count), anchor="end", size=12, soft=True)
    curves = {
        "no policy": (stored(None), OTHER),
        "once, after the prompt": (stored(SnapKV(budget=BUDGET)), color("snapkv")),
        "every=64": (stored(SnapKV(budget=BUDGET), every=64), color("degree")),
    }
    for name, (counts, stroke) in curves.items():
        points = [(left + wide * step / ANSWER, floor - tall * count / top) for step, count in enumerate(counts)]
        picture.line(points, stroke)
        picture.text(left + wide + 10, points[-1][1] + 4, name)
    picture.text(left, floor + 20, "tokens of the answer: 0", soft=True)
    picture.text(left + wide, floor + 20, str(ANSWER), anchor="end", soft=True)
    picture.text(8, 14, "tokens stored per KV head", soft=True)
    return picture


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")  # a cache that outgrows its budget warns, and that is what is shown
    main(draw, __file__)
