"""Questions to models whose heads are shared out over two processes; as a program, one of the processes.

``python -m tests.integrations.sharded FOLDER RANK`` loads the models in a folder, asks them everything and writes the
answers to a file there. `answers` asks the same of models that are in one piece.
"""

import inspect
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM
from transformers.distributed import DistributedConfig

from graphkv import CAKE, H2O, SAGEKV, TOVA, AdaKV, ArgumentError, GraphKV, KNorm, LayerBudgets, SnapKV
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES, tiny_llama
from tests.support.policies import every_policy

WORLD = 2
SNAPKV = SnapKV(budget=12, window=4, kernel_size=3)

# Two rows, the second with nine tokens of padding on the left.
PROMPTS = torch.randint(1, 97, (2, 36), generator=torch.Generator().manual_seed(5))
MASK = (torch.arange(36) >= torch.tensor([[0], [9]])).long()
PROMPTS[MASK == 0] = 0


def generate(model, **options):
    return model.generate(
        PROMPTS,
        attention_mask=MASK,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def contents(cache):
    return {
        "positions": [layer.true_positions for layer in cache.layers],
        "keys": [layer.keys.clone() for layer in cache.layers],
        "dropped": [layer.num_dropped for layer in cache.layers],
    }


def said(output):
    return {"tokens": output.sequences, "logits": torch.stack(output.logits), **contents(cache_of(output))}


def inside(policy, model, implementation="sdpa", **options):
    """The usual way."""
    model.set_attn_implementation(implementation)
    try:
        with evicting(model, policy, **options):
            return said(generate(model))
    finally:
        model.set_attn_implementation("sdpa")


def for_good(policy, model):
    """Under our attention for good, with a cache of one's own."""
    model.set_attn_implementation("graphkv_sdpa")
    cache = EvictingCache(policy)
    try:
        return said(generate(model, **with_cache(model, cache)))
    except ArgumentError as error:
        return {"refused": str(error), **contents(cache)}
    finally:
        model.set_attn_implementation("sdpa")


def by_hand(policy, model, mask=MASK):
    """Read first, evict later."""
    cache = EvictingCache(num_queries=36)
    with observing(model), torch.inference_mode():
        model(PROMPTS, attention_mask=mask, **with_cache(model, cache))
        try:
            cache.evict(policy)
        except ArgumentError as error:
            return {"refused": str(error), **contents(cache)}
        return contents(cache)


# Where keys and values are whole in every process, and queries are not.
PARTED_QUERIES = {f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in ("k", "v")}
# A name to the model, its class and its plan.
MODELS = {
    "llama": (
        partial(tiny_llama, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4),
        LlamaForCausalLM,
        "auto",
    ),
    "multi-query": (
        partial(tiny_llama, num_key_value_heads=1),
        LlamaForCausalLM,
        {f"model.{name}": style for name, style in LlamaConfig.base_model_tp_plan.items()} | PARTED_QUERIES,
    ),
    # Its plan gathers the fused projection.
    "phi3": (FAMILIES["phi3"], Phi3ForCausalLM, "auto"),
    # Processes that share work otherwise.
    "in-one-piece": (tiny_llama, LlamaForCausalLM, None),
}

COUPLED = {"tova": TOVA(budget=12), "adakv": AdaKV(SNAPKV), "cake": CAKE(budget=12, window=4)}
# A name to the model's name, the policy and a question.
QUESTIONS = {
    **{
        name: ("llama", policy, partial(inside, every=4))
        for name, policy in every_policy(12).items()
        if not (policy.needs().merges or policy.needs().probes)
    },
    "once": ("llama", GraphKV(SNAPKV), inside),
    "cake's scores": ("llama", LayerBudgets(CAKE(budget=12, window=4), budgets=(20, 12, 9, 7)), inside),
    "eager": ("llama", GraphKV(SNAPKV), partial(inside, implementation="eager")),
    "rerotate": ("llama", GraphKV(SNAPKV), partial(inside, rerotate=True, every=4)),
    **{
        f"{way.__name__}, {name}": ("llama", policy, way)
        for way in (for_good, by_hand)
        for name, policy in ({"snapkv": GraphKV(SNAPKV), "h2o": H2O(budget=12)} | COUPLED).items()
    },
    **{f"phi3, {name}": ("phi3", policy, inside) for name, policy in COUPLED.items()},
    **{f"in one piece, {name}": ("in-one-piece", policy, inside) for name, policy in COUPLED.items()},
    **{
        # Without a mask: with one, transformers repeats the key to the wrong number of heads, and fails.
        f"multi-query, {name}": ("multi-query", policy, partial(by_hand, mask=None))
        for name, policy in {"knorm": GraphKV(KNorm(budget=12)), "snapkv": SNAPKV, "sagekv": SAGEKV(budget=12)}.items()
    },
}


def answers(models):
    found = {}
    for name, (model, policy, ask) in QUESTIONS.items():
        try:
            found[name] = ask(policy, models[model])
        except ArgumentError as error:
            found[name] = {"refused": str(error)}
    return found


def load(folder, kind, plan):
    if plan is None:
        return kind.from_pretrained(folder)
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return kind.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan=plan))
    # transformers 5.2.
    return kind.from_pretrained(folder, tp_plan=plan)


def main(folder, rank):
    torch.set_num_threads(1)
    # A process that waits for one that went another way fails after a while.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    models = {name: load(folder / name, kind, plan).eval() for name, (_, kind, plan) in MODELS.items()}
    torch.save(answers(models), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
