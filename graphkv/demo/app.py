"""Read the prompt once, evict a copy of its cache per policy, and compare the answers."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from .. import __version__
from ..adapters import Random, SnapKV, StreamingLLM
from ..core.backend import load
from ..core.errors import ArgumentError
from ..core.policy import GraphKV, Policy
from ..core.selection import select
from ..integrations.transformers import EvictingCache, observing
from .model import DEFAULT_MODEL, load_model
from .picture import draw
from .prompt import Prompt, make_prompt
from .result import Result

__all__ = ["main", "make_policy"]

DEFAULT_POLICIES = ("full", "random", "streaming-llm", "snapkv", "snapkv+graphkv")
BASES: dict[str, Callable[[int | float, int], Policy]] = {
    "random": lambda budget, seed: Random(budget=budget, seed=seed),
    "streaming-llm": lambda budget, seed: StreamingLLM(budget=budget),
    "snapkv": lambda budget, seed: SnapKV(budget=budget),
}


def make_policy(name: str, budget: int | float, seed: int) -> Policy | None:
    """Make the policy of a name such as ``snapkv`` or ``snapkv+graphkv``; None for ``full``."""
    if name == "full":
        return None
    base, plus, graph = name.partition("+")
    if base not in BASES or (plus and graph != "graphkv"):
        known = ", ".join(["full", *BASES])
        raise ArgumentError(f"--policy must be one of {known}, or one of them with +graphkv; got {name!r}")
    made = BASES[base](budget, seed)
    return GraphKV(made) if plus else made


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
    chosen = {name: make_policy(name, budget, seed) for name in dict.fromkeys(policies or DEFAULT_POLICIES)}
    decider = load(backend)
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder; {output} is a file")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    console, errors = Console(), Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("Starting")

        def say(step: str) -> None:
            progress.update(task, description=step)

        language_model, tokenizer = load_model(model, say)
        room = int(language_model.config.max_position_embeddings) - max_new_tokens
        prompt = make_prompt(tokenizer, text, question, answer, room)
        with observing(language_model), torch.inference_mode():
            say(f"Reading {prompt.token_ids.shape[1]} tokens")
            cache, prefill_seconds = _prefill(language_model, prompt, list(chosen.values()))
            expected = prompt.expected or _answer(language_model, tokenizer, prompt, cache.copy(), max_new_tokens)[0]
            results = []
            for name, policy in chosen.items():
                say(f"Answering with {name}")
                results.append(
                    _try_policy(
                        name, policy, language_model, tokenizer, prompt, cache, expected, decider, max_new_tokens
                    )
                )
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
        try:
            output.mkdir(parents=True, exist_ok=True)
            _replace(output / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
            _replace(output / "kept.png", lambda path: draw(path, results, prompt))
        except OSError as error:
            raise ArgumentError(f"--output {output} cannot be written: {error.strerror or error}") from error
    console.print(_table(results, prompt, report))
    console.print(f"Expected: {expected}", highlight=False)
    console.print(f"Report:   {output / 'report.json'}", highlight=False, soft_wrap=True)
    console.print(f"Picture:  {output / 'kept.png'}", highlight=False, soft_wrap=True)


def _prefill(model: Any, prompt: Prompt, policies: list[Policy | None]) -> tuple[EvictingCache, float]:
    """Read all of the prompt but its last token, so that every token of the answer comes from the evicted cache."""
    cached = prompt.token_ids[:, :-1]
    wanted = max((policy.num_queries(cached.shape[1]) for policy in policies if policy is not None), default=0)
    cache = EvictingCache(num_queries=wanted)
    start = time.perf_counter()
    model(cached, past_key_values=cache, logits_to_keep=1)
    return cache, time.perf_counter() - start


def _try_policy(
    name: str,
    policy: Policy | None,
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    full: EvictingCache,
    expected: str,
    backend: Any,
    max_new_tokens: int,
) -> Result:
    cache = full.copy()
    start = time.perf_counter()
    if policy is not None:
        cache.evict(policy, backend=backend)
    eviction_seconds = time.perf_counter() - start
    stored = [layer.num_stored for layer in cache.layers]
    nbytes = cache.nbytes
    kept, suppressed = _fates(cache)
    nll = _nll(model, tokenizer, prompt, cache.copy(), expected)
    answer, speed = _answer(model, tokenizer, prompt, cache, max_new_tokens)
    return Result(
        policy=name,
        tokens_kept_per_layer=stored,
        kv_bytes_before=full.nbytes,
        kv_bytes_after=nbytes,
        answer=answer,
        answer_is_correct=None if prompt.must_contain is None else prompt.must_contain in answer,
        expected_answer_nll=nll,
        decode_tokens_per_second=speed,
        eviction_seconds=eviction_seconds,
        kept=kept,
        suppressed=suppressed,
    )


def _answer(model: Any, tokenizer: Any, prompt: Prompt, cache: EvictingCache, max_new_tokens: int) -> tuple[str, float]:
    """Generate greedily from the cache; give the answer and the tokens per second."""
    start = time.perf_counter()
    out = model.generate(
        prompt.token_ids,
        attention_mask=torch.ones_like(prompt.token_ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    seconds = time.perf_counter() - start
    new = out[0, prompt.token_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip(), new.shape[0] / seconds


def _nll(model: Any, tokenizer: Any, prompt: Prompt, cache: EvictingCache, expected: str) -> float:
    """Give the mean negative log-likelihood per token of the expected answer, in nats."""
    ids = tokenizer(expected, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        return math.nan
    logits = model(torch.cat([prompt.token_ids[:, -1:], ids[:, :-1]], dim=1), past_key_values=cache).logits
    return float(torch.nn.functional.cross_entropy(logits[0].float(), ids[0]))


def _fates(cache: EvictingCache) -> tuple[Any, Any]:
    """Say of every layer, head and token whether it was kept, and whether the graph suppressed it."""
    kept, suppressed = [], []
    for layer in cache.layers:
        everything = torch.zeros((*layer.keys.shape[:2], layer.num_seen), dtype=torch.bool)[0]
        decision = layer.eviction
        if decision is None:
            kept.append(~everything)
            suppressed.append(everything)
            continue
        mask = everything.scatter(-1, _host(decision, decision.kept), True)
        kept.append(mask)
        if decision.graph is None:
            suppressed.append(everything)
            continue
        alone = select(decision.importance, decision.budget, protected=decision.protected, backend=decision.backend)
        suppressed.append(everything.scatter(-1, _host(decision, alone), True) & ~mask)
    return torch.stack(kept).numpy(), torch.stack(suppressed).numpy()


def _host(decision: Any, indices: Any) -> torch.Tensor:
    return torch.as_tensor(decision.backend.to_numpy(indices))[0]


def _table(results: list[Result], prompt: Prompt, report: dict[str, Any]) -> Table:
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
            f"{result.expected_answer_nll:.3f}",
            f"{result.decode_tokens_per_second:.1f}",
        )
    return table


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        write(scratch)
        scratch.chmod(0o644)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
