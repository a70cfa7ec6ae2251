"""The attention module that the keys of a cache layer come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.errors import ArgumentError
from ...core.policy import Policy

__all__ = ["FULL", "WINDOWED", "Source"]

# Kinds of layers, in transformers' words, whose attention caches keys and values.
FULL = ("full_attention", "hybrid")
WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The attention module that a layer's keys come from: its class, its configuration and its index.

    The module itself would make a copy of the cache a copy of the model.

    Attributes
    ----------
    kind : type or None
        None if the layer was loaded without a model; `config` then has no more than `storage` saves of it.
    layer_kinds : tuple of str
        What every layer of the model caches, see `versions.layer_kinds`.
    has_all_heads, has_whole_groups : bool
        Whether tensor parallelism leaves all heads of the layer in this process, and all query heads of each KV head.
    """

    kind: type | None
    config: Any
    index: int
    layer_kinds: tuple[str, ...] = ()
    has_all_heads: bool = True
    has_whole_groups: bool = True

    @property
    def layer_kind(self) -> str:
        """What this layer caches."""
        return self.layer_kinds[self.index] if self.index < len(self.layer_kinds) else FULL[0]

    @property
    def num_layers(self) -> int:
        """Layers of the model; some models run them more than once."""
        return max(int(self.config.num_hidden_layers), self.index + 1)

    @property
    def is_last(self) -> bool:
        """Whether no later layer caches keys."""
        return not any(kind in FULL + WINDOWED for kind in self.layer_kinds[self.index + 1 :])

    @property
    def is_mixed(self) -> bool:
        """Whether some layers of the model see everything and others a window."""
        return len({kind in FULL for kind in self.layer_kinds if kind in FULL + WINDOWED}) > 1

    def check_policy(self, policy: Policy, num_tokens: int) -> None:
        """Refuse a policy that would decide otherwise over this many tokens if all heads were in this process."""
        if self.has_all_heads:
            return
        if policy.needs().couples_heads or policy.needs().wants:
            raise ArgumentError(
                "policy must decide for each KV head alone when tensor parallelism shares heads out over processes; "
                f"got {policy}"
            )
        if not self.has_whole_groups and policy.num_queries(num_tokens):
            raise ArgumentError(
                "policy must do without queries when tensor parallelism parts the query heads of a KV head; "
                f"got {policy}"
            )
