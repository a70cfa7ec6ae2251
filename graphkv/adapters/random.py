"""Random: the baseline that any claim must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import checks, primitives
from ..core.layer import Layer, Memory
from ..core.policy import Requirements
from ..core.protection import token_rank
from ..core.types import Array
from .protection import SinkPolicy

__all__ = ["Random"]


def _draws(seed: int, layer: int, num_heads: int, num_tokens: int, /) -> list[list[float]]:
    """Draw a number in [0, 1) for every token of every head.

    The standard has no random numbers; Python's are the same everywhere, and 24 bits are exact in float32.
    """
    streams = [random.Random(f"{seed}/{layer}/{head}") for head in range(num_heads)]
    return [[stream.getrandbits(24) / 2**24 for _ in range(num_tokens)] for stream in streams]


# What torch.compiler.assume_constant_result sets, without an import of torch: the draws are constants of a graph.
_draws._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Random(SinkPolicy):
    """Keep tokens drawn at random, the same on every backend.

    A baseline while decoding too, which arXiv:2609.03430 finds hard to beat: the prompt stays, and what the model
    writes is forgotten at random, ``evicting(model, Random(budget=512), every=64, protect_prompt=True)``. There every
    eviction of a cache draws anew, so that a token is the less likely still there the older it is. In calls of your own
    take another seed for each.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head; a float is a share of the tokens.
    seed : int
        Each seed, layer and head has a draw of its own. All rows of a batch share it, and padding does not shift it, so
        that a row keeps the same tokens alone and in a batch.
    num_sinks : int
        First tokens that are kept as well.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import Random, evict
    >>> evict(Random(budget=2, seed=1), np.ones((1, 1, 6, 4))).kept.shape
    (1, 1, 2)
    """

    requirements: ClassVar[Requirements] = Requirements(couples_heads=True)

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("seed", self.seed)

    def renewed(self, number: int, /) -> Random:
        """Return this policy for eviction 0 of a cache, and one with other draws for each later one."""
        # Far from the seeds that people choose.
        return replace(self, seed=self.seed + 1_000_003 * number) if number else self

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Draw a number in [0, 1) for every token."""
        xp, num_tokens = layer.xp, layer.num_tokens
        draws = _draws(self.seed, layer.layer, layer.keys.shape[1], num_tokens)
        table = xp.asarray(draws, dtype=layer.keys.dtype, device=primitives.device_of(layer.keys))
        table = xp.broadcast_to(table, layer.valid.shape)
        rank = token_rank(layer.valid, xp=xp)
        return xp.take_along_axis(table, xp.where(rank < 0, xp.zeros_like(rank), rank), axis=-1)
