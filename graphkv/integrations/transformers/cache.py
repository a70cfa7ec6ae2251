"""A transformers cache whose layers can be evicted and stay true."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from transformers.cache_utils import Cache

from ...core import checks
from ...core.backend import Backend, load
from ...core.errors import ArgumentError, GraphKVWarning
from ...core.policy import Policy
from .layer import EvictingLayer, Settings
from .report import LayerStats, describe, layer_stats
from .storage import load_cache, save_cache

__all__ = ["EvictingCache", "met_by", "not_compiled"]


Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """Cut a model here under torch.compile: what a cache keeps is not to be traced."""
    disable: Any = torch.compiler.disable
    return cast("Function", disable(function))


class Origin:
    """Which cache handed out a tensor of keys, and for which layer; copies and files of the tensor do not know it."""

    def __init__(self, cache: EvictingCache | None = None, layer: int = 0) -> None:
        self.cache: Callable[[], EvictingCache | None] = (lambda: None) if cache is None else weakref.ref(cache)
        self.layer = layer

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        """Forget the cache."""
        return Origin, ()


class EvictingCache(Cache):  # type: ignore[misc]
    """A transformers cache whose layers can be evicted and stay true.

    The model must run inside `evicting` or `observing`, or with ``attn_implementation="graphkv_sdpa"`` or
    ``"graphkv_eager"``: there its attention tells the cache the queries.

    Parameters
    ----------
    policy : Policy, optional
        Evicts every layer right after the attention of the first forward call. None: nothing is evicted until `evict`
        is called.
    every : int, optional
        Evict again whenever that many tokens have come since the last eviction: after each chunk of a prompt that comes
        in chunks, while decoding, and in later turns. A layer then never stores more than its budget, `every` - 1
        tokens and the call at hand. None: only once.
    rerotate : bool
        Turn the kept keys to contiguous positions, ending at the last token seen. Distances in the rotary embedding
        then count stored tokens, not all that have been seen.
    record : bool
        Keep what each layer's last eviction saw and did (`EvictingLayer.record`), for `report` and `graphkv inspect`.
        Costs some arrays over the tokens before the eviction.
    num_queries : int
        Without a policy: how many of the last queries to keep for `evict`.
    backend : Backend or str, optional
        Who decides what is kept. Default: torch.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is out of range or of the wrong type.
    BackendError, BackendUnavailableError
        If the backend is unknown or not installed.

    Warns
    -----
    GraphKVWarning
        If more tokens than the budget have come since the only eviction.
    """

    layers: list[EvictingLayer]

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        every: int | None = None,
        rerotate: bool = False,
        record: bool = False,
        num_queries: int = 0,
        backend: Backend | str | None = None,
    ) -> None:
        if policy is not None:
            checks.instance("policy", policy, Policy)
        self.settings = Settings(
            policy=policy,
            every=None if every is None else checks.count("every", every, minimum=1),
            rerotate=checks.flag("rerotate", rerotate),
            record=checks.flag("record", record),
            num_queries=checks.count("num_queries", num_queries),
            backend=load(backend) if isinstance(backend, str) else backend,
        )
        self._has_warned = False
        # Not a method: a cache that holds itself keeps its memory until the garbage collector comes.
        super().__init__(layer_class_to_replicate=partial(EvictingLayer, self.settings))

    @property
    def policy(self) -> Policy | None:
        """Who decides; fixed, because what an earlier budget dropped cannot come back."""
        return self.settings.policy

    @not_compiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens to a layer and give all that it stores."""
        if layer_idx == 0:
            self._check_finished()
            # What no crop has taken back by now stays.
            self._evict_due(self.layers)
        elif self.layers[layer_idx - 1].awaits_queries:
            raise ArgumentError(
                f"layer {layer_idx - 1} does not hand its cached keys to graphkv's attention function; run the model "
                'inside evicting() or observing(), or with attn_implementation="graphkv_sdpa"'
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # The attention function receives this very tensor, and so finds its way back.
        keys.graphkv_origin = Origin(self, layer_idx)
        return keys, values

    def _check_finished(self) -> None:
        """Refuse to go on from a forward pass that broke off in the middle."""
        if any(layer.awaits_queries for layer in self.layers) or len({layer.num_seen for layer in self.layers}) > 1:
            raise ArgumentError(
                "the cache must come from a finished forward pass; an exception broke one off, or the model ran "
                'outside evicting() and observing() and without attn_implementation="graphkv_sdpa". reset() it'
            )

    def after_layer(self, layer: EvictingLayer) -> None:
        """Evict what is due after the attention of one layer; called by the attention function."""
        policy = self.settings.policy
        if policy is None or layer.record_past:
            return
        if not policy.needs().preferences:
            self._evict_due([layer])
        elif layer.index == layer.num_layers - 1:
            self._evict_due(self.layers)
        if self.settings.every is None and layer.index == layer.num_layers - 1:
            self._warn_of_growth()

    def _evict_due(self, layers: list[EvictingLayer]) -> None:
        due = [layer for layer in layers if layer.is_due]
        if due and self.settings.policy is not None:
            _evict(due, self.settings.policy, None)

    def _warn_of_growth(self) -> None:
        evicted = [layer for layer in self.layers if layer.budget is not None]
        num_new, budget = sum(layer.num_new for layer in evicted), sum(layer.budget or 0 for layer in evicted)
        if num_new > budget and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{num_new // len(evicted)} tokens have come since the only eviction, more than the policy's budget of "
                f"{budget // len(evicted)}; pass every=... to evict them too",
                GraphKVWarning,
                stacklevel=2,
            )

    def evict(self, policy: Policy | None = None, /, *, backend: Backend | str | None = None) -> None:
        """Shrink every layer to what a policy keeps, now.

        Parameters
        ----------
        policy : Policy, optional
            Default: the cache's own.
        backend : Backend or str, optional
            Who decides. Default: the cache's; torch if it has none.

        Raises
        ------
        ArgumentError
            If the cache is empty, a forward pass broke off, queries are missing that the policy needs, or the policy
            has a larger budget than an earlier one.
        ArgumentTypeError
            If `policy` is no Policy.
        """
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ArgumentError("policy must be given to evict a cache that has none")
        checks.instance("policy", policy, Policy)
        backend = load(backend) if isinstance(backend, str) else backend
        if not self.layers:
            raise ArgumentError("the cache must hold a prompt before it is evicted; it is empty")
        self._check_finished()
        # Decide on a copy first, so that an error half-way leaves the cache as it was.
        twins = [layer.copy() for layer in self.layers]
        _evict(twins, policy, backend)
        self.layers = twins

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, at most those that came since the last eviction.

        Parameters
        ----------
        tokens_to_remove : int
            Minus the number of tokens, or a positive number of tokens to leave.

        Raises
        ------
        ArgumentError
            If an eviction has happened since those tokens came: what it dropped cannot be restored. After
            `activate_past_recording`, evictions wait for the crop.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)
            layer.settle()
        self._evict_due(self.layers)

    def activate_past_recording(self) -> None:
        """Let evictions wait until `crop`, or the next forward call, as assisted decoding needs it."""
        self.layer_class_to_replicate = partial(EvictingLayer, self.settings, record_past=True)
        for layer in self.layers:
            layer.activate_past_recording()

    def copy(self) -> EvictingCache:
        """Give an independent cache with the same contents, without copying tensors."""
        twin = EvictingCache()
        twin.__dict__.update(self.__dict__)
        twin.layers = [layer.copy() for layer in self.layers]
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache into a file that `load` reads, without pickle: safetensors, with settings in its header.

        Everything that the cache needs to go on is saved: keys and values, positions, queries, running sums, budgets,
        counters, the policy and the other settings. The records of ``record=True`` are not; the next eviction makes a
        new one. A copy of the tensors is made on the host.

        Parameters
        ----------
        path : str or path
            The file. It is written whole or not at all: what stood there stays until the new one is complete.

        Raises
        ------
        ArgumentError
            If a forward pass broke off, the file cannot be written, or the budgets were shared out by a policy of your
            own that is not the cache's.
        """
        save_cache(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: torch.nn.Module | None = None,
        policy: Policy | None = None,
        backend: Backend | str | None = None,
        device: torch.device | str | None = None,
    ) -> EvictingCache:
        """Read a cache that `save` wrote. Nothing in the file is run, whoever wrote it.

        Parameters
        ----------
        path : str or path
            The file.
        model : torch.nn.Module, optional
            The model that goes on with the cache: checked against the one that filled it, by its kind of attention, its
            sizes and its rotary embedding, but not by its weights. Default: nothing is checked against a model, and
            keys can be turned (``rerotate=True``, ``unrotated=True``) only after the next forward call.
        policy : Policy, optional
            Needed for a policy of your own, and then the one that the cache was saved with. Default: made anew from the
            file, if it is one of graphkv's.
        backend : Backend or str, optional
            Who decides from now on. Needed for one that graphkv does not bring. Default: as it was saved.
        device : torch.device or str, optional
            Where the tensors go. Default: each layer to where the model has that layer, else the CPU.

        Returns
        -------
        EvictingCache

        Raises
        ------
        ArgumentError
            If the file cannot be read, is none of ours, of another version or damaged, or does not fit to the model,
            or if `policy` or `backend` must be given. The message names the file.
        ArgumentTypeError
            If an argument has the wrong type.
        """
        return load_cache(cls, path, model=model, policy=policy, backend=backend, device=device)

    def stats(self) -> tuple[LayerStats, ...]:
        """Say what every layer has seen, kept, dropped, freed and, with ``record=True``, suppressed.

        Returns
        -------
        tuple of LayerStats
            One per layer. Arrays are on the host, so this waits for an accelerator.
        """
        return tuple(layer_stats(index, layer) for index, layer in enumerate(self.layers))

    def report(self) -> str:
        """Put `stats` into plain text: whether anything was dropped, why not if not, totals and a line per layer.

        Returns
        -------
        str
            In lines without a newline at the end.
        """
        return describe(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.layers)


def met_by(keys: torch.Tensor) -> tuple[EvictingCache | None, EvictingLayer | None]:
    """Find the cache and the layer that a tensor of keys was handed out by; None and None for other tensors."""
    origin = getattr(keys, "graphkv_origin", None)
    cache = None if origin is None else origin.cache()
    return cache, None if origin is None or cache is None else cache.layers[origin.layer]


def _evict(layers: list[EvictingLayer], policy: Policy, backend: Backend | None) -> None:
    """Evict some layers, or all together where the policy shares the budgets out by what it finds in them."""
    if policy.needs().preferences and any(layer.shared_by != policy for layer in layers if layer.evicts):
        layers = [layer for layer in layers if layer.evicts]
        wants = [layer.preference(policy, backend=backend) for layer in layers]
        shares = [policy.layer_budgets(row, layers[0].num_seen) for row in zip(*wants, strict=True)]
        for layer, budgets in zip(layers, zip(*shares, strict=True), strict=True):
            layer.row_budgets, layer.shared_by = torch.tensor(budgets), policy
    for layer in layers:
        layer.evict(policy, backend=backend)
