"""Heads that are shared out over processes: each process keeps what the whole model keeps, or says that it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers 5.2 shards no model without accelerate")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from tests.integrations.sharded import MODELS, QUESTIONS, WORLD, answers  # noqa: E402

SECONDS = 180


@pytest.fixture(scope="module")
def whole():
    """What models in one piece answer."""
    return answers({name: make() for name, (make, _, _) in MODELS.items()})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes answers."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, (make, _, _) in MODELS.items():
        make().save_pretrained(folder / name)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.sharded", str(folder), str(rank)],
            env=os.environ
            | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        output = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(output)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def is_refused(name):
    model, policy, _ = QUESTIONS[name]
    needs = policy.needs()
    if model == "llama":
        return needs.couples_heads or needs.wants
    return model == "multi-query" and needs.queries != "none"


REFUSED = [name for name in QUESTIONS if is_refused(name)]
ANSWERED = [name for name in QUESTIONS if not is_refused(name)]


def heads_of(rank, mine, everybody):
    """Return the heads of the whole model that a process holds."""
    first = rank * mine if mine < everybody else 0
    return slice(first, first + mine)


@pytest.mark.parametrize("name", ANSWERED)
def test_every_process_keeps_what_the_whole_model_keeps_of_its_heads(whole, ranks, name):
    expected = whole[name]
    assert min(expected["dropped"]) > 0
    for rank, answer in enumerate(found[name] for found in ranks):
        for ours, theirs in zip(answer["positions"], expected["positions"], strict=True):
            heads = heads_of(rank, ours.shape[1], theirs.shape[1])
            assert torch.equal(ours, theirs[:, heads])
        for ours, theirs in zip(answer["keys"], expected["keys"], strict=True):
            heads = heads_of(rank, ours.shape[1], theirs.shape[1])
            torch.testing.assert_close(ours, theirs[:, heads], rtol=1e-3, atol=1e-3)
        if "tokens" in expected:
            assert torch.equal(answer["tokens"], expected["tokens"])
            torch.testing.assert_close(answer["logits"], expected["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_that_needs_other_heads_is_refused_by_every_process(whole, ranks, name):
    model, policy, _ = QUESTIONS[name]
    reason = "for each KV head alone" if model == "llama" else "parts the query heads of a KV head"

    assert "refused" not in whole[name]
    for found in ranks:
        answer = found[name]
        assert reason in answer["refused"]
        assert str(policy) in answer["refused"]
        assert not any(answer.get("dropped", []))


def test_heads_are_really_shared_out(ranks):
    name = "for_good, snapkv"
    one, other = (found[name] for found in ranks)

    assert [keys.shape[1] for keys in one["keys"]] == [2] * 4
    assert any(not torch.equal(a, b) for a, b in zip(one["positions"], other["positions"], strict=True))
    assert all(found["phi3, adakv"]["keys"][0].shape[1] == 2 for found in ranks)
