"""One prompt's records: every question, answered from every evicted cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import kl_div

from ...core.policy import Policy
from ...integrations.transformers import EvictingCache, observing
from ...naming.names import FULL, is_press
from ...naming.policies import make_policy
from ...workbench.forward import next_logits, teacher_forced_logits
from ..prompts import metrics
from ..prompts.prompts import Prompt, Question
from ..records import Record
from .closeness import make_probe
from .config import Config
from .presses import read_under_press
from .reading import ReadCache, read_caches
from .worklist import cells, missing

__all__ = ["PromptRun", "evaluate"]


def evaluate(model: Any, tokenizer: Any, prompt: Prompt, config: Config, done: Set[str] = frozenset()) -> list[Record]:
    """Read a prompt once and ask every question from every evicted cache.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model as `observing` needs it.
    prompt : Prompt
    config : Config
    done : set of str
        Keys of records that need not be made again.

    Returns
    -------
    list of Record
        What was missing. The numbers do not depend on `done`.
    """
    wanted = missing(prompt, config, done)
    if not wanted:
        return []
    run = PromptRun(model=model, tokenizer=tokenizer, prompt=prompt, config=config)
    made = {cell: _policies(prompt, config, *cell) for cell in cells(prompt, config)}
    everybody = [policy for policies in made.values() for policy in policies.values() if policy is not None]
    asked = sorted({(mode, index) for mode, index, _, _ in wanted})
    records: list[Record] = []
    with observing(model), torch.inference_mode():
        for read in run.read(asked, everybody):
            records += run.answer_from_full(read)
            for cell, policies in made.items():
                # Batches are answered whole, because numbers depend on who is in them.
                if any((read.mode, index, *cell) in wanted for index in read.questions):
                    records += run.answer(read, policies, *cell)
    return [record for record in records if record.key not in done]


def _policies(prompt: Prompt, config: Config, budget: int, sinks: int) -> dict[str, Policy | None]:
    """Make the policies of a cell; None for a press, which evicts while it reads."""
    return {
        name: None if is_press(name) else make_policy(name, budget, sinks=sinks, seed=prompt.seed or 0)
        for name in config.policies
        if name != FULL
    }


@dataclass(frozen=True, kw_only=True)
class PromptRun:
    """One prompt, read by a model and asked about. Use it inside `observing` and without gradients.

    Attributes
    ----------
    model, tokenizer
        Of transformers.
    prompt : Prompt
    config : Config
        Its modes, `generate`, `closeness` and `batch` apply.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    config: Config

    def read(self, asked: Sequence[tuple[str, int]], policies: Sequence[Policy], /) -> Iterator[ReadCache]:
        """Read the prompt, for questions by mode and index, and for all policies that will evict it."""
        return read_caches(self.model, self.tokenizer, self.prompt, asked, policies, closeness=self.config.closeness)

    def answer_from_full(self, read: ReadCache, /) -> Iterator[Record]:
        """Answer the questions of a cache from all of it. Comes first: other caches are compared with this one."""
        for index, ids in read.questions.items():
            question = self.prompt.questions[index]
            cache = read.cache.copy()
            logits = teacher_forced_logits(self.model, cache, ids, question.answer)
            if self.config.closeness:
                read.probes[index] = make_probe(cache, read.cache.attention_layers[0].num_seen, len(question.answer))
            read.log_probabilities[index] = logits[0].float().log_softmax(-1)
            texts = self._generate(read.cache, ids, question, 1)
            yield self._record(read, index, FULL, None, None, read.cache, logits[0], texts[0])

    def answer(
        self, read: ReadCache, policies: Mapping[str, Policy | None], budget: int, sinks: int, /
    ) -> list[Record]:
        """Evict a cache by each policy, and answer its questions in as few batches as possible.

        Parameters
        ----------
        read : ReadCache
        policies : mapping of str to Policy or None
            By the names in the records. None: the name is that of a press.
        budget, sinks : int
            As in the records.

        Returns
        -------
        list of Record
            By question, then in the order of `policies`.
        """
        batches: dict[Any, list[tuple[str, EvictingCache]]] = {}
        for name, policy in policies.items():
            cache = self._evict(read, name, policy, budget)
            # What answers for dropped tokens does so for all rows.
            alike = [(layer.num_stored, layer.answering) for layer in cache.attention_layers]
            batches.setdefault(tuple(alike), []).append((name, cache))
        records = []
        for group in batches.values():
            for start in range(0, len(group), self.config.batch):
                records += self._answer_batch(read, budget, sinks, group[start : start + self.config.batch])
        order = {name: place for place, name in enumerate(policies)}
        return sorted(records, key=lambda record: (record.question, order[record.policy]))

    def _evict(self, read: ReadCache, name: str, policy: Policy | None, budget: int) -> EvictingCache:
        """Return the cache that a policy, or a press where there is none, leaves."""
        if policy is None:
            return read_under_press(self.model, self._tokens(read.ids), name, budget, read.cache)
        return read.evicted(policy)

    def _answer_batch(
        self, read: ReadCache, budget: int, sinks: int, group: list[tuple[str, EvictingCache]]
    ) -> list[Record]:
        records = []
        together = EvictingCache.stacked([cache for _, cache in group])
        for index, ids in read.questions.items():
            question = self.prompt.questions[index]
            logits = teacher_forced_logits(self.model, together.copy(), ids, question.answer)
            texts = self._generate(together, ids, question, len(group))
            records += [
                self._record(read, index, name, budget, sinks, cache, logits[row], texts[row])
                for row, (name, cache) in enumerate(group)
            ]
        return records

    def _tokens(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    def _generate(self, cache: EvictingCache, ids: Sequence[int], question: Question, rows: int) -> list[str | None]:
        """Decode greedily, all rows at a time, until each has ended."""
        if not (self.config.generate and question.max_new_tokens):
            return [None] * rows
        cache, ends = cache.copy(), _end_tokens(self.model, self.tokenizer)
        new = self._tokens(ids).expand(rows, -1)
        generated: list[list[int]] = [[] for _ in range(rows)]
        running = [True] * rows
        for _ in range(question.max_new_tokens):
            new = next_logits(self.model, new, cache).argmax(-1)
            for row, token in enumerate(new[:, 0].tolist()):
                running[row] = running[row] and token not in ends
                if running[row]:
                    generated[row].append(token)
            if not any(running):
                break
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in generated]

    def _record(
        self,
        read: ReadCache,
        index: int,
        name: str,
        budget: int | None,
        sinks: int | None,
        cache: EvictingCache,
        logits: torch.Tensor,
        text: str | None,
    ) -> Record:
        prompt, question = self.prompt, self.prompt.questions[index]
        found, full = logits.float().log_softmax(-1), read.log_probabilities[index]
        answer = torch.tensor(question.answer, device=found.device)
        # A press does not tell which tokens it kept.
        probe = None if is_press(name) else read.probes.get(index)
        error, mass = (None, None) if probe is None else probe.compare(cache)
        return Record(
            prompt=prompt.name,
            task=question.task,
            kind=question.kind,
            question=index,
            length=prompt.length,
            num_tokens=cache.attention_layers[0].num_seen,
            depth=question.depth,
            split=prompt.split,
            seed=prompt.seed,
            mode=read.mode,
            policy=name,
            budget=budget,
            sinks=sinks,
            answer_tokens=len(question.answer),
            nll=round(float(-found.gather(-1, answer[:, None]).mean()), 6),
            kl=round(float(kl_div(found, full, log_target=True, reduction="batchmean")), 6),
            match=bool((found.argmax(-1) == answer).all()),
            metric=question.metric,
            score=None if text is None else metrics.score(question.metric, text, question.references),
            text=text,
            output_error=error,
            attention_mass=mass,
            redundancy=_redundancy(cache),
            tokens_kept=_tokens_kept(cache),
            cache_bytes=cache.nbytes,
        )


def _tokens_kept(cache: EvictingCache) -> float:
    """Return the mean number of tokens per KV head, over the layers that can be evicted."""
    kept = [layer.true_positions >= 0 for layer in cache.attention_layers if layer.evicts]
    # Sliding layers of a model that has others too are left alone by every policy.
    return round(sum(int(each.sum()) for each in kept) / sum(each[..., 0].numel() for each in kept), 6)


def _redundancy(cache: EvictingCache) -> float:
    """Return the mean cosine of two different kept keys, over the layers that can be evicted."""
    redundancy = [layer.redundancy.mean() for layer in cache.attention_layers if layer.evicts]
    return round(float(torch.stack(redundancy).mean()), 6)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
