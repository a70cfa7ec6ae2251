"""SmolLM2-135M-Instruct on a real document: what the main job promises."""

import json

import pytest
import torch

from graphkv import GraphKV, Random, SnapKV, StreamingLLM
from graphkv.__main__ import main
from graphkv.demo.prompt import make_prompt
from graphkv.evaluation.model import load_model
from graphkv.integrations.transformers import EvictingCache, evicting, observing

pytestmark = pytest.mark.slow


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

    report = json.loads((tmp_path / "report.json").read_text())
    results = {result["policy"]: result for result in report["results"]}
    assert 1900 < report["cached_tokens"] < 2200
    assert results["full"]["answer_is_correct"]
    assert "4817264" in results["full"]["answer"]
    assert all(result["tokens_kept_per_layer"] == [512] * 30 for name, result in results.items() if name != "full")
    assert results["full"]["expected_answer_nll"] < min(
        result["expected_answer_nll"] for name, result in results.items() if name != "full"
    )
    assert "✓" in capsys.readouterr().out


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
        model(prompt.token_ids, past_key_values=full, logits_to_keep=1)
    for policy in (SnapKV(budget=512), GraphKV(SnapKV(budget=512)), StreamingLLM(budget=512), Random(budget=0.25)):
        kept = []
        for backend in ("numpy", "torch"):
            cache = full.copy()
            cache.evict(policy, backend=backend)
            kept.append(torch.stack([layer.positions for layer in cache.layers]))
        assert torch.equal(*kept)
