"""KeyDiff: keys that differ from the rest stay."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.fusion import degree
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.types import Array
from .protection import SinkPolicy

__all__ = ["KeyDiff"]


@dataclass(frozen=True, kw_only=True)
class KeyDiff(SinkPolicy):
    r"""Keep the tokens whose keys are least like the others.

    With :math:`\hat k = k / \lVert k \rVert` and the anchor :math:`a = \frac{1}{N} \sum_i \hat k_i`, the importance of
    token :math:`j` is :math:`-\hat k_j \cdot a`, which is minus the mean cosine of its key with all keys. So the order
    is that of all pairs, at a cost linear in N. This is minus the `degree`.

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
    Importance has shape (batch, kv_heads, N) and is in [-1, 1]; `propagate` makes both signs safe. The paper divides
    by the anchor's length as well, which changes no order. It works block by block on long prompts, which is one call
    of `evict` per block here. There is no official code, so there is no `official` preset. The paper's cheaper variant,
    the mean of keys that are not normalized, is not offered.

    References
    ----------
    .. [1] Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
       Resource-Constrained Environments", arXiv:2504.15364.

    Examples
    --------
    Three keys point right, one up. The mean direction is (3/4, 1/4), so the scores are -3/4 and -1/4:

    >>> import numpy as np
    >>> from graphkv import KeyDiff, evict
    >>> keys = np.asarray([[[[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [2.0, 0.0]]]])
    >>> done = evict(KeyDiff(budget=2), keys)
    >>> done.importance, done.kept
    (array([[[-0.75, -0.75, -0.25, -0.75]]]), array([[[0, 2]]]))
    """

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Compare with the mean direction."""
        return -degree(layer.keys, valid=layer.valid, backend=layer.backend)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Normalize (3), add up (1) and multiply with the anchor (2) every entry of the keys.

        In memory: the directions.
        """
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        return Cost(6 * entries, 4 * entries)
