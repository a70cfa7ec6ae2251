"""Expected Attention: keep what queries like those so far would attend to on average."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from ..core import checks
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.types import Array, Namespace
from . import attention
from .protection import SinkPolicy

__all__ = ["ExpectedAttention", "expected_logits", "moments"]


def moments(queries: Array, counts: Array, /, *, xp: Namespace) -> tuple[Array, Array]:
    """Compute mean and covariance of the queries that count.

    Parameters
    ----------
    queries : array, shape (..., Q, D)
    counts : array, shape (..., Q), bool

    Returns
    -------
    mean : array, shape (..., D)
    covariance : array, shape (..., D, D)
        Divided by the number of queries that count, not by one less; zero where there are none.
    """
    weight = xp.astype(counts, queries.dtype)[..., None]
    number = xp.sum(weight, axis=-2)
    number = xp.where(number > 0, number, xp.ones_like(number))
    # Padding may hold anything, and 0 times NaN is NaN.
    queries = xp.where(counts[..., None], queries, xp.zeros_like(queries))
    mean = xp.sum(queries, axis=-2) / number
    away = (queries - mean[..., None, :]) * weight
    return mean, xp.matrix_transpose(away) @ away / number[..., None]


def expected_logits(mean: Array, covariance: Array, keys: Array, /, *, xp: Namespace) -> Array:
    r"""Compute the logarithm of the expected exponential of an attention logit, for Gaussian queries.

    .. math:: \log E\left[e^{q \cdot k / \sqrt{D}}\right]
              = \frac{\mu \cdot k}{\sqrt{D}} + \frac{k^\top \Sigma\, k}{2 D}

    Parameters
    ----------
    mean : array, shape (batch, kv_heads, groups, D)
    covariance : array, shape (batch, kv_heads, groups, D, D)
    keys : array, shape (batch, kv_heads, N, D)

    Returns
    -------
    array, shape (batch, kv_heads, groups, N)
    """
    head_size = keys.shape[-1]
    first = mean @ xp.matrix_transpose(keys) / sqrt(head_size)
    keys = keys[:, :, None, :, :]
    return first + xp.sum((keys @ covariance) * keys, axis=-1) / (2 * head_size)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(SinkPolicy):
    r"""Keep the tokens that future queries are expected to attend to, if they are distributed like those given.

    With mean :math:`\mu` and covariance :math:`\Sigma` of the queries of one head, the expected unnormalized attention
    to token :math:`j` is :math:`e^{z_j}`, and the importance

    .. math::

        z_j = \frac{\mu \cdot k_j}{\sqrt{D}} + \frac{k_j^\top \Sigma\, k_j}{2 D}, \qquad
        s_j = \bigl(\operatorname{mean}_h \operatorname{softmax}_j(z_j) + \epsilon\bigr) \lVert v_j \rVert_2,

    the softmax over all tokens but sinks and padding, the mean over the query heads of the KV head.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens, which are always kept. Their queries and keys stay out of the statistics.
    epsilon : float
        Added to the expected attention before the norm of the value, in [0, 1]. 0.02 in the paper.
    value_norm : bool
        Multiply by the norm of the value, as in the paper. False: values are not needed.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting without queries, or without values.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    The moments are those of all queries that are given, if possible the whole prompt's (`Policy.num_queries` requests
    them), except those of padding and sinks. Importance is at least 0; that of a sink
    is 0, so that a budget below the sinks keeps the first of them.

    Rotary embeddings are where this form falls short of the paper. There the moments are those of queries *before* the
    rotation, then rotated by the average rotation :math:`\bar R` over the next 512 positions. Here nothing is known of
    rotations, and queries are taken as given. After the rotation, as `evict` gets them, their moments are averaged over
    the positions of the prompt instead of the future, which blurs the rotated components more. The paper's form is
    still within reach: mean and covariance of :math:`\bar R q` are exactly :math:`\bar R \mu` and
    :math:`\bar R \Sigma \bar R^\top`, so a caller who has the queries before the rotation passes each one multiplied
    by :math:`\bar R`. The paper also multiplies the value by the output projection, which the cache does not hold; the
    public code does not either. That code has epsilon 0 (`official`), takes the softmax in the model's dtype, where the
    quadratic term can overflow, and puts sinks above the maximum, where here they are protected.

    References
    ----------
    .. [1] Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
       Distribution", arXiv:2510.00636.

    Examples
    --------
    Queries 2 and 0 have mean 1 and variance 1, so z = k + k k / 2: 0, 1.5 and -0.5 without the sink.

    >>> import numpy as np
    >>> from graphkv import ExpectedAttention, evict
    >>> keys = np.asarray([[[[9.0], [0.0], [1.0], [-1.0]]]])
    >>> queries = np.asarray([[[[2.0], [0.0]]]])
    >>> policy = ExpectedAttention(budget=2, num_sinks=1, epsilon=0.0, value_norm=False)
    >>> done = evict(policy, keys, queries=queries)
    >>> done.importance.round(3), done.kept
    (array([[[0.   , 0.164, 0.736, 0.1  ]]]), array([[[0, 2]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(values=True, queries="all", logits=True)

    num_sinks: int = 4
    epsilon: float = 0.02
    value_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("epsilon", self.epsilon)
        checks.flag("value_norm", self.value_norm)

    @classmethod
    def official(cls, budget: int | float, /) -> ExpectedAttention:
        """Return the public code's setting: 4 sinks, epsilon 0.

        Parameters
        ----------
        budget : int or float
            Tokens to keep, or their share.

        Returns
        -------
        ExpectedAttention

        Raises
        ------
        ArgumentError
            If the budget is out of range.
        ArgumentTypeError
            If the budget is not a number.
        """
        return cls(budget=budget, num_sinks=4, epsilon=0.0)

    def needs(self) -> Requirements:
        """Return the needs: no values without their norm."""
        return replace(self.requirements, values=self.value_norm)

    def num_queries(self, num_tokens: int, /) -> int:
        """Request all queries; fewer are accepted."""
        return num_tokens

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the expected attention, times the norm of the value."""
        xp, (batch, query_heads, num_queries, head_size) = layer.xp, layer.queries.shape  # type: ignore[union-attr]
        kv_heads = layer.keys.shape[1]
        sinks = self.protection(0).mask(layer)
        counts = layer.valid if sinks is None else layer.valid & ~sinks
        queries = xp.reshape(layer.queries, (batch, kv_heads, query_heads // kv_heads, num_queries, head_size))
        asks = counts[:, :, None, layer.num_tokens - num_queries :]
        mean, covariance = moments(queries, xp.broadcast_to(asks, queries.shape[:-1]), xp=xp)
        logits = expected_logits(mean, covariance, layer.keys, xp=xp)
        expected = attention.group_heads(_softmax(logits, counts[:, :, None, :], xp=xp), "mean", xp=xp)
        importance = expected + self.epsilon
        if self.value_norm:
            importance = importance * xp.sqrt(xp.sum(layer.values * layer.values, axis=-1))  # type: ignore[operator]
        return xp.where(counts, importance, xp.zeros_like(importance))

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compute the covariance of the queries, 2 D D each, and as much for each key's quadratic form.

        In memory: the keys' products with each query head's covariance.
        """
        entries = shape.batch * shape.query_heads * shape.num_tokens * shape.head_size
        return Cost(4 * entries * shape.head_size, 4 * entries)


def _softmax(logits: Array, among: Array, /, *, xp: Namespace) -> Array:
    """Compute the softmax along the last axis among some tokens; zero for the others, and if there are none."""
    logits = xp.where(among, logits, xp.full_like(logits, -xp.inf))
    highest = xp.max(logits, axis=-1, keepdims=True)
    weight = xp.exp(logits - xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest)))
    total = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(total > 0, total, xp.ones_like(total))
