"""Ada-KV's head budgets against a loop."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from graphkv import (
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Decay,
    GraphKV,
    KNorm,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    evict,
)
from graphkv.adapters.adakv import code_head_budgets, head_budgets
from tests.support.arrays import NUMPY, each_backend, make

RNG = np.random.default_rng(21)
KEYS = RNG.normal(size=(2, 4, 30, 6))
QUERIES = RNG.normal(size=(2, 8, 30, 6))
SNAPKV = SnapKV(budget=12, window=4, kernel_size=3)


def budgets_by_loops(scores, budget, least, protected, valid):
    """Exact head budgets of one row, [head][token]: first everyone's least, then the best of what is left."""
    heads, tokens = len(scores), len(scores[0])
    order = []
    for head in range(heads):
        tier = [2 if not valid[head][j] else int(not protected[head][j]) for j in range(tokens)]
        ranked = sorted(range(tokens), key=lambda j, h=head, t=tier: (t[j], -scores[h][j], j))
        forced = set(ranked[: least[head]])
        for j in range(tokens):
            order.append((2 * (not valid[head][j]) + (j not in forced), -scores[head][j], head, j))
    best = sorted(order)[: heads * budget]
    return [sum(head == other for _, _, other, _ in best) for head in range(heads)]


def least_of(budget, protected, num_protected, share):
    extra = floor(Fraction(str(share)) * max(0, budget - num_protected))
    return np.minimum(protected.sum(-1) + extra, budget)


@each_backend
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 3, 4, 5, 12, 29])
def test_head_budgets_are_those_of_a_loop(backend, share, budget):
    base = SnapKV(budget=budget, window=4, kernel_size=3, num_sinks=1)
    valid = np.arange(30) >= np.asarray([[0], [11]])

    arrays = {"queries": make(backend, QUERIES), "valid": make(backend, valid, bool), "backend": backend}
    done = evict(AdaKV(base, floor=share), make(backend, KEYS), **arrays)

    alone = evict(base, make(backend, KEYS), **arrays)
    scores = backend.to_numpy(alone.scores)
    protected = backend.to_numpy(alone.protected)
    least = least_of(budget, protected, 5, share)
    found, kept = backend.to_numpy(done.counts), backend.to_numpy(done.kept)
    for row in range(2):
        mask = np.broadcast_to(valid[row], (4, 30))
        expected = budgets_by_loops(
            scores[row].tolist(), budget, least[row].tolist(), protected[row].tolist(), mask.tolist()
        )
        assert found[row].tolist() == expected
        assert sum(expected) == 4 * budget
        for head in range(4):
            best = sorted(
                range(30),
                key=lambda j, r=row, h=head: (not mask[h][j], not protected[r][h][j], -scores[r][h][j], j),
            )
            own = sorted(best[: expected[head]])
            assert kept[row, head].tolist() == own + [-1] * (kept.shape[-1] - len(own))
    assert kept.shape[-1] == min(30, 4 * budget)


def test_head_budgets_add_up_in_ten_thousand_cases():
    rng = np.random.default_rng(1)
    cases = 0
    while cases < 10_000:
        batch, heads, tokens = 50, int(rng.integers(1, 7)), int(rng.integers(1, 40))
        budget = int(rng.integers(0, tokens))
        scores = rng.choice([0.0, 1.0, 2.0, 3.5], size=(batch, heads, tokens)) * rng.choice([1, 5], (batch, heads, 1))
        protected = rng.random((batch, heads, tokens)) < rng.choice([0.0, 0.1, 0.6])
        valid = np.broadcast_to(np.arange(tokens) >= rng.integers(0, tokens, (batch, 1, 1)), scores.shape)
        least = rng.integers(0, budget + 1, (batch, heads))

        found = head_budgets(scores, budget, least, protected & valid, valid, backend=NUMPY)

        assert (found.sum(-1) == heads * budget).all()
        assert (found >= least).all()
        assert (found <= tokens).all()
        cases += batch


@each_backend
def test_ties_go_to_the_lower_head_then_to_the_lower_index(backend):
    keys = make(backend, np.ones((1, 3, 4, 1)))

    done = evict(AdaKV(KNorm(budget=2), floor=0.0), keys, backend=backend)

    assert backend.to_numpy(done.counts).tolist() == [[4, 2, 0]]
    assert backend.to_numpy(done.kept).tolist() == [[[0, 1, 2, 3], [0, 1, -1, -1], [-1, -1, -1, -1]]]


@each_backend
def test_a_floor_of_one_keeps_what_the_base_keeps(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    even = evict(AdaKV(SNAPKV, floor=1.0), keys, queries=queries, backend=backend)
    base = evict(SNAPKV, keys, queries=queries, backend=backend)

    assert backend.to_numpy(even.counts).tolist() == [[12] * 4] * 2
    assert backend.to_numpy(even.kept)[..., :12].tolist() == backend.to_numpy(base.kept).tolist()
    assert (backend.to_numpy(even.kept)[..., 12:] == -1).all()


@each_backend
def test_it_keeps_the_most_attention_of_the_layer(backend):
    """Without a floor, no other choice of the same size has a higher sum; an even one has less."""
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    def kept_scores(policy):
        done = evict(policy, keys, queries=queries, backend=backend)
        scores, kept = backend.to_numpy(done.scores)[..., :26], backend.to_numpy(done.kept)
        past = (kept >= 0) & (kept < 26)
        return (np.take_along_axis(scores, np.where(past, kept, 0), -1) * past).sum((1, 2)), scores

    adaptive, scores = kept_scores(AdaKV(SNAPKV, floor=0.0))
    best = np.sort(scores.reshape(2, -1), axis=-1)[:, -4 * 8 :].sum(-1)
    np.testing.assert_allclose(adaptive, best, rtol=1e-5)
    assert (kept_scores(SNAPKV)[0] < adaptive).all()


@each_backend
def test_a_padded_row_keeps_what_it_keeps_alone(backend):
    valid = np.arange(30) >= np.asarray([[0], [9]])
    for policy in (AdaKV(SNAPKV), GraphKV(AdaKV(SNAPKV)), AdaKV(GraphKV(SNAPKV))):
        together = evict(
            policy,
            make(backend, KEYS),
            queries=make(backend, QUERIES),
            valid=make(backend, valid, bool),
            backend=backend,
        )
        alone = evict(
            policy, make(backend, KEYS[1:, :, 9:]), queries=make(backend, QUERIES[1:, :, 9:]), backend=backend
        )

        budgets = backend.to_numpy(alone.counts)
        assert backend.to_numpy(together.counts)[1:].tolist() == budgets.tolist()
        for head in range(4):
            count = budgets[0, head]
            one, other = backend.to_numpy(together.kept)[1, head], backend.to_numpy(alone.kept)[0, head]
            assert one[:count].tolist() == (other[:count] + 9).tolist()


@each_backend
def test_it_works_above_and_below_a_graph(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    def run(policy):
        return evict(policy, keys, queries=queries, backend=backend)

    signal = Decay(source_ratio=0.5, neighbors=6)
    shares, graph = run(AdaKV(SNAPKV)), run(GraphKV(SNAPKV, signal))
    above, below = run(GraphKV(AdaKV(SNAPKV), signal)), run(AdaKV(GraphKV(SNAPKV, signal)))

    for done in (above, below):
        assert np.array_equal(backend.to_numpy(done.scores), backend.to_numpy(graph.scores))
        assert backend.to_numpy(done.counts).sum(-1).tolist() == [48, 48]
        assert ((backend.to_numpy(done.kept) >= 0).sum(-1) == backend.to_numpy(done.counts)).all()
    assert backend.to_numpy(above.counts).tolist() == backend.to_numpy(shares.counts).tolist()
    assert backend.to_numpy(below.counts).tolist() != backend.to_numpy(shares.counts).tolist()
    assert backend.to_numpy(above.kept).tolist() != backend.to_numpy(shares.kept).tolist()


def test_protected_tokens_fill_a_budget_that_they_exceed():
    done = evict(AdaKV(SnapKV(budget=3, window=4, kernel_size=3)), KEYS, queries=QUERIES)

    assert done.counts.tolist() == [[3] * 4] * 2
    assert done.kept[..., :3].tolist() == [[[27, 28, 29]] * 4] * 2


def test_protected_tokens_that_exceed_the_budget_do_not_compete_between_heads():
    """The sinks of the first head score best; every head keeps its own all the same."""
    keys = KEYS * np.asarray([0.01, 1.0, 1.0, 1.0])[:, None, None]

    done = evict(AdaKV(KNorm(budget=3, num_sinks=5)), keys)

    assert done.counts.tolist() == [[3] * 4] * 2
    assert (done.kept[..., :3] < 5).all()


def test_it_stands_on_any_policy_and_follows_the_layers_budget():
    done = evict(AdaKV(PyramidKV(budget=12, window=4)), KEYS, queries=QUERIES, layer=0, num_layers=2)
    assert done.budget == 20
    assert done.counts.sum(-1).tolist() == [80, 80]
    # Positions are the same in every head: all is even until the last one's ties.
    done = evict(AdaKV(StreamingLLM(budget=6, num_sinks=2)), KEYS)
    assert done.counts.tolist() == [[6] * 4] * 2


def test_what_fits_is_kept_whole():
    done = evict(AdaKV(SNAPKV), KEYS[:, :, :12], queries=QUERIES[:, :, :12])

    assert done.counts is None
    assert done.kept.shape == (2, 4, 12)


@each_backend
def test_heads_with_paddings_of_their_own_give_the_rest_to_others(backend):
    valid = np.arange(30) >= np.asarray([0, 28, 5, 0])[:, None]
    valid = np.broadcast_to(valid, (2, 4, 30)).copy()

    done = evict(AdaKV(KNorm(budget=10)), make(backend, KEYS), valid=make(backend, valid, bool), backend=backend)

    assert backend.to_numpy(done.counts)[:, 1].tolist() == [2, 2]
    assert backend.to_numpy(done.counts).sum(-1).tolist() == [40, 40]


def code_by_loops(scores, past, share, num_protected):
    """The official blend for one row of unprotected scores."""
    heads = len(scores)
    order = sorted((-score, head, j) for head, row in enumerate(scores) for j, score in enumerate(row))[: heads * past]
    counts = [sum(head == other for _, other, _ in order) for head in range(heads)]
    return [
        round(float(np.float32(count) * np.float32(1 - share))) + int(past * share) + num_protected for count in counts
    ]


@each_backend
def test_the_official_blend_is_that_of_a_loop(backend):
    keys, queries = make(backend, KEYS), make(backend, QUERIES)

    done = evict(AdaKV.official(SNAPKV), keys, queries=queries, backend=backend)

    scores = backend.to_numpy(done.scores)[..., :26]
    expected = [code_by_loops(scores[row].tolist(), 8, 0.2, 4) for row in range(2)]
    assert backend.to_numpy(done.counts).tolist() == expected
    assert ((backend.to_numpy(done.kept) >= 0).sum(-1) == backend.to_numpy(done.counts)).all()


def test_official_and_default_differ_in_the_sum():
    """Floor(0.2 x 123) = 24 loses 0.6 in each head, and every head is rounded alone; ours is exact."""
    scores = np.random.default_rng(0).random((200, 32, 600))
    nothing = np.zeros(scores.shape, dtype=bool)

    code = code_head_budgets(scores, 123, 0.2, nothing, ~nothing, 0, backend=NUMPY).sum(-1) - 32 * 123
    least = np.full((200, 32), 24)
    exact = head_budgets(scores, 123, least, nothing, ~nothing, backend=NUMPY).sum(-1) - 32 * 123

    assert code.min() >= -26
    assert code.max() <= -12
    assert (exact == 0).all()
    assert AdaKV.official(SNAPKV) == AdaKV(SNAPKV, floor=0.2, schedule="code") != AdaKV(SNAPKV)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"floor": 1.5}, ArgumentError),
        ({"floor": "low"}, ArgumentTypeError),
        ({"schedule": "blend"}, ArgumentError),
    ],
)
def test_options_are_checked(options, error):
    with pytest.raises(error, match=next(iter(options))):
        AdaKV(SNAPKV, **options)
    with pytest.raises(ArgumentTypeError, match="base must be a Policy"):
        AdaKV(7)
