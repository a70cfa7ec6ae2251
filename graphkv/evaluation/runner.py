"""Ask every question of a prompt from every evicted cache, with one prefill per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.functional import kl_div

from ..core.errors import GraphKVError
from ..core.policy import Policy
from ..core.types import Array
from ..integrations.transformers import EvictingCache, observing
from ..integrations.transformers.versions import with_cache
from . import metrics
from .closeness import MOST_QUERIES, Probe, make_probe
from .config import Config
from .policies import base_of, make_policy, running_states
from .presses import PREFIX, read_under_press
from .records import Record, record_key
from .tasks import Prompt, Question

__all__ = ["evaluate", "missing", "stack"]

FULL = "full"
# What policies with running sums know, per base policy and layer.
States = dict[Policy | None, list[Mapping[str, Array]]]


def evaluate(model: Any, tokenizer: Any, prompt: Prompt, config: Config, done: Set[str] = frozenset()) -> list[Record]:
    """Read a prompt once and ask every question from every evicted cache.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model as `observing` wants it.
    prompt : Prompt
    config : Config
    done : set of str
        Keys of records that are there already and need not be made again.

    Returns
    -------
    list of Record
        What was missing. The numbers do not depend on `done`.
    """
    reading = Reading(model=model, tokenizer=tokenizer, prompt=prompt, config=config, done=done)
    with observing(model), torch.inference_mode():
        return [record for record in reading.answer_all() if record.key not in done]


def cells(prompt: Prompt, config: Config) -> list[tuple[int, int]]:
    """Give the pairs of budget and sinks for a prompt; a budget that holds all of it evicts nothing."""
    budgets = [budget for budget in config.budgets if budget < len(prompt.ids)]
    return [(budget, sinks) for budget in budgets for sinks in config.sinks]


def missing(prompt: Prompt, config: Config, done: Set[str]) -> list[tuple[str, int, int | None, int | None]]:
    """Give mode, question, budget and sinks wherever a record is not there yet."""
    return [
        (mode, index, budget, sinks)
        for mode in config.modes
        for index, question in enumerate(prompt.questions)
        if mode in question.modes
        for budget, sinks in [(None, None), *cells(prompt, config)]
        for names in [config.policies[1:] if budget else [FULL]]
        if any(record_key(prompt.name, index, mode, name, budget, sinks) not in done for name in names)
    ]


def stack(caches: Sequence[EvictingCache]) -> EvictingCache:
    """Put caches of one prompt that store equally many tokens in every layer into one batch.

    Parameters
    ----------
    caches : sequence of EvictingCache
        Each of a batch of 1.

    Returns
    -------
    EvictingCache
        Row i goes on as `caches` [i] would. It cannot be evicted.
    """
    result = caches[0].copy()
    for layer, rows in zip(result.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True):
        # What layers of linear attention remember, by number.
        for name in ("conv_states", "recurrent_states"):
            for number, state in getattr(layer, name, {}).items():
                if state is not None:
                    getattr(layer, name)[number] = torch.cat([getattr(row, name)[number] for row in rows])
        if layer not in result.evicting_layers:
            continue
        layer.keys = torch.cat([row.keys for row in rows])
        layer.values = torch.cat([row.values for row in rows])
        if layer.positions is not None:
            layer.positions = torch.cat([row.true_positions for row in rows])
        if any(row.valid is not None for row in rows):
            layer.valid = layer.true_positions >= 0
        places = [row.places for row in rows if row.places is not None]
        layer.places = torch.cat(places) if len(places) == len(rows) else None
        layer.queries, layer.state = None, {}
    return result


@dataclass(kw_only=True)
class Site:
    """A cache that is evicted, and what is asked from it.

    `ids` are what the cache has read; `questions` maps the index of a question to what is left to read of it when the
    cache has been evicted.
    """

    mode: str
    ids: tuple[int, ...]
    cache: EvictingCache
    questions: dict[int, tuple[int, ...]]
    states: States
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    probes: dict[int, Probe] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One prompt on its way through a model."""

    model: Any
    tokenizer: Any
    prompt: Prompt
    config: Config
    done: Set[str]

    def answer_all(self) -> Iterator[Record]:
        """Give at least what is missing: batches are answered whole, because numbers depend on who is in them."""
        wanted = missing(self.prompt, self.config, self.done)
        if not wanted:
            return
        for site in self._sites(sorted({(mode, index) for mode, index, _, _ in wanted})):
            yield from self._answer_from_full(site)
            for cell in cells(self.prompt, self.config):
                if any((site.mode, index, *cell) in wanted for index in site.questions):
                    yield from self._answer_cell(site, *cell)

    def _policies(self, budget: int, sinks: int) -> dict[str, Policy]:
        seed = self.prompt.seed or 0
        ours = [name for name in self.config.policies[1:] if not name.startswith(PREFIX)]
        made = {name: make_policy(name, budget, sinks=sinks, seed=seed) for name in ours}
        return {name: policy for name, policy in made.items() if policy is not None}

    def _all_policies(self) -> list[Policy]:
        """Give the policies of all cells."""
        return [policy for cell in cells(self.prompt, self.config) for policy in self._policies(*cell).values()]

    # Reading.

    def _tokens(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    def _sites(self, asked: list[tuple[str, int]]) -> Iterator[Site]:
        """Give the prompt with all its questions to come, then the prompt with each question in it."""
        # A window may be longer than the prompt, and yet not than the prompt with a question in it.
        inside = [len(self.prompt.questions[index].ids) - 1 for mode, index in asked if mode == "aware"]
        longest = len(self.prompt.ids) + max(inside, default=0)
        policies = self._all_policies()
        wanted = [policy.num_queries(longest) for policy in policies]
        if self.config.closeness:
            wanted.append(MOST_QUERIES)
        context = EvictingCache(num_queries=max(wanted, default=0))
        self.model(self._tokens(self.prompt.ids), **with_cache(self.model, context), logits_to_keep=1)
        later = {index: self.prompt.questions[index].ids for mode, index in asked if mode == "agnostic"}
        states = self._states(context, {})
        agnostic = Site(mode="agnostic", ids=self.prompt.ids, cache=context, questions=later, states=states)
        # Only running sums need all queries, and those are worked out.
        windows = [policy.num_queries(longest) for policy in policies if not policy.needs().state]
        for layer in context.evicting_layers:
            if layer.queries is not None:
                layer.queries = layer.queries[:, :, -max(windows, default=1) :].clone()
        if later:
            yield agnostic
        for index in (index for mode, index in asked if mode == "aware"):
            # The last token stays out, so that even the answer's first token is told from the evicted cache.
            *first, last = self.prompt.questions[index].ids
            cache = context.copy()
            if first:
                self.model(self._tokens(first), **with_cache(self.model, cache), logits_to_keep=1)
            yield Site(
                mode="aware",
                ids=(*self.prompt.ids, *first),
                cache=cache,
                questions={index: (last,)},
                states=self._states(cache, states) if first else states,
            )

    def _states(self, cache: EvictingCache, before: States) -> States:
        """Work out the running sums of the policies that have some, once for all budgets."""
        states: States = {}
        for policy in self._all_policies():
            base = _stateful_base(policy)
            if base is not None and base not in states:
                states[base] = running_states(base, cache, before.get(base))
        return states

    # Answering.

    def _answer_from_full(self, site: Site) -> Iterator[Record]:
        for index, ids in site.questions.items():
            question = self.prompt.questions[index]
            cache = site.cache.copy()
            logits = self._tell(cache, ids, question)
            if self.config.closeness:
                site.probes[index] = make_probe(cache, site.cache.evicting_layers[0].num_seen, len(question.answer))
            site.logits[index] = logits[0].float().log_softmax(-1)
            texts = self._generate(site.cache, ids, question, 1)
            yield self._record(site, index, FULL, None, None, site.cache, logits[0], texts[0])

    def _answer_cell(self, site: Site, budget: int, sinks: int) -> list[Record]:
        """Evict by every policy, and answer as few batches."""
        batches: dict[tuple[int, ...], list[tuple[str, EvictingCache]]] = {}
        policies = self._policies(budget, sinks)
        for name in self.config.policies[1:]:
            cache = self._shrink(site, name, policies.get(name), budget)
            batches.setdefault(tuple(layer.num_stored for layer in cache.evicting_layers), []).append((name, cache))
        records = []
        for group in batches.values():
            for start in range(0, len(group), self.config.batch):
                records += self._answer_batch(site, budget, sinks, group[start : start + self.config.batch])
        order = {name: place for place, name in enumerate(self.config.policies)}
        return sorted(records, key=lambda record: (record.question, order[record.policy]))

    def _shrink(self, site: Site, name: str, policy: Policy | None, budget: int) -> EvictingCache:
        """Give the cache that a policy, or a press where there is none, leaves; make sure of its size."""
        if policy is None:
            cache = read_under_press(self.model, self._tokens(site.ids), name, budget, site.cache)
        else:
            cache = site.cache.copy()
            states = site.states.get(_stateful_base(policy))
            for layer, state in zip(cache.evicting_layers, states or (), strict=False):
                layer.state = state
            cache.evict(policy)
        # Sliding layers of a model that has others too are left alone by every policy.
        kept = [int((layer.true_positions >= 0).sum()) for layer in cache.evicting_layers if layer.evicts]
        kv_heads = cache.evicting_layers[0].keys.shape[1]
        if sum(kept) != budget * len(kept) * kv_heads:
            raise GraphKVError(
                f"{name} must keep {budget} tokens per head on average; it kept {kept} in {kv_heads} heads"
            )
        return cache

    def _answer_batch(
        self, site: Site, budget: int, sinks: int, group: list[tuple[str, EvictingCache]]
    ) -> list[Record]:
        records = []
        together = stack([cache for _, cache in group])
        for index, ids in site.questions.items():
            question = self.prompt.questions[index]
            logits = self._tell(together.copy(), ids, question)
            texts = self._generate(together, ids, question, len(group))
            records += [
                self._record(site, index, name, budget, sinks, cache, logits[row], texts[row])
                for row, (name, cache) in enumerate(group)
            ]
        return records

    def _tell(self, cache: EvictingCache, ids: Sequence[int], question: Question) -> torch.Tensor:
        """Read question and right answer; give the logits of the answer's tokens, (batch, tokens, vocabulary)."""
        rows = cache.evicting_layers[0].keys.shape[0]
        inputs = self._tokens([*ids, *question.answer[:-1]]).expand(rows, -1)
        logits: torch.Tensor = self.model(
            inputs, **with_cache(self.model, cache), logits_to_keep=len(question.answer)
        ).logits
        return logits

    def _generate(self, cache: EvictingCache, ids: Sequence[int], question: Question, rows: int) -> list[str | None]:
        """Decode greedily, all rows at a time, until each has said that it ends."""
        if not (self.config.generate and question.max_new_tokens):
            return [None] * rows
        cache, ends = cache.copy(), _end_tokens(self.model, self.tokenizer)
        new = self._tokens(ids).expand(rows, -1)
        told: list[list[int]] = [[] for _ in range(rows)]
        running = [True] * rows
        for _ in range(question.max_new_tokens):
            new = self.model(new, **with_cache(self.model, cache), logits_to_keep=1).logits.argmax(-1)
            for row, token in enumerate(new[:, 0].tolist()):
                running[row] = running[row] and token not in ends
                if running[row]:
                    told[row].append(token)
            if not any(running):
                break
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in told]

    def _record(
        self,
        site: Site,
        index: int,
        name: str,
        budget: int | None,
        sinks: int | None,
        cache: EvictingCache,
        logits: torch.Tensor,
        text: str | None,
    ) -> Record:
        prompt, question = self.prompt, self.prompt.questions[index]
        told, full = logits.float().log_softmax(-1), site.logits[index]
        answer = torch.tensor(question.answer, device=told.device)
        # A press does not say which tokens it kept.
        probe = None if name.startswith(PREFIX) else site.probes.get(index)
        error, mass = (None, None) if probe is None else probe.compare(cache)
        return Record(
            prompt=prompt.name,
            task=question.task,
            kind=question.kind,
            question=index,
            length=prompt.length,
            num_tokens=cache.evicting_layers[0].num_seen,
            depth=question.depth,
            split=prompt.split,
            seed=prompt.seed,
            mode=site.mode,
            policy=name,
            budget=budget,
            sinks=sinks,
            answer_tokens=len(question.answer),
            nll=round(float(-told.gather(-1, answer[:, None]).mean()), 6),
            kl=round(float(kl_div(told, full, log_target=True, reduction="batchmean")), 6),
            match=bool((told.argmax(-1) == answer).all()),
            metric=question.metric,
            score=None if text is None else metrics.score(question.metric, text, question.references),
            text=text,
            output_error=error,
            attention_mass=mass,
            redundancy=_redundancy(cache),
        )


def _redundancy(cache: EvictingCache) -> float:
    """Give the mean cosine of two different kept keys, over the layers that can be evicted."""
    redundancy = [layer.redundancy.mean() for layer in cache.evicting_layers if layer.evicts]
    return round(float(torch.stack(redundancy).mean()), 6)


def _stateful_base(policy: Policy) -> Policy | None:
    """Give the base whose running sums a policy needs, whatever its budget; None where there are no sums."""
    return replace(base_of(policy), budget=1) if policy.needs().state else None


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Give the tokens that end an answer."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
