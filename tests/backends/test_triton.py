"""Our kernels in Triton, as far as a machine without a GPU can show: compiled for two of them, and interpreted.

Triton reads the choice of its interpreter when it is imported, so what is interpreted runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'graphkv[triton]'")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphkv import BackendError, KNorm, SnapKV, build_graph, evict
from graphkv.backends import torch as plain
from graphkv.backends import triton as module

ROOT = Path(__file__).parents[2]
# The types of the arguments, in order: pointers, counts, strides; those of sizes are part of the code.
F32, I32 = "*fp32", "i32"
ARGUMENTS = {
    "candidates_kernel": [F32, F32, "*i1", "*i64", *[I32] * 6],
    "normalizers_kernel": [F32, F32, "*i1", F32, *[I32] * 6, "fp32", *[I32] * 3],
    "votes_kernel": [F32, F32, "*i1", F32, F32, *[I32] * 4, "fp32", *[I32] * 3],
}
PROPERTIES = (
    "test_received_attention_agrees_with_the_oracle or test_graph_agrees_with_the_oracle "
    "or test_graph_of_general_keys_lies_within_the_margin or test_no_edge_leads_to_a_source_or_to_padding "
    "or test_a_key_without_direction_has_no_edges or test_graph_follows_a_permutation_of_distinct_tokens"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_kernels_compile_without_a_device_and_without_tf32(name, capability):
    kernel = getattr(module, name)
    sizes = {**module.TILE, "NUM_NEIGHBORS": 3} if name == "candidates_kernel" else module.SIZES
    types = ARGUMENTS[name] + ["constexpr"] * len(sizes)
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, types, strict=True)),
        constexprs={(kernel.arg_names.index(size),): value for size, value in sizes.items()},
    )

    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=module.OPTIONS)

    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]
    assert "atom" not in compiled.asm["ptx"]


def test_nothing_chooses_it_and_a_cpu_is_refused():
    keys, queries = torch.ones(1, 1, 40, 16), torch.ones(1, 1, 8, 16)

    for call in (
        lambda: build_graph(keys, keys[..., 0], num_sources=2, num_neighbors=2, backend=module.BACKEND),
        lambda: evict(SnapKV(budget=8, window=4), keys, queries=queries, backend=module.BACKEND),
    ):
        with pytest.raises(BackendError, match=r"keys must be on a CUDA device for backend 'triton'.*; got cpu"):
            call()
    assert evict(KNorm(budget=8), keys).kept.shape == (1, 1, 8)
    assert plain.BACKEND.build_graph is plain.build_graph


def interpreted(*options):
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {"TRITON_INTERPRET": "1", "GRAPHKV_HYPOTHESIS": "quick"}
    return subprocess.run(
        # NumPy, which computes in the interpreter, warns of values.
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_interpreted_they_give_what_the_portable_bodies_give():
    done = interpreted("tests/backends/triton_interpreted.py")

    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_interpreted_they_have_the_properties_of_the_kit():
    done = interpreted(
        "tests/test_conformance.py", "--graphkv-backend", "graphkv.backends.triton:BACKEND",
        "-k", f"({PROPERTIES}) and not portable",
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-5000:]
    assert "6 passed" in done.stdout, done.stdout[-2000:]
