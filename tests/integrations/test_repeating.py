"""KVzip's questions: how they are written, that a cache is asked exactly them, and what a batch with padding gets."""

import pytest
import torch

from graphkv import AdaKV, ArgumentError, ArgumentTypeError, KVzip
from graphkv.integrations.transformers import EvictingCache, RepeatPrompt, ask_to_repeat, observing
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import byte_tokenizer, tiny_llama

N = 30
PROMPT = RepeatPrompt(first=(90, 91), later=(92,), answer=(93, 94), overlap=3)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 90, (2, N), generator=torch.Generator().manual_seed(1))


def filled(model, ids, **inputs):
    cache = EvictingCache()
    with observing(model), torch.inference_mode():
        model(ids, **inputs, **with_cache(model, cache))
    return cache


def test_the_questions_are_those_of_the_paper(ids):
    first, second, third = PROMPT.pieces(ids, chunk=13, start=5)

    text = ids.tolist()
    assert first[0].tolist() == [[90, 91, 93, 94, *row[:13]] for row in text]
    assert second[0].tolist() == [[92, *row[10:13], 93, 94, *row[13:26]] for row in text]
    assert third[0].tolist() == [[92, *row[23:26], 93, 94, *row[26:]] for row in text]
    assert [about for _, about in (first, second, third)] == [(5, 18), (18, 31), (31, 35)]


def test_a_tokenizer_writes_the_instructions_of_the_public_code():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    made = RepeatPrompt.of(tokenizer)
    tokenizer.chat_template = None
    plain = RepeatPrompt.of(tokenizer)

    assert tokenizer.decode(made.first) == "\n\nRepeat the previous context exactly."
    assert tokenizer.decode(made.later) == "\n\nRepeat the part of the previous context exactly, starting with "
    assert tokenizer.decode(made.answer) == "</u><a>"
    assert tokenizer.decode(plain.answer) == "\n"
    assert made.overlap == 8


def test_a_cache_keeps_what_the_model_looks_at_when_it_repeats(model, ids):
    """The scores of the eviction against the formula, from the keys and queries of plain forward passes."""
    cache = filled(model, ids)
    expected = [torch.zeros(2, 2, N) for _ in cache.layers]
    for piece, (start, end) in PROMPT.pieces(ids, chunk=13):
        # All that the model reads, in one pass without any cache of ours.
        held = EvictingCache(num_queries=piece.shape[1])
        with observing(model), torch.inference_mode():
            model(torch.cat([ids, piece], dim=1), **with_cache(model, held))
        for found, layer in zip(expected, held.layers, strict=True):
            keys = torch.cat([layer.keys[:, :, start:end], layer.keys[:, :, N:]], dim=2)
            queries = layer.queries.unflatten(1, (2, 3))
            logits = queries @ keys[:, :, None].transpose(-1, -2) / 8**0.5
            count, width = piece.shape[1], end - start
            hidden = torch.ones(count, count).triu(1).bool()
            logits[..., width:] = logits[..., width:].masked_fill(hidden, -torch.inf)
            found[..., start:end] = logits.softmax(-1)[..., :width].amax(dim=(2, 3))

    ask_to_repeat(model, cache, ids, PROMPT, chunk=13)
    twin = cache.copy()
    (decision,) = cache.layers[0].copy().evict(KVzip(budget=9))
    cache.evict(KVzip(budget=9))
    twin.evict(AdaKV(KVzip(budget=9), floor=0.0))

    torch.testing.assert_close(decision.importance, expected[0])
    for layer, found in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.positions, found.topk(9).indices.sort().values)
    for layer, found in zip(twin.layers, expected, strict=True):
        # One budget for both heads of the layer.
        best = found.flatten(1).topk(18).indices
        wanted = [sorted((index // N, index % N) for index in row.tolist()) for row in best]
        kept = [
            sorted((head, int(p)) for head in range(2) for p in layer.positions[row, head] if p >= 0)
            for row in range(2)
        ]
        assert kept == wanted


def test_padding_neither_asks_nor_is_asked_for(model, ids):
    shown = torch.ones_like(ids)
    shown[1, :16] = 0
    places = shown.cumsum(dim=1).sub(1).clamp(min=0)
    cache = filled(model, ids, attention_mask=shown, position_ids=places)
    ask_to_repeat(model, cache, ids, PROMPT, chunk=16, attention_mask=shown)

    first, second = (probe.valid.tolist() for probe in cache.layers[0].probes)
    assert first == [[True] * 20, [True] * 4 + [False] * 16]
    # The instruction, the end of the piece before, the beginning of the answer, and a piece of 14 tokens.
    assert second == [[True] * 20, [True] + [False] * 3 + [True] * 16]
    cache.evict(KVzip(budget=6))
    for layer in cache.layers:
        assert (layer.positions[1] >= 16).all()
        assert layer.num_stored == 6


def test_mistakes_leave_the_cache_as_it_was(model, ids):
    cache = filled(model, ids)
    for error, message, change in (
        (ArgumentError, "chunk must be at least 1; got 0", {"chunk": 0}),
        (ArgumentError, "ids must be among the 30 tokens seen; got 30 tokens after the first 1", {"start": 1}),
        (ArgumentError, r"ids must be a tensor of shape .* got \(2, 0\)", {"ids": ids[:, :0]}),
        (ArgumentError, "ids must be a tensor of shape .* got list", {"ids": [[1]]}),
        (ArgumentError, r"attention_mask must have shape .* got \(2, 4\)", {"attention_mask": ids[:, :4]}),
        (ArgumentTypeError, "prompt must be a RepeatPrompt; got str", {"prompt": "Repeat!"}),
        (ArgumentTypeError, "cache must be a EvictingCache; got NoneType", {"cache": None}),
    ):
        given = {"cache": cache, "ids": ids, "prompt": PROMPT} | change
        with pytest.raises(error, match=message):
            ask_to_repeat(model, given.pop("cache"), given.pop("ids"), given.pop("prompt"), **given)
    # The second piece is longer than what is left of the model's context.
    long = RepeatPrompt(first=(1,), later=(1,) * 500)
    with pytest.raises(ArgumentError, match="ids must end within the model's context of 512 tokens"):
        ask_to_repeat(model, cache, ids, long, chunk=16)
    assert [layer.probes for layer in cache.layers] == [(), ()]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ArgumentError, "first must hold at least one token; got none", {"first": ()}),
        (ArgumentTypeError, "later must be token ids; got str", {"later": "Repeat"}),
        (ArgumentError, r"answer\[1\] must be at least 0; got -1", {"answer": (3, -1)}),
        (ArgumentError, "overlap must be at least 0; got -2", {"overlap": -2}),
    ],
)
def test_a_prompt_is_checked(error, message, options):
    with pytest.raises(error, match=message):
        RepeatPrompt(**{"first": (1,), "later": (2,)} | options)
