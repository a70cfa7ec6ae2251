"""PyTorch, on any of its devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import isqrt, prod
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from ..core import primitives
from ..core.attention import portable_received_attention
from ..core.backend import Backend
from ..core.fusion import portable_distance
from ..core.graph import portable_build_graph
from ..core.propagation import portable_propagate
from ..core.selection import portable_select
from ..core.types import Array, Graph
from . import host, streamed, threads
from . import numpy as on_host

__all__ = ["BACKEND"]


def _is_plain(*arrays: Array) -> bool:
    """Return whether kernels with ``out=`` may run: all tensors have memory, none is fake, mapped or differentiated."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        return False
    if torch.compiler.is_compiling():
        return True
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not _is_dual(x)
        for x in arrays
    )


def _is_dual(x: Array) -> bool:
    """Return whether the tensor carries a forward-mode gradient."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _is_launched(x: Array) -> bool:
    """Return whether each operation is a launch on a device, which takes longer than it seems to."""
    return bool(x.device.type != "cpu")


def _smallest(keys: Array, k: int, /) -> Array:
    return torch.topk(keys, k, dim=-1, largest=False, sorted=True).values


# Not torch.topk on the scores: its order among equal values is undefined (pytorch#27542).
_packed_top_k = partial(primitives.packed_top_k, bits=lambda x: x.resolve_neg().view(torch.int32), smallest=_smallest)


def _is_on_host(*arrays: Array | None) -> bool:
    """Return whether NumPy can read the tensors where they are.

    It computes in the calling thread alone, and a call of it takes a fraction of one of torch, which splits what has
    more than 32,768 entries over its threads. These wait for each other: for milliseconds where others compute too.
    """
    if torch.compiler.is_compiling():
        return False
    given = [x for x in arrays if x is not None]
    return all(x.device.type == "cpu" for x in given) and _is_plain(*given)


def _read(x: Array | None, /) -> Any:
    return None if x is None else x.detach().resolve_neg().numpy()


def top_k(scores: Array, k: int, tiers: Array | None, /, *, backend: Backend) -> Array:
    """Rank by NumPy where it can read the scores."""
    if not _is_on_host(scores, tiers):
        return _packed_top_k(scores, k, tiers, backend=backend)
    return torch.from_numpy(on_host.top_k(_read(scores), k, _read(tiers), backend=on_host.BACKEND))


def select(scores: Array, budget: int, protected: Array | None, valid: Array | None, /, *, backend: Backend) -> Array:
    """Select by NumPy where it can read the scores."""
    if not _is_on_host(scores, protected, valid):
        return portable_select(scores, budget, protected, valid, backend=backend)
    found = on_host.select(_read(scores), budget, _read(protected), _read(valid), backend=on_host.BACKEND)
    return torch.from_numpy(found)


def propagate(importance: Array, graph: Graph, /, *, backend: Backend, **options: Any) -> Array:
    """Send signals by NumPy where it can read the scores."""
    if not _is_on_host(importance, graph.sources, graph.neighbors, graph.weights):
        return portable_propagate(importance, graph, backend=backend, **options)
    graph = Graph(
        sources=_read(graph.sources),
        neighbors=_read(graph.neighbors),
        weights=_read(primitives.widen(graph.weights, xp=xp)),
        num_tokens=graph.num_tokens,
    )
    with on_host.BACKEND.guarded(graph.weights):
        return torch.from_numpy(portable_propagate(_read(importance), graph, backend=on_host.BACKEND, **options))


def segment_product(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Multiply by torch's own scatter where its order is fixed: on a GPU it changes from run to run."""
    if values.device.type != "cpu" or _is_dual(values):
        return primitives.portable_segment_product(values, index, num_segments, backend=backend)
    result = torch.ones((*values.shape[:-1], num_segments), dtype=values.dtype, device=values.device)
    return result.scatter_reduce(-1, index, values, "prod")


def segment_sum(values: Array, index: Array, num_segments: int, /, *, backend: Backend) -> Array:
    """Add by torch's own scatter where its order is fixed: on a GPU it changes from run to run."""
    if values.device.type != "cpu":
        return primitives.portable_segment_sum(values, index, num_segments, backend=backend)
    result = torch.zeros((*values.shape[:-1], num_segments), dtype=values.dtype, device=values.device)
    return result.scatter_add(-1, index, values)


def sum_rows(rows: Array, into: Array, num_slots: int, /, *, backend: Backend) -> Array:
    """Add by torch's own sum of rows where its order is fixed: on a GPU it changes from run to run."""
    if rows.device.type != "cpu":
        return primitives.portable_sum_rows(rows, into, num_slots, backend=backend)
    *leading, num_rows, size = rows.shape
    count = prod(leading)
    into = into.reshape(count, num_rows)
    place = torch.arange(count, device=rows.device)[:, None] * num_slots + into
    # One more slot takes what goes nowhere.
    place = place.masked_fill(into < 0, count * num_slots).reshape(-1)
    total = torch.zeros((count * num_slots + 1, size), dtype=rows.dtype, device=rows.device)
    total = total.index_add(0, place, rows.reshape(count * num_rows, size))
    return total[:-1].reshape(*leading, num_slots, size)


def _normalized(keys: Array, /) -> Array:
    length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    # Divided by infinity, everything becomes zero, infinity and NaN excepted.
    length.masked_fill_(length == 0, torch.inf)
    return torch.div(keys, length).nan_to_num_(nan=0.0)


def _rankable(similarity: Array, places: Array, /) -> Array:
    """Pack similarities, overwriting them, into integers that are all different, ascending from the best."""
    is_excluded = similarity < streamed.EXCLUDED / 2
    # The bits of numbers >= 0, read as integers, are in the order of the numbers; those of others are negative.
    bits = similarity.clamp_(max=1.0).view(torch.int32).clamp_(min=0)
    return torch.add(places, bits.neg_().add_(is_excluded).to(torch.int64), alpha=1 << 32)


def _nearest(
    keys: Array, sources: Array, is_padding: Array, /, *, num_neighbors: int, width: int, height: int, block: int
) -> tuple[Array, Array]:
    # Once for all rows: on a CPU, allocating it anew costs as much as the product.
    products = keys.new_empty(height * sources.shape[1] * width)
    found = [
        _nearest_of(
            keys[first : first + height],
            sources[first : first + height],
            is_padding[first : first + height],
            products,
            num_neighbors=num_neighbors,
            width=width,
            block=block,
        )
        for first in range(0, keys.shape[0], height)
    ]
    neighbors, similarities = zip(*found, strict=True)
    return torch.cat(neighbors), torch.cat(similarities)


def _nearest_of(
    keys: Array, sources: Array, is_padding: Array, products: Array, /, *, num_neighbors: int, width: int, block: int
) -> tuple[Array, Array]:
    (num_rows, num_tokens, head_size), num_sources = keys.shape, sources.shape[1]
    of = _normalized(keys.gather(1, sources[..., None].expand(-1, -1, head_size)))
    bias = keys.new_zeros((num_rows, num_tokens)).masked_fill_(is_padding, streamed.EXCLUDED)
    bias.scatter_(1, sources, streamed.EXCLUDED)
    filling = -num_tokens % width
    bias = torch.nn.functional.pad(bias, (0, filling), value=streamed.EXCLUDED)[:, None]
    first = torch.arange(num_rows * num_sources, device=keys.device).view(num_rows, num_sources, 1)
    places = torch.arange(num_tokens + filling, device=keys.device)

    best = places.new_empty((num_rows, num_sources, 0))
    for start in range(0, num_tokens, width):
        to = _normalized(keys[:, start : start + width])
        if to.shape[1] < width:
            to = torch.nn.functional.pad(to, (0, 0, 0, filling))
        size = to.shape[1]
        found = products[: num_rows * num_sources * size].view(num_rows, num_sources, size)
        torch.bmm(of, to.mT, out=found).add_(bias[..., start : start + size])

        blocks = found.view(-1, block)
        highest = blocks.amax(dim=-1).view(num_rows, num_sources, -1)
        num_blocks = highest.shape[-1]
        chosen = _smallest(_rankable(highest, places[:num_blocks]), min(num_neighbors, num_blocks)) & 0xFFFFFFFF
        near = blocks.index_select(0, (first * num_blocks + chosen).view(-1)).view(*chosen.shape, block)
        near = _rankable(near, (chosen * block)[..., None] + places[start : start + block])
        best = torch.cat([best, near.view(num_rows, num_sources, -1)], dim=-1)
        best = _smallest(best, min(num_neighbors, best.shape[-1]))
    weights = (best >> 32).neg_().clamp_(min=0).to(torch.int32).view(torch.float32)
    return best & 0xFFFFFFFF, weights


def _lengths(keys: Any, /) -> Any:
    return torch.linalg.vector_norm(torch.from_numpy(keys), dim=-1).numpy()


def _divide(keys: Any, by: Any, out: Any, /) -> None:
    torch.div(torch.from_numpy(keys), torch.from_numpy(by), out=torch.from_numpy(out))


def _multiply(of: Any, to: Any, buffer: Any, /) -> Any:
    products = buffer.reshape(*of.shape[:2], -1)
    torch.bmm(torch.from_numpy(of), torch.from_numpy(to).mT, out=torch.from_numpy(products))
    return products


def _highest(products: Any, size: int, /) -> Any:
    return torch.from_numpy(products).view(*products.shape[:2], -1, size).amax(dim=-1).numpy()


def _take(products: Any, blocks: Any, size: int, /) -> Any:
    num_rows, num_sources, num_tokens = products.shape
    source = np.arange(num_rows * num_sources).reshape(num_rows, num_sources, 1)
    return products.reshape(-1, size).take(source * (num_tokens // size) + blocks, axis=0)


PASSES = host.Passes(length=_lengths, divide=_divide, multiply=_multiply, highest=_highest, take=_take)
_nearest_on_host = partial(host.nearest, passes=PASSES, run=threads.run)


def build_graph(keys: Array, importance: Array, valid: Array, /, **options: Any) -> Graph:
    """Stream the similarities of float32, except where tensors record gradients or are mapped: no ``out=`` there."""
    # The norm of a key of one entry is that entry, however small its square.
    if keys.dtype != torch.float32 or keys.shape[-1] == 1 or not _is_plain(keys, importance, valid):
        return portable_build_graph(keys, importance, valid, **options)
    if _is_on_host(keys, importance, valid):
        options |= {"backend": on_host.BACKEND, "num_threads": threads.count()}
        with on_host.BACKEND.guarded(keys):
            graph = streamed.build_graph(
                _read(keys), _read(importance), _read(valid), nearest=_nearest_on_host, block_size=64, **options
            )
        return Graph(
            sources=torch.from_numpy(graph.sources),
            neighbors=torch.from_numpy(graph.neighbors),
            weights=torch.from_numpy(graph.weights),
            num_tokens=graph.num_tokens,
        )
    return streamed.build_graph(
        keys, importance, valid, nearest=_nearest, block_size=32, on_device=_is_launched(keys), **options
    )


def _is_finite(rows: Array, /) -> Array:
    """Mark the rows (..., D) without infinity and NaN by their largest entries: allocates nothing of their size."""
    return torch.isfinite(torch.linalg.vector_norm(rows, torch.inf, dim=-1))


# Attention probabilities that exist at a time: 8 MB in float32, which a last-level cache holds.
ATTENTION_SIZE = 1 << 21
# On a device 640 MB: every operation of a loop is a launch there.
DEVICE_ATTENTION_SIZE = 5 << 25


def _device_blocks(num_queries: int, num_tokens: int, largest: int, /) -> Iterator[tuple[int, int]]:
    """Cut queries into blocks of as many as have `largest` keys up to them in all."""
    start = 0
    while start < num_queries:
        before = num_tokens - num_queries + start
        size = max(1, (isqrt(before * before + 4 * largest) - before) // 2)
        yield start, min(start + size, num_queries)
        start += size


def received_attention(queries: Array, keys: Array, valid: Array, /, *, block_size: int, backend: Backend) -> Array:
    """Compute the softmax in one kernel, over as many heads and queries at a time as a buffer holds."""
    if queries.shape[-1] == 0 or not _is_plain(queries, keys, valid):
        return portable_received_attention(queries, keys, valid, block_size=block_size, backend=backend)
    batch, query_heads, num_queries, head_size = queries.shape
    kv_heads, num_tokens = keys.shape[1], keys.shape[2]
    num_rows, groups = batch * kv_heads, query_heads // kv_heads
    asks = valid[..., num_tokens - num_queries :].reshape(num_rows, 1, num_queries, 1)
    asks = asks & _is_finite(queries).reshape(num_rows, groups, num_queries, 1)
    valid = valid & _is_finite(keys)
    # Padding may hold anything, NaN included.
    queries = queries.reshape(num_rows, groups, num_queries, head_size).masked_fill(~asks, 0.0)
    queries.mul_(head_size**-0.5)
    valid, keys = valid.reshape(num_rows, 1, num_tokens), keys.reshape(num_rows, num_tokens, head_size)

    on_device = _is_launched(keys)
    largest = DEVICE_ATTENTION_SIZE if on_device else ATTENTION_SIZE
    if on_device:
        # As many rows as can be, then as many queries.
        height = max(1, min(num_rows, largest // max(groups * num_tokens, 1)))
        blocks = list(_device_blocks(num_queries, num_tokens, largest // (groups * height)))
    else:
        block_size = max(1, min(block_size, num_queries, largest // max(groups * num_tokens, 1)))
        height = max(1, min(num_rows, largest // max(groups * block_size * num_tokens, 1)))
        starts = range(0, num_queries, block_size)
        blocks = [(start, min(start + block_size, num_queries)) for start in starts]
    entries = max([0, *((stop - start) * (num_tokens - num_queries + stop) for start, stop in blocks)])
    block_size = max([0, *(stop - start for start, stop in blocks)])
    total = queries.new_zeros((num_rows, groups, num_tokens))
    buffer = queries.new_empty(height * groups * entries)
    # Low enough to vanish next to any logit, and finite, so that a row that sees nothing is not NaN.
    hidden = torch.finfo(queries.dtype).min / 2
    future = torch.full((block_size, block_size), hidden, dtype=queries.dtype, device=queries.device).triu_(1)
    for first in range(0, num_rows, height):
        rows = slice(first, first + height)
        seen = keys[rows].masked_fill(~valid[rows].mT, 0.0)
        padding = torch.zeros_like(valid[rows], dtype=queries.dtype).masked_fill_(~valid[rows], hidden)
        for start, stop in blocks:
            size, end = stop - start, num_tokens - num_queries + stop
            block = queries[rows, :, start:stop].reshape(-1, groups * size, head_size)
            logits = buffer[: block.shape[0] * groups * size * end].view(-1, groups * size, end)
            torch.baddbmm(padding[..., :end], block, seen[:, :end].mT, out=logits)
            logits = logits.view(-1, groups, size, end)
            logits[..., end - size :].add_(future[:size, :size])
            probabilities = torch.softmax(logits, dim=-1)
            probabilities.mul_(asks[rows, :, start:stop])
            total[rows, :, :end] += probabilities.sum(dim=-2)
    return total.view(batch, kv_heads, groups, num_tokens)


# Entries of keys at a time: 1 MB in float32, which a core's own cache holds.
DIRECTION_SIZE = 1 << 18


def distance(keys: Array, valid: Array, /, *, backend: Backend) -> Array:
    """Read the keys twice, for their mean direction and for the distance from it, and write no array of their size."""
    *leading, num_tokens, head_size = keys.shape
    num_rows = prod(leading)
    if (
        num_rows * num_tokens * head_size == 0
        or _is_launched(keys)
        or torch.compiler.is_compiling()
        or not _is_plain(keys, valid)
    ):
        return portable_distance(keys, valid, backend=backend)
    keys, valid = keys.reshape(num_rows, num_tokens, head_size), valid.reshape(num_rows, num_tokens)
    width = min(num_tokens, max(1, DIRECTION_SIZE // head_size))
    height = min(num_rows, max(1, DIRECTION_SIZE // (width * head_size)))
    buffer = keys.new_empty(height * width * head_size)
    square = keys.new_empty((num_rows, num_tokens))
    number = valid.sum(dim=-1, keepdim=True).clamp_(min=1).to(keys.dtype)
    chunks = [slice(start, start + width) for start in range(0, num_tokens, width)]
    for first in range(0, num_rows, height):
        rows = slice(first, first + height)
        own, total, scales = keys[rows], keys.new_zeros((len(keys[rows]), head_size)), []
        for chunk in chunks:
            part = own[:, chunk]
            scratch = buffer[: part.numel()].view(part.shape)
            length = torch.mul(part, part, out=scratch).sum(dim=-1, keepdim=True)
            is_usable = (length > 0) & torch.isfinite(length) & valid[rows, chunk, None]
            scale = length.rsqrt_().masked_fill_(~is_usable, 0.0)
            # Zero times infinity is NaN.
            total += torch.mul(part, scale, out=scratch).masked_fill_(~is_usable, 0.0).sum(dim=1)
            scales.append(scale)
        mean = total / number[rows]
        away = -mean[:, None]
        for chunk, scale in zip(chunks, scales, strict=True):
            part = own[:, chunk]
            scratch = buffer[: part.numel()].view(part.shape)
            torch.addcmul(away, part, scale, out=scratch)
            torch.sum(scratch.mul_(scratch), dim=-1, out=square[rows, chunk])
        has_direction = torch.cat(scales, dim=1)[..., 0] > 0
        apart = square[rows]
        torch.where(has_direction, apart, (mean * mean).sum(dim=-1, keepdim=True), out=apart)
        counted = valid[rows].to(keys.dtype)
        spread = (apart * counted).sum(dim=-1, keepdim=True)
        spread += (counted * ~has_direction).sum(dim=-1, keepdim=True)
        apart.add_(spread / number[rows]).div_(2).clamp_(max=2.0).masked_fill_(~has_direction, 1.0)
    return square.reshape(*leading, num_tokens)


def to_numpy(x: Array) -> Any:
    """Copy to the host."""
    return x.detach().cpu().numpy()


def _switch_of_products(device: str, /) -> tuple[Any, str, Any] | None:
    """Find the switch by which products of float32 lose digits (TF32, bfloat16), if it is on, and its value for off."""
    products = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device)
    products = getattr(products, "matmul", None)
    # Before torch 2.9 there was one switch, for CUDA.
    for switch, full in (("fp32_precision", "ieee"), ("allow_tf32", False)):
        if hasattr(products, switch):
            return None if getattr(products, switch) in (full, "none") else (products, switch, full)
    return None


@contextmanager
def _in_full_precision(products: Any, switch: str, full: Any, autocast: AbstractContextManager[Any]) -> Iterator[None]:
    before = getattr(products, switch)
    setattr(products, switch, full)
    try:
        with autocast:
            yield
    finally:
        setattr(products, switch, before)


def guard(array: Array, /) -> AbstractContextManager[Any]:
    """Return a context in which products are in full float32, whatever autocast and TF32 are set to.

    The switch of TF32 is one for the process: what other threads compute meanwhile is in full precision too. What is
    compiled follows the switch as it stands when it runs.
    """
    device = array.device.type
    context: AbstractContextManager[Any] = nullcontext()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        context = torch.autocast(device, enabled=False)
    found = None if torch.compiler.is_compiling() else _switch_of_products(device)
    return context if found is None else _in_full_precision(*found, context)


def refuse(array: Array, /) -> str:
    """Return the kind of a tensor that is not one block of numbers, or an empty string."""
    if array.layout is not torch.strided:
        return f"a tensor of layout {array.layout}"
    if array.is_nested:
        return "a nested tensor"
    return "a masked tensor" if type(array).__name__ == "MaskedTensor" else ""


BACKEND = Backend(
    name="torch",
    xp=xp,
    to_numpy=to_numpy,
    top_k=top_k,
    segment_product=segment_product,
    segment_sum=segment_sum,
    sum_rows=sum_rows,
    received_attention=received_attention,
    build_graph=build_graph,
    distance=distance,
    propagate=propagate,
    select=select,
    guard=guard,
    detach=torch.Tensor.detach,
    refuse=refuse,
)
