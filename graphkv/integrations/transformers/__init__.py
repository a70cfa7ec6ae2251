"""Hugging Face transformers: a cache that stays true after eviction, and context managers that use it.

Three facts carry the package:

* A layer keeps how many tokens it has *seen* apart from how many it *stores*, and the true positions of those. So
  rotary positions, masks and the next `generate` call stay right after the cache has shrunk.
* transformers lets one register an attention function. Ours calls the model's own, then hands queries to the cache
  layer whose keys they met: no model class is patched and no projection computed twice.
* The mask of a layer is made from that layer's own positions, so layers may keep different tokens, and different
  numbers of them.

All state lives in the cache, so requests that share a model never touch each other.
"""

from ...core.extras import needs

with needs("graphkv.integrations.transformers", "transformers", "torch", "transformers"):
    from .cache import EvictingCache
    from .episodes import EpisodeCaches, Episodes, find_episodes, mean_hidden_state, read_episodes, read_in_blocks
    from .layer import EvictingLayer
    from .models import EvictingRun, evicting, observing
    from .record import EvictionRecord
    from .repeating import RepeatPrompt, ask_to_repeat
    from .report import Fate, LayerStats, Suppressions, absorbers, fates, masses, scored
    from .smaller import SmallerModel

__all__ = [
    "EpisodeCaches",
    "Episodes",
    "EvictingCache",
    "EvictingLayer",
    "EvictingRun",
    "EvictionRecord",
    "Fate",
    "LayerStats",
    "RepeatPrompt",
    "SmallerModel",
    "Suppressions",
    "absorbers",
    "ask_to_repeat",
    "evicting",
    "fates",
    "find_episodes",
    "masses",
    "mean_hidden_state",
    "observing",
    "read_episodes",
    "read_in_blocks",
    "scored",
]
