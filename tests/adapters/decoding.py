"""A model's cache under `evict`: the prompt in one call, then token by token."""

import numpy as np

from graphkv import evict
from tests.support.arrays import make


def decode(policy, keys, queries, prompt, backend, *, values=None, valid=None, dtype=np.float64, chunk=1):
    """Return the decision and the stored positions, (batch, kv_heads, b), after the prompt and each later chunk.

    keys (batch, kv_heads, N, D), queries (batch, query_heads, N, D), valid (batch, N).
    """
    batch, kv_heads, total, _ = keys.shape
    valid = np.ones((batch, total), bool) if valid is None else valid
    valid = np.broadcast_to(valid[:, None, :], (batch, kv_heads, total))
    stored = np.zeros((batch, kv_heads, 0), np.int64)
    state, steps, start = None, [], 0
    # A window is read anew at every call; a running sum must see each query once.
    window = policy.num_queries if policy.needs().queries == "window" else lambda num_tokens: 0
    while start < total:
        stop = prompt if start == 0 else min(start + chunk, total)
        new = np.broadcast_to(np.arange(start, stop), (batch, kv_heads, stop - start))
        stored = np.concatenate([stored, new], axis=-1)
        first = min(start, stop - window(stored.shape[2]))
        decision = evict(
            policy,
            make(backend, np.take_along_axis(keys, stored[..., None], 2), dtype),
            values=None if values is None else make(backend, np.take_along_axis(values, stored[..., None], 2), dtype),
            queries=make(backend, queries[:, :, first:stop], dtype),
            # Whatever was asked; only policies with probes look.
            probes=make(backend, queries[:, :, max(0, stop - 3) : stop], dtype),
            valid=make(backend, np.take_along_axis(valid, stored, 2), bool),
            state=state,
            backend=backend,
        )
        stored = np.take_along_axis(stored, backend.to_numpy(decision.kept), 2)
        state = decision.state
        steps.append((decision, stored))
        start = stop
    return steps
