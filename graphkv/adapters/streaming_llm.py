"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import checks
from ..core.policy import LayerInputs, Policy
from ..core.types import Array
from . import attention

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("num_sinks", self.num_sinks)

    def num_protected(self, budget: int, /) -> int:
        """Count the sinks."""
        return self.num_sinks

    def score(self, inputs: LayerInputs, /) -> Array:
        """Rank by position; sinks are all equal, so that the first of them win."""
        xp = inputs.xp
        rank = attention.token_rank(inputs.valid, xp=xp)
        rank = xp.where(rank < self.num_sinks, xp.zeros_like(rank), rank)
        return xp.astype(rank, inputs.keys.dtype)

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect the sinks."""
        return attention.first_tokens(inputs.valid, self.num_sinks, xp=inputs.xp)
