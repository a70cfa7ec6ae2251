"""The commands. Heavy imports happen inside them, so that ``--help`` and a wrong option answer at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from .core import ArgumentError, BackendUnavailableError, GraphKVError

__all__ = ["app", "parse_budget", "run"]

INTERRUPTED = 130

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def graphkv() -> None:
    """KV-cache eviction that knows about near-duplicates."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Document to read. Default: about 2,000 tokens on Python.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Question about the document. Default: about a fact that is placed in it.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Expected answer. Default: the fact, or what the full cache answers.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Tokens to keep per layer: a number, or a percentage like 25%.")] = "512",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="full, or a method such as snapkv, keydiff; +graphkv puts the graph on top, +degree ours. Repeatable."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="Who decides what is kept: numpy, torch, jax or cupy.")] = "torch",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random policy.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for report.json and kept.png.")] = Path("graphkv-demo"),
) -> None:
    """Evict a real model's KV cache by several policies, and compare their answers.

    The prompt is read once. Every policy evicts its own copy of that cache and answers from what is left.
    """
    tokens = parse_budget(budget)
    from .demo.app import main  # noqa: PLC0415 - torch and transformers take seconds to import

    main(
        model=model,
        text=text,
        question=question,
        answer=answer,
        budget=tokens,
        policies=policy or [],
        backend=backend,
        max_new_tokens=max_new_tokens,
        seed=seed,
        output=output,
    )


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Document to read. Default: about 2,000 tokens on Python.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Question about the document. Default: about a fact that is placed in it.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Tokens to keep per layer: a number, or a percentage like 25%.")] = "512",
    policy: Annotated[
        str, typer.Option(help="A method such as snapkv, h2o or keydiff; +graphkv puts the graph on top, +degree ours.")
    ] = "snapkv+graphkv",
    backend: Annotated[str, typer.Option(help="Who decides what is kept: numpy, torch, jax or cupy.")] = "torch",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random policy.")] = 0,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer to look at first. Default: where most was suppressed.")
    ] = None,
    head: Annotated[int | None, typer.Option(min=0, help="KV head to look at first. Default: likewise.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for inspect.png and inspect.html.")] = Path("graphkv-inspect"),
) -> None:
    """Evict one prompt by one policy, and show token by token what was kept, dropped or suppressed, and by whom."""
    tokens = parse_budget(budget)
    from .demo.inspect import main  # noqa: PLC0415 - torch and transformers take seconds to import

    main(
        model=model,
        text=text,
        question=question,
        budget=tokens,
        policy=policy,
        backend=backend,
        seed=seed,
        layer=layer,
        head=head,
        output=output,
    )


@app.command(name="eval")
def evaluate(
    suite: Annotated[str | None, typer.Option(help="Settings that come with graphkv: quick or standard.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of your own.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="What to ask, such as needle; tasks joined by + share their prompts. Repeatable."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt before the question. Repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A method such as snapkv; +graphkv puts the graph on top, +degree ours. Repeatable."),
    ] = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Tokens to keep per KV head. Repeatable.")] = None,
    sinks: Annotated[
        list[int] | None, typer.Option(min=0, help="First tokens that every policy keeps. Repeatable. Default: 4.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="aware: the question is in the cache when it is evicted; agnostic: it is not. Repeatable."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts per task and length.")] = None,
    split: Annotated[str | None, typer.Option(help="held-out, to report; or tuning, to choose settings by.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="First prompt of the split.")] = None,
    generate: Annotated[
        bool | None, typer.Option("--generate/--no-generate", help="Let the model answer, and score the text.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder of text for the prompts. Default: Python's language reference.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File of rows with context, question and answers, one JSON object per line, to ask instead."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric of rows that name none, such as f1 or rouge_l.")] = None,
    closeness: Annotated[
        bool | None, typer.Option("--closeness/--no-closeness", help="Compare attention with the full cache's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Most caches that answer at a time.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with a model. Default: one per core for the default model, else 1."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch per process. Default: the cores shared out.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; a run that is there is continued.")] = Path(
        "graphkv-eval"
    ),
) -> None:
    """Measure how well a model answers from caches that are evicted by several policies.

    Every prompt is read once and serves all policies and budgets. A run that was interrupted goes on where it stopped.
    """
    given = {
        "model": model,
        "tasks": task,
        "lengths": length,
        "policies": policy,
        "budgets": budget,
        "sinks": sinks,
        "modes": mode,
        "prompts": prompts,
        "split": split,
        "seed": seed,
        "generate": generate,
        "closeness": closeness,
        "text": None if text is None else str(text),
        "data": None if data is None else str(data),
        "metric": metric,
        "batch": batch,
    }
    try:
        from .evaluation.app import main  # noqa: PLC0415 - torch and transformers take seconds to import
        from .evaluation.config import load_config  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailableError(f"graphkv eval needs: pip install 'graphkv[eval]' ({error})") from error
    settings = load_config(suite, config, {name: value for name, value in given.items() if value is not None})
    main(settings, output=output, workers=workers, threads=threads)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run of graphkv eval, finished or not.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="What to report, such as nll, kl, match or score. Repeatable. Default: nll, and score or match."
        ),
    ] = None,
    effect: Annotated[float, typer.Option(help="Difference for which the number of prompts needed is given.")] = 0.1,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report, in the run.")] = None,
) -> None:
    """Write what a run found as Markdown and as one HTML page with plots."""
    try:
        from .evaluation.report import main  # noqa: PLC0415 - matplotlib and scipy take seconds to import
    except ImportError as error:
        raise BackendUnavailableError(f"graphkv report needs: pip install 'graphkv[eval]' ({error})") from error
    main(run, output=output, metrics=metric or [], effect=effect)


@app.command()
def tune(
    base: Annotated[str, typer.Option(help="Policy under the graph, such as snapkv or h2o(num_recent=32).")] = "snapkv",
    budget: Annotated[int, typer.Option(min=1, help="Tokens to keep per KV head in the average layer.")] = 256,
    model: Annotated[
        str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="As of graphkv eval. Repeatable.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="As of graphkv eval. Repeatable.")] = None,
    mode: Annotated[
        str, typer.Option(help="agnostic: questions come after the eviction; aware: they are in the cache before it.")
    ] = "agnostic",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that are always kept.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per task and length to tune on.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts per task and length to report on.")] = 40,
    metric: Annotated[str, typer.Option(help="What to improve: nll, kl, match or score.")] = "nll",
    evaluations: Annotated[int, typer.Option(min=1, help="About how many candidates to try.")] = 200,
    graph_groups: Annotated[
        int, typer.Option(min=0, help="Groups of layers with graph options of their own; 0: no graph.")
    ] = 3,
    group_size: Annotated[
        int, typer.Option(min=0, help="Layers whose budgets are searched together; 0: budgets stay.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    text: Annotated[Path | None, typer.Option(help="As of graphkv eval.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. Default: one per core.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for preset.toml; a search that is there is continued.")] = Path(
        "graphkv-tune"
    ),
) -> None:
    """Search for graph options and layer budgets that suit a model and its tasks, and write them as a preset.

    Candidates are chosen on the tuning split; what the best one is worth is measured on the held-out split.
    """
    try:
        from .evaluation.config import load_config  # noqa: PLC0415 - torch and transformers take seconds to import
        from .evaluation.tune import main  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailableError(f"graphkv tune needs: pip install 'graphkv[tune]' ({error})") from error
    given = {
        "tasks": task,
        "lengths": length,
        "modes": [mode],
        "policies": [base],
        "budgets": [budget],
        "sinks": [sinks],
        "prompts": prompts,
        "split": "tuning",
        "generate": metric == "score",
        "model": model,
        "text": None if text is None else str(text),
    }
    config = load_config(None, None, {name: value for name, value in given.items() if value is not None})
    main(
        config,
        held_out=held_out,
        metric=metric,
        evaluations=evaluations,
        graph_groups=graph_groups,
        group_size=group_size,
        seed=seed,
        threads=threads,
        output=output,
    )


def parse_budget(text: str) -> int | float:
    """Read ``512`` as tokens and ``25%`` as a share.

    >>> parse_budget("512"), parse_budget("25%"), parse_budget("12.5 %")
    (512, 0.25, 0.125)
    """
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None or (not match[2] and "." in match[1]):
        raise ArgumentError(f"--budget must be a number of tokens or a percentage like 25%; got {text!r}")
    if match[2]:
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise ArgumentError(f"--budget must lie above 0% and be at most 100%; got {text!r}")
        return share
    if int(match[1]) < 1:
        raise ArgumentError(f"--budget must be at least 1 token; got {text!r}")
    return int(match[1])


def run(arguments: list[str]) -> int:
    """Run a command and give its exit code."""
    try:
        # Outside standalone mode Typer gives the exit code of --help and of Ctrl-C instead of exiting.
        code = app(arguments, prog_name="graphkv", standalone_mode=False) or 0
    except GraphKVError as error:
        return _refuse(str(error))
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        # The base class of wrong options moved between Typer's releases; all of them can format their message.
        if not hasattr(error, "format_message"):
            raise
        return _refuse(error.format_message())
    if code == INTERRUPTED:
        print("graphkv: interrupted", file=sys.stderr)
    return int(code)


def _refuse(message: str) -> int:
    print("graphkv: " + " ".join(message.split()), file=sys.stderr)
    return 2
