"""The command ``graphkv demo``: one prompt, a copy of its cache evicted by each policy, and their answers."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..core.backend import Backend, load
from ..core.errors import ArgumentError
from ..core.policy import Policy
from ..integrations.transformers import EvictingCache, Fate, fates, observing
from ..integrations.transformers.versions import with_cache
from ..naming.names import FULL
from ..naming.policies import make_policy
from ..workbench.files import check_folder, write_files
from ..workbench.forward import read, teacher_forced_logits
from ..workbench.model import DEFAULT_MODEL, load_model
from ..workbench.progress import show_steps
from ..workbench.text import read_text
from .picture import draw
from .prompt import ChatPrompt, make_prompt
from .result import Result

__all__ = ["Reader", "main"]

DEFAULT_POLICIES = (FULL, "random", "streaming-llm", "snapkv", "snapkv+graphkv", "snapkv+degree")


def main(
    *,
    model: str | None,
    text: Path | None,
    question: str | None,
    answer: str | None,
    budget: int | float,
    policies: list[str],
    backend: str,
    max_new_tokens: int,
    seed: int,
    output: Path,
) -> None:
    """Run the demo and write its table, report and picture; see `graphkv.cli.demo` for the arguments."""
    # Everything that can be refused is refused before the first slow step.
    chosen = {name: make_policy(name, budget, seed=seed) for name in dict.fromkeys(policies or DEFAULT_POLICIES)}
    decider = load(backend)
    for name, value in (("--question", question), ("--answer", answer)):
        if value is not None and not value.strip():
            raise ArgumentError(f"{name} must not be empty")
    if answer is not None and question is None:
        raise ArgumentError("--answer must come with --question")
    check_folder(output)
    document = None if text is None else read_text(text)

    console = Console()
    with show_steps() as say:
        language_model, tokenizer = load_model(model, say)
        room = int(language_model.config.max_position_embeddings) - max_new_tokens
        prompt = make_prompt(tokenizer, document, question, answer, room)
        reader = Reader(model=language_model, tokenizer=tokenizer, prompt=prompt, max_new_tokens=max_new_tokens)
        with observing(language_model), torch.inference_mode():
            say(f"Reading {prompt.token_ids.shape[1]} tokens")
            cache, prefill_seconds = reader.prefill([policy for policy in chosen.values() if policy is not None])
            expected = prompt.expected or reader.answer(cache.copy())[0]
            results = []
            for name, policy in chosen.items():
                say(f"Answering with {name}")
                results.append(_try_policy(name, policy, reader, cache, expected, decider))
        say("Drawing")
        report = {
            "model": model or DEFAULT_MODEL,
            "prompt_tokens": prompt.token_ids.shape[1],
            "cached_tokens": prompt.token_ids.shape[1] - 1,
            "budget": budget,
            "backend": backend,
            "seed": seed,
            "expected_answer": expected,
            "prefill_seconds": prefill_seconds,
            "results": [result.as_json() for result in results],
            "versions": {
                "graphkv": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "torch", "transformers")},
            },
        }
        write_files(
            output,
            {
                "report.json": json.dumps(report, indent=2) + "\n",
                "kept.png": lambda path: draw(path, results, prompt),
            },
        )
    console.print(_table(results, report))
    console.print(f"Expected: {expected}", highlight=False, markup=False)
    console.print(f"Report:   {output / 'report.json'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Picture:  {output / 'kept.png'}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model with its prompt, which it reads once and answers from whatever is left of the cache."""

    model: Any
    tokenizer: Any
    prompt: ChatPrompt
    max_new_tokens: int

    def prefill(self, policies: list[Policy]) -> tuple[EvictingCache, float]:
        """Read all of the prompt but its last token, so that every token of the answer comes from the evicted cache.

        Returns the cache, with the queries that the policies will ask for, and the seconds that it took.
        """
        cached = self.prompt.token_ids[:, :-1]
        wanted = max((policy.num_queries(cached.shape[1]) for policy in policies), default=0)
        cache = EvictingCache(num_queries=wanted, record=True)
        start = time.perf_counter()
        read(self.model, cached, cache)
        return cache, time.perf_counter() - start

    def answer(self, cache: EvictingCache) -> tuple[str, float]:
        """Generate greedily from the cache; return the answer and the tokens per second."""
        ids = self.prompt.token_ids
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **with_cache(self.model, cache),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - start
        new = out[0, ids.shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True).strip(), new.shape[0] / seconds

    def nll(self, cache: EvictingCache, expected: str) -> float | None:
        """Return the mean negative log-likelihood per token of the expected answer, in nats; None of an empty one."""
        answer = self.tokenizer(expected, add_special_tokens=False)["input_ids"]
        if not answer:
            return None
        logits = teacher_forced_logits(self.model, cache, self.prompt.token_ids[0, -1:].tolist(), answer)
        return float(torch.nn.functional.cross_entropy(logits[0].float(), torch.tensor(answer, device=logits.device)))


def _try_policy(
    name: str, policy: Policy | None, reader: Reader, full: EvictingCache, expected: str, decider: Backend
) -> Result:
    """Evict a copy of the full cache and answer from it."""
    cache = full.copy()
    start = time.perf_counter()
    if policy is not None:
        cache.evict(policy, backend=decider)
    eviction_seconds = time.perf_counter() - start
    stored, nbytes = [layer.num_stored for layer in cache.attention_layers], cache.nbytes
    found = np.stack([fates(layer)[0] for layer in cache.attention_layers])
    nll = reader.nll(cache.copy(), expected)
    answer, speed = reader.answer(cache)
    wanted = reader.prompt.must_contain
    return Result(
        policy=name,
        tokens_kept_per_layer=stored,
        kv_bytes_before=full.nbytes,
        kv_bytes_after=nbytes,
        answer=answer,
        answer_is_correct=None if wanted is None else wanted in answer,
        expected_answer_nll=nll,
        decode_tokens_per_second=speed,
        eviction_seconds=eviction_seconds,
        kept=found >= Fate.KEPT,
        suppressed=found == Fate.SUPPRESSED,
    )


def _table(results: list[Result], report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['model']}, {report['cached_tokens']} cached tokens, decided by {report['backend']}",
        title_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    table.add_column("tokens\nkept per\nlayer", justify="right")
    table.add_column("KV cache\nbefore, after\n(MB)", justify="right", no_wrap=True)
    table.add_column("answer", overflow="fold")
    table.add_column("NLL of\nexpected\nanswer", justify="right")
    table.add_column("decoded\ntokens\nper s", justify="right")
    for result in results:
        least, most = min(result.tokens_kept_per_layer), max(result.tokens_kept_per_layer)
        mark = {None: "", True: "[green]✓[/green] ", False: "[red]✗[/red] "}[result.answer_is_correct]
        table.add_row(
            result.policy,
            str(least) if least == most else f"{least} to {most}",
            f"{result.kv_bytes_before / 1e6:.1f}, {result.kv_bytes_after / 1e6:.1f}",
            mark + " ".join(result.answer.split()).replace("[", r"\["),
            "" if result.expected_answer_nll is None else f"{result.expected_answer_nll:.3f}",
            f"{result.decode_tokens_per_second:.1f}",
        )
    return table
