"""The commands. Heavy imports happen inside them, so that ``--help`` and a wrong option answer at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from .core import BackendUnavailableError, GraphKVError
from .core.backend import BUILT_IN, ENTRY_POINTS
from .naming.policies import parse_budget

__all__ = ["app", "run"]

INTERRUPTED = 130
# Those of this package, and those that installed packages offer.
BACKENDS = sorted({*BUILT_IN, *(offer.name for offer in entry_points(group=ENTRY_POINTS))})
OWN = "package.module:NAME is a policy of your own"

Backend = Annotated[str, typer.Option(help=f"Who decides what is kept: {', '.join(BACKENDS)}.")]
Budget = Annotated[str, typer.Option(help="Tokens to keep per layer: a number, or a percentage like 25%.")]
Document = Annotated[Path | None, typer.Option(help="Document to read. Default: about 2,000 tokens on Python.")]
Lengths = Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a prompt before the question. Repeatable.")]
Model = Annotated[
    str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
]
Policies = Annotated[
    list[str] | None,
    typer.Option(help=f"A method such as snapkv; +graphkv puts the graph on top, +degree ours; {OWN}. Repeatable."),
]
PromptText = Annotated[
    Path | None, typer.Option(help="File or folder of text for the prompts. Default: Python's language reference.")
]
Question = Annotated[
    str | None, typer.Option(help="Question about the document. Default: about a fact that is placed in it.")
]
RandomSeed = Annotated[int, typer.Option(min=0, help="Seed of the random policy.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="What to ask, such as needle; tasks joined by + share their prompts. Repeatable."),
]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def graphkv() -> None:
    """KV-cache eviction that knows about near-duplicates."""


@contextmanager
def _extra(command: str, extra: str) -> Iterator[None]:
    """Name the extra that a command needs where an import fails."""
    try:
        yield
    except ImportError as error:
        raise BackendUnavailableError(f"graphkv {command} needs: pip install 'graphkv[{extra}]' ({error})") from error


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, as values of a file of settings."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }


@app.command()
def demo(
    model: Model = None,
    text: Document = None,
    question: Question = None,
    answer: Annotated[
        str | None, typer.Option(help="Expected answer. Default: the fact, or what the full cache answers.")
    ] = None,
    budget: Budget = "512",
    policy: Policies = None,
    backend: Backend = "torch",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    seed: RandomSeed = 0,
    output: Annotated[Path, typer.Option(help="Folder for report.json and kept.png.")] = Path("graphkv-demo"),
) -> None:
    """Evict a real model's KV cache by several policies, and compare their answers.

    The prompt is read once. Every policy evicts its own copy of that cache and answers from what is left.
    """
    tokens = parse_budget(budget)
    with _extra("demo", "demo"):
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
    model: Model = None,
    text: Document = None,
    question: Question = None,
    budget: Budget = "512",
    policy: Annotated[
        str,
        typer.Option(help=f"A method such as snapkv; +graphkv puts the graph on top, +degree ours; {OWN}."),
    ] = "snapkv+graphkv",
    backend: Backend = "torch",
    seed: RandomSeed = 0,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Layer to look at first. Default: where most was suppressed.")
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, help="KV head to look at first. Default: where most was suppressed.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for inspect.png and inspect.html.")] = Path("graphkv-inspect"),
) -> None:
    """Evict one prompt by one policy, and show token by token what was kept, dropped or suppressed, and by whom."""
    tokens = parse_budget(budget)
    with _extra("inspect", "demo"):
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
    model: Model = None,
    task: Tasks = None,
    length: Lengths = None,
    policy: Policies = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Tokens to keep per KV head. Repeatable.")] = None,
    sinks: Annotated[
        list[int] | None,
        typer.Option(min=0, help="First tokens to keep before all others. Repeatable. Default: 4."),
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
    text: PromptText = None,
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
    output: Annotated[Path, typer.Option(help="Folder of the run; a run in it is continued.")] = Path("graphkv-eval"),
) -> None:
    """Measure how well a model answers from caches that are evicted by several policies.

    Every prompt is read once and serves all policies and budgets. A run that was interrupted goes on where it stopped.
    """
    with _extra("eval", "eval"):
        from .evaluation.runs.command import main  # noqa: PLC0415 - torch and transformers take seconds to import
        from .evaluation.runs.config import load_config  # noqa: PLC0415

    given = _given(
        model=model,
        tasks=task,
        lengths=length,
        policies=policy,
        budgets=budget,
        sinks=sinks,
        modes=mode,
        prompts=prompts,
        split=split,
        seed=seed,
        generate=generate,
        closeness=closeness,
        text=text,
        data=data,
        metric=metric,
        batch=batch,
    )
    main(load_config(suite, config, given), output=output, workers=workers, threads=threads)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run of graphkv eval, finished or not.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="What to report, such as nll, kl, match or score. Repeatable. Default: nll, and score or match."
        ),
    ] = None,
    effect: Annotated[float, typer.Option(help="Difference to compute the number of prompts needed for.")] = 0.1,
    output: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report, in the run.")] = None,
) -> None:
    """Write what a run found as Markdown and as one HTML page with plots."""
    with _extra("report", "eval"):
        from .evaluation.report.command import main  # noqa: PLC0415 - matplotlib and scipy take seconds to import

    main(run, output=output, metrics=metric or [], effect=effect)


@app.command()
def tune(
    base: Annotated[
        str, typer.Option(help=f"Policy under the graph, such as snapkv or h2o(num_recent=32); {OWN}.")
    ] = "snapkv",
    budget: Annotated[int, typer.Option(min=1, help="Tokens to keep per KV head in the average layer.")] = 256,
    model: Model = None,
    task: Tasks = None,
    length: Lengths = None,
    mode: Annotated[
        str, typer.Option(help="agnostic: questions come after the eviction; aware: they are in the cache before it.")
    ] = "agnostic",
    sinks: Annotated[int, typer.Option(min=0, help="First tokens to keep before all others.")] = 4,
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
    text: PromptText = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch. Default: one per core.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for preset.toml; a search in it is continued.")] = Path(
        "graphkv-tune"
    ),
) -> None:
    """Search for graph options and layer budgets that suit a model and its tasks, and write them as a preset.

    Candidates are chosen on the tuning split; the best one is measured on the held-out split.
    """
    with _extra("tune", "tune"):
        from .evaluation.runs.config import load_config  # noqa: PLC0415 - torch and transformers take seconds to import
        from .evaluation.tuning.command import main  # noqa: PLC0415

    given = _given(
        model=model,
        tasks=task,
        lengths=length,
        modes=[mode],
        policies=[base],
        budgets=[budget],
        sinks=[sinks],
        prompts=prompts,
        split="tuning",
        generate=metric == "score",
        text=text,
    )
    main(
        load_config(None, None, given),
        held_out=held_out,
        metric=metric,
        evaluations=evaluations,
        graph_groups=graph_groups,
        group_size=group_size,
        seed=seed,
        threads=threads,
        output=output,
    )


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    try:
        # Outside standalone mode Typer returns the exit code of --help and of Ctrl-C instead of exiting.
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
