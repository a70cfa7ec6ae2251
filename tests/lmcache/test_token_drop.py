"""The experimental entry point, found and built by LMCache 0.5.7rc2 itself."""

from importlib.metadata import version

import pytest

from graphkv import ArgumentError
from graphkv.integrations.lmcache import TokenDrop
from tests.integrations.engine import KV_HEADS, Request

token_drop = pytest.importorskip(
    "lmcache.integration.vllm.experimental.token_drop", reason="only releases from 0.5.7rc2 on have it"
)
CONFIG = {"policy": "snapkv(window=4,kernel_size=3)+degree", "budget": 12, "every": 5}


def built(config):
    spec = token_drop.parse_token_drop_spec({"lmcache.token_drop": {"algorithm": "graphkv", "config": config}})
    return token_drop.build_token_drop_algorithm(spec)


def test_lmcache_finds_and_builds_it():
    assert version("lmcache").startswith("0.5.7")
    first, second = built(CONFIG), built(CONFIG)

    assert isinstance(first, TokenDrop)
    assert first is not second


def test_requests_of_it_run_side_by_side():
    requests = [Request(built(CONFIG), seed) for seed in range(3)]
    for request in requests:
        request.step(25)
    for _ in range(11):
        for request in requests:
            request.step(1)

    for request in requests:
        assert [each["layer.0"].shape for each in request.kept] == [(KV_HEADS, 12)] * 3


def test_a_config_that_cannot_be_met_is_refused_when_the_request_comes():
    with pytest.raises(ArgumentError, match="equally many tokens"):
        built(CONFIG | {"policy": "knorm+adakv"})
    with pytest.raises(ArgumentError, match=r"policy must keep tokens as they are; .* keeps some in fewer bits"):
        built(CONFIG | {"policy": "knorm+mikv"})
