"""KVzip: keep what the model looks at when it is asked to repeat the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.attention import highest_attention
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import first_tokens
from ..core.types import Array
from .protection import SinkPolicy

__all__ = ["KVzip"]


@dataclass(frozen=True, kw_only=True)
class KVzip(SinkPolicy):
    r"""Keep the tokens that any query attends to strongly while the model repeats the text, so for any later question.

    The text is asked to be repeated, piece by piece: each `Probe` is an instruction followed by a piece of the text,
    and is `about` that piece. The importance of token :math:`j` of piece :math:`t` is the most attention that it gets
    from any query :math:`i` of that probe, over the query heads :math:`g` of its KV head,

    .. math:: s_j = \max_{g, i} \operatorname{softmax}\left(\frac{q_{gi} [K_t; K_{\text{probe}}]^\top}{\sqrt D}\right)_j

    where the softmax runs over the keys of the piece, those of the sinks, and those of the probe up to :math:`i`.
    A token that several probes are about has the highest of its scores; one that none is about has 0.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens, padding not counted, that are kept before all others: the system prompt, for example. They take
        part in every softmax.
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
    Importance is a probability, at least 0. A probe that is about everything (`Probe.about` None) is the paper's form
    for a text of one piece; one without keys gives no attention to itself.

    Paper and public code agree on the score; the sinks in the softmax are the code's, which never evicts the system
    prompt (``num_sinks`` of 0 is the paper's text). The code computes in the model's precision and breaks ties at its
    threshold by dropping them; here probabilities are float32 and exactly the budget is kept. Its default shares one
    budget out over all heads of all layers by one threshold: over the heads of each layer that is
    ``AdaKV(KVzip(budget=...), floor=0.0)``, over layers it is not expressed; its ``uniform`` option is this policy.
    The head-level variant, and scores without softmax for speed, are not expressed.

    References
    ----------
    .. [1] Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv:2505.23416,
       section 3.

    Examples
    --------
    Keys are 0, log 2, log 3 and 0, so their weights under a query of 1 are 1, 2, 3 and 1. The probe's own key has
    weight 1: token 2 gets 3 / 8. Its second query, 0, gives each of six tokens 1 / 6:

    >>> import numpy as np
    >>> from graphkv import KVzip, Probe, evict
    >>> keys = np.log(np.asarray([1.0, 2.0, 3.0, 1.0])).reshape(1, 1, 4, 1)
    >>> probe = Probe(queries=np.asarray([1.0, 0.0]).reshape(1, 1, 2, 1), keys=np.zeros((1, 1, 2, 1)))
    >>> done = evict(KVzip(budget=2), keys, probes=probe)
    >>> done.importance.round(3), done.kept
    (array([[[0.167, 0.25 , 0.375, 0.167]]]), array([[[1, 2]]]))

    Two probes, each about one half of the text. In the first, the weights are 1, 2 and 1 for the probe itself:

    >>> halves = [np.asarray([[True, True, False, False]]), np.asarray([[False, False, True, True]])]
    >>> one = {"queries": np.ones((1, 1, 1, 1)), "keys": np.zeros((1, 1, 1, 1))}
    >>> evict(KVzip(budget=2), keys, probes=[Probe(**one, about=half) for half in halves]).importance
    array([[[0.25, 0.5 , 0.6 , 0.2 ]]])
    """

    requirements: ClassVar[Requirements] = Requirements(probes=True)

    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("block_size", self.block_size, minimum=1)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the most attention that any probe about the token gives it."""
        xp = layer.xp
        sinks = first_tokens(layer.valid, self.num_sinks, xp=xp)
        result = xp.zeros_like(layer.keys[..., 0])
        for probe in layer.probes:
            about = layer.valid if probe.about is None else layer.valid & probe.about
            found = highest_attention(
                probe,
                layer.keys,
                about | sinks,
                mass=layer.mass,
                sees_itself=True,
                block_size=self.block_size,
                xp=xp,
            )
            result = xp.maximum(result, xp.where(about, found, xp.zeros_like(found)))
        return result

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more, with probes as long as the text; reading them is the model's own cost, a second prefill."""
        heads, num_tokens = shape.batch * shape.query_heads, shape.num_tokens
        pairs = num_tokens * num_tokens + num_tokens * (num_tokens + 1) // 2
        block = min(self.block_size, num_tokens) * 2 * num_tokens
        return Cost(heads * pairs * (2 * shape.head_size + 6), 4 * heads * block)
