"""A backend of forty lines: NumPy, ranking by a sort and adding by histogram."""

from math import prod

import array_api_compat.numpy as xp
import numpy as np

from graphkv import Backend


def top_k(scores, k, tiers, *, backend):
    """Rank: lower tier, then numbers before NaN, then higher score, then lower index."""
    is_nan = np.isnan(scores)
    tiers = np.zeros(scores.shape, np.int32) if tiers is None else tiers
    # The last key comes first. The sort is stable, so equal scores stay in place.
    best_first = np.lexsort((-np.where(is_nan, 0, scores), is_nan, tiers), axis=-1)
    return best_first[..., :k]


def segment_product(values, index, num_segments, *, backend):
    """Multiply the values of each row that share an index; 1 where there are none."""
    target, shape = _flat(values, index, num_segments)
    product = np.ones(prod(shape), values.dtype)
    np.multiply.at(product, target, values.ravel())
    return product.reshape(shape)


def segment_sum(values, index, num_segments, *, backend):
    """Add the values of each row that share an index; 0 where there are none."""
    target, shape = _flat(values, index, num_segments)
    total = np.bincount(target, weights=values.ravel(), minlength=prod(shape))
    return total.reshape(shape).astype(values.dtype)


def _flat(values, index, num_segments):
    """Number the segments of every row apart."""
    *leading, _ = values.shape
    first = np.arange(prod(leading)).reshape(*leading, 1) * num_segments
    return (index + first).ravel(), (*leading, num_segments)


def quiet(array):
    """NumPy warns of overflow, and no value is to be complained about."""
    return np.errstate(all="ignore")


PRIMITIVES = {"top_k": top_k, "segment_product": segment_product, "segment_sum": segment_sum}
BACKEND = Backend(name="sorting", library="numpy", xp=xp, to_numpy=np.asarray, guard=quiet, **PRIMITIVES)
