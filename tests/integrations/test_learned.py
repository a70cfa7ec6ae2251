"""The example that trains weights: what it trains is better on other text, inside the cache too."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import graphkv
from graphkv import LESS, AttentionGate, StreamingLLM
from graphkv.integrations.transformers import evicting
from tests.integrations.tiny import tiny_llama

pytest.importorskip("graphkv.workbench.text", reason="the text is that of graphkv[demo]")


@pytest.fixture(scope="module")
def example():
    path = Path(graphkv.__file__).parents[1] / "docs" / "examples" / "train_learned.py"
    spec = importlib.util.spec_from_file_location("train_learned", path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=256)


@pytest.fixture(scope="module")
def pieces(example):
    from graphkv.workbench.text import language_reference

    text = "\n\n".join(language_reference("assignment", "compound", "specialnames").paragraphs)
    return example.texts(torch.tensor(list(text.encode("ascii", "replace"))), rows=8, length=160)


def test_a_model_is_read_as_it_is(example, model, pieces):
    layers = example.read(model, pieces[0][:2])

    assert [layer.layer for layer in layers] == [0, 1, 2]
    with torch.no_grad():
        eager = tiny_llama(vocab_size=256, attn_implementation="eager")
        expected = eager(pieces[0][:2], output_attentions=True).attentions[0][:, :, -64:]
    torch.testing.assert_close(example.logits_of(layers[0]).softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_a_trained_gate_loses_less_on_text_that_it_has_not_seen(example, model, pieces, tmp_path):
    torch.manual_seed(0)
    ids, held_out = pieces
    assert not {tuple(row) for row in ids.tolist()} & {tuple(row) for row in held_out.tolist()}

    gates, errors = example.train_gates(model, ids, held_out, steps=40)

    assert errors["gate, trained"] < 0.9 * errors["gate, untrained"]
    example.save(gates, tmp_path / "gates.safetensors")
    with evicting(model, AttentionGate.load(tmp_path / "gates.safetensors", budget=0.25)) as run:
        model.generate(held_out[:1], max_new_tokens=2, do_sample=False)
    assert {layer.num_stored for layer in run.cache.layers} == {41}


def test_a_trained_state_answers_for_what_is_gone(example, model, pieces, tmp_path):
    torch.manual_seed(0)

    kernels, errors = example.train_kernels(model, *pieces, steps=40)

    assert errors["less, trained"] < 0.9 * min(errors["sinks and recents"], errors["less, untrained"])
    example.save(kernels, tmp_path / "kernels.safetensors")
    policy = LESS.load(StreamingLLM(budget=0.25), tmp_path / "kernels.safetensors")
    with evicting(model, policy) as run:
        model.generate(pieces[1][:1], max_new_tokens=2, do_sample=False)
    assert all(layer.answering == policy for layer in run.cache.layers)
