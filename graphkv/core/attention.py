"""Plain attention: the probabilities of some queries, and what every token receives of them."""

from __future__ import annotations

from math import sqrt

from . import primitives
from .backend import Backend, ReceivedAttention
from .layer import Probe
from .types import Array, Namespace

__all__ = [
    "highest_attention",
    "masked_softmax",
    "portable_received_attention",
    "received_attention",
    "window_attention",
]


def window_attention(
    queries: Array, keys: Array, valid: Array, /, *, mass: Array | None = None, xp: Namespace
) -> Array:
    """Compute the softmax attention of the last W positions to all N keys, causal inside the window.

    Query heads are folded into the rows of one product per KV head, so no key is repeated.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, W, D)
        The last W positions.
    keys : array, shape (batch, kv_heads, N, D)
    valid : array, shape (batch, kv_heads, N), bool
        Padding receives no attention, and a padded query gives none. Keys and queries that hold an infinity or NaN
        count as padding.
    mass : array, shape (batch, kv_heads, N), optional
        How many tokens each key stands for: its logarithm is added to the logits. Default: 1 each.

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, W, N)
        Probabilities.
    """
    if mass is not None:
        queries, keys = _with_mass(queries, keys, mass, xp=xp)
    queries, gives = primitives.finite_rows(queries, xp=xp)
    keys, receives = primitives.finite_rows(keys, xp=xp)
    batch, query_heads, window, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    groups = query_heads // kv_heads
    rows = xp.reshape(queries, (batch, kv_heads, groups * window, head_size))
    logits = rows @ xp.matrix_transpose(keys) / sqrt(max(head_size, 1))
    logits = xp.reshape(logits, (batch, kv_heads, groups, window, num_tokens))

    device = primitives.device_of(keys)
    query_position = xp.arange(num_tokens - window, num_tokens, dtype=xp.int64, device=device)[:, None]
    causal = xp.arange(num_tokens, dtype=xp.int64, device=device)[None, :] <= query_position
    gives = xp.reshape(gives, (batch, kv_heads, groups, window, 1))
    sees = (
        causal[None, None, None, :, :]
        & (valid & receives)[:, :, None, None, :]
        & valid[:, :, None, num_tokens - window :, None]
        & gives
    )
    return masked_softmax(logits, sees, xp=xp)


def highest_attention(
    probe: Probe,
    keys: Array,
    seen: Array,
    /,
    *,
    mass: Array | None = None,
    sees_itself: bool,
    block_size: int,
    xp: Namespace,
) -> Array:
    """Compute the most attention that any query of a probe gives each token, over the query heads of its KV head.

    Block by block, so that no more than `block_size` rows per query head exist at a time.

    Parameters
    ----------
    probe : Probe
        Its `about` does not matter here.
    keys : array, shape (batch, kv_heads, N, D)
        N at least 1.
    seen : array, shape (batch, kv_heads, N), bool
        The tokens that the softmax runs over. Keys and queries that hold an infinity or NaN count as padding.
    mass : array, shape (batch, kv_heads, N), optional
        As for `window_attention`; a token of the probe counts once.
    sees_itself : bool
        Whether it runs over the probe's own tokens as well, those up to the query's.
    block_size : int
        Queries per head processed at once. Affects rounding only.

    Returns
    -------
    array, shape (batch, kv_heads, N)
        Probabilities; 0 for tokens that are not seen.
    """
    keys, receives = primitives.finite_rows(keys, xp=xp)
    seen, (batch, kv_heads, num_tokens, head_size) = seen & receives, keys.shape
    own, device = probe.keys if sees_itself else None, primitives.device_of(keys)
    if own is not None:
        own, own_seen = primitives.finite_rows(own, xp=xp)
        own_seen = own_seen if probe.valid is None else own_seen & probe.valid[:, None, :]
    before = probe.before
    if before is None:
        before = xp.arange(num_tokens, 0, -1, dtype=xp.int64, device=device)[None, None, :]
    highest = xp.zeros((batch, kv_heads, num_tokens), dtype=keys.dtype, device=device)
    log_mass = None
    if mass is not None:
        seen, one = seen & (mass > 0), xp.ones_like(mass)
        log_mass = xp.astype(xp.log(xp.where(mass > 0, mass, one)), keys.dtype)[:, :, None, None, :]
    for start in range(0, probe.num_queries, block_size):
        end = min(start + block_size, probe.num_queries)
        queries, gives = primitives.finite_rows(probe.queries[:, :, start:end, :], xp=xp)
        query_heads, number = queries.shape[1], end - start
        if probe.valid is not None:
            gives = gives & probe.valid[:, None, start:end]
        rows = (batch, kv_heads, query_heads // kv_heads, number)
        folded = xp.reshape(queries, (batch, kv_heads, rows[2] * number, head_size))
        scale = sqrt(max(head_size, 1))
        logits = xp.reshape(folded @ xp.matrix_transpose(keys), (*rows, num_tokens)) / scale
        if log_mass is not None:
            logits = logits + log_mass
        at = xp.arange(start, end, dtype=xp.int64, device=device)[:, None]
        sees = seen[:, :, None, None, :]
        if probe.window is not None:
            sees = sees & (before[:, :, None, None, :] + at < probe.window)
        sees = xp.broadcast_to(sees, (*rows, num_tokens))
        if own is not None:
            to_own = xp.reshape(folded @ xp.matrix_transpose(own[:, :, :end, :]), (*rows, end)) / scale
            position = xp.arange(end, dtype=xp.int64, device=device)
            # A query that a window parts from its own probe sees nothing of the text either.
            causal = position[None, :] <= at
            sees_own = causal[None, None, None, :, :] & own_seen[:, :, None, None, :end]
            logits = xp.concat([logits, to_own], axis=-1)
            sees = xp.concat([sees, xp.broadcast_to(sees_own, (*rows, end))], axis=-1)
        sees = sees & xp.reshape(gives, (*rows, 1))
        weights = masked_softmax(logits, sees, xp=xp)[..., :num_tokens]
        highest = xp.maximum(highest, xp.max(weights, axis=(2, 3)))
    return highest


def masked_softmax(logits: Array, sees: Array, /, *, xp: Namespace) -> Array:
    """Compute probabilities over what each row sees; a row that sees nothing, such as a padded query's, is all zero."""
    logits = xp.where(sees, logits, xp.full_like(logits, -xp.inf))
    highest = xp.max(logits, axis=-1, keepdims=True)
    highest = xp.where(xp.isfinite(highest), highest, xp.zeros_like(highest))
    weight = xp.exp(logits - highest)
    total = xp.sum(weight, axis=-1, keepdims=True)
    return weight / xp.where(total > 0, total, xp.ones_like(total))


def _with_mass(queries: Array, keys: Array, mass: Array, /, *, xp: Namespace) -> tuple[Array, Array]:
    """Append one entry to queries and keys such that every scaled product gains the logarithm of the key's mass.

    So no kernel needs to know of masses. A mass of 0 makes an infinite key, which receives nothing.
    """
    head_size = keys.shape[-1]
    has_mass = mass > 0
    entry = xp.log(xp.where(has_mass, mass, xp.ones_like(mass)))
    entry = xp.astype(xp.where(has_mass, entry, xp.full_like(entry, -xp.inf)), keys.dtype)[..., None]
    # The scale is that of one entry more.
    queries = queries * sqrt((head_size + 1) / max(head_size, 1))
    one = xp.full(
        (*queries.shape[:-1], 1), sqrt(head_size + 1), dtype=queries.dtype, device=primitives.device_of(queries)
    )
    return xp.concat([queries, one], axis=-1), xp.concat([keys, entry], axis=-1)


def received_attention(
    queries: Array,
    keys: Array,
    valid: Array,
    /,
    *,
    mass: Array | None = None,
    block_size: int,
    backend: Backend,
) -> Array:
    """Sum the attention that each token receives from the last Q positions: the columns of `window_attention`.

    Parameters
    ----------
    queries : array, shape (batch, query_heads, Q, D)
        The last Q positions.
    keys : array, shape (batch, kv_heads, N, D)
    valid : array, shape (batch, kv_heads, N), bool
        As for `window_attention`.
    mass : array, shape (batch, kv_heads, N), optional
        As for `window_attention`.
    block_size : int
        Queries per head processed at once, unless a backend knows better. Affects rounding only.
    backend : Backend

    Returns
    -------
    array, shape (batch, kv_heads, query_heads / kv_heads, N)
    """
    if mass is not None:
        queries, keys = _with_mass(queries, keys, mass, xp=backend.xp)
    step: ReceivedAttention = backend.received_attention or portable_received_attention
    return step(queries, keys, valid, block_size=block_size, backend=backend)


def portable_received_attention(
    queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend
) -> Array:
    """Sum block by block, so that the rows never exist all at once: the specification of `received_attention`.

    A row needs only the keys up to its own position, and all of them are given, so its softmax needs no second pass.
    """
    xp = backend.xp
    batch, query_heads, num_queries, _ = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    shape = (batch, kv_heads, query_heads // kv_heads, num_tokens)
    total = xp.zeros(shape, dtype=keys.dtype, device=primitives.device_of(keys))
    for start in range(0, num_queries, block_size):
        stop = min(start + block_size, num_queries)
        end = num_tokens - num_queries + stop
        rows = window_attention(queries[:, :, start:stop, :], keys[:, :, :end, :], valid[:, :, :end], xp=xp)
        total = xp.concat([total[..., :end] + xp.sum(rows, axis=-2), total[..., end:]], axis=-1)
    return total
