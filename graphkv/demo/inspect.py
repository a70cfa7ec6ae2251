"""``graphkv inspect``: read one prompt, evict it, and show what became of every token."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ..core.backend import load
from ..core.errors import ArgumentError
from ..evaluation.model import DEFAULT_MODEL, load_model
from ..evaluation.policies import make_policy
from ..integrations.transformers import EvictingCache, observing
from ..integrations.transformers.versions import with_cache
from .files import check_folder, write_files
from .findings import find
from .page import write_page
from .picture import draw_findings
from .progress import progress
from .prompt import make_prompt, read_paragraphs

__all__ = ["main"]


def main(
    *,
    model: str | None,
    text: Path | None,
    question: str | None,
    budget: int | float,
    policy: str,
    backend: str,
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
    check_folder(output)
    document = None if text is None else read_paragraphs(text)

    with progress() as say:
        language_model, tokenizer = load_model(model, say)
        config = language_model.config
        sizes = {"--layer": (layer, config.num_hidden_layers), "--head": (head, _num_heads(config))}
        for name, (index, size) in sizes.items():
            if index is not None and index >= size:
                raise ArgumentError(f"{name} must lie in [0, {size - 1}]; got {index}")
        prompt = make_prompt(tokenizer, document, question, None, int(config.max_position_embeddings))
        say(f"Reading {prompt.token_ids.shape[1]} tokens")
        cache = EvictingCache(chosen, record=True, backend=decider)
        with observing(language_model), torch.inference_mode():
            language_model(prompt.token_ids, **with_cache(language_model, cache), logits_to_keep=1)
        say("Drawing")
        title = f"{policy} on {model or DEFAULT_MODEL}"
        findings = find(cache, prompt.words, title=title, layer=layer, head=head, fact=prompt.fact)
        write_files(
            output,
            {
                "inspect.png": lambda path: draw_findings(path, findings),
                "inspect.html": lambda path: write_page(path, findings),
            },
        )
    console = Console()
    for line in (cache.report(), "", f"Picture:  {output / 'inspect.png'}", f"Page:     {output / 'inspect.html'}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _num_heads(config: object) -> int:
    """Give the number of KV heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)  # type: ignore[attr-defined]
