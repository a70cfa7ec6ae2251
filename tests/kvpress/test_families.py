"""Whatever a family does to its queries, a press of a policy keeps what evicting() keeps, or says why it cannot."""

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")

import transformers
from kvpress import ComposedPress, KnormPress, ThinKPress
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from graphkv import H2O, ArgumentError, GraphKV, KNorm, PyramidKV, SnapKV, evict
from graphkv.integrations.kvpress import GraphKVPress, PolicyPress
from graphkv.integrations.transformers import evicting
from tests.integrations.reference import reference_generate
from tests.integrations.tiny import FAMILIES, SIZES, tiny, tiny_gemma3, tiny_llama
from tests.kvpress.models import lengths, num_hooks, prefill, prompts, same

BUDGET = 14
SNAPKV = SnapKV(budget=BUDGET, window=4, kernel_size=3)
POLICIES = {"snapkv": SNAPKV, "h2o": H2O(budget=BUDGET), "knorm+graphkv": GraphKV(KNorm(budget=BUDGET))}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MIXED = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
EAGER = {"attn_implementation": "eager"}
EQUAL = {
    "Apertus": {},
    "Cohere": {"use_qk_norm": True},
    "Cohere2": MIXED,
    "DeepseekV3": SHARED_EXPERTS | ONE_GROUP | LATENT | {"num_key_value_heads": 6},
    "Dots1": SHARED_EXPERTS | ONE_GROUP | {"head_dim": 8},
    "Ernie4_5": {"head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "Exaone4": MIXED,
    "FlexOlmo": EXPERTS,
    "Gemma2": MIXED | {"head_dim": 8},
    "Glm": {"head_dim": 8},
    "Glm4": {"head_dim": 8},
    "Glm4Moe": SHARED_EXPERTS | {"head_dim": 8},
    "GptOss": MIXED | EAGER | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {"attention_multiplier": 0.1},
    "Helium": {"head_dim": 8},
    "HunYuanDenseV1": {"head_dim": 8},
    "HunYuanMoEV1": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "MiniMaxM2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Ministral3": {},
    "Mistral": {"sliding_window": None},
    "Olmo2": {},
    "Olmoe": EXPERTS,
    "Persimmon": {"num_key_value_heads": 6},
    "Phi": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": EXPERTS | {"head_dim": 8},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
}


def family(name, **changes):
    """A tiny random model whose norms do something."""
    kind, config = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
    model = tiny(kind, config, **SIZES | changes)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "norm" in weight_name and weight.ndim == 1:
                weight.normal_(mean=1, std=0.5)
    return model


def generated(model, ids, context):
    with context:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("name", sorted(EQUAL))
def test_a_press_keeps_what_evicting_keeps_on_every_family(name, policy):
    model, ids = family(name, **EQUAL[name]), prompts(batch=2)

    ours = generated(model, ids, evicting(model, policy))
    theirs = generated(model, ids, PolicyPress(policy)(model))

    is_mixed = MIXED.items() <= EQUAL[name].items()
    assert lengths(theirs.past_key_values) == [11 if is_mixed else BUDGET + 3, BUDGET + 3, BUDGET + 3]
    assert same(theirs.past_key_values, [(layer.keys, layer.values) for layer in ours.past_key_values.layers])
    assert theirs.sequences.tolist() == ours.sequences.tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_gemma_3_keeps_what_evicting_keeps_and_its_sliding_layers(policy, implementation):
    model, ids = tiny_gemma3(attn_implementation=implementation), prompts(batch=2)

    ours = generated(model, ids, evicting(model, policy))
    theirs = generated(model, ids, PolicyPress(policy)(model))

    assert lengths(theirs.past_key_values) == [11, BUDGET + 3] * 2
    assert same(theirs.past_key_values, [(layer.keys, layer.values) for layer in ours.past_key_values.layers])
    assert theirs.sequences[0].tolist() == reference_generate(model, ids[0], policy, 4).tolist()


def test_layer_budgets_of_a_mixed_model_are_those_of_evicting():
    model, policy = tiny_gemma3(), PyramidKV(budget=BUDGET, window=4)
    ours = generated(model, prompts(), evicting(model, policy)).past_key_values
    theirs = generated(model, prompts(), PolicyPress(policy)(model)).past_key_values

    assert len(set(lengths(theirs))) == 3
    assert same(theirs, [(layer.keys, layer.values) for layer in ours.layers])


def test_gemma_3_with_a_tower_for_pictures_keeps_what_evicting_keeps():
    """kvpress leaves its sliding layers out by itself."""
    text = tiny_gemma3().config.to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = tiny(
        Gemma3ForConditionalGeneration, Gemma3Config, text_config=text, vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=90, eoi_token_index=91, image_token_index=92,
    )  # fmt: skip
    ids = prompts(batch=2) % 90

    ours = generated(model, ids, evicting(model, SNAPKV)).past_key_values
    theirs = generated(model, ids, PolicyPress(SNAPKV)(model)).past_key_values

    assert lengths(theirs) == [11, BUDGET + 3] * 2
    assert same(theirs, [(layer.keys, layer.values) for layer in ours.layers])


def test_attention_without_the_interface_of_transformers_is_seen_at_pytorchs():
    """evicting() refuses Nemotron, so the queries come from its projections and its rotary embedding."""
    model, ids = family("Nemotron", head_dim=8), prompts()
    rotated = []
    module = transformers.models.nemotron.modeling_nemotron
    plain, apply = prefill(model, ids), module.apply_rotary_pos_emb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "apply_rotary_pos_emb", lambda *args: rotated.append(apply(*args)) or rotated[-1])
        prefill(model, ids)

    cache = prefill(model, ids, PolicyPress(SNAPKV))

    kept = [
        evict(SNAPKV, layer.keys, values=layer.values, queries=queries[:, :, -SNAPKV.num_queries(40) :])
        for layer, (queries, _) in zip(plain.layers, rotated, strict=True)
    ]
    assert lengths(cache) == [BUDGET] * 3
    assert same(
        cache,
        [(each.apply(layer.keys), each.apply(layer.values)) for each, layer in zip(kept, plain.layers, strict=True)],
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_heads_that_read_other_heads_values_are_refused(policy):
    model = family("DiffLlama")
    with pytest.raises(ArgumentError, match=r"DiffLlamaSdpaAttention of layer 0, .* reads other values than it cached"):
        prefill(model, prompts(), PolicyPress(policy))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("name", ["DiffLlama", "Nemotron"])
def test_attention_that_cannot_be_seen_is_refused(name, policy):
    model = family(name, **EAGER)
    with pytest.raises(ArgumentError, match=rf"{name}Attention of layer 0 does not \(some do when loaded with"):
        prefill(model, prompts(), PolicyPress(policy))


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_a_layer_that_does_not_compute_the_same_twice_is_refused(projection):
    model = tiny_llama()
    linear = getattr(model.model.layers[1].self_attn, projection)
    linear.register_forward_hook(lambda module, args, output: output * (1 + torch.rand(output.shape)))
    name = {"k_proj": "keys", "v_proj": "values"}[projection]
    with pytest.raises(ArgumentError, match=f"LlamaAttention of layer 1, run a second time, reads other {name} than"):
        prefill(model, prompts(), PolicyPress(KNorm(budget=BUDGET)))


def test_one_wrong_key_of_one_head_is_enough():
    model, calls = tiny_llama(), []

    def turn_the_second_time(module, args, output):
        calls.append(module)
        if len(calls) == 2:
            output[1, 17, :8] = output[1, 17, :8].flip(0)

    model.model.layers[0].self_attn.k_proj.register_forward_hook(turn_the_second_time)
    with pytest.raises(ArgumentError, match=r"LlamaAttention of layer 0, .* reads other keys than it cached"):
        prefill(model, prompts(), PolicyPress(SNAPKV))


def test_a_key_that_is_not_a_number_is_no_other_key():
    model, ids = tiny_llama(), prompts()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 3]] = torch.nan
    cache = prefill(model, ids, PolicyPress(KNorm(budget=BUDGET)))

    assert lengths(cache) == [BUDGET] * 3


def test_a_layer_that_cannot_run_twice_is_refused():
    model, calls = tiny_llama(), []

    def once(module, args, output):
        calls.append(module)
        if len(calls) == 2:
            raise TypeError("only once")

    model.model.layers[0].self_attn.q_proj.register_forward_hook(once)
    with pytest.raises(ArgumentError, match="LlamaAttention of layer 0 stops with TypeError: only once"):
        prefill(model, prompts(), PolicyPress(SNAPKV))


def test_the_second_run_leaves_nothing_on_the_model():
    model = tiny_gemma3(attn_implementation="eager")
    before = [(set(vars(layer.self_attn)), layer.self_attn.config) for layer in model.model.layers]
    generated(model, prompts(), PolicyPress(SNAPKV)(model))

    # What kvpress itself leaves there.
    after = [
        (set(vars(layer.self_attn)) - {"masked_key_indices"}, layer.self_attn.config) for layer in model.model.layers
    ]
    assert [attributes for attributes, _ in after] == [attributes for attributes, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert model.config._attn_implementation == "eager"


def test_a_press_that_changed_the_keys_before_is_refused():
    press = ComposedPress([ThinKPress(key_channel_compression_ratio=0.5, window_size=4), PolicyPress(SNAPKV)])
    with pytest.raises(
        ArgumentError, match=r"other keys than it cached \(in a ComposedPress, PolicyPress comes first\)"
    ):
        prefill(tiny_llama(), prompts(), press)


PRESSES = {"policy": lambda: PolicyPress(SNAPKV), "graphkv": lambda: GraphKVPress(KnormPress(0.5))}


@pytest.mark.parametrize("make", PRESSES.values(), ids=list(PRESSES))
@pytest.mark.parametrize("name", ["gpt-neox", "opt", "gpt2"])
def test_models_that_kvpress_cannot_find_its_way_in_are_refused(name, make):
    model = FAMILIES[name]()
    with pytest.raises(ArgumentError, match=r"must have what kvpress looks for: model\.model\.layers .* has not"):
        prefill(model, prompts(), make())


def test_layers_of_two_attentions_are_refused():
    """kvpress would wait for a call that never comes."""
    sizes = {name: SIZES[name] for name in SIZES if name not in {"num_hidden_layers", "num_key_value_heads"}}
    experts = {"expert_ffn_hidden_size": 16, "n_routed_experts": 2, "zero_expert_num": 1, "moe_topk": 1}
    kind, config = transformers.LongcatFlashForCausalLM, transformers.LongcatFlashConfig
    model = tiny(kind, config, **sizes | experts | LATENT, num_layers=1, ffn_hidden_size=32)
    with pytest.raises(ArgumentError, match=r"with one attention each, .* LongcatFlashForCausalLM has not"):
        prefill(model, prompts(), PolicyPress(SNAPKV))


@pytest.mark.parametrize("make", PRESSES.values(), ids=list(PRESSES))
def test_a_call_in_which_kvpress_finds_no_cache_is_refused(make):
    model, hooks = tiny_llama(), num_hooks(tiny_llama())
    with pytest.raises(ArgumentError, match=r"must run with a cache, .* LlamaAttention got no past_key_values"):
        prefill(model, prompts(), make(), use_cache=False)
    assert num_hooks(model) == hooks

    afmoe = family("Afmoe", **EXPERTS, head_dim=8, layer_types=["full_attention"] * 3, num_dense_layers=1)
    with pytest.raises(ArgumentError, match="AfmoeAttention got no past_key_values"):
        prefill(afmoe, prompts(), make())


def test_other_kinds_of_layers_are_refused():
    model = tiny(
        transformers.Llama4ForCausalLM, transformers.Llama4TextConfig, **SIZES, head_dim=8, num_local_experts=2,
        intermediate_size_mlp=32,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"full or sliding attention in every layer; .* \['chunked_attention'"):
        prefill(model, prompts(), PolicyPress(SNAPKV))


def test_a_cache_that_does_not_know_the_sliding_layers_is_refused():
    """transformers would make the masks of full layers by the size of a sliding one."""
    model = tiny_gemma3()
    with pytest.raises(
        ArgumentError, match=r"must know which layers slide, as DynamicCache\(config=model.config\) does"
    ):
        prefill(model, prompts(), PolicyPress(SNAPKV), past_key_values=DynamicCache())


def test_an_answer_that_would_leave_the_sliding_window_is_refused():
    model, ids, policy = FAMILIES["mistral-sliding"](), prompts(batch=1, length=16), SnapKV(budget=8, window=4)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    with PolicyPress(policy)(model):
        found = model.generate(ids, max_new_tokens=7, **options)
        with pytest.raises(ArgumentError, match=r"shorter than the sliding window .* has read 23 tokens, .* is 24"):
            model.generate(ids, max_new_tokens=9, **options)

    assert found[0].tolist() == reference_generate(model, ids[0], policy, 7).tolist()
