"""The command ``graphkv demo``: a prompt, a copy of its cache evicted by each policy, and their answers."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..core.backend import Backend, load
from ..core.errors import ArgumentError
from ..core.policy import Policy
from ..integrations.transformers import EvictingCache, Fate, fates, observing
from ..integrations.transformers.versions import with_cache
from ..naming.names import FULL
from ..naming.policies import make_policy
from ..workbench.files import check_folder, write_files
from ..workbench.forward import ask, read, teacher_forced_logits
from ..workbench.model import DEFAULT_MODEL, check_device, load_model
from ..workbench.progress import print_table, show_steps, table_console
from ..workbench.text import read_text
from .picture import draw
from .prompt import ChatPrompt, make_prompt, prompt_of
from .result import Part, Result
from .stories import log, reference

__all__ = ["Reader", "main"]

# What the results recommend where facts are to be found.
RECOMMENDED = "snapkv+degree(fusion=max_rank,unrotated=True)"
DEFAULT_POLICIES = (
    FULL, "random", "snapkv", RECOMMENDED, "snapkv+graphkv", "snapkv+degree", "knorm", "knorm+graphkv", "knorm+degree"
)  # fmt: skip
# Of the demo's own documents, and of what a user brings.
OWN_BUDGET, USUAL_BUDGET = 144, 512
WIDTH = 80
NAMES = (
    "+graphkv is the paper's method on top of a policy, +degree is ours, and by rank on unrotated keys what we "
    "recommend to find facts; snapkv and knorm alone have neither."
)
MEASURED = (
    "{} On 40 prompts a length (graphkv eval --suite standard), needles were found better than "
    "by the base alone in 65 of 88 cells and worse in 0 by what we recommend, better in 59 and worse in 0 by our "
    "degree as a power, better in 14 and worse in 20 by the paper's method."
)


def main(
    *,
    model: str | None,
    text: Path | None,
    question: str | None,
    answer: str | None,
    must_contain: str | None,
    budget: int | float | None,
    policies: list[str],
    backend: str,
    device: str,
    dtype: str,
    max_new_tokens: int,
    seed: int,
    output: Path,
) -> None:
    """Run the demo and write its tables, report and pictures; see `graphkv.cli.demo` for the arguments."""
    # Everything that can be refused is refused before the first slow step.
    names = tuple(dict.fromkeys(policies or DEFAULT_POLICIES))
    for name in names:
        make_policy(name, USUAL_BUDGET if budget is None else budget, seed=seed)
    decider = load(backend)
    given = {"--question": question, "--answer": answer, "--must-contain": must_contain}
    for option, value in given.items():
        if value is not None and not value.strip():
            raise ArgumentError(f"{option} must not be empty")
        if value is not None and question is None:
            raise ArgumentError(f"{option} must come with --question")
    check_device(device, dtype)
    check_folder(output)
    document = None if text is None else read_text(text)

    parts = []
    with show_steps() as say:
        language_model, tokenizer = load_model(model, say, device=device, dtype=dtype)
        room = int(language_model.config.max_position_embeddings) - max_new_tokens
        if document is None and question is None:
            prompts = [
                (story.title, OWN_BUDGET, prompt_of(tokenizer, story, room)) for story in (log(seed), reference(seed))
            ]
        else:
            prompt = make_prompt(tokenizer, document, question, answer, room, must_contain=must_contain, seed=seed)
            prompts = [("your document" if document else "ordinary running text", USUAL_BUDGET, prompt)]
        for title, usual, prompt in prompts:
            tokens = usual if budget is None else budget
            chosen = {name: make_policy(name, tokens, seed=seed) for name in names}
            reader = Reader(model=language_model, tokenizer=tokenizer, prompt=prompt, max_new_tokens=max_new_tokens)
            parts.append(_try_policies(title, tokens, chosen, reader, decider, say))
    report = {
        "model": model or DEFAULT_MODEL,
        "backend": backend,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "parts": [part.as_json() for part in parts],
        "versions": {
            "graphkv": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "transformers")},
        },
    }
    # First what needs no disk.
    console = table_console(WIDTH)
    for number, part in enumerate(parts, start=1):
        _print(console, part, number if len(parts) > 1 else None)
    files = {"report.json": json.dumps(report, indent=2) + "\n"} | {
        f"kept{f'-{number}' if number > 1 else ''}.png": partial(draw, part=part)
        for number, part in enumerate(parts, start=1)
    }
    if not policies:
        print_table(console, Text(NAMES))
    if model is None:
        print_table(
            console, Text(MEASURED.format("These are two prompts." if len(parts) > 1 else "This is one prompt."))
        )
    with show_steps() as say:
        say("Drawing")
        write_files(output, files)
    for file in files:
        console.print(output / file, highlight=False, markup=False, soft_wrap=True)


def _try_policies(
    title: str,
    budget: int | float,
    chosen: dict[str, Policy | None],
    reader: Reader,
    decider: Backend,
    say: Callable[[str], None],
) -> Part:
    """Read a prompt once, and answer from a copy of its cache by each policy."""
    prompt = reader.prompt
    with observing(reader.model), torch.inference_mode():
        say(f"Reading {prompt.token_ids.shape[1]:,} tokens, {title}")
        cache, prefill_seconds = reader.prefill([policy for policy in chosen.values() if policy is not None])
        expected = prompt.expected or reader.answer(cache.copy())[0]
        results = []
        for name, policy in chosen.items():
            say(f"Answering with {name}")
            results.append(_try_policy(name, policy, reader, cache, expected, decider))
    return Part(
        title=title,
        budget=budget,
        prompt=prompt,
        expected=expected,
        prefill_seconds=prefill_seconds,
        results=results,
    )


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
        ids = cached.to(self.model.device)
        read(self.model, ids, cache)
        ask(self.model, self.tokenizer, ids, cache, policies)
        return cache, time.perf_counter() - start

    def answer(self, cache: EvictingCache) -> tuple[str, float]:
        """Generate greedily from the cache; return the answer and the tokens per second."""
        ids = self.prompt.token_ids.to(self.model.device)
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
        answer_is_correct=None if wanted is None else _is_right(answer, wanted),
        expected_answer_nll=nll,
        decode_tokens_per_second=speed,
        eviction_seconds=eviction_seconds,
        kept=found >= Fate.KEPT,
    )


def _is_right(answer: str, wanted: str) -> bool:
    """Return whether an answer contains something, whatever the case and the line breaks."""
    return " ".join(wanted.casefold().split()) in " ".join(answer.casefold().split())


def _print(console: Console, part: Part, number: int | None) -> None:
    """Print what a part is about, and its table: only what differs from policy to policy."""
    cached = part.prompt.token_ids.shape[1] - 1
    sizes = {result.kv_bytes_after: result for result in part.results if result.policy != FULL}
    text = f"{part.title[:1].upper()}{part.title[1:]}, {cached:,} tokens"
    if sizes:
        kept = {count for result in sizes.values() for count in result.tokens_kept_per_layer}
        before, most = part.results[0].kv_bytes_before, max(sizes)
        text += (
            f"; each KV head keeps {_range(sorted(kept), '{:,}')}, a cache {before / most:.1f} times smaller: "
            f"{before / 1e6:.1f} MB become {_range([size / 1e6 for size in sorted(sizes)], '{:.1f}')} MB"
        )
    lines = [f"{number}. {text}" if number else text, f"Question: {part.prompt.question}", f"Expected: {part.expected}"]
    if part.prompt.must_contain:
        lines.append(f'✓: the answer contains "{part.prompt.must_contain}"')
    lines.append("NLL of the expected answer, in nats per token: lower is better")
    console.print()
    for line in lines:
        print_table(console, Text(line))
    print_table(console, _table(part.results))


def _range(numbers: Sequence[float], form: str) -> str:
    least, most = form.format(numbers[0]), form.format(numbers[-1])
    return least if least == most else f"{least} to {most}"


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("NLL", justify="right", no_wrap=True)
    # Long names of policies, with options, go on in the next line.
    table.add_column("policy", overflow="fold", max_width=24)
    table.add_column("answer", overflow="fold")
    for result in results:
        mark = {None: "", True: "[green]✓[/green] ", False: "[red]✗[/red] "}[result.answer_is_correct]
        table.add_row(
            "" if result.expected_answer_nll is None else f"{result.expected_answer_nll:.3f}",
            result.policy.replace("[", r"\["),
            mark + " ".join(result.answer.split()).replace("[", r"\["),
        )
    return table
