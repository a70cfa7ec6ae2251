"""LazyEviction against the public code's bookkeeping, step by step, and against loops over whole histories."""

from math import exp

import numpy as np
import pytest

from graphkv import ArgumentError, ArgumentTypeError, LazyEviction, Memory, evict, observe
from graphkv.adapters.lazy_eviction import recurrence, recurrence_importance
from tests.adapters.decoding import decode
from tests.adapters.loops import Head, best, simulate
from tests.support.arrays import NUMPY, each_library, make

RNG = np.random.default_rng(17)
KEYS, QUERIES = 2 * RNG.normal(size=(1, 2, 60, 4)), 2 * RNG.normal(size=(1, 6, 60, 4))
ALPHA = 0.08


def sigmoid(x):
    return 1 / (1 + exp(-x))


def importance(idle, gap, shift):
    """The formula, as the public code writes it."""
    first = 2 / (1 + exp(min(700, shift + idle / (gap + 1e-5))))
    return first + (0 if gap == 0 else 2 / (1 + exp(gap - 1)))


def as_the_public_code(keys, queries, prompt, budget, window, alpha):
    """One KV head: absolute clocks, one row of attention per step, an eviction at every multiple of the window.

    Positions that are stored after every such step, and the most that were ever stored.
    """
    head, stored, peak = Head(len(queries)), [], 0
    last, period = [], []
    for position, key in enumerate(keys):
        head.add(position, key, [query[position] for query in queries])
        step = position - prompt + 1
        if step < 1:
            last, period = [*last, 0], [*period, 0]
            continue
        last, period = [*last, step - 1], [*period, 0]
        peak = max(peak, len(last))
        for j, received in enumerate(head.received):
            if any(member[-1] >= alpha for member in received):
                period[j] = max(period[j], step - last[j])
                last[j] = step
        if step % window:
            continue
        if len(last) > budget:
            scores = [importance(step - a, b, True) for a, b in zip(last, period, strict=True)]
            kept = best(scores[:-window], budget - window, range(len(last) - window))
            kept = sorted(kept) + list(range(len(last) - window, len(last)))
            head.keep(kept)
            last, period = [last[j] for j in kept], [period[j] for j in kept]
        stored.append(list(head.position))
    return stored, peak


@each_library
@pytest.mark.parametrize(("prompt", "budget", "window"), [(10, 20, 5), (12, 16, 6), (3, 24, 1)])
def test_official_is_the_public_code_step_by_step(backend, prompt, budget, window):
    official = LazyEviction.official(budget, window=window, alpha=ALPHA)
    expected = [
        as_the_public_code(KEYS[0, h].tolist(), QUERIES[0, 3 * h : 3 * h + 3].tolist(), prompt, budget, window, ALPHA)
        for h in (0, 1)
    ]

    steps = decode(official, KEYS, QUERIES, prompt, backend, chunk=window)

    found = [stored[0].tolist() for _, stored in steps[1:]]
    whole = (60 - prompt) // window
    assert found[:whole] == [list(step) for step in zip(*(stored for stored, _ in expected), strict=True)]
    assert max(peak for _, peak in expected) == budget + window == max(done.num_tokens for done, _ in steps)


def clocks(received, alpha):
    """Idle steps and the longest wait of a token, from every row since it came; it came a step before its own."""
    idle, gap = 0, 0
    for row in zip(*received, strict=True):
        idle += 1
        if max(row) >= alpha:
            idle, gap = 0, max(gap, idle)
    return idle, gap


def keep_rhythm(budget, window, num_sinks, shift):
    def decide(head):
        number = len(head.position)
        if number <= budget:
            return None
        scores = [importance(*clocks(token, ALPHA), shift) for token in head.received]
        always = {j for j in range(number) if j < num_sinks or j >= number - window}
        chosen = best(scores, budget, always)
        return chosen + best(scores, budget - len(chosen), set(range(number)) - always)

    return decide


@each_library
@pytest.mark.parametrize(("shift", "num_sinks", "block_size"), [(False, 0, 64), (True, 2, 7), (False, 1, 1)])
def test_every_decode_step_equals_a_simulation(backend, shift, num_sinks, block_size):
    policy = LazyEviction(budget=12, window=3, alpha=ALPHA, shift=shift, num_sinks=num_sinks, block_size=block_size)
    expected = simulate(KEYS[0].tolist(), QUERIES[0].tolist(), 20, keep_rhythm(12, 3, num_sinks, shift))

    steps = decode(policy, KEYS, QUERIES, 20, backend)

    assert [stored[0].tolist() for _, stored in steps] == expected
    assert len(expected) == 41


def test_the_switches_tell_apart():
    def last(**options):
        policy = LazyEviction(**{"budget": 12, "window": 3, "alpha": ALPHA, **options})
        return decode(policy, KEYS, QUERIES, 20, NUMPY)[-1][1].tolist()

    found = [last(), last(shift=True), last(read_prompt=False), last(alpha=0.3), last(window=5)]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@each_library
def test_a_text_in_chunks_has_the_clocks_of_the_whole(backend):
    whole, _ = decode(LazyEviction(budget=60, alpha=ALPHA, block_size=60), KEYS, QUERIES, 60, backend)[-1]
    chunked, _ = decode(LazyEviction(budget=60, alpha=ALPHA, block_size=5), KEYS, QUERIES, 7, backend, chunk=6)[-1]

    for name in ("idle", "gap"):
        ours, expected = (backend.to_numpy(done.state.tokens[name]) for done in (chunked, whole))
        assert ours.tolist() == expected.tolist()
        assert (ours == ours.round()).all()
        assert ours.max() > 3


def test_padding_is_no_step():
    rows = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0], [0.5, 0, 0, 0.5, 0], [0, 0.5, 0, 0, 0.5]]
    without = np.delete(np.delete(rows, 2, axis=0), 2, axis=1)
    policy, valid = LazyEviction(budget=9, alpha=0.1), np.asarray([[True, True, False, True, True]])

    padded = observe(policy, np.ones((1, 1, 5, 2)), attention=np.asarray([[rows]]), valid=valid)
    alone = observe(policy, np.ones((1, 1, 4, 2)), attention=without[None, None])

    for name in ("idle", "gap"):
        assert np.delete(padded.tokens[name], 2, axis=-1).tolist() == alone.tokens[name].tolist()
    # Token 1 came with its own step, waited two, and was asked again.
    assert alone.tokens["gap"].tolist() == [[[1, 2, 1, 1]]]
    assert alone.tokens["idle"].tolist() == [[[1, 0, 1, 0]]]


@each_library
def test_the_values_of_the_sheet(backend):
    idle, gap = (make(backend, x) for x in ([1.0, 0.0, 5.0, 50.0, 50.0], [0.0, 1.0, 5.0, 50.0, 10.0]))

    code, paper = (
        backend.to_numpy(recurrence_importance(idle, gap, shift=shift, xp=backend.xp)) for shift in (True, False)
    )

    np.testing.assert_allclose(code, [0, 1.53788, 0.27438, 0.23841, 0.00519], atol=1e-5)
    np.testing.assert_allclose(paper, [0, 2, 0.57386, 0.53788, 0.01363], atol=1e-5)


def test_the_shift_changes_the_order():
    # On time and rare, against overdue and frequent.
    idle, gap = np.asarray([0.0, 3.0]), np.asarray([3.0, 1.0])

    code, paper = (recurrence_importance(idle, gap, shift=shift, xp=np) for shift in (True, False))

    assert code.tolist() == pytest.approx([2 * sigmoid(-1) + 2 * sigmoid(-2), 2 * sigmoid(-4) + 1], abs=1e-4)
    assert paper.tolist() == pytest.approx([1 + 2 * sigmoid(-2), 2 * sigmoid(-3) + 1], abs=1e-4)
    assert code[0] < code[1]
    assert paper[0] > paper[1]


def test_a_block_of_steps_is_one_step_after_another():
    active = RNG.random((2, 9, 20)) < 0.2
    asks = RNG.random((2, 9)) < 0.8
    active &= asks[..., None] & (np.arange(20) <= 11 + np.arange(9)[:, None])
    idle, gap = np.zeros((2, 25)), np.zeros((2, 25))
    idle[:, 20:], gap[:, 20:] = 3, 4

    whole = recurrence(idle, gap, active, asks, xp=np)
    for step in range(9):
        idle, gap = recurrence(idle, gap, active[:, step : step + 1, : 12 + step], asks[:, step : step + 1], xp=np)

    np.testing.assert_array_equal(whole[0], idle)
    np.testing.assert_array_equal(whole[1], gap)
    # Tokens that the block does not reach are left alone.
    assert (whole[0][:, 20:] == 3).all()
    assert (whole[1][:, 20:] == 4).all()


def test_a_prompt_without_a_past_is_a_tie_of_all_its_tokens():
    done = evict(
        LazyEviction(budget=5, window=2, read_prompt=False), np.ones((1, 1, 9, 2)), queries=np.ones((1, 1, 9, 2))
    )

    assert len(set(done.importance[0, 0].tolist())) == 1
    assert done.kept.tolist() == [[[0, 1, 2, 7, 8]]]


def test_official_is_not_the_default():
    official, default = LazyEviction.official(90, window=30, alpha=1e-4), LazyEviction(budget=90)

    assert (official.window, official.alpha, official.shift, official.read_prompt) == (30, 1e-4, True, False)
    assert (default.window, default.alpha, default.shift, default.read_prompt) == (52, 5e-4, False, True)
    assert official.protection(90).count == 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": -1}, ArgumentError, "window must be at least 0"),
        ({"alpha": 0}, ArgumentError, "alpha must be above 0; got 0"),
        ({"alpha": 1.5}, ArgumentError, "alpha must lie in"),
        ({"shift": 1}, ArgumentTypeError, "shift must be True or False"),
        ({"read_prompt": 0}, ArgumentTypeError, "read_prompt must be True or False"),
        ({"block_size": 0}, ArgumentError, "block_size must be at least 1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        LazyEviction(budget=9, **options)


def test_what_is_missing_is_named():
    with pytest.raises(ArgumentError, match="queries must hold all 60 new positions for LazyEviction; got none"):
        evict(LazyEviction(budget=9), KEYS)
    with pytest.raises(ArgumentError, match=r"state must hold \['gap', 'idle'\] for LazyEviction; got \['idle'\]"):
        evict(LazyEviction(budget=9), KEYS, queries=QUERIES, state=Memory({"idle": KEYS[..., 0]}))
