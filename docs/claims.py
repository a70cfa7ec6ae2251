"""The claims of results/index.md in numbers: sentences made from the records, which must be on the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from graphkv.evaluation.records import Record
from graphkv.evaluation.statistics import Cell, Comparison, compare, summarize
from graphkv.naming.names import base_name

__all__ = ["claims", "missing"]

NEEDLES = (("needle", "aware"), ("needle", "agnostic"))
AWARE, AGNOSTIC, CONTINUATION = (*NEEDLES, ("continuation", "agnostic"))


def missing(text: str, sentences: Iterable[str]) -> list[str]:
    """Select the sentences that do not stand in a text, wherever its lines break."""
    words = " ".join(text.split())
    return [sentence for sentence in sentences if sentence not in words]


def claims(
    standard: Sequence[Record],
    comparisons: Mapping[str, Sequence[Comparison]],
    baselines: Sequence[Record],
    tuning: Mapping[str, Sequence[Record]],
) -> list[str]:
    """Make the sentences.

    Parameters
    ----------
    standard, baselines : sequence of Record
        Of the two runs on the held-out split.
    comparisons : mapping of str to sequence of Comparison
        From `standard`: the degree over its base, the paper's setting over its base, the degree over KeyDiff.
    tuning : mapping of str to sequence of Record
        By model: ``smollm2`` and ``gemma3``.
    """
    degree, paper, keydiff = comparisons.values()
    return [
        *_sizes(standard, baselines, tuning),
        *_degree_over_base(degree),
        *_degree_over_keydiff(keydiff),
        *_paper_over_base(paper),
        *_more_bases(baselines),
        *_sinks(baselines),
        *_tuning(tuning),
    ]


def _sizes(
    standard: Sequence[Record], baselines: Sequence[Record], tuning: Mapping[str, Sequence[Record]]
) -> Iterable[str]:
    lengths = [f"{length:,}" for length in sorted({record.length or 0 for record in standard})]
    each = len(_prompts(standard)) // len(lengths)
    yield f"{each} held-out prompts of {', '.join(lengths[:-1])} and {lengths[-1]} tokens each"
    (length,), (budget,) = ({record.length for record in baselines}, {record.budget for record in baselines} - {None})
    yield f"({len(_prompts(baselines))} prompts of {length:,} tokens, budget {budget};"
    yield f"{len(_prompts(tuning['smollm2']))} prompts of 1,024 tokens, needles and continuation"
    yield f"Q4_K_M; {len(_prompts(tuning['gemma3']))} prompts;"


def _degree_over_base(found: Sequence[Comparison]) -> Iterable[str]:
    needles, text = _of(found, *NEEDLES), _of(found, CONTINUATION)
    better, worse, neither = (_count(needles, verdict) for verdict in ("better", "worse", "open"))
    yield f"better in {better} of {len(needles)} cells"
    yield f"and worse in {_word(worse)}; the other {neither} are open"
    yield f"KNorm gains most (up to {-min(_means(_over(needles, 'knorm'))):.0f} nats)"
    known, unknown = (-min(_means(_over(_of(found, part), "snapkv", "pyramidkv"))) for part in NEEDLES)
    yield (
        f"SnapKV and PyramidKV up to {_short(known)} where the question is known and up to {_short(unknown)} "
        "where it is not"
    )
    yield f"{_word(_count(text, 'worse')).replace('none', 'No')} cell of continuation is worse"
    gains = [-mean for mean in _means(_over(text, "knorm"))]
    yield f"KNorm gains {_short(min(gains))} to {_short(max(gains))}"
    yield f"no interval reaches above +{_short(max(one.difference.high for one in text))}"
    places = sorted({(one.cell.length or 0, one.cell.budget) for one in needles})
    for length, budget in places:
        verdicts = {one.verdict for one in needles if (one.cell.length, one.cell.budget) == (length, budget)}
        if verdicts == {"open"}:
            yield f"At {budget} of {length:,} tokens retrieval does not change, whatever the base"


def _degree_over_keydiff(found: Sequence[Comparison]) -> Iterable[str]:
    known = [_over(_of(found, AWARE), base) for base in ("snapkv", "pyramidkv")]
    unknown = [_over(_of(found, AGNOSTIC), base) for base in ("snapkv", "pyramidkv", "h2o")]
    least = min(_count(each, "better") for each in known)
    yield f"SnapKV and PyramidKV with the degree are better in {least} of {len(known[0])} cells"
    least, most = min(_count(each, "worse") for each in unknown), max(_count(each, "better") for each in unknown)
    yield (
        f"KeyDiff alone is better in {least} of {len(unknown[0])} cells and the degree over SnapKV, PyramidKV or H2O "
        f"in {_word(most)}"
    )
    text = _over(_of(found, CONTINUATION), "snapkv", "pyramidkv", "h2o")
    cells = "every cell" if _count(text, "better") == len(text) else f"{_count(text, 'better')} of {len(text)} cells"
    yield f"the degree over these three is better in {cells}"


def _paper_over_base(found: Sequence[Comparison]) -> Iterable[str]:
    needles = _of(found, *NEEDLES)
    better, worse = _count(needles, "better"), _count(needles, "worse")
    yield f"of {len(needles)} cells of retrieval {better} are better and {worse} worse"
    known = max(_means(_over(_of(found, AWARE), "snapkv", "pyramidkv")))
    text = max(_means(_over(_of(found, CONTINUATION), "snapkv")))
    yield (
        f"SnapKV and PyramidKV losing up to {_short(known)} where the question is known, and SnapKV up to "
        f"{_short(text)} on continuation"
    )


def _more_bases(records: Sequence[Record]) -> Iterable[str]:
    bases = ("streaming-llm", "tova", "cake")
    degree, paper = (
        [one for one in compare(records, "nll", {base + name: base for base in bases}) if one.cell.sinks == 4]
        for name in ("+degree", "+graphkv")
    )
    streaming, tova, cake = ([_only(_over(_of(degree, part), base)) for part in NEEDLES] for base in bases)
    first, second = (signed(f"{one.difference.mean:.1f}") for one in streaming)
    third, fourth = (signed(_short(one.difference.mean)) for one in cake)
    yield (
        f"StreamingLLM ({first} with the question known, {second} unknown) and CAKE ({third} and {fourth}) "
        f"{_same([*streaming, *cake])} on needles"
    )
    known, unknown = (signed(_short(one.difference.mean)) for one in tova)
    yield (
        f"TOVA is {tova[0].verdict} where the question is known ({known}) and {tova[1].verdict} where it is not "
        f"({unknown})"
    )
    yield f"TOVA and CAKE {_same(_over(_of(paper, AWARE), 'tova', 'cake'))} where the question is known"
    most = max(abs(mean) for mean in _means(_of([*degree, *paper], CONTINUATION)))
    yield f"On continuation none of these changes by more than {_short(most)}"


def _sinks(records: Sequence[Record]) -> Iterable[str]:
    cells = summarize(records, "nll")
    loss = {
        ((cell.task, cell.mode), policy): found.mean - cells[cell._replace(sinks=4)][policy].mean
        for cell, policies in cells.items()
        if cell.sinks == 0
        for policy, found in policies.items()
    }
    random, streaming = (
        [loss[part, policy] for part in (AWARE, CONTINUATION)] for policy in ("random", "streaming-llm")
    )
    yield (
        f"random eviction loses {_short(random[0])} nats with the question known and {_short(random[1])} on "
        f"continuation, StreamingLLM {_short(streaming[0])} and {_short(streaming[1])}"
    )
    others = [
        abs(lost)
        for (_, policy), lost in loss.items()
        if policy not in ("full", "random", "streaming-llm") and "+" not in policy
    ]
    yield f"differ by {_short(max(others))} at most"


def _tuning(tuning: Mapping[str, Sequence[Record]]) -> Iterable[str]:
    bases = ("snapkv", "h2o", "knorm")
    pairs = {f"{base}+degree(exponent=8)": base for base in bases}
    found = [one for read in tuning.values() for one in compare(read, "nll", pairs)]
    # A loss is beyond the noise where it is larger than twice its standard error.
    losses = [
        one for one in _of(found, *NEEDLES) if one.difference.mean > 2 * one.deviation / one.difference.count**0.5
    ]
    yield f"{_word(len(losses)).replace('none', 'no')} loss beyond the noise in any cell of retrieval on either model"
    strong = compare(tuning["gemma3"], "nll", {"snapkv+degree(exponent=16)": "snapkv"})
    place = Cell(*AWARE, 1024, 128, 4)
    yield f"loses some answers altogether ({_only([one for one in strong if one.cell == place]).difference.mean:+.2f})"


def signed(text: str) -> str:
    """Replace hyphens before numbers by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def _prompts(records: Iterable[Record]) -> set[str]:
    return {record.prompt for record in records}


def _of(found: Iterable[Comparison], *parts: tuple[str, str]) -> list[Comparison]:
    return [one for one in found if (one.cell.task, one.cell.mode) in parts]


def _over(found: Iterable[Comparison], *bases: str) -> list[Comparison]:
    return [one for one in found if base_name(one.policy) in bases]


def _only(found: Sequence[Comparison]) -> Comparison:
    (one,) = found
    return one


def _means(found: Iterable[Comparison]) -> list[float]:
    return [one.difference.mean for one in found]


def _count(found: Iterable[Comparison], verdict: str) -> int:
    return sum(one.verdict == verdict for one in found)


def _same(found: Iterable[Comparison]) -> str:
    """Join the verdicts: one word if all agree."""
    return " or ".join(sorted({one.verdict for one in found}))


def _word(count: int) -> str:
    return str(count) if count else "none"


def _short(value: float) -> str:
    """Write a number with at most two decimals and no zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}".rstrip("0").rstrip("."))
