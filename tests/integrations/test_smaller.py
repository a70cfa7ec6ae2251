"""A smaller model that says what a larger one keeps."""

import pytest
import torch

from graphkv import ArgumentError, Given, SmallKV
from graphkv.integrations.transformers import EvictingCache, SmallerModel, evicting, observing
from graphkv.integrations.transformers.smaller import received_by
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_gemma3, tiny_llama


@pytest.fixture(scope="module")
def small():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def large(small):
    """The small model's layers, the KV heads of the first one swapped, with a layer of its own between them."""
    model = tiny_llama(seed=1, num_hidden_layers=3)
    model.load_state_dict(small.state_dict(), strict=False)
    first, between, last = model.model.layers
    last.load_state_dict(small.model.layers[1].state_dict())
    between.self_attn.o_proj.weight.data.zero_()
    between.mlp.down_proj.weight.data.zero_()
    attention = first.self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight.data
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))
    attention.o_proj.weight.data.copy_(torch.cat(attention.o_proj.weight.data.chunk(2, dim=1)[::-1], dim=1))
    return model


def text(rows=1, tokens=60, seed=3):
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stored(model, ids, policy, **inputs):
    cache = EvictingCache(policy)
    with observing(model), torch.inference_mode():
        model(ids, **with_cache(model, cache), **inputs)
    return [layer.true_positions for layer in cache.layers]


def test_heads_find_their_copies(small, large):
    ids = text(rows=2)
    with torch.inference_mode():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-3)

    heads = SmallerModel.matched(small, large, ids).heads

    assert [list(heads[0]), list(heads[2])] == [[1, 0], [2, 3]]
    assert len(heads[1]) == 2
    assert all(0 <= head < 4 for head in heads[1])


def test_the_large_model_keeps_what_its_own_attention_would_have_kept(small, large):
    ids = text(seed=4)
    smaller = SmallerModel.matched(small, large, text())

    policy = smaller.policy(ids, budget=15, num_recent=5)
    kept = stored(large, ids, policy)

    own = received_by(large, ids, None)
    for layer in (0, 2):
        marks = torch.zeros(1, 2, 60, dtype=torch.bool)
        marks[..., -5:] = True
        given = Given(budget=15, importance=own[layer], protected=marks, num_protected=5)
        assert kept[layer].tolist() == stored(large, ids, given)[layer].tolist()
    assert all(each.shape == (1, 2, 15) for each in kept)
    with evicting(large, policy):
        assert large.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 63)


def test_a_padded_row_keeps_what_it_keeps_alone(small, large):
    ids, mask = text(rows=2), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :13] = 0
    smaller = SmallerModel.matched(small, large, ids, mask)

    together = stored(large, ids, smaller.policy(ids, mask, budget=12), attention_mask=mask)
    alone = stored(large, ids[1:, 13:], smaller.policy(ids[1:, 13:], budget=12))

    for one, other in zip(together, alone, strict=True):
        assert (one[1] - 13).tolist() == other[0].tolist()


def test_sliding_layers_are_left_alone():
    model = tiny_gemma3()

    # Compared by many tokens, no two heads look at the same ones.
    smaller = SmallerModel.matched(model, model, text(), num_tokens=25)

    assert [layer is None for layer in smaller.heads] == [True, False, True, False]
    assert [list(layer) for layer in smaller.heads if layer is not None] == [[0, 1], [2, 3]]
    positions = stored(model, text(), smaller.policy(text(), budget=10))
    assert [each.shape[2] for each in positions[1::2]] == [10, 10]


def test_bad_input_is_named(small, large):
    ids = text()
    smaller = SmallerModel.matched(small, large, ids)
    with pytest.raises(ArgumentError, match="model must have the vocabulary of large, of size 97; got 50"):
        SmallerModel.matched(tiny_llama(vocab_size=50), large, ids)
    with pytest.raises(ArgumentError, match="attention_mask must have all padding of a row first"):
        smaller.policy(ids, (torch.arange(60) < 50)[None].long(), budget=9)
    with pytest.raises(ArgumentError, match=r"heads\[0\] must name one of the 4 heads of the model; got 4"):
        SmallerModel(small, [[4, 0]]).policy(ids, budget=9)
    with pytest.raises(ArgumentError, match="importance must have shape"):
        stored(large, ids[:, :40], smaller.policy(ids, budget=9))
    with pytest.raises(ArgumentError, match="importance must have one array for each of 2 layers; got 3"):
        stored(small, ids, smaller.policy(ids, budget=9))
    assert isinstance(smaller.policy(ids, budget=9), SmallKV)
