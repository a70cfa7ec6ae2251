"""Turned keys are what the model itself gives at the new positions, in every family; what cannot be turned is refused.

What they are compared with comes from the model alone: its attention module runs again on the hidden states that it
saw, with the position embeddings that the model makes when it is called with other positions.
"""

import copy
import inspect
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from graphkv import ArgumentError, KNorm, Policy
from graphkv.core import Requirements
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import ATTENTION_CACHE_ARGUMENTS, with_cache
from tests.integrations.tiny import SIZES, UNGROUPED, tiny

N, BUDGET = 40, 17
MIXED = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA4 = {
    "head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip

# By the names of their classes in transformers: the start of the model's, that of the configuration's, and options.
FAMILIES = {
    "llama": ("Llama", "Llama", {}),
    "llama, yarn": ("Llama", "Llama", {"rope_parameters": YARN}),
    "llama, frequencies of llama 3": ("Llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "heads not as wide as the model": ("Llama", "Llama", {"head_dim": 20}),
    "mistral": ("Mistral", "Mistral", {}),
    "qwen2": ("Qwen2", "Qwen2", {}),
    "qwen3": ("Qwen3", "Qwen3", {"head_dim": 8}),
    "olmo2": ("Olmo2", "Olmo2", {}),
    "granite": ("Granite", "Granite", {}),
    "starcoder2": ("Starcoder2", "Starcoder2", {}),
    "phi3": ("Phi3", "Phi3", {}),
    "phi3, half of a head": ("Phi3", "Phi3", {"rope_parameters": HALF}),
    "phi": ("Phi", "Phi", {}),
    "stablelm": ("StableLm", "StableLm", {"head_dim": 16, "hidden_size": 96}),
    "persimmon": ("Persimmon", "Persimmon", {"hidden_size": 96}),
    "gpt-neox": ("GPTNeoX", "GPTNeoX", {}),
    "glm": ("Glm", "Glm", {"head_dim": 16}),
    "glm4": ("Glm4", "Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", "Cohere", {}),
    "ernie 4.5": ("Ernie4_5", "Ernie4_5", {"head_dim": 8}),
    "gpt-oss": ("GptOss", "GptOss", EXPERTS | MIXED | {"head_dim": 8}),
    "gemma2": ("Gemma2", "Gemma2", MIXED | {"head_dim": 8}),
    "gemma3, two thetas": ("Gemma3", "Gemma3Text", MIXED | {"head_dim": 8}),
    "gemma4": ("Gemma4", "Gemma4Text", MIXED | GEMMA4),
    "helium": ("Helium", "Helium", {"head_dim": 8}),
    "apertus": ("Apertus", "Apertus", {}),
    "hunyuan": ("HunYuanDenseV1", "HunYuanDenseV1", {"head_dim": 8}),
    "seed-oss": ("SeedOss", "SeedOss", {"head_dim": 8}),
    "arcee": ("Arcee", "Arcee", {}),
    "nanochat, turned the other way": ("NanoChat", "NanoChat", {}),
    "minimax-m2": ("MiniMaxM2", "MiniMaxM2", EXPERTS | {"head_dim": 16}),
    "smollm3": ("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "cohere2": ("Cohere2", "Cohere2", MIXED),
    "afmoe": ("Afmoe", "Afmoe", MIXED | {"head_dim": 8, "num_dense_layers": 3}),
    "exaone4": ("Exaone4", "Exaone4", MIXED),
    "exaone4, full": ("Exaone4", "Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
}  # fmt: skip


def make(family):
    """The tiny random model of a family, or skip it where this release has none."""
    kind, config, options = FAMILIES[family]
    if not hasattr(transformers, f"{config}Config"):
        pytest.skip(f"no {kind} in transformers {transformers.__version__}")
    sizes = UNGROUPED if kind in ("GPTNeoX", "Phi", "Persimmon") else SIZES
    return tiny(
        getattr(transformers, f"{kind}ForCausalLM"), getattr(transformers, f"{config}Config"), **sizes | options
    )


@dataclass(frozen=True, kw_only=True)
class Watching(Policy):
    """Keep what KNorm keeps, and remember the keys that came."""

    requirements: ClassVar[Requirements] = Requirements(unrotated_keys=True)
    seen: dict = field(default_factory=dict, compare=False)

    def score(self, layer, memory):
        self.seen[layer.layer] = layer.unrotated_keys
        return KNorm(budget=self.budget).score(layer, memory)


def read(model, ids, policy=None, **inputs):
    """The cache of a prompt that was evicted, its keys turned."""
    cache = EvictingCache(policy or KNorm(budget=BUDGET), rerotate=policy is None)
    with observing(model), torch.inference_mode():
        model(ids, **inputs, **with_cache(model, cache))
    return cache


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(5))


def attentions(model):
    """The attention modules of the decoder, by their layers."""
    return {
        module.layer_idx: module
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and name.rsplit(".", 1)[-1] in ("self_attn", "attention", "attn")
    }


@contextmanager
def listening(model):
    """Take note of what the attention modules are called with."""
    calls = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.__setitem__(
                module.layer_idx, kwargs | ({"hidden_states": args[0]} if args else {})
            ),
            with_kwargs=True,
        )
        for module in attentions(model).values()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def keys_at(model, calls, index, tokens, places):
    """The keys of some tokens of a layer, shape (kv_heads, tokens, D), as the model gives them at any places."""
    with listening(model) as other, torch.inference_mode():
        model(torch.ones(1, places.shape[-1], dtype=torch.int64), position_ids=places, use_cache=False)
    given = dict(calls[index])
    given["hidden_states"] = given["hidden_states"][:, tokens]
    given["position_embeddings"] = other[index]["position_embeddings"]
    cache = DynamicCache()
    for name in ATTENTION_CACHE_ARGUMENTS:
        if name in given:
            given[name] = cache
    given |= {"attention_mask": None, "position_ids": places[:, :1] if places.ndim == 3 else places}
    given.pop("cache_position", None)
    with torch.inference_mode():
        attentions(model)[index](**given)
    return cache.layers[index].keys[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_keys_are_the_models_own_at_the_new_positions(family, ids):
    model = make(family)
    with listening(model) as calls, observing(model), torch.inference_mode():
        full, cache = EvictingCache(), EvictingCache(KNorm(budget=BUDGET), rerotate=True)
        model(ids, **with_cache(model, full))
        model(ids, **with_cache(model, cache))

    checked, moved = 0, False
    for index, layer in enumerate(cache.layers):
        if not layer.evicts:
            continue
        for head in range(layer.keys.shape[1]):
            tokens = layer.positions[0, head]
            wanted = keys_at(model, calls, index, tokens, torch.arange(N - BUDGET, N)[None])[head]
            torch.testing.assert_close(layer.keys[0, head], wanted, rtol=1e-4, atol=1e-4)
            stood = full.layers[index].keys[0, head, tokens]
            if not layer.rotation.first:
                assert torch.equal(layer.keys[0, head], stood)
                assert torch.equal(keys_at(model, calls, index, tokens, tokens[None])[head], wanted)
            moved |= not torch.allclose(layer.keys[0, head], stood, atol=1e-2)
            checked += 1
    assert checked
    assert moved or family in ("cohere2", "afmoe", "exaone4"), "nothing was turned, so nothing was tested"


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_are_the_models_own_at_position_zero(family, ids):
    model, policy = make(family), Watching(budget=BUDGET)
    with listening(model) as calls:
        cache = read(model, ids, policy)

    for index, keys in policy.seen.items():
        wanted = keys_at(model, calls, index, torch.arange(N), torch.zeros(1, N, dtype=torch.int64)).clone()
        # YaRN makes rotated keys longer; those before the rotary embedding are not.
        rotation = cache.layers[index].rotation
        wanted[..., [*rotation.first, *rotation.second]] /= rotation.scaling
        torch.testing.assert_close(keys[0], wanted, rtol=1e-4, atol=1e-4)
    assert policy.seen


POSITIONS = {
    "that start late": torch.arange(100, 100 + N),
    "with a gap": torch.cat([torch.arange(15), torch.arange(70, 70 + N - 15)]),
    "with many gaps": torch.arange(N) * 3 + 2,
    "that stand still": torch.arange(N) // 4,
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("family", ["llama", "phi", "glm", "gpt-neox", "gemma3, two thetas", "smollm3"])
def test_positions_of_the_caller_are_the_ones_that_count(family, positions, ids):
    model, watching = make(family), Watching(budget=BUDGET)
    with listening(model) as calls:
        cache = read(model, ids, position_ids=positions[None])
        read(model, ids, watching, position_ids=positions[None])

    end = int(positions[-1]) + 1
    for index, keys in watching.seen.items():
        wanted = keys_at(model, calls, index, torch.arange(N), torch.zeros(1, N, dtype=torch.int64))
        torch.testing.assert_close(keys[0], wanted, rtol=1e-4, atol=1e-4)
        layer = cache.layers[index]
        for head, tokens in enumerate(layer.positions[0]):
            wanted = keys_at(model, calls, index, tokens, torch.arange(end - BUDGET, end)[None])[head]
            torch.testing.assert_close(layer.keys[0, head], wanted, rtol=1e-4, atol=1e-4)


def test_every_row_has_positions_of_its_own(ids):
    model = make("llama")
    rows = [torch.arange(N), POSITIONS["with a gap"]]
    together = read(model, ids.repeat(2, 1), position_ids=torch.stack(rows))
    for row, positions in enumerate(rows):
        alone = read(model, ids, position_ids=positions[None])
        for mine, theirs in zip(together.layers, alone.layers, strict=True):
            torch.testing.assert_close(mine.keys[row], theirs.keys[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(mine.places[row], theirs.places[0])


def test_a_second_turn_goes_on_where_its_caller_says(ids):
    """Keys of the first layer do not depend on what came before, so a call of its own recomputes them."""
    model = make("llama")
    calls = [(ids[:, :20], torch.arange(20)), (ids[:, 20:], torch.arange(50, 70))]
    with observing(model), torch.inference_mode():
        cache = EvictingCache(KNorm(budget=8), every=20, rerotate=True)
        for tokens, positions in calls:
            model(tokens, position_ids=positions[None], **with_cache(model, cache))
        layer = cache.layers[0]
        for head, kept in enumerate(layer.positions[0]):
            again = EvictingCache()
            model(ids[:, kept], position_ids=torch.arange(62, 70)[None], **with_cache(model, again))
            torch.testing.assert_close(layer.keys[0, head], again.layers[0].keys[0, head], rtol=1e-4, atol=1e-4)

    assert layer.num_evictions == 2
    assert layer.places[0, :, :, 0].tolist() == [list(range(62, 70))] * 2


def test_positions_that_no_call_shows_are_refused_where_keys_are_turned(ids):
    model = make("llama")
    forward = type(model.model.rotary_emb).forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(model.model.rotary_emb, x, position_ids**2 % 23)
    assert read(model, ids, KNorm(budget=BUDGET)).layers[0].num_stored == BUDGET
    with pytest.raises(ArgumentError, match="positions alone"):
        read(model, ids)

    with observing(model), torch.inference_mode():
        model.model.rotary_emb.forward = lambda *args, **kwargs: forward(model.model.rotary_emb, *args, **kwargs)
        cache = EvictingCache()
        model(ids, **with_cache(model, cache))
        model.model.rotary_emb.forward = lambda x, position_ids: forward(model.model.rotary_emb, x, position_ids + 7)
        model(ids, **with_cache(model, cache))
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ArgumentError, match="position of every token"):
        cache.evict(Watching(budget=BUDGET))
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))
    cache.evict(KNorm(budget=BUDGET))


VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2,
    "in_channels": 3,
}  # fmt: skip
WITH_PICTURES = {
    "Qwen2VL": {"embed_dim": 16, "hidden_size": 48},
    "Qwen2_5_VL": {"out_hidden_size": 48, "intermediate_size": 16, "fullatt_block_indexes": [0], "window_size": 8},
    "Qwen3VL": {
        "out_hidden_size": 48, "intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    },
}  # fmt: skip


def make_with_pictures(kind):
    """A tiny random model whose positions have three axes."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    marks = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    text = SIZES | {"rope_parameters": rope, "head_dim": 8}
    config = getattr(transformers, f"{kind}Config")
    vision = VISION | WITH_PICTURES[kind]
    kind = getattr(transformers, f"{kind}ForConditionalGeneration")
    return tiny(kind, config, text_config=text, vision_config=vision, **marks)


@pytest.mark.parametrize("has_picture", [False, True])
@pytest.mark.parametrize("kind", WITH_PICTURES)
def test_positions_of_three_axes_are_turned_exactly(kind, has_picture):
    model, watching = make_with_pictures(kind), Watching(budget=BUDGET)
    numbers = torch.Generator().manual_seed(6)
    words = torch.randint(10, 97, (N,), generator=numbers)
    inputs = {"input_ids": words[None]}
    if has_picture:
        words[6:14] = torch.tensor([7, *[5] * 6, 8])
        inputs["pixel_values"] = torch.randn(24, 12, generator=numbers)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 6]])
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (words == 5).long()[None]
    with listening(model) as calls, observing(model), torch.inference_mode():
        cache = EvictingCache(KNorm(budget=BUDGET), rerotate=True)
        model(**inputs, **with_cache(model, cache))
        model(**inputs, **with_cache(model, EvictingCache(watching)))
    # A picture of 2 by 3 places takes 3 positions for its 6 tokens.
    end = N - 3 if has_picture else N
    for index, layer in enumerate(cache.layers):
        wanted = keys_at(model, calls, index, torch.arange(N), torch.zeros(3, 1, N, dtype=torch.int64))
        torch.testing.assert_close(watching.seen[index][0], wanted, rtol=1e-4, atol=1e-4)
        for head, tokens in enumerate(layer.positions[0]):
            wanted = keys_at(model, calls, index, tokens, torch.arange(end - BUDGET, end).expand(3, 1, -1))[head]
            torch.testing.assert_close(layer.keys[0, head], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_a_model_leaves_no_trace(ids, training):
    model = make("gemma3, two thetas").train(training)
    fired = []
    for module in [*attentions(model).values(), *(each.k_proj for each in attentions(model).values())]:
        module.register_forward_hook(lambda module, *_: fired.append(module))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with torch.no_grad():
        model(ids)
        plain, fired[:] = len(fired), []
        with observing(model):
            before = {name: dict(vars(module)) for name, module in model.named_modules()}
            model(ids, **with_cache(model, EvictingCache(KNorm(budget=BUDGET), rerotate=True)))
            assert before == {name: dict(vars(module)) for name, module in model.named_modules()}

    assert len(fired) == plain
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


class WithNoise(torch.nn.Module):
    """An adapter around a projection, with dropout in training."""

    def __init__(self, projection):
        super().__init__()
        self.projection = projection
        self.down = torch.nn.Linear(projection.in_features, 4, bias=False)
        self.up = torch.nn.Linear(4, projection.out_features, bias=False)

    def forward(self, x):
        return self.projection(x) + self.up(torch.dropout(self.down(x), 0.5, self.training))


def test_a_wrapped_projection_runs_as_it_is(ids):
    model = make("llama")
    for module in attentions(model).values():
        module.k_proj = WithNoise(module.k_proj).eval()
    with listening(model) as calls:
        cache = read(model, ids)
    for head, tokens in enumerate(cache.layers[2].positions[0]):
        wanted = keys_at(model, calls, 2, tokens, torch.arange(N - BUDGET, N)[None])[head]
        torch.testing.assert_close(cache.layers[2].keys[0, head], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "glm", "phi", "llama, yarn", "qwen2", "smollm3", "gpt-oss"])
def test_half_precision_is_turned_within_its_precision(family, dtype, ids):
    model = make(family).to(dtype)
    with listening(model) as calls:
        cache = read(model, ids)
    for index, layer in enumerate(cache.layers):
        if layer.evicts:
            for head, tokens in enumerate(layer.positions[0]):
                wanted = keys_at(model, calls, index, tokens, torch.arange(N - BUDGET, N)[None])[head]
                error = (layer.keys[0, head] - wanted).abs().max()
                assert error <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_what_was_found_goes_with_the_cache(ids):
    model = make("phi")
    with observing(model), torch.inference_mode():
        cache = EvictingCache()
        model(ids, **with_cache(model, cache))
    twins = [copy.deepcopy(cache.layers[0]), pickle.loads(pickle.dumps(cache.layers[0].rotation))]
    assert twins[0].rotation == twins[1] == cache.layers[0].rotation
    first, other = Watching(budget=BUDGET), Watching(budget=BUDGET)
    cache.copy().evict(first)
    twins[0].evict(other)
    assert torch.equal(first.seen[0], other.seen[0])


def test_a_cache_that_was_not_to_turn_keys_says_so(ids):
    model = make("llama")
    cache = read(model, ids, KNorm(budget=BUDGET))
    with pytest.raises(ArgumentError, match="needs a cache that looks at how they are turned"):
        cache.evict(Watching(budget=BUDGET))


class Changing(transformers.models.llama.modeling_llama.LlamaAttention):
    """Changes keys by a function of the cosines, the sines and the keys."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = self.change(*position_embeddings, key, value)
        key, value = (past_key_values if cache is None else cache).update(key, value, self.layer_idx)
        attend = transformers.AttentionInterface()[self.config._attn_implementation]
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


CHANGES = {
    "mixed": (lambda cos, sin, key, value: ((key * cos[:, None]).cumsum(-1), value), "not turned in pairs"),
    "scaled": (lambda cos, sin, key, value: (key * (1 + cos[:, None] / 2), value), "not turned in pairs"),
    "shifted": (lambda cos, sin, key, value: (key + sin[:, None], value), "not turned in pairs"),
    "values": (lambda cos, sin, key, value: (key, value + sin[:, None]), "values depend on the position"),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES.keys())
def test_keys_that_are_changed_otherwise_are_refused(change, why, ids):
    model = make("llama")
    for module in attentions(model).values():
        module.__class__, module.change = Changing, change
    assert read(model, ids, KNorm(budget=BUDGET)).layers[0].num_stored == BUDGET
    with pytest.raises(ArgumentError, match=why):
        read(model, ids)


def test_a_forward_that_was_exchanged_is_refused(ids):
    model = make("llama")
    module = attentions(model)[0]
    module.__class__ = type("Exchanged", (type(module),), {})
    module.change = lambda cos, sin, key, value: (key, value)
    module.forward = Changing.forward.__get__(module)
    with pytest.raises(ArgumentError, match="looked into"):
        read(model, ids)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(rope, ids):
    parameters = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4}
    if rope == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
        parameters |= {"original_max_position_embeddings": 64} | factors
    model = tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig, **SIZES, rope_parameters=parameters)
    assert read(model, ids, KNorm(budget=BUDGET)).layers[0].num_stored == BUDGET
    with pytest.raises(ArgumentError, match="on the length"):
        read(model, ids)


def test_frequencies_that_were_rounded_with_the_model_are_the_ones_that_turn(ids):
    """`model.to(bfloat16)` may round the buffers of the rotary embedding too; the configuration knows nothing of it."""
    model = make("llama")
    model.model.rotary_emb.inv_freq.data = model.model.rotary_emb.inv_freq.bfloat16().float() * 1.25
    with listening(model) as calls:
        cache = read(model, ids)
    for head, tokens in enumerate(cache.layers[1].positions[0]):
        wanted = keys_at(model, calls, 1, tokens, torch.arange(N - BUDGET, N)[None])[head]
        torch.testing.assert_close(cache.layers[1].keys[0, head], wanted, rtol=1e-4, atol=1e-4)


def test_far_positions_are_turned_as_the_model_turns_them(ids):
    model, positions = make("llama"), torch.arange(N) * 3001
    with listening(model) as calls:
        cache = read(model, ids, position_ids=positions[None])
    end = int(positions[-1]) + 1
    for head, tokens in enumerate(cache.layers[1].positions[0]):
        wanted = keys_at(model, calls, 1, tokens, torch.arange(end - BUDGET, end)[None])[head]
        torch.testing.assert_close(cache.layers[1].keys[0, head], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["graphkv_sdpa", "graphkv_eager"])
def test_a_model_that_always_runs_so_is_turned_alike(implementation, ids):
    model = make("glm")
    inside = read(model, ids)
    model.set_attn_implementation(implementation)
    with torch.inference_mode():
        cache = EvictingCache(KNorm(budget=BUDGET), rerotate=True)
        model(ids, **with_cache(model, cache))
    for mine, theirs in zip(cache.layers, inside.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_compiled_layers_are_looked_into_too(ids):
    model = make("llama")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with listening(model) as calls:
        cache = read(model, ids)
    for head, tokens in enumerate(cache.layers[1].positions[0]):
        wanted = keys_at(model, calls, 1, tokens, torch.arange(N - BUDGET, N)[None])[head]
        torch.testing.assert_close(cache.layers[1].keys[0, head], wanted, rtol=1e-4, atol=1e-4)


def test_guesses_that_come_with_the_prompt_are_turned_after_it(ids):
    model = make("llama")
    # Prompt lookup of transformers 5.2 needs one.
    model.generation_config.eos_token_id = 96
    text = ids.repeat(1, 2)
    outputs = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        with evicting(model, KNorm(budget=BUDGET), rerotate=True), torch.inference_mode():
            outputs.append(model.generate(text, max_new_tokens=8, do_sample=False, **options))
    assert torch.equal(*outputs)


def test_an_eviction_that_waited_turns_what_came_before_it_only(ids):
    model = make("llama")
    with observing(model), torch.inference_mode():
        cache = EvictingCache(KNorm(budget=8), every=15, rerotate=True)
        cache.activate_past_recording()
        model(ids[:, :20], **with_cache(model, cache))
        model(ids[:, 20:24], **with_cache(model, cache))
        cache.crop(-2)
    for layer in cache.layers:
        assert layer.num_evictions == 1
        # The 8 that were kept end at the 20th token; two have come since.
        assert layer.places[0, :, :, 0].tolist() == [list(range(12, 22))] * 2


@pytest.mark.parametrize("num", [6, 29])
@pytest.mark.parametrize("side", ["left", "right", "hole"])
def test_padding_takes_no_place(side, num, ids):
    """A row with padding keeps, and turns to, what it does alone."""
    model = make("llama")
    shown = torch.ones(N, dtype=torch.bool)
    shown[{"left": slice(0, num), "right": slice(N - num, N), "hole": slice(5, 5 + num)}[side]] = False
    mask = torch.stack([torch.ones(N, dtype=torch.bool), shown]).long()
    together = read(model, ids.repeat(2, 1), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    alone = read(model, ids[:, shown])
    for mine, theirs in zip(together.layers, alone.layers, strict=True):
        used = slice(None) if mine.valid is None else mine.valid[1, 0]
        torch.testing.assert_close(mine.keys[1][:, used], theirs.keys[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(mine.places[1][:, used], theirs.places[0])


def test_noise_of_adapters_in_training_is_refused_and_takes_no_random_numbers(ids):
    model = make("llama")
    for module in attentions(model).values():
        module.k_proj = WithNoise(module.k_proj)
    torch.manual_seed(1)
    with observing(model.train()), torch.no_grad():
        cache = EvictingCache()
        model(ids, **with_cache(model, cache))
        after = torch.get_rng_state()
        torch.manual_seed(1)
        model(ids, **with_cache(model, EvictingCache(KNorm(budget=BUDGET))))
    assert torch.equal(after, torch.get_rng_state())
    with pytest.raises(ArgumentError, match="not turned in pairs"):
        cache.evict(Watching(budget=BUDGET))
