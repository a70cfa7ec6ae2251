"""What a layer stores per token goes through every operation together, whatever of it is there."""

from dataclasses import fields, replace

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from graphkv import H2O, KNorm
from graphkv.integrations.transformers import EvictingCache, EvictingLayer, observing
from graphkv.integrations.transformers.queries import Queries
from graphkv.integrations.transformers.rotary import UNKNOWN
from graphkv.integrations.transformers.slots import Slots
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import tiny_llama

BATCH, HEADS, STORED = 3, 2, 5


def numbers(*sizes, dtype=torch.float32):
    """Make every number different."""
    shape = (BATCH, HEADS, STORED, *sizes)
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def full():
    """Slots with every array that there is."""
    return Slots(
        keys=numbers(4),
        values=numbers(3) + 0.5,
        positions=numbers(dtype=torch.int64),
        places=numbers(2, dtype=torch.int64) + 1000,
        valid=numbers(dtype=torch.int64) % 3 > 0,
        pinned=numbers(dtype=torch.int64) % 5 > 2,
        mass=numbers() + 1.5,
        absorbed=numbers(dtype=torch.int32),
        state={"sums": numbers(6) + 0.25, "counts": numbers() + 0.125},
    )


def arrays(slots):
    """Name every array; None where it is not there."""
    found = {each.name: getattr(slots, each.name) for each in fields(Slots)}
    state = found.pop("state")
    return found | {f"state.{name}": sums for name, sums in state.items()}


def assert_equal(one, other):
    ours, its = arrays(one), arrays(other)
    assert ours.keys() == its.keys()
    for name, array in ours.items():
        assert (array is None) == (its[name] is None), name
        assert array is None or (array.dtype == its[name].dtype and torch.equal(array, its[name])), name


def of_each(slots, change):
    """Change every array by itself."""
    found = {name: None if array is None else change(array) for name, array in arrays(slots).items()}
    state = {name.removeprefix("state."): found.pop(name) for name in list(found) if name.startswith("state.")}
    return Slots(**found, state=state)


def test_the_example_has_every_array():
    assert all(array is not None for array in arrays(full()).values())
    assert {each.name for each in fields(Slots)} == {name.split(".")[0] for name in arrays(full())}


def test_first_and_last_cut_every_array_and_append_puts_it_together_again():
    for left in range(STORED + 1):
        first, last = full().first(left), full().last(STORED - left)
        assert_equal(first, of_each(full(), lambda x: x[:, :, :left]))  # noqa: B023
        assert_equal(last, of_each(full(), lambda x: x[:, :, left:]))  # noqa: B023
        assert (first.count, last.count) == (left, STORED - left)
        assert_equal(first.append(vars(last)), full())


def test_rows_and_stack_treat_every_array_alike():
    rows = [full().rows(lambda x: x[row : row + 1]) for row in range(BATCH)]  # noqa: B023
    assert_equal(rows[1], of_each(full(), lambda x: x[1:2]))
    assert_equal(Slots.stack(rows), full())
    assert_equal(
        full().rows(lambda x: x.repeat_interleave(2, dim=0)),
        of_each(full(), lambda x: x.repeat(1, 1, 1, *[1] * (x.ndim - 3)).repeat_interleave(2, dim=0)),
    )


def test_take_gathers_every_array():
    index = torch.randint(STORED, (BATCH, HEADS, 3), generator=torch.Generator().manual_seed(0))

    def gathered(x):
        return torch.stack([
            torch.stack([x[row, head, index[row, head]] for head in range(HEADS)]) for row in range(BATCH)
        ])  # fmt: skip

    assert_equal(full().take(index), of_each(full(), gathered))


def test_a_ragged_take_leaves_unused_slots_that_nobody_sees():
    index = torch.randint(STORED, (BATCH, HEADS, 3), generator=torch.Generator().manual_seed(0))
    index[1, :, 0] = index[2, 0, :2] = -1
    taken, whole = full().take(index, has_unused=True), full().take(index.clamp(min=0))

    assert_equal(replace(taken, positions=whole.positions, valid=whole.valid), whole)
    assert taken.positions.tolist() == torch.where(index < 0, -1, whole.positions).tolist()
    assert taken.valid.tolist() == ((index >= 0) & whole.valid).tolist()
    without = replace(full(), positions=None, valid=None).take(index, has_unused=True)
    assert without.positions is None
    assert without.valid.tolist() == (index >= 0).tolist()


def test_what_new_slots_lack_does_not_grow_and_is_filled_when_it_matters():
    bare = Slots(keys=numbers(4), values=numbers(3))
    grown = full().append(vars(bare))
    assert grown.count == 2 * STORED
    assert_equal(
        grown,
        replace(full(), keys=torch.cat([numbers(4)] * 2, dim=2), values=torch.cat([full().values, numbers(3)], dim=2)),
    )

    late = bare.append(vars(full()))
    for name, fill in (
        ("positions", -1),
        ("places", UNKNOWN),
        ("valid", True),
        ("pinned", False),
        ("mass", 1),
        ("absorbed", 0),
    ):
        assert (getattr(late, name)[:, :, :STORED] == fill).all()
        assert torch.equal(getattr(late, name)[:, :, STORED:], getattr(full(), name))
    assert not late.state["sums"][:, :, :STORED].any()
    # A token whose place came to nobody's notice.
    placed = full().append(vars(bare)).reaching("places", full().places[:, :, :2])
    assert (placed.places[:, :, STORED:-2] == UNKNOWN).all()
    assert torch.equal(placed.places[:, :, -2:], full().places[:, :, :2])
    index = torch.full((BATCH, HEADS, 1), 2 * STORED - 1)
    assert (full().append(vars(bare)).take(index).places == UNKNOWN).all()
    assert not full().append(vars(bare)).take(index).state["counts"].any()


def test_a_stack_fills_up_what_some_of_its_parts_lack():
    bare = Slots(keys=numbers(4), values=numbers(3))
    stacked = Slots.stack([bare, full()])
    assert stacked.keys.shape[0] == 2 * BATCH
    assert stacked.valid[:BATCH].all()
    assert (stacked.mass[:BATCH] == 1).all()
    assert (stacked.places[:BATCH] == UNKNOWN).all()
    assert torch.equal(stacked.positions[BATCH:], full().positions)
    assert not stacked.state["sums"][:BATCH].any()
    assert_equal(Slots.stack([bare, bare]), bare.rows(lambda x: torch.cat([x, x])))


def test_true_positions_end_at_the_last_token_seen_until_some_are_held():
    assert Slots(keys=numbers(4), values=numbers(3)).true_positions(9)[0, 1].tolist() == [4, 5, 6, 7, 8]
    assert full().true_positions(9) is full().positions or torch.equal(full().true_positions(9), full().positions)


def test_nothing_is_written_into_and_a_clone_shares_nothing():
    slots, before = full(), full()
    slots.append(vars(slots)).take(torch.zeros(BATCH, HEADS, 2, dtype=torch.int64))
    for array in arrays(slots.clone().last(2)).values():
        array.zero_()
    assert_equal(slots, before)


# ------------------------------------------------------------------------------------------------- the last queries


def test_held_queries_follow_their_tokens():
    """Of each row the last ones that are not padding."""
    query = torch.arange(2 * 4 * 3).reshape(2, 1, 4, 3).float()
    valid = torch.tensor([[[True] * 4], [[True, True, True, False]]])
    held = Queries.of(query, None, valid, 10)
    assert held.asked.tolist() == [[6, 7, 8, 9], [6, 7, 8, -1]]
    ordered = held.padding_first()
    assert ordered.asked.tolist() == [[6, 7, 8, 9], [-1, 6, 7, 8]]
    assert ordered.last(2).asked.tolist() == [[8, 9], [7, 8]]
    assert torch.equal(ordered.last(2).queries[1, 0], query[1, 0, 1:3])
    assert held.last(0) is None
    back = ordered.without_newest(1, 9, has_holes=True)
    assert back.asked.tolist() == [[-1, 6, 7, 8], [-1, 6, 7, 8]]
    assert torch.equal(back.queries[0, 0, 1:], query[0, 0, :3])
    plain = Queries.of(query, None, None, 10)
    assert plain.positions(10).tolist() == [[6, 7, 8, 9]] * 2
    assert plain.append(held, 10).asked.tolist()[1] == [6, 7, 8, 9, 6, 7, 8, -1]
    assert Queries.of(query, 1.0, None, 10).queries[0, 0, 0].tolist() == pytest.approx([0, 3**0.5, 2 * 3**0.5])


# ------------------------------------------------------------------------------- the attributes that transformers uses


@pytest.fixture
def cache():
    ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    model = tiny_llama(num_hidden_layers=2)
    cache = EvictingCache(H2O(budget=12), every=4)
    with observing(model), torch.inference_mode():
        model(ids, **with_cache(model, cache))
    return cache


def test_a_layer_has_no_keys_before_the_first_token_as_transformers_own():
    layer, own = EvictingLayer(EvictingCache().settings), DynamicLayer()
    for each in (layer, own):
        assert (each.keys, each.values, each.is_initialized) == (None, None, False)
    assert (layer.num_stored, layer.nbytes, layer.state) == (0, 0, {})
    for each in (layer, own):
        each.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5))
        assert (each.keys.shape, each.values.shape, each.is_initialized) == ((1, 2, 3, 4), (1, 2, 3, 5), True)
    layer.reset()
    assert (layer.keys, layer.values, layer.is_initialized) == (None, None, False)


def test_every_array_is_an_attribute_of_the_layer(cache):
    layer = cache.layers[0]
    for each in fields(Slots):
        assert getattr(layer, each.name) is getattr(layer.slots, each.name)


def test_keys_and_values_that_transformers_assigns_are_stored(cache):
    """As its offloading does."""
    layer = cache.layers[0]
    keys, values, before = layer.keys, layer.values, layer.slots
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, keys)
    layer.keys, layer.values = keys.half(), values.half()

    assert layer.slots.keys.dtype == layer.slots.values.dtype == torch.float16
    assert layer.slots.positions is before.positions
    assert before.keys is keys
    copied = layer.copy()
    copied.values = values
    assert layer.values.dtype == torch.float16


def test_rows_are_selected_in_everything_that_a_layer_holds(cache):
    for layer in cache.layers:
        before = layer.slots
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([2, 0, 1]))
        layer.batch_select_indices(torch.tensor([0, 2]))
        assert_equal(layer.slots, before.rows(lambda x: x[[1, 0]]))


def test_a_layer_that_has_read_nothing_takes_changes_of_its_rows():
    layer = EvictingLayer(EvictingCache(KNorm(budget=3)).settings)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.num_stored == 0
