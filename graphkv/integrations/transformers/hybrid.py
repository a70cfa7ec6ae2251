"""The cache of a layer that has linear attention, or a state space, next to its ordinary attention."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import cache_utils

from .layer import EvictingLayer
from .settings import Settings

__all__ = ["HybridEvictingLayer"]

# Releases before 5.13 know no such layers; models that have them bring a cache of their own there.
_Linear: Any = getattr(cache_utils, "LinearAttentionLayer", type("LinearAttentionLayer", (), {}))


class HybridEvictingLayer(_Linear, EvictingLayer):  # type: ignore[misc]
    """Evicts the attention's keys; the state of the other half is transformers' own, and stays untouched.

    Parameters
    ----------
    settings : Settings
    like : transformers.cache_utils.LinearAttentionCacheLayerMixin
        A fresh layer of transformers, for its number of states.
    """

    is_compileable = False

    def __init__(self, settings: Settings, like: Any) -> None:
        EvictingLayer.__init__(self, settings)
        _Linear.__init__(self, number_of_states=like.number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make room for keys and values, which come by position, or for states, which come by keyword."""
        (EvictingLayer if args else _Linear).lazy_initialization(self, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Let both halves wait for `crop`."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        """Whether both halves can take the tokens of the next call back."""
        return bool(_Linear.is_croppable.fget(self)) and bool(EvictingLayer.is_croppable.fget(self))  # type: ignore[attr-defined]

    def crop(self, argument: int) -> None:
        """Take back the newest tokens in both halves."""
        surplus = self.check_crop(argument)
        _Linear.crop(self, -surplus)
        self.remove_newest(surplus)

    def reset(self) -> None:
        """Forget everything."""
        _Linear.reset(self)
        EvictingLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the beams."""
        _Linear.reorder_cache(self, beam_idx)
        EvictingLayer.reorder_cache(self, beam_idx)

    def copy(self) -> EvictingLayer:
        """Return a layer that goes its own way from here."""
        twin: Any = EvictingLayer.copy(self)
        # transformers writes into these.
        for name in ("conv_states", "recurrent_states"):
            setattr(twin, name, deepcopy(getattr(self, name)))
        for name, held in vars(self).items():
            if isinstance(held, dict) and name not in ("conv_states", "recurrent_states"):
                setattr(twin, name, dict(held))
        return twin  # type: ignore[no-any-return]
