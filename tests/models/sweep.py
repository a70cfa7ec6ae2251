"""Every model that generates text, from a tiny configuration: what graphkv does with it, in one word and a reason."""

from __future__ import annotations

import inspect
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from graphkv import SnapKV
from graphkv.core.errors import ArgumentError
from graphkv.integrations.transformers import evicting
from tests.models.configs import tiny_config, tiny_model
from tests.models.pictures import PICTURES, num_tokens, token_of
from tests.models.recomputed import recompute

PROMPT, NEW, EVERY, PADS = 40, 9, 4, [0, 7]
EVERYTHING = SnapKV(budget=1000, window=6, kernel_size=3)
SMALL = SnapKV(budget=14, window=6, kernel_size=3)
TOLERANCE = 1e-5
IMPLEMENTATIONS = ("sdpa", "eager")
# Inputs that speak of every token; generated ones are text, which sees the same picture.
LIKE_TEXT = ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask", "cross_attention_mask")


@dataclass
class Row:
    """What became of one model."""

    model: str
    model_type: str
    kinds: str = ""
    results: dict[str, tuple[str, str]] = field(default_factory=dict)


class Finding(Exception):
    """A result other than EQUAL, with its reason."""


def names() -> list[tuple[str, str]]:
    """Return all pairs of model type and model class."""
    pairs = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items()]
    return sorted({(model_type, name) for model_type, name in pairs if isinstance(name, str)})


def sweep(model_type: str, name: str) -> Row:
    """Try one model, under every implementation of attention, and with a picture or a sound where it takes one."""
    row = Row(name, model_type)
    try:
        model = tiny_model(getattr(transformers, name), tiny_config(CONFIG_MAPPING[model_type]))
    except Exception as error:
        row.results["-"] = ("PLAIN FAILS", _said(error))
        return row
    row.kinds = kinds_of(model)
    takes_more = model_type in PICTURES and isinstance(model.config, CONFIG_MAPPING[model_type])
    for implementation in IMPLEMENTATIONS:
        try:
            model.set_attn_implementation(implementation)
        except Exception as error:
            is_offered = "does not support an attention implementation" not in str(error)
            row.results[implementation] = ("PLAIN FAILS", _said(error)) if is_offered else ("NOT OFFERED", "")
            continue
        row.results[implementation] = _try(model, prompt_of(model, {}))
        if takes_more:
            try:
                inputs = prompt_of(model, PICTURES[model_type](model.config))
            except Exception as error:
                row.results[implementation + " more"] = ("PLAIN FAILS", _said(error))
            else:
                row.results[implementation + " more"] = _try(model, inputs)
    return row


def prompt_of(model: Any, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch of two rows, the second left-padded; with what stands for a picture after some tokens."""
    count = num_tokens(model, extra) if extra else 0
    length = PROMPT + count
    ids = torch.randint(1, 80, (2, length), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(length) >= torch.tensor(PADS)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask} | extra
    if not extra:
        return inputs
    is_more = torch.zeros(2, length, dtype=torch.int64)
    is_more[:, 12 : 12 + count] = 1
    takes = inspect.signature(model.forward).parameters
    if count:
        inputs["input_ids"][is_more.bool()] = token_of(model.config)
    inputs |= {name: is_more for name in LIKE_TEXT if name in takes and name != "cross_attention_mask"}
    if "cross_attention_mask" in takes:
        tiles = int(model.config.vision_config.max_num_tiles)
        inputs["cross_attention_mask"] = (torch.arange(length) > 16).long()[None, :, None, None].repeat(2, 1, 1, tiles)
    return inputs


def kinds_of(model: Any) -> str:
    """Return the kinds of layers, each once."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    return ", ".join(dict.fromkeys(str(kind).removesuffix("_attention") for kind in kinds))


def _try(model: Any, inputs: dict[str, Any]) -> tuple[str, str]:
    with torch.inference_mode():
        try:
            plain = _generate(model, inputs)
            prompt_logits = model(**inputs).logits
        except Exception as error:
            return "PLAIN FAILS", _said(error)
        steps = torch.stack(plain.logits, dim=1)
        if not steps.isfinite().all():
            return "PLAIN FAILS", "not finite"
        try:
            with evicting(model, EVERYTHING, every=EVERY):
                ours = _generate(model, inputs)
                same_prompt = model(**inputs).logits
            cell = _compare("prompt", same_prompt, prompt_logits, inputs["attention_mask"]) or _compare(
                "everything kept", torch.stack(ours.logits, dim=1), steps
            )
            if cell is None and ours.sequences.tolist() != plain.sequences.tolist():
                cell = "WRONG", "everything kept: other tokens"
            if cell is not None:
                return cell
            with evicting(model, SMALL, every=EVERY):
                small = _generate(model, inputs)
        except ArgumentError as error:
            return "REFUSED", str(error).split("\n")[0]
        except Exception as error:
            return "CRASH", _said(error)
        return _against_the_reference(model, inputs, small, steps)


def _against_the_reference(model: Any, inputs: dict[str, Any], small: Any, plain: torch.Tensor) -> tuple[str, str]:
    got = torch.stack(small.logits, dim=1)
    cache = getattr(small, "cache", None) or small.past_key_values
    layers = cache.layers
    if not any(getattr(layer, "num_evictions", 0) for layer in layers):
        return "NOTHING", f"nothing was evicted; the cache is {type(cache).__name__} of {sorted({type(x).__name__ for x in layers})}"
    length = inputs["input_ids"].shape[1]
    calls = [length] + [1] * (NEW - 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW - 1), value=1)
    text = inputs | {"input_ids": small.sequences[:, :-1], "attention_mask": mask}
    for name in LIKE_TEXT:
        if name == "cross_attention_mask" and name in text:
            text[name] = torch.cat([text[name], text[name][:, -1:].expand(-1, NEW - 1, -1, -1)], dim=1)
        elif name in text:
            text[name] = torch.nn.functional.pad(text[name], (0, NEW - 1))
    counts = not any(hasattr(part, "get_rope_index") for part in (model, getattr(model, "model", None)))
    if "position_ids" in inspect.signature(model.forward).parameters and (counts or "image_grid_thw" not in inputs):
        text["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    try:
        # The instrument itself: with nothing dropped it must say what the plain model says.
        all_left, _ = recompute(model, text | {"input_ids": _plain_text(model, inputs)}, None, calls, EVERY, PADS)
        want, way = recompute(model, text, SMALL, calls, EVERY, PADS)
    except Exception as error:
        return "NO REFERENCE", _said(error)
    noise = _distance(all_left[:, length - 1 :], plain)
    if not noise <= 1e-3:
        return "NO REFERENCE", f"a pass over the whole text differs from plain decoding by {noise:.1e} of the logits' scale"
    if not way.touched:
        return "NO REFERENCE", "no attention met cached keys"
    for number, kept in way.kept.items():
        layer = layers[number]
        if layer.num_evictions and layer.true_positions.tolist() != kept:
            return "WRONG", f"layer {number} keeps other tokens than the reference"
        if not layer.num_evictions and any(len(head) < length + NEW - 1 for row in kept for head in row):
            return "NOTHING", f"layer {number} was not evicted"
    # Small models are rough: steps of rounding grow as much here as in the pass with everything left.
    cell = _compare("small budget", got, want[:, length - 1 :], tolerance=max(TOLERANCE, 5 * noise))
    if cell is not None:
        return cell
    if _distance(got, plain) < 1e-3:
        return "NO REFERENCE", "the eviction makes no difference"
    return "EQUAL", ""


def _plain_text(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return _generate(model, inputs).sequences[:, :-1]


def _generate(model: Any, inputs: dict[str, Any]) -> Any:
    return model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True
    )


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _compare(what: str, got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None, tolerance: float = TOLERANCE) -> tuple[str, str] | None:
    if where is not None and got.shape[1] == where.shape[1]:
        got, want = got[where.bool()], want[where.bool()]
    far = _distance(got, want)
    # Written so that nan is no equality.
    return None if far <= tolerance else ("WRONG", f"{what}: logits differ by {far:.1e} of their scale")


def _said(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((each for each in reversed(frames) if "/transformers/models/" in each.filename), frames[-1])
    text = (str(error).strip().split("\n") or [""])[0]
    return f"{type(error).__name__}: {text[:160]} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def main(argv: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for model_type, name in names():
        if argv and model_type not in argv:
            continue
        row = sweep(model_type, name)
        for implementation, (result, reason) in row.results.items():
            print(f"{model_type}|{row.model}|{row.kinds}|{implementation}|{result}|{reason}", flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
