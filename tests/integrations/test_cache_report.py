"""What a cache says of itself: against hand-worked numbers, loops, and the keys of a cache that was never evicted."""

import sys
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytest
import torch

from graphkv import (
    CAKE,
    H2O,
    AdaKV,
    Bar,
    Choice,
    Decay,
    Degree,
    Enhance,
    Eviction,
    Graph,
    GraphKV,
    GraphKVWarning,
    KeyDiff,
    KNorm,
    PyramidKV,
    SnapKV,
    Wrapper,
    propagate,
    select,
)
from graphkv.core import ArgumentError
from graphkv.core.backend import load
from graphkv.integrations.transformers import (
    EvictingCache,
    EvictingLayer,
    EvictionRecord,
    Fate,
    evicting,
    fates,
    observing,
    scored,
)
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.releases import cache_of
from tests.integrations.tiny import FAMILIES, tiny_llama

N = 60
BYTES_PER_TOKEN = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 floats
GRAPH = Decay(source_ratio=0.5, neighbors=4)
POLICIES = {
    "snapkv": SnapKV(budget=24, window=6),
    "snapkv+graphkv": GraphKV(SnapKV(budget=24, window=6), GRAPH),
    "adakv+graphkv": GraphKV(AdaKV(SnapKV(budget=24, window=6)), GRAPH),
    # Another budget in every row and layer.
    "cake+graphkv": GraphKV(CAKE(budget=24, window=6), GRAPH),
    "h2o+graphkv": GraphKV(H2O(budget=24), GRAPH),
    "keydiff+bar": GraphKV(KeyDiff(budget=24), Bar(source_ratio=0.5, neighbors=4)),
    "snapkv+degree": GraphKV(SnapKV(budget=24, window=6), Degree()),
    "snapkv+enhance": GraphKV(SnapKV(budget=24, window=6), Enhance(neighbors=8)),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(1, 97, (2, N), generator=torch.Generator().manual_seed(1))


def read(model, ids, policy, *, mask=None, chunks=(N,), **options):
    """Read a prompt, in one call or in chunks; give the cache."""
    cache = EvictingCache(policy, **options)
    with observing(model), torch.inference_mode():
        for part in ids.split(list(chunks), dim=1):
            columns = None if mask is None else mask[:, : cache.get_seq_length() + part.shape[1]]
            model(part, attention_mask=columns, **with_cache(model, cache))
    return cache


def mean_cosine(keys, valid):
    """Every pair of two different keys, one after the other."""
    cosines = [
        float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0))
        for i in range(len(keys))
        for j in range(i)
        if valid[i] and valid[j]
    ]
    return sum(cosines) / len(cosines)


def suppressed_by_loops(record):
    """Return {(row, head, slot)} by sorting, and {(row, head, slot, source slot): weight} by walking the edges."""
    tokens, edges, first = set(), {}, 0
    for decision in record.decisions:
        to_list = lambda x, give=decision.backend.to_numpy: None if x is None else give(x).tolist()  # noqa: E731
        kept, importance, scores = map(to_list, (decision.kept, decision.importance, decision.scores))
        protected, budgets = to_list(decision.protected), to_list(decision.counts)
        for row, heads in enumerate(kept):
            for head, stay in enumerate(heads):
                at = (first + row, head)
                valid = [True] * decision.num_tokens if record.valid is None else record.valid[at].tolist()

                first_come = [False] * decision.num_tokens if protected is None else protected[row][head]
                ranks = zip(
                    (not x for x in valid), (not x for x in first_come), (-x for x in importance[row][head]), count()
                )
                budget = decision.budget if budgets is None else budgets[row][head]
                alone = [rank[-1] for rank in sorted(ranks)[:budget]]
                lost = {slot for slot in alone if slot not in stay and valid[slot]}
                tokens |= {(*at, slot) for slot in lost}
                if decision.graph is None:
                    continue
                for k, source in enumerate(to_list(decision.graph.sources)[row][head]):
                    for m, slot in enumerate(to_list(decision.graph.neighbors)[row][head][k]):
                        weight = to_list(decision.graph.weights)[row][head][k][m]
                        if slot in lost and weight > 0 and scores[row][head][slot] < importance[row][head][slot]:
                            edges[(*at, slot, source)] = weight
        first += len(kept)
    return tokens, edges


def entries(found):
    columns = (found.row, found.head, found.token, found.source, found.weight)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def check_suppressions(cache):
    """Compare every layer with the loops; give the number of suppressed tokens, and of those without a source."""
    num_tokens = without_source = 0
    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        tokens, edges = suppressed_by_loops(layer.record)
        where = layer.record.positions
        reached = {place[:3] for place in edges}
        expected = {(r, h, int(where[r, h, t]), int(where[r, h, s]), w) for (r, h, t, s), w in edges.items()}
        expected |= {(r, h, int(where[r, h, t]), -1, 0.0) for r, h, t in tokens - reached}
        found = entries(stats.suppressions)
        assert found == sorted(expected, key=lambda entry: (*entry[:3], -entry[4], entry[3]))
        assert len(stats.suppressions) == len(found)
        marked = {(r, h, int(where[r, h, t])) for r, h, t in tokens}
        assert {tuple(place) for place in np.argwhere(fates(layer) == Fate.SUPPRESSED).tolist()} == marked
        assert stats.num_suppressed.sum() == len(tokens)
        num_tokens, without_source = num_tokens + len(tokens), without_source + len(tokens - reached)
    return num_tokens, without_source


def test_the_worked_example_of_the_contract():
    """Token 6 of 7 gives way: it resembles token 7 (.60) and token 4 (.50)."""
    importance = np.asarray([[[0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]]], dtype=np.float32)
    graph = Graph(
        sources=np.asarray([[[3, 6]]]),
        neighbors=np.asarray([[[[5, 4], [2, 5]]]]),
        weights=np.asarray([[[[0.5, 0.4], [0.7, 0.6]]]], dtype=np.float32),
        num_tokens=7,
    )
    scores = propagate(importance, graph)
    decision = Eviction(
        choice=Choice(kept=select(scores, 3)), budget=3, num_tokens=7, importance=importance, scores=scores,
        graph=graph, backend=load("numpy"),
    )  # fmt: skip
    layer = EvictingLayer(EvictingCache().settings)
    layer.record = EvictionRecord(
        decisions=(decision,),
        by_importance=(select(importance, 3),),
        positions=torch.arange(0, 70, 10)[None, None],
        valid=None,
        redundancy_before=torch.zeros(1, 1),
        redundancy_after=torch.zeros(1, 1),
    )

    cache = EvictingCache()
    cache.layers = [layer]

    (stats,) = cache.stats()
    assert entries(stats.suppressions) == [(0, 0, 50, 60, np.float32(0.6)), (0, 0, 50, 30, np.float32(0.5))]
    assert stats.num_suppressed.tolist() == [[1]]


@dataclass(frozen=True)
class EveryOther(Wrapper):
    """Chooses among the even tokens only."""

    def choose(self, found, layer, budget):
        kept = select(found.scores[..., ::2], budget, backend=layer.backend)
        return Choice(kept=2 * kept)


@pytest.mark.parametrize("policy", [EveryOther(KNorm(budget=12)), EveryOther(GraphKV(KNorm(budget=12)))], ids=str)
def test_the_importance_is_chosen_from_as_the_policy_chooses(model, prompts, policy):
    """By plain selection half of the tokens would count as suppressed, also where nothing re-scores."""
    cache = read(model, prompts, policy, record=True)

    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        (decision,) = layer.record.decisions
        alone = 2 * select(decision.importance[..., ::2], 12)
        expected = [
            [(r, h, int(t)) for t in sorted(set(alone[r, h].tolist()) - set(decision.kept[r, h].tolist()))]
            for r in range(alone.shape[0])
            for h in range(alone.shape[1])
        ]
        marked = np.argwhere(fates(layer) == Fate.SUPPRESSED).tolist()
        assert [tuple(place) for place in marked] == [place for row in expected for place in row]
        assert bool(marked) == isinstance(policy.base, GraphKV)
        assert stats.num_suppressed.sum() == len(marked)


@each_policy
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_suppressions_equal_loops(model, prompts, policy, backend):
    cache = read(model, prompts, policy, record=True, backend=backend)

    num_tokens, without_source = check_suppressions(cache)
    assert bool(num_tokens) == isinstance(policy, GraphKV)
    # Who was overtaken has no culprit; who was lowered has.
    assert without_source == (num_tokens if isinstance(getattr(policy, "signal", None), (Enhance, Degree)) else 0)


@each_policy
def test_suppressions_of_later_evictions_are_at_true_positions(model, prompts, policy):
    cache = read(model, prompts, policy, chunks=(40, 12, 8), record=True, every=4)

    check_suppressions(cache)
    full = read(model, prompts, None, chunks=(40, 12, 8)).layers[0].keys
    stats = cache.stats()[0]
    assert stats.num_evictions == 3
    # The keys of the first layer do not depend on what was evicted: the weight is their cosine.
    for row, head, token, source, weight in entries(stats.suppressions):
        if source >= 0:
            cosine = torch.nn.functional.cosine_similarity(full[row, head, token], full[row, head, source], dim=0)
            assert weight == pytest.approx(float(cosine), abs=1e-5)


@each_policy
# With 45, the budget is larger than what is no padding.
@pytest.mark.parametrize("padding", [15, 45])
def test_padding_is_never_suppressed(model, prompts, policy, padding):
    mask = torch.ones_like(prompts)
    mask[0, :padding] = 0
    cache = read(model, prompts, policy, mask=mask, record=True)

    check_suppressions(cache)
    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        assert (fates(layer)[0, :, :padding] == Fate.DROPPED).all()
        assert not (stats.suppressions.token[stats.suppressions.row == 0] < padding).any()
        assert (stats.num_kept == (fates(layer) >= Fate.KEPT).sum(axis=-1)).all()


@each_policy
def test_redundancy_equals_every_pair(model, prompts, policy):
    mask = torch.ones_like(prompts)
    mask[0, :9] = 0
    cache, full = read(model, prompts, policy, mask=mask, record=True), read(model, prompts, None, mask=mask)

    for layer, whole, stats in zip(cache.layers, full.layers, cache.stats(), strict=True):
        is_there = torch.ones(layer.keys.shape[:-1], dtype=torch.bool) if layer.valid is None else layer.valid
        for row, head in np.ndindex(2, 2):
            before = mean_cosine(whole.keys[row, head], mask[row].bool())
            after = mean_cosine(layer.keys[row, head], is_there[row, head])
            assert stats.redundancy_before[row, head] == pytest.approx(before, abs=1e-5)
            assert stats.redundancy_after[row, head] == pytest.approx(after, abs=1e-5)


def test_counters_add_up_over_many_evictions(model, prompts):
    policy = POLICIES["snapkv+graphkv"]
    with evicting(model, policy, record=True, every=5):
        cache = cache_of(
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=19, return_dict_in_generate=True
            )
        )

    for index, stats in enumerate(cache.stats()):
        # 18 tokens are fed back: evictions after the prompt, and after 5, 10 and 15 of them.
        assert (stats.layer, stats.evicts, stats.budget) == (index, True, 24)
        assert (stats.num_seen, stats.num_stored, stats.num_evictions) == (N + 18, 24 + 3, 4)
        assert stats.num_dropped == N + 18 - 27
        assert stats.num_kept.tolist() == [[27, 27]] * 2
        assert stats.nbytes == 2 * 27 * BYTES_PER_TOKEN
        assert stats.bytes_freed == 2 * (N + 18 - 27) * BYTES_PER_TOKEN
        assert stats.seconds > 0
    assert sum(stats.nbytes for stats in cache.stats()) == cache.nbytes
    assert "3 tokens have come since" in cache.report()


def test_heads_with_budgets_of_their_own_are_counted_apart(model, prompts):
    cache = read(model, prompts, POLICIES["adakv+graphkv"], record=True)

    for stats in cache.stats():
        assert stats.num_kept.sum(axis=-1).tolist() == [2 * 24] * 2
        assert stats.num_kept.max() == stats.num_stored > stats.num_kept.min()
    assert f"{stats.num_kept.min()} to {stats.num_kept.max()}" in cache.report().splitlines()[-1]


@pytest.mark.parametrize("base", [SnapKV(budget=N - 1, window=6), H2O(budget=N - 1)], ids=["snapkv", "h2o"])
def test_a_head_drops_tokens_also_where_another_one_keeps_all(model, prompts, base):
    cache = read(model, prompts, AdaKV(base), record=True)

    assert any(layer.num_stored == N for layer in cache.layers)
    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        (decision,) = layer.record.decisions
        assert stats.num_kept.tolist() == decision.counts.tolist()
        assert stats.num_dropped == N - stats.num_kept.min()
        for row, head in np.ndindex(2, 2):
            kept = decision.kept[row, head]
            assert layer.positions[row, head].tolist() == sorted([-1] * (layer.num_stored - int((kept >= 0).sum())) + [
                position for position in kept.tolist() if position >= 0
            ])  # fmt: skip
    with pytest.raises(ArgumentError, match="at most the 0 tokens"):
        cache.crop(-1)


@each_policy
def test_every_token_has_a_fate(model, prompts, policy):
    with evicting(model, policy, record=True):
        cache = cache_of(
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, return_dict_in_generate=True
            )
        )

    for layer in cache.layers:
        found = fates(layer)
        assert found.shape == (2, 2, N + 4)
        for row, head in np.ndindex(2, 2):
            stored = layer.positions[row, head]
            assert np.flatnonzero(found[row, head] >= Fate.KEPT).tolist() == stored[stored >= 0].tolist()
        decision = layer.record.decisions[0]
        protected = 0 if decision.protected is None else int(decision.protected[0].sum())
        assert (found[0] == Fate.PROTECTED).sum() == protected
        assert (found[:, :, N:] == Fate.KEPT).all()


def test_only_kept_tokens_are_protected(model, prompts):
    with pytest.warns(GraphKVWarning, match="6 newest tokens .* nothing of the budget of 4"):
        cache = read(model, prompts, SnapKV(budget=4, window=6), record=True)

    for layer in cache.layers:
        assert (fates(layer) == Fate.PROTECTED).sum(axis=-1).tolist() == [[4, 4]] * 2
        assert (fates(layer) == Fate.DROPPED).sum(axis=-1).tolist() == [[N - 4, N - 4]] * 2


@each_policy
def test_scores_stand_at_true_positions(model, prompts, policy):
    mask = torch.ones_like(prompts)
    mask[0, :9] = 0
    cache = read(model, prompts, policy, mask=mask, chunks=(40, 12, 8), record=True, every=4)

    for layer in cache.layers:
        importance, scores = scored(layer)
        positions, valid = layer.record.positions, layer.record.valid
        assert importance.shape == scores.shape == (2, 2, N)
        expected = np.full((2, 2, 2, N), np.nan)
        first = 0
        for decision in layer.record.decisions:
            for row in range(len(decision.kept)):
                for head, slot in np.ndindex(2, decision.num_tokens):
                    if valid is None or valid[first + row, head, slot]:
                        position = int(positions[first + row, head, slot])
                        expected[0, first + row, head, position] = decision.importance[row, head, slot]
                        expected[1, first + row, head, position] = decision.scores[row, head, slot]
            first += len(decision.kept)
        np.testing.assert_array_equal([importance, scores], expected)
        assert np.isfinite(importance).any()


def test_without_a_record_nothing_is_made_up(model, prompts):
    cache = read(model, prompts, POLICIES["snapkv+graphkv"])

    for layer, stats in zip(cache.layers, cache.stats(), strict=True):
        assert stats.suppressions is stats.num_suppressed is stats.redundancy_before is stats.redundancy_after is None
        assert set(np.unique(fates(layer))) == {Fate.DROPPED, Fate.KEPT}
        assert (fates(layer) == Fate.KEPT).sum() == 2 * 2 * 24
        assert np.isnan(scored(layer)).all()
    assert "suppressed" not in cache.report()


def test_the_report_shows_the_numbers(model, prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    cache = read(model, prompts, POLICIES["snapkv+graphkv"], record=True)

    policy, verdict, totals, suppressed, empty, header, *rows = cache.report().splitlines()
    assert "GraphKV(base=SnapKV(budget=24" in policy
    assert verdict == f"3 evictions ran in 3 of 3 layers, over {N} tokens."
    assert totals.startswith(f"{cache.nbytes / 1e6:.2f} MB stored, 0.03 MB freed, ")
    count = sum(int(stats.num_suppressed.sum()) for stats in cache.stats())
    assert (suppressed.split(" ")[0], empty) == (str(count), "")
    named = "layer seen stored kept per head evicted MB MB freed ms cosine before after suppressed"
    assert " ".join(header.split()) == named
    assert len({len(line) for line in (header, *rows)}) == 1
    for index, (row, stats) in enumerate(zip(rows, cache.stats(), strict=True)):
        cells = row.split()
        assert cells[:6] == [str(index), str(N), "24", "24", "1", "x"]
        assert cells[-3:] == [
            f"{stats.redundancy_before.mean():.3f}",
            f"{stats.redundancy_after.mean():.3f}",
            str(stats.num_suppressed.sum()),
        ]


def never_observed():
    cache = EvictingCache(SnapKV(budget=2))
    cache.update(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8), 0)
    return cache


def waiting(model, prompts):
    cache = EvictingCache(SnapKV(budget=24))
    cache.activate_past_recording()
    with observing(model), torch.inference_mode():
        model(prompts, **with_cache(model, cache))
    return cache


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model, prompts: EvictingCache(SnapKV(budget=9)), "the cache has seen no tokens"),
        (
            lambda model, prompts: never_observed(),
            "did not tell the cache its queries. Run the model inside",
        ),
        (lambda model, prompts: read(model, prompts, None), "no policy, and evict(policy) was not called"),
        (
            lambda model, prompts: read(model, prompts, SnapKV(budget=N), record=True),
            f"Nothing was dropped: all {N} tokens fitted into the budget of {N}.",
        ),
        (waiting, "waits for crop() or the next forward call"),
    ],
    ids=["empty", "never observed", "no policy", "all fits", "waiting"],
)
def test_the_report_says_why_nothing_was_dropped(model, prompts, make, said):
    report = make(model, prompts).report()

    assert said in report
    assert report.splitlines()[1].startswith("Nothing was ")


def test_sliding_layers_are_told_apart():
    model = FAMILIES["gemma3-mixed"]()
    ids = torch.randint(1, 97, (1, 30), generator=torch.Generator().manual_seed(3))
    cache = read(model, ids, SnapKV(budget=10, window=4), chunks=(30,), record=True)

    assert [stats.evicts for stats in cache.stats()] == [False, True, False, True]
    assert [stats.num_evictions for stats in cache.stats()] == [0, 1, 0, 1]
    rows = cache.report().splitlines()[-4:]
    assert ["sliding" in row for row in rows] == [True, False, True, False]
    assert rows[0].split()[-3:] == ["-", "-", "-"]
    assert "2 evictions ran in 2 of 4 layers" in cache.report()


def test_a_reordered_batch_forgets_its_record(model, prompts):
    cache = read(model, prompts, POLICIES["snapkv+graphkv"], record=True)
    cache.reorder_cache(torch.tensor([1, 0]))

    assert all(stats.suppressions is None for stats in cache.stats())


def test_equal_layers_share_a_line_of_the_report(model, prompts):
    cache = read(model, prompts, SnapKV(budget=24, window=6))
    row = cache.report().splitlines()[-1]
    assert row.split()[:6] == ["0", "to", "2", str(N), "24", "24"]
    times = [stats.seconds * 1e3 for stats in cache.stats()]
    assert float(row.split()[-1]) == pytest.approx(sum(times) / 3, abs=0.11)
    uneven = read(model, prompts, PyramidKV(budget=24, window=6))
    assert [line.split()[0] for line in uneven.report().splitlines()[-3:]] == ["0", "1", "2"]
