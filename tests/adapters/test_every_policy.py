"""What holds for every policy of the library, whatever it scores by."""

import array_api_strict
import numpy as np
import pytest

import graphkv
from graphkv import AdaKV, Backend, Decay, Degree, GraphKV, LayerBudgets, SnapKV, evict
from tests.support.arrays import BACKENDS, each_backend, make
from tests.support.policies import BASES, every_base, every_policy

RNG = np.random.default_rng(11)
KEYS = RNG.normal(size=(2, 3, 40, 8))
VALUES = RNG.normal(size=(2, 3, 40, 8))
QUERIES = RNG.normal(size=(2, 6, 40, 8))

WINDOWED = {"window": 4, "kernel_size": 3, "num_sinks": 2}
each_base = pytest.mark.parametrize("name", BASES)

STRICT = Backend(name="array_api_strict", xp=array_api_strict, to_numpy=lambda x: np.asarray(x._array))


def policy_of(name, budget):
    return every_base(budget, num_sinks=2)[name]


def run(policy, backend, rows=slice(None), tokens=slice(None), valid=None, **options):
    def array(x, tokens=tokens):
        x = x[rows, :, tokens]
        return make(backend, x) if backend is not STRICT else array_api_strict.asarray(x.astype(np.float32))

    if valid is not None:
        valid = make(backend, valid, bool) if backend is not STRICT else array_api_strict.asarray(valid)
    return evict(
        policy,
        array(KEYS),
        values=array(VALUES),
        queries=array(QUERIES),
        probes=array(QUERIES, slice(None)),
        valid=valid,
        backend=backend,
        **options,
    )


def same_up_to_close_scores(one, other, scores):
    """Equal sets, except for tokens whose scores are equal but for rounding."""
    for row in np.ndindex(one.shape[:-1]):
        mine, theirs = set(one[row].tolist()) - {-1}, set(other[row].tolist()) - {-1}
        for a, b in zip(sorted(mine - theirs), sorted(theirs - mine), strict=True):
            assert abs(scores[row][a] - scores[row][b]) <= 1e-5 * abs(scores[row][a])


@each_base
@each_backend
@pytest.mark.parametrize("budget", [0, 1, 5, 6, 7, 8, 20, 39, 0.5])
def test_exactly_the_budget_is_kept_in_ascending_order(backend, name, budget):
    for policy in (policy_of(name, budget), GraphKV(policy_of(name, budget))):
        kept = backend.to_numpy(run(policy, backend).kept)

        assert kept.shape == (2, 3, 20 if budget == 0.5 else budget)
        assert (np.diff(kept, axis=-1) > 0).all()
        assert ((kept >= 0) & (kept < 40)).all()


@each_base
@each_backend
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 6])
def test_short_prompts_are_kept_whole_or_cut_to_the_budget(backend, name, num_tokens):
    for budget in (2, 6):
        kept = backend.to_numpy(run(policy_of(name, budget), backend, tokens=slice(0, num_tokens)).kept)

        assert kept.shape == (2, 3, min(budget, num_tokens))
        assert (np.diff(kept, axis=-1) > 0).all()


@each_base
@each_backend
def test_every_library_keeps_the_same(backend, name):
    ours, reference = run(policy_of(name, 15), backend), run(policy_of(name, 15), BACKENDS["numpy"])

    scores = BACKENDS["numpy"].to_numpy(reference.scores)
    np.testing.assert_allclose(backend.to_numpy(ours.scores), scores, rtol=2e-4, atol=1e-6)
    same_up_to_close_scores(backend.to_numpy(ours.kept), reference.kept, scores)


@each_base
def test_nothing_but_the_array_standard_is_used(name):
    for wrap in (lambda base: base, AdaKV, GraphKV):
        ours, reference = run(wrap(policy_of(name, 15)), STRICT), run(wrap(policy_of(name, 15)), BACKENDS["numpy"])

        same_up_to_close_scores(STRICT.to_numpy(ours.kept), reference.kept, reference.scores)


@each_base
@pytest.mark.parametrize("backend", ["torch", "torch:portable"])
def test_no_value_is_read_on_the_host(name, backend):
    """Tensors of torch's meta device have no values to read."""
    torch = pytest.importorskip("torch")

    def array(x):
        return torch.empty(x.shape, dtype=torch.float32, device="meta")

    base = policy_of(name, 15)
    for policy in (base, AdaKV(base), AdaKV(base, schedule="code"), GraphKV(base)):
        done = evict(
            policy,
            array(KEYS),
            values=array(VALUES),
            queries=array(QUERIES),
            probes=array(QUERIES),
            valid=torch.empty((2, 40), dtype=torch.bool, device="meta"),
            backend=BACKENDS[backend],
        )
        assert done.kept.device.type == "meta"
        assert done.kept.shape == (2, 3, 40 if isinstance(policy, AdaKV) else 15)


@each_base
@each_backend
def test_a_padded_row_keeps_what_it_keeps_alone(backend, name):
    valid = np.ones((2, 40), dtype=bool)
    valid[1, :13] = False

    for policy in (policy_of(name, 15), GraphKV(policy_of(name, 15))):
        together = backend.to_numpy(run(policy, backend, valid=valid).kept)
        alone = run(policy, backend, rows=slice(1, 2), tokens=slice(13, None))

        scores = np.pad(backend.to_numpy(alone.scores), ((0, 0), (0, 0), (13, 0)))
        same_up_to_close_scores(together[1:], backend.to_numpy(alone.kept) + 13, scores)
        first = run(policy, backend, rows=slice(0, 1))
        same_up_to_close_scores(together[:1], backend.to_numpy(first.kept), backend.to_numpy(first.scores))


@each_base
@each_backend
def test_more_padding_than_the_budget_leaves_is_filled_up(backend, name):
    valid = np.arange(40) >= np.asarray([[37], [0]])

    kept = backend.to_numpy(run(policy_of(name, 15), backend, valid=valid).kept)

    assert kept.shape == (2, 3, 15)
    assert (kept[0, :, -3:] == [37, 38, 39]).all()


@each_base
@each_backend
def test_a_graph_without_edges_changes_nothing(backend, name):
    base = policy_of(name, 15)
    for policy in (
        GraphKV(base, Decay(neighbors=1, source_ratio=0.0)),
        GraphKV(base, Decay(neighbors=0)),
        GraphKV(base, Decay(neighbors=1, rounds=0)),
    ):
        alone, wrapped = run(base, backend), run(policy, backend)

        assert backend.to_numpy(wrapped.kept).tolist() == backend.to_numpy(alone.kept).tolist()
        assert np.array_equal(backend.to_numpy(wrapped.scores), backend.to_numpy(alone.scores))


@each_base
def test_protected_tokens_are_counted_as_they_are_marked(name):
    policy = policy_of(name, 15)

    protected = run(policy, BACKENDS["numpy"]).protected

    marked = np.zeros((2, 3), dtype=int) if protected is None else protected.sum(-1)
    assert marked.tolist() == [[policy.protection(15).count] * 3] * 2


WRAPPED = {
    "alone": lambda base: base,
    "decay": GraphKV,
    "power": lambda base: GraphKV(base, Degree()),
    "max_rank": lambda base: GraphKV(base, Degree(fusion="max_rank")),
    "adakv": lambda base: AdaKV(GraphKV(base, Degree())),
    "under adakv": lambda base: GraphKV(AdaKV(base), Degree()),
    "layer budgets": lambda base: GraphKV(LayerBudgets(base, budgets=[9]), Degree()),
}


@each_base
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_every_base_protects_the_same_sinks_whatever_is_on_top(name, wrap):
    base = every_base(9, num_sinks=3)[name]
    # Nobody would keep the first tokens for their scores.
    keys, queries = KEYS.copy(), np.zeros_like(QUERIES)
    keys[:, :, :3] = 100 * KEYS[:, :, 20:21]

    done = evict(wrap(base), keys, values=VALUES, queries=queries, probes=queries)

    assert done.protected[:, :, :3].all()
    assert (done.kept[:, :, :3] == [0, 1, 2]).all()


@each_base
def test_half_precision_is_widened_and_inputs_are_left_alone(name):
    arrays = [x.astype(np.float16) for x in (KEYS, VALUES, QUERIES)]
    copies = [x.copy() for x in arrays]

    done = evict(policy_of(name, 15), arrays[0], values=arrays[1], queries=arrays[2], probes=arrays[2])

    assert done.scores.dtype == np.float32
    for array, copy in zip(arrays, copies, strict=True):
        assert np.array_equal(array, copy)


@pytest.mark.parametrize("policy", every_policy(15).values(), ids=every_policy(15).keys())
def test_each_kv_head_keeps_what_it_keeps_alone_unless_the_policy_says_that_it_couples_heads(policy):
    def kept_by(heads):
        """What each head keeps, at the prompt and then with ten tokens more."""
        rows = slice(2 * heads.start, 2 * heads.stop)
        first = evict(
            policy,
            KEYS[:, heads, :30],
            values=VALUES[:, heads, :30],
            queries=QUERIES[:, rows, :30],
            probes=QUERIES[:, rows],
            layer=1,
            num_layers=4,
        )
        keys, values = (
            np.concatenate([first.apply(x[:, heads, :30]), x[:, heads, 30:]], axis=2) for x in (KEYS, VALUES)
        )
        then = evict(
            policy,
            keys,
            values=values,
            queries=QUERIES[:, rows, 30:],
            probes=QUERIES[:, rows],
            state=first.state,
            layer=1,
            num_layers=4,
        )
        return [[sorted(set(row) - {-1}) for row in done.kept.tolist()[1]] for done in (first, then)]

    together = kept_by(slice(0, 3))
    alone = [kept_by(slice(head, head + 1)) for head in range(3)]
    is_same = together == [[row for head in alone for row in head[call]] for call in range(2)]
    assert is_same is not policy.needs().couples_heads


def test_preferences_speak_of_all_heads_of_a_layer():
    policy = graphkv.CAKE(budget=15, **WINDOWED)

    whole = graphkv.wants(policy, KEYS, queries=QUERIES)
    one = graphkv.wants(policy, KEYS[:, :1], queries=QUERIES[:, :2])

    assert policy.needs().wants
    assert (whole > one).all()


@each_base
def test_costs_are_counts_and_grow_with_the_prompt(name):
    policy = policy_of(name, 15)

    def shape(num_tokens):
        return graphkv.core.LayerShape(num_tokens=num_tokens, query_heads=6, kv_heads=3, head_size=8, budget=15)

    short, long = policy.cost(shape(100)), policy.cost(shape(200))
    for kind in ("flops", "bytes"):
        assert isinstance(getattr(short, kind), int)
        assert 0 <= getattr(short, kind) <= getattr(long, kind)


@each_backend
def test_layer_budgets_replace_those_of_the_base(backend):
    policy = LayerBudgets(SnapKV(budget=15, **WINDOWED), budgets=[20, 10])

    for wrapped in (policy, GraphKV(policy)):
        for layer, budget in ((0, 20), (1, 10)):
            done = run(wrapped, backend, layer=layer, num_layers=2)
            assert (done.budget, done.kept.shape) == (budget, (2, 3, budget))
    alone = run(SnapKV(budget=10, **WINDOWED), backend)
    assert backend.to_numpy(run(policy, backend, layer=1, num_layers=2).kept).tolist() == (
        backend.to_numpy(alone.kept).tolist()
    )


def test_layer_budgets_check_their_numbers():
    base = SnapKV(budget=15)
    assert LayerBudgets(base, budgets=[3, 4]).budgets == (3, 4)
    with pytest.raises(graphkv.ArgumentError, match="one entry for each of 3 layers; got 2"):
        LayerBudgets(base, budgets=(3, 4)).layer_budget(100, 0, 3)
    with pytest.raises(graphkv.ArgumentError, match=r"budgets\[1\] must be at least 0; got -1"):
        LayerBudgets(base, budgets=(3, -1))
    for wrong in (3, "34", {3, 4}, (3, 0.5)):
        with pytest.raises(graphkv.ArgumentTypeError, match="budgets"):
            LayerBudgets(base, budgets=wrong)
