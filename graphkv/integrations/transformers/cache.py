"""A transformers cache whose layers can be evicted, with positions and masks that stay correct."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from transformers.cache_utils import Cache

from ...core import checks
from ...core.backend import Backend, load
from ...core.errors import ArgumentError
from ...core.layer import Memory
from ...core.needs import name_of
from ...core.policy import Policy
from . import sharing, versions
from .decision import evict_together
from .handout import Handout, latest
from .history import History
from .hybrid import HybridEvictingLayer
from .layer import EvictingLayer
from .probing import probe
from .queries import check_window
from .report import LayerStats, describe, layer_stats
from .settings import Settings
from .source import FULL, WINDOWED
from .storage import load_cache, save_cache
from .warning import warn

__all__ = ["EvictingCache", "not_compiled"]


Function = TypeVar("Function", bound=Callable[..., Any])
Given = TypeVar("Given")


def not_compiled(function: Function) -> Function:
    """Cut a model here under torch.compile: what a cache keeps is not to be traced."""
    disable: Any = torch.compiler.disable
    return cast("Function", disable(function))


class EvictingCache(Cache):  # type: ignore[misc]
    """A transformers cache whose layers can be evicted, with positions and masks that stay correct.

    The model must run inside `evicting` or `observing`, or with ``attn_implementation="graphkv_sdpa"`` or
    ``"graphkv_eager"``: there its attention passes the queries to the cache.

    Parameters
    ----------
    policy : Policy, optional
        Evicts every layer right after the attention of the first forward call. None: nothing is evicted until `evict`
        is called.
    every : int, optional
        Evict again whenever that many tokens have come since the last eviction: after each chunk of a prompt that comes
        in chunks, while decoding, and in later turns. A layer then never stores more than its budget, `every` - 1
        tokens and the call at hand. None: only once. With a window of queries, at least as many as are in it, or the
        budget has room for it and for the sinks.
    protect_prompt : bool
        Never evict what the model reads: the prompt, and in later turns what `generate` is given anew. Outside of
        `generate`, that is what comes in calls of more than one token. Those tokens count in the budget, which must
        leave room for them. Needs `every`, because right after the prompt there is nothing else to evict.
    rerotate : bool
        Turn the kept keys to contiguous positions, ending at the last token seen. Distances in the rotary embedding
        then count stored tokens, not all that have been seen.
    record : bool
        Keep what each layer's last eviction saw and did (`EvictingLayer.record`), for `report` and `graphkv inspect`.
        Costs some arrays over the tokens before the eviction.
    num_queries : int
        Without a policy: how many of the last queries to keep for `evict`.
    backend : Backend or str, optional
        What decides which tokens are kept. Default: torch.
    config : transformers.PreTrainedConfig, optional
        Of the model, as for transformers' own ``DynamicCache``. Only models with layers of other kinds need it (linear
        attention, state spaces), and inside `evicting` and `observing` the cache gets it by itself.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is out of range or of the wrong type.
    BackendError, BackendUnavailableError
        If the backend is unknown or not installed.

    Warns
    -----
    GraphKVWarning
        If more tokens than the budget have come since the only eviction; and if sinks, recents and window took up the
        whole budget of every layer, so that no score mattered.
    """

    layers: list[Any]

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        every: int | None = None,
        protect_prompt: bool = False,
        rerotate: bool = False,
        record: bool = False,
        num_queries: int = 0,
        backend: Backend | str | None = None,
        config: Any = None,
    ) -> None:
        if policy is not None:
            checks.instance("policy", policy, Policy)
            if policy.needs().probes:
                raise ArgumentError(
                    f"policy must do without probes to evict by itself; {name_of(policy)} needs some. Read the text "
                    "into an EvictingCache without a policy, then call probe() and evict(policy)"
                )
            if policy.needs().nested and every is not None:
                raise ArgumentError(
                    f"every must be None for layers that are nested, which hold the same tokens only once; got {every} "
                    f"with {name_of(policy)}"
                )
        if checks.flag("protect_prompt", protect_prompt) and policy is not None and every is None:
            raise ArgumentError("every must be given with protect_prompt=True, or nothing is ever evicted; got None")
        self.settings = Settings(
            policy=policy,
            every=None if every is None else checks.count("every", every, minimum=1),
            protect_prompt=protect_prompt,
            rerotate=checks.flag("rerotate", rerotate),
            record=checks.flag("record", record),
            num_queries=checks.count("num_queries", num_queries),
            backend=load(backend) if isinstance(backend, str) else backend,
        )
        if policy is not None and every is not None and isinstance(policy.budget, int) and not protect_prompt:
            # Known before anything is read; of other budgets, each layer says so at its first eviction.
            check_window(policy, policy.budget, every)
        # Not a method: a cache that holds itself keeps its memory until the garbage collector comes.
        super().__init__(layer_class_to_replicate=partial(EvictingLayer, self.settings))
        _check_tiers(policy, self.settings)
        # Whether evictions wait for crop().
        self.is_waiting = False
        self._start()
        if config is not None:
            self.prepare(config)

    def _start(self) -> None:
        self.num_seen = 0
        self.history = History()
        # How many of the tokens that come next are guesses, which a crop may take back.
        self.num_guessed = 0
        # How many of the tokens up to now `generate` was given: they are read, also one at a time.
        self.num_given = 0
        self.seen_before = 0
        self._opened_by = 0
        self._latest = Handout()
        self._has_warned = False

    @classmethod
    def adopt(cls, cache: Cache, like: EvictingCache) -> None:
        """Turn an empty ``DynamicCache`` into a cache like another empty one; it stays the same object."""
        records_past = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.__dict__.clear()
        cache.__class__ = cls
        cache.__dict__.update(like.copy().__dict__)
        if records_past:
            cache.activate_past_recording()

    def prepare(self, config: Any) -> None:
        """Make the layers that a model needs, where nothing was cached yet.

        Parameters
        ----------
        config : transformers.PreTrainedConfig
            Of the model, or of its decoder.
        """
        if self.layers or self.num_seen or not versions.makes_other_layers():
            return
        config = config.get_text_config(decoder=True)
        kinds = versions.layer_kinds(config)
        if all(kind in FULL[:1] + WINDOWED[:2] for kind in kinds):
            return
        self.layers = [self._new_layer(config, index, kind) for index, kind in enumerate(kinds)]

    def _new_layer(self, config: Any, index: int, kind: str) -> Any:
        if kind in FULL + WINDOWED:
            if kind.startswith("hybrid"):
                return HybridEvictingLayer(self.settings, versions.other_layer(config, index))
            return EvictingLayer(self.settings)
        return versions.other_layer(config, index)

    @property
    def attention_layers(self) -> list[EvictingLayer]:
        """The layers that cache keys and values of the text; others are left to themselves."""
        layers = [layer for layer in self.layers if isinstance(layer, EvictingLayer) and not layer.is_apart]
        return [layer for layer in layers if layer.num_seen or not self.num_seen]

    @property
    def policy(self) -> Policy | None:
        """The policy that evicts; fixed, because what an earlier budget dropped cannot come back."""
        return self.settings.policy

    @not_compiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens to a layer and return all that it stores."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        layer, num_new = self.layers[layer_idx], key_states.shape[-2]
        if not isinstance(layer, EvictingLayer):
            raise ArgumentError(
                f"config must name a kind of layer that caches keys wherever the model does; layer {layer_idx} caches "
                f"some and is a {type(layer).__name__}"
            )
        is_out_of_step = self._begin(layer, layer_idx, num_new)
        num_pinned = self._num_read(num_new, layer.num_seen) if self.settings.protect_prompt else 0
        keys, values = layer.update(key_states, value_states, num_pinned=num_pinned)
        # The attention receives these very tensors, and so finds its way back.
        handout = Handout(self, layer_idx, num_new, is_out_of_step=is_out_of_step)
        for tensor in (keys, values):
            tensor.graphkv_handout = handout  # type: ignore[attr-defined]
        self._latest = latest.handout = handout
        return keys, values

    def _begin(self, layer: EvictingLayer, index: int, num_new: int) -> bool:
        """Note new tokens for a layer; return whether it has not seen what the others have."""
        if layer.is_apart:
            return False
        if layer.num_seen == self.num_seen:
            # Every layer is through: these are tokens that none has seen.
            self.check_finished()
            # What no crop has taken back by now stays.
            self._evict_due(self.attention_layers)
            self.num_seen += num_new
            self._opened_by = index
            return False
        self._check_attended()
        if layer.num_seen + num_new == self.num_seen:
            return False
        if layer.num_seen:
            self.refuse_unfinished()
        # Either keys of a picture, for example, or a pass that broke off: the attention will show which.
        return True

    def _num_read(self, num_new: int, start: int) -> int:
        """Return how many of the new tokens are a prompt's, neither written by the model nor guessed."""
        certain = num_new - self.num_guessed
        return certain if certain > 1 else min(max(0, certain), max(0, self.num_given - start))

    def set_apart(self, handout: Handout) -> None:
        """Leave a layer to itself that does not cache keys of the text; called by the attention function."""
        if self._opened_by == handout.index and self.num_seen == handout.num_seen:
            self.num_seen -= handout.num_new
        handout.layer.is_apart = True
        handout.layer.awaits_queries = False

    def _check_attended(self) -> None:
        """Refuse to go on if a layer's keys went unseen by our attention function."""
        if self._latest.is_open and self._latest.layer.awaits_queries:
            has_mass = self._latest.mass is not None
            raise ArgumentError(
                f"layer {self._latest.index} does not hand its cached keys to graphkv's attention function: either the "
                'model runs neither inside evicting() or observing() nor with attn_implementation="graphkv_sdpa", or '
                "the attention of this layer does not go through transformers' attention interface"
                + "; its slots count as several tokens, which only graphkv's attention knows"
                * has_mass
            )

    def note_tokens(self, ids: torch.Tensor | None) -> None:
        """Remember the ids of a finished forward pass, as long as every id since the first one is known."""
        known = len(self.history)
        if ids is None or known != self.seen_before or ids.shape[1] != self.num_seen - known:
            return
        layers = [layer for layer in self.attention_layers if layer.evicts]
        keep = max((layer.num_new if layer.num_evictions else self.num_seen for layer in layers), default=self.num_seen)
        self.history.append(ids, keep=keep)

    def check_history(self, ids: torch.Tensor | None) -> None:
        """Refuse a history of ids (batch, tokens) that does not begin with the tokens seen."""
        if ids is not None and ids.ndim == 2 and not self.history.begins(ids):
            raise ArgumentError(
                f"input_ids must begin with the {len(self.history)} tokens that the cache has seen; they do not. Take "
                "back what has changed with crop(), or start a new cache"
            )

    def check_finished(self) -> None:
        """Refuse to go on from a forward pass that broke off in the middle."""
        layers = [layer for layer in self.attention_layers if layer.num_seen]
        if any(layer.awaits_queries or layer.num_seen != self.num_seen for layer in layers):
            self.refuse_unfinished()

    def refuse_unfinished(self) -> None:
        """Raise for a forward pass that broke off in the middle."""
        raise ArgumentError(
            "the cache must come from a finished forward pass; an exception broke one off, or the model ran "
            'outside evicting() and observing() and without attn_implementation="graphkv_sdpa". reset() it'
        )

    def after_layer(self, layer: EvictingLayer) -> None:
        """Evict what is due after the attention of one layer; called by the attention function."""
        policy = self.settings.policy
        if policy is None or layer.record_past:
            return
        is_last = layer.source is not None and layer.source.is_last
        if not policy.needs().all_layers:
            self._evict_due([layer])
        elif is_last:
            self._evict_due(self.attention_layers)
        if is_last:
            self._warn_of_protection(policy)
            if self.settings.every is None:
                self._warn_of_growth()

    def evict_first(self, layer: EvictingLayer) -> None:
        """Evict a layer over a prompt that nothing of will be taken back; called by the attention function."""
        self._evict_due([layer])

    def finish(self) -> None:
        """Evict what is due after a forward pass; called by `evicting` and `observing`, which see its end."""
        self._check_attended()
        self.num_guessed = 0
        if not any(layer.record_past for layer in self.attention_layers):
            self._evict_due(self.attention_layers)

    def _evict_due(self, layers: list[EvictingLayer]) -> None:
        policy = self.settings.policy
        due = [(layer, layer.num_seen - layer.due_at) for layer in layers if layer.due_at is not None]
        if not due or policy is None:
            return
        # What came while an eviction waited is not taken in.
        tails = [layer.split_off(num_later) if num_later else None for layer, num_later in due]
        _evict([layer for layer, _ in due], policy, None)
        for (layer, _), tail in zip(due, tails, strict=True):
            if tail is not None:
                layer.rejoin(tail)

    def _warn_of_growth(self) -> None:
        evicted = [layer for layer in self.attention_layers if layer.budget is not None]
        num_new, budget = sum(layer.num_new for layer in evicted), sum(layer.budget or 0 for layer in evicted)
        if num_new > budget and not self._has_warned:
            self._has_warned = True
            warn(
                f"{num_new // len(evicted)} tokens have come since the only eviction, more than the policy's budget of "
                f"{budget // len(evicted)}; pass every=... to evict them too"
            )

    def _warn_of_protection(self, policy: Policy) -> None:
        """Warn after the first eviction if all that was kept was protected: the policy has had no choice."""
        dropped = [layer for layer in self.attention_layers if layer.num_dropped]
        budgets = [layer.budget or 0 for layer in dropped]
        is_first = all(layer.num_evictions == 1 and not layer.num_new for layer in dropped)
        if not (dropped and is_first) or any(policy.protection(each).count < max(each, 1) for each in budgets):
            return
        budget = max(budgets)
        protection = policy.protection(budget)
        parts = {"sinks": protection.first, "newest tokens": protection.newest}
        kept = " and ".join(f"{count} {name}" for name, count in parts.items() if count)
        warn(
            f"{kept} are kept before all others and "
            f"leave nothing of the budget of {budget}, so no token was chosen by its score; the policy needs a larger "
            "budget, or fewer sinks, recents or a smaller window"
        )

    def evict(self, policy: Policy | None = None, /, *, backend: Backend | str | None = None) -> None:
        """Shrink every layer to what a policy keeps, now.

        Parameters
        ----------
        policy : Policy, optional
            Default: the cache's own.
        backend : Backend or str, optional
            What decides. Default: the cache's; torch if it has none.

        Raises
        ------
        ArgumentError
            If the cache is empty, a forward pass broke off, queries are missing that the policy needs, or the policy
            has a larger budget than an earlier one.
        ArgumentTypeError
            If `policy` is not a Policy.
        """
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ArgumentError("policy must be given to evict a cache that has none")
        checks.instance("policy", policy, Policy)
        _check_tiers(policy, self.settings)
        backend = load(backend) if isinstance(backend, str) else backend
        if not self.num_seen:
            raise ArgumentError("the cache must hold a prompt before it is evicted; it is empty")
        self.check_finished()
        # Decide on a copy first, so that an error half-way leaves the cache as it was.
        twin = self.copy()
        _evict([layer for layer in twin.attention_layers if layer.num_seen], policy, backend)
        self.layers = twin.layers
        self._warn_of_protection(policy)

    def probe(
        self,
        model: Any,
        ids: torch.Tensor,
        /,
        *,
        about: tuple[int, int] | None = None,
        attention_mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> None:
        """Let the model read tokens that only ask: their queries and keys are kept for `evict`, the tokens forgotten.

        Policies like `KVzip` score by what these queries attend to. All else of the cache stays as it was, bit for bit.
        Several probes add up. They are kept until the next eviction, as long as no token comes or goes; `save` leaves
        them out.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The one that has filled the cache, as `observing` or `evicting` has it.
        ids : torch.Tensor, shape (batch, P), integer
            One prompt per row of the cache.
        about : tuple of int, optional
            The tokens seen, from the first to before the last, that it asks for. Default: all.
        attention_mask : torch.Tensor, shape (batch, P) or (batch, tokens seen + P), optional
            0 for padding. Default: none in `ids`, and before them what the cache knows to be padding.
        **inputs
            More arguments of the model's forward call, such as `position_ids`, where it needs them for the next tokens
            of the text too.

        Raises
        ------
        ArgumentError
            If the cache is empty or a forward pass broke off, `ids` are empty, of another batch or go beyond the
            model's context, `about` is not among the tokens seen, or the model is not in a block of `observing`. The
            cache then is as it was, also after any error of the model.
        ArgumentTypeError
            If `ids` are not integers.

        Examples
        --------
        ::

            with observing(model):
                cache = EvictingCache()
                model(text, cache=cache)  # past_key_values=cache before transformers 5.24
                cache.probe(model, instruction)
                cache.evict(KVzip(budget=512))
        """
        probe(self, model, ids, about=about, attention_mask=attention_mask, inputs=inputs)

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
        self.check_finished()
        surplus = min(versions.tokens_to_remove(tokens_to_remove, self.num_seen), self.num_seen)
        # On a copy first, so that an error half-way leaves the cache as it was.
        twin = self.copy()
        for index, layer in enumerate(twin.layers):
            if isinstance(layer, EvictingLayer) and layer.is_apart:
                continue
            if surplus and not getattr(layer, "record_past", True) and not isinstance(layer, EvictingLayer):
                raise ArgumentError(
                    f"crop must come after activate_past_recording() where layers have linear attention; layer {index} "
                    "does not remember what it was before the tokens came"
                )
            if surplus or getattr(layer, "record_past", False):
                layer.crop(-surplus)
        for layer in twin.attention_layers:
            layer.trim_window()
        twin._evict_due(twin.attention_layers)
        self.layers = twin.layers
        self.num_seen -= surplus
        self.history.take_back(max(0, len(self.history) - self.num_seen))

    def activate_past_recording(self) -> None:
        """Let evictions wait until `crop`, or the next forward call, as assisted decoding needs it."""
        self.is_waiting = True
        self.layer_class_to_replicate = partial(EvictingLayer, self.settings, record_past=True)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._start()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen: what positions and `generate` count by."""
        if layer_idx and layer_idx >= len(self.layers):
            return 0
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer_idx and isinstance(layer, EvictingLayer):
            return layer.num_seen
        return self.num_seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return the length of a mask over all tokens seen, new ones included, and 0: none is missing before them."""
        seen = self.get_seq_length(layer_idx) if layer_idx < len(self.layers) else self.num_seen
        return seen + versions.number_of(query_length), 0

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store what a layer of linear attention remembers."""
        self._check_linear(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store what a layer of linear attention remembers."""
        self._check_linear(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return what a layer of linear attention remembers."""
        self._check_linear(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Return what a layer of linear attention remembers."""
        self._check_linear(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Return whether a layer of linear attention remembers anything."""
        self._check_linear(layer_idx)
        return bool(super().has_previous_state(layer_idx, *args, **kwargs))

    def _check_linear(self, layer_idx: int | None) -> None:
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        if not any(hasattr(layer, "update_conv_state") for layer in layers):
            raise ArgumentError(
                "config must be given for a model with layers of linear attention: EvictingCache(policy, "
                "config=model.config), or run it inside evicting() or observing()"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self.history.change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.history.change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.history.change_rows(lambda rows: rows[indices.to(rows.device)])

    def copy(self) -> EvictingCache:
        """Return an independent cache with the same contents, without copying keys and values."""
        twin = EvictingCache.__new__(EvictingCache)
        twin.__dict__.update(self.__dict__)
        twin.history = self.history.copy()
        # Layers of linear attention write into their tensors.
        twin.layers = [layer.copy() if isinstance(layer, EvictingLayer) else deepcopy(layer) for layer in self.layers]
        return twin

    @classmethod
    def stacked(cls, caches: Sequence[EvictingCache]) -> EvictingCache:
        """Put caches that have seen equally many tokens, and store equally many in every layer, into one batch.

        Parameters
        ----------
        caches : sequence of EvictingCache
            Of one model, and each of any number of rows. They may have dropped different tokens.

        Returns
        -------
        EvictingCache
            The rows of the first, then those of the second, and so on: each goes on as it would in its own cache.
            Queries, probes, running sums and histories stay behind, so policies that ask for them cannot evict it.

        Raises
        ------
        ArgumentError
            If there are no caches, they differ in what they have seen or in how many tokens a layer stores, or one
            of them would evict again by itself.
        ArgumentTypeError
            If one is not an EvictingCache.
        """
        caches = tuple(caches)
        if not caches:
            raise ArgumentError("caches must hold at least one cache; got none")
        for number, cache in enumerate(caches):
            checks.instance(f"caches[{number}]", cache, EvictingCache)
            cache.check_finished()
            if cache.settings.every is not None or cache.is_waiting:
                raise ArgumentError(
                    f"caches must not evict again by themselves, with every=... or after activate_past_recording(); "
                    f"caches[{number}] does"
                )
            found, expected = cache._sizes(), caches[0]._sizes()
            if found != expected:
                raise ArgumentError(
                    f"caches must have seen and store equally many tokens as the first, {expected}; "
                    f"caches[{number}] has {found}"
                )
        result, layers = caches[0].copy(), caches[0].attention_layers
        for number, rows in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            if rows[0] in layers:
                result.layers[number] = sharing.stacked(rows)
            sharing.with_states_of(result.layers[number], rows)
        result.history = History()
        return result

    def caught_up(self, together: EvictingCache, row: int) -> EvictingCache:
        """Return this cache after it has read what its row of stacked caches has read since.

        So caches of several policies, each of which evicts again and again, can still be fed as one batch between
        their evictions. Call `finish` on the result to evict what is due.

        Parameters
        ----------
        together : EvictingCache
            From `stacked`, with this cache among its own, and fed since then. It must have kept as many queries
            (`num_queries`) as the policy here will ask for of these tokens.
        row : int
            Where this cache, of a single row, stands in it.

        Returns
        -------
        EvictingCache
            What comes next is protected as `num_given` says, if prompts are.
        """
        self.check_finished()
        together.check_finished()
        twin = self.copy()
        twin.layers = [
            sharing.caught_up(mine, other, row, self.num_given)
            for mine, other in zip(self.layers, together.layers, strict=True)
        ]
        twin.num_seen, twin.history = together.num_seen, History()
        return twin

    def with_settings(self, **changes: Any) -> EvictingCache:
        """Return a copy with other settings, by their names in `Settings`; what they are about later changes alone.

        With ``protect_prompt=True``, all that is stored counts as the prompt's from now on.
        """
        twin = self.copy()
        twin.settings = replace(self.settings, **changes)
        twin.layer_class_to_replicate = partial(EvictingLayer, twin.settings)
        for layer in twin.layers:
            if isinstance(layer, EvictingLayer):
                layer.settings, layer.due_at = twin.settings, None
                if changes.get("protect_prompt") and layer.evicts:
                    pinned = torch.ones(layer.keys.shape[:3], dtype=torch.bool, device=layer.keys.device)
                    layer.slots = layer.slots.having(pinned=pinned)
        return twin

    def _sizes(self) -> tuple[int, tuple[int, ...]]:
        """Return the tokens seen, and those stored in each layer."""
        return self.num_seen, tuple(layer.num_stored for layer in self.attention_layers)

    def with_stored(self, keys_and_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> EvictingCache:
        """Return a cache that has seen what this one has, and stores what somebody else has left of it.

        Parameters
        ----------
        keys_and_values : sequence of pairs of torch.Tensor, shape (batch, kv_heads, b, D)
            A pair for each layer that caches keys of the text; b <= `num_seen` may differ from layer to layer.

        Returns
        -------
        EvictingCache
            Positions are counted from 0, because nothing is known of where the tokens were; there are no queries and
            no running sums.

        Raises
        ------
        ArgumentError
            If there is not one pair per layer, or a shape does not fit.
        """
        pairs = _one_each("keys_and_values", keys_and_values, self.attention_layers)
        return self._with_layers([sharing.with_stored(layer, *pair) for layer, pair in pairs])

    def keep_queries(self, count: int) -> None:
        """Forget all but the last queries of every layer. Those of tokens that come later are kept as before.

        Parameters
        ----------
        count : int
            Queries to keep; 0 forgets all of them.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If `count` is negative or not an integer.
        """
        count = checks.count("count", count)
        for layer in self.attention_layers:
            layer.held = None if layer.held is None else layer.held.last(count)

    def running_states(self, policy: Policy, states: Sequence[Memory] | None = None) -> tuple[Memory, ...]:
        """Compute what a policy with running sums knows of all stored tokens. Nothing is evicted.

        Parameters
        ----------
        policy : Policy
            For example ``H2O(budget=512)``; its budget does not matter.
        states : sequence of Memory, optional
            What it knew before the last tokens came, as an earlier call returned it. Default: what the cache knows.

        Returns
        -------
        tuple of Memory
            In tensors, one per layer that caches keys of the text: `Memory.tokens` of all stored tokens, and
            `Memory.layer`. Empty for a policy without running sums, and for the sliding layers of a model that also has
            full ones.

        Raises
        ------
        ArgumentError
            If queries of tokens are missing that the sums do not know yet, a row has padding between its tokens, or
            there is not one state per layer.
        ArgumentTypeError
            If `policy` is not a Policy, or a state not a Memory.
        """
        checks.instance("policy", policy, Policy)
        self.check_finished()
        layers = self.attention_layers
        known: Sequence[Memory | None] = [None] * len(layers) if states is None else states
        pairs = _one_each("states", known, layers)
        return tuple(sharing.running_state(layer, policy, state) for layer, state in pairs)

    def with_states(self, states: Sequence[Memory]) -> EvictingCache:
        """Return a copy whose layers know running sums, so that its next eviction needs no queries for them.

        Parameters
        ----------
        states : sequence of Memory
            As `running_states` returns them: `Memory.tokens` is of the first S stored tokens of each layer.

        Returns
        -------
        EvictingCache

        Raises
        ------
        ArgumentError
            If there is not one state per layer, or a shape does not fit.
        ArgumentTypeError
            If a state is not a Memory.

        Examples
        --------
        Read a prompt once, then try several budgets without going through its attention again::

            with observing(model):
                cache = EvictingCache(num_queries=prompt.shape[1])
                model(prompt, cache=cache)  # past_key_values=cache before transformers 5.24
                states = cache.running_states(H2O(budget=512))
                for budget in (512, 1024):
                    small = cache.with_states(states)
                    small.evict(H2O(budget=budget))
        """
        pairs = _one_each("states", states, self.attention_layers)
        return self._with_layers([sharing.with_state(layer, state) for layer, state in pairs])

    def _with_layers(self, layers: list[EvictingLayer]) -> EvictingCache:
        """Return a copy with other layers for those that cache keys of the text."""
        twin, others = self.copy(), dict(zip(map(id, self.attention_layers), layers, strict=True))
        twin.layers = [others.get(id(old), new) for old, new in zip(self.layers, twin.layers, strict=True)]
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache into a file that `load` reads, without pickle: safetensors, with settings in its header.

        Everything that the cache needs to go on is saved: keys and values, positions, queries, running sums, budgets,
        counters, the policy and the other settings. The records of ``record=True`` are not, because the next
        eviction makes a new one, nor is what `probe` has asked. A copy of the tensors is made on the host.

        Parameters
        ----------
        path : str or path
            The file. It is written whole or not at all: an older one stays until the new one is complete.

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
            What decides from now on. Needed for one that graphkv does not ship. Default: as it was saved.
        device : torch.device or str, optional
            Where the tensors go. Default: each layer to where the model has that layer, else the CPU.

        Returns
        -------
        EvictingCache

        Raises
        ------
        ArgumentError
            If the file cannot be read, is not a saved cache, of another version or damaged, or does not fit the model,
            or if `policy` or `backend` must be given. The message names the file.
        ArgumentTypeError
            If an argument has the wrong type.
        """
        return load_cache(cls, path, model=model, policy=policy, backend=backend, device=device)

    def stats(self) -> tuple[LayerStats, ...]:
        """Return what every layer has seen, kept, dropped, freed and, with ``record=True``, suppressed.

        Returns
        -------
        tuple of LayerStats
            One per layer that caches keys of the text. Arrays are on the host, so this waits for an accelerator.
        """
        return tuple(
            layer_stats(index, layer) for index, layer in enumerate(self.layers) if layer in self.attention_layers
        )

    def report(self) -> str:
        """Describe `stats` in plain text: whether anything was dropped, why not if not, totals and layer by layer.

        Returns
        -------
        str
            In lines without a newline at the end.
        """
        layers = self.attention_layers
        return describe(self.policy, layers, self.stats(), num_seen=self.num_seen, nbytes=self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values, and of the scores that decoding in place holds beside them."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, EvictingLayer))


def _one_each(name: str, given: Sequence[Given], layers: list[EvictingLayer]) -> list[tuple[EvictingLayer, Given]]:
    """Pair what is given with the layers that it is for."""
    if len(given) != len(layers):
        raise ArgumentError(f"{name} must have one entry for each of {len(layers)} layers; got {len(given)}")
    return list(zip(layers, given, strict=True))


def _check_tiers(policy: Policy | None, settings: Settings) -> None:
    """Refuse to turn or to merge keys that are rounded: every time would round them once more."""
    if policy is None or not policy.needs().demotes:
        return
    if settings.rerotate:
        raise ArgumentError(
            f"rerotate must be False for a policy that keeps tokens in fewer bits; got True with {policy}"
        )
    if policy.needs().merges:
        raise ArgumentError(
            f"policy must either merge tokens or keep them in fewer bits in a model's cache; got {policy}"
        )


def _evict(layers: list[EvictingLayer], policy: Policy, backend: Backend | None) -> None:
    """Evict some layers, or all together where what one keeps depends on what the policy finds in the others."""
    if policy.needs().wants and any(layer.shared_by != policy for layer in layers if layer.evicts):
        layers = [layer for layer in layers if layer.evicts]
        wants = [layer.wants(policy, backend=backend) for layer in layers]
        seen = layers[0].seen_by_row
        shares = [policy.share_out(row, count) for row, count in zip(zip(*wants, strict=True), seen, strict=True)]
        for layer, budgets in zip(layers, zip(*shares, strict=True), strict=True):
            layer.row_budgets, layer.shared_by = torch.tensor(budgets), policy
    if not policy.needs().couples_layers:
        for layer in layers:
            if backend is not None or not layer.step(policy):
                layer.evict(policy, backend=backend)
        return
    started, layers = perf_counter(), [layer for layer in layers if layer.evicts]
    deciders = [layer.decider(policy, backend) for layer in layers]
    decided = evict_together(policy, deciders)
    seconds = (perf_counter() - started) / max(1, len(layers))
    for layer, decider, decisions in zip(layers, deciders, decided, strict=True):
        layer.shrink(policy, decider, decisions, seconds=seconds)
