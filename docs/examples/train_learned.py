"""Train the weights of `graphkv.AttentionGate` or `graphkv.LESS` for a model, on running text, layer by layer.

``python docs/examples/train_learned.py gate gates.safetensors`` and ``... less kernels.safetensors`` train on CPython's
language reference for SmolLM2, in some minutes on one core, and print what the trained weights lose on text that they
have not seen.

A layer is trained by itself. It has read the first tokens of a text, and what is kept of them answers the queries of
the tokens that come next. The error of that answer, relative to attention to everything, is what training lowers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import save_file

from graphkv import LESS, AttentionGate, KeyDiff, Layer, Policy, Random, Requirements, StreamingLLM, evict
from graphkv.adapters.attention_gate import Gate, gate_logits
from graphkv.adapters.less import Kernel, absorbed, answer_of, key_features, query_features
from graphkv.core.answer import attend
from graphkv.integrations.transformers import evicting

# Tokens of a text that come after those that are evicted, and ask about them.
NUM_ASKING = 64
# Rows of a step.
BATCH = 4

Weights = TypeVar("Weights", Gate, Kernel)
Arrays = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """Remember every layer that is shown, and keep its first token."""

    requirements: ClassVar[Requirements] = Requirements(values=True, queries="all", unrotated_keys=True)

    found: list[Layer] = field(repr=False)

    def num_queries(self, num_tokens: int, /) -> int:
        """Ask for all queries."""
        return num_tokens

    def score(self, layer: Layer, memory: Any, /) -> Any:
        """Remember the layer."""
        self.found.append(layer)
        return torch.zeros_like(layer.keys[..., 0])


def read(model: Any, ids: torch.Tensor) -> list[Layer]:
    """Let a model read texts, shape (rows, tokens); return keys, values and queries of every layer."""
    found: list[Layer] = []
    with evicting(model, Recorder(budget=1, found=found)), torch.no_grad():
        model(ids)
    return found


def logits_of(layer: Layer) -> torch.Tensor:
    """Compute the attention logits of the asking tokens, shape (rows, query_heads, NUM_ASKING, tokens)."""
    keys = layer.keys
    queries = layer.queries[:, :, -NUM_ASKING:].unflatten(1, (keys.shape[1], -1))
    logits = (queries @ keys[:, :, None].mT / keys.shape[-1] ** 0.5).flatten(1, 2)
    unseen = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(logits.shape[-1] - NUM_ASKING + 1)
    return logits.masked_fill(unseen, -torch.inf)


def to_heads(stays: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Spread what is said of the first tokens, shape (rows, kv_heads, tokens), over all tokens and query heads."""
    groups = logits.shape[1] // stays.shape[1]
    return torch.nn.functional.pad(stays, (0, NUM_ASKING), value=1).repeat_interleave(groups, dim=1)[:, :, None]


def kept_only(logits: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return logits, minus infinity for the tokens that do not stay."""
    return logits.masked_fill(~to_heads(stays, logits), -torch.inf)


def error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error, relative to the mean square of what is wanted."""
    return (found - wanted).square().mean() / wanted.square().mean()


def before_asking(layer: Layer) -> tuple[torch.Tensor, Arrays]:
    """Return the keys of the tokens before the asking ones, and what else `evict` takes of them."""
    keys, *others = (x[:, :, :-NUM_ASKING] for x in (layer.keys, layer.values, layer.unrotated_keys))
    return keys, dict(zip(("values", "unrotated_keys"), others, strict=True))


def error_of(policy: Policy, layers: Sequence[Layer]) -> float:
    """Compute the error of the answers from what a policy keeps, in the mean of the layers."""
    errors = []
    for number, layer in enumerate(layers):
        keys, facts = before_asking(layer)
        done = evict(policy, keys, **facts, layer=number, num_layers=len(layers))
        stays = torch.zeros(keys.shape[:3], dtype=torch.bool).scatter(2, done.kept, True)
        logits, answer = logits_of(layer), None
        if policy.needs().answers:
            queries = layer.queries[:, :, -NUM_ASKING:]
            answer = policy.answer(queries, done.state, layer=number, num_layers=len(layers))
        found = attend(kept_only(logits, stays), layer.values, answer, xp=layer.xp)
        errors.append(float(error(found, attend(logits, layer.values, xp=layer.xp))))
    return sum(errors) / len(errors)


def scale_of(x: torch.Tensor) -> torch.Tensor:
    """Return how much each channel of (rows, heads, tokens, D) varies in a head, shape (heads, D)."""
    return x.square().mean(dim=(0, 2)).sqrt().clamp(min=1e-6)


def fitted(start: Arrays, loss_of: Callable[[Arrays, torch.Tensor], torch.Tensor], *, rows: int, steps: int) -> Arrays:
    """Lower a loss, which is that of some rows, by Adam."""
    arrays = {name: array.clone().requires_grad_() for name, array in start.items()}
    optimizer = torch.optim.Adam(arrays.values(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(arrays, torch.arange(step * BATCH, (step + 1) * BATCH) % rows).backward()
        optimizer.step()
    return {name: array.detach() for name, array in arrays.items()}


def gate(layer: Layer, *, share: float, steps: int, heads: int = 2, width: int = 16) -> Gate:
    """Train a gate to keep a share of the tokens such that the answers to what comes next change least.

    As in the paper, a token passes where its gate is above one half, the gradient goes through as if the gate itself
    were multiplied, and a second term of the loss draws the mean of the gate to the share.
    """
    features = torch.cat([layer.unrotated_keys, layer.values], dim=-1)[:, :, :-NUM_ASKING]
    (rows, kv_heads, _, size), scale = features.shape, scale_of(features)
    start = {name: torch.randn(kv_heads, heads, size, width) / size**0.5 for name in ("query", "key", "value")}
    start |= {"out": torch.randn(kv_heads, heads, width) / (heads * width) ** 0.5, "bias": torch.zeros(kv_heads)}
    features, weights = features / scale[:, None], logits_of(layer).softmax(dim=-1)
    values = layer.values.repeat_interleave(weights.shape[1] // kv_heads, dim=1)

    def loss_of(arrays: Arrays, some: torch.Tensor) -> torch.Tensor:
        seen, paid = features[some], weights[some]
        valid = torch.ones(seen.shape[:3], dtype=torch.bool)
        passes = gate_logits(seen, Gate(**arrays), valid, xp=layer.xp).sigmoid()
        paid_to_kept = paid * to_heads((passes > 0.5).float() + passes - passes.detach(), paid)
        found = paid_to_kept / paid_to_kept.sum(dim=-1, keepdim=True) @ values[some]
        return error(found, paid @ values[some]) + (passes.mean(dim=(0, 2)) - share).abs().mean()

    arrays = fitted(start, loss_of, rows=rows, steps=steps)
    return Gate(**arrays | {name: arrays[name] / scale[:, None, :, None] for name in ("query", "key", "value")})


def kernel(layer: Layer, base: Policy, number: int, *, steps: int, width: int = 64, features: int = 8) -> Kernel:
    """Train the feature maps of a layer to answer for what the base drops."""
    keys, facts = before_asking(layer)
    kept = evict(base, keys, **facts, layer=layer.layer, num_layers=number).kept
    stays = torch.zeros(keys.shape[:3], dtype=torch.bool).scatter(2, kept, True)
    queries, logits, values = layer.queries[:, :, -NUM_ASKING:], logits_of(layer), layer.values
    wanted, some_logits = attend(logits, values, xp=layer.xp), kept_only(logits, stays)
    scales, start = {"query": scale_of(queries), "key": scale_of(keys)}, {}
    for name, scale in scales.items():
        heads, size = scale.shape
        start[f"{name}_in"] = torch.randn(heads, size, width) / size**0.5
        start[f"{name}_out"] = torch.randn(heads, width, features) / width**0.5
    kv_heads = keys.shape[1]
    start |= {"key_scale": torch.ones(kv_heads, features), "mix_scale": torch.zeros(kv_heads, features)}
    start["mix"] = torch.randn(kv_heads, features, features) / features**0.5

    def folded(arrays: Arrays) -> Kernel:
        return Kernel(
            **arrays | {f"{name}_in": arrays[f"{name}_in"] / scale[..., None] for name, scale in scales.items()}
        )

    def loss_of(arrays: Arrays, some: torch.Tensor) -> torch.Tensor:
        maps, past = folded(arrays), facts["values"][some]
        nothing = past.new_zeros(*past.shape[:2], features)
        found = key_features(keys[some], maps, xp=layer.xp)
        state = absorbed(
            nothing[..., None].expand(*nothing.shape, past.shape[-1]),
            nothing,
            found,
            past,
            (~stays[some]).float(),
            xp=layer.xp,
        )
        answer = answer_of(query_features(queries[some], maps, xp=layer.xp), *state, xp=layer.xp)
        return error(attend(some_logits[some], values[some], answer, xp=layer.xp), wanted[some])

    return folded(fitted(start, loss_of, rows=len(keys), steps=steps))


def train_gates(
    model: Any, ids: torch.Tensor, held_out: torch.Tensor, *, share: float = 0.25, steps: int = 150
) -> tuple[list[Gate], dict[str, float]]:
    """Train the gates of all layers of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids, held_out : torch.Tensor, shape (rows, tokens), int64
        Texts to train on, and others to measure on.
    share : float
        Of the tokens that stay.
    steps : int
        Per layer.

    Returns
    -------
    list of Gate, and dict of str to float
        One gate per layer; and the errors on the held-out texts, of these gates, of gates without training, and of
        policies without weights. All keep the same share.
    """
    layers = read(model, ids)
    before, after = ([gate(layer, share=share, steps=number) for layer in layers] for number in (0, steps))
    policies: dict[str, Policy] = {"gate, untrained": AttentionGate(budget=share, gates=before)}
    policies["gate, trained"] = AttentionGate(budget=share, gates=after)
    for name, gates in (("untrained", before), ("trained", after)):
        policies[f"gate, {name}, 4 sinks"] = AttentionGate(budget=share, gates=gates, num_sinks=4)
    policies |= {
        "random, 4 sinks": Random(budget=share, num_sinks=4),
        "keydiff, 4 sinks": KeyDiff(budget=share, num_sinks=4),
    }
    layers = read(model, held_out)
    return after, {name: error_of(policy, layers) for name, policy in policies.items()}


def train_kernels(
    model: Any, ids: torch.Tensor, held_out: torch.Tensor, *, share: float = 0.25, steps: int = 150
) -> tuple[list[Kernel], dict[str, float]]:
    """Train the kernels of all layers for sinks and recents, as `train_gates` does.

    Returns
    -------
    list of Kernel, and dict of str to float
        One kernel per layer; and the errors without a state, with kernels before training, and with these.
    """
    layers, base = read(model, ids), StreamingLLM(budget=share)
    before, after = ([kernel(layer, base, len(layers), steps=number) for layer in layers] for number in (0, steps))
    policies = {"sinks and recents": base, "less, untrained": LESS(base, before), "less, trained": LESS(base, after)}
    layers = read(model, held_out)
    return after, {name: error_of(policy, layers) for name, policy in policies.items()}


def texts(tokens: torch.Tensor, *, rows: int, length: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a long text, shape (tokens,), into pieces; draw rows to train on, and half as many to measure on."""
    pieces = tokens[: len(tokens) // length * length].unflatten(0, (-1, length))
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return pieces[order[:rows]], pieces[order[rows : rows + rows // 2]]


def save(weights: Sequence[Weights], path: str) -> None:
    """Write the weights of all layers into a file for `AttentionGate.load` or `LESS.load`."""
    named = {
        f"layers.{n}.{each.name}": getattr(one, each.name) for n, one in enumerate(weights) for each in fields(one)
    }
    save_file({name: array.contiguous() for name, array in named.items()}, path)


def main() -> None:
    """Train for SmolLM2, or another model."""
    # Only here: the tests train for a model of their own.
    from graphkv.workbench.model import load_model  # noqa: PLC0415
    from graphkv.workbench.text import language_reference  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["gate", "less"])
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--model", help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=300, help="per layer")
    parser.add_argument("--rows", type=int, default=16, help="texts of 256 tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model(options.model, print)
    text = "\n\n".join(language_reference().distinct().paragraphs)
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    train: Callable[..., tuple[list[Any], dict[str, float]]] = train_gates if options.what == "gate" else train_kernels
    weights, errors = train(model, *texts(tokens, rows=options.rows), steps=options.steps)
    for name, found in errors.items():
        print(f"{name:26} {found:.3f}")
    save(weights, options.output)


if __name__ == "__main__":
    main()
