"""Policies by name."""

import pytest

from graphkv import (
    CAKE,
    CAOTE,
    H2O,
    TOVA,
    AdaKV,
    ArgumentError,
    Bar,
    Decay,
    Degree,
    Enhance,
    GraphKV,
    KNorm,
    PageRank,
    Random,
    SnapKV,
    StreamingLLM,
)
from graphkv.naming.names import base_name, parse, split
from graphkv.naming.policies import BASES, WRAPPERS, make_policy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full", None),
        ("snapkv", SnapKV(budget=64)),
        ("snapkv(window=8, pooling=max)", SnapKV(budget=64, window=8, pooling="max")),
        ("random", Random(budget=64, seed=5)),
        ("random(seed=7)", Random(budget=64, seed=7)),
        ("knorm+graphkv", GraphKV(KNorm(budget=64))),
        ("cake+graphkv(neighbors=4, strength=0.5)", GraphKV(CAKE(budget=64), Decay(neighbors=4, strength=0.5))),
        ("knorm+enhance(rounds=2)", GraphKV(KNorm(budget=64), Enhance(rounds=2))),
        ("knorm+bar(neighbors=3)", GraphKV(KNorm(budget=64), Bar(neighbors=3))),
        ("snapkv(window=16)+degree(exponent=8)", GraphKV(SnapKV(budget=64, window=16), Degree(exponent=8))),
        ("knorm+degree(fusion=max_rank, unrotated=True)", GraphKV(KNorm(budget=64), Degree(fusion="max_rank"), True)),
        ("h2o+pagerank(damping=0.3)", GraphKV(H2O(budget=64), PageRank(damping=0.3))),
        ("h2o+adakv", AdaKV(H2O(budget=64))),
        ("h2o+caote", CAOTE(H2O(budget=64))),
        (" h2o + degree + adakv(schedule=code)", AdaKV(GraphKV(H2O(budget=64), Degree()), schedule="code")),
        ("h2o+adakv+degree", GraphKV(AdaKV(H2O(budget=64)), Degree())),
        ("knorm+graphkv+degree", GraphKV(GraphKV(KNorm(budget=64)), Degree())),
    ],
)
def test_a_name_is_a_policy(name, expected):
    assert make_policy(name, 64, seed=5) == expected


def test_sinks_go_to_the_base_unless_it_names_its_own():
    assert make_policy("snapkv", 64, sinks=3) == SnapKV(budget=64, num_sinks=3)
    assert make_policy("streaming-llm", 64, sinks=0) == StreamingLLM(budget=64, num_sinks=0)
    assert make_policy("tova(num_sinks=2)+graphkv", 64, sinks=3) == GraphKV(TOVA(budget=64, num_sinks=2))


def test_a_name_is_parsed_at_the_plus_signs_outside_parentheses():
    assert split("a(b=1+2)+c(d=(3, [4+5]))+e") == ["a(b=1+2)", "c(d=(3, [4+5]))", "e"]
    assert (base_name("snapkv(window=8)+graphkv"), base_name("snapkv")) == ("snapkv(window=8)", "snapkv")
    # The path of a preset is no base with wrappers, whatever its folder is called.
    assert split("runs/a+b/preset.toml") == ["runs/a+b/preset.toml"]
    assert parse("my.package:Holder.make(x=':')+adakv") == [("my.package:Holder.make", {"x": ":"}), ("adakv", {})]
    assert parse("snapkv(pooling='a, b', window=+8)+per(budgets=[1, 2], shares=(1, -2), on=True)+word") == [
        ("snapkv", {"pooling": "a, b", "window": 8}),
        ("per", {"budgets": [1, 2], "shares": (1, -2), "on": True}),
        ("word", {}),
    ]


@pytest.mark.parametrize("name", [*BASES, *(f"{base}+{wrapper}" for base in BASES for wrapper in WRAPPERS)])
def test_sinks_are_kept_by_every_policy(name):
    import numpy as np

    from graphkv import evict

    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 1, 2, 100, 8)).astype("float32")
    # Long keys at the front, which KNorm and others would drop.
    keys[:, :, :5] *= 20
    queries = rng.normal(size=(1, 4, 100, 8)).astype("float32")
    # With room for the widest window, that of LazyEviction.
    policy = make_policy(name, 72, sinks=5)
    done = evict(policy, keys, values=values, queries=queries, probes=queries)
    # Those that are kept as they are; `+mikv` keeps others in fewer bits.
    stays = (done.kept >= 0) & (True if done.levels is None else done.levels == 0)

    assert (done.kept[..., :5] == np.arange(5)).all()
    assert stays[..., :5].all()
    assert stays.sum() == 2 * 72 or (policy.needs().automatic and stays.sum() < 2 * 72)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "--policy must be one of full, snapkv"),
        ("snapkv+graph", "--policy must be one of"),
        ("full+graphkv", "--policy must be one of"),
        ("snapkv(window)", "options like window=8"),
        ("snapkv(windows=8)", "unexpected keyword argument 'windows'"),
        ("snapkv(window=0)", r"--policy snapkv\(window=0\): window must be at least 1"),
        ("snapkv+graphkv-paper", r"--policy must be one of .*\+graphkv, \+enhance, .*; got 'snapkv\+graphkv-paper'"),
        (
            "snapkv+degree(neighbors=3)",
            r"--policy snapkv\+degree\(neighbors=3\): got an unexpected keyword argument 'neighbors'; there are "
            "exponent, fusion, unrotated$",
        ),
        ("h2o+adakv(exponent=3)", "'exponent'; there are .*schedule"),
        ("snapkv(exponent=3)", "'exponent'; there are .*window"),
        ("kvpress:KnormPress", "presses of kvpress are for graphkv eval; got 'kvpress:KnormPress'"),
        ("preset.toml+graphkv", r"must be a base and its wrappers, such as .*; got 'preset.toml' in"),
        ("snapkv+graphkv(signal=degree)", "unexpected keyword argument 'signal'"),
        ("snapkv+graphkv(neighbors=-3)", r"--policy snapkv.*: neighbors must be at least 0; got -3"),
        ("snapkv+", r"--policy must be a base and its wrappers, such as .*; got '' in 'snapkv\+'"),
        ("snapkv(", r"--policy must be a base and its wrappers, such as .*; got 'snapkv\(' in"),
        ("snapkv(8)", "options like window=8"),
        ("snapkv(**8)", "options like window=8"),
        ("snapkv(window=8, window=9)", "options like window=8"),
        ("snapkv(window=f(8))", "options like window=8"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ArgumentError, match=message):
        make_policy(name, 64)
