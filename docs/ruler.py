"""Write the tables of results/ruler.md from the records beside it.

``python docs/ruler.py`` rewrites the tables between their marks, ``--check`` only says whether they are current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from claims import missing, signed
from marked import renew
from reports import RESULTS, records

from graphkv.evaluation.prompts.ruler import RULER
from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Comparison, Interval, compare
from graphkv.naming.names import FULL, base_name

PAGE = RESULTS / "ruler.md"
# Of the full cache's mean score, out of 1: a task below it says nothing about eviction.
ABLE = 0.5
QUESTION = {"aware": "known", "agnostic": "unknown"}
# The same method as a press of kvpress and as a policy.
PRESSES = (
    ("kvpress:RandomPress", "random"),
    ("kvpress:StreamingLLMPress", "streaming-llm"),
    ("kvpress:KnormPress", "knorm"),
    ("kvpress:KeyDiffPress", "keydiff"),
    ("kvpress:SnapKVPress(window_size=32,kernel_size=7)", "snapkv"),
    ("kvpress:ExpectedAttentionPress", "expected-attention(epsilon=0.0)"),
    ("kvpress:ExpectedAttentionPress", "expected-attention"),
)


def able(read: Sequence[Record]) -> set[tuple[str, int | None]]:
    """Select the tasks, by length, that the full cache can do."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for one in read:
        if one.policy == FULL and one.score is not None:
            found.setdefault((one.task, one.length), []).append(one.score)
    return {cell for cell, scores in found.items() if fmean(scores) >= ABLE}


def full_cache(read: Sequence[Record]) -> str:
    """Render the full cache's scores, by task and length."""
    read = [one for one in read if one.policy == FULL]
    lengths = sorted({one.length or 0 for one in read})
    lines = [["task", *(f"{length:,} tokens" for length in lengths)], ["---"] * (1 + len(lengths))]
    for task in RULER:
        own = {length: [one.score for one in read if (one.task, one.length) == (task, length)] for length in lengths}
        if any(own.values()):
            cells = [100 * fmean([score for score in scores if score is not None]) for scores in own.values()]
            lines.append([f"`{task}`", *(f"**{cell:.0f}**" if cell >= 100 * ABLE else f"{cell:.0f}" for cell in cells)])
    return _table(lines)


def pooled(read: Sequence[Record]) -> list[Record]:
    """Put all tasks into one cell per mode and share removed, in which each prompt is a pair of its own."""
    return [
        replace(
            one,
            task="all",
            length=None,
            budget=one.budget and removed(one),
            # Prompts of an evaluation are paired by name; questions of a prompt are averaged.
            prompt=f"{one.task}/{one.prompt}",
        )
        for one in read
    ]


def removed(one: Record) -> int:
    """Compute the share of a prompt that a policy removed, in tenths of a percent: 875 for .875."""
    assert one.budget is not None
    assert one.length is not None
    return round(1000 * (1 - one.budget / one.length))


def rows(read: Sequence[Record], metric: str, form: str, scale: float = 1.0) -> str:
    """Render a row per policy and a column per mode and share removed.

    Parameters
    ----------
    read : sequence of Record
        Of tasks that count.
    metric : str
        ``score`` or ``nll``.
    form : str
        Of a number.
    scale : float
        What numbers are multiplied by.
    """
    together = pooled(read)
    known = list(dict.fromkeys(one.policy for one in together if one.policy != FULL))
    roots = list(dict.fromkeys(base_name(name) for name in known))
    # What stands on a base comes after it, also where it was measured later.
    names = sorted(known, key=lambda name: roots.index(base_name(name)))
    pairs = {name: base_name(name) for name in names if base_name(name) != name and base_name(name) in names}
    gains: dict[tuple[str, str, int | None], Comparison] = {
        (one.policy, one.cell.mode, one.cell.budget): one for one in compare(together, metric, pairs)
    }
    shares = sorted({one.budget or 0 for one in together} - {0})
    columns = [(mode, share) for mode in QUESTION for share in shares]
    head = [f"{QUESTION[mode]}, {_share(share)}" for mode, share in columns]
    lines = [["policy", *head], ["---"] * (1 + len(columns))]
    for name in names:
        cells = []
        for mode, share in columns:
            cell_of = (name, mode, share)
            own = [getattr(one, metric) for one in together if (one.policy, one.mode, one.budget) == cell_of]
            cell = form.format(scale * fmean(own)) if own else "-"
            if (gain := gains.get((name, mode, share))) is not None:
                cell += f"; {_difference(gain.difference, form, scale)}"
            cells.append(cell)
        lines.append([f"`{name}`", *cells])
    return _table(lines)


def presses(read: Sequence[Record]) -> str:
    """Render presses next to the policies that do the same: the mean NLL of both, and their difference."""
    together = pooled(read)
    lines = [["press", "policy", "question", "removed", "press", "policy; less the press"], ["---"] * 6]
    for press, policy in PRESSES:
        for found in compare(together, "nll", {policy: press}):
            mode, share = found.cell.mode, found.cell.budget
            means = [
                fmean(one.nll for one in together if (one.policy, one.mode, one.budget) == (name, mode, share))
                for name in (press, policy)
            ]
            difference = _difference(found.difference, "{:.2f}", 1.0)
            cells = [f"{means[0]:.2f}", f"{means[1]:.2f}; {difference}"]
            lines.append([f"`{press.removeprefix('kvpress:')}`", f"`{policy}`", QUESTION[mode], _share(share), *cells])
    return _table(lines)


def said(read: Sequence[Record]) -> Iterator[str]:
    """Make the sentences in numbers that the page must hold."""
    ranks = "snapkv+degree(fusion='max_rank',unrotated=True)"
    found: dict[tuple[str, str, str], float] = {}
    for policy in ("snapkv", "keydiff", "snapkv+graphkv", ranks):
        for mode in QUESTION:
            own = [one for one in read if (one.policy, one.mode) == (policy, mode)]
            found[policy, mode, "score"] = 100 * fmean([one.score for one in own if one.score is not None])
            found[policy, mode, "nll"] = fmean(one.nll for one in own)
    for mode, words in (("aware", "with the question"), ("agnostic", "without it")):
        yield f"{words} ({found[ranks, mode, 'score']:.0f} for {found['snapkv', mode, 'score']:.0f})"
    gains = [found["snapkv", mode, "nll"] - found[ranks, mode, "nll"] for mode in QUESTION]
    yield f"rises by {gains[0]:.1f} and {gains[1]:.1f} nats".replace("0.", ".")
    paper, alone = found["snapkv+graphkv", "aware", "score"], found["snapkv", "aware", "score"]
    yield f"where the question is known ({paper:.0f} for {alone:.0f})"
    keydiff = {f"{found['keydiff', mode, 'score']:.0f}" for mode in QUESTION}
    yield f"finds {' and '.join(sorted(keydiff))} either way"
    answers = [one.score for one in records("ruler/qa.jsonl.gz") if (one.policy, one.mode) == (FULL, "aware")]
    yield f"the full cache has an F1 of {100 * fmean([each for each in answers if each is not None]):.0f} of 100"


def _difference(found: Interval, form: str, scale: float) -> str:
    plus = form.replace("{:", "{:+")
    mean, low, high = (plus.format(scale * value) for value in (found.mean, found.low, found.high))
    text = signed(f"{mean} [{low}, {high}]")
    return f"**{text}**" if found.excludes_zero() else text


def _share(removed: int | None) -> str:
    return f".{removed:03d}".rstrip("0")


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Rewrite the page, or check it."""
    full, scored = (records(f"ruler/{name}.jsonl.gz") for name in ("full", "scores"))
    tasks = able([*full, *scored])
    counted = [one for one in scored if (one.task, one.length) in tasks]
    tables = {"full": full_cache([*full, *scored]), "scores": rows(counted, "score", "{:.0f}", 100)}
    tables["likelihood"] = rows(counted, "nll", "{:.2f}")
    for name, files in {"shares": ("shares", "more"), "longer": ("longer",)}.items():
        read = [one for file in files for one in records(f"ruler/{file}.jsonl.gz")]
        # Of the full cache, which every run has, one is enough.
        likely = list({one.key: one for one in read if (one.task, one.length) in tasks}.values())
        for length in sorted({one.length or 0 for one in likely}):
            tables[f"{name} {length}"] = rows([one for one in likely if one.length == length], "nll", "{:.2f}")
    both = [
        *records("ruler/presses.jsonl.gz"),
        *(one for one in records("ruler/epsilon.jsonl.gz") if one.policy != FULL),
    ]
    tables["presses"] = presses([one for one in both if (one.task, one.length) in tasks])
    outdated = renew(PAGE, tables)
    for sentence in (unsaid := missing(PAGE.read_text(encoding="utf-8"), said(counted))):
        print(f"{PAGE.name} does not say what the records say: {sentence}")
    return int(bool(outdated) or bool(unsaid))


if __name__ == "__main__":
    sys.exit(main())
