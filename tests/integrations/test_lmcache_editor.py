"""The editor of LMCache's caches, without LMCache: against a cache that transformers shortens with the same choice."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from graphkv import (
    H2O,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Degree,
    GraphKV,
    KeyDiff,
    KNorm,
    PyramidKV,
    Shared,
    SnapKV,
)
from graphkv.integrations.lmcache import editor, versions
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import SIZES, tiny

T, CHUNK, BUDGET = 96, 8, 43
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FAMILIES = {
    "llama": ("Llama", {}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "heads of their own size": ("Qwen3", {"head_dim": 12}),
    "half of a head": ("Phi3", {"rope_parameters": HALF}),
    "neighbors, as GPT-J": ("Glm", {"head_dim": 16}),
    "without rotation in some layers": ("SmolLM3", {"no_rope_layer_interval": 2}),
}
SMALL = {"window": 6, "kernel_size": 3, "num_sinks": 2}
POLICIES = {
    "keydiff": KeyDiff(budget=BUDGET, num_sinks=2),
    "snapkv": SnapKV(budget=BUDGET, **SMALL),
    "graph": GraphKV(SnapKV(budget=BUDGET, **SMALL)),
    "degree of unrotated keys": GraphKV(SnapKV(budget=0.45, **SMALL), Degree(), unrotated=True),
}


def model_of(kind, options):
    classes = (getattr(transformers, f"{kind}{end}") for end in ("ForCausalLM", "Config"))
    return tiny(*classes, **SIZES | options)


def flat(x):
    """From (1, heads, T, D) to (T, heads D)."""
    return x[0].transpose(0, 1).flatten(-2)


def stored(model, ids):
    """What LMCache would hold of a prompt: keys and values, and queries."""
    with observing(model), torch.inference_mode():
        cache = EvictingCache(num_queries=ids.shape[1])
        model(ids, **with_cache(model, cache))
    layers = cache.attention_layers
    keys, values = (torch.stack([flat(getattr(layer, name)) for layer in layers]) for name in ("keys", "values"))
    return {"kv": torch.stack([keys, values]), "query": torch.stack([flat(layer.queries) for layer in layers])[None]}


def whole(policy):
    """The same with the budget that is left of whole chunks."""
    return Shared(policy, over="layers")


def going_on(model, edited, ids):
    """Logits of the model that finds the edited cache as the prefix of what it reads."""
    heads, cache = model.config.num_key_value_heads, DynamicCache()
    for layer, (keys, values) in enumerate(zip(*edited, strict=True)):
        cache.update(*(x.unflatten(-1, (heads, -1)).transpose(0, 1)[None] for x in (keys, values)), layer)
    with torch.inference_mode():
        return model(ids, **with_cache(model, cache)).logits


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(1)
    return torch.randint(1, 97, (1, T))


def compare(model, policy, ids):
    tensors = stored(model, ids)
    before = {kind: tensor.clone() for kind, tensor in tensors.items()}
    edited, kept_ids = editor(policy, model.config, chunk_size=CHUNK)(tensors, ids[0].tolist())

    assert all(torch.equal(tensors[kind], before[kind]) for kind in before)
    exact = Shared(policy if policy.budget == 40 else _with_budget(policy, 40), over="layers")
    with evicting(model, exact, rerotate=True), torch.inference_mode():
        cache = EvictingCache(exact, rerotate=True)
        model(ids, **with_cache(model, cache))
        positions = cache.layers[0].positions[0, 0]
        assert edited.shape == (2, len(cache.layers), 40, before["kv"].shape[-1])
        assert kept_ids == ids[0, positions].tolist()
        wanted = model(ids[:, :7], **with_cache(model, cache)).logits
    assert torch.equal(edited[1], before["kv"][1][:, positions])
    assert torch.allclose(going_on(model, edited, ids[:, :7]), wanted, atol=1e-4)


def _with_budget(policy, budget):
    """A policy of the budget that whole chunks leave."""
    if isinstance(policy, GraphKV):
        return GraphKV(_with_budget(policy.base, budget), policy.signal, unrotated=policy.unrotated)
    options = {name: getattr(policy, name) for name in ("window", "kernel_size", "num_sinks") if hasattr(policy, name)}
    return type(policy)(budget=budget, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_on_as_with_a_cache_of_its_own(family, ids):
    compare(model_of(*FAMILIES[family]), POLICIES["snapkv"], ids)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_any_policy_that_can_be_shared_edits(policy, ids):
    compare(model_of("Llama", {}), policy, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_unmoved_keys_stay_bit_for_bit(ids, dtype):
    model = model_of("Llama", {})
    kv = stored(model, ids)["kv"].to(dtype)

    edited, kept_ids = editor(KNorm(budget=40, num_sinks=9), model.config, chunk_size=CHUNK)({"kv": kv}, list(range(T)))

    assert edited.dtype == dtype
    assert kept_ids[:9] == list(range(9))
    assert torch.equal(edited[1], kv[1][:, kept_ids])
    assert torch.equal(edited[0, :, :9], kv[0, :, :9])
    moved = [place for place, token in enumerate(kept_ids) if place != token]
    assert not any(torch.equal(edited[0, :, place], kv[0, :, kept_ids[place]]) for place in moved)


def test_what_fits_comes_back_as_it_is(ids):
    kv, model = torch.randn(2, 3, T, 16), model_of("Llama", {})
    for budget in (T, 500, 1.0):
        edited, kept_ids = editor(KNorm(budget=budget), model.config, chunk_size=CHUNK)({"kv": kv}, list(range(T)))
        assert edited is kv
        assert kept_ids == list(range(T))


def test_blocks_of_an_engine_stay_whole(ids):
    model = model_of("Llama", {})
    policy = Shared(KNorm(budget=40), over="layers", block=8)

    _, kept_ids = editor(policy, model.config, chunk_size=CHUNK)(stored(model, ids), list(range(T)))

    assert len(kept_ids) == 40
    assert kept_ids == [place for place in range(T) if place // 8 in {token // 8 for token in kept_ids}]


CONFIG = transformers.LlamaConfig(**SIZES)
KV = torch.zeros(2, 3, T, 16)
CALLS = {
    "no tensor": ({}, "tensors must hold one of kind 'kv'; got []"),
    "another layout": ({"kv": KV[0]}, "the kv tensor must have shape (2, 3, T, 16) for this model; got (3, 96, 16)"),
    "several groups": ({"kv": KV[:, :1]}, "must have all 3 layers, of one kernel group; got 1 layers"),
    "a part of the heads": (
        {"kv": KV[..., :8]},
        "must hold all heads, 16 numbers per token, from a world size of 1; got 8",
    ),
    "integers": ({"kv": KV.long()}, "the kv tensor must be a tensor of floats"),
    "no queries": ({"kv": KV}, "tensors must hold the queries for SnapKV"),
    "fewer queries": ({"kv": KV, "query": torch.zeros(1, 3, 9, 48)}, "must have the 96 tokens of the cache; got 9"),
}


@pytest.mark.parametrize(("tensors", "message"), CALLS.values(), ids=CALLS.keys())
def test_what_cannot_be_edited_is_named_and_stays(tensors, message):
    edit, before = editor(POLICIES["snapkv"], CONFIG, chunk_size=CHUNK), copy.deepcopy(tensors)

    with pytest.raises(ArgumentError) as error:
        edit(tensors, list(range(T)))

    assert message in str(error.value)
    assert all(torch.equal(tensors[kind], before[kind]) for kind in tensors)


def test_too_few_ids_are_named():
    with pytest.raises(ArgumentError, match="token_ids must hold one id for each of 96 tokens; got 5"):
        editor(KNorm(budget=16), CONFIG, chunk_size=CHUNK)({"kv": KV}, list(range(5)))


MADE = {
    "heads with counts": (AdaKV(KNorm(budget=40)), "gives heads numbers of their own"),
    "layers with counts": (PyramidKV(budget=64, window=4), "policy must give all layers one budget in LMCache"),
    "attention of all positions": (H2O(budget=40), "must not need the attention of all positions in LMCache"),
    "below a chunk": (KNorm(budget=7), "budget must be at least one chunk of 8 tokens in LMCache"),
    "below the window": (SnapKV(budget=30, window=29), "must have room for the 29 protected tokens"),
}


@pytest.mark.parametrize(("policy", "message"), MADE.values(), ids=MADE.keys())
def test_what_cannot_be_stored_is_refused_when_made(policy, message):
    with pytest.raises(ArgumentError) as error:
        editor(policy, CONFIG, chunk_size=CHUNK)

    assert message in str(error.value)


def test_shares_of_too_little_are_named_when_editing():
    edit = editor(KNorm(budget=0.05), CONFIG, chunk_size=CHUNK)
    with pytest.raises(
        ArgumentError, match="at least one chunk of 8 tokens in LMCache, which stores whole chunks; got 5"
    ):
        edit({"kv": KV}, list(range(T)))


def test_other_arguments_are_checked():
    with pytest.raises(ArgumentTypeError, match="policy must be a Policy"):
        editor("snapkv", CONFIG)
    with pytest.raises(ArgumentError, match="chunk_size must be at least 1"):
        editor(KNorm(budget=300), CONFIG, chunk_size=0)


UNTURNABLE = {
    "positions added to the input": (
        transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4),
        "takes no rotary embedding",
    ),
    "another kind of model": (transformers.T5Config(), "config must be of a model"),
}


@pytest.mark.parametrize(("config", "message"), UNTURNABLE.values(), ids=UNTURNABLE.keys())
def test_keys_that_cannot_be_turned_are_refused_when_made(config, message):
    with pytest.raises(ArgumentError) as error:
        editor(KNorm(budget=16), config, chunk_size=8)

    assert message in str(error.value)


def test_an_untested_version_is_refused(monkeypatch):
    monkeypatch.setitem(versions.sys.modules, "lmcache", object())
    monkeypatch.setattr(versions, "version", lambda name: "0.9.1")

    with pytest.raises(
        ArgumentError, match=r"lmcache must be of version 0\.5\.6 or 0\.5\.7, which were tested; got 0\.9\.1"
    ):
        editor(KNorm(budget=16), CONFIG, chunk_size=CHUNK)({"kv": KV}, list(range(T)))
