"""EpiCache's way through a long conversation: read in blocks under a bound, one small cache for each episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2

from ...core import checks
from ...core.errors import ArgumentError
from ...core.policy import Policy
from . import versions
from .cache import EvictingCache
from .repeating import attending

__all__ = ["EpisodeCaches", "Episodes", "find_episodes", "mean_hidden_state", "read_episodes", "read_in_blocks"]

Embed = Callable[[Sequence[int]], Any]


def read_in_blocks(
    model: Any,
    ids: torch.Tensor,
    policy: Policy,
    prompt: torch.Tensor | Sequence[int] | None = None,
    /,
    *,
    block: int = 2048,
) -> EvictingCache:
    """Read a text of any length into a cache that never stores more than the budget and one block per row.

    After each block the model is asked `prompt`, which it forgets, and the cache is evicted down to the policy's
    budget. Positions count all that was seen. Costs a forward pass over `prompt` for each block.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `observing`; in a block of it or not.
    ids : torch.Tensor, shape (batch, tokens), integer
        The text, without padding.
    policy : Policy
        For example ``AdaKV(EpiCache(budget=1024), floor=0.0)``, with a budget in tokens.
    prompt : torch.Tensor, shape (tokens,), or sequence of int, optional
        What is asked, for a policy that needs probes.
    block : int
        Tokens that are read at a time.

    Returns
    -------
    EvictingCache
        Without a policy of its own: what comes later is not evicted.

    Raises
    ------
    ArgumentError
        If `block` is below 1, the text or a prompt that is needed is empty, the budget is a share, or the model cannot
        be evicted.
    ArgumentTypeError
        If an argument has the wrong type.

    References
    ----------
    .. [1] Kim et al., arXiv:2509.17396, block prefill.
    """
    checks.instance("policy", policy, Policy)
    block = checks.count("block", block, minimum=1)
    if not isinstance(policy.budget, int):
        raise ArgumentError(f"policy must have a budget in tokens, which does not grow; got {policy.budget}")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.shape[1]:
        got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ArgumentError(f"ids must be a tensor of shape (batch, tokens) with at least one token; got {got}")
    asks = policy.needs().probes
    question = _question(prompt, ids) if asks else ids[:, :0]
    cache = EvictingCache(num_queries=policy.num_queries(ids.shape[1]), config=model.config)
    with attending(model), torch.no_grad():
        for start in range(0, ids.shape[1], block):
            model(ids[:, start : start + block], use_cache=True, **versions.with_cache(model, cache))
            if not _is_over(cache, policy):
                continue
            if asks:
                cache.probe(model, question)
            cache.evict(policy)
    return cache


def _question(prompt: Any, ids: torch.Tensor) -> torch.Tensor:
    found = torch.as_tensor([] if prompt is None else prompt)
    if found.ndim != 1 or not found.numel():
        raise ArgumentError(
            f"prompt must hold at least one token for a policy that asks; got shape {tuple(found.shape)}"
        )
    return found.to(dtype=ids.dtype, device=ids.device).expand(ids.shape[0], -1)


def _is_over(cache: EvictingCache, policy: Policy) -> bool:
    """Return whether any layer stores more than its budget."""
    return any(
        layer.num_stored > policy.layer_budget(cache.num_seen, layer.index, layer.num_layers)
        for layer in cache.attention_layers
        if layer.evicts
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Episodes:
    """The episodes of a conversation.

    Attributes
    ----------
    labels : array, shape (windows,), int64
        The episode of each window.
    centroids : array, shape (episodes, size), float64
        The mean direction of each.
    medoids : tuple of tuple of int
        The windows of each that are nearest to its mean, in their order in the conversation.
    """

    labels: NDArray[np.int64]
    centroids: NDArray[np.float64]
    medoids: tuple[tuple[int, ...], ...]

    def nearest(self, embedding: Any, /) -> int:
        """Return the episode whose mean has the highest cosine with an embedding; the lower one of equals."""
        return int(np.argmax(_unit(self.centroids) @ _unit(np.asarray(embedding, dtype=np.float64)[None])[0]))


def find_episodes(embeddings: Any, /, *, episodes: int = 4, medoids: int = 4, seed: int = 42) -> Episodes:
    """Cluster the windows of a conversation by k-means on the sphere's chords: unit embeddings, squared distances.

    Parameters
    ----------
    embeddings : array, shape (windows, size)
        One row per window; scaled to length 1 here.
    episodes : int
        Clusters; fewer where there are fewer different windows. The best of ten starts, by k-means++.
    medoids : int
        Windows that stand for an episode, at most.
    seed : int
        Of the starts.

    Returns
    -------
    Episodes
        Numbered by their first window.

    Raises
    ------
    ArgumentError
        If there is no window, an embedding is not finite, or a count is below 1.
    ArgumentTypeError
        If a count is not an integer.

    References
    ----------
    .. [1] Kim et al., arXiv:2509.17396, conversation clustering.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv.integrations.transformers import find_episodes
    >>> found = find_episodes(np.asarray([[1.0, 0.1], [0.0, 2.0], [3.0, 0.0]]), episodes=2, medoids=1)
    >>> found.labels.tolist(), found.medoids, found.nearest([0.2, 0.9])
    ([0, 1, 0], ((0,), (1,)), 1)
    """
    episodes = checks.count("episodes", episodes, minimum=1)
    medoids, seed = checks.count("medoids", medoids, minimum=1), checks.count("seed", seed)
    points = np.asarray(embeddings, dtype=np.float64)
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        raise ArgumentError(f"embeddings must be finite, of shape (windows, size); got shape {points.shape}")
    points = _unit(points)
    number = min(episodes, len(np.unique(points, axis=0)))
    labels = _cluster(points, number, seed)
    # By their first window; a cluster that stayed empty is none.
    order = list(dict.fromkeys(labels.tolist()))
    labels = np.asarray([order.index(label) for label in labels.tolist()], dtype=np.int64)
    centroids = np.stack([points[labels == label].mean(axis=0) for label in range(len(order))])
    chosen = []
    for label, centroid in enumerate(centroids):
        members = np.flatnonzero(labels == label)
        nearness = points[members] @ centroid
        chosen.append(tuple(sorted(members[np.argsort(-nearness, kind="stable")][:medoids].tolist())))
    return Episodes(labels=labels, centroids=centroids, medoids=tuple(chosen))


def _cluster(points: NDArray[np.float64], number: int, seed: int) -> NDArray[np.int64]:
    """Return the labels of the best of ten starts."""
    best, least = np.zeros(len(points), dtype=np.int64), np.inf
    random = np.random.default_rng(seed)
    for _ in range(10):
        try:
            centroids, labels = kmeans2(points, number, iter=100, minit="++", missing="raise", seed=random)
        except ClusterError:
            continue
        inertia = float(((points - centroids[labels]) ** 2).sum())
        if inertia < least:
            best, least = labels.astype(np.int64), inertia
    return best


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def mean_hidden_state(model: Any, ids: Sequence[int], /) -> NDArray[np.float32]:
    """Embed tokens by the mean of the model's own last hidden states.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Outside of `evicting`.
    ids : sequence of int
        At least one token.

    Returns
    -------
    array, shape (hidden size,), float32
    """
    with torch.no_grad():
        tokens = torch.tensor([list(ids)], device=model.device)
        states = model(tokens, use_cache=False, output_hidden_states=True).hidden_states[-1]
    found: NDArray[np.float32] = states[0].float().mean(dim=0).cpu().numpy()
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeCaches:
    """One small cache for each episode of a conversation; `of` finds the one for a question.

    Attributes
    ----------
    episodes : Episodes
        Of windows of turns.
    caches : tuple of EvictingCache
        One per episode; each has read the whole conversation.
    embed : callable
        What embeds tokens.
    """

    episodes: Episodes
    caches: tuple[EvictingCache, ...]
    embed: Embed

    def of(self, question: Sequence[int], /) -> EvictingCache:
        """Return a copy of the cache for a question, given by its tokens; the copy goes its own way."""
        return self.caches[self.episodes.nearest(self.embed(question))].copy()


def read_episodes(
    model: Any,
    turns: Sequence[Sequence[int]],
    policy: Policy,
    instruction: Sequence[int],
    /,
    *,
    episodes: int = 4,
    medoids: int = 4,
    window: int = 4,
    block: int = 2048,
    seed: int = 42,
    embed: Embed | None = None,
) -> EpisodeCaches:
    """Read a long conversation once for each of its episodes, keeping what matters to that episode.

    Windows of turns are embedded and clustered; those nearest to the mean of a cluster are what its cache is asked
    with, after `instruction`, see `read_in_blocks`. Costs one reading of the whole conversation per episode.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `observing`.
    turns : sequence of sequence of int
        The conversation as token ids, turn by turn, template included: joined, they are what the model reads.
    policy : Policy
        For example ``AdaKV(EpiCache(budget=1024), floor=0.0)``.
    instruction : sequence of int
        Token ids of the prompt's beginning: to extract what is essential, for example.
    episodes, medoids, seed
        As for `find_episodes`.
    window : int
        Turns that are embedded together.
    block : int
        As for `read_in_blocks`.
    embed : callable, optional
        From a sequence of token ids to an array of one axis. Default: `mean_hidden_state` of the model.

    Returns
    -------
    EpisodeCaches

    Raises
    ------
    ArgumentError
        If there is no turn, or one without a token, or as for `find_episodes` and `read_in_blocks`.
    ArgumentTypeError
        If an argument has the wrong type.

    References
    ----------
    .. [1] Kim et al., "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
       arXiv:2509.17396.

    Examples
    --------
    ::

        policy = AdaKV(EpiCache(budget=1024), floor=0.0)
        kept = read_episodes(model, turns, policy, tokenizer("Extract what is essential.").input_ids)
        with observing(model):
            cache = kept.of(question)
            model(torch.tensor([question]), cache=cache)
    """
    window = checks.count("window", window, minimum=1)
    turns = [list(turn) for turn in turns]
    if not turns or not all(turns):
        raise ArgumentError(f"turns must be token ids, at least one turn and one token in each; got {len(turns)} turns")

    def own(ids: Sequence[int]) -> NDArray[np.float32]:
        return mean_hidden_state(model, ids)

    embed = own if embed is None else embed
    windows = [list(chain.from_iterable(turns[start : start + window])) for start in range(0, len(turns), window)]
    embeddings = np.stack([np.asarray(embed(ids), dtype=np.float64) for ids in windows])
    found = find_episodes(embeddings, episodes=episodes, medoids=medoids, seed=seed)
    text = torch.tensor([list(chain.from_iterable(turns))], device=model.device)
    prompts = [[*instruction, *chain.from_iterable(windows[place] for place in each)] for each in found.medoids]
    caches = tuple(read_in_blocks(model, text, policy, prompt, block=block) for prompt in prompts)
    return EpisodeCaches(episodes=found, caches=caches, embed=embed)
