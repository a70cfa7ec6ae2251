"""Budgets are plain integers: arrays never enter here."""

from __future__ import annotations

__all__ = ["count_of", "share_of", "tokens_of"]


def tokens_of(budget: int | float, num_tokens: int, /) -> int:
    """Give a budget in tokens.

    A float is a share of the tokens, rounded half up from the decimal number that was written: 0.9 of 100 is 90.

    >>> tokens_of(0.9, 100), tokens_of(0.145, 100), tokens_of(64, 100)
    (90, 15, 64)
    """
    if hasattr(budget, "__index__"):
        return int(budget)
    numerator, denominator = _as_written(budget)
    return (2 * numerator * num_tokens + denominator) // (2 * denominator)


def count_of(amount: int | float, total: int, /) -> int:
    """Give a count: an integer as it is, a float as a share of the total, rounded down but at least 1 above 0.

    >>> count_of(0.3, 480), count_of(0.3, 2), count_of(0.0, 480), count_of(8, 2)
    (144, 1, 0, 8)
    """
    if hasattr(amount, "__index__"):
        return int(amount)
    return max(1, share_of(amount, total)) if amount > 0 else 0


def share_of(share: float, total: int, /) -> int:
    """Give a share of the total, rounded down from the decimal number that was written.

    >>> share_of(0.29, 100), share_of(1e-3, 999)
    (29, 0)
    """
    numerator, denominator = _as_written(share)
    return numerator * total // denominator


def _as_written(number: float, /) -> tuple[int, int]:
    """Give the decimal number that was written for a float of at least 0 as a fraction, in plain integers.

    A `fractions.Fraction` would do the same, but torch.compile cannot look into it.
    """
    mantissa, _, exponent = repr(float(number)).partition("e")
    whole, _, decimals = mantissa.partition(".")
    power = int(exponent or "0") - len(decimals)
    digits = int(whole + decimals)
    return (digits * 10**power, 1) if power >= 0 else (digits, 10**-power)
