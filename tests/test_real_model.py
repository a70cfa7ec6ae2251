"""SmolLM2-135M-Instruct on a real document: what the main job promises."""

import json
from pydoc_data.topics import topics

import pytest
import torch

from graphkv import GraphKV, Random, SnapKV, StreamingLLM
from graphkv.__main__ import main
from graphkv.demo.prompt import make_prompt
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.workbench.model import load_model

pytestmark = pytest.mark.slow
QUESTIONS = ("\n\nQuestion: What is a namespace?\nAnswer:", "\n\nQuestion: And what is a module?\nAnswer:")
# First and last token of two documents.
PARTS = ((0, 800), (700, 1300))


@pytest.fixture(scope="module")
def smollm():
    return load_model(None, print)


@pytest.fixture(scope="module")
def prompt(smollm):
    return make_prompt(smollm[1], None, None, None, 8000)


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, **options)


def test_the_demo_runs_and_the_full_cache_knows_the_fact(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0

    log, text = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert 1400 < log["cached_tokens"] < 1700
    assert 1700 < text["cached_tokens"] < 2200
    for part in (log, text):
        results = {result["policy"]: result for result in part["results"]}
        assert results["full"]["answer_is_correct"]
        assert part["must_contain"] in results["full"]["answer"]
        stored = [part["budget"]] * 30
        assert all(result["tokens_kept_per_layer"] == stored for name, result in results.items() if name != "full")
        assert results["full"]["expected_answer_nll"] < min(
            result["expected_answer_nll"] for name, result in results.items() if name != "full"
        )
    shown = capsys.readouterr().out
    assert "\u2713" in shown
    assert "These are two prompts. On 40 prompts a length" in " ".join(shown.split())
    assert "65 of 88 cells" in " ".join(shown.split())


def test_snapkv_at_the_full_budget_is_the_full_cache_token_by_token(smollm, prompt):
    model, _ = smollm
    plain = generate(model, prompt.token_ids)
    with evicting(model, SnapKV(budget=prompt.token_ids.shape[1])):
        evicted = generate(model, prompt.token_ids)

    assert evicted.tolist() == plain.tolist()


def test_numpy_and_torch_keep_the_same_tokens(smollm, prompt):
    model, _ = smollm
    with observing(model), torch.inference_mode():
        full = EvictingCache(num_queries=32)
        model(prompt.token_ids, **with_cache(model, full), logits_to_keep=1)
    for policy in (SnapKV(budget=512), GraphKV(SnapKV(budget=512)), StreamingLLM(budget=512), Random(budget=0.25)):
        kept = []
        for backend in ("numpy", "torch"):
            cache = full.copy()
            cache.evict(policy, backend=backend)
            kept.append(torch.stack([layer.positions for layer in cache.layers]))
        assert torch.equal(*kept)


def test_two_turns_over_long_documents_in_a_padded_batch_equal_single_runs(smollm):
    """Two documents of up to 800 tokens, two questions each, 128 tokens left of everything before each question."""
    model, tokenizer = smollm
    policy = GraphKV(SnapKV(budget=128))
    text = torch.tensor(tokenizer("\n\n".join(topics.values()))["input_ids"])
    question, again = (tokenizer(each, return_tensors="pt")["input_ids"] for each in QUESTIONS)
    prompts = [torch.cat([text[first:last], question[0]]) for first, last in PARTS]
    longest = max(map(len, prompts))
    assert longest > 800
    assert len(set(map(len, prompts))) == 2

    def converse(ids, mask):
        """Answer, then answer another question on the same cache, with the whole history passed again."""
        cache = EvictingCache(policy, every=64)
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, **with_cache(model, cache)}
        out = model.generate(ids, attention_mask=mask, **options)
        history = torch.cat([out, again.expand(len(ids), -1)], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), history.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
        seen = cache.get_seq_length()
        out = model.generate(history, attention_mask=mask, **options)
        assert seen < history.shape[1] < cache.get_seq_length() == out.shape[1] - 1
        assert all(layer.num_stored < 128 + 64 for layer in cache.layers)
        return out[:, ids.shape[1] :].tolist()

    padded = torch.stack([torch.nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(ids)).long() for ids in prompts])
    with observing(model):
        batch = converse(padded, mask)
        for row, ids in enumerate(prompts):
            assert converse(ids[None], torch.ones(1, len(ids), dtype=torch.long)) == [batch[row]]
