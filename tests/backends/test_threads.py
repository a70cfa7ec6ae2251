"""PyTorch's step in threads of our own: one wait at the end, and nothing that others could notice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from graphkv import build_graph, propagate, select
from graphkv.backends import streamed, threads

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step(rows=5, num_tokens=700):
    generator = torch.Generator().manual_seed(0)
    # Cosines of ones and minus ones are exact, whatever is multiplied at a time.
    keys = torch.randint(2, (rows, num_tokens, 16), generator=generator) * 2.0 - 1
    importance = torch.rand(rows, num_tokens, generator=generator)
    graph = build_graph(keys, importance, num_sources=40, num_neighbors=3)
    scores = propagate(importance, graph)
    return graph.neighbors, graph.weights, scores, select(scores, 100)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has threads of another kind")
def test_a_task_has_one_thread_of_torch_and_everybody_else_what_they_had(two_threads):
    # Both threads exist: the second task is taken by whoever does not wait in the first.
    barrier = threading.Barrier(2, timeout=60)

    def task():
        barrier.wait()
        return torch.get_num_threads(), threading.get_ident()

    found = threads.run([task, task])

    assert [number for number, _ in found] == [1, 1]
    assert len({ident for _, ident in found}) == 2
    assert threading.get_ident() not in {ident for _, ident in found}
    assert torch.get_num_threads() == 2
    later = []
    fresh = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert later == [2]


def test_results_come_in_the_order_of_the_tasks(two_threads):
    def late(place):
        time.sleep(0.02 * (place == 0))
        return place

    assert threads.run([lambda place=place: late(place) for place in range(5)]) == list(range(5))


def test_one_thread_is_the_caller():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert threads.run([threading.get_ident] * 3) == [threading.get_ident()] * 3
    finally:
        torch.set_num_threads(before)


def test_a_task_may_run_tasks(two_threads):
    assert threads.run([lambda: threads.run([lambda: 1, lambda: 2])] * 3) == [[1, 2]] * 3


def test_what_a_task_raises_is_raised(two_threads):
    def fails():
        raise RuntimeError("of the task")

    with pytest.raises(RuntimeError, match="of the task"):
        threads.run([fails, lambda: 1])


@pytest.mark.parametrize(("rows", "num_tokens"), [(5, 700), (1, 2100), (2, 64)])
def test_the_number_of_threads_changes_nothing(two_threads, rows, num_tokens, monkeypatch):
    # Even so few tokens are a part.
    monkeypatch.setattr(streamed, "NARROWEST", 256)
    expected = step(rows, num_tokens)
    for number in (1, 3):
        torch.set_num_threads(number)
        for ours, theirs in zip(step(rows, num_tokens), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_row_is_shared_by_several_threads(two_threads, monkeypatch):
    parts = []
    run = threads.run
    monkeypatch.setattr(streamed, "NARROWEST", 256)
    from graphkv.backends import torch as backend

    seen = backend._nearest_on_host.func
    monkeypatch.setattr(
        backend,
        "_nearest_on_host",
        lambda *arrays, **options: seen(
            *arrays, passes=backend.PASSES, run=lambda tasks: parts.append(len(tasks)) or run(tasks), **options
        ),
    )
    for rows in (1, 5):
        step(rows)

    assert parts == [2, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller_do_not_matter(two_threads, mode):
    expected = step()
    with mode():
        found = step()
        keys = torch.ones(3, 300, 8)
        build_graph(keys, keys[..., 0], num_sources=5, num_neighbors=2)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_starts_its_own_threads():
    """In a process of its own: a fork of this one would carry along whatever other tests have left."""
    script = (
        "import os, torch; torch.set_num_threads(2)\n"
        "from graphkv.backends import threads\n"
        "assert threads.run([lambda: 1, lambda: 2]) == [1, 2]\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(7 if threads.run([lambda: 3, lambda: 4]) == [3, 4] else 8)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )

    assert done.stdout.strip() == "7", done.stderr
