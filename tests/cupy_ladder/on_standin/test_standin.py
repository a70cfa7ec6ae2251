"""The stand-in refuses what CuPy refuses, is hostile where CuPy promises nothing, and logs what would wait."""

from __future__ import annotations

import cupy as cp
import numpy as np
import pytest
import standin

HOST = np.arange(6.0, dtype=np.float32)


def x():
    return cp.asarray(HOST.reshape(2, 3))


def index(*values):
    return cp.asarray(np.asarray(values))


REFUSED = {
    "multiply.at": (NotImplementedError, lambda: cp.multiply.at(x(), index(0), 2.0)),
    "multiply.reduceat": (NotImplementedError, lambda: cp.multiply.reduceat(x(), index(0))),
    "maximum.reduce": (NotImplementedError, lambda: cp.maximum.reduce(x())),
    "add.at on int8": (TypeError, lambda: cp.add.at(cp.zeros(3, dtype=cp.int8), index(0), 1)),
    "argsort(stable=)": (TypeError, lambda: cp.argsort(x(), stable=True)),
    "argsort(kind='quicksort')": (ValueError, lambda: cp.argsort(x(), kind="quicksort")),
    "argpartition(kind=)": (TypeError, lambda: cp.argpartition(x(), 1, kind="introselect")),
    "argpartition out of bounds": (ValueError, lambda: cp.argpartition(x(), 9)),
    "take_along_axis(mode=)": (TypeError, lambda: cp.take_along_axis(x(), x(), 1, mode="clip")),
    "take_along_axis with another rank": (ValueError, lambda: cp.take_along_axis(x(), index(0), axis=1)),
    "take_along_axis with floats": (IndexError, lambda: cp.take_along_axis(x(), x(), axis=1)),
    "take(mode=)": (TypeError, lambda: cp.take(x(), index(0), mode="wrap")),
    "sum(where=)": (TypeError, lambda: cp.sum(x(), where=x() > 1)),
    "max(initial=)": (TypeError, lambda: cp.max(x(), initial=0)),
    "lexsort of a tuple": (TypeError, lambda: cp.lexsort((x(), x()))),
    "a float index": (IndexError, lambda: x()[x()]),
    "a host index": (TypeError, lambda: x()[np.asarray([0])]),
    "an index out of bounds": (IndexError, lambda: x()[index(7)]),
    "a host operand": (TypeError, lambda: x() + HOST[:3]),
    "a host operand on the left": (TypeError, lambda: HOST[:3] + x()),
    "a host argument": (TypeError, lambda: cp.concatenate([x(), HOST.reshape(2, 3)])),
    "a host value": (TypeError, lambda: x().__setitem__(0, HOST[:3])),
    "a list for an array": (TypeError, lambda: cp.sum([1.0, 2.0])),
    "np.asarray": (TypeError, lambda: np.asarray(x())),
    "range": (TypeError, lambda: range(index(3)[0])),
    "an array as a host index": (TypeError, lambda: [1, 2][index(1)[0]]),
    "a repeated index in an assignment": (RuntimeError, lambda: cp.zeros(3).__setitem__(index(1, 1), 2.0)),
    "ndarray()": (TypeError, lambda: cp.ndarray((2, 3))),
    "errstate": (AttributeError, lambda: cp.errstate),
    "top_k": (AttributeError, lambda: cp.top_k),
    "bfloat16": (AttributeError, lambda: cp.bfloat16),
    "a method that CuPy lacks": (AttributeError, lambda: x().to_device("cpu")),
    "what nobody has needed": (NotImplementedError, lambda: cp.kron(x(), x())),
}


@pytest.mark.parametrize(("error", "call"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(error, call):
    with pytest.raises(error):
        call()


WAITS = {
    "get": lambda: x().get(),
    "asnumpy": lambda: cp.asnumpy(x()),
    "item": lambda: cp.sum(x()).item(),
    "tolist": lambda: x().tolist(),
    "if": lambda: bool(cp.any(x())),
    "int": lambda: int(cp.sum(x())),
    "float": lambda: float(cp.sum(x())),
    "a boolean index": lambda: x()[x() > 1],
    "a boolean assignment": lambda: x().__setitem__(x() > 1, 0.0),
    "nonzero": lambda: cp.nonzero(x()),
    "where": lambda: cp.where(x()),
    "unique": lambda: cp.unique(x()),
    "bincount": lambda: cp.bincount(index(0, 1)),
    "array_equal": lambda: cp.array_equal(x(), x()),
    "allclose": lambda: cp.allclose(x(), x()),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_it_logs_what_waits_for_the_device(call):
    standin.SYNCS.clear()

    call()

    assert standin.SYNCS


def test_clip_of_array_api_compat_waits():
    import array_api_compat.cupy as xp

    standin.SYNCS.clear()

    xp.clip(x(), 1.0, 2.0)

    assert standin.SYNCS


def test_ordinary_work_waits_for_nothing():
    standin.SYNCS.clear()

    y = x()
    y += 1
    cp.where(y > 2, y, -y)[..., None][:, 1:].reshape(-1).astype(cp.float64).sum()
    cp.take_along_axis(y, cp.argsort(y, axis=-1), axis=-1)

    assert standin.SYNCS == []


def test_in_place_work_is_seen_by_an_alias():
    y = x()
    alias = y

    y *= 2

    assert alias.tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]


def test_tied_values_come_in_no_order_from_a_partition():
    ties = cp.zeros(64, dtype=cp.float32)

    first, second = (cp.argpartition(ties, 8)[:8].tolist() for _ in range(2))

    assert sorted(first) != list(range(8))
    assert first != second


def test_what_a_partition_selects_comes_unsorted():
    best = cp.partition(cp.arange(64), 31)[:32].tolist()

    assert sorted(best) == list(range(32))
    assert best != sorted(best)


def test_a_float_sum_by_atomics_differs_between_runs():
    values = cp.asarray(np.random.default_rng(0).normal(size=3000).astype(np.float32))

    def total() -> float:
        out = cp.zeros(1, dtype=cp.float32)
        cp.add.at(out, cp.zeros(3000, dtype=cp.int64), values)
        return out.tolist()[0]

    assert len({total() for _ in range(8)}) > 1


def test_a_running_sum_loses_digits():
    values = cp.asarray(np.asarray([1e8, 1.0, 1.0], dtype=np.float32))

    assert cp.add.reduceat(values, index(0, 1)).tolist() != [1e8, 2.0]


def test_subnormal_numbers_are_zero_in_arithmetic_as_with_ftz():
    assert (cp.asarray(np.asarray([1e-40], dtype=np.float32)) == 0).tolist() == [True]


def test_it_has_no_attribute_that_the_wheel_lacks():
    public = {name for name in vars(cp.ndarray) if not name.startswith("_")}

    assert public <= set(standin.MANIFEST["ndarray"])
    assert standin.PLAYED.keys() <= standin.MANIFEST["modules"]["cupy"].keys()
