"""MPCache's static eviction: a token stays if any query of the end of the prompt attends to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import budgets, checks, primitives
from ..core.attention import window_attention
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape
from ..core.needs import name_of
from ..core.policy import Assessment, Requirements, Wrapper
from ..core.selection import Choice, select_in_tiers, tiers_of
from ..core.types import Array
from . import attention

__all__ = ["AnyQuery", "strongest"]

# Queries whose attention is held at once.
BLOCK = 32


def strongest(layer: Layer, window: int | float, /) -> Array:
    """Compute the most attention, averaged over all query heads, that any of the last queries pays to each token.

    Parameters
    ----------
    layer : Layer
        With queries or attention rows.
    window : int or float
        How many of the last queries count, or their share of the tokens of each row, rounded down but at least one.

    Returns
    -------
    array, shape (batch, N)
    """
    xp, num_tokens = layer.xp, layer.num_tokens
    rows: Array = layer.attention if layer.attention is not None else layer.queries
    given = min(int(rows.shape[2]), budgets.count_of(window, num_tokens))
    device = primitives.device_of(layer.keys)
    total = xp.sum(xp.astype(xp.any(layer.valid, axis=1), xp.int64), axis=-1)
    if checks.is_whole(window):
        asked = xp.full_like(total, given)
    else:
        # Of each row's own tokens, so that padding asks for no more.
        numerator, denominator = budgets.as_written(float(window))
        asked = xp.maximum(total * numerator // denominator, xp.ones_like(total))
    best = xp.zeros((layer.keys.shape[0], num_tokens), dtype=layer.keys.dtype, device=device)
    for start in range(num_tokens - given, num_tokens, BLOCK):
        stop = min(start + BLOCK, num_tokens)
        position = xp.arange(start, stop, dtype=xp.int64, device=device)
        counts = position[None, :] >= num_tokens - asked[:, None]
        paid = _paid(layer, start, stop)
        paid = xp.where(counts[..., None], paid, xp.zeros_like(paid))
        end = paid.shape[-1]
        best = xp.concat([xp.maximum(best[:, :end], xp.max(paid, axis=1)), best[:, end:]], axis=-1)
    return best


def _paid(layer: Layer, start: int, stop: int, /) -> Array:
    """Return the attention of some positions, averaged over all heads, to the tokens up to the last of them."""
    xp, num_tokens = layer.xp, layer.num_tokens
    if layer.attention is not None:
        first = layer.attention.shape[2] - num_tokens
        return xp.mean(layer.attention[:, :, first + start : first + stop, :], axis=1)
    queries: Array = layer.queries
    first = queries.shape[2] - num_tokens
    rows = queries[:, :, first + start : first + stop, :]
    return xp.mean(window_attention(rows, layer.keys[:, :, :stop, :], layer.valid[:, :, :stop], xp=xp), axis=(1, 2))


@dataclass(frozen=True)
class AnyQuery(Wrapper):
    r"""Any policy, without the tokens that no query of the end of the prompt attends to.

    With the attention averaged over all query heads of the layer, a token may stay if some query of the last ones gives
    it at least a threshold:

    .. math:: \max_{q \in \text{last}} \operatorname{mean}_h A_{hqj} \ge \theta

    So each row and layer finds a budget of its own, and all KV heads the same. Where more tokens may stay than the
    base's budget, its scores decide; a budget of 1.0, a share, is no bound. Protected tokens always stay.

    Parameters
    ----------
    base : Policy
        Where scores, protection and the largest budget come from.
    threshold : float
        In [0, 1].
    window : int or float
        How many of the last queries are asked, or their share of the tokens.

    Raises
    ------
    ArgumentError
        If an option is out of range, or the base has a choice of its own. When evicting without queries or attention.
    ArgumentTypeError
        If `base` is not a Policy, or an option has the wrong type.

    Notes
    -----
    `Eviction.counts` says how many tokens stay, and tokens that may not have the score minus infinity. With a threshold
    that nothing reaches, only protected tokens stay.

    The paper evicts so once, after the prompt; later there are not as many queries, which the door says. It sets the
    threshold per data set, from 1e-3 to 1e-20, where 15 to 66% of the tokens stay. Its code asks the last 20% of the
    queries, 10% of more than 24,000 tokens, and leaves the causal mask out; here a query does not see what comes after
    it. The dynamic stage chooses tokens anew for each query and evicts nothing, so it has no place here.

    References
    ----------
    .. [1] Zeng et al., "MPCache: MPC-Friendly KV Cache Eviction for Efficient Private LLM Inference",
       arXiv:2501.06807, the look-once static eviction.

    Examples
    --------
    Two queries. Token 0 gets .5 from the first and token 2 gets .3 from the second; token 1 gets .1 at most:

    >>> import numpy as np
    >>> from graphkv import AnyQuery, StreamingLLM, evict
    >>> rows = np.asarray([[[[0.5, 0.1, 0.1, 0.3, 0.0], [0.1, 0.1, 0.3, 0.1, 0.4]]]])
    >>> policy = AnyQuery(StreamingLLM(budget=1.0, num_sinks=0), threshold=0.2, window=2)
    >>> done = evict(policy, np.ones((1, 1, 5, 2)), attention=rows)
    >>> done.kept, done.counts
    (array([[[ 0,  2,  3,  4, -1]]]), array([[4]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="window", couples_heads=True, automatic=True)

    threshold: float = 1e-3
    window: int | float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("threshold", self.threshold)
        window = checks.ratio_or_count("window", self.window)
        if window == 0:
            raise ArgumentError(f"window must be at least 1 query, or a share; got {window}")
        if self.base.chooses():
            raise ArgumentError(
                f"base must choose by its scores alone; {name_of(self.base)} has a choice of its own, put that on top"
            )

    def num_queries(self, num_tokens: int, /) -> int:
        """Return how many queries are asked, by the base too."""
        asked = min(budgets.count_of(self.window, num_tokens), num_tokens)
        return max(self.base.num_queries(num_tokens), asked)

    def rescore(self, found: Assessment, layer: Layer, budget: int, /) -> Assessment:
        """Bar what no query attends to."""
        rows = layer.attention if layer.attention is not None else layer.queries
        given, asked = 0 if rows is None else int(rows.shape[2]), budgets.count_of(self.window, layer.num_tokens)
        if given < min(asked, layer.num_tokens):
            # With a base that remembers, the door asks for the queries of new positions only.
            raise ArgumentError(f"queries must hold the last {asked} positions for AnyQuery; got {given or 'none'}")
        found, xp = self.base.rescore(found, layer, budget), layer.xp
        barred = (strongest(layer, self.window) < self.threshold)[:, None, :] & layer.valid
        if found.protected is not None:
            barred = barred & ~found.protected
        scores = xp.where(barred, xp.full_like(found.scores, -xp.inf), found.scores)
        return replace(found, scores=scores, barred=barred)

    def choose(self, found: Assessment, layer: Layer, budget: int, /) -> Choice:
        """Fill the budget with what is not barred."""
        xp = layer.xp
        # Without what `rescore` barred, nothing is.
        stays = layer.valid if found.barred is None else layer.valid & ~found.barred
        counts = xp.sum(xp.astype(stays, xp.int64), axis=-1)
        counts = xp.minimum(counts, xp.full_like(counts, budget))
        tiers = tiers_of(found.scores, found.protected, stays, xp=xp)
        return Choice(kept=select_in_tiers(found.scores, counts, budget, tiers, backend=layer.backend), counts=counts)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the last queries' attention, of which a block is held at a time."""
        asked = min(budgets.count_of(self.window, shape.num_tokens), shape.num_tokens)
        whole, block = (attention.window_cost(shape, window) for window in (asked, min(asked, BLOCK)))
        return self.base.cost(shape).then(Cost(whole.flops, block.bytes))
