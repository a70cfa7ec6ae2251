"""Policies by name."""

import pytest

from graphkv import CAKE, TOVA, ArgumentError, GraphKV, KNorm, Random, SnapKV, StreamingLLM
from graphkv.evaluation.policies import BASES, make_policy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", None),
        ("snapkv", SnapKV(budget=64)),
        ("snapkv(window=8, pooling=max)", SnapKV(budget=64, window=8, pooling="max")),
        ("random", Random(budget=64, seed=5)),
        ("random(seed=7)", Random(budget=64, seed=7)),
        ("knorm+graphkv", GraphKV(KNorm(budget=64))),
        ("knorm+graphkv-paper", GraphKV.paper(KNorm(budget=64))),
        (
            "cake+graphkv(signal='decay', neighbors=4, strength=0.5)",
            GraphKV(CAKE(budget=64), signal="decay", neighbors=4, strength=0.5),
        ),
    ],
)
def test_a_name_is_a_policy(name, expected):
    assert make_policy(name, 64, seed=5) == expected


def test_sinks_go_to_the_base_unless_it_names_its_own():
    assert make_policy("snapkv", 64, sinks=3) == SnapKV(budget=64, num_sinks=3)
    assert make_policy("streaming-llm", 64, sinks=0) == StreamingLLM(budget=64, num_sinks=0)
    assert make_policy("tova(num_sinks=2)+graphkv", 64, sinks=3) == GraphKV(TOVA(budget=64, num_sinks=2))


@pytest.mark.parametrize("name", [*BASES, *(f"{base}+graphkv" for base in BASES)])
def test_sinks_are_kept_by_every_policy(name):
    import numpy as np

    from graphkv import evict

    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 1, 2, 100, 8)).astype("float32")
    # Long keys at the front, which KNorm and others would drop.
    keys[:, :, :5] *= 20
    queries = rng.normal(size=(1, 4, 100, 8)).astype("float32")
    kept = evict(make_policy(name, 48, sinks=5), keys, values=values, queries=queries).kept

    assert (kept[..., :5] == np.arange(5)).all()
    assert kept.shape[-1] == 48


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "--policy must be one of full, random"),
        ("snapkv+graph", "--policy must be one of"),
        ("full+graphkv", "--policy must be one of"),
        ("snapkv(window)", "options like window=8"),
        ("snapkv(windows=8)", "unexpected keyword argument 'windows'"),
        ("snapkv(window=0)", r"--policy snapkv\(window=0\): window must be at least 1"),
        ("snapkv+graphkv-paper(neighbors=3)", "unexpected keyword argument 'neighbors'"),
        ("snapkv(", "--policy must be one of"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ArgumentError, match=message):
        make_policy(name, 64)
