"""Reports on a cache: numbers per layer, the fate of every token, and a table as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch

from ...core.eviction import Eviction
from ...core.policy import Policy
from .layer import EvictingLayer
from .record import EvictionRecord
from .tiers import TieredSlots

__all__ = ["Fate", "LayerStats", "Suppressions", "absorbers", "describe", "fates", "layer_stats", "masses", "scored"]

HostArray: TypeAlias = np.ndarray[Any, Any]
COLUMNS = ("layer", "seen", "stored", "kept per head", "evicted", "MB", "MB freed", "ms")
MERGED_COLUMNS = ("absorbed", "largest mass")
FOUND_COLUMNS = ("budget found",)
RECORDED_COLUMNS = ("cosine before", "after", "suppressed")
# More rows than that are described by the least and the most.
MOST_ROWS = 8


class Fate(IntEnum):
    """What became of a token in one head; from `KEPT` on it is still there."""

    DROPPED = 0
    SUPPRESSED = 1
    KEPT = 2
    PROTECTED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Suppressions:
    """Which source suppressed which token in the last eviction of a layer.

    A token is suppressed where the importance alone, under the same budget, would have kept it and the scores after the
    graph did not. There is one entry for every edge of weight above 0 that leads to a suppressed token and lowered its
    score, and one with source -1 for a suppressed token without such an edge: one that others overtook because their
    scores were raised, or that sank under `Degree` or `PageRank`, which have no edges.

    Entries are in order of row, head and token; then the strongest edge first, equal ones by source. So the first entry
    of a token names the source that lowered it most. With ``recompute_sources=True`` the edges are those of the last
    round.

    Attributes
    ----------
    row, head : numpy.ndarray, shape (S,), int64
    token, source : numpy.ndarray, shape (S,), int64
        True positions, counted from the first token that the cache has seen.
    weight : numpy.ndarray, shape (S,), float32 or wider
        Cosine of the two keys that the graph compared; 0 where there is no source.
    """

    row: HostArray
    head: HostArray
    token: HostArray
    source: HostArray
    weight: HostArray

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStats:
    """What one layer of a cache has seen and done.

    Attributes
    ----------
    layer : int
    evicts : bool
        False for the sliding-window layers of a model that also has full ones: these are left to themselves.
    num_seen : int
        Tokens that have passed through, per row.
    num_stored : int
        Slots per row and head that are stored.
    num_kept : numpy.ndarray, shape (batch, kv_heads), int64
        Of those, the ones that hold a token: neither padding nor unused.
    num_demoted : numpy.ndarray, shape (batch, kv_heads), int64
        Of those, the ones that are kept in fewer bits.
    num_evictions, num_dropped : int
        Evictions that ran; tokens that they dropped per row, in the head that lost most.
    budget : int or None
        Tokens per row that the last eviction aimed at, or found; None before the first.
    budgets_found : numpy.ndarray, shape (batch,), int64, or None
        Tokens that the last eviction found each row to need. None if the policy does not look for budgets.
    nbytes, bytes_freed : int
        Bytes of stored keys and values, and of those that evictions freed.
    seconds : float
        Time that the evictions took on the host.
    num_absorbed : numpy.ndarray, shape (batch, kv_heads), int64, or None
        Dropped tokens that are now in kept ones, see `absorbers` and `masses` for where. None where nothing was merged.
    largest_mass : numpy.ndarray, shape (batch, kv_heads), float32, or None
        As how many tokens a kept one counts at most. None where nothing was merged.
    redundancy_before, redundancy_after : numpy.ndarray, shape (batch, kv_heads), float32, or None
        Mean cosine of two different cached keys before and after the last eviction. None in a cache without
        ``record=True``.
    num_suppressed : numpy.ndarray, shape (batch, kv_heads), int64, or None
        Tokens that the last eviction suppressed. None without a record.
    suppressions : Suppressions or None
        Which source suppressed which. None without a record.
    """

    layer: int
    evicts: bool
    num_seen: int
    num_stored: int
    num_kept: HostArray
    num_demoted: HostArray
    num_evictions: int
    num_dropped: int
    budget: int | None
    budgets_found: HostArray | None
    nbytes: int
    bytes_freed: int
    seconds: float
    num_absorbed: HostArray | None = None
    largest_mass: HostArray | None = None
    redundancy_before: HostArray | None
    redundancy_after: HostArray | None
    num_suppressed: HostArray | None
    suppressions: Suppressions | None


def layer_stats(index: int, layer: EvictingLayer) -> LayerStats:
    """Describe one layer in numbers; copies to the host what is elsewhere."""
    record = layer.record
    if layer.valid is not None:
        num_kept = _host(layer.valid.sum(dim=-1))
    else:
        num_kept = np.full(tuple(layer.slots.keys.shape[:2]), layer.num_stored, dtype=np.int64)
    num_demoted = np.zeros_like(num_kept)
    if isinstance(layer.slots, TieredSlots):
        is_low, valid = layer.slots.tiers.is_low, layer.slots.valid
        num_demoted = _host((is_low if valid is None else is_low & valid).sum(dim=-1))
    suppressed = None if record is None else _suppressed(record)
    num_absorbed = largest_mass = None
    if layer.mass is not None and layer.absorbed is not None:
        shown = torch.ones_like(layer.mass) if layer.valid is None else layer.valid.float()
        num_absorbed = _host((layer.absorbed * shown).sum(dim=-1).to(torch.int64))
        largest_mass = _host((layer.mass * shown).amax(dim=-1))
    return LayerStats(
        layer=index,
        evicts=layer.evicts,
        num_seen=layer.num_seen,
        num_stored=layer.num_stored,
        num_kept=num_kept,
        num_demoted=num_demoted,
        num_evictions=layer.num_evictions,
        num_dropped=layer.num_dropped,
        budget=layer.budget,
        budgets_found=None if layer.budgets_found is None else _host(layer.budgets_found),
        nbytes=layer.nbytes,
        bytes_freed=layer.bytes_freed,
        seconds=layer.seconds,
        num_absorbed=num_absorbed,
        largest_mass=largest_mass,
        redundancy_before=None if record is None else _host(record.redundancy_before),
        redundancy_after=None if record is None else _host(record.redundancy_after),
        num_suppressed=None if suppressed is None else suppressed.sum(axis=-1),
        suppressions=None if record is None or suppressed is None else _suppressions(record, suppressed),
    )


def fates(layer: EvictingLayer) -> HostArray:
    """Return what became of every token that a layer has seen.

    Parameters
    ----------
    layer : EvictingLayer

    Returns
    -------
    numpy.ndarray, shape (batch, kv_heads, num_seen), uint8
        A `Fate` for each true position. Padding counts as dropped. Without a record of the last eviction nothing is
        known to be suppressed or protected, and of earlier evictions nothing is known but that a token went.
    """
    stored = _host(layer.true_positions)
    visible = None if layer.valid is None else _host(layer.valid)
    found = np.full((*stored.shape[:2], layer.num_seen), Fate.DROPPED, dtype=np.uint8)
    _mark(found, stored, Fate.KEPT, visible)
    if layer.record is not None:
        positions = _host(layer.record.positions)
        _mark(found, positions, Fate.SUPPRESSED, _suppressed(layer.record))
        _mark(found, positions, Fate.PROTECTED, _protected(layer.record))
    return found


def scored(layer: EvictingLayer) -> tuple[HostArray, HostArray]:
    """Return the importance and the scores of the last eviction at true positions.

    Parameters
    ----------
    layer : EvictingLayer

    Returns
    -------
    importance, scores : numpy.ndarray, shape (batch, kv_heads, num_seen), float64
        Before and after the graph; NaN where nothing was scored: without a record, for padding, and for tokens that
        went earlier or came later.
    """
    shape = (*layer.keys.shape[:2], layer.num_seen)
    importance, scores = np.full(shape, np.nan), np.full(shape, np.nan)
    if layer.record is not None:
        positions, valid = _host(layer.record.positions), _valid(layer.record)
        for decision, part in _parts(layer.record):
            if decision.importance is not None and decision.scores is not None:
                give, slots = decision.backend.to_numpy, np.nonzero(valid[part])
                where = (*slots[:2], positions[part][slots])
                importance[part[0]][where] = give(decision.importance)[slots]
                scores[part[0]][where] = give(decision.scores)[slots]
    return importance, scores


def masses(layer: EvictingLayer) -> HostArray:
    """Return as how many tokens each one counts.

    Parameters
    ----------
    layer : EvictingLayer

    Returns
    -------
    numpy.ndarray, shape (batch, kv_heads, num_seen), float32
        At true positions: 1 for a kept token that absorbed nothing, 0 for one that is gone.
    """
    found = np.zeros((*layer.slots.keys.shape[:2], layer.num_seen), dtype=np.float32)
    stored, visible = _host(layer.true_positions), None if layer.valid is None else _host(layer.valid)
    mass = np.ones(stored.shape, dtype=np.float32) if layer.mass is None else _host(layer.mass)
    _mark(found, stored, mass, visible)
    return found


def absorbers(layer: EvictingLayer) -> HostArray:
    """Return which kept token each dropped one went into at the last eviction.

    Parameters
    ----------
    layer : EvictingLayer

    Returns
    -------
    numpy.ndarray, shape (batch, kv_heads, num_seen), int64
        True positions; -1 for tokens that were kept or are gone, and for all without a record of the eviction.
    """
    found = np.full((*layer.slots.keys.shape[:2], layer.num_seen), -1, dtype=np.int64)
    if layer.record is not None:
        positions = _host(layer.record.positions)
        for decision, part in _parts(layer.record):
            if decision.merge is not None:
                into, kept = map(decision.backend.to_numpy, (decision.merge.into, decision.kept))
                target = np.take_along_axis(kept, np.maximum(into, 0), axis=-1)
                goes = (into >= 0) & (target != np.arange(decision.num_tokens))
                here = positions[part]
                _mark(found[part[0]], here, np.take_along_axis(here, target, axis=-1), goes)
    return found


def describe(
    policy: Policy | None, layers: Sequence[EvictingLayer], stats: Sequence[LayerStats], *, num_seen: int, nbytes: int
) -> str:
    """Describe a cache in plain text: totals, what was or was not evicted, and a line per layer, or for equal ones.

    Parameters
    ----------
    policy : Policy or None
    layers : sequence of EvictingLayer
        Those that cache keys of the text.
    stats : sequence of LayerStats
        One per layer.
    num_seen, nbytes : int
        Tokens that the cache has seen, and bytes that it stores.

    Returns
    -------
    str
    """
    lines = [f"EvictingCache with policy {policy}", _verdict(policy, layers, num_seen)]
    if not any(each.num_seen for each in stats):
        return "\n".join(lines)
    freed, seconds = sum(each.bytes_freed for each in stats), sum(each.seconds for each in stats)
    lines.append(f"{nbytes / 1e6:.2f} MB stored, {freed / 1e6:.2f} MB freed, {seconds * 1e3:.1f} ms in evictions.")
    merged = [each for each in stats if each.num_absorbed is not None and each.largest_mass is not None]
    if merged:
        count = sum(int(each.num_absorbed.sum()) for each in merged if each.num_absorbed is not None)
        most = max(float(each.largest_mass.max()) for each in merged if each.largest_mass is not None)
        lines.append(f"{count} dropped tokens are in kept ones, which count as up to {most:.1f} tokens each.")
    if any(_is_tiered(layer) for layer in layers):
        demoted, kept = (sum(int(getattr(each, name).sum()) for each in stats) for name in ("num_demoted", "num_kept"))
        lines.append(f"{demoted} of {kept} tokens in all heads are kept in {_bits(layers)} bits.")
    pinned = [int(layer.pinned.sum(dim=-1).max()) for layer in layers if layer.pinned is not None]
    if pinned:
        lines.append(f"{max(pinned)} tokens of the prompt are protected: no eviction drops them.")
    recorded = [each for each in stats if each.num_suppressed is not None]
    if recorded:
        count = sum(int(each.num_suppressed.sum()) for each in recorded if each.num_suppressed is not None)
        lines.append(f"{count} tokens were suppressed: the importance alone would have kept them.")
    found = any(each.budgets_found is not None for each in stats)
    table = [
        (
            *COLUMNS,
            *(FOUND_COLUMNS if found else ()),
            *(MERGED_COLUMNS if merged else ()),
            *(RECORDED_COLUMNS if recorded else ()),
        )
    ]
    table += _grouped([
        _row(each, with_found=found, with_merges=bool(merged), with_record=bool(recorded)) for each in stats
    ])  # fmt: skip
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines.append("")
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(lines)


def _is_tiered(layer: EvictingLayer) -> bool:
    return isinstance(layer.slots, TieredSlots)


def _bits(layers: Sequence[EvictingLayer]) -> str:
    found = {layer.slots.tiers.precision.bits for layer in layers if isinstance(layer.slots, TieredSlots)}
    return " or ".join(map(str, sorted(found)))


def _verdict(policy: Policy | None, layers: Sequence[EvictingLayer], seen: int) -> str:
    """Describe in a sentence whether anything was dropped, and why not if not."""
    ran = [layer for layer in layers if layer.num_evictions]
    if any(layer.num_dropped or _is_tiered(layer) for layer in ran):
        times = sum(layer.num_evictions for layer in ran)
        said = f"{times} evictions ran in {len(ran)} of {len(layers)} layers, over {seen} tokens."
    elif ran:
        budget = min(layer.budget or 0 for layer in ran)
        said = f"Nothing was dropped: all {seen - ran[0].num_new} tokens fitted into the budget of {budget}."
    elif not seen:
        return "Nothing was evicted: the cache has seen no tokens."
    elif any(layer.source is None or layer.awaits_queries for layer in layers):
        return (
            "Nothing was evicted: the model's attention did not tell the cache its queries. Run the model inside "
            "evicting() or observing()."
        )
    elif not any(layer.evicts for layer in layers):
        return "Nothing was evicted: every layer has a sliding window and is left to itself."
    elif policy is None:
        return "Nothing was evicted: the cache has no policy, and evict(policy) was not called."
    else:
        return "Nothing was evicted yet: the eviction waits for crop() or the next forward call."
    num_new = ran[0].num_new
    return said + (f" {num_new} tokens have come since." if num_new else "")


def _grouped(rows: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Put successive layers into one row that differ in nothing but their time; it then shows their mean time."""
    time = COLUMNS.index("ms")
    for _, group in groupby(rows, key=lambda row: (*row[1:time], *row[time + 1 :])):
        first, *others = group
        if not others:
            yield first
            continue
        mean = sum(float(row[time]) for row in (first, *others)) / (1 + len(others))
        yield (f"{first[0]} to {others[-1][0]}", *first[1:time], f"{mean:.1f}", *first[time + 1 :])


def _row(layer: LayerStats, *, with_found: bool, with_merges: bool, with_record: bool) -> tuple[str, ...]:
    least, most = (int(layer.num_kept.min()), int(layer.num_kept.max())) if layer.num_kept.size else (0, 0)
    cells: tuple[str, ...] = (
        str(layer.layer),
        str(layer.num_seen),
        str(layer.num_stored),
        str(least) if least == most else f"{least} to {most}",
        f"{layer.num_evictions} x" if layer.evicts else "sliding",
        f"{layer.nbytes / 1e6:.2f}",
        f"{layer.bytes_freed / 1e6:.2f}",
        f"{layer.seconds * 1e3:.1f}",
    )
    if with_found:
        cells += (_found_words(layer.budgets_found),)
    if with_merges:
        absorbed, mass = layer.num_absorbed, layer.largest_mass
        cells += ("-", "-") if absorbed is None or mass is None else (str(int(absorbed.sum())), f"{mass.max():.1f}")
    if not with_record:
        return cells
    before, after, suppressed = layer.redundancy_before, layer.redundancy_after, layer.num_suppressed
    if before is None or after is None or suppressed is None:
        return (*cells, "-", "-", "-")
    return (*cells, f"{before.mean():.3f}", f"{after.mean():.3f}", str(int(suppressed.sum())))


def _found_words(found: HostArray | None) -> str:
    """Write the budget of each row, or their range where there are many."""
    if found is None:
        return "-"
    if len(set(found.tolist())) == 1:
        return str(found[0])
    return " ".join(map(str, found)) if len(found) <= MOST_ROWS else f"{found.min()} to {found.max()}"


def _parts(record: EvictionRecord) -> Iterator[tuple[Eviction, tuple[slice, slice, slice]]]:
    """Yield every decision with the rows, heads and slots that it is about."""
    num_slots, is_whole = record.positions.shape[-1], len(record.decisions) == 1
    for row, decision in enumerate(record.decisions):
        slots = slice(num_slots - decision.num_tokens, None)
        yield decision, (slice(None) if is_whole else slice(row, row + 1), slice(None), slots)


def _valid(record: EvictionRecord) -> HostArray:
    if record.valid is None:
        return np.ones(tuple(record.positions.shape), dtype=bool)
    return _host(record.valid)


def _suppressed(record: EvictionRecord) -> HostArray:
    """Mark the slots (batch, kv_heads, N) that the importance alone would have kept and the eviction dropped."""
    valid = _valid(record)
    found = np.zeros_like(valid)
    for (decision, part), alone in zip(_parts(record), record.by_importance, strict=True):
        if alone is not None:
            give = decision.backend.to_numpy
            _mark(found[part], give(alone), True)
            _mark(found[part], give(decision.kept), False)
    return found & valid


def _protected(record: EvictionRecord) -> HostArray:
    """Mark the slots (batch, kv_heads, N) that were kept before all others."""
    found = np.zeros(tuple(record.positions.shape), dtype=bool)
    for decision, part in _parts(record):
        if decision.protected is not None:
            _mark(found[part], decision.backend.to_numpy(decision.kept), True)
            found[part] &= decision.backend.to_numpy(decision.protected)
    return found & _valid(record)


def _suppressions(record: EvictionRecord, suppressed: HostArray) -> Suppressions:
    """List the edges that lead to suppressed tokens, and the suppressed tokens without any."""
    positions = _host(record.positions)
    edges = [_edges(decision, suppressed[part], part[0].start or 0, part[2].start) for decision, part in _parts(record)]
    row, head, token, source, weight = (np.concatenate(column) for column in zip(*edges, strict=True))
    source = np.where(source < 0, -1, positions[row, head, source])
    token = positions[row, head, token]
    order = np.lexsort((source, -weight, token, head, row))
    return Suppressions(
        row=row[order], head=head[order], token=token[order], source=source[order], weight=weight[order]
    )


def _edges(decision: Eviction, suppressed: HostArray, first_row: int, first_slot: int) -> tuple[HostArray, ...]:
    """Return row, head, slot of token, slot of source and weight, each of shape (S,)."""
    give, graph = decision.backend.to_numpy, decision.graph
    unexplained = suppressed.copy()
    parts: list[tuple[HostArray, ...]] = []
    if graph is not None and graph.num_neighbors:
        shape = (*suppressed.shape[:2], -1)
        neighbors, weights = give(graph.neighbors).reshape(shape), give(graph.weights).reshape(shape)
        was_lowered = suppressed & (give(decision.scores) < give(decision.importance))
        row, head, edge = np.nonzero(np.take_along_axis(was_lowered, neighbors, axis=-1) & (weights > 0))
        token = neighbors[row, head, edge]
        source = give(graph.sources)[row, head, edge // graph.num_neighbors]
        parts.append((row, head, token, source, weights[row, head, edge]))
        unexplained[row, head, token] = False
    row, head, token = np.nonzero(unexplained)
    parts.append((row, head, token, np.full_like(token, -1), np.zeros(token.shape, dtype=np.float32)))
    row, head, token, source, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    source = np.where(source < 0, -1, source + first_slot)
    return row + first_row, head, token + first_slot, source, weight


def _mark(found: HostArray, where: HostArray, value: Any, which: HostArray | None = None) -> None:
    """Set `found` (batch, kv_heads, N) at some positions (batch, kv_heads, b), but not outside 0 to N - 1.

    `value` is one for all, or one for each position.
    """
    is_there = (where >= 0) & (where < found.shape[-1])
    row, head, slot = np.nonzero(is_there if which is None else is_there & which)
    found[row, head, where[row, head, slot]] = value[row, head, slot] if isinstance(value, np.ndarray) else value


def _host(tensor: torch.Tensor) -> HostArray:
    return tensor.detach().cpu().numpy()
