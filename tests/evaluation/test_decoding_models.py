"""Rows of a batch go on as in their own caches, whatever a policy remembers and whatever layers a model has."""

import torch
import transformers

from graphkv.evaluation.runs.decoding import decode
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import make_policy
from tests.integrations.test_layers import hybrids_go_through_the_cache
from tests.integrations.tiny import SIZES, tiny, tiny_gemma3, tiny_llama

N, BUDGET, EVERY, LIMIT = 50, 20, 3, 12
NAMES = (
    "h2o+mikv(high=0.5)",
    "snapkv(window=6)+absorb",
    "tova+degree(unrotated=True)",
    "lazy-eviction(window=3)",
    "knorm+adakv",
)


def alone(model, ids, policy):
    cache = EvictingCache(policy, every=EVERY)
    tokens = []
    with observing(model), torch.inference_mode():
        model(ids[:, :-1], **with_cache(model, cache))
        new = ids[:, -1:]
        for _ in range(LIMIT):
            new = model(new, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            tokens.append(int(new))
    return tokens, [layer.true_positions for layer in cache.attention_layers]


def check(model, names):
    ids = torch.randint(3, 90, (1, N), generator=torch.Generator().manual_seed(3))
    caches, policies = [], [make_policy(name, BUDGET) for name in names]
    with observing(model), torch.inference_mode():
        for policy in policies:
            cache = EvictingCache(num_queries=N)
            model(ids[:, :-1], **with_cache(model, cache))
            cache = cache.with_settings(policy=policy, every=EVERY)
            cache.evict(policy)
            caches.append(cache)
        together = decode(model, caches, ids[0, -1:].tolist(), limit=LIMIT, ends=set(), batch=8)
        found = decode(model, caches, ids[0, -1:].tolist(), limit=LIMIT, ends=set(), batch=1)
    for name, policy, row, beside in zip(names, policies, found, together, strict=True):
        tokens, positions = alone(model, ids, policy)
        assert row.tokens == beside.tokens == tokens, name
        # Of one row, so that the last bits are the same: a model that repeats itself has keys as good as each other.
        for mine, its in zip(row.cache.attention_layers, positions, strict=True):
            assert torch.equal(mine.true_positions, its), name


def test_policies_with_memories_of_all_kinds():
    check(tiny_llama(), NAMES)


# Both of these normalize their keys, so that norms say nothing and differ in their last bits.
def test_sliding_layers():
    check(tiny_gemma3(), ("h2o", "tova"))


@hybrids_go_through_the_cache
def test_layers_of_linear_attention():
    kinds = ["conv", "full_attention", "conv"]
    check(tiny(transformers.Lfm2ForCausalLM, transformers.Lfm2Config, **SIZES, layer_types=kinds), ("h2o", "tova"))
