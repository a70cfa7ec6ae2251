"""TOVA: the newest query decides for all heads of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection
from ..core.types import Array, Namespace
from . import attention
from .protection import SinkPolicy

__all__ = ["TOVA", "layer_votes"]


def layer_votes(rows: Array, /, *, xp: Namespace) -> Array:
    """Average the attention of one query over all query heads, the same for every KV head.

    Parameters
    ----------
    rows : array, shape (batch, kv_heads, groups, Q, N)
        Probabilities; Q is 1.

    Returns
    -------
    array, shape (batch, kv_heads, N)
    """
    batch, kv_heads, _, _, num_tokens = rows.shape
    mean = xp.mean(rows, axis=(1, 2, 3))
    shared = xp.broadcast_to(mean[:, None, :], (batch, kv_heads, num_tokens))
    return xp.asarray(shared, copy=True)


@dataclass(frozen=True, kw_only=True)
class TOVA(SinkPolicy):
    r"""Keep what the newest query attends to, averaged over all heads of the layer.

    The importance of token :math:`j` is :math:`\frac{1}{H} \sum_h A_{hj}`, the attention that the last query gives it,
    over all :math:`H` query heads: one set of tokens per layer, shared by its KV heads.

    Parameters
    ----------
    budget : int or float
        Tokens to keep; a float is a share of the tokens.
    num_sinks : int
        First tokens that are kept as well.
    protect_newest : bool
        Keep the newest token before all others. The official code gives it no protection.

    Raises
    ------
    ArgumentError
        If an option is out of range, or, when evicting, if the last query is not given.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance has shape (batch, kv_heads, N), is at least 0 and the same for every KV head. Under `GraphKV` the heads
    may differ, because their keys do. A row whose newest position is padding gives no attention: then all scores are
    equal, and the first tokens stay.

    The official code runs after the prompt and at every step; its rule is one call of `evict` each time. It works on
    scores in the model's precision.

    References
    ----------
    .. [1] Oren et al., "Transformers are Multi-State RNNs", arXiv:2401.06104.

    Examples
    --------
    One query, two query heads on one KV head. The first head looks at token 1, the second at token 2, harder:

    >>> import numpy as np
    >>> from graphkv import TOVA, evict
    >>> rows = np.asarray([[[[0.1, 0.6, 0.1, 0.2]], [[0.0, 0.0, 0.9, 0.1]]]])
    >>> keys = np.ones((1, 1, 4, 2))
    >>> evict(TOVA(budget=2), keys, attention=rows).kept
    array([[[2, 3]]])
    >>> evict(TOVA(budget=2, protect_newest=False), keys, attention=rows).kept
    array([[[1, 2]]])
    """

    requirements: ClassVar[Requirements] = Requirements(queries="window", couples_heads=True)

    protect_newest: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("protect_newest", self.protect_newest)

    @classmethod
    def official(cls, budget: int | float, /) -> TOVA:
        """Return the official code's choice: the newest token competes like any other.

        Scores in half precision are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep.

        Returns
        -------
        TOVA
        """
        return cls(budget=budget, protect_newest=False)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return 1: the newest query."""
        return min(1, num_tokens)

    def protection(self, budget: int, /) -> Protection:
        """Protect the newest position and the sinks."""
        return Protection(first=self.num_sinks, window=int(self.protect_newest))

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Average the newest query's attention."""
        return layer_votes(attention.last_rows(layer, self.num_queries(layer.num_tokens)), xp=layer.xp)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of one query's attention."""
        return attention.window_cost(shape, 1)
