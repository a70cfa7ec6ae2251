"""Scorer presses of kvpress with the graph on top: by hand, through kvpress's own wrappers, and while generating."""

import copy
from fractions import Fraction
from math import floor

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")

from kvpress import (
    AdaKVPress,
    BlockPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    LagKVPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
    TOVAPress,
)

from graphkv import ArgumentError, ArgumentTypeError, Decay, Enhance, Policy, build_graph, propagate, select
from graphkv.integrations.kvpress import GraphKVPress, PolicyPress
from tests.integrations.reference import reference_generate
from tests.integrations.tiny import tiny_llama
from tests.kvpress.models import MODELS, generate, lengths, num_hooks, prefill, prompts, same

N = 40
# A press, and which of 40 tokens it forces: (at the beginning, at the end).
PRESSES = {
    "compactor": (CompactorPress(0.5, sink_size_start=2, sink_size_end=3, sketch_dimension=8), (2, 3)),
    "cur": (CURPress(0.5, num_sinks=3), (3, 0)),
    "expected-attention": (ExpectedAttentionPress(0.5, n_future_positions=8, n_sink=2), (2, 0)),
    "keydiff": (KeyDiffPress(0.5), (0, 0)),
    "knorm": (KnormPress(0.5), (0, 0)),
    # The last complete lag of 8 and the 4 tokens after it have nothing to compare with.
    "lagkv": (LagKVPress(0.4, n_sink=4, lag_size=8), (4, 12)),
    "leverage": (LeverageScorePress(0.5, sketch_dimension=8), (0, 0)),
    "non-causal": (NonCausalAttnPress(0.5, chunk_size=16), (0, 0)),
    "pyramidkv": (PyramidKVPress(0.5, window_size=4, kernel_size=3, beta=2), (0, 4)),
    "random": (RandomPress(0.5, seed=3), (0, 0)),
    "snapkv": (SnapKVPress(0.5, window_size=6, kernel_size=3), (0, 6)),
    "streaming-llm": (StreamingLLMPress(0.5, n_sink=4), (4, 16)),
    "tova": (TOVAPress(0.5), (0, 1)),
}
each_press = pytest.mark.parametrize("name", sorted(PRESSES))


@pytest.fixture(scope="module")
def model():
    return MODELS["llama"]()


class Recorded(ScorerPress):
    """A press that remembers what it was asked and what it said."""

    def __init__(self, press):
        self.press, self.compression_ratio, self.calls = press, press.compression_ratio, []

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        self.calls.append((scores.clone(), keys, values))
        return scores


def protected(forced, num_tokens):
    first, last = forced
    place = torch.arange(num_tokens)
    return (place < first) | (place >= num_tokens - last)


def by_hand(calls, forced, budgets, *, num_neighbors, ratio=Fraction(3, 10)):
    """Keys and values of the kept tokens of every layer, by the three steps of the core."""
    result = []
    for (scores, keys, values), budget in zip(calls, budgets, strict=True):
        mask = protected(forced, scores.shape[-1]).expand(scores.shape)
        num_open = max(0, budget - sum(forced))
        num_sources = max(1, floor(ratio * num_open)) if num_open else 0
        importance = scores.float()
        graph = build_graph(
            keys, importance, num_sources=num_sources, num_neighbors=num_neighbors if num_open else 0, valid=~mask
        )
        kept = select(propagate(importance, graph), budget, protected=mask)
        result.append(tuple(x.gather(2, kept[..., None].expand(*kept.shape, x.shape[-1])) for x in (keys, values)))
    return result


@each_press
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_graph_is_the_one_applied_by_hand(name, kv_heads):
    press, forced = copy.deepcopy(PRESSES[name])
    model = tiny_llama(num_key_value_heads=kv_heads)
    # With one row of scores, a forced token is told by kvpress's usual mark alone.
    if kv_heads == 1 and name in ("compactor", "cur", "lagkv"):
        forced = (0, 0)
    ids = prompts(batch=1 if kv_heads == 1 else 3)
    base = Recorded(press)
    if name == "pyramidkv":
        budgets = [press.get_layer_budget(layer.self_attn, N) for layer in model.model.layers]
        wrapped = GraphKVPress(press, signal=Decay(neighbors=3))
        prefill(model, ids, base)
    else:
        budgets = [24 if name == "lagkv" else 20] * 3
        wrapped = GraphKVPress(base, signal=Decay(neighbors=3))

    cache = prefill(model, ids, wrapped)

    assert lengths(cache) == budgets
    assert same(cache, by_hand(base.calls, forced, budgets, num_neighbors=3))


def test_attention_rows_reach_the_press():
    model, base = tiny_llama(attn_implementation="eager"), Recorded(ObservedAttentionPress(0.5))
    cache = prefill(model, prompts(), GraphKVPress(base, signal=Decay(neighbors=3)))

    assert same(cache, by_hand(base.calls, (0, 0), [20] * 3, num_neighbors=3))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_family_of_models(kind):
    base = Recorded(KnormPress(0.5) if kind == "phi3" else SnapKVPress(0.5, window_size=6, kernel_size=3))
    cache = prefill(MODELS[kind](), prompts(), GraphKVPress(base))

    forced = (0, 0) if kind == "phi3" else (0, 6)
    assert same(cache, by_hand(base.calls, forced, [20] * 4, num_neighbors=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["keydiff", "snapkv"])
def test_half_precision(dtype, name):
    """Scores are widened before the graph, so equal ones stay equal and go to the lower index."""
    press, forced = PRESSES[name]
    base = Recorded(press)
    cache = prefill(MODELS["llama"]().to(dtype), prompts(), GraphKVPress(base, signal=Decay(neighbors=3)))

    assert base.calls[0][0].dtype == dtype
    assert cache.layers[0].keys.dtype == dtype
    assert same(cache, by_hand(base.calls, forced, [20] * 4, num_neighbors=3))


def test_all_options_of_graphkv_are_taken(model):
    base = Recorded(PRESSES["snapkv"][0])
    press = GraphKVPress(
        base, signal=Enhance(source_ratio=0.5, neighbors=2, rounds=3, strength=0.25, recompute_sources=False)
    )
    cache = prefill(model, prompts(), press)

    expected = []
    for scores, keys, values in base.calls:
        mask = protected((0, 6), N).expand(scores.shape)
        graph = build_graph(keys, scores, num_sources=7, num_neighbors=2, valid=~mask)
        updated = propagate(scores, graph, signal="enhance", rounds=3, strength=0.25)
        kept = select(updated, 20, protected=mask)
        expected.append(tuple(x.gather(2, kept[..., None].expand(*kept.shape, 8)) for x in (keys, values)))
    assert same(cache, expected)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"),
    [(100, 0.9, 10), (100, 0.8, 20), (100, 0.35, 65), (30, 0.9, 3), (10, 0.15, 8), (7, 0.95, 1), (100, 0.0, 100)],
)
def test_budgets_are_exact(model, num_tokens, ratio, kept):
    """kvpress keeps 9 of 100 at a ratio of 0.9, and 19 at 0.8."""
    cache = prefill(model, prompts(length=num_tokens), GraphKVPress(KnormPress(ratio)))

    assert lengths(cache) == [kept] * 4


def test_a_budget_below_the_window_keeps_the_newest(model):
    full = prefill(model, prompts())
    cache = prefill(model, prompts(), GraphKVPress(SnapKVPress(0.9, window_size=8)))

    assert same(cache, [(layer.keys[:, :, -4:], layer.values[:, :, -4:]) for layer in full.layers])


class Loud(ScorerPress):
    """Scores as large as bfloat16 counts in steps of 2, with a window of 5 forced in kvpress's way."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = 300 + keys[..., :-5, 0].argsort(-1).argsort(-1).bfloat16() * 4
        return torch.nn.functional.pad(scores, (0, 5), value=scores.max().item() + 1)


def test_a_forced_token_is_told_from_an_equal_score(model):
    base = Recorded(Loud(0.5))
    cache = prefill(model, prompts(), GraphKVPress(base))

    scores = base.calls[0][0]
    # The mark of kvpress is lost in rounding: the best token of every head has it too.
    assert bool((scores[..., :-5].amax(-1) == scores[..., -1]).all())
    assert same(cache, by_hand(base.calls, (0, 5), [20] * 4, num_neighbors=2))


class Even(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return torch.ones_like(keys[..., 0])


def test_equal_scores_force_nothing(model):
    base = Recorded(Even(0.5))
    cache = prefill(model, prompts(), GraphKVPress(base, signal=Decay(neighbors=1)))

    assert same(cache, by_hand(base.calls, (0, 0), [20] * 4, num_neighbors=1))
    # Without the graph the first half would stay.
    assert not torch.equal(cache.layers[0].keys, base.calls[0][1][:, :, :20])


class Kept(Policy):
    """Keeps what it is told to, layer by layer."""

    def __init__(self, scores, budget):
        super().__init__(budget=budget)
        object.__setattr__(self, "scores", scores)

    def score(self, layer, memory):
        return self.scores[layer.layer].numpy()


@pytest.mark.parametrize("name", ["snapkv", "knorm"])
def test_generation_equals_a_reference_without_a_cache(model, name):
    press = GraphKVPress(PRESSES[name][0], signal=Decay(source_ratio=0.5, neighbors=4))
    ids = prompts(batch=2)
    with press(model):
        found = generate(model, ids)

    full, cache = prefill(model, ids), prefill(model, ids, press)
    for row in range(2):
        stays = [
            (whole.keys[row, :, :, None] == part.keys[row, :, None]).all(-1).any(-1).float()[None]
            for whole, part in zip(full.layers, cache.layers, strict=True)
        ]
        assert all(bool((x.sum(-1) == 20).all()) for x in stays)
        assert found[row].tolist() == reference_generate(model, ids[row], Kept(stays, 20), 6).tolist()
    assert found.tolist() != generate(model, ids).tolist()


def outcome(model, press, ids):
    """What a press leaves of each layer, in whatever order: (row, head) to sorted entries of the values, and masks."""
    cache = prefill(model, ids, press)
    layers = []
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        entries = layer.values.flatten(2).unflatten(2, layer.values.shape[2:])[..., 0].sort(-1).values
        mask = getattr(block.self_attn, "masked_key_indices", None)
        masked = None if mask is None else set(zip(*(axis.tolist() for axis in mask), strict=True))
        layers.append((entries.tolist(), masked))
    return layers


WRAPPERS = {
    "adakv": AdaKVPress,
    "block": lambda press: BlockPress(press, block_size=8),
    "chunk": lambda press: ChunkPress(press, chunk_length=20),
    "chunkkv": lambda press: ChunkKVPress(press, chunk_length=4),
    "composed": lambda press: ComposedPress([press, ThinKPress(0.5, window_size=4)]),
    "critical": CriticalKVPress,
    "critical-adakv": CriticalAdaKVPress,
    "key-rerotation": KeyRerotationPress,
    "per-layer": lambda press: PerLayerCompressionPress(press, [0.25, 0.4, 0.5, 0.75]),
    "prefill-decoding": lambda press: PrefillDecodingPress(prefilling_press=press),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("name", ["knorm", "snapkv"])
def test_wrappers_of_kvpress_take_it(model, wrapper, name):
    base, _ = PRESSES[name]
    ids = prompts(batch=1)
    without = outcome(model, wrapper(copy.deepcopy(base)), ids)

    # A graph without sources changes nothing, whoever asks for the scores.
    assert (
        outcome(model, wrapper(GraphKVPress(copy.deepcopy(base), signal=Decay(neighbors=1, source_ratio=0))), ids)
        == without
    )
    assert (
        outcome(model, wrapper(GraphKVPress(copy.deepcopy(base), signal=Decay(source_ratio=0.5, neighbors=6))), ids)
        != without
    )


def test_scores_for_wrappers_put_forced_tokens_first(model):
    base = Recorded(PRESSES["snapkv"][0])
    seen = []
    press = GraphKVPress(base, signal=Enhance(neighbors=5, source_ratio=1.0, rounds=5))

    class Spy(AdaKVPress):
        def compress(self, *args):
            seen.append(self.press.score(*args))
            return args[2:4]

    prefill(model, prompts(), Spy(press))

    for scores, (asked, *_) in zip(seen, base.calls, strict=True):
        # Enhanced beyond kvpress's own mark, or the test could not fail.
        assert bool((scores[..., :-6].amax() > asked.amax()).all())
        assert bool((scores[..., -6:] > scores[..., :-6].amax()).all())


@pytest.mark.parametrize("target", [9, 20, 33])
def test_decoding_press_reaches_its_target(model, target):
    """kvpress turns the target into a ratio; rounding that ratio another way would miss the target by one."""
    sizes = []

    class Spied(GraphKVPress):
        def compress(self, module, hidden_states, keys, *rest):
            result = super().compress(module, hidden_states, keys, *rest)
            sizes.append((keys.shape[2], result[0].shape[2]))
            return result

    def decode(base, num_new):
        with DecodingPress(base, compression_interval=5, target_size=target)(model):
            return generate(model, prompts(batch=1), num_new=num_new).tolist()

    decode(Spied(KnormPress(), signal=Decay(source_ratio=0.5, neighbors=6)), 12)
    assert sizes == [(45, target)] * 4 + [(target + 5, target)] * 4
    # Without sources all is as with the base, but for the order, which decides ties from the second time on.
    assert decode(GraphKVPress(KnormPress(), signal=Decay(neighbors=1, source_ratio=0)), 10) == decode(KnormPress(), 10)


def test_the_ratio_is_that_of_the_base(model):
    base = SnapKVPress(window_size=6, kernel_size=3)
    press = GraphKVPress(base, compression_ratio=0.25)
    assert base.compression_ratio == 0.25

    press.compression_ratio = 0.75
    assert base.compression_ratio == 0.75
    assert lengths(prefill(model, prompts(), press)) == [10] * 4
    assert press != GraphKVPress(SnapKVPress(0.75))
    assert press == GraphKVPress(SnapKVPress(0.75, window_size=6, kernel_size=3))
    assert "SnapKVPress(compression_ratio=0.75, window_size=6, kernel_size=3)" in repr(press)


def test_the_base_is_shown_the_model(model):
    seen = []

    class Curious(KnormPress):
        def post_init_from_model(self, model):
            seen.append(model)

    prefill(model, prompts(), GraphKVPress(Curious(0.5)))
    assert seen == [model]


def test_padding_is_refused(model):
    mask = torch.ones(3, N, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ArgumentError, match="neither padding nor sliding windows"):
        prefill(model, prompts(), GraphKVPress(KnormPress(0.5)), attention_mask=mask)


class Broken(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise RuntimeError("broken press")


def test_the_model_is_as_it_was_after_an_error(model):
    hooks, plain = num_hooks(model), generate(model, prompts())
    with pytest.raises(RuntimeError, match="broken press"):
        prefill(model, prompts(), GraphKVPress(Broken(0.5)))

    assert num_hooks(model) == hooks
    assert generate(model, prompts()).tolist() == plain.tolist()


def test_without_a_ratio_the_press_is_not_asked(model):
    full = prefill(model, prompts())
    cache = prefill(model, prompts(), GraphKVPress(Broken(0.0)))

    assert same(cache, [(layer.keys, layer.values) for layer in full.layers])


class OwnCompress(KnormPress):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[:, :, ::2], values[:, :, ::2]


@pytest.mark.parametrize(
    ("base", "options", "error", "message"),
    [
        (AdaKVPress(KnormPress(0.5)), {}, ArgumentTypeError, "base_press must be a ScorerPress; got AdaKVPress"),
        (PolicyPress, {}, ArgumentTypeError, "base_press must be a ScorerPress"),
        (OwnCompress(0.5), {}, ArgumentError, "OwnCompress has a compress of its own"),
        (GraphKVPress(KnormPress(0.5)), {}, ArgumentError, "GraphKVPress has a compress of its own"),
        (KnormPress(0.5), {"signal": Decay}, ArgumentTypeError, "signal must be a Signal; got"),
        (KnormPress(0.5), {"signal": "decay"}, ArgumentTypeError, "signal must be a Signal; got str"),
        (KnormPress(0.5), {"compression_ratio": -0.5}, ArgumentError, "compression_ratio must lie in"),
        (KnormPress(0.5), {"neighbors": 2}, TypeError, "neighbors"),
    ],
)
def test_bad_input(base, options, error, message):
    with pytest.raises(error, match=message):
        GraphKVPress(base, **options)
