"""LESS, against loops, against full attention where its features are exact, and inside the cache."""

from math import exp, pi, sqrt, tanh

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from graphkv import (
    H2O,
    LESS,
    TOVA,
    Absorb,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    GraphKV,
    KeyDiff,
    Memory,
    SnapKV,
    StreamingLLM,
    evict,
)
from graphkv.adapters.less import Kernel, absorbed, answer_of, key_features, query_features
from graphkv.core.answer import attend
from graphkv.core.backend import load
from graphkv.core.layer import LayerShape
from graphkv.evaluation.records import read_records
from graphkv.integrations.lmcache import TokenDrop
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.naming.policies import make_policy
from tests.adapters.loops import dot
from tests.integrations.tiny import tiny, tiny_llama
from tests.support.arrays import each_library, make

RNG = np.random.default_rng(29)
KEYS, VALUES, QUERIES = (RNG.normal(size=(2, heads, 20, size)) for heads, size in ((2, 4), (2, 3), (6, 4)))
VALID = np.arange(20) >= np.asarray([[0], [7]])


def random_kernel(seed=0, query_heads=6, kv_heads=2, size=4, width=5, number=3):
    draw = np.random.default_rng(seed).normal
    shapes = {
        "query_in": (query_heads, size, width),
        "query_out": (query_heads, width, number),
        "key_in": (kv_heads, size, width),
        "key_out": (kv_heads, width, number),
        "key_scale": (kv_heads, number),
        "mix": (kv_heads, number, number),
        "mix_scale": (kv_heads, number),
    }
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


KERNELS = [random_kernel(seed) for seed in (1, 2)]


def made(backend, base, kernels=KERNELS):
    return LESS(base, [Kernel(**{name: make(backend, x) for name, x in each.items()}) for each in kernels])


def run(backend, policy, valid=VALID, **options):
    values, queries = make(backend, VALUES), make(backend, QUERIES)
    facts = {"values": values, "queries": queries, "layer": 1, "num_layers": 2, "backend": backend} | options
    valid = None if valid is None else make(backend, valid, bool)
    return evict(policy, make(backend, KEYS), valid=valid, **facts)


def gelu(x):
    return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def through(vector, matrix):
    return [gelu(dot(vector, column)) for column in np.asarray(matrix, dtype=float).T]


def phi(query, head, kernel):
    return [abs(x) for x in through(through(query, kernel["query_in"][head]), kernel["query_out"][head])]


def psi(key, head, kernel):
    inner = through(through(key, kernel["key_in"][head]), kernel["key_out"][head])
    inner = [abs(float(d)) * x for d, x in zip(kernel["key_scale"][head], inner, strict=True)]
    mixed = [dot(inner, column) for column in np.asarray(kernel["mix"][head], dtype=float).T]
    return [abs(u + float(d) * m) for u, d, m in zip(inner, kernel["mix_scale"][head], mixed, strict=True)]


def state_of(row, head, gone, kernel, mass=None):
    """H and z, one token at a time."""
    values, weights = np.zeros((3, 3)), np.zeros(3)
    for token in gone:
        for r, feature in enumerate(psi(KEYS[row, head, token], head, kernel)):
            weight = feature * (1.0 if mass is None else mass[row, head, token])
            weights[r] += weight
            values[r] += weight * VALUES[row, head, token]
    return values, weights


def answered(query, row, head, kept, state, kernel):
    """The paper's formula for one query, as it stands."""
    values, weights = state
    feature, own = phi(query, head, kernel), head // 3
    numerator, denominator = np.zeros(3), dot(feature, weights)
    for r in range(3):
        numerator += feature[r] * values[r]
    for token in kept:
        weight = exp(dot(query, KEYS[row, own, token]) / sqrt(4))
        numerator, denominator = numerator + weight * VALUES[row, own, token], denominator + weight
    return numerator / denominator


BASES = {
    "position": StreamingLLM(budget=6, num_sinks=1),
    "h2o": H2O(budget=6),
    "window": SnapKV(budget=6, window=2, kernel_size=3),
    "graph": GraphKV(KeyDiff(budget=6)),
    "counts": AdaKV(SnapKV(budget=6, window=2, kernel_size=3)),
}


@each_library
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_what_goes_answers_as_in_loops(backend, base):
    policy, xp, kernel = made(backend, base), backend.xp, KERNELS[1]

    done, alone = run(backend, policy), run(backend, base)

    kept = backend.to_numpy(done.kept)
    assert kept.tolist() == backend.to_numpy(alone.kept).tolist()
    sums = {name: backend.to_numpy(done.state.layer[f"less_{name}"]) for name in ("values", "weights")}
    queries = make(backend, 2 * QUERIES[:, :, :2])
    answer = policy.answer(queries, done.state, layer=1, num_layers=2, backend=backend)
    logits = np.full((2, 6, 2, 20), -np.inf)
    for row in range(2):
        for head in range(6):
            stays = [j for j in kept[row, head // 3].tolist() if j >= 0]
            logits[row, head][:, stays] = 2 * QUERIES[row, head, :2] @ KEYS[row, head // 3, stays].T / sqrt(4)
    output = backend.to_numpy(attend(make(backend, logits), make(backend, VALUES), answer, xp=xp))
    for row in range(2):
        for head in range(6):
            own, stays = head // 3, [j for j in kept[row, head // 3].tolist() if j >= 0]
            state = state_of(row, own, sorted(set(range(7 * row, 20)) - set(stays)), kernel)
            np.testing.assert_allclose(sums["values"][row, own], state[0], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(sums["weights"][row, own], state[1], rtol=1e-3, atol=1e-4)
            for asked in range(2):
                expected = answered(2 * QUERIES[row, head, asked], row, head, stays, state, kernel)
                np.testing.assert_allclose(output[row, head, asked], expected, rtol=2e-3, atol=1e-4)


@each_library
def test_exact_features_make_full_attention_of_any_kept_set(backend):
    """Keys out of three; a query's features are its weights for those, a key's say which one it is."""
    xp, known = backend.xp, RNG.normal(size=(3, 4))
    kind = RNG.integers(3, size=(2, 2, 20))
    keys, one_hot = known[kind], np.eye(3)[kind]
    logits = QUERIES @ np.repeat(keys, 3, axis=1).swapaxes(2, 3) / sqrt(4)
    features = np.exp(QUERIES @ known.T / sqrt(4))
    stays = RNG.random((2, 2, 20)) < 0.3
    stays[..., -1] = True

    sums = absorbed(
        make(backend, np.zeros((2, 2, 3, 3))),
        make(backend, np.zeros((2, 2, 3))),
        make(backend, one_hot),
        make(backend, VALUES),
        make(backend, ~stays),
        xp=xp,
    )
    some = np.where(np.repeat(stays, 3, axis=1)[:, :, None], logits, -np.inf)
    answer = answer_of(make(backend, features), *sums, xp=xp)
    found = attend(make(backend, some), make(backend, VALUES), answer, xp=xp)
    without = attend(make(backend, some), make(backend, VALUES), xp=xp)

    full = backend.to_numpy(attend(make(backend, logits), make(backend, VALUES), xp=xp))
    np.testing.assert_allclose(backend.to_numpy(found), full, rtol=1e-4, atol=1e-5)
    assert np.abs(backend.to_numpy(without) - full).max() > 0.1


@each_library
def test_one_eviction_after_another_is_one_sum(backend):
    policy = made(backend, StreamingLLM(budget=6, num_sinks=0))

    first = run(backend, policy, values=make(backend, VALUES), valid=None)
    keys, values = (make(backend, x) for x in (KEYS, VALUES))
    again = evict(policy, keys, values=values, state=first.state, layer=1, num_layers=2, backend=backend)

    for name in ("less_values", "less_weights"):
        once, twice = (backend.to_numpy(done.state.layer[name]) for done in (first, again))
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-5, atol=1e-6)


@each_library
@pytest.mark.parametrize("budget", [0, 1, 19, 20, 50, 0.5])
def test_every_budget_has_its_state(backend, budget):
    done = run(backend, made(backend, StreamingLLM(budget=budget, num_sinks=1)), valid=None)
    number = min(10 if budget == 0.5 else budget, 20)
    kept = [] if not number else [0, *range(21 - number, 20)]

    weights = backend.to_numpy(done.state.layer["less_weights"])
    for row in np.ndindex(2, 2):
        _, expected = state_of(*row, sorted(set(range(20)) - set(kept)), KERNELS[1])
        np.testing.assert_allclose(weights[row], expected, rtol=1e-3, atol=1e-4)


@each_library
def test_what_was_merged_does_not_go_twice_and_counts_as_often_as_it_stands_for(backend):
    base, mass = StreamingLLM(budget=6, num_sinks=1), RNG.random((2, 2, 20)) + 1
    policy = made(backend, Absorb(base, threshold=0.5))

    done = run(backend, policy, valid=None, mass=make(backend, mass))

    into = backend.to_numpy(done.merge.into)
    assert (into >= 0).sum() > 6 * 4
    for row in np.ndindex(2, 2):
        gone = np.flatnonzero(into[row] < 0).tolist()
        expected = state_of(*row, gone, KERNELS[1], mass)
        np.testing.assert_allclose(
            backend.to_numpy(done.state.layer["less_values"])[row], expected[0], rtol=1e-3, atol=1e-4
        )


@each_library
def test_a_state_that_knows_nothing_answers_nothing(backend):
    policy = made(backend, StreamingLLM(budget=30))
    done = run(backend, policy, valid=None)

    answer = policy.answer(make(backend, QUERIES), done.state, layer=0, num_layers=2, backend=backend)

    assert (backend.to_numpy(answer.logits) == -np.inf).all()
    assert (backend.to_numpy(answer.values) == 0).all()


def test_features_are_those_of_numbers_worked_by_hand():
    """GELU of 1 is 0.8412, of that 0.6728; the scale is the absolute -2, and half of it comes from the mixing."""
    one = np.ones((1, 1, 1))
    kernel = Kernel(
        query_in=one, query_out=one, key_in=one, key_out=one,
        key_scale=np.asarray([[-2.0]]), mix=-one, mix_scale=np.asarray([[0.5]]),
    )  # fmt: skip
    x = np.ones((1, 1, 1, 1))

    assert query_features(x, kernel, xp=np).round(4) == 0.6728
    assert key_features(x, kernel, xp=np).round(4) == round(2 * 0.6728 * 0.5, 4)
    assert query_features(-x, kernel, xp=np).round(4) == round(abs(gelu(gelu(-1.0))), 4)


def test_the_cost_is_that_of_the_base_and_of_the_keys():
    shape = LayerShape(num_tokens=1000, query_heads=6, kv_heads=2, head_size=4, budget=9)
    base = KeyDiff(budget=9)
    cost = LESS(base, [Kernel(**KERNELS[0])]).cost(shape)

    assert cost.flops - base.cost(shape).flops == 2 * 1000 * 2 * (4 * 5 + 5 * 3)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    where = tmp_path_factory.mktemp("less") / "less.safetensors"
    kernels = [random_kernel(seed, size=8) for seed in range(3)]
    save_file({f"layers.{n}.{name}": x for n, each in enumerate(kernels) for name, x in each.items()}, where)
    return where


def text(rows=1, tokens=50):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(3))


def read(model, cache, ids, **inputs):
    with observing(model), torch.inference_mode():
        return model(ids, **with_cache(model, cache), **inputs).logits


def read_and_seen(model, cache, ids, **inputs):
    """What the attention of every layer has found for the last token."""
    found = []
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: found.append(given[0][:, -1]))
             for layer in model.model.layers]  # fmt: skip
    read(model, cache, ids, **inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_models_attention_asks_the_state(path, implementation, backend, factor):
    model = tiny_llama(attn_implementation=implementation)
    for layer in model.model.layers:
        # Some models scale their logits by another number than the root of the head size.
        layer.self_attn.scaling *= factor
    ids, mask = text(rows=2), torch.ones(2, 50, dtype=torch.int64)
    mask[1, :9] = 0
    policy = LESS.load(AdaKV(TOVA(budget=8)), path)
    cache = EvictingCache(policy, every=100, backend=backend)
    read(model, cache, ids, attention_mask=mask)
    grown = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], dim=1)

    found = read_and_seen(model, cache, text(rows=2, tokens=3), attention_mask=grown)

    for number, layer in enumerate(cache.layers):
        keys, values, queries = (x.float() for x in (layer.keys, layer.values, layer.queries[:, :, -1:]))
        logits = queries @ keys.repeat_interleave(3, dim=1).mT / sqrt(8)
        logits = logits.masked_fill(~layer.valid.repeat_interleave(3, dim=1)[:, :, None], -torch.inf)
        answer = policy.answer(queries, Memory(layer=layer.layer_state), layer=number, num_layers=3)
        assert (answer.logits > logits.amin()).any()
        expected = attend(logits, values, answer, xp=load("torch").xp)
        torch.testing.assert_close(found[number], expected.transpose(1, 2).flatten(1), rtol=1e-3, atol=1e-4)


def test_tokens_together_find_what_they_find_one_at_a_time(model, path):
    policy, later = LESS.load(KeyDiff(budget=10), path), text(tokens=6)
    together, alone, without = EvictingCache(policy), EvictingCache(policy), EvictingCache(KeyDiff(budget=10))
    for cache in (together, alone, without):
        read(model, cache, text())

    both = read(model, together, later), torch.cat([read(model, alone, later[:, j : j + 1]) for j in range(6)], dim=1)

    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
    assert (both[0] - read(model, without, later)).abs().max() > 0.1
    assert together.nbytes == without.nbytes + 3 * 2 * 3 * (8 + 1) * 4


def test_features_of_zero_change_nothing(model):
    kernels = [{**random_kernel(seed, size=8)} for seed in range(3)]
    silent = [Kernel(**{**each, "query_out": 0 * each["query_out"]}) for each in kernels]
    silent = [Kernel(**{name: torch.as_tensor(getattr(each, name)) for name in Kernel.AXES}) for each in silent]
    base, later = SnapKV(budget=12, window=4), text(tokens=4)
    caches = EvictingCache(LESS(base, silent)), EvictingCache(base)
    for cache in caches:
        read(model, cache, text())

    torch.testing.assert_close(*(read(model, cache, later) for cache in caches), rtol=1e-4, atol=1e-4)


def test_the_state_grows_while_the_model_writes_and_follows_its_rows(model, path, tmp_path):
    policy = LESS.load(H2O(budget=10), path)
    with evicting(model, policy, every=4) as run_:
        output = model.generate(text(rows=2), max_new_tokens=20, do_sample=False, num_beams=2)
    assert output.shape == (2, 70)
    assert all(layer.num_stored < 14 + 1 for layer in run_.cache.layers)

    cache = EvictingCache(policy, every=4)
    read(model, cache, text())
    before = cache.layers[0].layer_state["less_weights"]
    read(model, cache, text(tokens=5))
    assert (cache.layers[0].layer_state["less_weights"] > before).all()

    cache.save(tmp_path / "cache.safetensors")
    loaded = EvictingCache.load(tmp_path / "cache.safetensors", policy=policy, model=model)
    ids = text(tokens=2)
    torch.testing.assert_close(read(model, loaded, ids), read(model, cache.copy(), ids), rtol=1e-4, atol=1e-4)


def test_a_cache_without_a_policy_is_evicted_once(model, path, tmp_path):
    cache = EvictingCache(num_queries=50)
    read(model, cache, text())
    policy = LESS.load(SnapKV(budget=10, window=4), path)
    cache.evict(policy)

    assert cache.layers[0].answering is policy
    with pytest.raises(ArgumentError, match="another policy than its own answers for cannot be saved; got LESS"):
        cache.save(tmp_path / "cache.safetensors")
    plain = EvictingCache(num_queries=50)
    read(model, plain, text())
    plain.evict(SnapKV(budget=10, window=4))
    with pytest.raises(ArgumentError, match=r"that answers for dropped .*; got \['LESS\(SnapKV\)', 'none'\]"):
        EvictingCache.stacked([cache, plain])
    ids = text(tokens=2)
    alone, both = read(model, cache.copy(), ids), read(model, EvictingCache.stacked([cache, cache]), ids.expand(2, -1))
    torch.testing.assert_close(both, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_it_is_evaluated_beside_others(path, tmp_path):
    from graphkv.__main__ import main
    from tests.integrations.tiny import save_tiny_llama

    save_tiny_llama(tmp_path / "model")
    policies = ["knorm", f"knorm+less(path='{path}')"]
    arguments = [each for policy in policies for each in ("--policy", policy)]
    sizes = [
        "--length",
        "64",
        "--budget",
        "16",
        "--prompts",
        "1",
        "--workers",
        "1",
        "--task",
        "continuation",
        "--mode",
        "agnostic",
    ]
    assert (
        main(["eval", "--output", str(tmp_path / "run"), "--model", str(tmp_path / "model"), *arguments, *sizes]) == 0
    )
    records = read_records(tmp_path / "run")
    found = {(each.task, each.mode, each.policy): each.nll for each in records}
    assert all(found[task, mode, policies[1]] != nll for (task, mode, name), nll in found.items() if name == "knorm")


def test_where_nobody_asks_it_is_refused(path):
    base = StreamingLLM(budget=10)
    policy = LESS.load(base, path)
    cache = EvictingCache(policy, rerotate=True)
    with pytest.raises(ArgumentError, match="rerotate must be False for a policy that answers"):
        read(tiny_llama(), cache, text())
    from transformers import MistralConfig, MistralForCausalLM

    from tests.integrations.tiny import SIZES

    sliding = tiny(MistralForCausalLM, MistralConfig, **SIZES, sliding_window=24)
    with pytest.raises(ArgumentError, match="policy must not answer for dropped tokens in a layer whose window"):
        read(sliding, EvictingCache(policy), text())
    with pytest.raises(ArgumentError, match="must not answer for dropped tokens, which an engine would not ask; LESS"):
        TokenDrop({"policy": f"streaming-llm+less(path='{path}')", "budget": 10})


def test_it_has_a_name_with_a_path(path):
    policy = make_policy(f"snapkv(window=4)+less(path='{path}')+graphkv", 9)

    assert isinstance(policy.base, LESS)
    assert policy.budget == 9
    assert policy.needs().answers
    with pytest.raises(ArgumentError, match=r"--policy snapkv\+less: .*'path'"):
        make_policy("snapkv+less", 9)
    with pytest.raises(ArgumentError, match=r"\+less, or a preset"):
        make_policy("snapkv+more", 9)


def of(**changes):
    return Kernel(**{**KERNELS[0], **changes})


WRONG = {
    "no sequence": (lambda: LESS(KeyDiff(budget=3), of()), ArgumentTypeError, "kernels must be a sequence of Kernel"),
    "no base": (lambda: LESS(3, [of()]), ArgumentTypeError, "base must be a Policy"),
    "features": (
        lambda: LESS(KeyDiff(budget=3), [of(mix=np.zeros((2, 3, 4)))]),
        ArgumentError,
        r"kernels\[0\].mix must have shape \(kv_heads=2, R=3, R=3\); got \(2, 3, 4\)",
    ),
    "layers": (lambda: run_in_numpy([of()]), ArgumentError, "with layers=2, kv_heads=2, D=4; got some for layers=1"),
    "heads": (
        lambda: run_in_numpy([Kernel(**random_kernel(kv_heads=3))] * 2),
        ArgumentError,
        "kv_heads=2, D=4; got some for layers=2, kv_heads=3, D=4",
    ),
    "query heads": (
        lambda: LESS(KeyDiff(budget=3), [of(), of()]).answer(
            QUERIES[:, :4], run_in_numpy([of(), of()]).state, layer=0, num_layers=2
        ),
        ArgumentError,
        "query_heads=4, kv_heads=2, D=4; got some for layers=2, query_heads=6",
    ),
    "library": (
        lambda: run_in_numpy([Kernel(**{name: torch.as_tensor(x) for name, x in KERNELS[0].items()})] * 2),
        BackendError,
        "kernels",
    ),
    "no values": (
        lambda: evict(LESS(KeyDiff(budget=30), [of()]), KEYS),
        ArgumentError,
        "values must be given for LESS; got None",
    ),
    "another policy's state": (
        lambda: evict(LESS(KeyDiff(budget=3), [of()]), KEYS, values=VALUES, state=Memory(layer={"x": np.zeros(2)})),
        ArgumentError,
        r"state must hold \['less_values', 'less_weights'\]",
    ),
}


def run_in_numpy(kernels):
    return evict(LESS(KeyDiff(budget=3), kernels), KEYS, values=VALUES, num_layers=2)


@pytest.mark.parametrize(("call", "kind", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
