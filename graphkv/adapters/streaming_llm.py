"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.layer import Layer, Memory
from ..core.protection import token_rank
from ..core.types import Array
from .protection import SinkPolicy

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(SinkPolicy):
    """Keep the first few tokens (attention sinks) and fill the budget with the newest.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens to keep. A budget below that keeps the first of them.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is the token's position, and 0 for sinks. The official code also moves the kept keys to contiguous
    positions; here they keep their true ones.

    References
    ----------
    .. [1] Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> from graphkv import StreamingLLM, evict
    >>> evict(StreamingLLM(budget=3, num_sinks=2), np.ones((1, 1, 6, 4))).kept
    array([[[0, 1, 5]]])
    """

    num_sinks: int = 4

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Rank by position; sinks are all equal, so that the first of them win."""
        xp = layer.xp
        rank = token_rank(layer.valid, xp=xp)
        rank = xp.where(rank < self.num_sinks, xp.zeros_like(rank), rank)
        return xp.astype(rank, layer.keys.dtype)
