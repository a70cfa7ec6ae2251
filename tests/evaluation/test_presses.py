"""kvpress's presses on the same prompts."""

import sys

import pytest
import torch

from graphkv import ArgumentError, BackendUnavailableError
from graphkv.evaluation.runs.config import Config
from graphkv.evaluation.runs.prompt_run import evaluate
from graphkv.integrations.transformers import EvictingCache, observing
from graphkv.integrations.transformers.versions import with_cache


def test_kvpress_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(
        BackendUnavailableError, match=r"--policy kvpress:KnormPress needs: pip install 'graphkv\[kvpress\]'"
    ):
        Config(policies=("kvpress:KnormPress",))


@pytest.fixture
def kvpress():
    return pytest.importorskip("kvpress", reason="kvpress is an extra of its own")


@pytest.mark.parametrize(
    "name",
    ["kvpress:NoPress", "kvpress:BasePress", "kvpress:KnormPress(ratio=1)", "kvpress:", "kvpress:KnormPress+degree"],
)
def test_other_presses_are_refused(kvpress, name):
    with pytest.raises(ArgumentError, match="--policy"):
        Config(policies=(name,))


def test_a_press_answers_at_the_same_budget_as_everybody(kvpress, model, tokenizer, maker):
    prompt = maker.make("needle-number", 240, "held-out", 10_000)
    # KnormPress breaks ties another way, and tokens of one byte have many.
    names = ("streaming-llm", "kvpress:StreamingLLMPress(n_sink=4)", "kvpress:KnormPress")
    records = evaluate(model, tokenizer, prompt, Config(policies=names, budgets=(60, 121), sinks=(4,)))

    found = {(record.policy, record.mode, record.budget): record.nll for record in records}
    for mode in ("aware", "agnostic"):
        for budget in (60, 121):
            ours, theirs, other = (found[name, mode, budget] for name in names)
            assert theirs == pytest.approx(ours, abs=1e-4)
            assert other != pytest.approx(ours, abs=1e-4)


@torch.inference_mode()
def test_what_a_press_keeps_is_what_it_leaves_in_its_own_cache(kvpress, model):
    from graphkv.evaluation.runs.presses import read_under_press

    ids = torch.randint(1, 256, (1, 50), generator=torch.manual_seed(0))
    with observing(model):
        full = EvictingCache()
        model(ids, **with_cache(model, full))
        left = read_under_press(model, ids, "kvpress:KnormPress", 20, full)

    for before, after in zip(full.layers, left.layers, strict=True):
        assert after.num_stored == 20
        assert after.num_seen == 50
        shortest = before.keys.norm(dim=-1).sort().values[..., :20]
        torch.testing.assert_close(after.keys.norm(dim=-1).sort().values, shortest)
