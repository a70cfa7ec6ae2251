"""What graphkv hands out can be pickled and copied: backends, policies, graphs and evictions, on every library."""

import copy
import dataclasses
import functools
import json
import multiprocessing
import pickle
import sys
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest

import graphkv
from graphkv import Backend, BackendError, Decay, GraphKV, KNorm, LayerBudgets, Policy, build_graph, evict
from graphkv.adapters.plain import from_plain, is_known, to_plain
from graphkv.backends.numpy import SPARSE
from graphkv.core import ArgumentError, Assessment, Layer, LayerShape, Memory, Requirements
from graphkv.core.backend import load
from graphkv.core.files import write_whole
from tests.support.policies import every_policy

RNG = np.random.default_rng(3)
KEYS, VALUES, QUERIES = (RNG.normal(size=(2, heads, 20, 8)).astype(np.float32) for heads in (2, 2, 4))
LIBRARIES = ["numpy", "torch", "jax"]
COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
each_backend = pytest.mark.parametrize("name", LIBRARIES)
POLICIES = every_policy(9)
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
MINE = dataclasses.replace(SPARSE, name="mine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newest(Policy):
    """A policy of the user's own."""

    step: int = 1

    def score(self, layer, memory):
        return layer.xp.cumulative_sum(layer.xp.ones_like(layer.keys[..., 0]), axis=-1)


def found(name):
    if name == "jax":
        pytest.importorskip("jax")
    return load(name)


def array(backend, x):
    return backend.xp.asarray(np.array(x))


def leaves(value, path=""):
    """List the arrays and plain values in nested dataclasses and mappings, with where they stand."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (Backend, Policy)):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return [leaf for key, each in value.items() for leaf in leaves(each, f"{path}.{key}")]
    return [(path, value)]


def assert_same(made, value):
    before, after = leaves(value), leaves(made)
    assert [path for path, _ in after] == [path for path, _ in before]
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert type(new) is type(old), path
        if hasattr(old, "dtype"):
            assert new.dtype == old.dtype, path
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old), err_msg=path)
        else:
            assert new == old, path


@each_copy
@each_backend
def test_a_copy_of_a_shipped_backend_is_the_same_object(copied, name):
    assert copied(found(name)) is found(name)


@each_copy
def test_a_backend_without_an_entry_is_found_again_as_a_variable_of_its_module(copied):
    assert copied(SPARSE) is SPARSE
    assert copied(MINE) is MINE


def test_a_changed_backend_does_not_come_back_as_the_one_of_its_name():
    changed = dataclasses.replace(found("numpy"), top_k=None)

    assert copy.copy(changed) is copy.deepcopy(changed) is changed
    with pytest.raises(BackendError, match="backend 'numpy' can be pickled only where it is found again"):
        pickle.dumps(changed)


def test_a_pickled_backend_whose_variable_is_gone_is_refused_by_name(monkeypatch):
    module = ModuleType("away")
    module.IT = dataclasses.replace(found("numpy"), name="away")
    monkeypatch.setitem(sys.modules, "away", module)
    written = pickle.dumps(module.IT)
    del module.IT

    with pytest.raises(BackendError, match="the pickled backend must be 'IT' of 'away'"):
        pickle.loads(written)


@each_copy
@each_policy
def test_policies_come_back_equal(copied, policy):
    made = copied(policy)

    assert made == policy
    assert repr(made) == repr(policy)
    assert hash(made) == hash(policy)


@functools.cache
def decide(policy, backend):
    return evict(
        policy,
        array(backend, KEYS),
        values=array(backend, VALUES),
        queries=array(backend, QUERIES),
        probes=array(backend, QUERIES),
        layer=2,
        num_layers=4,
        valid=array(backend, np.arange(20) >= [[0], [3]]),
    )


# jax compiles for seconds: one policy with a graph and running sums is enough there.
DECISIONS = [(library, policy) for library in ("numpy", "torch") for policy in POLICIES] + [("jax", "graphkv-h2o")]


@each_copy
@pytest.mark.parametrize(("name", "policy"), DECISIONS, ids=map("-".join, DECISIONS))
def test_evictions_come_back_with_the_same_arrays(copied, name, policy):
    backend = found(name)
    decision = decide(POLICIES[policy], backend)
    made = copied(decision)

    assert_same(made, decision)
    assert made.backend is decision.backend
    # It can be used, not only looked at.
    keys = array(backend, KEYS)
    np.testing.assert_array_equal(np.asarray(made.apply(keys)), np.asarray(decision.apply(keys)))


@each_copy
@each_backend
def test_graphs_come_back_with_the_same_arrays(copied, name):
    backend = found(name)
    graph = build_graph(array(backend, KEYS), array(backend, KEYS[..., 0]), num_sources=3, num_neighbors=2)

    assert_same(copied(graph), graph)


@each_copy
def test_other_values_come_back_too(copied):
    numpy = found("numpy")
    layer = Layer(KEYS, queries=QUERIES, valid=KEYS[..., 0] > 0, backend=numpy)
    memory = Memory({"sums": KEYS[..., 0]}, {"threshold": KEYS[:, 0, 0, 0]})
    shape = LayerShape(num_tokens=9, query_heads=4, kv_heads=2, head_size=8, budget=3)
    for value in (layer, memory, Assessment(importance=KEYS, scores=KEYS), shape, Requirements(), GraphKV.requirements):
        assert_same(copied(value), value)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_deep_copy_shares_no_memory(name):
    backend = found(name)
    decision = decide.__wrapped__(POLICIES["graphkv-h2o"], backend)
    before = pickle.loads(pickle.dumps(decision))
    made = copy.deepcopy(decision)
    arrays = [each for _, each in leaves(made) if hasattr(each, "dtype")]
    assert len(arrays) >= 8
    for each in arrays:
        each[...] = 0

    assert_same(decision, before)


def test_evictions_reach_another_process():
    decision = decide(POLICIES["graphkv-h2o"], found("numpy"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(copy.copy, (decision,)), decision)


@each_policy
def test_policies_are_written_as_json_and_made_anew(policy):
    made = from_plain(json.loads(json.dumps(to_plain(policy))))

    assert made == policy
    # A budget of 1 is a token, one of 1.0 is everything.
    assert repr(made) == repr(policy)


def test_numbers_keep_their_kind():
    assert repr(from_plain(to_plain(KNorm(budget=1)))) == repr(KNorm(budget=1))
    assert repr(from_plain(to_plain(KNorm(budget=1.0)))) == repr(KNorm(budget=1.0))
    policy = GraphKV(KNorm(budget=9), Decay(neighbors=np.int64(2), source_ratio=Fraction(1, 4)))
    assert json.loads(json.dumps(to_plain(policy))) == to_plain(policy)
    assert from_plain(to_plain(policy)) == policy


def test_every_exported_policy_can_be_made():
    exported = {name for name in graphkv.__all__ if isinstance(getattr(graphkv, name), type)}
    exported = {name for name in exported if issubclass(getattr(graphkv, name), Policy)}
    # Two are no policies yet, and four hold arrays, which are equal to themselves only.
    exported -= {"Policy", "Wrapper", "Given", "SmallKV", "AttentionGate", "LESS"}

    assert exported == {type(policy).__name__ for policy in POLICIES.values()}
    assert all(is_known({"class": name}) for name in exported)


def test_a_policy_of_the_users_own_is_written_and_known_to_be_one():
    policy = GraphKV(Newest(budget=4))
    plain = to_plain(policy)

    assert plain["base"] == {"foreign class": "Newest", "budget": 4, "step": 1}
    assert not is_known(plain)
    with pytest.raises(ArgumentError, match=r"policy must be one of Absorb, AdaKV, .*; got 'Newest'"):
        from_plain(plain)


KNORM = to_plain(KNorm(budget=9))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "policy must be one of"),
        ({"class": "Policy", "budget": 3}, "got 'Policy'"),
        ({"class": ["KNorm"]}, "policy must be one of"),
        ({"class": "eval", "source": "1"}, "got 'eval'"),
        ({"class": "os.system"}, "got 'os.system'"),
        (KNORM | {"bugdet": 3}, "KNorm must be its own; it has no bugdet"),
        ({"class": "KNorm"}, "options of KNorm must be right; .*budget"),
        (KNORM | {"budget": -1}, "options of KNorm must be right; budget must be at least 0"),
        (KNORM | {"budget": "9"}, "options of KNorm must be right; budget"),
        (KNORM | {"budget": float("inf")}, "options of KNorm must be right; budget"),
        ({"class": "GraphKV", "base": 3}, "options of GraphKV must be right; base"),
        ({"class": "LayerBudgets", "base": KNORM, "budgets": 3}, "options of LayerBudgets must be right; budgets"),
        ({"class": "PerLayer", "base": KNORM, "policies": [3]}, "options of PerLayer must be right; policies"),
        ({"class": "GraphKV", "base": KNORM | {"budget": {"class": "eval"}}}, "got 'eval'"),
    ],
)
def test_what_is_no_policy_is_refused(plain, message):
    with pytest.raises(ArgumentError, match=message):
        from_plain(plain)


def test_sequences_come_back_as_tuples():
    policy = LayerBudgets(KNorm(budget=9), budgets=[1, 2])

    assert from_plain(to_plain(policy)).budgets == (1, 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    write_whole(path, lambda scratch: scratch.write_text("old"))

    def fail(scratch):
        assert (scratch.parent, scratch.suffix) == (tmp_path, ".txt")
        scratch.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    """Also from a writer that makes a file for its owner only."""
    plain = tmp_path / "plain"
    plain.touch()

    def write(scratch):
        scratch.write_text("text")
        scratch.chmod(0o600)

    write_whole(tmp_path / "whole", write)
    assert (tmp_path / "whole").stat().st_mode == plain.stat().st_mode
