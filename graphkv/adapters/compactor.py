"""Compactor: keys that point where no others do, and keys that any token near them attends to."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from ..core import checks, primitives
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection, token_rank
from ..core.types import Array, Namespace
from . import attention
from .lagkv import valid_first
from .protection import SinkPolicy

__all__ = ["Compactor", "leverage", "mutual_attention"]


def _sketch(seed: int, head_size: int, size: int, /) -> list[list[float]]:
    """Draw the sketch, normal with variance 1 / size: Python's numbers are the same for every library."""
    stream = random.Random(f"{seed}/{head_size}/{size}")
    return [[stream.gauss(0.0, 1.0) / sqrt(size) for _ in range(size)] for _ in range(head_size)]


# What torch.compiler.assume_constant_result sets, without an import of torch: the draws are constants of a graph.
_sketch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leverage(keys: Array, /, *, ridge: float = 0.0, xp: Namespace) -> Array:
    r"""Compute the statistical leverage of every row, :math:`\ell_i = x_i^\top (X^\top X + \rho I)^{-1} x_i`.

    Without a ridge that is the squared length of row i of an orthonormal basis of the columns, whatever their rank.

    Parameters
    ----------
    keys : array, shape (..., N, K)
        Finite; rows of zeros count nowhere.
    ridge : float
        :math:`\rho`, at least 0.

    Returns
    -------
    array, shape (..., N)
        In [0, 1]; without a ridge the sum is the rank.
    """
    size, device = keys.shape[-1], primitives.device_of(keys)
    place = xp.arange(size, dtype=xp.int64, device=device)
    identity = xp.astype(place[:, None] == place[None, :], keys.dtype)
    identity = xp.reshape(identity, (*(1 for _ in keys.shape[:-2]), size, size))
    gram = xp.matrix_transpose(keys) @ keys + ridge * identity
    # Leverage does not change with the scale of a column, and columns of one scale lose the least in rounding.
    diagonal = xp.sum(gram * identity, axis=-1)
    scale = 1 / xp.sqrt(xp.where(diagonal > 0, diagonal, xp.ones_like(diagonal)))
    gram = gram * scale[..., :, None] * scale[..., None, :]
    # Elimination on [G | I] gives the inverse of G's Cholesky factor, row by row. The standard has no factorization,
    # and one that fails would have to be read on the host. Columns that depend on earlier ones add nothing.
    work = xp.concat([gram, xp.broadcast_to(identity, gram.shape)], axis=-1)
    smallest = 8 * size * (2.0**-23 if keys.dtype == xp.float32 else 2.0**-52)
    rows = []
    for j in range(size):
        pivot = work[..., j : j + 1, j : j + 1]
        root = xp.sqrt(xp.where(pivot > smallest, pivot, xp.ones_like(pivot)))
        row = xp.where(pivot > smallest, work[..., j : j + 1, :] / root, xp.zeros_like(work[..., :1, :]))
        factor = work[..., :, j : j + 1] / root
        work = work - xp.where(place[:, None] > j, factor, xp.zeros_like(factor)) * row
        rows.append(row[..., size:])
    basis = keys @ xp.matrix_transpose(xp.concat(rows, axis=-2) * scale[..., None, :])
    found = xp.sum(basis * basis, axis=-1)
    return xp.minimum(found, xp.ones_like(found))


def mutual_attention(
    queries: Array, keys: Array, gives: Array, receives: Array, /, *, chunk: int, scaled: bool, xp: Namespace
) -> Array:
    """Sum the attention that every token receives from all tokens of its chunk, later ones included.

    Parameters
    ----------
    queries : array, shape (batch, kv_heads, groups, N, D)
    keys : array, shape (batch, kv_heads, N, D)
    gives : array, shape (batch, kv_heads, groups, N), bool
        False for queries that count nowhere.
    receives : array, shape (batch, kv_heads, N), bool
        False for keys that count nowhere.
    chunk : int
        C, tokens that see each other.
    scaled : bool
        Divide the logits by the square root of D.

    Returns
    -------
    array, shape (batch, kv_heads, N)
        The mean over the group.
    """
    batch, kv_heads, groups, num_tokens, head_size = queries.shape
    keys = keys / sqrt(max(head_size, 1)) if scaled else keys
    chunks = []
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        size = stop - start
        asks = xp.reshape(queries[:, :, :, start:stop, :], (batch, kv_heads, groups * size, head_size))
        logits = asks @ xp.matrix_transpose(keys[:, :, start:stop, :])
        logits = xp.where(receives[:, :, None, start:stop], logits, xp.full_like(logits, -xp.inf))
        highest = xp.max(logits, axis=-1, keepdims=True)
        weight = xp.exp(logits - xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest)))
        total = xp.sum(weight, axis=-1, keepdims=True)
        weight = weight / xp.where(total > 0, total, xp.ones_like(total))
        weight = xp.reshape(weight, (batch, kv_heads, groups, size, size))
        weight = xp.where(gives[..., start:stop, None], weight, xp.zeros_like(weight))
        chunks.append(xp.sum(weight, axis=(2, 3)) / groups)
    return xp.concat(chunks, axis=-1) if chunks else xp.zeros_like(keys[..., 0])


@dataclass(frozen=True, kw_only=True)
class Compactor(SinkPolicy):
    r"""Keep keys that point where no others do, and those that the tokens near them would attend to.

    .. math:: s_j = \frac{a_j - \bar a}{\operatorname{std} a} + \lambda \frac{o_j - \bar o}{\operatorname{std} o}

    :math:`o` is the statistical leverage of the keys: how much of the space that they span would be lost without key j.
    It is approximate: the keys are multiplied by a normal random matrix of `sketch` columns first. :math:`a` is the
    attention that token j receives from all tokens of its chunk, the later and the earlier ones alike, pooled along the
    tokens. Neither asks a question of the text, so the choice serves any question.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks and recents included; a float is a share of the tokens.
    sketch : int or None
        Columns of the sketch; where the head size is no larger, or with None, leverage is exact.
    chunk : int
        C, tokens that attend to each other.
    mix : float
        Lambda, at least 0: the weight of the leverage.
    kernel_size : int
        Odd width of the average along the tokens; 1 for none.
    unrotated : bool
        Take the leverage of the keys before the rotary embedding, as both public codes do.
    centered : bool
        Subtract the mean key first, as both public codes do.
    ridge : float
        Added to the diagonal of the keys' Gram matrix, at least 0.
    scaled : bool
        Divide logits by the square root of D, as the model does. Neither paper nor public codes do.
    value_norm : bool
        Multiply the attention by the norm of the value, as kvpress does.
    num_sinks, num_recent : int
        First and newest tokens that are always kept.
    seed : int
        Of the sketch, which all layers, heads and rows share.

    Raises
    ------
    ArgumentError
        If an option is out of range or `kernel_size` even; when evicting without queries, or with an option without
        what it needs.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance has mean 0 over the tokens of a head that are not padding. A part whose values are all the same but for
    rounding counts as 0. Attention is that of the queries that are given, if possible the whole prompt's
    (`Policy.num_queries` requests them); chunks begin at a row's first token, padding not counted. Memory is that of
    one chunk's attention, C x C per query head.

    Lambda, the sketch and C are the paper's: 0.3, 48 and 256. The authors' engine, described by `official`, has other
    values, takes means and deviations over all heads of a layer, leverage within 512 tokens at a time, counts a short
    last chunk's missing queries as uniform, and lets heads compete, which is ``AdaKV`` on top; kvpress takes means and
    deviations over the whole batch, and lets what it fills a short chunk up with take part. Those are not expressed;
    nor is the choice of the budget by calibration. Leverage is computed by elimination instead of a decomposition.

    References
    ----------
    .. [1] Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage
       Scores", arXiv:2507.08143, algorithm 1 and section 3.

    Examples
    --------
    Nobody attends to anything in particular. The third key is the only one that points up, so its leverage is 1; the
    others share the other direction, 1/9, 4/9 and 4/9:

    >>> import numpy as np
    >>> from graphkv import Compactor, evict
    >>> keys = np.asarray([[[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [2.0, 0.0]]]])
    >>> policy = Compactor(budget=2, num_sinks=0, num_recent=0, kernel_size=1, mix=1.0)
    >>> done = evict(policy, keys, queries=np.zeros((1, 1, 4, 2)))
    >>> done.importance.round(3), done.kept
    (array([[[-1.219, -0.174,  1.567, -0.174]]]), array([[[1, 2]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="all", logits=True)

    num_sinks: int = 8
    num_recent: int = 4
    sketch: int | None = 48
    chunk: int = 256
    mix: float = 0.3
    kernel_size: int = 3
    unrotated: bool = False
    centered: bool = False
    ridge: float = 0.0
    scaled: bool = False
    value_norm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("num_recent", self.num_recent)
        if self.sketch is not None:
            checks.count("sketch", self.sketch, minimum=1)
        checks.count("chunk", self.chunk, minimum=1)
        if checks.count("kernel_size", self.kernel_size, minimum=1) % 2 == 0:
            raise ArgumentError(f"kernel_size must be odd; got {self.kernel_size}")
        for name in ("mix", "ridge"):
            object.__setattr__(self, name, checks.finite_weight(name, getattr(self, name)))
        for name in ("unrotated", "centered", "scaled", "value_norm"):
            checks.flag(name, getattr(self, name))
        checks.count("seed", self.seed)

    @classmethod
    def official(cls, budget: int | float, /) -> Compactor:
        """Return what the authors' engine does where an option expresses it: see the notes.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head, sinks and recents included.

        Returns
        -------
        Compactor
        """
        return cls(
            budget=budget,
            num_sinks=16,
            num_recent=64,
            chunk=128,
            mix=0.5,
            kernel_size=1,
            unrotated=True,
            centered=True,
            ridge=0.005,
        )

    def needs(self) -> Requirements:
        """Return the needs: values and keys before the rotary embedding only with their options."""
        return replace(self.requirements, values=self.value_norm, unrotated_keys=self.unrotated)

    def num_queries(self, num_tokens: int, /) -> int:
        """Request all queries; fewer are accepted."""
        return num_tokens

    def protection(self, budget: int, /) -> Protection:
        """Protect sinks and recents."""
        return Protection(first=self.num_sinks, last=self.num_recent)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Add both parts, each with mean 0 and deviation 1."""
        xp = layer.xp
        attended = _standardized(self._attended(layer), layer.valid, xp=xp)
        return attended + self.mix * _standardized(self._leverage(layer), layer.valid, xp=xp)

    def _leverage(self, layer: Layer, /) -> Array:
        """Compute the leverage of every key, 0 for padding."""
        xp = layer.xp
        keys, is_finite = primitives.finite_rows(layer.unrotated_keys if self.unrotated else layer.keys, xp=xp)
        counts = (layer.valid & is_finite)[..., None]
        keys = xp.where(counts, keys, xp.zeros_like(keys))
        if self.centered:
            number = xp.sum(xp.astype(counts, keys.dtype), axis=-2, keepdims=True)
            mean = xp.sum(keys, axis=-2, keepdims=True) / xp.maximum(number, xp.ones_like(number))
            keys = xp.where(counts, keys - mean, xp.zeros_like(keys))
        head_size = keys.shape[-1]
        if self.sketch is not None and self.sketch < head_size:
            draws = _sketch(self.seed, head_size, self.sketch)
            keys = keys @ xp.asarray(draws, dtype=keys.dtype, device=primitives.device_of(keys))
        return leverage(keys, ridge=self.ridge, xp=xp)

    def _attended(self, layer: Layer, /) -> Array:
        """Compute the pooled attention inside of chunks that begin at each row's first token."""
        xp, (batch, query_heads, num_queries, head_size) = layer.xp, layer.queries.shape  # type: ignore[union-attr]
        kv_heads, num_tokens = layer.keys.shape[1], layer.num_tokens
        order = valid_first(layer.valid, xp=xp)
        keys, receives = primitives.finite_rows(layer.keys, xp=xp)
        queries, gives = primitives.finite_rows(layer.queries, xp=xp)
        before = num_tokens - num_queries
        rows = (batch, kv_heads, query_heads // kv_heads, num_tokens)
        unknown = xp.zeros((batch, query_heads, before, head_size), dtype=keys.dtype, device=primitives.device_of(keys))
        queries = xp.reshape(xp.concat([unknown, queries], axis=2), (*rows, head_size))
        gives = xp.concat([xp.astype(unknown[..., 0], xp.bool), gives], axis=2)
        gives = xp.reshape(gives, rows) & layer.valid[:, :, None, :]
        places = xp.broadcast_to(order[:, :, None, :], rows)
        attended = mutual_attention(
            primitives.take_rows(queries, places, xp=xp),
            primitives.take_rows(keys, order, xp=xp),
            xp.take_along_axis(gives, places, axis=-1),
            xp.take_along_axis(receives & layer.valid, order, axis=-1),
            chunk=self.chunk,
            scaled=self.scaled,
            xp=xp,
        )
        if self.value_norm:
            values, _ = primitives.finite_rows(layer.values, xp=xp)
            norm = xp.sqrt(xp.sum(values * values, axis=-1))
            attended = attended * xp.take_along_axis(norm, order, axis=-1)
        attended = attention.pool(attended, self.kernel_size, "avg", xp=xp)
        rank = token_rank(layer.valid, xp=xp)
        return xp.take_along_axis(attended, xp.maximum(rank, xp.zeros_like(rank)), axis=-1)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend inside of chunks (2 D and 5 per pair), sketch (2 D K), and decompose (4 K K).

        In memory: one chunk's attention, or the places of the queries without padding.
        """
        num_tokens, head_size = shape.num_tokens, shape.head_size
        columns = head_size if self.sketch is None else min(self.sketch, head_size)
        chunk = min(self.chunk, num_tokens)
        pairs = shape.batch * shape.query_heads * num_tokens * chunk
        rows = shape.batch * shape.kv_heads * num_tokens
        product = 2 * head_size * columns if columns < head_size else 0
        flops = pairs * (2 * head_size + 5) + rows * (product + 4 * columns * columns)
        block = shape.batch * shape.query_heads * chunk * chunk
        queries = shape.batch * shape.query_heads * num_tokens * head_size
        return Cost(flops, max(4 * block, 8 * queries))


def _standardized(scores: Array, valid: Array, /, *, xp: Namespace) -> Array:
    """Subtract the mean of each row's valid tokens and divide by their standard deviation; 0 for constant rows."""
    number = xp.sum(xp.astype(valid, scores.dtype), axis=-1, keepdims=True)
    number = xp.maximum(number, xp.ones_like(number))
    scores = xp.where(valid, scores, xp.zeros_like(scores))
    mean = xp.sum(scores, axis=-1, keepdims=True) / number
    apart = xp.where(valid, scores - mean, xp.zeros_like(scores))
    deviation = xp.sqrt(xp.sum(apart * apart, axis=-1, keepdims=True) / number)
    # Rounding is no deviation.
    differs = deviation > 1e-5 * mean
    return xp.where(differs, apart / xp.where(differs, deviation, xp.ones_like(deviation)), xp.zeros_like(apart))
