"""Policies as keys of tables and static arguments of compilers: equal where they mean the same, and nowhere else."""

import numpy as np
import pytest

from graphkv import AdaKV, Decay, GraphKV, KNorm, SnapKV


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (KNorm(budget=1), KNorm(budget=1.0)),
        (AdaKV(KNorm(budget=1)), AdaKV(KNorm(budget=1.0))),
        (
            GraphKV(KNorm(budget=4), Decay(neighbors=1)),
            GraphKV(KNorm(budget=4), Decay(neighbors=1.0)),
        ),
        (KNorm(budget=4), SnapKV(budget=4)),
    ],
    ids=["budget", "base", "neighbors", "class"],
)
def test_policies_that_mean_something_else_are_not_equal(one, other):
    assert one != other
    assert len({one: 1, other: 2}) == 2
    assert hash(one) != hash(other)


def test_policies_that_mean_the_same_are_equal():
    assert GraphKV(AdaKV(KNorm(budget=4))) == GraphKV(AdaKV(KNorm(budget=4)))
    assert hash(GraphKV(AdaKV(KNorm(budget=4)))) == hash(GraphKV(AdaKV(KNorm(budget=4))))
    assert KNorm(budget=np.int64(4)) == KNorm(budget=4)
