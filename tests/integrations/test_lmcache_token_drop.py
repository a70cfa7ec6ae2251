"""LMCache's experimental protocol, played by an engine of ours: several requests at once, against plain evictions."""

import pytest
import torch

from graphkv import ArgumentError, ArgumentTypeError, evict
from graphkv.integrations.lmcache import TokenDrop
from graphkv.naming.policies import make_policy
from tests.integrations.engine import KV_HEADS, LAYERS, D, Request

CONFIGS = {
    "snapkv": {"policy": "snapkv(window=4,kernel_size=3)+degree", "budget": 12, "every": 5},
    "keydiff": {"policy": "keydiff", "budget": 9, "every": 3, "sinks": 2},
    "h2o": {"policy": "h2o", "budget": 10, "every": 4},
    "values": {"policy": "knorm+caote", "budget": 8, "every": 6},
    "expected": {"policy": "expected-attention", "budget": 8, "every": 6},
}


def expected(config, request):
    """The same by one call of `evict` per eviction."""
    policy = make_policy(config["policy"], config["budget"], sinks=config.get("sinks"))
    found, caches, states, queries = [], {}, {}, {}
    kept_before = 0
    for number, new in enumerate(request.seen):
        for name, (asked, keys, values) in new.items():
            old = caches.get(name)
            caches[name] = (
                (keys, values) if old is None else (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
            )
            queries[name] = torch.cat([queries[name], asked]) if name in queries else asked
        resident = caches["layer.0"][0].shape[2]
        if resident <= config["budget"] or (number and resident - kept_before < config["every"]):
            continue
        kept = {}
        for place, (name, (keys, values)) in enumerate(caches.items()):
            asked = queries[name][-min(len(queries[name]), resident) :].transpose(0, 1)[None]
            done = evict(
                policy, keys, values=values, queries=asked, layer=place, num_layers=LAYERS, state=states.get(name),
                backend="torch",
            )  # fmt: skip
            kept[name], states[name] = done.kept[0], done.state
            caches[name] = done.apply(keys), done.apply(values)
        found.append(kept)
        kept_before = config["budget"]
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_requests_side_by_side_keep_what_evictions_keep(config):
    requests = [Request(TokenDrop(config), seed) for seed in range(3)]
    for request, length in zip(requests, (30, 7, 18), strict=True):
        request.step(length)
    for _ in range(14):
        for request in requests:
            request.step(1)

    for request in requests:
        wanted = expected(config, request)
        assert len(request.kept) == len(wanted) >= 1
        for got, each in zip(request.kept, wanted, strict=True):
            for name, positions in got.items():
                assert positions.dtype == torch.int64
                assert positions.shape == (KV_HEADS, config["budget"])
                assert torch.equal(positions, each[name])
        assert request.views["layer.0"].keys.shape[2] < config["budget"] + config["every"]


def test_heads_and_layers_keep_tokens_of_their_own():
    request = Request(TokenDrop(CONFIGS["keydiff"]), 5)
    request.step(40)

    (kept,) = request.kept
    assert len({tuple(row.tolist()) for each in kept.values() for row in each}) == LAYERS * KV_HEADS
    assert all((row[1:] > row[:-1]).all() for each in kept.values() for row in each)


def test_nothing_is_dropped_before_it_must_be():
    algorithm = TokenDrop(CONFIGS["keydiff"])

    assert not algorithm.should_compact_kv("prefill", 9, 0)
    assert algorithm.should_compact_kv("prefill", 10, 0)
    assert algorithm.should_observe_token_queries("prefill", 0) == 0


def test_an_error_leaves_the_request_as_it_was():
    algorithm = TokenDrop(CONFIGS["h2o"])
    request = Request(algorithm, 1)
    request.step(30)
    states = dict(algorithm._states)

    class Broken:
        def get_keys(self):
            return torch.zeros(1, KV_HEADS, 40, D)

        def get_values(self):
            return torch.zeros(1, KV_HEADS, 40, D)

    with pytest.raises(ArgumentError, match="queries must hold all 30 new positions for H2O"):
        algorithm.select_kept_token_positions({"layer.0": Broken()})

    assert algorithm._states == states


BAD = {
    "unknown option": ({"policy": "knorm", "budget": 9, "window": 3}, "config must hold policy, budget, every"),
    "no policy": ({"budget": 9}, "config must hold 'policy'; got ['budget']"),
    "no budget": ({"policy": "knorm"}, "config must hold 'budget'; got ['policy']"),
    "budget 0": ({"policy": "knorm", "budget": 0}, "budget must be at least 1; got 0"),
    "every 0": ({"policy": "knorm", "budget": 9, "every": 0}, "every must be at least 1; got 0"),
    "nothing to evict": ({"policy": "full", "budget": 9}, "policy must evict tokens; got 'full'"),
    "heads with counts": (
        {"policy": "knorm+adakv", "budget": 9},
        "must keep equally many tokens in every layer and head",
    ),
    "layers with counts": (
        {"policy": "pyramidkv", "budget": 64},
        "must keep equally many tokens in every layer and head",
    ),
    "layers read together": ({"policy": "cake", "budget": 64}, "must keep equally many tokens in every layer and head"),
    "below the window": ({"policy": "snapkv", "budget": 20}, "budget must have room for the"),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD.keys())
def test_a_config_that_cannot_be_met_is_refused(config, message):
    with pytest.raises(ArgumentError) as error:
        TokenDrop(config)

    assert message in str(error.value)


def test_a_budget_of_another_kind_is_refused():
    with pytest.raises(ArgumentTypeError, match="budget must be an integer"):
        TokenDrop({"policy": "knorm", "budget": 0.5})
