"""Attention that is not an EvictingCache's gets exactly what it came with, inside a block and under graphkv_sdpa."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import transformers as T
from transformers import AttentionInterface, DynamicCache, LlamaConfig, StaticCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from graphkv import ArgumentError, KNorm
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.masks import Mask
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import tiny, tiny_gemma3, tiny_llama

N, POLICY, EVERYTHING = 40, KNorm(budget=10), KNorm(budget=10_000)
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SEQUENCES = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
each_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def numbers(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape):
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(6))


def padding(right):
    shown = torch.ones(2, 12, dtype=torch.long)
    shown[0, slice(-3, None) if right else slice(3)] = 0
    return shown


def build(kind, *arguments, **options):
    """A random model whose attention is not flat."""
    model = tiny(kind, *arguments, **options)
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.2)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


PICTURE, TEXT = {"pixel_values": numbers(2, 3, 16, 16)}, {"input_ids": tokens(2, 12), "attention_mask": padding(True)}
TWO_SIDED = {
    "clip, picture": (lambda: build(T.CLIPVisionModel, T.CLIPVisionConfig, **VISION), PICTURE),
    "clip, text": (lambda: build(T.CLIPTextModel, T.CLIPTextConfig, **SMALL), TEXT),
    "siglip": (lambda: build(T.SiglipVisionModel, T.SiglipVisionConfig, **VISION), PICTURE),
    "pixtral": (
        lambda: build(T.PixtralVisionModel, T.PixtralVisionConfig, **VISION),
        PICTURE | {"image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "q-former": (
        lambda: build(T.Blip2QFormerModel, T.Blip2QFormerConfig, **SMALL, encoder_hidden_size=32),
        {"query_embeds": numbers(2, 5, 32), "encoder_hidden_states": numbers(2, 9, 32)},
    ),
    "bert": (lambda: build(T.BertModel, T.BertConfig, **SMALL), TEXT),
    "bert, no mask": (lambda: build(T.BertModel, T.BertConfig, **SMALL), {"input_ids": tokens(2, 12)}),
    "modernbert": (lambda: build(T.ModernBertModel, T.ModernBertConfig, **SMALL, local_attention=8), TEXT),
    "whisper, sound": (
        lambda: build(WhisperEncoder, T.WhisperConfig, **SEQUENCES, max_source_positions=10),
        {"input_features": numbers(2, 80, 20)},
    ),
}
WITH_ENCODER = {
    "bart": (
        lambda: build(T.BartForConditionalGeneration, T.BartConfig, **SEQUENCES, max_position_embeddings=64),
        TEXT,
    ),
    "t5": (
        lambda: build(T.T5ForConditionalGeneration, T.T5Config, vocab_size=97, d_model=32, d_kv=8, d_ff=32,
                      num_layers=2, num_heads=4, decoder_start_token_id=0),
        TEXT,
    ),
    "whisper": (
        lambda: build(T.WhisperForConditionalGeneration, T.WhisperConfig, **SEQUENCES, max_source_positions=10,
                      begin_suppress_tokens=None, suppress_tokens=None),
        {"input_features": numbers(2, 80, 20)},
    ),
}  # fmt: skip


def tensors(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [each for part in found if part is not None for each in tensors(part)] if isinstance(found, tuple) else []


@each_implementation
@pytest.mark.parametrize(("make", "inputs"), TWO_SIDED.values(), ids=TWO_SIDED)
def test_encoders_under_our_name_for_good_are_as_ever(make, inputs, implementation):
    model, found = make(), []
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("this release has no such attention for it")
    for prefix in ("", "graphkv_"):
        model.set_attn_implementation(prefix + implementation)
        output = model(**inputs)
        found.append([each for name in output for each in tensors(output[name])])
    assert len(found[0]) >= 1
    assert all(torch.equal(with_us, without) for without, with_us in zip(*found, strict=True))


@each_implementation
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize(("make", "inputs"), WITH_ENCODER.values(), ids=WITH_ENCODER)
def test_encoder_decoders_under_our_name_for_good_are_as_ever(make, inputs, implementation, options):
    model, found = make(), []
    for prefix in ("", "graphkv_"):
        model.set_attn_implementation(prefix + implementation)
        found.append(model.generate(**inputs, max_new_tokens=5, do_sample=False, **options))
    assert torch.equal(*found)


@each_implementation
@pytest.mark.parametrize("name", [None, "static"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_other_caches_under_our_name_for_good_are_as_ever(make, name, implementation):
    model, found = make(), []
    inputs = {"input_ids": tokens(2, 12), "attention_mask": padding(False)}
    for prefix in ("", "graphkv_"):
        model.set_attn_implementation(prefix + implementation)
        found.append(model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation=name))
    assert torch.equal(*found)


def logits(model, prompt, later, mask=None, cache=None, **options):
    cache = DynamicCache() if cache is None else cache
    first = model(prompt, attention_mask=mask, **with_cache(model, cache), **options).logits
    return [first, model(later, **with_cache(model, cache)).logits]


@each_implementation
def test_static_caches_and_several_tokens_at_once(implementation):
    model, found = tiny_llama(), []
    for prefix in ("", "graphkv_"):
        model.set_attn_implementation(prefix + implementation)
        cache = StaticCache(config=model.config, max_cache_len=32)
        found.append(logits(model, tokens(2, 12), tokens(2, 5), cache=cache))
    assert all(torch.equal(with_us, without) for without, with_us in zip(*found, strict=True))


def tril(dtype):
    visible = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    visible[0, :, :, :3] = False
    if dtype == torch.bool:
        return visible
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min)


PACKED = torch.cat([torch.arange(5), torch.arange(7)]).repeat(2, 1)
MASKS = {
    "numbers": {"attention_mask": tril(torch.float32)},
    "two-sided": {"attention_mask": torch.zeros(2, 1, 12, 12)},
    "a dict": {"attention_mask": {"full_attention": tril(torch.float32), "sliding_attention": tril(torch.float32)}},
    "packed": {"position_ids": PACKED},
    "packed, no cache": {"position_ids": PACKED, "use_cache": False},
}


@each_implementation
@pytest.mark.parametrize("inputs", MASKS.values(), ids=MASKS)
def test_masks_of_the_callers_own_hide_what_they_hide_without_us(inputs, implementation):
    model = tiny_gemma3() if isinstance(inputs.get("attention_mask"), dict) else tiny_llama()
    model.set_attn_implementation(implementation)
    ids = tokens(2, 12)
    plain = model(ids, **inputs).logits
    with observing(model):
        assert torch.equal(model(ids, **inputs).logits, plain)
        if inputs.get("use_cache") is not False:
            assert torch.equal(model(ids, **inputs, **with_cache(model, EvictingCache(EVERYTHING))).logits, plain)
    model.set_attn_implementation("graphkv_" + implementation)
    assert torch.equal(model(ids, **inputs).logits, plain)


def qwen_vl():
    text = SMALL | {
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                      "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4
    }  # fmt: skip
    options = {"text_config": text, "vision_config": vision, "image_token_id": 90, "vision_start_token_id": 91}
    model = build(T.Qwen2_5_VLForConditionalGeneration, T.Qwen2_5_VLConfig, **options)
    ids = tokens(1, N)
    ids[0, 5], ids[0, 6:22] = 91, 90
    return model, {
        "input_ids": ids, "mm_token_type_ids": (ids == 90).long(), "pixel_values": numbers(64, 96),
        "image_grid_thw": torch.tensor([[1, 8, 8]]), "attention_mask": torch.ones_like(ids),
    }  # fmt: skip


def with_picture(kind, config, tower, size, text=None, **options):
    text = LlamaConfig(**SMALL, num_key_value_heads=2) if text is None else text
    model = build(kind, config, text_config=text, vision_config=tower, image_token_id=90, **options)
    ids = tokens(1, N)
    ids[0, 6 : 6 + size] = 90
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": numbers(1, 3, 16, 16)}


def llava():
    tower = T.CLIPVisionConfig(**VISION)
    return with_picture(T.LlavaForConditionalGeneration, T.LlavaConfig, tower, 16)


def pixtral():
    tower = T.PixtralVisionConfig(**VISION)
    text = T.MistralConfig(**SMALL, num_key_value_heads=2)
    found = with_picture(T.Mistral3ForConditionalGeneration, T.Mistral3Config, tower, 4, text, spatial_merge_size=2)
    found[1]["image_sizes"] = torch.tensor([[16, 16]])
    return found


def paligemma():
    tower = T.SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False)
    text = T.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    model, inputs = with_picture(
        T.PaliGemmaForConditionalGeneration, T.PaliGemmaConfig, tower, 16, text, projection_dim=32, hidden_size=32
    )
    return model, inputs | {"token_type_ids": (torch.arange(N) >= 30).long()[None]}


COMPOSITE = {"qwen2.5-vl": qwen_vl, "llava": llava, "mistral 3": pixtral, "paligemma": paligemma}


@each_implementation
@pytest.mark.parametrize("make", COMPOSITE.values(), ids=COMPOSITE)
def test_pictures_are_seen_as_without_us(make, implementation):
    model, inputs = make()
    model.set_attn_implementation(implementation)
    plain = model(**inputs).logits
    with evicting(model, EVERYTHING):
        assert torch.equal(model(**inputs).logits, plain)
    with evicting(model, POLICY):
        output = model(**inputs)
    assert torch.equal(output.logits, plain)
    assert [layer.num_stored for layer in cache_of(output).layers] == [10, 10]


def settings(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_every_part_keeps_its_attention():
    model, inputs = llava()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before, tower = settings(model), model.model.vision_tower
    assert {"sdpa", "eager"} <= set(before)
    with evicting(model, POLICY):
        assert set(settings(tower)) == {"eager"}
        assert set(settings(model.model.language_model)) == {"graphkv_sdpa"}
        model(**inputs)
    assert settings(model) == before

    def fail():
        with evicting(model, POLICY):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert settings(model) == before


def test_parts_of_a_decoder_with_settings_of_their_own_keep_them():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(model.config)
    model.model.layers[1].self_attn.config._attn_implementation_internal = "eager"
    before, ids = settings(model), tokens(2, 12)
    assert set(before) == {"sdpa", "eager"}
    plain = model(ids).logits
    with evicting(model, POLICY):
        assert torch.equal(model(ids).logits, plain)
    assert settings(model) == before


def test_layers_that_skip_the_cache_are_skipped():
    options = SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    model = build(T.MllamaForCausalLM, MllamaTextConfig, **options)
    ids = tokens(1, N)
    try:
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    except ValueError:
        pytest.skip("this release needs a picture")
    with evicting(model, EVERYTHING):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    with evicting(model, POLICY):
        cache = cache_of(model(ids))
    assert [cache.layers[index].num_stored for index in (0, 2)] == [10, 10]


def test_a_model_of_shared_latents_is_told_the_true_reason():
    model = build(
        T.DeepseekV3ForCausalLM, T.DeepseekV3Config, **SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=2,
    )  # fmt: skip
    if cache_of(model(tokens(1, 5))).layers[0].keys.shape[1] == 4:
        pytest.skip("this release caches the keys of all heads")
    with evicting(model, POLICY), pytest.raises(ArgumentError, match="from compressed latents shared by all heads"):
        model(tokens(1, N))


SEEN = []


def eager_attention(module, query, key, value, mask, scaling=7.0, dropout=3.0):
    """With defaults of its own, which none of ours may stand in for."""
    SEEN.append((scaling, dropout))
    return query.transpose(1, 2), None


class Attention(torch.nn.Module):
    """Of somebody's own model."""

    def __init__(self, implementation):
        super().__init__()
        self.config = LlamaConfig(attn_implementation=implementation)

    def forward(self, query, *args):
        attend = AttentionInterface().get(self.config._attn_implementation, eager_attention)
        return attend(self, query, query, query, None, *args)


class Handing(Attention):
    """A class that hands on to the one that it stands for."""

    def forward(self, query, *args):
        return super().forward(query, *args)


@pytest.mark.parametrize("kind", [Attention, Handing])
def test_attention_functions_get_what_the_model_passes(kind):
    SEEN.clear()
    for implementation in ("eager", "graphkv_eager"):
        kind(implementation)(torch.ones(1, 2, 3, 4))
        kind(implementation)(torch.ones(1, 2, 3, 4), 0.5, 0.25)
    assert SEEN == [(7.0, 3.0), (0.5, 0.25)] * 2


def mask_of(implementation, **changes):
    """The mask that travels to the layers of a left-padded batch."""
    model, found = tiny_gemma3(attn_implementation=implementation, **changes), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with observing(model):
        model(tokens(2, 12), attention_mask=padding(False), **with_cache(model, EvictingCache()))
    return found[0]


def saved(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


USES = {
    "slice": lambda mask: mask[:, :, :, :7],
    "index": lambda mask: mask[0, 0, -1],
    "bool index": lambda mask: mask[mask.bool()],
    "sum with a number": lambda mask: 1 + mask + 0,
    "masked_fill": lambda mask: mask.masked_fill(torch.ones(1, dtype=torch.bool), 0),
    "to another dtype": lambda mask: mask.to(torch.float64),
    "to the same device": lambda mask: mask.to("cpu"),
    "contiguous": lambda mask: mask.contiguous(),
    "where": lambda mask: torch.where(mask.bool(), 1, 2),
    "expand": lambda mask: mask.expand(2, 3, -1, -1),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "pad": lambda mask: torch.nn.functional.pad(mask, (1, 1)),
    "gather": lambda mask: mask.gather(-1, torch.zeros(2, 1, 12, 1, dtype=torch.long)),
    "iteration": lambda mask: next(iter(mask)),
    "detach": lambda mask: mask.detach(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "save": saved,
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "tolist": lambda mask: torch.tensor(mask.tolist(), dtype=mask.dtype),
    "vmap": torch.vmap(lambda row: row.float().sum(-1)),
    "compile": torch.compile(lambda mask: mask.float().sum(-1) + 1, backend="eager"),
}


@each_implementation
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_mask_is_used_like_a_tensor(implementation, mode):
    for name, use in USES.items():
        mask = mask_of(implementation)
        assert type(mask) is Mask
        written = mask.written.clone()
        with mode():
            found, expected = use(mask), use(written)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        assert torch.equal(found, expected), name
        assert name not in ("deepcopy", "pickle", "save") or type(found) is torch.Tensor


@each_implementation
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("policy", [EVERYTHING, POLICY], ids=["everything", "a budget"])
def test_what_a_model_changes_in_a_mask_is_changed(implementation, mode, policy):
    """In place is as good as in a copy."""
    found, prompt, later, mask = [], tokens(2, 12), tokens(2, 5), padding(False)
    for is_copied, changes in ((False, True), (True, True), (False, False)):

        def hide(module, args, kwargs, is_copied=is_copied):
            each = kwargs["attention_mask"]
            each = each.clone() if is_copied else each
            each[..., 4:6] = False if each.dtype == torch.bool else torch.finfo(each.dtype).min
            return args, kwargs | {"attention_mask": each}

        model = tiny_llama(attn_implementation=implementation)
        for layer in model.model.layers if changes else ():
            layer.register_forward_pre_hook(hide, with_kwargs=True)
        with mode(), evicting(model, policy):
            output = model(prompt, attention_mask=mask)
            both = torch.cat([mask, torch.ones_like(later)], dim=1)
            after = model(later, attention_mask=both, **with_cache(model, cache_of(output)))
        found.append(torch.cat([output.logits, after.logits], dim=1))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0][:, 6:], found[2][:, 6:], atol=1e-2)


def compiled(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("wrap", [compiled, dispatched])
def test_masks_travel_through_wrapped_layers(wrap):
    found, inputs = [], {"input_ids": tokens(2, 12), "attention_mask": padding(False)}
    for model in (tiny_llama(), wrap(tiny_llama())):
        with evicting(model, KNorm(budget=6)):
            found.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)


@each_implementation
def test_autocast_and_gradients_are_as_without_us(implementation):
    inputs = {"input_ids": tokens(2, 12), "attention_mask": padding(False)}
    model, found = tiny_llama(attn_implementation=implementation), []
    for is_ours, precision in itertools.product([False, True], [torch.float32, torch.bfloat16]):
        cache = EvictingCache(EVERYTHING) if is_ours else DynamicCache()
        with torch.enable_grad(), observing(model), torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"], **with_cache(model, cache)).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for without, with_us in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(without, with_us, strict=True))


def test_attention_after_a_broken_pass_is_left_alone(monkeypatch):
    """An error inside the attention leaves keys that nobody has read; the next attention is none of their business."""
    model, tower = tiny_llama(), build(T.CLIPVisionModel, T.CLIPVisionConfig, **VISION)
    num_tokens = tower(**PICTURE)[0].shape[1]
    plain = tower(**PICTURE)[0]
    tower.set_attn_implementation("graphkv_sdpa")
    cache = EvictingCache(POLICY)
    with observing(model):
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
        with pytest.raises(TypeError):
            model(tokens(2, num_tokens), **with_cache(model, cache))
        monkeypatch.undo()
        assert torch.equal(tower(**PICTURE)[0], plain)
