"""The command ``graphkv inspect``: one prompt, evicted, and the fate of every token."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.backend import load
from ..core.errors import ArgumentError
from ..integrations.transformers import EvictingCache, observing
from ..naming.policies import make_policy
from ..workbench.files import check_folder, write_files
from ..workbench.forward import ask, read
from ..workbench.model import DEFAULT_MODEL, check_device, load_model
from ..workbench.progress import show_steps, table_console
from ..workbench.text import read_text
from .findings import find
from .page import write_page
from .picture import draw_findings
from .prompt import make_prompt

__all__ = ["main"]


def main(
    *,
    model: str | None,
    text: Path | None,
    question: str | None,
    budget: int | float,
    policy: str,
    backend: str,
    device: str,
    dtype: str,
    seed: int,
    layer: int | None,
    head: int | None,
    output: Path,
) -> None:
    """Run the inspection, print the cache's report and write picture and page; see `graphkv.cli.inspect`."""
    chosen = make_policy(policy, budget, seed=seed)
    if chosen is None:
        raise ArgumentError(f"--policy must evict something; got {policy!r}")
    decider = load(backend)
    if question is not None and not question.strip():
        raise ArgumentError("--question must not be empty")
    check_device(device, dtype)
    check_folder(output)
    document = None if text is None else read_text(text)

    with show_steps() as say:
        language_model, tokenizer = load_model(model, say, device=device, dtype=dtype)
        config = language_model.config
        sizes = {"--layer": (layer, config.num_hidden_layers), "--head": (head, _num_heads(config))}
        for name, (index, size) in sizes.items():
            if index is not None and index >= size:
                raise ArgumentError(f"{name} must lie in [0, {size - 1}]; got {index}")
        prompt = make_prompt(tokenizer, document, question, None, int(config.max_position_embeddings))
        say(f"Reading {prompt.token_ids.shape[1]} tokens")
        asks = chosen.needs().probes
        wanted = chosen.num_queries(prompt.token_ids.shape[1]) if asks else 0
        cache = EvictingCache(None if asks else chosen, num_queries=wanted, record=True, backend=decider)
        with observing(language_model), torch.inference_mode():
            ids = prompt.token_ids.to(language_model.device)
            read(language_model, ids, cache)
            if asks:
                ask(language_model, tokenizer, ids, cache, [chosen])
                cache.evict(chosen)
        title = f"{policy} on {model or DEFAULT_MODEL}"
        findings = find(cache, prompt.words, title=title, layer=layer, head=head, fact=prompt.fact)
    # First what needs no disk.
    console = table_console()
    console.print(cache.report(), "", sep="\n", highlight=False, markup=False, soft_wrap=True)
    with show_steps() as say:
        say("Drawing")
        write_files(
            output,
            {
                "inspect.png": lambda path: draw_findings(path, findings),
                "inspect.html": lambda path: write_page(path, findings),
            },
        )
    for line in (f"Picture:  {output / 'inspect.png'}", f"Page:     {output / 'inspect.html'}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _num_heads(config: object) -> int:
    """Return the number of KV heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)  # type: ignore[attr-defined]
