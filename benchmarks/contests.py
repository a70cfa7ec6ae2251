"""Everything that is compared on random arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import util
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch

import graphkv
from graphkv import H2O, Absorb, Degree, Given, GraphKV, KeyDiff, Policy, SnapKV

from .measure import Call, Contest

__all__ = ["MIDDLE", "SHAPES", "TINY", "Shape", "bare_product", "contests", "graph_step"]


class Shape(NamedTuple):
    """Sizes of a graph step."""

    heads: int
    num_tokens: int
    head_size: int
    num_sources: int
    num_neighbors: int = 8

    def __str__(self) -> str:
        return f"{self.heads} heads, N {self.num_tokens}, D {self.head_size}, K {self.num_sources}"


class Edited(NamedTuple):
    """Sizes of a cache that is edited."""

    layers: int
    num_tokens: int
    budget: int

    def __str__(self) -> str:
        return f"{self.layers} layers, 32 query heads, 8 KV heads, D 128, T {self.num_tokens}, budget {self.budget}"


EDITED = Edited(4, 8192, 2048)
SHAPES = (Shape(8, 32768, 128, 614), Shape(8, 8192, 128, 154), Shape(3, 4096, 64, 154))
LARGE, MIDDLE = SHAPES[:2]
TINY = Shape(2, 96, 8, 6, 2)


def _normal(library: str, device: str, *shape: int) -> Any:
    """Draw float32 without a wider array on the way, which would count as memory."""
    if library == "numpy":
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def graph_step(shape: Shape, library: str, device: str) -> Call:
    """Build a graph, propagate and select."""
    keys = _normal(library, device, shape.heads, shape.num_tokens, shape.head_size)
    importance = _normal(library, device, shape.heads, shape.num_tokens)

    def step() -> Any:
        graph = graphkv.build_graph(keys, importance, num_sources=shape.num_sources, num_neighbors=shape.num_neighbors)
        # The paper takes 0.3 of the budget as sources.
        return graphkv.select(graphkv.propagate(importance, graph), round(shape.num_sources / 0.3))

    return step


def bare_product(shape: Shape, library: str, device: str) -> Call:
    """Multiply the keys of all sources by those of all tokens."""
    keys = _normal(library, device, shape.heads, shape.num_tokens, shape.head_size)
    sources = _normal(library, device, shape.heads, shape.num_sources, shape.head_size)
    return lambda: sources @ keys.swapaxes(-1, -2)


def _all_pairs(shape: Shape, library: str, device: str) -> Call:
    """The mean cosine of each key with all others, as redundancy scores of the field have it; one head at a time."""
    keys = _normal(library, device, shape.heads, shape.num_tokens, shape.head_size)

    def redundancy() -> Any:
        found = []
        for head in torch.nn.functional.normalize(keys, dim=-1):
            similarity = head @ head.mT
            found.append(similarity.fill_diagonal_(0.0).mean(dim=-1))
        return torch.stack(found)

    return redundancy


def _against(first: Callable[..., Call], second: Callable[..., Call], shape: Shape, *where: str) -> Any:
    return lambda tiny: (first(TINY if tiny else shape, *where), second(TINY if tiny else shape, *where))


def _grown(shape: Shape, grown: Shape, *where: str) -> Any:
    def make(tiny: bool) -> tuple[Call, Call]:
        small, large = (TINY, TINY) if tiny else (shape, grown)
        return graph_step(large, *where), graph_step(small, *where)

    return make


def _h2o(num_tokens: int, heads: int, device: str) -> Callable[[bool], tuple[Call, Call]]:
    """The accumulated attention of a prompt, and the same from the whole matrix."""

    def make(tiny: bool) -> tuple[Call, Call]:
        tokens = 64 if tiny else num_tokens
        keys, queries = (_normal("torch", device, 1, heads, tokens, 64) for _ in range(2))

        def dense() -> Any:
            logits = (queries @ keys.mT).div_(sqrt(64))
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu_(1)
            return logits.masked_fill_(future, -torch.inf).softmax(dim=-1).sum(dim=-2)

        # One token fewer than there are, so that nothing but scoring is done: selection is a row of this table too.
        policy = H2O(budget=tokens - 1)
        return lambda: graphkv.evict(policy, keys, queries=queries), dense

    return make


def _snapkv(device: str) -> Callable[[bool], tuple[Call, Call]]:
    """Score and select, against kvpress on the same tensors."""

    def make(tiny: bool) -> tuple[Call, Call]:
        from .peer import kvpress_snapkv  # noqa: PLC0415 - only where kvpress is

        tokens, window, budget = (128, 16, 32) if tiny else (16384, 64, 2048)
        keys = _normal("torch", device, 1, 8, tokens, 128)
        queries = _normal("torch", device, 1, 32, window, 128)
        policy = SnapKV(budget=budget, window=window, kernel_size=5)
        ours = lambda: graphkv.evict(policy, keys, queries=queries).kept  # noqa: E731
        return ours, kvpress_snapkv(keys, queries, budget, window)

    return make


def _absorb(shape: Shape, library: str, device: str) -> Callable[[bool], tuple[Call, Call]]:
    """Evict by the degree of given scores, with and without absorbing what nearly equals a kept token."""

    def make(tiny: bool) -> tuple[Call, Call]:
        heads, tokens, head_size, sources, _ = TINY if tiny else shape
        keys = _normal(library, device, 1, heads, tokens, head_size)
        importance = _normal(library, device, 1, heads, tokens)
        base = GraphKV(Given(budget=round(sources / 0.3), importance=importance))
        policy = Absorb(base, weights="count")
        return lambda: graphkv.evict(policy, keys), lambda: graphkv.evict(base, keys)

    return make


def _edit() -> Callable[[bool], tuple[Call, Call]]:
    """Edit a cache as LMCache stores it, a few layers of an 8B model; and copy it once."""

    def make(tiny: bool) -> tuple[Call, Call]:
        from transformers import LlamaConfig  # noqa: PLC0415 - only for this row

        from graphkv.integrations.lmcache import editor  # noqa: PLC0415

        layers, tokens, chunk = (2, 64, 16) if tiny else (EDITED.layers, EDITED.num_tokens, 256)
        config = LlamaConfig(
            num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=4096,
            vocab_size=8,
        )  # fmt: skip
        policy = GraphKV(SnapKV(budget=2 * chunk if tiny else EDITED.budget, window=8), Degree())
        cache = _normal("torch", "cpu", 2, layers, tokens, 8 * 128).to(torch.bfloat16)
        queries = _normal("torch", "cpu", 1, layers, tokens, 32 * 128).to(torch.bfloat16)
        edit, ids = editor(policy, config, chunk_size=chunk), list(range(tokens))
        return lambda: edit({"kv": cache, "query": queries}, ids)[0], cache.clone

    return make


def _captured(policy: Policy, num_tokens: int) -> Callable[[bool], tuple[Call, Call]]:
    """Evict a layer of an 8B model in bfloat16: all launches replayed at once from a CUDA graph, and one by one."""

    def make(tiny: bool) -> tuple[Call, Call]:
        tokens = 128 if tiny else num_tokens
        keys = _normal("torch", "cuda", 1, 8, tokens, 128).to(torch.bfloat16)
        queries = _normal("torch", "cuda", 1, 32, 64, 128).to(torch.bfloat16)

        def eager() -> Any:
            return graphkv.evict(policy, keys, queries=queries, budget=tokens // 4).kept

        aside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            eager()
        torch.cuda.current_stream().wait_stream(aside)
        # Held by `replay`: what it writes into must not be given away.
        with torch.cuda.graph(graph):
            kept = eager()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay, eager

    return make


def _in_triton(shape: Shape, step: str) -> Callable[[bool], tuple[Call, Call]]:
    """One step by the kernels in Triton, and by PyTorch."""

    def make(tiny: bool) -> tuple[Call, Call]:
        from graphkv.backends.torch import BACKEND as PLAIN  # noqa: PLC0415 - only for these rows
        from graphkv.backends.triton import BACKEND as TRITON  # noqa: PLC0415

        heads, tokens, head_size, num_sources, _ = TINY if tiny else shape
        keys, queries = (_normal("torch", "cuda", 1, *size, head_size) for size in ((heads, tokens), (4 * heads, 64)))
        importance, valid = keys[..., 0], torch.ones(1, heads, tokens, dtype=torch.bool, device="cuda")

        def call(backend: Any) -> Call:
            if step == "votes":
                return lambda: backend.received_attention(queries, keys, valid, block_size=64, backend=backend)
            options = {"num_sources": num_sources, "num_neighbors": 2, "backend": backend}
            return lambda: graphkv.build_graph(keys, importance, **options)

        return call(TRITON), call(PLAIN)

    return make


def _on_a_device(wait: Call) -> list[Contest]:
    """Return what only a CUDA device can run."""
    layer = "8 KV heads, 32 query heads, D 128, a quarter kept"
    policies = {
        "SnapKV": SnapKV(budget=1),
        "SnapKV and the paper's graph": GraphKV(SnapKV(budget=1)),
        "SnapKV and the degree": GraphKV(SnapKV(budget=1), Degree()),
        "KeyDiff": KeyDiff(budget=1),
    }
    found = [
        Contest(
            name=f"captured, torch: {name}, N {num_tokens}, {layer}",
            make=_captured(policy, num_tokens),
            of="the eviction replayed from a CUDA graph",
            to="the eviction, launch by launch",
            synchronize=wait,
        )
        for name, policy in policies.items()
        for num_tokens in (4096, 32768)
    ]
    if util.find_spec("triton"):
        found += [
            Contest(
                name=f"{step} in Triton, torch: {shape}",
                make=_in_triton(shape, step),
                of="kernels in Triton",
                to="PyTorch",
                measure_memory=shape.num_tokens > LARGE.num_tokens,
                synchronize=wait,
            )
            for step in ("graph", "votes")
            for shape in (LARGE, LARGE._replace(num_tokens=131072))
        ]
    return found


def contests(device: str = "cpu") -> dict[str, Contest]:
    """Return all contests by name, those with kvpress under names that start with "kvpress"."""
    wait: Any = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    where = ("torch", device)
    found = []
    for shape in SHAPES:
        found.append(
            Contest(
                name=f"graph step, torch: {shape}",
                make=_against(graph_step, bare_product, shape, *where),
                of="build_graph + propagate + select",
                to="bare product",
                at_most=1.5,
                measure_memory=True,
                memory_at_most=96.0 if shape.num_tokens == 32768 else None,
                synchronize=wait,
            )
        )
    if device == "cpu":
        found += [
            Contest(
                name=f"graph step, numpy: {shape}",
                make=_against(graph_step, bare_product, shape, "numpy", device),
                of="build_graph + propagate + select",
                to="bare product",
                at_most=2.0,
                measure_memory=True,
            )
            for shape in SHAPES
        ]
    for num_tokens in (4096, 8192, 16384):
        shape = MIDDLE._replace(num_tokens=num_tokens)
        found.append(
            Contest(
                name=f"all pairs, torch: {shape}",
                make=_against(_all_pairs, graph_step, shape, *where),
                of="all-pairs redundancy",
                to="graph step",
                at_least=15.0 if num_tokens == 8192 else None,
                synchronize=wait,
            )
        )
    for name, small, large in (
        ("N", MIDDLE._replace(num_tokens=4096), MIDDLE),
        ("N", MIDDLE, MIDDLE._replace(num_tokens=16384)),
        ("N", MIDDLE._replace(num_tokens=16384), MIDDLE._replace(num_tokens=32768)),
        ("K", MIDDLE, MIDDLE._replace(num_sources=308)),
        ("heads", MIDDLE, MIDDLE._replace(heads=16)),
    ):
        found.append(
            Contest(
                name=f"twice the {name}, torch: {small}",
                make=_grown(small, large, *where),
                of=f"graph step at twice the {name}",
                to="graph step",
                at_most=2.2 if name == "N" else None,
                synchronize=wait,
            )
        )
    for num_tokens in (2048, 8192):
        found.append(
            Contest(
                name=f"H2O prefill, torch: 9 heads, N {num_tokens}, D 64",
                make=_h2o(num_tokens, 9, device),
                of="H2O",
                to="dense column sums",
                at_most=1.3 if num_tokens == 2048 else None,
                measure_memory=True,
                memory_at_most=160.0 if num_tokens == 8192 else None,
                synchronize=wait,
            )
        )
    found.append(
        Contest(
            name="kvpress SnapKV: 32 query heads, 8 KV heads, N 16384, D 128, window 64",
            make=_snapkv(device),
            of="SnapKV score and select",
            to="kvpress SnapKVPress.score and top-k",
            at_most=0.5,
            measure_memory=True,
            memory_share_at_most=0.15,
            synchronize=wait,
        )
    )
    for library in ("torch", "numpy") if device == "cpu" else ("torch",):
        found.append(
            Contest(
                name=f"Absorb, {library}: {MIDDLE}",
                make=_absorb(MIDDLE, library, device),
                of="the graph and Absorb",
                to="the graph",
                at_most=1.3,
                synchronize=wait,
            )
        )
    if device == "cuda":
        # Targets are those of a CPU: a device is given larger buffers, because there every operation is a launch.
        found = [
            replace(contest, at_most=None, at_least=None, memory_at_most=None, memory_share_at_most=None)
            for contest in [*found, *_on_a_device(wait)]
        ]
    else:
        found.append(
            Contest(
                name=f"LMCache edit: {EDITED}",
                make=_edit(),
                of="SnapKV and the degree, one kept set",
                to="a copy of the cache",
            )
        )
    return {contest.name: contest for contest in found}
