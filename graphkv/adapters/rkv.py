"""R-KV: attention, less what other keys say already."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from ..core import checks, primitives
from ..core.backend import Backend
from ..core.graph import normalize
from ..core.layer import Cost, Layer, LayerShape
from ..core.policy import Requirements
from ..core.types import Array, Namespace
from . import attention
from .protection import WindowPolicy

__all__ = ["RKV", "group_attention", "redundancy"]


def group_attention(queries: Array, keys: Array, gives: Array, receives: Array, /, *, xp: Namespace) -> Array:
    """Compute equations (1) to (3): the largest logit of the group, then a softmax over the keys.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, W, D)
    keys : array, shape (batch, kv_heads, n, D)
        All of them before the queries, so that no mask is needed; n is at least 1.
    gives : array, shape (batch, kv_heads, W), bool
        False for a padded query, whose row is zero.
    receives : array, shape (batch, kv_heads, n), bool
        False for padding. Queries and keys that hold an infinity or NaN count as padding.

    Returns
    -------
    array, shape (batch, kv_heads, W, n)
        Probabilities.
    """
    queries, is_query = primitives.finite_rows(queries, xp=xp)
    keys, is_key = primitives.finite_rows(keys, xp=xp)
    batch, query_heads, window, head_size = queries.shape
    kv_heads, num_keys = keys.shape[1], keys.shape[2]
    groups = query_heads // kv_heads
    rows = xp.reshape(queries, (batch, kv_heads, groups * window, head_size))
    logits = rows @ xp.matrix_transpose(keys) / sqrt(max(head_size, 1))
    logits = xp.reshape(logits, (batch, kv_heads, groups, window, num_keys))
    sees = (
        xp.reshape(is_query, (batch, kv_heads, groups, window, 1))
        & gives[:, :, None, :, None]
        & (receives & is_key)[:, :, None, None, :]
    )
    largest = xp.max(xp.where(sees, logits, xp.full_like(logits, -xp.inf)), axis=2)
    highest = xp.max(largest, axis=-1, keepdims=True)
    # A row that sees nothing is all minus infinity, and becomes all zero.
    weight = xp.exp(largest - xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest)))
    total = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(total > 0, total, xp.ones_like(total))


def redundancy(
    keys: Array,
    valid: Array,
    /,
    *,
    threshold: float,
    num_exempt: int,
    exempt: str,
    first_exempt: bool,
    block_size: int,
    backend: Backend,
) -> Array:
    r"""Compute equations (5) and (6): the softmax of each key's mean cosine with the others, exempt links left out.

    The sum of a key's cosines is one product with the sum of all directions. Only the exempt links need pairs, and of
    these `block_size` rows exist at a time: never n x n.

    Parameters
    ----------
    keys : array, shape (batch, kv_heads, n, D)
    valid : array, shape (batch, kv_heads, n), bool
        Padding resembles nothing and counts nowhere.
    threshold, num_exempt, exempt, first_exempt, block_size
        As for `RKV`.
    backend : Backend

    Returns
    -------
    array, shape (batch, kv_heads, n)
        At least 0, with sum 1 over the valid tokens.
    """
    xp, num_tokens, device = backend.xp, keys.shape[-2], primitives.device_of(keys)
    directions = normalize(keys, xp=xp)
    directions = xp.where(valid[..., None], directions, xp.zeros_like(directions))
    # Not a matrix product: equal keys must be equally redundant, whatever their position.
    total = xp.sum(directions, axis=-2)[..., None, :]
    cosines = xp.sum(directions * (total - directions), axis=-1)
    place = xp.arange(num_tokens, dtype=xp.int64, device=device)[None, None, None, :]
    first = xp.argmax(xp.astype(valid, xp.int64), axis=-1)[..., None]
    own, recent = [], xp.zeros_like(cosines)
    for start in range(0, num_tokens, block_size):
        stop = min(start + block_size, num_tokens)
        counts = valid[..., start:stop]
        cosine = directions[..., start:stop, :] @ xp.matrix_transpose(directions)
        is_other = place != xp.matrix_transpose(place[..., start:stop])
        cosine = xp.where(is_other, cosine, xp.zeros_like(cosine))
        similar = is_other & (cosine > threshold) & counts[..., None] & valid[..., None, :]
        nowhere = xp.full(similar.shape, -1, dtype=xp.int64, device=device)
        links = xp.zeros_like(cosines[..., start:stop])
        for turn in range(num_exempt):
            latest = xp.max(xp.where(similar, place, nowhere), axis=-1)
            similar = similar & (place < latest[..., None])
            found = latest >= 0
            latest = xp.where(found, latest, first)
            if first_exempt and turn == 0:
                found = counts
            link = xp.take_along_axis(cosine, latest[..., None], axis=-1)[..., 0]
            link = xp.where(found, link, xp.zeros_like(link))
            if exempt == "own":
                links = links + link
            else:
                recent = recent + primitives.segment_sum(link, latest, num_tokens, backend=backend)
        own.append(links)
    spared = xp.concat(own, axis=-1) if exempt == "own" else recent
    number = xp.sum(xp.astype(valid, keys.dtype), axis=-1, keepdims=True)
    mean = (cosines - spared) / xp.maximum(number, xp.ones_like(number))
    # Means are in [-1, 1], so the exponential needs no shift.
    weight = xp.where(valid, xp.exp(mean), xp.zeros_like(mean))
    whole = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(whole > 0, whole, xp.ones_like(whole))


@dataclass(frozen=True, kw_only=True)
class RKV(WindowPolicy):
    r"""Keep the window, and the past tokens that its queries attend to and that other keys do not repeat.

    .. math:: Z_j = \lambda I_j - (1 - \lambda) R_j

    :math:`I` is the attention that the last `window` queries give a past token, the logits of a KV head's query heads
    joined by their maximum, pooled along the tokens and averaged over the queries. :math:`R` is the softmax over the
    tokens of a key's mean cosine with the other keys. What a token has in common with the latest `num_exempt` of the
    tokens that it resembles by more than `threshold` is not held against these: so of repetitions the latest one stays.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, window and sinks included; a float is a share of the tokens.
    window : int
        Alpha, the observation tokens. A prompt shorter than that is all window.
    kernel_size : int
        Width of the pooling by maximum: token j sees those from j - kernel_size // 2 to j + (kernel_size - 1) // 2. An
        even one, 2 W, is the paper's; an odd one the public code's.
    pooled : str
        ``"queries"`` pools every query's attention (the paper), ``"mean"`` their average (the public code).
    mix : float
        Lambda in [0, 1]: 1 is attention alone, 0 is redundancy alone.
    threshold : float
        T in [0, 1]: the cosine above which tokens are similar.
    num_exempt : int
        Beta: of the tokens that are similar to a token, the latest so many.
    exempt : str
        What goes without a link between token j and i, one of the latest similar to j: ``"recent"``, the sum of i,
        which makes i worth keeping; or ``"own"``, the sum of j.
    first_exempt : bool
        A token that resembles none has no part in the sum of the first token, as in the public code.
    with_window : bool
        Compare the tokens of the window too, as in the public code. The paper's candidates are those before it.
    num_sinks : int
        First tokens that are kept as well. The paper keeps none on purpose.
    block_size : int
        Tokens compared with all others at a time. Affects rounding and memory only.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting without the window's queries.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance is in [-1, 1]. Attention rows cannot replace the queries, because the maximum is over logits. The method
    is made for decoding: evict every 128 tokens. Of two equal keys each is the latest that the other resembles, so both
    are spared, and it takes a third one to make the first redundant. Cosines are those of the keys as cached, after the
    rotary embedding. A cosine within rounding of `threshold` may fall on either side of it on different libraries.

    The paper's equation (6) prints a sum over i of :math:`S_{j,i}` for token i. Summed over the first index, a token is
    spared its own links (``"own"``); summed as printed, the latest similar token is spared the links to it, which is
    what the text wants and the public code does (``"recent"``). The paper sets alpha = 8 and lambda = 0.1, but not T,
    beta and W; the values here are those of the public code, where beta is 1.

    The public code, described by `official`, also compares the window's tokens, pools after averaging, and takes "no
    similar token" for token 0, which spares the first token nearly all its links. Its ``retain_direction="first"``
    always finds token 0, and its ``"..._percent"`` forms take what they found for the first token alone; none of them
    is offered. Its older versions compared keys of the batch's first row only. It holds all cosines of a layer at once.

    References
    ----------
    .. [1] Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv:2505.24133, equations
       (1) to (7).

    Examples
    --------
    Past tokens 0, 2 and 3 are the same. Token 3 is the latest one similar to 0 and 2, and 2 the latest one similar to
    3, so the mean cosines are 2/4, 0, 1/4 and 0. Attention has no say here:

    >>> import numpy as np
    >>> from graphkv import RKV, evict
    >>> keys = np.asarray([[[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]])
    >>> query = np.zeros((1, 1, 1, 2))
    >>> done = evict(RKV(budget=3, window=1, kernel_size=1, mix=0.0), keys, queries=query)
    >>> done.importance[0, 0, :4].round(3), done.kept
    (array([-0.334, -0.203, -0.26 , -0.203]), array([[[1, 3, 4]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="window", logits=True)
    even_kernels: ClassVar[bool] = True

    window: int = 8
    pooled: str = "queries"
    mix: float = 0.1
    threshold: float = 0.5
    num_exempt: int = 1
    exempt: str = "recent"
    first_exempt: bool = False
    with_window: bool = False
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("pooled", self.pooled, ("queries", "mean"))
        for name in ("mix", "threshold"):
            object.__setattr__(self, name, checks.fraction(name, getattr(self, name)))
        checks.choice("exempt", self.exempt, ("recent", "own"))
        checks.flag("first_exempt", self.first_exempt)
        if checks.count("num_exempt", self.num_exempt) == 0:
            checks.unused("exempt", self.exempt, "recent", "num_exempt", "0")
            checks.unused("first_exempt", self.first_exempt, False, "num_exempt", "0")
        checks.flag("with_window", self.with_window)
        checks.count("block_size", self.block_size, minimum=1)

    @classmethod
    def official(cls, budget: int | float, /) -> RKV:
        """Return the public code's choices, its first token included; it evicts every 128 tokens.

        Scores in half precision are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head, window included.

        Returns
        -------
        RKV
        """
        return cls(budget=budget, pooled="mean", first_exempt=True, with_window=True)

    def score_past(self, layer: Layer, window: int, /) -> Array:
        """Mix attention and redundancy."""
        xp, num_past = layer.xp, layer.num_tokens - window
        past, valid = layer.keys[:, :, :num_past, :], layer.valid[:, :, :num_past]
        if num_past == 0:
            return xp.zeros_like(past[..., 0])
        rows = group_attention(
            layer.queries[:, :, layer.queries.shape[2] - window :, :],  # type: ignore[index, union-attr]
            past,
            layer.valid[:, :, num_past:],
            valid,
            xp=xp,
        )
        asked = xp.sum(xp.astype(layer.valid[:, :, num_past:], rows.dtype), axis=-1, keepdims=True)
        asked = xp.maximum(asked, xp.ones_like(asked))
        if self.pooled == "queries":
            rows = attention.pool(rows, self.kernel_size, "max", xp=xp)
        received = xp.sum(rows, axis=-2) / asked
        if self.pooled == "mean":
            received = attention.pool(received, self.kernel_size, "max", xp=xp)
        repeated = redundancy(
            layer.keys if self.with_window else past,
            layer.valid if self.with_window else valid,
            threshold=self.threshold,
            num_exempt=self.num_exempt,
            exempt=self.exempt,
            first_exempt=self.first_exempt,
            block_size=self.block_size,
            backend=layer.backend,
        )
        return self.mix * received - (1 - self.mix) * repeated[..., :num_past]

    def cost(self, shape: LayerShape, /) -> Cost:
        """Compare (2 D) and search (3) all pairs of tokens; the window's attention is little beside that.

        In memory: one block of cosines, or the window's attention.
        """
        heads, num_tokens = shape.batch * shape.kv_heads, shape.num_tokens
        pairs = heads * num_tokens * num_tokens * (2 * shape.head_size + 3 * self.num_exempt)
        block = heads * min(self.block_size, num_tokens) * num_tokens
        return Cost(pairs, max(4 * block, attention.window_cost(shape, self.window).bytes))
