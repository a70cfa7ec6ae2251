"""KNorm: keys of small norm attract the most attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.types import Array, Namespace
from .protection import SinkPolicy

__all__ = ["KNorm", "negative_norms"]


def negative_norms(keys: Array, /, *, xp: Namespace) -> Array:
    """Return minus the Euclidean norm of every key: (..., N, D) to (..., N)."""
    return -xp.sqrt(xp.sum(keys * keys, axis=-1))


@dataclass(frozen=True, kw_only=True)
class KNorm(SinkPolicy):
    r"""Keep the tokens whose keys are shortest.

    The importance of token :math:`j` is :math:`-\lVert k_j \rVert_2`. Neither queries nor attention are needed.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens that are kept as well. The paper keeps none on purpose.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance has shape (batch, kv_heads, N) and is never positive; `propagate` lowers negative scores as well. The
    rotary embedding does not change norms. Models that normalize their keys (Qwen3, Gemma 3) have norms that say
    little, and the ranking is then mostly noise.

    The official code rounds a share of the tokens up, leaves prompts below 2048 tokens and, in its experiments, the
    first two layers untouched, and orders the cache by norm; here shares are rounded half up, every layer is treated
    alike and the kept tokens stay in order. See `official`.

    References
    ----------
    .. [1] Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430.

    Examples
    --------
    Norms 5, 1, 2 and 3:

    >>> import numpy as np
    >>> from graphkv import KNorm, evict
    >>> keys = np.asarray([[[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]]])
    >>> evict(KNorm(budget=2), keys).kept
    array([[[1, 2]]])
    """

    @classmethod
    def official(cls, budget: int, /) -> KNorm:
        """Return the official code's rule at a number of tokens: that of the default.

        A share is refused, because the official code rounds it up; untouched layers and short prompts are not
        expressed either. Use `LayerBudgets` to leave some layers whole.

        Parameters
        ----------
        budget : int
            Tokens to keep per KV head.

        Returns
        -------
        KNorm

        Raises
        ------
        ArgumentTypeError
            If `budget` is not an integer.
        """
        return cls(budget=checks.count("budget", budget), num_sinks=0)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return minus the norm."""
        return negative_norms(layer.keys, xp=layer.xp)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Square and add every entry of the keys. In memory: the squares."""
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        return Cost(2 * entries, 4 * entries)
