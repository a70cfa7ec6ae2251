"""One prompt's records: every question, answered from every evicted cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import kl_div

from ...core.policy import Policy
from ...integrations.transformers import EvictingCache, observing
from ...naming.names import FULL, is_press
from ...naming.policies import make_policy, with_budget
from ...workbench.forward import next_logits, teacher_forced_logits
from ..prompts import metrics
from ..prompts.prompts import Prompt, Question
from ..records import Record, Timing
from .closeness import make_probe
from .config import PROTECTED, Config
from .decoding import Decoded, decode, forced_logits, tokens_kept
from .presses import read_under_press
from .reading import ReadCache, read_caches
from .worklist import cells, missing

__all__ = ["PromptRun", "evaluate"]


def evaluate(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    config: Config,
    done: Set[str] = frozenset(),
    timings: list[Timing] | None = None,
) -> list[Record]:
    """Read a prompt once and ask every question from every evicted cache.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model as `observing` needs it.
    prompt : Prompt
    config : Config
    done : set of str
        Keys of records that need not be made again.
    timings : list of Timing, optional
        Gets how long the answers took, where caches are evicted while they generate.

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
    if timings is not None:
        timings += [timing for timing in run.timings if timing.key not in done]
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
        Its modes, `generate`, `closeness`, `batch` and `every` apply.
    timings : list of Timing
        Of the answers generated so far by caches that are evicted again and again, the full one among them.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    config: Config
    timings: list[Timing] = field(default_factory=list)

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
            if self.config.every is not None:
                [decoded] = self._decode([read.cache], ids, question)
                yield self._record(read, index, FULL, None, None, read.cache, logits[0], decoded=decoded)
                continue
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
        if self.config.every is not None:
            return self._answer_evicting(read, policies, budget, sinks)
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

    def _answer_evicting(
        self, read: ReadCache, policies: Mapping[str, Policy | None], budget: int, sinks: int
    ) -> list[Record]:
        """Answer from caches that are evicted again while they generate."""
        records = []
        for index, ids in read.questions.items():
            question = self.prompt.questions[index]
            # What is protected counts in a policy's budget, and the budget here is of what is not.
            num_protected = len(read.ids) + len(ids) if read.mode == PROTECTED else 0
            caches = [
                read.evicted(
                    with_budget(policy, num_protected + budget), every=self.config.every, num_protected=num_protected
                )
                for policy in policies.values()
                if policy is not None
            ]
            forced = forced_logits(self.model, caches, ids, question.answer, batch=self.config.batch)
            decoded = self._decode(caches, ids, question)
            records += [
                self._record(read, index, name, budget, sinks, cache, logits, decoded=each)
                for name, cache, logits, each in zip(policies, caches, forced, decoded, strict=True)
            ]
        return records

    def _decode(
        self, caches: Sequence[EvictingCache], ids: Sequence[int], question: Question
    ) -> Sequence[Decoded | None]:
        """Decode greedily, evicting; None for each where nothing is to be generated."""
        if not (self.config.generate and question.max_new_tokens):
            return [None] * len(caches)
        ends = _end_tokens(self.model, self.tokenizer)
        return decode(self.model, caches, ids, limit=question.max_new_tokens, ends=ends, batch=self.config.batch)

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
        return [self._text(tokens) for tokens in generated]

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _record(
        self,
        read: ReadCache,
        index: int,
        name: str,
        budget: int | None,
        sinks: int | None,
        cache: EvictingCache,
        logits: torch.Tensor,
        text: str | None = None,
        decoded: Decoded | None = None,
    ) -> Record:
        prompt, question = self.prompt, self.prompt.questions[index]
        found, full = logits.float().log_softmax(-1), read.log_probabilities[index]
        answer = torch.tensor(question.answer, device=found.device)
        # A press does not tell which tokens it kept.
        probe = None if is_press(name) else read.probes.get(index)
        error, mass = (None, None) if probe is None else probe.compare(cache)
        if decoded is not None:
            cache, text = decoded.cache, self._text(decoded.tokens)
        record = Record(
            prompt=prompt.name,
            task=question.task,
            kind=question.kind,
            question=index,
            length=prompt.length,
            num_tokens=len(read.ids),
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
            tokens_kept=tokens_kept(cache) if decoded is None else decoded.tokens_kept,
            cache_bytes=cache.nbytes if decoded is None else decoded.most_bytes,
            generated=None if decoded is None else len(decoded.tokens),
        )
        if decoded is not None:
            self.timings.append(Timing(key=record.key, tokens=len(decoded.tokens), seconds=decoded.seconds))
        return record


def _redundancy(cache: EvictingCache) -> float:
    """Return the mean cosine of two different kept keys, over the layers that can be evicted."""
    redundancy = [layer.redundancy.mean() for layer in cache.attention_layers if layer.evicts]
    return round(float(torch.stack(redundancy).mean()), 6)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
