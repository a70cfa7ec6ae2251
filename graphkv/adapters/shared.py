"""One kept set for all KV heads of a layer, or of all layers, in whole blocks where an engine stores tokens so."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

from ..core import checks, primitives
from ..core.errors import ArgumentError
from ..core.layer import Layer
from ..core.merging import slots
from ..core.needs import name_of
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.protection import Protection, token_rank
from ..core.selection import Choice, select_in_tiers
from ..core.types import Array, Namespace
from .blocks import block_means

__all__ = ["Shared", "mean_of_heads", "shares"]


def shares(scores: Array, takes_part: Array, /, *, xp: Namespace) -> Array:
    """Scale the scores of each row to sum 1 over some of its tokens.

    Parameters
    ----------
    scores : array, shape (..., N), float32 or wider
        If any is negative, the lowest of the row becomes 0 first.
    takes_part : array, shape (..., N), bool
        Others count as 0.

    Returns
    -------
    array, shape (..., N)
        An infinity or NaN among those that take part is handed on and has no part in the sum.

    Examples
    --------
    >>> import numpy as np
    >>> shares(np.asarray([[1.0, 3.0, 7.0], [-2.0, 0.0, 9.0]]), np.asarray([True, True, False]), xp=np)
    array([[0.25, 0.75, 0.  ],
           [0.  , 1.  , 0.  ]])
    """
    nothing = xp.zeros_like(scores)
    is_number = takes_part & xp.isfinite(scores)
    # Of an eighth, the shift cannot overflow; divided by the largest, neither can the sum.
    eighth = xp.where(is_number, scores, nothing) / 8
    lowest = xp.min(eighth, axis=-1, keepdims=True)
    shifted = xp.where(is_number, eighth - xp.minimum(lowest, xp.zeros_like(lowest)), nothing)
    for of_row in (xp.max, xp.sum):
        divisor = of_row(shifted, axis=-1, keepdims=True)
        shifted = shifted / xp.where(divisor > 0, divisor, xp.ones_like(divisor))
    return xp.where(takes_part & ~is_number, scores, shifted)


def mean_of_heads(scores: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Average over the KV heads; where all heads agree, the number is theirs to the last bit.

    Parameters
    ----------
    scores : array, shape (batch, kv_heads, N), float32 or wider
    valid : array, shape (batch, kv_heads, N), bool
        Padding counts as 0.

    Returns
    -------
    array, shape (batch, 1, N)
    """
    scores = xp.where(valid, scores, xp.zeros_like(scores))
    first = scores[:, :1, :]
    return xp.where(xp.all(scores == first, axis=1, keepdims=True), first, xp.mean(scores, axis=1, keepdims=True))


@dataclass(frozen=True)
class Shared(Wrapper):
    r"""Any policy, with one kept set for all KV heads of a layer, or for all layers too.

    Engines that keep one table of tokens or pages need that. The score of a token is the mean over the KV heads of the
    share that it has in its head:

    .. math:: s_j = \frac{1}{H} \sum_h \frac{s_{hj}}{\sum_i s_{hi}}

    and, over layers, the mean of that over the layers; `evict_layers` decides for all of them. Tokens that are
    protected in any head come first. With blocks, the tokens of a row are taken in blocks of `block` consecutive ones,
    the first of which begins at the first token that is not padding. The last, shorter block always stays; of the
    others, those that hold a protected token come first, then those of the highest mean score. A block stays whole or
    goes whole, so that the rest of the budget below a block is left empty.

    Parameters
    ----------
    base : Policy
        Where scores, protection and the layer's budget come from.
    over : str
        ``"heads"`` of one layer, or ``"layers"``: all heads of all layers that are evicted together.
    block : int
        Tokens per block. 1 keeps the budget exactly.
    nested : bool
        Every layer chooses from what the layer below it keeps, as in PyramidInfer. Budgets must not grow from layer to
        layer, and all layers must hold the same tokens: it evicts once.

    Raises
    ------
    ArgumentError
        If an option is out of range, the base gives KV heads numbers of tokens of their own or shares budgets out by
        what is in the layers, or `nested` comes with layers that share, with blocks, or with a base whose layers share
        or find their budgets. When evicting, if a budget is not 0 and below one block, layers that share have different
        budgets, or the budget of a nested layer is above that of the layer below.
    ArgumentTypeError
        If `base` is not a Policy or `block` not an integer.

    Notes
    -----
    Sums run over the tokens that are neither protected nor padding. If a row has a negative score, its lowest counts as
    0. A token that one head scores NaN comes last. `Eviction.scores` and `Eviction.importance` are those of the layer,
    the same in all heads. What is put on top may part the heads again; the choice is then by the mean.

    With blocks `Eviction.counts` says how many tokens stay: a multiple of `block` and the last, shorter block, at most
    the budget. `Eviction.kept` is as wide as the budget. Padding is not kept. A window that is to see each eviction
    while decoding needs a budget with room for its whole blocks, `block` - 1 more at both ends.

    PyramidInfer (arXiv:2405.12532) is ``LayerShares.pyramid_infer(Shared(base, nested=True), num_layers)``. There, a
    layer also reads no more than what the layer below keeps; here each has read the whole text.

    Heads and layers should hold the same tokens at the same places, as they do in a cache that is always evicted so.

    Examples
    --------
    The first head likes token 0, the second token 3; token 1 is second best in both. The second head's scores are
    ten times larger, which does not count:

    >>> import numpy as np
    >>> from graphkv import Given, Shared, evict
    >>> scores = np.asarray([[[0.5, 0.4, 0.1, 0.0], [0.0, 4.0, 1.0, 5.0]]])
    >>> keys = np.ones((1, 2, 4, 2))
    >>> evict(Given(budget=1, importance=scores), keys).kept.tolist()
    [[[0], [3]]]
    >>> done = evict(Shared(Given(budget=1, importance=scores)), keys)
    >>> done.scores[0, 0], done.kept.tolist()
    (array([0.25, 0.4 , 0.1 , 0.25]), [[[1], [1]]])

    In blocks of two, tokens 0 and 1 have .65 together, tokens 2 and 3 have .35. A budget of three has room for one:

    >>> done = evict(Shared(Given(budget=3, importance=scores), block=2), keys)
    >>> done.kept.tolist(), done.counts.tolist()
    ([[[0, 1, -1], [0, 1, -1]]], [[2, 2]])

    Layers that are nested. The second would keep token 3, which the first has dropped:

    >>> from graphkv import SnapKV, evict_layers
    >>> rows = [np.asarray([[[[0.5, 0.4, 0.1, 0.0, 0.0]]]]), np.asarray([[[[0.1, 0.2, 0.0, 0.7, 0.0]]]])]
    >>> layers = [{"keys": np.ones((1, 1, 5, 2)), "attention": each} for each in rows]
    >>> policy = Shared(SnapKV(budget=3, window=1, kernel_size=1), nested=True)
    >>> first, second = evict_layers(policy, [layers[0], {**layers[1], "budget": 2}])
    >>> first.kept.tolist(), second.kept.tolist()
    ([[[0, 1, 4]]], [[[1, 4]]])
    """

    requirements: ClassVar[Requirements] = Requirements(couples_heads=True)

    over: str = "heads"
    block: int = 1
    nested: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("over", self.over, ("heads", "layers"))
        checks.count("block", self.block, minimum=1)
        if checks.flag("nested", self.nested):
            self._check_nested()
        if self.base.needs().head_counts:
            raise ArgumentError(
                f"base must keep equally many tokens in every KV head; {name_of(self.base)} gives heads numbers of "
                "their own"
            )
        if self.block > 1 and self.base.chooses() and not self.base.needs().automatic:
            raise ArgumentError(
                f"base must choose by its scores alone where blocks are kept; {name_of(self.base)} has a choice of its "
                "own"
            )
        if self.over == "layers" and self.base.needs().wants:
            raise ArgumentError(
                f"base must give all layers one budget where they share what they keep; {name_of(self.base)} shares "
                "budgets out by what is in the layers"
            )
        if self.over == "layers" and self.base.needs().automatic:
            raise ArgumentError(
                f"base must have one budget for all layers where they share what they keep; {name_of(self.base)} finds "
                "that of each layer"
            )

    def _check_nested(self) -> None:
        """Refuse what layers that choose from each other's tokens cannot be."""
        if self.over == "layers":
            raise ArgumentError("nested must be False where all layers keep one set, with over='layers'; got True")
        if self.block > 1:
            raise ArgumentError(f"nested must be False where blocks are kept; got True with block={self.block}")
        needs = self.base.needs()
        if needs.couples_layers or needs.automatic:
            raise ArgumentError(
                "base must choose for each layer alone and by its budget where layers are nested; "
                f"{name_of(self.base)} does not"
            )

    def needs(self) -> Requirements:
        """Return the needs of the base, and all layers where they share or are nested."""
        needs = super().needs()
        couples = needs.couples_layers or self.nested or self.over == "layers"
        return replace(needs, couples_layers=couples, nested=self.nested)

    def protection(self, budget: int, /) -> Protection:
        """Return the base's protection, in whole blocks."""
        return replace(self.base.protection(budget), block=self.block)

    def voters(self, layer: int, num_layers: int, /) -> tuple[int, ...]:
        """Return all layers where they share, those up to this one where they are nested, else the base's."""
        if self.nested:
            return tuple(range(layer + 1))
        if self.over == "heads":
            return self.base.voters(layer, num_layers)
        voters = {voter for each in range(num_layers) for voter in self.base.voters(each, num_layers)}
        return tuple(sorted(voters))

    def join(self, found: Sequence[Assessment], /) -> Assessment:
        """Average over the layers; what is protected in any of them comes first."""
        if self.nested:
            return found[-1]
        if self.over == "heads":
            return self.base.join(found)
        marked = [each.protected for each in found if each.protected is not None]
        return replace(
            found[0],
            importance=_mean([each.importance for each in found]),
            scores=_mean([each.scores for each in found]),
            protected=reduce(operator.or_, marked) if marked else None,
        )

    def within(self, found: Assessment, below: Choice, layer: Layer, budget: int, /) -> Assessment:
        """Bar what the layer below drops, where layers are nested."""
        if not self.nested:
            return self.base.within(found, below, layer, budget)
        least = int(below.kept.shape[-1])
        if budget > least:
            raise ArgumentError(
                f"budget must not grow from layer to layer where they are nested; got {budget} above {least}"
            )
        return replace(found, barred=slots(below.kept, layer.num_tokens, backend=layer.backend) < 0)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Average what the base found over the heads."""
        found, xp = self.base.rescore(found, layer, budget), layer.xp
        protected = None if found.protected is None else _in_any(found.protected & layer.valid, xp=xp)
        held = xp.zeros_like(layer.valid) if protected is None else layer.valid & protected

        def of_layer(scores: Array) -> Array:
            # What is protected in one head only would weigh with its score there; SnapKV's window has places.
            parts = xp.where(held, shares(scores, held, xp=xp), shares(scores, layer.valid & ~held, xp=xp))
            return _for_all(mean_of_heads(parts, layer.valid, xp=xp), scores, xp=xp)

        scores = of_layer(found.scores)
        importance = scores if found.importance is found.scores else of_layer(found.importance)
        return replace(found, importance=importance, scores=scores, protected=protected)

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Fill the budget of all heads alike."""
        if 0 < budget < self.block:
            raise ArgumentError(f"budget must be 0 or at least one block of {self.block} tokens; got {budget}")
        xp = layer.xp
        valid = _in_any(layer.valid, xp=xp)
        scores = _for_all(mean_of_heads(found.scores, layer.valid, xp=xp), found.scores, xp=xp)
        protected = None if found.protected is None else _in_any(found.protected & layer.valid, xp=xp)
        barred = found.barred
        if self.nested and barred is not None:
            # As if they were padding: whatever their scores and protection are.
            valid, barred = valid & ~barred, None
        if barred is not None and protected is not None:
            barred = barred & ~protected
        choice = self.base.choose(
            replace(found, scores=scores, protected=protected, barred=barred), layer.having(valid=valid), budget
        )
        if self.block == 1:
            return choice
        return self._whole_blocks(scores, protected, valid, choice.counts, layer, budget)

    def _whole_blocks(
        self, scores: Array, protected: Array | None, valid: Array, counts: Array | None, layer: Layer, budget: int, /
    ) -> Choice:
        """Rank blocks, and keep as many as the counts or the budget have room for."""
        xp, size = layer.xp, self.block
        rank = token_rank(valid, xp=xp)
        total = rank[..., -1:] + 1
        rest = total % size
        room = (budget - rest) // size
        room = xp.maximum(room, xp.zeros_like(room))
        wanted = room
        if counts is not None:
            # Rounded up: the tokens that a budget was found for may share their blocks with lesser ones.
            lacking = xp.astype(counts, rank.dtype)[..., None] - rest
            wanted = (xp.maximum(lacking, xp.zeros_like(lacking)) + size - 1) // size
        tiers = xp.full(valid.shape, 2, dtype=xp.int32, device=primitives.device_of(scores))
        if protected is not None:
            held = block_means(xp.astype(protected & valid, scores.dtype), valid, size, xp=xp) > 0
            tiers = xp.where(held, xp.ones_like(tiers), tiers)
            number = xp.sum(xp.astype(held & valid & (rank < total - rest), rank.dtype), axis=-1, keepdims=True) // size
            wanted = xp.maximum(wanted, number)
        wanted = xp.minimum(xp.minimum(wanted, room), total // size)
        tiers = xp.where(rank >= total - rest, xp.zeros_like(tiers), tiers)
        tiers = xp.where(valid, tiers, xp.full_like(tiers, 3))
        means = block_means(scores, valid, size, xp=xp)
        number = wanted * size + rest
        number = xp.minimum(number, xp.full_like(number, budget))[..., 0]
        kept = select_in_tiers(means, number, min(budget, layer.num_tokens), tiers, backend=layer.backend)
        return Choice(kept=kept, counts=number)


def _mean(scores: Sequence[Array], /) -> Array:
    """Average over layers."""
    return reduce(operator.add, scores) / len(scores)


def _in_any(mask: Array, /, *, xp: Namespace) -> Array:
    """Mark in all heads what is marked in one, shape (batch, kv_heads, N)."""
    return _for_all(xp.any(mask, axis=1, keepdims=True), mask, xp=xp)


def _for_all(one: Array, like: Array, /, *, xp: Namespace) -> Array:
    """Copy (batch, 1, N) for all heads."""
    return xp.asarray(xp.broadcast_to(one, tuple(like.shape)), copy=True)
