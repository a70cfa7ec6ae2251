"""PyramidKV: SnapKV with more tokens in lower layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import budgets, checks
from .snapkv import SnapKV

__all__ = ["PyramidKV", "code_schedule", "exact_schedule", "layer_budgets"]


def layer_budgets(
    num_layers: int, budget: int, num_tokens: int, /, *, least: int = 0, beta: int = 20, schedule: str = "exact"
) -> list[int]:
    """Share a budget out over the layers, lower layers first.

    Parameters
    ----------
    num_layers : int
    budget : int
        Tokens per layer on average, with the protected ones.
    num_tokens : int
        N, tokens in the cache.
    least : int
        Protected tokens, which every layer keeps: the observation window, and the sinks in the exact schedule.
    beta : int
        The last layer chooses about 1 / beta of an average layer's share. At least 1, which is no pyramid.
    schedule : str
        ``"exact"`` or ``"code"``.

    Returns
    -------
    list of int
        One budget per layer, protected tokens included.

    Raises
    ------
    ArgumentError
        If a number is out of range or `schedule` unknown.
    ArgumentTypeError
        If a number is not an integer.

    Examples
    --------
    >>> layer_budgets(5, 100, 4000, beta=20)
    [195, 148, 100, 52, 5]
    >>> layer_budgets(4, 48, 300, least=8, schedule="code")
    [86, 61, 36, 11]
    """
    checks.count("num_layers", num_layers, minimum=1)
    checks.count("budget", budget)
    checks.count("num_tokens", num_tokens)
    checks.count("least", least)
    checks.count("beta", beta, minimum=1)
    make = {"exact": exact_schedule, "code": code_schedule}[checks.choice("schedule", schedule, ("exact", "code"))]
    return make(num_layers, budget, num_tokens, least, beta)


def exact_schedule(num_layers: int, budget: int, num_tokens: int, least: int, beta: int, /) -> list[int]:
    """Fall linearly from the first layer to the last, with a sum of exactly layers x budget.

    A layer and its mirror image share two budgets, whatever the rounding, and an odd layer in the middle has one. So
    the sum is exact and, as the upper half is rounded, the lower half follows. Where even the average does not cover
    the protected tokens, or the whole prompt fits, every layer gets the average.

    Returns
    -------
    list of int
        Never increasing; at least `least` and at most N wherever the average is.
    """
    if not least < budget < num_tokens:
        return [budget] * num_layers
    last = (budget - least) // beta
    first = min(2 * (budget - least) - last, num_tokens - least)
    fall, steps = 2 * (first - (budget - least)), num_layers - 1
    result = [budget] * num_layers
    for layer in range(num_layers // 2):
        # first - layer * fall / steps, rounded half up.
        open_tokens = (2 * (first * steps - layer * fall) + steps) // (2 * steps)
        result[layer] = least + open_tokens
        result[num_layers - 1 - layer] = 2 * budget - result[layer]
    return result


def code_schedule(num_layers: int, budget: int, num_tokens: int, window: int, beta: int, /) -> list[int]:
    """Return the integer schedule of the public code, whose sum exceeds layers x budget.

    With C the budget less the window: the first layer keeps 2 C - C // beta past tokens, each next one a whole number
    of tokens less. That step is rounded down, so up to layers x (layers - 2) / 2 tokens too many are kept. A prompt
    below 2 C has no pyramid. The code divides by 0 for a single layer and refuses a budget up to the window; both give
    the average here.

    Returns
    -------
    list of int
        Window included.
    """
    past = budget - window
    if num_layers == 1 or past <= 0 or num_tokens < budget or num_tokens < 2 * past:
        return [budget] * num_layers
    last = past // beta
    first = 2 * past - last
    if first >= num_tokens - window:
        first = num_tokens - window
        last = 2 * past - first
    step = (first - last) // (num_layers - 1)
    return [window + first - layer * step for layer in range(num_layers)]


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    r"""SnapKV with a budget that falls from the first layer to the last.

    With :math:`\bar b` the average of tokens to choose, layer :math:`l` of :math:`L` chooses
    :math:`b_0 - l \frac{b_0 - b_{L-1}}{L - 1}`, where :math:`b_{L-1} = \bar b / \beta` and
    :math:`b_0 = 2 \bar b - b_{L-1}`. Importance and window are those of `SnapKV`.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head in the average layer, window and sinks included; a float is a share of the tokens.
    window, kernel_size, pooling, group_reduction, num_sinks
        As in `SnapKV`.
    beta : int
        At least 1. The last layer chooses 1 / beta of the average.
    schedule : str
        ``"exact"``: the layers' budgets add up to exactly layers x budget, never increase, cover window and sinks
        where the average does and never exceed N where the average does not. ``"code"``: the integers of the public
        code, which keep up to layers / 2 - 1 tokens per layer more than asked.

    Raises
    ------
    ArgumentError
        If an option is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    The paper counts the window inside a layer's share, so that upper layers choose less than 1 / beta; the public code
    puts the window on top, and so do both schedules here. The public code leaves prompts below twice the budget, less
    the window, without a pyramid; the exact schedule flattens it only as far as N requires.

    References
    ----------
    .. [1] Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
       arXiv:2406.02069.

    Examples
    --------
    The average layer chooses 20 tokens beyond the window of 4, the last one 20 / 20 = 1 and the first one 39:

    >>> from graphkv import PyramidKV
    >>> policy = PyramidKV(budget=24, window=4)
    >>> [policy.layer_budget(1000, layer, 3) for layer in range(3)]
    [43, 24, 5]
    """

    beta: int = 20
    schedule: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("beta", self.beta, minimum=1)
        checks.choice("schedule", self.schedule, ("exact", "code"))

    @classmethod
    def official(cls, budget: int | float, /) -> PyramidKV:
        """Return the choices of the public code's LongBench runs: its schedule, a window of 8, maximum pooling over 7.

        Selection per query head, on keys that are repeated first, and scores in half precision are not expressed.

        Parameters
        ----------
        budget : int or float
            Tokens to keep per KV head in the average layer, window included.

        Returns
        -------
        PyramidKV
        """
        return cls(budget=budget, window=8, kernel_size=7, pooling="max", beta=20, schedule="code")

    def layer_budget(self, num_tokens: int, layer: int, num_layers: int, /) -> int:
        """Return the layer's place in the pyramid."""
        # The public code knows no sinks: they share its past tokens.
        least = self.window if self.schedule == "code" else self.window + self.num_sinks
        average = budgets.tokens_of(self.budget, num_tokens)
        return layer_budgets(num_layers, average, num_tokens, least=least, beta=self.beta, schedule=self.schedule)[
            layer
        ]
