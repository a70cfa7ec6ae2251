"""PyTorch on CUDA with two kernels of our own in Triton, which nothing chooses by itself.

Pass it by value: ``evict(policy, keys, backend=graphkv.backends.triton.BACKEND)``. Similarities, their order and the
candidates of every tile of tokens are one kernel; attention is added up without an array of probabilities. The rest is
`graphkv.backends.torch`, which also computes what these kernels do not: float64, keys of one entry, more than
`MOST_NEIGHBORS` neighbors, and tensors that record gradients, are mapped or compiled or have no memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..core.backend import Backend
from ..core.errors import BackendError, BackendUnavailableError
from ..core.types import Array, Graph
from . import streamed
from . import torch as plain

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise BackendUnavailableError(f"backend 'triton' needs triton: pip install 'graphkv[triton]' ({error})") from error

__all__ = ["BACKEND"]

# A tile's candidates are found one after the other.
MOST_NEIGHBORS = 16
# Two tiles less than 32 bits count.
MOST_TOKENS = (1 << 31) - 128
# Candidates that exist at a time: 256 MB of int64.
CANDIDATES = 1 << 25
# Rows, columns and summands of a product at a time. Each is a power of two, and 16 or more, as `tl.dot` asks.
SIZES = {"ROWS": 64, "TOKENS": 64, "ENTRIES": 32}
# As many tokens again for candidates: the fastest of ten choices on an H200; attention has no registers for them.
TILE = {**SIZES, "TOKENS": 128}
# Triton is about to change what it does where this is not given.
OPTIONS = {"enable_fp_fusion": True}
# Programs that fill a large device a few times over.
PROGRAMS = 1024


@triton.jit
def candidates_kernel(
    keys,
    directions,
    excluded,
    found,
    num_tokens,
    num_sources,
    head_size,
    keys_row,
    keys_token,
    keys_entry,
    NUM_NEIGHBORS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Rank a tile of tokens for a block of sources: the first of each, as integers in ascending order."""
    num_tiles, num_blocks = tl.cdiv(num_tokens, TOKENS), tl.cdiv(num_sources, ROWS)
    program = tl.program_id(0).to(tl.int64)
    tile, block, row = program % num_tiles, program // num_tiles % num_blocks, program // num_tiles // num_blocks
    token, source = tile * TOKENS + tl.arange(0, TOKENS), block * ROWS + tl.arange(0, ROWS)
    is_token, is_source = token < num_tokens, source < num_sources
    to = keys + row * keys_row + token[:, None] * keys_token
    of = directions + (row * num_sources + source)[:, None] * head_size

    product = tl.full((ROWS, TOKENS), 0.0, dtype=tl.float32)
    square = tl.full((TOKENS,), 0.0, dtype=tl.float32)
    for start in range(0, head_size, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES)).to(tl.int64)[None, :]
        key = tl.load(to + entry * keys_entry, mask=is_token[:, None] & (entry < head_size), other=0.0).to(tl.float32)
        direction = tl.load(of + entry, mask=is_source[:, None] & (entry < head_size), other=0.0)
        square += tl.sum(key * key, axis=1)
        product = tl.dot(direction, tl.trans(key), acc=product, input_precision="ieee")

    length = tl.sqrt_rn(square)
    cosine = tl.div_rn(product, tl.where(length > 0, length, float("inf"))[None, :])
    is_out = tl.load(excluded + row * num_tokens + token, mask=is_token, other=1)[None, :] != 0
    # NaN is not above 0. The bits of numbers >= 0, read as integers, are in the order of the numbers.
    weight = tl.where((cosine > 0) & ~is_out, tl.minimum(cosine, 1.0), 0.0)
    rank = (is_out.to(tl.int32) - weight.to(tl.int32, bitcast=True)).to(tl.int64)
    # All different: among equal weights the lower token is first.
    rank = rank * 4294967296 + token[None, :]
    into = found + ((row * num_sources + source) * num_tiles + tile) * NUM_NEIGHBORS
    for place in range(NUM_NEIGHBORS):
        first = tl.min(rank, axis=1)
        tl.store(into + place, first, mask=is_source)
        rank = tl.where(rank == first[:, None], 0x7FFFFFFFFFFFFFFF, rank)


@triton.jit
def _logits(
    queries,
    keys,
    valid,
    head,
    groups,
    query,
    token,
    num_queries,
    num_tokens,
    head_size,
    scale,
    keys_row,
    keys_token,
    keys_entry,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Compute the logits of a block of queries to a tile of tokens; minus infinity where nothing is seen."""
    row = head // groups
    position = num_tokens - num_queries + query
    is_query, is_token = query < num_queries, token < num_tokens
    of = queries + (head * num_queries + query)[:, None] * head_size
    to = keys + row * keys_row + token[:, None] * keys_token
    product = tl.full((ROWS, TOKENS), 0.0, dtype=tl.float32)
    gives = tl.load(valid + row * num_tokens + position, mask=is_query, other=0) != 0
    receives = tl.load(valid + row * num_tokens + token, mask=is_token, other=0) != 0
    for start in range(0, head_size, ENTRIES):
        entry = (start + tl.arange(0, ENTRIES)).to(tl.int64)[None, :]
        question = tl.load(of + entry, mask=is_query[:, None] & (entry < head_size), other=0.0).to(tl.float32)
        key = tl.load(to + entry * keys_entry, mask=is_token[:, None] & (entry < head_size), other=0.0).to(tl.float32)
        # Entries that are infinite or NaN make padding.
        gives &= tl.sum((tl.abs(question) < float("inf")).to(tl.int32), axis=1) == ENTRIES
        receives &= tl.sum((tl.abs(key) < float("inf")).to(tl.int32), axis=1) == ENTRIES
        product = tl.dot(question, tl.trans(key), acc=product, input_precision="ieee")
    sees = gives[:, None] & receives[None, :] & (token[None, :] <= position[:, None])
    return tl.where(sees, product * scale, float("-inf"))


@triton.jit
def normalizers_kernel(
    queries,
    keys,
    valid,
    found,
    groups,
    num_queries,
    num_tokens,
    head_size,
    num_parts,
    part_size,
    scale,
    keys_row,
    keys_token,
    keys_entry,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Compute the logarithm of the sum of exponentials of a block of queries over a part of the tokens."""
    num_blocks = tl.cdiv(num_queries, ROWS)
    program = tl.program_id(0).to(tl.int64)
    part, block, head = program % num_parts, program // num_parts % num_blocks, program // num_parts // num_blocks
    query = block * ROWS + tl.arange(0, ROWS)
    stop = tl.minimum((part + 1) * part_size, tl.minimum(num_tokens, num_tokens - num_queries + (block + 1) * ROWS))
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.full((ROWS,), 0.0, dtype=tl.float32)
    for start in range(part * part_size, stop, TOKENS):
        logits = _logits(
            queries, keys, valid, head, groups, query, start + tl.arange(0, TOKENS), num_queries, num_tokens,
            head_size, scale, keys_row, keys_token, keys_entry, ROWS, TOKENS, ENTRIES,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        # Nothing is seen so far: any finite number will do.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        highest = higher
    found += (head * num_queries + query) * num_parts + part
    log = tl.where(total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(found, log, mask=query < num_queries)


@triton.jit
def votes_kernel(
    queries,
    keys,
    valid,
    normalizers,
    found,
    groups,
    num_queries,
    num_tokens,
    head_size,
    scale,
    keys_row,
    keys_token,
    keys_entry,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add up the attention that a tile of tokens receives from all queries of a head, in their order."""
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    program = tl.program_id(0).to(tl.int64)
    tile, head = program % num_tiles, program // num_tiles
    token = tile * TOKENS + tl.arange(0, TOKENS)
    total = tl.full((TOKENS,), 0.0, dtype=tl.float32)
    # No query before this block sees the tile.
    earliest = tl.maximum(tile * TOKENS - (num_tokens - num_queries), 0) // ROWS * ROWS
    for start in range(earliest, num_queries, ROWS):
        query = start + tl.arange(0, ROWS)
        logits = _logits(
            queries, keys, valid, head, groups, query, token, num_queries, num_tokens, head_size, scale,
            keys_row, keys_token, keys_entry, ROWS, TOKENS, ENTRIES,
        )  # fmt: skip
        log = tl.load(normalizers + head * num_queries + query, mask=query < num_queries, other=float("inf"))
        total += tl.sum(tl.exp(logits - log[:, None]), axis=0)
    tl.store(found + head * num_tokens + token, total, mask=token < num_tokens)


IS_INTERPRETED = not isinstance(candidates_kernel, triton.JITFunction)


def _is_ours(keys: Array, *others: Array) -> bool:
    """Return whether the kernels compute with such tensors; those on a CPU are refused, unless interpreted."""
    # The kernels round sizes up to tiles in 32 bits.
    if keys.shape[-2] > MOST_TOKENS:
        return False
    if keys.dtype != torch.float32 or torch.compiler.is_compiling() or not plain._is_plain(keys, *others):
        return False
    if keys.device.type == "cpu" and not IS_INTERPRETED:
        raise BackendError(
            "keys must be on a CUDA device for backend 'triton', or TRITON_INTERPRET=1 set before its import; got cpu"
        )
    return keys.device.type in ("cpu", "cuda")


def _nearest(keys: Array, sources: Array, is_padding: Array, /, *, num_neighbors: int, **_: Any) -> tuple[Array, Array]:
    """Find neighbors as `streamed.build_graph` asks for them, in as few launches as the candidates have room for."""
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    excluded = is_padding.scatter(1, sources, True)
    directions = plain._normalized(keys.gather(1, sources[..., None].expand(-1, -1, head_size)))
    num_tiles = triton.cdiv(num_tokens, TILE["TOKENS"])
    per_source = num_tiles * num_neighbors
    width = max(1, min(num_sources, CANDIDATES // per_source))
    height = max(1, min(num_rows, CANDIDATES // (per_source * width)))
    best = sources.new_empty((num_rows, num_sources, num_neighbors))
    for top in range(0, num_rows, height):
        rows = slice(top, top + height)
        for left in range(0, num_sources, width):
            of = directions[rows, left : left + width].contiguous()
            found = sources.new_empty((*of.shape[:2], per_source))
            num_programs = of.shape[0] * triton.cdiv(of.shape[1], TILE["ROWS"]) * num_tiles
            candidates_kernel[(num_programs,)](
                keys[rows], of, excluded[rows], found, num_tokens, of.shape[1], head_size, *keys.stride(),
                NUM_NEIGHBORS=num_neighbors, **TILE, **OPTIONS,
            )  # fmt: skip
            best[rows, left : left + width] = plain._smallest(found, num_neighbors)
    weights = (best >> 32).neg_().clamp_(min=0).to(torch.int32).view(torch.float32)
    return best & 0xFFFFFFFF, weights


def build_graph(keys: Array, importance: Array, valid: Array, /, **options: Any) -> Graph:
    """Rank tokens in tiles as soon as their similarities are known; only the first of each tile reach memory."""
    is_small = 0 < options["num_neighbors"] <= MOST_NEIGHBORS
    if not is_small or keys.shape[-1] == 1 or not _is_ours(keys, importance, valid):
        return plain.build_graph(keys, importance, valid, **options)
    with torch.cuda.device_of(keys):
        return streamed.build_graph(
            keys, importance, valid, nearest=_nearest, block_size=TILE["TOKENS"], on_device=True, **options
        )


def received_attention(queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend) -> Array:
    """Read the keys twice, for the sums of exponentials and for the votes; probabilities never reach memory."""
    if 0 in (*queries.shape, *keys.shape) or not _is_ours(keys, queries, valid):
        return plain.received_attention(queries, keys, valid, block_size=block_size, backend=backend)
    batch, query_heads, num_queries, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    groups, heads = query_heads // kv_heads, batch * query_heads
    queries = queries.contiguous()
    valid = valid.reshape(-1, num_tokens).contiguous()
    keys = keys.reshape(-1, num_tokens, head_size)
    num_blocks, num_tiles = triton.cdiv(num_queries, SIZES["ROWS"]), triton.cdiv(num_tokens, SIZES["TOKENS"])
    # Few queries are few programs, each of which would read all keys: then several share them.
    num_parts = max(1, min(num_tiles, PROGRAMS // (heads * num_blocks)))
    part_size = triton.cdiv(num_tiles, num_parts) * SIZES["TOKENS"]
    normalizers = queries.new_empty((heads, num_queries, num_parts))
    total = queries.new_empty((batch, kv_heads, groups, num_tokens))
    shape = (groups, num_queries, num_tokens, head_size)
    scale = head_size**-0.5
    with torch.cuda.device_of(keys):
        normalizers_kernel[(heads * num_blocks * num_parts,)](
            queries, keys, valid, normalizers, *shape, num_parts, part_size, scale, *keys.stride(), **SIZES, **OPTIONS
        )
        normalizers = normalizers.logsumexp(dim=-1)
        # A query that sees nothing gives nothing: exp(-inf - inf).
        normalizers.masked_fill_(normalizers == -torch.inf, torch.inf)
        votes_kernel[(heads * num_tiles,)](
            queries, keys, valid, normalizers, total, *shape, scale, *keys.stride(), **SIZES, **OPTIONS
        )
    return total


BACKEND = replace(
    plain.BACKEND, name="triton", library="torch", build_graph=build_graph, received_attention=received_attention
)
