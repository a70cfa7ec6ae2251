"""MiKV: what would be dropped is kept in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import budgets, checks, primitives
from ..core.errors import ArgumentError
from ..core.layer import Layer
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.precision import Precision
from ..core.protection import Protection
from ..core.selection import Choice
from ..core.types import Array

__all__ = ["MiKV"]

# Bytes of a number in the balance of keys with queries, which a layer stores once.
BALANCE_BYTES = 4


@dataclass(frozen=True)
class MiKV(Wrapper):
    r"""Any policy, with tokens that it would drop kept in fewer bits.

    The base decides who is important. Those tokens stay as they are, others are demoted: rounded to `low_bits` bits per
    number, in groups with a scale and an offset each, keys after balancing their channels with those of the queries.

    Parameters
    ----------
    base : Policy
        Where importance, protection and the layer's budget come from.
    high : int or float, optional
        None: the whole budget stays as it is and every other token is demoted, as in the paper; the cache grows with
        the text. Otherwise the tokens of the budget that stay as they are, as a number or a share of it; the *bytes*
        of the others hold the next best tokens in `low_bits`, and what comes after those is dropped. So a layer never
        takes more bytes than the base's would. 1.0 is the base itself.
    low_bits : int
        2, 3, 4 or 8.
    group : int
        Numbers along the head size that share a scale and an offset.
    balanced : bool
        Balance the channels of the keys, see `graphkv.core.precision.key_balance`.
    full_bits : int
        16 or 32: bits of a number that is not demoted, for the exchange of bytes.

    Raises
    ------
    ArgumentError
        If an option is out of range, or the base demotes tokens already.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    `Eviction.kept` holds all tokens that stay, more than the budget; `Eviction.levels` is 1 for the demoted ones, and
    `Choice.precisions` says how they are stored. In a cache a token that was demoted stays so: what is gone does not
    come back.

    The base's protection, its graph and its head budgets work on the tokens that stay as they are. Where heads keep
    different numbers, all of them demote equally many. Protected tokens that do not fit are demoted before all others.

    The paper's important tokens are those of H2O, ``MiKV(H2O(budget=0.25))``. There is no public code, and what we know
    of the paper comes from notes: group size, ratios and the query heads of a group are ours. It may store important
    tokens in 8 or 4 bits as well, which is not expressed. For the exchange of bytes values count as wide as keys; the
    balance, once per head in 32 bits, is paid for.

    References
    ----------
    .. [1] Yang et al., "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
       Quantization", arXiv:2402.18096.

    Examples
    --------
    Of six tokens two stay as they are, and four in 4 bits:

    >>> import numpy as np
    >>> from graphkv import KNorm, MiKV, evict
    >>> keys = np.asarray([[[[1.0], [4.0], [3.0], [2.0], [6.0], [5.0]]]])
    >>> done = evict(MiKV(KNorm(budget=2)), keys)
    >>> done.kept, done.levels
    (array([[[0, 1, 2, 3, 4, 5]]]), array([[[0, 1, 1, 0, 1, 1]]], dtype=uint8))

    A budget of 100 tokens at a head size of 64, half of it as it is: the bytes of the others, 50 x 256 less 256 for the
    balance, hold 174 tokens of 72 bytes.

    >>> MiKV(KNorm(budget=100), high=0.5).tiers(100, 64)
    (50, 174)
    """

    requirements: ClassVar[Requirements] = Requirements(demotes=True)

    high: int | float | None = None
    low_bits: int = 4
    group: int = 64
    balanced: bool = True
    full_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high is not None:
            object.__setattr__(self, "high", checks.ratio_or_count("high", self.high))
        if checks.count("full_bits", self.full_bits) not in (16, 32):
            raise ArgumentError(f"full_bits must be 16 or 32; got {self.full_bits}")
        checks.count("low_bits", self.low_bits)
        self.precision  # noqa: B018 - its constructor checks the other options

    @property
    def precision(self) -> Precision:
        """How demoted tokens are stored."""
        return Precision(bits=self.low_bits, group=self.group, balanced=self.balanced)

    def tiers(self, budget: int, head_size: int, /) -> tuple[int, int | None]:
        """Return how many tokens per row stay as they are, and how many are demoted at most.

        Parameters
        ----------
        budget : int
            Tokens of the base.
        head_size : int
            D.

        Returns
        -------
        tuple of int and int or None
            None: all others.
        """
        if self.high is None:
            return budget, None
        high = self._high(budget)
        # Keys and values.
        spare = 2 * (budget - high) * head_size * self.full_bits // 8 - self.balanced * head_size * BALANCE_BYTES
        row = 2 * self.precision.row_bytes(head_size, full_bits=self.full_bits)
        return high, max(0, spare) // max(1, row)

    def _high(self, budget: int, /) -> int:
        """Return how many tokens of a budget stay as they are."""
        return budget if self.high is None else min(budget, budgets.tokens_of(self.high, budget))

    def protection(self, budget: int, /) -> Protection:
        """Return what the base protects among the tokens that stay as they are."""
        return self.base.protection(self._high(budget))

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries the base uses; one at least where a cache has to see some, for the balance."""
        return max(self.base.num_queries(num_tokens), min(num_tokens, int(self.balanced)))

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Return the base's scores for the tokens that stay as they are."""
        return self.base.rescore(found, layer, self._high(budget))

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Return the base's choice, and after it the next best tokens, demoted."""
        xp, num_tokens = layer.xp, layer.num_tokens
        high, low = self.tiers(budget, layer.keys.shape[-1])
        choice = self.base.choose(found, layer, high)
        if low == 0:
            return choice
        is_high = _marked(choice.kept, layer)
        width = num_tokens if low is None else min(num_tokens, choice.kept.shape[-1] + low)
        # The best first: 0 as it is, 1 protected, 2 others, 3 padding.
        tiers = 3 - xp.astype(layer.valid, xp.int32)
        if found.protected is not None:
            tiers = xp.where(found.protected & layer.valid, xp.ones_like(tiers), tiers)
        tiers = xp.where(is_high, xp.zeros_like(tiers), tiers)
        kept, counts = primitives.top_k(found.scores, width, tiers, backend=layer.backend), None
        if choice.counts is not None and low is not None:
            counts = xp.minimum(choice.counts + low, xp.full_like(choice.counts, num_tokens))
            place = xp.arange(width, dtype=kept.dtype, device=primitives.device_of(kept))
            # Unused places sort behind every token.
            kept = xp.where(place < xp.astype(counts, kept.dtype)[..., None], kept, xp.full_like(kept, num_tokens))
        kept = xp.sort(kept, axis=-1)
        is_used = kept < num_tokens
        demoted = ~xp.take_along_axis(is_high, xp.where(is_used, kept, xp.zeros_like(kept)), axis=-1) & is_used
        return Choice(
            kept=xp.where(is_used, kept, xp.full_like(kept, -1)),
            counts=counts,
            levels=xp.astype(demoted, xp.uint8),
            precisions=(self.precision,),
        )


def _marked(kept: Array, layer: Layer, /) -> Array:
    """Mark the kept tokens (batch, kv_heads, b), of which -1 are none, in a mask (batch, kv_heads, N)."""
    xp, num_tokens = layer.xp, layer.num_tokens
    ones = xp.ones(kept.shape, dtype=xp.float32, device=primitives.device_of(kept))
    where = xp.where(kept < 0, xp.full_like(kept, num_tokens), kept)
    return primitives.segment_sum(ones, where, num_tokens + 1, backend=layer.backend)[..., :num_tokens] > 0
