"""One prompt, read into the caches that its questions are asked from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.errors import GraphKVWarning
from ...core.layer import Memory
from ...core.policy import Policy
from ...integrations.transformers import EvictingCache
from ...naming.policies import base_of, with_budget
from ...workbench.forward import ask, read
from ..prompts.prompts import Prompt
from .closeness import MOST_QUERIES, Probe

__all__ = ["ReadCache", "read_caches"]

# Running sums by the bases of policies, the same for every budget; one memory per layer.
States = dict[Policy, Sequence[Memory]]


@dataclass(kw_only=True)
class ReadCache:
    """A cache before eviction, and what is asked from it afterwards.

    Attributes
    ----------
    mode : str
        One of `graphkv.evaluation.runs.config.MODES`.
    ids : tuple of int
        What the cache has read.
    cache : EvictingCache
    questions : dict of int to tuple of int
        By the index of a question, the tokens of it that are read after the eviction.
    states : dict
        Running sums of the policies that have some.
    log_probabilities : dict of int to torch.Tensor, shape (answer tokens, vocabulary)
        The full cache's, by question.
    probes : dict of int to Probe
        The full cache's attention, by question.
    """

    mode: str
    ids: tuple[int, ...]
    cache: EvictingCache
    questions: dict[int, tuple[int, ...]]
    states: States
    log_probabilities: dict[int, torch.Tensor] = field(default_factory=dict)
    probes: dict[int, Probe] = field(default_factory=dict)

    def evicted(self, policy: Policy, /, *, every: int | None = None, num_protected: int = 0) -> EvictingCache:
        """Return the cache that a policy leaves; this one stays as it is.

        Parameters
        ----------
        policy : Policy
        every : int, optional
            The cache will evict again after so many tokens. Default: never.
        num_protected : int
            Tokens from the first one on that are never evicted, those to come included; all that was read, or none.
        """
        states = self.states.get(_without_budget(policy)) if policy.needs().state else None
        cache = self.cache.copy() if states is None else self.cache.with_states(states)
        if every is not None:
            cache = cache.with_settings(policy=policy, every=every, protect_prompt=bool(num_protected))
            cache.num_given = num_protected
        with warnings.catch_warnings():
            # Of a window that leaves no choice: short prompts have that, and the command has said it of the others.
            warnings.simplefilter("ignore", GraphKVWarning)
            cache.evict(policy)
        return cache


def read_caches(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    asked: Sequence[tuple[str, int]],
    policies: Sequence[Policy],
    *,
    closeness: bool,
) -> Iterator[ReadCache]:
    """Read a prompt once; yield its cache with the questions to come, then caches with a question in them.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model as `observing` has it.
    prompt : Prompt
    asked : sequence of tuple of str and int
        Mode and index of each question.
    policies : sequence of Policy
        All that may evict the caches: they decide which queries and sums are kept.
    closeness : bool
        Whether caches are to be compared by `Probe`.
    """
    # A window may be longer than the prompt, and yet not than the prompt with a question in it.
    inside = [len(prompt.questions[index].ids) - 1 for mode, index in asked if mode != "agnostic"]
    longest = len(prompt.ids) + max(inside, default=0)
    wanted = [policy.num_queries(longest) for policy in policies] + [MOST_QUERIES] * closeness
    context = EvictingCache(num_queries=max(wanted, default=0))
    read(model, torch.tensor([prompt.ids], device=model.device), context)
    states = _states(policies, context, {})
    # Only running sums need all queries, and those are computed; budgets are found by the queries themselves.
    kept = (each for each in policies if not each.needs().state or each.needs().automatic)
    context.keep_queries(max((each.num_queries(longest) for each in kept), default=0))
    later = {index: prompt.questions[index].ids for mode, index in asked if mode == "agnostic"}
    if later:
        ask(model, tokenizer, torch.tensor([prompt.ids], device=model.device), context, policies)
        yield ReadCache(mode="agnostic", ids=prompt.ids, cache=context, questions=later, states=states)
    for mode, index in ((mode, index) for mode, index in asked if mode != "agnostic"):
        # The last token stays out, so that even the first answer token is predicted from the evicted cache.
        *first, last = prompt.questions[index].ids
        cache = context.copy()
        if first:
            read(model, torch.tensor([first], device=model.device), cache)
        if first or not later:
            ask(model, tokenizer, torch.tensor([[*prompt.ids, *first]], device=model.device), cache, policies)
        yield ReadCache(
            mode=mode,
            ids=(*prompt.ids, *first),
            cache=cache,
            questions={index: (last,)},
            states=_states(policies, cache, states) if first else states,
        )


def _states(policies: Sequence[Policy], cache: EvictingCache, before: States) -> States:
    """Compute the running sums of the policies that have some, once for all budgets."""
    bases = dict.fromkeys(_without_budget(policy) for policy in policies if policy.needs().state)
    return {base: cache.running_states(base, before.get(base)) for base in bases}


def _without_budget(policy: Policy) -> Policy:
    """Return what remembers, the same for every budget: the base, unless a policy on top remembers more."""
    base = base_of(policy)
    return with_budget(base if base.needs().state == policy.needs().state else policy, 1)
