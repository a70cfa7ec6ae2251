"""Budgets are plain integers: arrays never enter here."""

from __future__ import annotations

from fractions import Fraction
from math import floor

__all__ = ["count_of", "tokens_of"]


def tokens_of(budget: int | float, num_tokens: int, /) -> int:
    """Give a budget in tokens.

    A float is a share of the tokens, rounded half up from the decimal number that was written: 0.9 of 100 is 90.

    >>> tokens_of(0.9, 100), tokens_of(0.145, 100), tokens_of(64, 100)
    (90, 15, 64)
    """
    if hasattr(budget, "__index__"):
        return int(budget)
    return floor(Fraction(repr(float(budget))) * num_tokens + Fraction(1, 2))


def count_of(amount: int | float, total: int, /) -> int:
    """Give a count: an integer as it is, a float as a share of the total, rounded down but at least 1 above 0.

    >>> count_of(0.3, 480), count_of(0.3, 2), count_of(0.0, 480), count_of(8, 2)
    (144, 1, 0, 8)
    """
    if hasattr(amount, "__index__"):
        return int(amount)
    return max(1, floor(Fraction(repr(float(amount))) * total)) if amount > 0 else 0
