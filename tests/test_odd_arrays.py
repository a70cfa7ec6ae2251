"""Arrays that are not one block of numbers are refused by name, whichever way they come."""

import numpy as np
import pytest

from graphkv import ArgumentTypeError, BackendError, build_graph, degree, fuse, select


class Dual(np.lib.mixins.NDArrayOperatorsMixin):
    """Has NumPy's operators, and is no array of NumPy's."""

    shape, dtype, ndim = (3,), np.dtype("float32"), 1


def sparse():
    import torch

    return torch.ones((2, 3)).to_sparse()


def nested():
    import torch

    return torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.strided)


ODD = {
    "a tensor of layout torch.sparse_coo": sparse,
    "a nested tensor": nested,
    "a masked array": lambda: np.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3)),
    "a matrix": lambda: np.asmatrix(np.ones((2, 3))),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
def test_arrays_that_are_no_block_of_numbers_are_named(kind):
    array = ODD[kind]()

    for call in (
        lambda: select(array, 1),
        lambda: degree(array),
        lambda: fuse(array, array),
        lambda: build_graph(array, array, num_sources=1, num_neighbors=1),
    ):
        with pytest.raises(ArgumentTypeError, match=f"must be a dense array; got {kind}"):
            call()


def test_operators_of_numpy_make_no_array_of_numpy():
    with pytest.raises(BackendError, match="backend must be given for arrays of 'tests'"):
        select(Dual(), 1)


def test_a_dtype_that_the_library_cannot_place_is_not_real():
    ml_dtypes = pytest.importorskip("ml_dtypes")

    with pytest.raises(ArgumentTypeError, match="scores must be real; got dtype bfloat16"):
        select(np.ones(3, ml_dtypes.bfloat16), 1)
