"""CAOTE: rank tokens by how much the attention output changes without them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.types import Array, Namespace

__all__ = ["CAOTE", "output_change"]

# 1 - alpha is at least that, so that a token with all of the attention has a finite score.
SMALLEST_REST = 1e-6


def output_change(alpha: Array, values: Array, output: Array, /, *, xp: Namespace) -> Array:
    r"""Compute how far an attention output moves when one token is removed and the others share its attention.

    .. math:: c_j = \frac{\alpha_j}{1 - \alpha_j} \lVert x - v_j \rVert_2

    Parameters
    ----------
    alpha : array, shape (..., N)
        Attention; each row sums to 1.
    values : array, shape (..., N, Dv)
    output : array, shape (..., 1, Dv)
        x, the sum of alpha times values.

    Returns
    -------
    array, shape (..., N)
        1 - alpha is taken as at least 1e-6.
    """
    away = values - output
    distance = xp.sqrt(xp.sum(away * away, axis=-1))
    rest = 1 - alpha
    return alpha / xp.maximum(rest, xp.full_like(rest, SMALLEST_REST)) * distance


@dataclass(frozen=True)
class CAOTE(Wrapper):
    r"""Any attention-based policy, its scores turned into the change of the attention output.

    With :math:`\alpha` the base's scores of the tokens that it may still choose, divided by their sum, and
    :math:`x = \sum_j \alpha_j v_j`, the score of token :math:`j` is the exact length of the change of :math:`x` when
    :math:`j` is removed and the others share its attention:

    .. math:: c_j = \frac{\alpha_j}{1 - \alpha_j} \lVert x - v_j \rVert_2 .

    Budget, protected tokens and everything else come from the base.

    Parameters
    ----------
    base : Policy
        Its importance should be attention-like, at least 0 (SnapKV, H2O, TOVA and the like). A negative or NaN score
        counts as no attention.
    fast : bool
        Take the mean of the values for x, as the paper's FastCAOTE.

    Raises
    ------
    ArgumentError
        When evicting without values.
    ArgumentTypeError
        If `base` is not a Policy or `fast` not a bool.

    Notes
    -----
    Exact for one token at a time; several at once go by the same scores, as in the paper. Padding and what the base
    protects are excluded from :math:`\alpha` and x, because a base may score protected tokens as it likes (SnapKV's
    window holds places, no attention); they keep the base's score, which only matters among themselves. 1 - alpha is
    taken as at least 1e-6.

    There is no public code, and the paper does not treat grouped query heads. A cache stores one value
    per KV head, and a base has one score per KV head, so alpha is the score after the base's group reduction:
    the change of the group's mean output. The other way, the mean over the group of each query head's own change, needs
    the heads apart, which no wrapper over an arbitrary policy has. With one query head per KV head both are the same.

    References
    ----------
    .. [1] "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction", arXiv:2504.14051, the
       closed form of the eviction error.

    Examples
    --------
    The base gives 0.5, 0.3 and 0.2 of the attention. Token 2 has the least, but its value differs most: without it the
    output moves from 2.6 to 1, without token 1 to 3.29.

    >>> import numpy as np
    >>> from graphkv import CAOTE, SnapKV, evict
    >>> row = np.asarray([[[[0.5, 0.3, 0.2, 0.0]]]])
    >>> values = np.asarray([[[[1.0], [1.0], [9.0], [5.0]]]])
    >>> base = SnapKV(budget=3, window=1, kernel_size=1)
    >>> evict(base, np.ones((1, 1, 4, 2)), attention=row).kept
    array([[[0, 1, 3]]])
    >>> done = evict(CAOTE(base), np.ones((1, 1, 4, 2)), values=values, attention=row)
    >>> done.scores[0, 0, :3].round(2), done.kept
    (array([1.6 , 0.69, 1.6 ]), array([[[0, 2, 3]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(values=True)

    fast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("fast", self.fast)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Weigh the base's scores with the values."""
        xp, found = layer.xp, self.base.rescore(found, layer, budget)
        candidates = layer.valid if found.protected is None else layer.valid & ~found.protected
        nothing = xp.zeros_like(found.scores)
        alpha = _shares(xp.where(candidates & (found.scores > 0), found.scores, nothing), xp=xp)
        weights = _shares(xp.astype(candidates, alpha.dtype), xp=xp) if self.fast else alpha
        # Padding must not bring a NaN into the sum.
        values = xp.where(layer.valid[..., None], layer.values, xp.zeros_like(layer.values))
        output = weights[..., None, :] @ xp.astype(values, alpha.dtype)
        change = output_change(alpha, values, output, xp=xp)
        scores = xp.where(candidates, change, xp.astype(found.scores, change.dtype))
        return replace(found, importance=scores, scores=scores)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Sum the values and take each one's distance: 5 Dv per token, with Dv = D. In memory: the differences."""
        entries = shape.batch * shape.kv_heads * shape.num_tokens * shape.head_size
        return self.base.cost(shape).then(Cost(5 * entries, 4 * entries))


def _shares(weights: Array, /, *, xp: Namespace) -> Array:
    """Divide by the sum along the last axis, if there is any."""
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))
