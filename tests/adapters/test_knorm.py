"""KNorm against published choices and a loop."""

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, KNorm, evict
from tests.support.arrays import each_backend, make

VECTORS = json.loads((Path(__file__).parent / "knorm_vectors.json").read_text())["cases"]


@each_backend
@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["budget"]))
def test_knorm_keeps_what_the_public_code_keeps(backend, case):
    done = evict(KNorm(budget=case["budget"]), make(backend, case["keys"]), backend=backend)

    assert backend.to_numpy(done.kept).tolist() == case["kept"]


def test_there_is_a_vector():
    assert VECTORS


@each_backend
def test_importance_is_minus_the_norm(backend):
    keys = np.random.default_rng(4).normal(size=(2, 3, 11, 5))

    done = evict(KNorm(budget=4), make(backend, keys, np.float64), backend=backend)

    expected = [[[-sqrt(sum(x * x for x in key)) for key in head] for head in row] for row in keys.tolist()]
    np.testing.assert_allclose(backend.to_numpy(done.importance), expected, rtol=1e-14)


@each_backend
def test_equal_norms_go_by_position_and_sinks_come_first(backend):
    keys = make(backend, np.asarray([9, 2, 1, 2, -2, 8.0])[None, None, :, None])

    assert backend.to_numpy(evict(KNorm(budget=3), keys, backend=backend).kept).tolist() == [[[1, 2, 3]]]
    kept = evict(KNorm(budget=3, num_sinks=1), keys, backend=backend).kept
    assert backend.to_numpy(kept).tolist() == [[[0, 1, 2]]]


def test_sinks_are_counted_without_padding():
    keys = np.asarray([9, 9, 8, 7, 1, 2.0])[None, None, :, None]
    valid = np.asarray([[False, False, True, True, True, True]])

    assert evict(KNorm(budget=2, num_sinks=1), keys, valid=valid).kept.tolist() == [[[2, 4]]]


def test_official_is_the_default_for_a_number_of_tokens_and_refuses_a_share():
    assert KNorm.official(5) == KNorm(budget=5)
    # The official code would keep ceil(0.25 * 10) = 3 tokens of a quarter; half up is 3 as well, but 0.21 is not.
    assert evict(KNorm(budget=0.21), np.ones((1, 1, 10, 1))).kept.shape == (1, 1, 2)
    with pytest.raises(ArgumentTypeError, match="budget must be an integer"):
        KNorm.official(0.21)


def test_options_are_checked():
    with pytest.raises(ArgumentError, match="num_sinks"):
        KNorm(budget=3, num_sinks=-1)
