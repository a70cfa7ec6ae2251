"""Attention-Gate, against loops; and files of weights, which must fit the model."""

import struct
from array import array
from math import exp, sqrt

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from graphkv import AdaKV, ArgumentError, ArgumentTypeError, AttentionGate, BackendError, GraphKV, evict
from graphkv.adapters.attention_gate import Gate, gate_logits
from graphkv.core.layer import LayerShape
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import make_policy
from tests.adapters.loops import dot, softmax
from tests.integrations.tiny import tiny_llama
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(23)
KEYS, VALUES = RNG.normal(size=(2, 3, 20, 4)), RNG.normal(size=(2, 3, 20, 6))
VALID = np.arange(20) >= np.asarray([[0], [7]])
KV_HEADS, HEADS, WIDTH = 3, 2, 5


def random_gate(kv_heads=KV_HEADS, features=10, seed=0, scale=1.0):
    draw = np.random.default_rng(seed).normal
    inner = (kv_heads, HEADS, features, WIDTH)
    arrays = [draw(scale=scale, size=inner) for _ in range(3)]
    rest = draw(scale=scale, size=(kv_heads, HEADS, WIDTH)), draw(size=kv_heads)
    return dict(zip(("query", "key", "value", "out", "bias"), [x.astype(np.float32) for x in (*arrays, *rest)]))  # noqa: B905


GATES = [random_gate(seed=seed) for seed in (1, 2)]


def as_file(path, gates):
    save_file({f"layers.{number}.{name}": x for number, gate in enumerate(gates) for name, x in gate.items()}, path)
    return path


def made(backend, gates=GATES, **options):
    return AttentionGate(
        gates=[Gate(**{name: make(backend, x) for name, x in gate.items()}) for gate in gates], **options
    )


def run(backend, policy, valid=VALID, **options):
    keys, values = make(backend, KEYS), make(backend, VALUES)
    facts = {"values": values, "unrotated_keys": keys, "layer": 1, "num_layers": 2, "backend": backend}
    return evict(policy, keys, **facts, valid=None if valid is None else make(backend, valid, bool), **options)


def by_loops(gate, row, head, real):
    """The gate's logit of every real token, one number at a time."""
    tokens = [[*KEYS[row, head, t], *VALUES[row, head, t]] for t in real]
    logits = []
    for token in tokens:
        total = float(gate["bias"][head])
        for inner in range(HEADS):
            query, key, value = ((lambda x, w=gate[name][head, inner]: [dot(x, column) for column in w.T])
                                 for name in ("query", "key", "value"))  # fmt: skip
            paid = softmax([dot(query(token), key(other)) / sqrt(WIDTH) for other in tokens])
            found = [sum(p * value(other)[a] for p, other in zip(paid, tokens, strict=True)) for a in range(WIDTH)]
            total += dot(found, gate["out"][head, inner])
        logits.append(total)
    return logits


@each_library
def test_importance_is_that_of_loops(backend):
    importance = backend.to_numpy(run(backend, made(backend, budget=5)).importance)

    for row, real in ((0, range(20)), (1, range(7, 20))):
        for head in range(KV_HEADS):
            expected = [1 / (1 + exp(-g)) for g in by_loops(GATES[1], row, head, real)]
            np.testing.assert_allclose(importance[row, head, list(real)], expected, rtol=1e-3, atol=1e-5)


@each_library
def test_a_file_is_the_same_as_its_arrays_in_every_library(backend, tmp_path):
    policy = AttentionGate.load(as_file(tmp_path / "gates.safetensors", GATES), budget=5)

    ours, theirs = run(backend, policy), run(backend, made(backend, budget=5))

    assert backend.to_numpy(ours.kept).tolist() == backend.to_numpy(theirs.kept).tolist()
    np.testing.assert_allclose(backend.to_numpy(ours.importance), backend.to_numpy(theirs.importance), rtol=1e-6)


@each_library
@pytest.mark.parametrize("budget", [0, 1, 3, 12, 19, 20, 50, 0.5])
def test_exactly_the_budget_is_kept_with_the_first_tokens(backend, budget):
    for wrap in (lambda base: base, GraphKV, AdaKV):
        done = run(backend, wrap(made(backend, budget=budget, num_sinks=2)))
        kept = backend.to_numpy(done.kept)
        number = min(10 if budget == 0.5 else budget, 20)

        assert ((kept >= 0).sum(axis=(1, 2)) == 3 * number).all()
        if number >= 2:
            assert all({0, 1} <= set(row) for row in kept[0].tolist())
        if 2 <= number <= 13:
            assert all({7, 8} <= set(row) and min(set(row) - {-1}) >= 7 for row in kept[1].tolist())


@each_library
def test_a_threshold_lets_the_rows_find_their_budgets(backend):
    policy = made(backend, budget=1.0, threshold=0.5, num_sinks=1)
    scores = backend.to_numpy(run(backend, made(backend, budget=5)).importance)

    done = run(backend, policy)
    bound = run(backend, made(backend, budget=4, threshold=0.5, num_sinks=1))

    assert policy.needs().automatic
    for row in np.ndindex(2, 3):
        first = 7 * row[0]
        above = [j for j in range(first, 20) if scores[row][j] > 0.5 or j == first]
        assert [j for j in backend.to_numpy(done.kept)[row].tolist() if j >= 0] == above
        best = sorted(above, key=lambda j, row=row, first=first: (j != first, -scores[row][j], j))[:4]
        assert [j for j in backend.to_numpy(bound.kept)[row].tolist() if j >= 0] == sorted(best)
        assert int(backend.to_numpy(bound.counts)[row]) == len(best)


@each_library
def test_of_equal_importance_the_first_tokens_stay(backend):
    flat = {name: np.zeros_like(x) for name, x in GATES[0].items()}

    kept = backend.to_numpy(run(backend, made(backend, [flat, flat], budget=4), valid=None).kept)

    assert (kept == [0, 1, 2, 3]).all()


@each_library
def test_blocks_change_nothing_and_what_is_not_finite_is_not_looked_at(backend):
    xp, gate = backend.xp, made(backend, budget=1).gates[0]
    features = np.concatenate([KEYS, VALUES], axis=-1)
    features[0, 0, 5, 2] = np.inf
    valid = make(backend, np.ones((2, 3, 20)), bool)

    whole, parts = (gate_logits(make(backend, features), gate, valid, block_size=b, xp=xp) for b in (50, 3))
    without = gate_logits(make(backend, np.delete(features, 5, axis=2)), gate, valid[:, :, 1:], xp=xp)

    np.testing.assert_allclose(backend.to_numpy(parts), backend.to_numpy(whole), rtol=1e-4, atol=1e-5)
    rest = np.delete(backend.to_numpy(whole), 5, axis=2)[0, 0]
    np.testing.assert_allclose(rest, backend.to_numpy(without)[0, 0], rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    large = {**GATES[1], "bias": np.asarray([2000.0, -2000.0, 0.0], dtype=np.float32)}
    gate = Gate(**large)

    with np.errstate(all="raise", under="ignore"):
        importance = evict(AttentionGate(budget=5, gates=[gate]), KEYS, values=VALUES, unrotated_keys=KEYS).importance

    assert (importance[:, 0] == 1).all()
    assert (importance[:, 1] == 0).all()


def test_jax_traces_a_gate_from_a_file(tmp_path):
    jax = pytest.importorskip("jax")
    policy = AttentionGate.load(as_file(tmp_path / "gates.safetensors", GATES[1:]), budget=5)

    @jax.jit
    def kept(keys, values):
        return evict(policy, keys, values=values, unrotated_keys=keys).kept

    ours = kept(jax.numpy.asarray(KEYS), jax.numpy.asarray(VALUES))
    assert np.asarray(ours).tolist() == evict(policy, KEYS, values=VALUES, unrotated_keys=KEYS).kept.tolist()


def test_the_cost_is_that_of_its_products():
    shape = LayerShape(num_tokens=1000, query_heads=6, kv_heads=3, head_size=5, budget=9)
    cost = AttentionGate(budget=9, gates=[Gate(**GATES[0])]).cost(shape)

    # Two multiplications and additions per entry of the products, and five for a softmax.
    projections = 3 * 2 * 3 * HEADS * 1000 * 10 * WIDTH
    assert cost.flops == projections + 3 * HEADS * 1000 * 1000 * (2 * 2 * WIDTH + 5)
    assert cost.bytes == 4 * 3 * HEADS * 256 * 1000


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def gates(model, tmp_path_factory):
    size = 2 * model.config.hidden_size // model.config.num_attention_heads
    random = [random_gate(2, size, seed=seed, scale=0.5) for seed in range(3)]
    return as_file(tmp_path_factory.mktemp("gates") / "gates.safetensors", random)


def text(rows=1, tokens=50):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(3))


def test_a_cache_keeps_what_the_gate_says(model, gates):
    ids, policy = text(), AttentionGate.load(gates, budget=12)
    cache = EvictingCache(policy)
    with observing(model), torch.inference_mode():
        model(ids, **with_cache(model, cache))
        whole = EvictingCache()
        model(ids, **with_cache(model, whole))
        attention, states = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
        hidden = states(model.model.embed_tokens(ids))
        keys, values = ((f(hidden).view(1, 50, 2, 8).transpose(1, 2)) for f in (attention.k_proj, attention.v_proj))

    # The first layer's own projections, before any rotation.
    expected = evict(policy, whole.layers[0].keys, values=values, unrotated_keys=keys, num_layers=3)
    assert cache.layers[0].true_positions.tolist() == expected.kept.tolist()
    assert all(layer.num_stored == 12 for layer in cache.layers)


def test_a_padded_row_keeps_what_it_keeps_alone(model, gates):
    ids, mask = text(rows=2), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :13] = 0

    def positions(ids, **inputs):
        cache = EvictingCache(GraphKV(AttentionGate.load(gates, budget=12)))
        with observing(model), torch.inference_mode():
            model(ids, **with_cache(model, cache), **inputs)
        return [layer.true_positions for layer in cache.layers]

    for one, other in zip(positions(ids, attention_mask=mask), positions(ids[1:, 13:]), strict=True):
        assert (one[1] - 13).tolist() == other[0].tolist()


def test_a_gate_goes_on_while_the_model_writes(model, gates):
    with evicting(model, AttentionGate.load(gates, budget=12), every=4) as run:
        output = model.generate(text(), max_new_tokens=20, do_sample=False)

    assert output.shape == (1, 70)
    assert all(12 <= layer.num_stored < 12 + 4 + 1 for layer in run.cache.layers)
    with evicting(model, AttentionGate.load(gates, budget=30, threshold=0.5)) as run:
        model.generate(text(), max_new_tokens=3, do_sample=False)
    assert all(layer.budgets_found is not None for layer in run.cache.layers)


def test_it_has_a_name_with_a_path(gates):
    policy = make_policy(f"attention-gate(path='{gates}', threshold=0.25)+graphkv", 9, sinks=2)

    assert isinstance(policy.base, AttentionGate)
    assert (policy.base.threshold, policy.base.num_sinks, policy.budget) == (0.25, 2, 9)
    with pytest.raises(ArgumentError, match=r"--policy attention-gate: .*'path'"):
        make_policy("attention-gate", 9)
    with pytest.raises(ArgumentError, match=r"path none.safetensors cannot be read: No such file"):
        make_policy("attention-gate(path='none.safetensors')", 9)


def of(gate=None, **changes):
    return Gate(**{**GATES[0], **(gate or {}), **changes})


WRONG = {
    "no sequence": (
        lambda: AttentionGate(budget=3, gates="gates"),
        ArgumentTypeError,
        "gates must be a sequence of Gate",
    ),
    "none": (
        lambda: AttentionGate(budget=3, gates=[]),
        ArgumentError,
        "gates must hold a Gate for each layer; got none",
    ),
    "no gate": (
        lambda: AttentionGate(budget=3, gates=[GATES[0]]),
        ArgumentTypeError,
        r"gates\[0\] must be a Gate; got dict",
    ),
    "no array": (
        lambda: AttentionGate(budget=3, gates=[of(bias=3)]),
        ArgumentTypeError,
        r"gates\[0\].bias must be an array",
    ),
    "width": (
        lambda: AttentionGate(budget=3, gates=[of(key=np.zeros((3, 2, 10, 4)))]),
        ArgumentError,
        r"gates\[0\].key must have shape \(kv_heads=3, H=2, F=10, A=5\); got \(3, 2, 10, 4\)",
    ),
    "axes": (
        lambda: AttentionGate(budget=3, gates=[of(out=np.zeros((3, 2)))]),
        ArgumentError,
        r"gates\[0\].out must have",
    ),
    "other layer": (
        lambda: AttentionGate(budget=3, gates=[of(), Gate(**random_gate(kv_heads=2))]),
        ArgumentError,
        r"gates\[1\].query must have shape \(kv_heads=3, H=2, F=10, A=5\); got \(2, 2, 10, 5\)",
    ),
    "threshold": (
        lambda: AttentionGate(budget=3, gates=[of()], threshold=1.0),
        ArgumentError,
        "threshold must be below 1",
    ),
    "sinks": (
        lambda: AttentionGate(budget=3, gates=[of()], num_sinks=-1),
        ArgumentError,
        "num_sinks must be at least 0",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_bad_gates_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_gates_of_another_model_are_named_and_nothing_is_evicted(model, tmp_path):
    policy = AttentionGate(budget=3, gates=[of(), of()])
    facts = {"values": VALUES, "unrotated_keys": KEYS}
    with pytest.raises(ArgumentError, match="gates must be those of this model, with layers=3, kv_heads=3, F=10; got"):
        evict(policy, KEYS, **facts, num_layers=3)
    with pytest.raises(ArgumentError, match="kv_heads=2, F=10; got some for layers=2, kv_heads=3, F=10"):
        evict(policy, KEYS[:, :2], **{name: x[:, :2] for name, x in facts.items()}, num_layers=2)
    with pytest.raises(ArgumentError, match="F=8; got some for layers=2, kv_heads=3, F=10"):
        evict(policy, KEYS, values=KEYS, unrotated_keys=KEYS, num_layers=2)
    with pytest.raises(BackendError, match="gates"):
        evict(made_in_torch(), KEYS, **facts, num_layers=2)
    with pytest.raises(ArgumentError, match="unrotated_keys must be given for AttentionGate"):
        evict(policy, KEYS, values=VALUES, num_layers=2)
    cache = EvictingCache(policy)
    with pytest.raises(ArgumentError, match="gates must be those of this model"), observing(model):
        model(text(), **with_cache(model, cache))
    assert cache.layers[0].num_dropped == 0


def made_in_torch():
    gates = [Gate(**{name: torch.as_tensor(x) for name, x in gate.items()}) for gate in GATES]
    return AttentionGate(budget=3, gates=gates)


def broken(path, change):
    content = path.read_bytes()
    path.write_bytes(change(content))
    return path


def header(text):
    return struct.pack("<Q", len(text)) + text.encode()


FILES = {
    "a layer short": (lambda p: as_file(p, [GATES[0], {}, GATES[1]]), "it lacks layers.1.query, layers.1.key"),
    "an array short": (
        lambda p: as_file(p, [{**GATES[0], "bias": GATES[0]["bias"]}, {"key": GATES[1]["key"]}]),
        "it lacks",
    ),
    "a surplus array": (lambda p: as_file(p, [{**GATES[0], "kernel": GATES[0]["bias"]}]), "got 'layers.0.kernel'"),
    "another policy's": (lambda p: as_file(p, [{"phi": GATES[0]["bias"]}]), "got 'layers.0.phi'"),
    "half precision": (
        lambda p: as_file(p, [{name: x.astype(np.float16) for name, x in GATES[0].items()}]),
        "must hold float32 arrays, of type F32; layers.0",
    ),
    "cut off": (lambda p: broken(as_file(p, GATES), lambda x: x[:-40]), "not fully covered"),
    "empty": (lambda p: (p.write_bytes(b""), p)[1], "header too small"),
    "no header": (lambda p: (p.write_bytes(b"\xff" * 40), p)[1], "safetensors format; .*header"),
    "a list": (lambda p: (p.write_bytes(header("[1]")), p)[1], "safetensors format; .*header"),
    "sizes": (
        lambda p: (p.write_bytes(header('{"layers.0.bias":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}')), p)[1],
        "safetensors format; ",
    ),
    "nothing": (lambda p: (p.write_bytes(header("{}")), p)[1], "it lacks layers.0.query"),
}


@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
def test_bad_files_are_named(write, message, tmp_path):
    path = write(tmp_path / "gates.safetensors")

    with pytest.raises(ArgumentError, match=message) as caught:
        AttentionGate.load(path, budget=3)
    assert "path" in str(caught.value)
    assert "gates.safetensors" in str(caught.value)


def test_numbers_of_a_file_are_those_that_were_saved(tmp_path):
    gate = AttentionGate.load(as_file(tmp_path / "gates.safetensors", GATES), budget=3).gates[1]

    assert gate.query.shape == (3, 2, 10, 5)
    assert gate.query.data == array("f", GATES[1]["query"].ravel())
