"""Budgets as plain integers, and how layers share them; arrays never enter here."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import cos, floor, pi, sqrt

from . import checks
from .errors import ArgumentError

__all__ = [
    "adjust",
    "allocate",
    "as_written",
    "cascade",
    "count_of",
    "cut_again",
    "sensitivities",
    "share_of",
    "tokens_of",
]


def tokens_of(budget: int | float, num_tokens: int, /) -> int:
    """Return a budget in tokens.

    A float is a share of the tokens, rounded half up from the decimal number as written: 0.9 of 100 is 90.

    >>> tokens_of(0.9, 100), tokens_of(0.145, 100), tokens_of(64, 100)
    (90, 15, 64)
    """
    if checks.is_whole(budget):
        return int(budget)
    numerator, denominator = as_written(budget)
    return (2 * numerator * num_tokens + denominator) // (2 * denominator)


def count_of(amount: int | float, total: int, /) -> int:
    """Return a count: an integer as it is, a float as a share of the total, rounded down but at least 1 above 0.

    >>> count_of(0.3, 480), count_of(0.3, 2), count_of(0.0, 480), count_of(8, 2)
    (144, 1, 0, 8)
    """
    if checks.is_whole(amount):
        return int(amount)
    return max(1, share_of(amount, total)) if amount > 0 else 0


def share_of(share: float, total: int, /) -> int:
    """Return a share of the total, rounded down from the decimal number as written.

    >>> share_of(0.29, 100), share_of(1e-3, 999)
    (29, 0)
    """
    numerator, denominator = as_written(share)
    return numerator * total // denominator


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
        The most and the fewest tokens of a layer.

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
    A further layer only adds claims, so no share grows when one joins: a cache that is evicted layer by layer
    (`cascade`) ends where one allocation over all layers would. Largest remainders do not have that property, and
    neither does `adjust`.

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
    """Return the shares after each layer: entry m holds those of the layers 0 to m.

    After layer m exactly min(total, (m + 1) most) tokens are shared out. No layer's share ever grows, and the last
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
    """Round and clip shares as the official code of CAKE does, in one pass and not always to the total.

    Shares are cut to integers and clipped; what was clipped goes evenly to the layers below the limit, the remainder to
    the first of them; then a deficit goes evenly to the layers below the limit, which may exceed it, and a surplus is
    taken evenly from the layers above 1.

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


def cut_again(num_layers: int, least: float = 0.9, /) -> list[float]:
    r"""Return the shares of PyramidInfer: every layer keeps a part of what the layer below has kept.

    Layer :math:`l` of :math:`L` cuts to :math:`\rho_l = \rho + (1 - \rho) (\cos(\pi l / L) + 1) / 2`, so that its share
    is :math:`\prod_{i \le l} \rho_i`. The first layer cuts nothing.

    Parameters
    ----------
    num_layers : int
        L, at least 1.
    least : float
        :math:`\rho`, in [0, 1].

    Returns
    -------
    list of float
        One share of the whole prompt per layer, never increasing.

    Raises
    ------
    ArgumentError
        If a number is out of range.
    ArgumentTypeError
        If a number has the wrong type.

    References
    ----------
    .. [1] Yang et al., "PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference",
       arXiv:2405.12532. The factor is that of its public code.

    Examples
    --------
    A fifth of the text survives 32 layers:

    >>> [round(share, 4) for share in (cut_again(4)[1], cut_again(32)[-1])]
    [0.9854, 0.1997]
    """
    num_layers, least = checks.count("num_layers", num_layers, minimum=1), checks.fraction("least", least)
    shares, left = [], 1.0
    for layer in range(num_layers):
        left *= least + (1 - least) * (cos(pi * layer / num_layers) + 1) / 2
        shares.append(left)
    return shares


def sensitivities(similarities: Sequence[float], power: float = 1.1, /) -> list[float]:
    r"""Return how much each layer wants, by how like its keys stay when the model sees blocks of the text only.

    With :math:`x` the similarities, shifted and scaled to [0, 1], a layer wants :math:`(1 - x)^p`: the less alike, the
    more. All want the same if all are equal.

    Parameters
    ----------
    similarities : sequence of float
        One per layer, finite; `key_similarity` of `graphkv.adapters.per_layer` measures them.
    power : float
        p, at least 0. 0: all want the same.

    Returns
    -------
    list of float
        One per layer, in [0, 1].

    Raises
    ------
    ArgumentError
        If a number is not finite or `power` negative.
    ArgumentTypeError
        If a number has the wrong type.

    References
    ----------
    .. [1] Kim et al., "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
       arXiv:2509.17396, layer-wise budget allocation.

    Examples
    --------
    >>> sensitivities([0.75, 0.25, 0.5], 1)
    [0.0, 1.0, 0.5]
    """
    power = checks.finite_weight("power", power)
    given = [checks.finite_number(f"similarities[{layer}]", value) for layer, value in enumerate(similarities)]
    low, high = min(given, default=0.0), max(given, default=0.0)
    if low == high or power == 0:
        return [1.0] * len(given)
    return [(1 - (value - low) / (high - low)) ** power for value in given]


def as_written(number: float, /) -> tuple[int, int]:
    """Return a float >= 0, as the decimal number that was written, as a fraction in plain integers.

    A `fractions.Fraction` would do the same, but torch.compile cannot trace it.
    """
    mantissa, _, exponent = repr(float(number)).partition("e")
    whole, _, decimals = mantissa.partition(".")
    power = int(exponent or "0") - len(decimals)
    digits = int(whole + decimals)
    return (digits * 10**power, 1) if power >= 0 else (digits, 10**-power)


def _spread(amounts: list[int], extra: int, layers: list[int], /) -> list[int]:
    """Add to some layers evenly, the remainder to the first of them."""
    result = list(amounts)
    each, more = divmod(extra, max(1, len(layers)))
    for place, layer in enumerate(layers):
        result[layer] += each + (place < more)
    return result


def _by_claims(shares: list[float], total: int, most: int, least: int, /) -> list[int]:
    """Serve the highest claims p / (2 s - 1): all above a common level, then one by one at that level."""
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
