"""Every model that generates text, from a tiny configuration: what graphkv does with it, in a word and a reason.

``python -m tests.models.sweep [model types]`` prints rows.

* EQUAL: with everything kept the plain model's logits and tokens, and with a small budget those of `recomputed`.
* REFUSED, WARNED: an `ArgumentError` or a `GraphKVWarning` says why not.
* NOT OFFERED, PLAIN FAILS, PLAIN DIFFERS: the model itself does not have this attention, does not run here, or decodes
  other than a pass over its whole text says.
* WRONG, CRASH, NOTHING: what must not be.
* NO REFERENCE: the instrument fails.
"""

from __future__ import annotations

import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.nn.functional import pad
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from graphkv import SnapKV
from graphkv.core.errors import ArgumentError, GraphKVWarning
from graphkv.integrations.transformers import evicting
from tests.models.configs import tiny_config, tiny_model
from tests.models.pictures import PICTURES, num_tokens, token_of
from tests.models.recomputed import Recomputed, recompute

# The second row is shorter than the small budget, so that padding is kept.
PROMPT, NEW, EVERY, PADS = 40, 9, 4, [0, 31]
# Without pooling, which gives neighbors scores that only rounding tells apart.
EVERYTHING = SnapKV(budget=1000, window=6, kernel_size=1)
SMALL = SnapKV(budget=14, window=6, kernel_size=1)
TOLERANCE = 1e-5
MORE = " with a picture or sound"
IMPLEMENTATIONS = ("sdpa", "eager")
UNEVEN = "NO REFERENCE", "plain decoding differs from a pass over the whole text"
OTHERS = "WRONG", "a layer keeps other tokens than the reference"
SWAP = "WRONG", "a layer keeps other tokens in one head than the reference"
# Inputs that speak of every token; generated ones are text, which sees the same picture.
LIKE_TEXT = ("token_type_ids", "mm_token_type_ids", "image_embeds_position_mask", "cross_attention_mask")

# Other names of a type, with configurations that are not the model's.
DOUBLE = {
    ("glmga", "Glm46VForConditionalGeneration"),
    ("pp_chart2table", "GotOcr2ForConditionalGeneration"),
    ("shieldgemma2", "Gemma3ForConditionalGeneration"),
}
# Models that read no text without a picture.
ALWAYS_MORE = (
    "blip",
    "blip-2",
    "idefics",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "kosmos-2.5",
    "voxtral_realtime",
)


@dataclass
class Row:
    """What became of one model: a result and its reason for each implementation of attention and kind of input."""

    kinds: str = ""
    results: dict[str, tuple[str, str]] = field(default_factory=dict)


def names() -> list[tuple[str, str]]:
    """Return all pairs of model type and model class."""
    pairs = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items()]
    return sorted({(model_type, name) for model_type, name in pairs if isinstance(name, str)} - DOUBLE)


def sweep(model_type: str, name: str) -> Row:
    """Try one model, under every implementation of attention, and with a picture or a sound where it takes one."""
    row = Row()
    try:
        model = tiny_model(getattr(transformers, name), tiny_config(CONFIG_MAPPING[model_type]))
    except Exception as error:
        row.results["-"] = ("PLAIN FAILS", _said(error))
        return row
    row.kinds = kinds_of(model)
    takes_more = model_type in PICTURES and isinstance(model.config, CONFIG_MAPPING[model_type])
    if model_type in ALWAYS_MORE and not takes_more:
        row.results["-"] = ("PLAIN FAILS", "reads no text without a picture or a sound, and has none here")
        return row
    for implementation in IMPLEMENTATIONS:
        try:
            model.set_attn_implementation(implementation)
        except Exception as error:
            is_offered = "does not support an attention implementation" not in str(error)
            row.results[implementation] = ("PLAIN FAILS", _said(error)) if is_offered else ("NOT OFFERED", "")
            continue
        if model_type not in ALWAYS_MORE:
            row.results[implementation] = _try(model, dict)
        if takes_more:
            row.results[implementation + MORE] = _try(model, lambda: PICTURES[model_type](model.config))
    return row


def prompt_of(model: Any, extra: dict[str, torch.Tensor], pads: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Return a batch of two rows, the second left-padded; with what stands for a picture after some tokens."""
    count = num_tokens(model, extra) if extra else 0
    length = PROMPT + count
    ids = torch.randint(1, 80, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask} | extra
    if not extra:
        return inputs
    is_more = torch.zeros(2, length, dtype=torch.int64)
    is_more[:, max(PADS) + 3 : max(PADS) + 3 + count] = 1
    takes = inspect.signature(model.forward).parameters
    if count:
        inputs["input_ids"][is_more.bool()] = token_of(model.config)
    inputs |= {name: is_more for name in LIKE_TEXT if name in takes and name != "cross_attention_mask"}
    if "cross_attention_mask" in takes:
        tiles = int(model.config.vision_config.max_num_tiles)
        sees = (torch.arange(length) > max(PADS) + 3).long()
        inputs["cross_attention_mask"] = sees[None, :, None, None].repeat(2, 1, 1, tiles)
    return inputs


def kinds_of(model: Any) -> str:
    """Return the kinds of layers, each once."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    return ", ".join(dict.fromkeys(str(kind).removesuffix("_attention") for kind in kinds))


class Verdict(Exception):
    """A result other than EQUAL, and its reason."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(result, reason)
        self.cell = result, reason


@contextmanager
def failing(result: str) -> Iterator[None]:
    """Turn what goes wrong in a block into a result; what graphkv refuses is one of its own."""
    try:
        yield
    except Verdict:
        raise
    except ArgumentError as error:
        raise Verdict("REFUSED", str(error).split("\n")[0]) from error
    except Exception as error:
        raise Verdict(result, _said(error)) from error


def _try(model: Any, more: Callable[[], dict[str, torch.Tensor]]) -> tuple[str, str]:
    """Return a result and its reason, for one implementation of attention and one kind of input."""
    pads, seed, reason = PADS, 3, ""
    while True:
        try:
            _check(model, more, pads, seed)
        except Verdict as verdict:
            if verdict.cell == UNEVEN and pads is PADS:
                # Of some models, decoding and reading at once put padded rows at different positions.
                pads, reason = [0, 0], "of rows without padding; of padded ones " + UNEVEN[1]
            elif verdict.cell == SWAP and seed < 6:
                # Scores that only rounding tells apart do not come again with another text; a fault does.
                seed += 1
            else:
                return verdict.cell
        else:
            return "EQUAL", reason


def _check(model: Any, more: Callable[[], dict[str, torch.Tensor]], pads: list[int], seed: int) -> None:
    # What is refused at the door need not run; what crashes there crashes below, if the model itself runs.
    try:
        with failing("CRASH"), evicting(model, SMALL):
            pass
    except Verdict as verdict:
        if verdict.cell[0] == "REFUSED":
            raise
    with failing("PLAIN FAILS"), torch.inference_mode():
        inputs = prompt_of(model, more(), pads, seed)
        plain = _generate(model, inputs)
        prompt_logits = model(**inputs).logits
    steps = torch.stack(plain.logits, dim=1)
    if not steps.isfinite().all():
        raise Verdict("PLAIN FAILS", "logits are not finite")
    with failing("CRASH"), torch.inference_mode(), evicting(model, EVERYTHING, every=EVERY):
        ours = _generate(model, inputs)
        same_prompt = model(**inputs).logits
    with failing("CRASH"), torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", GraphKVWarning)
        with evicting(model, SMALL, every=EVERY):
            small = _generate(model, inputs)
    warned = [str(each.message).split("\n")[0] for each in said if issubclass(each.category, GraphKVWarning)]
    if warned:
        raise Verdict("WARNED", warned[0])
    with failing("NO REFERENCE"):
        # The instrument itself: with nothing dropped it must say what the plain model says.
        takes = "position_ids" in inspect.signature(model.forward).parameters
        tries = {
            counts: _recomputed(model, inputs, plain.sequences, None, counts, pads)[0] for counts in {False, takes}
        }
        # Some models know their positions best themselves, others by counting tokens.
        counts = min(tries, key=lambda counts: _distance(tries[counts], steps))
        whole = tries[counts]
        want, way = _recomputed(model, inputs, small.sequences, SMALL, counts, pads)
    noise, ours_steps = _distance(whole, steps), torch.stack(ours.logits, dim=1)
    if noise > 1e-3 and _distance(whole, ours_steps) < 1e-4:
        reason = "without us it does not decode what a pass over the whole text says; with us it does"
        raise Verdict("PLAIN DIFFERS", reason)
    _check_nothing_changed("prompt", _distance(same_prompt, prompt_logits, inputs["attention_mask"]))
    _check_nothing_changed("everything kept", _distance(ours_steps, steps))
    if ours.sequences.tolist() != plain.sequences.tolist():
        raise Verdict("WRONG", "everything kept: other tokens")
    if not noise <= 1e-3:
        raise Verdict(*UNEVEN)
    _check_kept(way, small)
    got = torch.stack(small.logits, dim=1)
    far = _distance(got, want)
    # Small models are rough: rounding grows here as it does in the pass with everything left.
    if not far <= 10 * max(TOLERANCE, noise):
        raise Verdict("WRONG", f"small budget: logits differ by {far:.0e} of their scale")
    if _distance(got, steps) < 1e-3:
        raise Verdict("NO REFERENCE", "the eviction makes no difference")


def _check_nothing_changed(what: str, far: float) -> None:
    # Written so that nan is no equality.
    if not far <= TOLERANCE:
        raise Verdict("WRONG", f"{what}: logits differ by {far:.0e} of their scale")


def _check_kept(way: Recomputed, small: Any) -> None:
    """Compare what layers have kept with the recomputation."""
    cache = getattr(small, "cache", None) or small.past_key_values
    layers = cache.layers
    if not any(getattr(layer, "num_evictions", 0) for layer in layers):
        raise Verdict("NOTHING", f"nothing was evicted; the cache is a {type(cache).__name__}")
    if not way.kept:
        raise Verdict("NO REFERENCE", "no attention met cached keys")
    for number, kept in way.kept.items():
        layer = layers[number]
        if number in way.evicted and not layer.num_evictions:
            raise Verdict("NOTHING", f"layer {number} was not evicted")
        if layer.num_evictions and layer.true_positions.tolist() != kept:
            rows = zip(layer.true_positions.tolist(), kept, strict=True)
            others = sum(ours != theirs for row in rows for ours, theirs in zip(*row, strict=True))
            raise Verdict(*(SWAP if others == 1 else OTHERS))


def _recomputed(
    model: Any, inputs: dict[str, Any], sequences: torch.Tensor, policy: Any, counts: bool, pads: list[int]
) -> tuple[torch.Tensor, Recomputed]:
    """Recompute the logits of each generated token, from a text of prompt and generated tokens."""
    length, text = inputs["input_ids"].shape[1], sequences[:, :-1]
    longer = text.shape[1] - length
    mask = pad(inputs["attention_mask"], (0, longer), value=1)
    inputs = inputs | {"input_ids": text, "attention_mask": mask}
    for name in LIKE_TEXT:
        if name == "cross_attention_mask" and name in inputs:
            inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:].expand(-1, longer, -1, -1)], dim=1)
        elif name in inputs:
            inputs[name] = pad(inputs[name], (0, longer))
    if counts:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, way = recompute(model, inputs, policy, [length] + [1] * longer, EVERY, pads)
    return logits[:, -longer - 1 :], way


def _generate(model: Any, inputs: dict[str, Any]) -> Any:
    # No generated token stands for a picture.
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": list(range(80, 97))}
    return model.generate(**inputs, **options, use_cache=True, output_logits=True, return_dict_in_generate=True)


def _distance(got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """Return the largest difference of logits, as a share of the largest of them; of all tokens, or of some."""
    if where is not None and got.shape[1] == where.shape[1]:
        got, want = got[where.bool()], want[where.bool()]
    return float((got - want).abs().max() / want.abs().max())


def _said(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((each for each in reversed(frames) if "/transformers/models/" in each.filename), frames[-1])
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def main(argv: list[str]) -> None:
    """Print the rows of some model types, or of all."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for model_type, name in names():
        if not argv or model_type in argv:
            row = sweep(model_type, name)
            for where, (result, reason) in row.results.items():
                print(model_type, name, row.kinds, where, result, reason, sep="|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
