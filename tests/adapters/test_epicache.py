"""EpiCache against loops over the formula of its public code."""

import numpy as np
import pytest

from graphkv import ArgumentError, EpiCache, KVzip, Probe, evict
from tests.adapters.test_kvzip import KEYS, VALID, probes
from tests.core.test_asking import in_library, most_by_loops, of_row
from tests.support.arrays import each_library, make


@each_library
def test_importance_equals_loops(backend):
    """Every token competes with every other, the prompt gives itself nothing, and what it is about does not matter."""
    asked = probes()
    done = evict(
        EpiCache(budget=6, block_size=3),
        make(backend, KEYS, np.float64),
        valid=make(backend, VALID, bool),
        probes=[in_library(probe, backend) for probe in asked],
        backend=backend,
    )

    for row in range(2):
        seen = np.broadcast_to(VALID[row], (2, 12))
        expected = np.maximum(*(most_by_loops(of_row(probe, row), KEYS[row], seen, False) for probe in asked))
        np.testing.assert_allclose(backend.to_numpy(done.importance)[row], expected, rtol=1e-12)


def test_a_prompt_that_sees_itself_gives_less():
    asked = Probe(queries=probes()[0].queries, keys=probes()[0].keys)
    ours, theirs = (evict(kind(budget=6), KEYS, probes=asked).importance for kind in (EpiCache, KVzip))

    assert (ours > theirs).all()
    with pytest.raises(ArgumentError, match="block_size must be at least 1; got 0"):
        EpiCache(budget=6, block_size=0)
