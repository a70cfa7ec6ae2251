"""A self-contained HTML page: the text, with the fate of every token in every layer and head."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..integrations.transformers import Fate
from .findings import Findings

__all__ = ["write_page"]


def write_page(path: Path, findings: Findings) -> None:
    """Write the page, with all that it needs inside; it loads nothing.

    Parameters
    ----------
    path : pathlib.Path
        Where the HTML goes.
    findings : Findings
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    content = json.dumps(_content(findings), separators=(",", ":"))
    # Inside <script> only these could end it or begin a comment; in JSON they may be written otherwise.
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    path.write_text(template.replace("__DATA__", content), encoding="utf-8")


def _content(findings: Findings) -> dict[str, Any]:
    num_layers, num_heads, num_tokens = findings.fates.shape
    layer, head = findings.chosen
    competes = findings.competes
    ranked = competes.sum(axis=-1).ravel().tolist()
    places = (competes & (findings.fates >= Fate.KEPT)).sum(axis=-1).ravel().tolist()
    small = "uint16" if num_tokens < 2**16 else "uint32"
    return {
        "title": findings.title,
        "lead": _lead(findings),
        "policy": findings.policy,
        "numbers": _numbers(findings),
        "layers": num_layers,
        "heads": num_heads,
        "tokens": num_tokens,
        "layer": layer,
        "head": head,
        "words": findings.words,
        "fates": _packed(_quarters(findings.fates), "uint8"),
        "ranks": {
            "importance": _packed(findings.ranks(findings.importance), small),
            "scores": _packed(findings.ranks(findings.scores), small),
        },
        "rows": [{"ranked": count, "places": free} for count, free in zip(ranked, places, strict=True)],
        "edges": _edges(findings),
        "merges": _merges(findings),
        "stats": [_sentence(findings, index) for index in range(num_layers)],
    }


def _quarters(fates: Any) -> Any:
    """Put four tokens into a byte, the first into the lowest bits."""
    flat = fates.ravel()
    flat = np.pad(flat, (0, -len(flat) % 4)).reshape(-1, 4)
    return (flat << np.asarray([0, 2, 4, 6], dtype=np.uint8)).sum(axis=-1)


def _packed(array: Any, kind: str) -> dict[str, str]:
    """Encode little-endian numbers in base64."""
    content = np.ascontiguousarray(array, dtype=np.dtype(kind).newbyteorder("<")).tobytes()
    return {"type": kind, "base64": base64.b64encode(content).decode("ascii")}


def _edges(findings: Findings) -> dict[str, Any]:
    """Collect the edges from sources to suppressed tokens, with where those of each layer and head start."""
    num_heads = findings.fates.shape[1]
    counts, tokens, sources, weights = [], [], [], []
    for each in findings.stats:
        found = each.suppressions
        for head in range(num_heads):
            if found is None:
                counts.append(0)
                continue
            here = (found.row == findings.row) & (found.head == head) & (found.source >= 0)
            counts.append(int(here.sum()))
            tokens.append(found.token[here])
            sources.append(found.source[here])
            weights.append(found.weight[here])
    nothing = [np.zeros(0)]
    return {
        "start": _packed(np.cumsum([0, *counts]), "uint32"),
        "token": _packed(np.concatenate(tokens or nothing), "uint32"),
        "source": _packed(np.concatenate(sources or nothing), "uint32"),
        "weight": _packed(np.concatenate(weights or nothing), "float32"),
    }


def _merges(findings: Findings) -> dict[str, Any]:
    """Collect which token went into which, with where those of each layer and head start; and what slots count as."""
    went = findings.absorbers >= 0
    counts = (findings.masses > 0) & (findings.masses != 1)
    return {
        "start": _packed(np.cumsum([0, *went.sum(axis=-1).ravel()]), "uint32"),
        "token": _packed(np.nonzero(went)[2], "uint32"),
        "into": _packed(findings.absorbers[went], "uint32"),
        "place": _packed(np.flatnonzero(counts), "uint32"),
        "mass": _packed(findings.masses[counts], "float32"),
    }


def _lead(findings: Findings) -> str:
    num_layers, num_heads, num_tokens = findings.fates.shape
    suppressed = int((findings.fates == Fate.SUPPRESSED).sum())
    said = f"What {num_layers} layers with {num_heads} KV heads each kept of {num_tokens:,} tokens."
    absorbed = int((findings.absorbers >= 0).sum())
    if absorbed:
        said += f" {absorbed:,} times a token went into one like it, which counts for both."
    if not suppressed:
        return f"{said} Nothing was suppressed."
    said += (
        f" {suppressed:,} times a token was suppressed: its importance alone would have kept it, but a more important "
        "one resembles it."
    )
    if findings.fact is None:
        return said
    marked = slice(*findings.fact)
    now, before = ((findings.fates >= Fate.KEPT)[..., marked].mean(), findings.kept_by_importance[..., marked].mean())
    return f"{said} Of the sentence that is asked for {now:.0%} is kept; by importance alone it would be {before:.0%}."


def _numbers(findings: Findings) -> list[tuple[str, str]]:
    kept = (findings.fates >= Fate.KEPT).sum(axis=-1)
    stats = findings.stats
    return [
        ("tokens", f"{findings.fates.shape[-1]:,}"),
        ("kept per head", _span(kept)),
        ("suppressed", f"{int((findings.fates == Fate.SUPPRESSED).sum()):,}"),
        *([("absorbed", f"{int((findings.absorbers >= 0).sum()):,}")] if (findings.absorbers >= 0).any() else []),
        ("MB stored", f"{sum(each.nbytes for each in stats) / 1e6:.1f}"),
        ("MB freed", f"{sum(each.bytes_freed for each in stats) / 1e6:.1f}"),
        ("ms in evictions", f"{sum(each.seconds for each in stats) * 1e3:,.0f}"),
    ]


def _sentence(findings: Findings, layer: int) -> str:
    """Describe one layer in words."""
    here, each = findings.fates[layer], findings.stats[layer]
    said = f"Keeps {_span((here >= Fate.KEPT).sum(axis=-1))} of {here.shape[-1]:,} tokens per head"
    if not each.evicts:
        return f"{said}: its sliding window, which is left to itself."
    said += f"; suppressed {_span((here == Fate.SUPPRESSED).sum(axis=-1))} per head."
    if each.num_absorbed is not None and each.largest_mass is not None:
        said += (
            f" {int(each.num_absorbed[findings.row].sum()):,} dropped tokens are in kept ones, which count as up to "
            f"{each.largest_mass[findings.row].max():.1f} tokens."
        )
    before, after = findings.redundancy[layer]
    if not np.isnan(before):
        said += f" Mean cosine of two keys: {before:.3f} before, {after:.3f} after."
    return f"{said} {each.seconds * 1e3:.1f} ms."


def _span(counts: Any) -> str:
    least, most = int(counts.min()), int(counts.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
