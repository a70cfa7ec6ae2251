"""The link from keys on their way through the attention to the layer that stores them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...core.backend import load
from ...core.errors import ArgumentError
from ...core.layer import Memory
from ...core.needs import name_of
from .handover import from_backend, to_backend
from .queries import Queries

if TYPE_CHECKING:
    from .layer import EvictingLayer
    from .source import Source

__all__ = ["Handout", "handed_out", "latest", "refuse_hidden_keys"]


class Handout:
    """What a layer stored when it handed out its keys and values; they carry it to the attention, and nowhere else.

    A later layer may read the same keys, after this one has been evicted. Copies and files of the tensors do not know
    their cache.

    Attributes
    ----------
    num_seen, num_stored, num_new : int
        Tokens seen, slots stored, and how many of them this call brought.
    positions, valid, mass : torch.Tensor or None
        As those of `EvictingLayer`.
    is_open : bool
        Whether the attention that the keys were handed out for is still to come.
    is_apart : bool
        Whether they turned out not to be the text's, see `EvictingLayer.is_apart`.
    was_found : bool
        Whether any attention has come with them, even if it failed.
    is_out_of_step : bool
        Whether the layer has not seen what the others have.
    """

    def __init__(self, cache: Any = None, index: int = 0, num_new: int = 0, *, is_out_of_step: bool = False) -> None:
        self._cache: Callable[[], Any] = (lambda: None) if cache is None else weakref.ref(cache)
        self._owner: Callable[[], Any] = lambda: None
        self.index, self.num_new, self.is_out_of_step = index, num_new, is_out_of_step
        self.is_open, self.is_apart, self.was_found = cache is not None, False, False
        if cache is not None:
            layer = self.layer
            self.num_seen, self.num_stored = layer.num_seen, layer.num_stored
            self._steady = steady = layer.steady
            self.positions: torch.Tensor | None
            self.valid: torch.Tensor | None
            self.mass: torch.Tensor | None
            if steady is None:
                self.positions, self.valid, self.mass = layer.slots.positions, layer.slots.valid, layer.slots.mass
            else:
                self.positions, self.valid, self.mass = steady.positions_by_slot, None, None
            self._answering, self._memory = layer.answering, layer.layer_state

    def __reduce__(self) -> tuple[type[Handout], tuple[()]]:
        """Forget the cache."""
        return Handout, ()

    @property
    def cache(self) -> Any:
        """The cache, or None if it is gone."""
        return self._cache()

    @property
    def layer(self) -> EvictingLayer:
        """The layer as it is now."""
        layer: EvictingLayer = self._cache().layers[self.index]
        return layer

    @property
    def is_whole(self) -> bool:
        """Whether nothing was dropped."""
        return self.positions is None and self.num_stored == self.num_seen

    def answer(self, query: torch.Tensor, scaling: float | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what attention finds in the place of dropped tokens, see `Answer`; None for nothing.

        Parameters
        ----------
        query : torch.Tensor, shape (batch, query_heads, Q, D)
        scaling : float or None
            Of the attention.

        Returns
        -------
        tuple of torch.Tensor, or None
            Logits (batch, query_heads, Q, R) and values (batch, kv_heads, R, Dv), in the dtype of the query.
        """
        policy, layer = self._answering, self.layer
        if policy is None:
            return None
        if not self.is_open:
            raise ArgumentError(
                f"model must attend in layer {self.index} alone to what it caches, because {name_of(policy)} answers "
                "for dropped tokens there; another layer reads it too"
            )
        backend = layer.settings.backend or load("torch")
        asked = to_backend(Queries.of(query, scaling, None, self.num_seen).queries, backend)
        memory = Memory(layer={name: to_backend(x, backend) for name, x in self._memory.items()})
        found = policy.at(self.index, layer.num_layers).answer(
            asked, memory, layer=self.index, num_layers=layer.num_layers, backend=backend
        )
        if found is None:
            return None
        logits, values = (from_backend(x, backend, query.device) for x in (found.logits, found.values))
        return logits.to(query.dtype).clamp(min=torch.finfo(query.dtype).min), values.to(query.dtype)

    @property
    def num_guessed(self) -> int:
        """How many of the new tokens are guesses, if the layer is to be evicted over those before them at once."""
        cache, layer = self.cache, self.layer
        waits_for_others = cache.policy is None or cache.policy.needs().all_layers
        is_first = layer.num_seen == self.num_new and self.is_open
        return 0 if waits_for_others or not is_first or self.is_out_of_step else int(cache.num_guessed)

    def without_guesses(self) -> Handout:
        """Take the guesses out of the layer; return what it hands out then."""
        num_guessed = self.num_guessed
        self.is_open = False
        self.layer.split_off(num_guessed)
        return Handout(self.cache, self.index, self.num_new - num_guessed)

    def with_guesses(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Handout, torch.Tensor, torch.Tensor]:
        """Evict the layer now, and append guesses to it; return what it hands out then."""
        self.cache.evict_first(self.layer)
        keys, values = self.layer.update(key, value)
        return Handout(self.cache, self.index, key.shape[2]), keys, values

    def note_padding(self, padding: torch.Tensor | None) -> None:
        """Note which tokens are padding, see `EvictingLayer.note_padding`."""
        if padding is None:
            return
        self.layer.note_padding(padding, self.num_new)
        self.valid = self.layer.slots.valid
        if self._steady is not None and self.valid is not None:
            # The keys that were handed out are by slot.
            self.valid = self._steady.by_slot(self.valid)

    def after_attention(
        self, module: Any, source: Source, query: torch.Tensor, scaling: float | None, window: int | None
    ) -> None:
        """Note the finished attention, and let the cache evict what is due."""
        self.is_open, self._owner = False, weakref.ref(module)
        self.layer.after_attention(source, query, scaling, window)
        self.layer.note_places(module, self.num_new)
        self.cache.after_layer(self.layer)

    def set_apart(self) -> None:
        """Note that these are not the text's own keys."""
        self.is_open, self.is_apart = False, True
        self.cache.set_apart(self)

    def was_read_by(self, module: Any) -> bool:
        """Return whether this module's attention has read the keys already."""
        return self._owner() is module


def handed_out(module: Any, key: torch.Tensor, value: torch.Tensor) -> Handout | None:
    """Return the handout that keys and values belong to; None for tensors that no cache handed out.

    Raises
    ------
    ArgumentError
        If a module reads a layer's keys with other values or twice: then dropping slots would separate what belongs
        together.
    """
    found = [getattr(tensor, "graphkv_handout", None) for tensor in (key, value)]
    found = [None if each is None or each.cache is None else each for each in found]
    handout: Handout | None = found[0]
    if found[0] is not found[1]:
        raise ArgumentError(
            f"model must read cached keys with the values that were cached with them; {type(module).__name__} reads "
            "them with others"
        )
    if handout is not None:
        handout.was_found = True
    if handout is not None and not handout.is_apart and handout.was_read_by(module):
        raise ArgumentError(
            f"model must attend once to what a layer has cached; {type(module).__name__} does so again after its layer "
            "may have been evicted"
        )
    return handout


class Latest(threading.local):
    """The latest handout in this thread, to detect attention that does not read it."""

    handout: Handout | None = None


latest = Latest()


def refuse_hidden_keys(module: Any, keys: torch.Tensor) -> None:
    """Refuse attention to other keys than the cache has just handed out for it."""
    handout = latest.handout
    if handout is None or handout.cache is None or not handout.is_open or handout.was_found:
        return
    if getattr(module, "layer_idx", handout.index) != handout.index:
        return
    if keys.shape[0] == handout.layer.keys.shape[0] and keys.shape[2] == handout.num_stored:
        raise ArgumentError(
            f"model must attend to its cached keys as they are; {type(module).__name__} computes others from them "
            "(from compressed latents shared by all heads, or by repeating or mixing heads), so dropping tokens head "
            "by head has no meaning there"
        )
