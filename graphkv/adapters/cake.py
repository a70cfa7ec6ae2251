"""CAKE: more tokens for layers whose attention is spread out and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..core import budgets, checks
from ..core.errors import ArgumentError
from ..core.layer import Layer, Memory
from ..core.policy import Requirements
from ..core.types import Array, Namespace
from . import attention
from .protection import WindowPolicy

__all__ = ["CAKE", "indicators", "preference"]


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
    # log(1 + 1e-10) may be slightly above 0.
    entropy = xp.maximum(entropy, xp.zeros_like(entropy))
    variance = xp.sum(_variance(past, xp=xp), axis=axes[:-1])
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


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
    r"""Keep tokens that the window attends to, steadily or in turns, and share budgets out by the layers' preferences.

    The importance of a past token is :math:`\operatorname{pool}(\operatorname{mean}_q A_{qj} + \gamma
    \operatorname{var}_q A_{qj})` over the last `window` queries, averaged over the query heads of its KV head. The
    window is always kept.

    A layer's preference is :math:`H^{1/\tau_1} V^{1/\tau_2}`, with the entropy :math:`H` of its attention to the past
    and the sum :math:`V` of its variance over the window. This policy alone gives every layer the same budget. With the
    preferences of all layers, `share_out` returns every layer's budget, which `evict` takes.

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
            return [least + share for share in budgets.allocate(shares, total, most)]
        wanted = sum(shares)
        parts = [share / wanted * total if wanted else total / num_layers for share in shares]
        # The official code clips once more where it selects.
        return [least + min(share, most) for share in budgets.adjust(parts, total, most)]
