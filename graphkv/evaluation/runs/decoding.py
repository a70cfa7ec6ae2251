"""Decoding from caches that are evicted again and again, as one batch between their evictions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ...core.errors import GraphKVWarning
from ...integrations.transformers import EvictingCache
from ...workbench.forward import next_logits

__all__ = ["Decoded", "decode", "forced_logits", "tokens_kept"]


@dataclass(kw_only=True)
class Decoded:
    """What was generated from one cache, and from how much.

    Attributes
    ----------
    cache : EvictingCache
        As it was after its last token.
    tokens : list of int
        Generated, without the one that ended the answer.
    tokens_kept : float
        Mean number of tokens per KV head after the last eviction, over the layers that can be evicted; at the end if
        there was none.
    most_bytes : int
        The most that all keys and values took since generation began.
    seconds : float
        Of the forward passes, shared out among the rows of each, and of this cache's own evictions.
    """

    cache: EvictingCache
    tokens: list[int] = field(default_factory=list)
    tokens_kept: float = 0.0
    most_bytes: int = 0
    seconds: float = 0.0
    has_ended: bool = False


def decode(
    model: Any, caches: Sequence[EvictingCache], ids: Sequence[int], *, limit: int, ends: Set[int], batch: int
) -> list[Decoded]:
    """Generate greedily after some tokens, from caches of one prompt that may have different policies.

    Caches that store equally much run as one batch, are taken apart when they are due, and put together again.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As `observing` has it.
    caches : sequence of EvictingCache
        Of one row each, which have seen the same tokens; with one `every`, or none at all.
    ids : sequence of int
        What to read first. At least one token; of the prompt, if that is protected.
    limit : int
        Most tokens to generate. At least one.
    ends : set of int
        Tokens that end an answer.
    batch : int
        Most caches in a batch.

    Returns
    -------
    list of Decoded
        One for each cache.
    """
    rows = [Decoded(cache=cache) for cache in caches]
    team = _Team(model, rows, batch)
    new = team.read([list(ids)] * len(rows))
    for _ in range(limit):
        for row, logits in zip(team.rows, new, strict=True):
            token = int(logits[-1].argmax())
            row.has_ended = token in ends
            if not row.has_ended:
                row.tokens.append(token)
        left = [row for row in team.rows if not row.has_ended and len(row.tokens) < limit]
        if len(left) < len(team.rows):
            # Numbers of a row are about its own tokens, so it stays behind before the others go on.
            team.settle()
            team = _Team(model, left, batch)
        if not left:
            break
        new = team.read([row.tokens[-1:] for row in left])
    for row in rows:
        row.tokens_kept = row.tokens_kept or tokens_kept(row.cache)
    return rows


def forced_logits(
    model: Any, caches: Sequence[EvictingCache], ids: Sequence[int], answer: Sequence[int], *, batch: int
) -> list[torch.Tensor]:
    """Read the right answer after some tokens, evicting as `decode` does.

    Returns
    -------
    list of torch.Tensor, shape (answer tokens, vocabulary)
        For each cache the logits that predict each token of the answer.
    """
    team = _Team(model, [Decoded(cache=cache) for cache in caches], batch)
    read = team.read([[*ids, *answer[:-1]]] * len(caches))
    # Compared with the full cache's, which are where the model is.
    return [logits[len(ids) - 1 :].to(model.device) for logits in read]


def tokens_kept(cache: EvictingCache) -> float:
    """Return the mean number of tokens per KV head, over the layers that can be evicted."""
    kept = [layer.true_positions >= 0 for layer in cache.attention_layers if layer.evicts]
    # Sliding layers of a model that has others too are left alone by every policy.
    return round(sum(int(each.sum()) for each in kept) / sum(each[..., 0].numel() for each in kept), 6)


class _Team:
    """Rows that read on together until the next eviction."""

    def __init__(self, model: Any, rows: list[Decoded], batch: int) -> None:
        self.model, self.rows, self.batch = model, rows, batch
        self.groups: list[tuple[EvictingCache, list[Decoded]]] = []

    def read(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Read equally many tokens into every row; return its logits (tokens, vocabulary)."""
        found: list[list[torch.Tensor]] = [[] for _ in self.rows]
        start, end = 0, len(tokens[0])
        while start < end:
            count = min(end - start, self._room())
            places = {id(row): place for place, row in enumerate(self.rows)}
            for together, rows in self._together():
                started = perf_counter()
                piece = [list(tokens[places[id(row)]][start : start + count]) for row in rows]
                logits = next_logits(self.model, torch.tensor(piece, device=self.model.device), together, places=count)
                # Waits for an accelerator, whose time this is.
                logits = logits.float().cpu()
                seconds = (perf_counter() - started) / len(rows)
                for row, own in zip(rows, logits, strict=True):
                    row.seconds += seconds
                    found[places[id(row)]].append(own)
            start += count
            if not self._room():
                self.settle()
        return [torch.cat(each) for each in found]

    def settle(self) -> None:
        """Take the batches apart, and evict what is due."""
        for together, rows in self.groups:
            for number, row in enumerate(rows):
                started = perf_counter()
                cache = row.cache.caught_up(together, number)
                row.most_bytes = max(row.most_bytes, cache.nbytes)
                before = _num_evictions(cache)
                with warnings.catch_warnings():
                    # As when the prompt is evicted: the command has said it.
                    warnings.simplefilter("ignore", GraphKVWarning)
                    cache.finish()
                row.seconds += perf_counter() - started
                if _num_evictions(cache) > before:
                    row.tokens_kept = tokens_kept(cache)
                row.cache = cache
        self.groups = []

    def _room(self) -> int:
        """Return how many tokens may come until the rows are due; without `every`, any number."""
        cache = self.rows[0].cache
        every, num_seen = cache.settings.every, self.groups[0][0].num_seen if self.groups else cache.num_seen
        if every is None:
            return 1 << 30
        num_new = max(layer.num_new for layer in cache.attention_layers if layer.evicts)
        return every - num_new - (num_seen - cache.num_seen)

    def _together(self) -> list[tuple[EvictingCache, list[Decoded]]]:
        if not self.groups:
            alike: dict[Any, list[Decoded]] = {}
            for row in self.rows:
                # What answers for dropped tokens does so for all rows.
                key = tuple((layer.num_stored, layer.answering) for layer in row.cache.attention_layers)
                alike.setdefault(key, []).append(row)
            for rows in alike.values():
                for start in range(0, len(rows), self.batch):
                    part = rows[start : start + self.batch]
                    self.groups.append((_stacked([row.cache for row in part]), part))
        return self.groups


def _stacked(caches: Sequence[EvictingCache]) -> EvictingCache:
    """Put caches together into one that evicts nothing, and keeps the queries that their policies will ask for."""
    policies = [cache.policy for cache in caches if cache.policy is not None]
    every = caches[0].settings.every
    wanted = max((policy.num_queries(caches[0].num_seen + (every or 0)) for policy in policies), default=0)
    changes = {"policy": None, "every": None, "protect_prompt": False, "num_queries": min(wanted, every or 0)}
    return EvictingCache.stacked([cache.with_settings(**changes) for cache in caches])


def _num_evictions(cache: EvictingCache) -> int:
    return sum(layer.num_evictions for layer in cache.attention_layers)
