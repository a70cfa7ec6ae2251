"""Long answers, and caches that are evicted while they are written."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch

from graphkv.core.errors import ArgumentError, GraphKVError
from graphkv.evaluation.prompts.metrics import lines, score
from graphkv.evaluation.prompts.reasoning import REASONING, exercises
from graphkv.evaluation.records import TIMINGS, read_records
from graphkv.evaluation.runs import command
from graphkv.evaluation.runs.config import Config, load_config
from graphkv.evaluation.runs.decoding import decode, forced_logits
from graphkv.evaluation.runs.prompt_run import evaluate
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import make_policy
from tests.integrations.tiny import byte_tokenizer

EVERY, BUDGET, LIMIT = 5, 24, 17
POLICIES = (
    "random",
    "streaming-llm",
    "knorm+degree",
    "keydiff",
    "tova",
    "h2o+graphkv",
    "snapkv(window=8)+degree",
    "knorm+adakv",
)
WORDS = "apple river stone window garden bottle candle forest hammer island jacket kettle".split()


@pytest.fixture(scope="module")
def prompt(maker):
    return maker.make("assignments", 300, "held-out", 10_003)


@pytest.fixture(scope="module")
def config():
    return Config(
        tasks=("assignments",), lengths=(300,), budgets=(BUDGET,), policies=POLICIES, modes=("aware", "protected"),
        every=EVERY, generate=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def records(model, tokenizer, prompt, config):
    return evaluate(model, tokenizer, prompt, config)


def find(records, **wanted):
    (found,) = [record for record in records if all(getattr(record, name) == value for name, value in wanted.items())]
    return found


def alone(model, ids, last, policy, *, limit=LIMIT, protect=False):
    """Generate as anybody would: one cache, which evicts by itself, token by token; return also its sizes on the way."""
    cache = EvictingCache(policy, every=EVERY, protect_prompt=protect)
    cache.num_given = len(ids) + len(last)
    tokens, sizes, kept = [], [], []
    model(torch.tensor([list(ids)]), **with_cache(model, cache))
    new = torch.tensor([list(last)])
    for _ in range(limit):
        before = [layer.num_evictions for layer in cache.attention_layers]
        stored = max(layer.num_stored for layer in cache.attention_layers)
        new = model(new, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        sizes.append(stored + 1)
        if [layer.num_evictions for layer in cache.attention_layers] > before:
            kept.append(max(layer.num_stored for layer in cache.attention_layers))
        tokens.append(int(new))
    return tokens, max(sizes), kept


@pytest.mark.parametrize("protect", [False, True])
@torch.inference_mode()
def test_rows_of_a_batch_are_evicted_as_each_would_be_alone(model, tokenizer, prompt, config, protect):
    mode = "protected" if protect else "aware"
    config = replace(config, modes=(mode,))
    records = evaluate(model, tokenizer, prompt, config)
    (question,) = prompt.questions
    ids = (*prompt.ids, *question.ids[:-1])
    for name in POLICIES:
        policy = make_policy(name, BUDGET + (len(ids) + 1 if protect else 0), sinks=4, seed=prompt.seed)
        with observing(model):
            tokens, most, kept = alone(
                model, ids, question.ids[-1:], policy, limit=question.max_new_tokens, protect=protect
            )
        found = find(records, policy=name)
        ends = tokenizer.eos_token_id
        if ends in tokens:
            tokens = tokens[: tokens.index(ends)]

        assert found.text == tokenizer.decode(tokens, skip_special_tokens=True).strip(), name
        assert found.generated == len(tokens)
        if "adakv" not in name:
            assert most <= policy.budget + EVERY
            assert found.tokens_kept == kept[-1] == policy.budget
            full = find(records, policy="full")
            per_token = full.cache_bytes / (len(ids) + full.generated)
            assert found.cache_bytes == per_token * most
