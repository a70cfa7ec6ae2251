"""EpiCache: keep what a prompt looks at that stands for the questions to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.attention import highest_attention
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.types import Array
from .protection import SinkPolicy

__all__ = ["EpiCache"]


@dataclass(frozen=True, kw_only=True)
class EpiCache(SinkPolicy):
    r"""Keep the tokens that any query of a patched prompt attends to strongly.

    The prompt is read after the text and forgotten, as a `Probe`: an instruction and some text that resembles what will
    be asked, such as the middle of an episode. The importance of token :math:`j` is the most attention that it gets
    from any query :math:`i` of the prompt, over the query heads :math:`g` of its KV head,

    .. math:: s_j = \max_{g, i} \operatorname{softmax}\left(\frac{q_{gi} K^\top}{\sqrt D}\right)_j

    where the softmax runs over all cached tokens and not over the prompt's own.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens, padding not counted, that are kept before all others. The public code protects none.
    block_size : int
        Queries whose attention is in memory at a time. It changes nothing but rounding.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if there are no probes.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is a probability, at least 0. What differs from `KVzip` is that the prompt gives no attention to itself,
    and that every token competes with every other. With several probes the highest score counts, and what a probe is
    about (`Probe.about`) does not matter.

    The public code's default lets the heads of a layer compete for one budget, ``AdaKV(EpiCache(...), floor=0.0)``, and
    its ``pair-uniform`` is this policy. It reads the prompt one position early, on that of the last token, and takes
    the maximum over the rows of a batch as well; here positions go on, and rows are apart. Reading in blocks and the
    caches of episodes are ``read_in_blocks`` and ``read_episodes`` of the transformers integration.

    References
    ----------
    .. [1] Kim et al., "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
       arXiv:2509.17396, patched prompt.

    Examples
    --------
    Keys are 0, log 2, log 3 and 0, so their weights under a query of 1 are 1, 2, 3 and 1:

    >>> import numpy as np
    >>> from graphkv import EpiCache, evict
    >>> keys = np.log(np.asarray([1.0, 2.0, 3.0, 1.0])).reshape(1, 1, 4, 1)
    >>> done = evict(EpiCache(budget=2), keys, probes=np.ones((1, 1, 1, 1)))
    >>> done.importance.round(3), done.kept
    (array([[[0.143, 0.286, 0.429, 0.143]]]), array([[[1, 2]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(probes=True)

    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("block_size", self.block_size, minimum=1)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the most attention that any probe gives the token."""
        xp = layer.xp
        result = xp.zeros_like(layer.keys[..., 0])
        for probe in layer.probes:
            found = highest_attention(
                probe,
                layer.keys,
                layer.valid,
                mass=layer.mass,
                sees_itself=False,
                block_size=self.block_size,
                xp=xp,
            )
            result = xp.maximum(result, found)
        return result

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more, with a prompt of one block of queries; longer ones cost in proportion."""
        rows = shape.batch * shape.query_heads * self.block_size * shape.num_tokens
        return Cost(rows * (2 * shape.head_size + 6), 4 * rows)
