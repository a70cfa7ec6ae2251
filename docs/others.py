"""Measure EpiCache and SmallKV, which need more than a name, on the prompts of results/systems; prints their records.

``python docs/others.py > lines.jsonl``. Both are answered like any policy of ``graphkv eval``, at the same budget:

* ``epicache``: the prompt in turns of 64 tokens and windows of two turns, clustered into four episodes; the cache is
  that of the episode nearest to the question, under ``AdaKV(EpiCache(budget), floor=0.0)``.
* ``smallkv``: the model is its own smaller model, whose attention decides; there is no smaller one of this family here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from reports import RESULTS

from graphkv import AdaKV, EpiCache
from graphkv.evaluation.prompts.haystack import prompt_text
from graphkv.evaluation.runs.config import Config
from graphkv.evaluation.runs.prompt_run import PromptRun
from graphkv.evaluation.runs.reading import ReadCache
from graphkv.evaluation.runs.worklist import written_prompts
from graphkv.integrations.transformers import (
    EvictingCache,
    SmallerModel,
    find_episodes,
    mean_hidden_state,
    observing,
    read_in_blocks,
)
from graphkv.integrations.transformers.versions import with_cache
from graphkv.workbench.model import load_model

INSTRUCTION = "Extract what is essential from the conversation above, above all what is like these parts of it:\n"
TURN, WINDOW = 64, 2


def epicache(run: PromptRun, read: ReadCache, index: int, budget: int, sinks: int) -> EvictingCache:
    """Return the cache of the episode that is nearest to a question."""
    ids, question = list(read.ids), run.prompt.questions[index].ids
    windows = [ids[start : start + TURN * WINDOW] for start in range(0, len(ids), TURN * WINDOW)]
    embeddings = np.stack([mean_hidden_state(run.model, window) for window in windows])
    found = find_episodes(embeddings)
    places = found.medoids[found.nearest(mean_hidden_state(run.model, question))]
    prompt = [*run.tokenizer(INSTRUCTION).input_ids, *chain.from_iterable(windows[place] for place in places)]
    policy = AdaKV(EpiCache(budget=budget, num_sinks=sinks), floor=0.0)
    return read_in_blocks(run.model, torch.tensor([ids]), policy, prompt)


def smallkv(run: PromptRun, read: ReadCache, smaller: SmallerModel, budget: int) -> EvictingCache:
    """Return the cache that a smaller model leaves."""
    ids = torch.tensor([list(read.ids)])
    cache = EvictingCache(smaller.policy(ids, budget=budget))
    run.model(ids, **with_cache(run.model, cache))
    return cache


def main() -> None:
    """Measure all prompts, and print a record per line as they come."""
    torch.set_num_threads(1)
    settings = json.loads((RESULTS / "systems" / "run.json").read_text(encoding="utf-8"))["config"]
    config = Config(**{**settings, "policies": ["full", "snapkv"]})
    model, tokenizer = load_model(None, lambda text: print(text, file=sys.stderr))
    (budget,), (sinks,) = config.budgets, config.sinks
    prompts = written_prompts(model, tokenizer, prompt_text(None), config)
    # A model reads for one cache at a time.
    small, _ = load_model(None, lambda text: print(text, file=sys.stderr))
    smaller = SmallerModel.matched(small, model, torch.tensor([list(prompts[0].ids[:128])]))
    with observing(model), torch.inference_mode():
        for prompt in prompts:
            run = PromptRun(model=model, tokenizer=tokenizer, prompt=prompt, config=config)
            asked = [(mode, index) for index, question in enumerate(prompt.questions) for mode in question.modes]
            for read in run.read(asked, []):
                list(run.answer_from_full(read))
                for index, ids in read.questions.items():
                    caches = {"epicache": epicache(run, read, index, budget, sinks)}
                    caches["smallkv"] = smallkv(run, read, smaller, budget)
                    for name, cache in caches.items():
                        one = replace(read, questions={index: ids})
                        for record in run._answer_batch(one, budget, sinks, [(name, cache)]):
                            print(record.line(), end="", flush=True)


if __name__ == "__main__":
    main()
