"""CAKE: layers whose attention is spread out and shifts get more tokens, decided while the layers come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor, sqrt
from typing import ClassVar

from ..core import budgets, checks
from ..core.errors import ArgumentError
from ..core.layer import Layer, Memory
from ..core.policy import Requirements
from ..core.types import Array, Namespace
from . import attention
from .protection import WindowPolicy

__all__ = ["CAKE", "adjust", "allocate", "cascade", "indicators", "preference"]


def indicators(rows: Array, /, *, kernel_size: int, gamma: float, xp: Namespace) -> Array:
    """Score the past by the mean of the window's attention and gamma times its variance.

    Parameters
    ----------
    rows : array, shape (batch, kv_heads, groups, W, N)
        Probabilities of the last W positions.
    kernel_size : int
        Odd width of the average along the tokens.
    gamma : float
        Weight of the variance over the window, which divides by W - 1; a window of one query has none.

    Returns
    -------
    array, shape (batch, kv_heads, N - W)
        At least 0.
    """
    past = _past(rows)
    raw = xp.mean(past, axis=-2) + gamma * _variance(past, xp=xp)
    return attention.group_heads(attention.pool(raw, kernel_size, "avg", xp=xp), "mean", xp=xp)


def preference(rows: Array, /, *, tau1: float = 1.0, tau2: float = 1.0, xp: Namespace) -> Array:
    """Return how much a layer wants: entropy of its attention to the past, times its variance over the window.

    Parameters
    ----------
    rows : array, shape (batch, kv_heads, groups, W, N)
        Probabilities of the last W positions.
    tau1, tau2 : float
        Temperatures: the entropy is raised to 1 / tau1, the variance to 1 / tau2.

    Returns
    -------
    array, shape (batch,)
        At least 0. One number per row of the batch; the official code has one for the batch.
    """
    past = _past(rows)
    axes = tuple(range(1, past.ndim))
    entropy = -xp.sum(past * xp.log(past + 1e-10), axis=axes)
    # log(1 + 1e-10) may be a hair above 0.
    entropy = xp.maximum(entropy, xp.zeros_like(entropy))
    variance = xp.sum(_variance(past, xp=xp), axis=axes[:-1])
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def allocate(preferences: Sequence[float], total: int, most: int, least: int = 0, /) -> list[int]:
    r"""Share tokens out over layers in proportion to their preferences, as whole numbers with an exact sum.

    The :math:`s`-th token of layer :math:`l` has the claim :math:`p_l / (2 s - 1)`. After `least` tokens each, the
    highest claims are served; equal ones by :math:`s`, then by layer. That is proportional sharing with rounding to the
    nearest (Webster's rule), within bounds.

    Parameters
    ----------
    preferences : sequence of float
        One per layer, finite and at least 0.
    total : int
        Tokens of all layers together.
    most, least : int
        What a layer gets at most and at least.

    Returns
    -------
    list of int
        Of sum `total`, or the nearest sum that the bounds allow.

    Raises
    ------
    ArgumentError
        If a preference is negative or not finite, a count negative or `least` above `most`.
    ArgumentTypeError
        If a number has the wrong type.

    Notes
    -----
    A further layer only adds claims, so nobody's share grows when one joins: a cache that is evicted while the layers
    come in (`cascade`) ends where one allocation over all layers would. Largest remainders do not have that property.
    The official code's `adjust` does not either.

    Examples
    --------
    Claims of 6 : 3 : 1 on ten tokens, and the same with at most four each:

    >>> allocate([6.0, 3.0, 1.0], 10, 100)
    [6, 3, 1]
    >>> allocate([6.0, 3.0, 1.0], 10, 4)
    [4, 4, 2]
    """
    shares = [checks.finite_weight(f"preferences[{layer}]", value) for layer, value in enumerate(preferences)]
    total, most, least = checks.count("total", total), checks.count("most", most), checks.count("least", least)
    if least > most:
        raise ArgumentError(f"least must be at most most={most}; got {least}")
    wanting = [layer for layer, share in enumerate(shares) if share > 0]
    others = [layer for layer, share in enumerate(shares) if share == 0]
    # A claim of 0 comes after all others, and equal claims are served in turn.
    served = max(len(wanting) * least, min(total - len(others) * least, len(wanting) * most))
    result = [0] * len(shares)
    for layer, amount in zip(
        wanting, _by_claims([shares[layer] for layer in wanting], served, most, least), strict=True
    ):
        result[layer] = amount
    each, more = divmod(max(0, total - served), max(1, len(others)))
    for place, layer in enumerate(others):
        result[layer] = min(most, max(least, each + (place < more)))
    return result


def cascade(preferences: Sequence[float], total: int, most: int, least: int = 0, /) -> list[list[int]]:
    """Give the shares after each layer: entry m holds those of the layers 0 to m.

    After layer m exactly min(total, (m + 1) most) tokens are shared out, no layer's share ever grows, and the last
    entry is ``allocate(preferences, total, most, least)``.

    Returns
    -------
    list of list of int

    Examples
    --------
    >>> cascade([1.0, 3.0, 2.0], 12, 8)
    [[8], [4, 8], [2, 6, 4]]
    """
    return [allocate(preferences[: layer + 1], total, most, least) for layer in range(len(preferences))]


def adjust(shares: Sequence[float], total: int, most: int, /) -> list[int]:
    """Round and clip shares as the official code does, in one pass and not always to the total.

    Shares are cut to integers and clipped; what was clipped goes evenly to the layers below the limit, the first ones
    taking the remainder; then a lack goes evenly to the layers below the limit, which may exceed it, and an excess
    comes evenly from the layers above 1.

    Examples
    --------
    >>> adjust([5.9, 3.2, 1.1, 20.0], 30, 12)
    [9, 6, 3, 12]
    """
    result = [int(share) for share in shares]
    clipped = sum(max(0, amount - most) for amount in result)
    result = [min(amount, most) for amount in result]
    result = _spread(result, clipped, [layer for layer, amount in enumerate(result) if amount < most])
    lack = total - sum(result)
    if lack > 0:
        return _spread(result, lack, [layer for layer, amount in enumerate(result) if amount < most])
    taken = _spread([0] * len(result), -lack, [layer for layer, amount in enumerate(result) if amount > 1])
    return [amount - less for amount, less in zip(result, taken, strict=True)]


def _spread(amounts: list[int], extra: int, layers: list[int], /) -> list[int]:
    """Add to some layers evenly, one more to the first of them."""
    result = list(amounts)
    each, more = divmod(extra, max(1, len(layers)))
    for place, layer in enumerate(layers):
        result[layer] += each + (place < more)
    return result


def _by_claims(shares: list[float], total: int, most: int, least: int, /) -> list[int]:
    """Serve the highest claims p / (2 s - 1): all above a common level, then one by one at the level."""
    if not shares:
        return []
    exact = [Fraction(share) / Fraction(max(shares)) for share in shares]
    near = [float(share) for share in exact]
    low, high = 0.25, (most + 1) / max(min(near), 1e-300)
    for _ in range(60):
        level = sqrt(low) * sqrt(high)
        served = sum(max(least, floor(min(most, level * share) + 0.5)) for share in near)
        low, high = (level, high) if served < total else (low, level)
    result = [min(most, max(least, floor(Fraction(high) * share + Fraction(1, 2)))) for share in exact]

    def claim(layer: int, token: int) -> tuple[Fraction, int, int]:
        # Lower comes first.
        return -exact[layer] / (2 * token - 1), token, layer

    layers = range(len(shares))
    while sum(result) < total:
        result[min((x for x in layers if result[x] < most), key=lambda x: claim(x, result[x] + 1))] += 1
    while sum(result) > total:
        result[max((x for x in layers if result[x] > least), key=lambda x: claim(x, result[x]))] -= 1
    return result


def _past(rows: Array, /) -> Array:
    """Drop the window's own columns."""
    window, num_tokens = rows.shape[-2:]
    return rows[..., : num_tokens - window]


def _variance(past: Array, /, *, xp: Namespace) -> Array:
    """Return the unbiased variance over the window's queries; 0 for a single one."""
    deviation = past - xp.mean(past, axis=-2, keepdims=True)
    return xp.sum(deviation * deviation, axis=-2) / max(1, past.shape[-2] - 1)


@dataclass(frozen=True, kw_only=True)
class CAKE(WindowPolicy):
    r"""Keep tokens that the window attends to or changes its mind about, and give layers what they prefer.

    The importance of a past token is :math:`\operatorname{pool}(\operatorname{mean}_q A_{qj} + \gamma
    \operatorname{var}_q A_{qj})` over the last `window` queries, averaged over the query heads of its KV head. The
    window is always kept.

    A layer's preference is :math:`H^{1/\tau_1} V^{1/\tau_2}`, with the entropy :math:`H` of its attention to the past
    and the sum :math:`V` of its variance over the window. This policy alone gives every layer the same budget. With the
    preferences of all layers at hand, `share_out` makes every layer's budget, which `evict` takes.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head in the average layer, window and sinks included; a float is a share of the tokens.
    window : int
        W, the observation window. A prompt shorter than that is all window.
    kernel_size : int
        Odd width of the average along the tokens, which divides by the whole kernel at the edges too.
    num_sinks : int
        First tokens that are kept as well. The paper keeps none on purpose.
    gamma : float
        Weight of the variance, at least 0.
    tau1, tau2 : float
        Temperatures of entropy and variance in the preference, above 0. The paper tunes them per model and budget.
    schedule : str
        ``"exact"`` or ``"code"``, see `share_out`.

    Raises
    ------
    ArgumentError
        If an option is out of range or `kernel_size` even.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    Importance has shape (batch, kv_heads, N) and is at least 0. A window of one query has no variance here, where the
    official code would give NaN.

    The official code computes mean and variance in the model's precision, sums the preference over the batch, leaves
    prompts up to a window longer than the budget alone, and evicts again whenever a layer joins. Its integer budgets
    (`adjust`) miss the total when a layer's share exceeds its tokens: what is clipped there goes evenly to the other
    layers, so that their budgets can grow again after tokens have been evicted, and the tokens kept fall below the
    total. In the exact schedule shares never grow, so evicting once at the end and evicting at every layer keep the
    same numbers.

    References
    ----------
    .. [1] Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv:2503.12491.

    Examples
    --------
    Two queries in the window. Token 0 gets .2 and .2, token 1 gets 0 and .3: its mean is less, its variance .045 is
    more.

    >>> import numpy as np
    >>> from graphkv import CAKE, evict
    >>> rows = np.asarray([[[[0.2, 0.0, 0.8, 0.0], [0.2, 0.3, 0.3, 0.2]]]])
    >>> keys = np.ones((1, 1, 4, 2))
    >>> evict(CAKE(budget=3, window=2, kernel_size=1), keys, attention=rows).kept
    array([[[1, 2, 3]]])
    >>> evict(CAKE(budget=3, window=2, kernel_size=1, gamma=0.0), keys, attention=rows).kept
    array([[[0, 2, 3]]])
    """

    requirements: ClassVar[Requirements] = replace(WindowPolicy.requirements, wants=True)

    kernel_size: int = 5
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    schedule: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.finite_weight("gamma", self.gamma)
        for name, tau in (("tau1", self.tau1), ("tau2", self.tau2)):
            if checks.finite_weight(name, tau) == 0:
                raise ArgumentError(f"{name} must be above 0; got {tau}")
        checks.choice("schedule", self.schedule, ("exact", "code"))

    @classmethod
    def official(cls, budget: int | float, /, *, tau1: float = 1.0, tau2: float = 1.0) -> CAKE:
        """Return the choices of the official code: its integer budgets, a window of 32 and an average over 5 tokens.

        Scores in half precision, preferences summed over the batch and the eviction layer by layer are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head in the average layer, window included.
        tau1, tau2 : float
            The official code has a pair for each of some models and budgets, and 1 for all others.

        Returns
        -------
        CAKE
        """
        return cls(budget=budget, window=32, kernel_size=5, gamma=200.0, tau1=tau1, tau2=tau2, schedule="code")

    def score_past(self, layer: Layer, window: int, /) -> Array:
        """Weigh mean and variance."""
        rows = attention.last_rows(layer, window)
        return indicators(rows, kernel_size=self.kernel_size, gamma=self.gamma, xp=layer.xp)

    def wants(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Return the layer's preference, one number per row of the batch; see `share_out`."""
        rows = attention.last_rows(layer, self.num_queries(layer.num_tokens))
        return preference(rows, tau1=self.tau1, tau2=self.tau2, xp=layer.xp)

    def share_out(self, wants: Sequence[float], num_tokens: int, /) -> list[int]:
        """Share the budgets of all layers out by their preferences.

        Parameters
        ----------
        wants : sequence of float
            One preference per layer.
        num_tokens : int
            N, tokens in the cache.

        Returns
        -------
        list of int
            Window and sinks included. In the exact schedule they add up to exactly layers x budget. A budget that
            covers the prompt, or does not cover window and sinks, is the same for every layer.

        Raises
        ------
        ArgumentError
            If a preference is negative or not finite, or `num_tokens` negative.
        ArgumentTypeError
            If a number has the wrong type.

        Examples
        --------
        >>> CAKE(budget=10, window=4).share_out([6.0, 3.0, 0.0], 100)
        [16, 10, 4]
        """
        num_layers = len(wants)
        average = budgets.tokens_of(self.budget, checks.count("num_tokens", num_tokens))
        least = self.protection(average).count
        shares = [checks.finite_weight(f"wants[{layer}]", value) for layer, value in enumerate(wants)]
        if not least < average < num_tokens:
            return [average] * num_layers
        total, most = num_layers * (average - least), num_tokens - least
        if self.schedule == "exact":
            return [least + share for share in allocate(shares, total, most)]
        wanted = sum(shares)
        parts = [share / wanted * total if wanted else total / num_layers for share in shares]
        # The official code clips once more where it selects.
        return [least + min(share, most) for share in adjust(parts, total, most)]
