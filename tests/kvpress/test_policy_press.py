"""Our policies as presses of kvpress: they keep what they keep elsewhere."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")

from kvpress import ComposedPress, KnormPress, KVPressTextGenerationPipeline, PrefillDecodingPress, ThinKPress
from kvpress.attention_patch import attention_patch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AttentionInterface, DynamicCache, PreTrainedTokenizerFast

from graphkv import (
    CAKE,
    D2O,
    H2O,
    LESS,
    Absorb,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Decay,
    GraphKV,
    KeyDiff,
    KNorm,
    KVMerger,
    LayerBudgets,
    Lossless,
    Policy,
    PyramidKV,
    Requirements,
    Shared,
    SnapKV,
    WeightedKV,
    evict,
)
from graphkv.adapters.less import Kernel
from graphkv.integrations.kvpress import PolicyPress
from graphkv.integrations.transformers import evicting
from tests.integrations.folding import Folded
from tests.integrations.reference import reference_generate, reference_logits
from tests.integrations.tiny import FAMILIES, tiny_llama
from tests.kvpress.models import MODELS, generate, lengths, num_hooks, prefill, prompts, same
from tests.support.policies import every_policy

BUDGET = 14
HEADWISE = {"adakv-snapkv", "adakv-graphkv-snapkv", "graphkv-adakv-knorm", "lossless-snapkv", "anyquery-snapkv"}
# A press evicts while it reads: it has not seen all layers by then, nor what is asked afterwards; and it has no masses,
# so that of policies that merge it runs those whose slots count as one token each.
POLICIES = {
    name: policy
    for name, policy in every_policy(BUDGET).items()
    if not (policy.needs().wants or (policy.needs().merges and policy.needs().masses) or policy.needs().probes)
}
SNAPKV = SnapKV(budget=BUDGET, window=4, kernel_size=3)
PYRAMID = PyramidKV(budget=BUDGET, window=4, kernel_size=3)


@pytest.fixture(scope="module")
def model():
    return MODELS["llama"]()


def evicted(model, ids, policy):
    """What our own cache holds after the prompt."""
    with evicting(model, policy), torch.inference_mode():
        return [(layer.keys, layer.values) for layer in model(ids).past_key_values.layers]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - HEADWISE))
def test_a_press_keeps_what_evicting_keeps(model, name):
    policy = POLICIES[name]

    cache = prefill(model, prompts(), PolicyPress(policy))

    assert lengths(cache) == [min(40, policy.layer_budget(40, layer, 4)) for layer in range(4)]
    assert same(cache, evicted(model, prompts(), policy))


def test_budgets_of_heads_and_rows_are_the_only_ones_left_out():
    assert set(POLICIES) >= HEADWISE
    assert {name for name, policy in POLICIES.items() if is_headwise(policy)} == HEADWISE


def is_headwise(policy):
    keys = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    queries = keys.repeat_interleave(3, dim=1)
    return evict(policy, keys, values=keys, queries=queries, num_layers=4).counts is not None


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("policy", [SNAPKV, GraphKV(H2O(budget=BUDGET))], ids=["snapkv", "h2o+graphkv"])
def test_queries_are_those_of_the_model(kind, policy):
    """Biases, norms, fused projections and partial rotation: evicting() takes the queries out of the attention."""
    model = MODELS[kind]()

    assert same(prefill(model, prompts(), PolicyPress(policy)), evicted(model, prompts(), policy))


def test_another_scaling_of_the_logits_reaches_the_policy():
    model = tiny_llama()
    unscaled = evicted(model, prompts(), SNAPKV)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    cache = prefill(model, prompts(), PolicyPress(SNAPKV))

    assert same(cache, evicted(model, prompts(), SNAPKV))
    assert not torch.equal(cache.layers[0].keys, unscaled[0][0])


@pytest.mark.parametrize(
    "policy",
    [
        SNAPKV,
        GraphKV(SNAPKV, Decay(neighbors=4)),
        PYRAMID,
        H2O(budget=0.3),
        AdaKV(SNAPKV),
        AdaKV(GraphKV(SNAPKV, Decay(neighbors=4))),
        Lossless(SnapKV(budget=0.5, window=4, kernel_size=3), 0.3),
    ],
    ids=["snapkv", "snapkv+graphkv", "pyramidkv", "h2o", "adakv", "adakv+graphkv", "lossless"],
)
def test_generation_equals_a_reference_without_a_cache(model, policy):
    ids = prompts(batch=2)
    with PolicyPress(policy)(model):
        found = generate(model, ids)

    expected = torch.stack([reference_generate(model, row, policy, 6) for row in ids])
    assert found.tolist() == expected.tolist()
    # The prompt makes a difference to what is generated, or the test could not fail.
    assert found.tolist() != generate(model, ids).tolist()


@pytest.mark.parametrize("name", sorted(HEADWISE))
def test_head_budgets_mask_what_the_policy_evicts(model, name):
    policy, ids = POLICIES[name], prompts(batch=2)
    cache = prefill(model, ids, PolicyPress(policy))

    assert lengths(cache) == [40] * 4
    kept = [reference_logits(model, row, policy, [40])[1] for row in ids]
    for number, layer in enumerate(model.model.layers):
        masked = set(zip(*(axis.tolist() for axis in layer.self_attn.masked_key_indices), strict=True))
        expected = {
            (row, head, token)
            for row in range(2)
            for head in range(2)
            for token in set(range(40)) - set(kept[row][number][head])
        }
        assert masked == expected
        # Those of a found budget may be more.
        assert len(masked) == 2 * 2 * (40 - BUDGET) or (
            policy.needs().automatic and len(masked) > 2 * 2 * (40 - BUDGET)
        )


def test_the_next_prompt_lifts_the_mask_of_head_budgets(model):
    ids = prompts(batch=1)
    plain = generate(model, ids)
    with PolicyPress(AdaKV(SNAPKV))(model):
        generate(model, ids)

    assert generate(model, ids).tolist() == plain.tolist()
    with PolicyPress(AdaKV(SnapKV(budget=64, window=4)))(model):
        assert generate(model, ids).tolist() == plain.tolist()


def test_a_row_of_a_batch_keeps_what_it_keeps_alone(model):
    press = PolicyPress(GraphKV(SNAPKV, Decay(neighbors=3)))
    together = prefill(model, prompts(), press)
    for row in range(3):
        alone = prefill(model, prompts()[row : row + 1], press)
        for layer, other in zip(alone.layers, together.layers, strict=True):
            torch.testing.assert_close(layer.keys[0], other.keys[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, ids = MODELS["llama"]().to(dtype), prompts()

    policy = GraphKV(KeyDiff(budget=BUDGET))
    assert same(prefill(model, ids, PolicyPress(policy)), evicted(model, ids, policy))

    with PolicyPress(GraphKV(SNAPKV))(model), torch.inference_mode():
        out = model(ids, use_cache=True)
        again = model(ids[:, -1:], past_key_values=out.past_key_values, position_ids=torch.full((3, 1), 40))
    assert lengths(out.past_key_values) == [BUDGET + 1] * 4
    assert out.past_key_values.layers[0].keys.dtype == dtype
    assert torch.isfinite(again.logits).all()


def test_prompts_within_the_budget_are_left_alone(model):
    full = prefill(model, prompts())

    press = PolicyPress(SnapKV(budget=40))
    assert same(prefill(model, prompts(), press), [(layer.keys, layer.values) for layer in full.layers])
    assert press.compression_ratio == 0


def test_the_compression_ratio_is_what_was_evicted(model):
    press = PolicyPress(LayerBudgets(KNorm(budget=10), budgets=[10, 20, 30, 50]))
    assert press.compression_ratio == 0

    prefill(model, prompts(), press)

    assert press.compression_ratio == pytest.approx(1 - (10 + 20 + 30 + 40) / 160)


def test_presses_compose(model):
    press = ComposedPress([PolicyPress(SNAPKV), ThinKPress(key_channel_compression_ratio=0.5, window_size=4)])
    cache = prefill(model, prompts(), press)

    assert press.compression_ratio == pytest.approx(1 - BUDGET / 40 * (1 - 0.25))
    for layer, (keys, values) in zip(cache.layers, evicted(model, prompts(), SNAPKV), strict=True):
        assert torch.equal(layer.values, values)
        assert torch.equal(layer.keys, torch.where(layer.keys == 0, 0, keys))

    alone = PrefillDecodingPress(prefilling_press=PolicyPress(SNAPKV))
    assert same(prefill(model, prompts(), alone), evicted(model, prompts(), SNAPKV))


def test_a_press_that_comes_after_another_is_refused(model):
    press = ComposedPress([KnormPress(0.5), PolicyPress(SNAPKV)])
    with pytest.raises(ArgumentError, match=r"exactly the 40 tokens of the prompt .* it holds 20"):
        prefill(model, prompts(), press)


def test_the_pipeline_of_kvpress_takes_it(model):
    words = Tokenizer(WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, 97)}, unk_token="<s>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>", bos_token="<s>")
    run = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    ids = prompts(batch=1)[0].tolist()
    cache = DynamicCache()

    answers = run(
        "".join(f" w{i}" for i in ids[:-1]), question=f"w{ids[-1]}", press=PolicyPress(SNAPKV), cache=cache,
        max_new_tokens=5,
    )  # fmt: skip

    # The context is the beginning-of-text token and 39 words; the question is the 41st token.
    assert lengths(cache) == [BUDGET] * 4
    whole = [0, *ids]
    for _ in range(5):
        logits, _ = reference_logits(model, torch.tensor(whole), SNAPKV, [40] + [1] * (len(whole) - 40))
        whole.append(int(logits[-1].argmax()))
    assert answers["answer"].split() == [f"w{i}" for i in whole[41:]]


@pytest.mark.parametrize(("side", "policy"), [("left", SNAPKV), ("right", KNorm(budget=9))])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_refused(side, policy, implementation):
    model = tiny_llama(attn_implementation=implementation)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[1, slice(0, 5) if side == "left" else slice(35, 40)] = 0
    with pytest.raises(ArgumentError, match="neither padding nor sliding windows"):
        prefill(model, prompts(), PolicyPress(policy), attention_mask=mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_that_hides_nothing_is_fine(implementation):
    model = tiny_llama(attn_implementation=implementation)
    cache = prefill(model, prompts(), PolicyPress(SNAPKV), attention_mask=torch.ones(3, 40, dtype=torch.int64))

    assert same(cache, evicted(model, prompts(), SNAPKV))


def test_sliding_windows_are_refused():
    model = FAMILIES["mistral-sliding"]()
    with pytest.raises(ArgumentError, match="sliding windows"):
        prefill(model, prompts(), PolicyPress(SNAPKV))


def test_eager_attention_allows_one_budget_only():
    model = tiny_llama(attn_implementation="eager")
    with pytest.raises(
        ArgumentError, match=r"in every layer under attn_implementation 'eager', .* PyramidKV keeps 4 to"
    ):
        prefill(model, prompts(), PolicyPress(PYRAMID))
    with pytest.raises(ArgumentError, match=r"in every head under attn_implementation 'eager', .* AdaKV does not"):
        prefill(model, prompts(), PolicyPress(AdaKV(SNAPKV)))


class Broken(Policy):
    def score(self, layer, memory):
        raise RuntimeError("broken policy")


@dataclass(frozen=True)
class Promising(Folded):
    """A merge that promises slots of one token each, and counts more."""

    requirements: ClassVar[Requirements] = Requirements(merges=True, masses=False)


def test_the_model_is_as_it_was_after_an_error(model):
    hooks, plain = num_hooks(model), generate(model, prompts())
    with pytest.raises(RuntimeError, match="broken policy"):
        prefill(model, prompts(), PolicyPress(Broken(budget=5)))

    assert num_hooks(model) == hooks
    assert generate(model, prompts()).tolist() == plain.tolist()


@pytest.mark.parametrize(
    "policy",
    [
        WeightedKV(SNAPKV),
        GraphKV(WeightedKV(SNAPKV)),
        D2O(SNAPKV, layer_budgets="base", mass="one"),
        D2O(SNAPKV, layer_budgets="base", weights="mean", mass="one"),
        KVMerger(SNAPKV, heavy=0, mass="values"),
        KVMerger(PYRAMID, mass="one"),
    ],
    ids=repr,
)
def test_merges_whose_slots_count_once_keep_what_evicting_keeps(model, policy):
    cache, plain = (prefill(model, prompts(), PolicyPress(each)) for each in (policy, SNAPKV))

    assert same(cache, evicted(model, prompts(), policy))
    assert lengths(cache) == [min(40, policy.layer_budget(40, layer, 4)) for layer in range(4)]
    assert not same(cache, [(layer.keys, layer.values) for layer in plain.layers])


def test_merges_that_count_are_refused_by_name_before_anything_runs():
    for policy in (Folded(SNAPKV), GraphKV(Folded(SNAPKV)), WeightedKV(Absorb(SNAPKV)), KVMerger(SNAPKV)):
        name = type(policy).__name__
        with pytest.raises(ArgumentError, match=rf"count a merged slot once and not by its mass; {name}.* does not"):
            PolicyPress(policy)


def test_merges_of_uneven_heads_are_refused_and_so_is_a_promise_that_is_not_kept(model):
    with pytest.raises(ArgumentError, match=r"equally many tokens in every head where it merges.* WeightedKV"):
        PolicyPress(WeightedKV(AdaKV(SNAPKV)))
    with pytest.raises(ArgumentError, match="count a merged slot once and not by its mass; Promising"):
        prefill(model, prompts(), PolicyPress(Promising(SNAPKV)))


def test_budgets_that_depend_on_all_layers_are_refused(model):
    """kvpress evicts a layer before the next one has read anything."""
    policy = GraphKV(CAKE(budget=BUDGET, window=4))
    with pytest.raises(ArgumentError, match="GraphKV does not, so wrap it in LayerBudgets"):
        PolicyPress(policy)

    settled = LayerBudgets(policy, budgets=[20, 16, 12, 8])
    cache = prefill(model, prompts(), PolicyPress(settled))
    assert lengths(cache) == [20, 16, 12, 8]
    assert same(cache, evicted(model, prompts(), settled))


def test_layers_that_share_what_they_keep_are_refused_and_found_budgets_are_measured(model):
    with pytest.raises(ArgumentError, match="policy must choose for each layer alone"):
        PolicyPress(Shared(SNAPKV, over="layers"))
    press = PolicyPress(Lossless(SnapKV(budget=1.0, window=4), 0.3))
    prefill(model, prompts(), press)

    assert 0 < press.compression_ratio < 1


def test_evicting_works_when_kvpress_is_imported_after_it(model):
    """kvpress wraps every attention function that is registered at that moment."""
    expected = evicted(model, prompts(), SNAPKV)
    ours = AttentionInterface()["graphkv_sdpa"]
    AttentionInterface.register("graphkv_sdpa", attention_patch(ours))
    try:
        found = evicted(model, prompts(), SNAPKV)
    finally:
        AttentionInterface.register("graphkv_sdpa", ours)

    assert all(
        torch.equal(*pair)
        for mine, other in zip(found, expected, strict=True)
        for pair in zip(mine, other, strict=True)
    )


@pytest.mark.parametrize("policy", ["snapkv", None, KnormPress(0.5)])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ArgumentTypeError, match="policy must be a Policy; got"):
        PolicyPress(policy)


def test_a_policy_that_answers_for_dropped_tokens_is_refused():
    one, few = torch.ones(1, 1, 1), torch.ones(1, 1)
    maps = dict.fromkeys(("query_in", "query_out", "key_in", "key_out", "mix"), one)
    policy = GraphKV(LESS(SNAPKV, [Kernel(**maps, key_scale=few, mix_scale=few)]))

    with pytest.raises(
        ArgumentError, match=r"must not answer for dropped tokens in kvpress, .*; GraphKV\(LESS\(SnapKV"
    ):
        PolicyPress(policy)
