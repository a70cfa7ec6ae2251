"""What attention finds in the place of tokens that are gone."""

from __future__ import annotations

from dataclasses import dataclass

from .attention import masked_softmax
from .types import Array, Namespace

__all__ = ["Answer", "attend"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    r"""Slots beside those of the tokens, whose weights a policy computes from each query.

    With logits :math:`l_j` of the kept tokens and :math:`a_r` of these slots, attention is

    .. math:: o = \frac{\sum_j e^{l_j} v_j + \sum_r e^{a_r} v_r}{\sum_j e^{l_j} + \sum_r e^{a_r}}

    Attributes
    ----------
    logits : array, shape (batch, query_heads, Q, R), float32 or wider
        Minus infinity where a slot says nothing.
    values : array, shape (batch, kv_heads, R, Dv), float32 or wider
    """

    logits: Array
    values: Array


def attend(logits: Array, values: Array, answer: Answer | None = None, /, *, xp: Namespace) -> Array:
    """Compute attention to tokens, and to the slots of an answer beside them.

    Parameters
    ----------
    logits : array, shape (batch, query_heads, Q, n), float32 or wider
        Minus infinity for what a query does not see.
    values : array, shape (batch, kv_heads, n, Dv), float32 or wider
    answer : Answer, optional

    Returns
    -------
    array, shape (batch, query_heads, Q, Dv)
        0 for a query that sees nothing.

    Examples
    --------
    One token of weight 1 and value 4, and a slot of weight 3 and value 8:

    >>> import numpy as np
    >>> from graphkv.core.answer import Answer, attend
    >>> answer = Answer(logits=np.log([[[[3.0]]]]), values=np.asarray([[[[8.0]]]]))
    >>> attend(np.zeros((1, 1, 1, 1)), np.asarray([[[[4.0]]]]), answer, xp=np).round(6)
    array([[[[7.]]]])
    """
    if answer is not None:
        logits = xp.concat([logits, answer.logits], axis=-1)
        values = xp.concat([values, answer.values], axis=-2)
    weights = masked_softmax(logits, logits > -xp.inf, xp=xp)
    batch, query_heads, number, slots = weights.shape
    kv_heads, size = values.shape[1], values.shape[-1]
    rows = xp.reshape(weights, (batch, kv_heads, query_heads // kv_heads * number, slots))
    return xp.reshape(rows @ values, (batch, query_heads, number, size))
