"""Policies and signals as keys of tables and static arguments of compilers: equal where they mean the same only."""

import copy
import pickle

import numpy as np
import pytest

from graphkv import AdaKV, Bar, Decay, Degree, Enhance, GraphKV, KNorm, PageRank, SnapKV


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (KNorm(budget=1), KNorm(budget=1.0)),
        (AdaKV(KNorm(budget=1)), AdaKV(KNorm(budget=1.0))),
        (GraphKV(KNorm(budget=4), Decay(neighbors=1)), GraphKV(KNorm(budget=4), Decay(neighbors=1.0))),
        (KNorm(budget=4), SnapKV(budget=4)),
        (Decay(neighbors=1), Decay(neighbors=1.0)),
        (Decay(), Enhance()),
        (Degree(), PageRank()),
        (Degree(), KNorm(budget=4)),
    ],
    ids=["budget", "base", "neighbors", "class", "signal", "direction", "signals", "signal and policy"],
)
def test_what_means_something_else_is_not_equal(one, other):
    assert one != other
    assert len({one: 1, other: 2}) == 2
    assert hash(one) != hash(other)


@pytest.mark.parametrize("signal", [Decay(neighbors=1.0), Enhance(), Bar(neighbors=3), Degree(), PageRank()], ids=repr)
def test_a_copy_of_a_signal_is_equal(signal):
    for copied in (copy.copy(signal), copy.deepcopy(signal), pickle.loads(pickle.dumps(signal))):
        assert copied == signal
        assert hash(copied) == hash(signal)
        assert repr(copied) == repr(signal)


def test_what_means_the_same_is_equal():
    assert Decay() == Decay(neighbors=np.int64(2), rounds=1)
    assert hash(Decay()) == hash(Decay(neighbors=np.int64(2), rounds=1))
    assert GraphKV(AdaKV(KNorm(budget=4))) == GraphKV(AdaKV(KNorm(budget=4)))
    assert hash(GraphKV(AdaKV(KNorm(budget=4)))) == hash(GraphKV(AdaKV(KNorm(budget=4))))
    assert KNorm(budget=np.int64(4)) == KNorm(budget=4)
