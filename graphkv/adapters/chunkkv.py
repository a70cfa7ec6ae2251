"""ChunkKV: chunks of consecutive tokens stay or go together, and successive layers may share a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import checks, primitives
from ..core.backend import Backend
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape
from ..core.needs import name_of
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.types import Array
from .blocks import block_means, block_of

__all__ = ["ChunkKV", "chunk_ranks"]


def chunk_ranks(scores: Array, held: Array, valid: Array, size: int, /, *, backend: Backend) -> Array:
    """Rank tokens by the mean score of their chunk, and within a chunk by their own.

    Parameters
    ----------
    scores : array, shape (..., N), float32 or wider
    held : array, shape (..., N), bool
        Come first, and are no part of a mean.
    valid : array, shape (..., N), bool
        Padding comes last.
    size : int
        Tokens per chunk; the first chunk begins at the first token of a row that is not padding.

    Returns
    -------
    array, shape (..., N), dtype of `scores`
        How many tokens of the row come after each. Equal chunks keep their order, equal tokens of a chunk too.
    """
    xp, num_tokens = backend.xp, scores.shape[-1]
    # Whatever a base gives padding, its order is that of its places.
    scores = xp.where(valid, scores, xp.zeros_like(scores))
    means = xp.where(valid, block_means(scores, valid, size, valid & ~held, xp=xp), xp.zeros_like(scores))
    tiers = xp.where(held, xp.zeros_like(scores), xp.where(valid, xp.ones_like(scores), xp.full_like(scores, 2)))
    tiers = xp.astype(tiers, xp.int32)
    # From the last key to the first, each sort leaving equals as they are: own score, chunk, mean of the chunk.
    order = primitives.top_k(scores, num_tokens, xp.zeros_like(tiers), backend=backend)
    chunk = xp.take_along_axis(block_of(valid, size, xp=xp), order, axis=-1)
    order = xp.take_along_axis(order, xp.argsort(chunk, axis=-1, stable=True), axis=-1)
    # Held tokens stand for themselves.
    ranked_by = xp.take_along_axis(xp.where(held, scores, means), order, axis=-1)
    first = primitives.top_k(ranked_by, num_tokens, xp.take_along_axis(tiers, order, axis=-1), backend=backend)
    place = xp.argsort(xp.take_along_axis(order, first, axis=-1), axis=-1)
    return xp.astype(num_tokens - 1 - place, scores.dtype)


@dataclass(frozen=True)
class ChunkKV(Wrapper):
    """Any policy, with chunks of consecutive tokens that are ranked by their mean score.

    The best chunks stay whole, as many as the budget has room for, and what is left of it goes to the best tokens of
    the next chunk: the budget is kept exactly. Each row of a batch and each KV head has its own chunks;
    ``ChunkKV(Shared(base))`` chooses one set for all heads.

    Parameters
    ----------
    base : Policy
        Where scores, protection and budgets come from.
    chunk : int
        Tokens per chunk. The first chunk of a row begins at its first token that is not padding, the last one may be
        shorter.
    reuse : int
        So many successive layers keep what the first of them chooses: `evict_layers` decides for them, and only the
        first is scored. 1: each layer chooses.

    Raises
    ------
    ArgumentError
        If `chunk` or `reuse` is below 1, or the base shares budgets out by what is in the layers and layers reuse a
        choice. When evicting, if layers that share one have different budgets.
    ArgumentTypeError
        If `base` is not a Policy, or an option not an integer.

    Notes
    -----
    Protected tokens stay by themselves and are no part of their chunk's mean. `Eviction.scores` and
    `Eviction.importance` are ranks: how many tokens of the row come after each.

    The paper sums over the tokens of a chunk, which ranks whole chunks as their mean does and a short last chunk lower.
    Its base is the attention of the last queries without pooling, ``SnapKV(budget, kernel_size=1)``. The usual public
    form, in kvpress, takes chunks of 20 and one choice for all heads, and gives every row of a batch the chunks of the
    first; here rows choose for themselves. The official code was not found.

    References
    ----------
    .. [1] Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
       arXiv:2502.00299, algorithms 1 and 2.

    Examples
    --------
    Chunks of two tokens have the means 4, 5 and 3. The budget of three takes the second one, and token 0 of the first:

    >>> import numpy as np
    >>> from graphkv import ChunkKV, Given, evict
    >>> scores = np.asarray([[[7.0, 1.0, 4.0, 6.0, 3.0, 3.0]]])
    >>> done = evict(ChunkKV(Given(budget=3, importance=scores), chunk=2), np.ones((1, 1, 6, 2)))
    >>> done.kept
    array([[[0, 2, 3]]])
    >>> done.scores
    array([[[3., 2., 4., 5., 1., 0.]]])
    """

    requirements: ClassVar[Requirements] = Requirements()

    chunk: int = 10
    reuse: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("chunk", self.chunk, minimum=1)
        if checks.count("reuse", self.reuse, minimum=1) > 1 and self.base.needs().wants:
            raise ArgumentError(
                f"reuse must be 1 with {name_of(self.base)}, which shares budgets out by what is in the layers; "
                f"got {self.reuse}"
            )

    def needs(self) -> Requirements:
        """Return the needs of the base, and the layers that share a choice."""
        needs = super().needs()
        return replace(needs, couples_layers=needs.couples_layers or self.reuse > 1)

    def voters(self, layer: int, num_layers: int, /) -> tuple[int, ...]:
        """Return the base's voters of the first layer of the group."""
        return self.base.voters(layer - layer % self.reuse, num_layers)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Rank by chunks."""
        found, xp = self.base.rescore(found, layer, budget), layer.xp
        held = xp.zeros_like(layer.valid) if found.protected is None else layer.valid & found.protected

        def ranks(scores: Array) -> Array:
            return chunk_ranks(scores, held, layer.valid, self.chunk, backend=layer.backend)

        scores = ranks(found.scores)
        importance = scores if found.importance is found.scores else ranks(found.importance)
        return replace(found, importance=importance, scores=scores)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Rank all tokens of the layer by 64-bit indices."""
        return self.base.cost(shape).then(Cost(bytes=8 * shape.batch * shape.kv_heads * shape.num_tokens))
