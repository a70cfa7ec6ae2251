"""Stored caches of SmolLM2, shortened through LMCache's own SDK and server, and read back."""

import copy
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import DynamicCache

from graphkv import ArgumentError, Degree, GraphKV, KeyDiff, Shared, SnapKV
from graphkv.integrations.lmcache import editor
from graphkv.integrations.transformers import EvictingCache, evicting, observing
from graphkv.integrations.transformers.versions import with_cache
from graphkv.workbench.model import load_model
from tests.lmcache.conftest import CHUNK, MODEL

sdk = pytest.importorskip("lmcache.sdk", reason="LMCache lives in an environment of its own: make test-lmcache")

pytestmark = pytest.mark.slow
LENGTH, BUDGET = 5 * CHUNK + 23, 2 * CHUNK
POLICIES = {
    "snapkv and the degree": GraphKV(SnapKV(budget=BUDGET, num_sinks=4), Degree()),
    "the paper's graph": GraphKV(SnapKV(budget=BUDGET + 9, num_sinks=4)),
    "keydiff": KeyDiff(budget=BUDGET, num_sinks=4),
}


@pytest.fixture(scope="module")
def smollm():
    return load_model(None, print)


@pytest.fixture(scope="module")
def prompt(smollm):
    """Token ids of running text, shape (1, LENGTH)."""
    return torch.tensor([smollm[1](topics["naming"] + topics["objects"])["input_ids"][:LENGTH]])


def flat(x):
    return x[0].transpose(0, 1).flatten(-2)


@pytest.fixture(scope="module")
def tensors(smollm, prompt):
    """What an engine would store of the whole chunks of the prompt."""
    model, _ = smollm
    with observing(model), torch.inference_mode():
        cache = EvictingCache(num_queries=LENGTH)
        model(prompt, **with_cache(model, cache))
    layers = cache.attention_layers
    keys, values = (torch.stack([flat(getattr(layer, name)) for layer in layers]) for name in ("keys", "values"))
    return torch.stack([keys, values]), torch.stack([flat(layer.queries) for layer in layers])


def store(contexts, tensors, ids):
    """Store keys and values through the SDK, and queries as an engine does: without the SDK's leading axis."""
    kv, queries = contexts
    assert kv.store(tensors[0], ids)
    whole = len(ids) // CHUNK * CHUNK
    key = queries._create_key(token_ids=ids[:whole], start=0, end=whole, request_id="engine", worker_id=0)
    inner = queries.transfer_ctx._context
    assert inner.prepare_store(key, queries.instance_id) is None
    chunks = [tensors[1][:, start : start + CHUNK].contiguous() for start in range(0, whole, CHUNK)]
    assert inner.commit_store(key, queries.instance_id, chunks)
    queries.end_session("engine")


def request_of(contexts, ids, salt=""):
    asked = []

    def post(prompt_ids, sampling, salt):
        asked.append(list(prompt_ids))
        yield sdk.request.TokenEvent(token_id=7, text="x")

    return sdk.request.create_request(contexts, post, ids, cache_salt=salt), asked


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_model_goes_on_from_what_lmcache_hands_back(contexts, smollm, prompt, tensors, policy):
    """As from a cache of transformers that keeps the same, shared by all layers, with keys at contiguous positions."""
    model, _ = smollm
    ids = prompt[0].tolist()
    store(contexts, tensors, ids)
    request, asked = request_of(contexts, ids)

    request.modify_kv(editor(policy, model.config, chunk_size=contexts[0].chunk_size), timeout=30)
    back = contexts[0].retrieve(request.tokens)
    request.generate({"max_tokens": 1})

    whole = LENGTH // CHUNK * CHUNK
    assert back.shape == (2, 30, BUDGET, 192)
    assert asked == [[*request.tokens[:BUDGET], *ids[whole:]]]
    base = policy.base if isinstance(policy, GraphKV) else policy
    exact = type(base)(budget=BUDGET, num_sinks=4)
    exact = Shared(GraphKV(exact, policy.signal) if isinstance(policy, GraphKV) else exact, over="layers")
    with evicting(model, exact, rerotate=True), torch.inference_mode():
        own = EvictingCache(exact, rerotate=True)
        model(prompt[:, :whole], **with_cache(model, own))
        assert request.tokens[:BUDGET] == prompt[0, own.layers[0].positions[0, 0]].tolist()
        wanted = model(prompt[:, whole:], **with_cache(model, own)).logits
    found = DynamicCache()
    for layer, (keys, values) in enumerate(zip(*back, strict=True)):
        found.update(*(x.unflatten(-1, (3, 64)).transpose(0, 1)[None] for x in (keys, values)), layer)
    with torch.inference_mode():
        got = model(prompt[:, whole:], **with_cache(model, found)).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


def test_a_refused_edit_leaves_what_is_stored(contexts, smollm, prompt, tensors):
    model, _ = smollm
    ids = prompt[0].tolist()
    store(contexts, tensors, ids)
    smaller = copy.deepcopy(model.config)
    smaller.num_hidden_layers = 12
    request, _ = request_of(contexts, ids)

    with pytest.raises(ArgumentError, match="the kv tensor must have shape"):
        request.modify_kv(editor(KeyDiff(budget=BUDGET), smaller, chunk_size=CHUNK), timeout=30)

    assert request.tokens == ids
    assert torch.equal(contexts[0].retrieve(ids), tensors[0][:, :, : LENGTH // CHUNK * CHUNK])


def test_policies_that_need_queries_ask_for_the_second_context(contexts, smollm, prompt, tensors):
    model, _ = smollm
    ids = prompt[0].tolist()
    store(contexts, tensors, ids)
    request, _ = request_of(contexts[:1], ids)

    with pytest.raises(ArgumentError, match=r"tensors must hold the queries for SnapKV: connect lmcache\.sdk\.qcache"):
        request.modify_kv(editor(SnapKV(budget=BUDGET), model.config, chunk_size=CHUNK), timeout=30)


def test_the_sdk_refuses_hybrid_models(announced):
    """Several kernel groups never come as far as the editor."""
    url, pages = announced
    with pytest.raises(Exception, match="failed to decode KV cache layout"):
        sdk.kvcache.connect(url=url, http_url=f"{pages}/hybrid", model_name="tests/smollm2", timeout=60)


def test_the_page_about_serving_says_how(announced, smollm, prompt, tensors, contexts):
    url, pages = announced
    model, _ = smollm
    store(contexts, tensors, prompt[0].tolist())
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    # The addresses of this run, a budget that this prompt exceeds, and a configuration that is at hand.
    code = code.replace('"Qwen/Qwen3-8B"', repr(MODEL)).replace("AutoConfig.from_pretrained(MODEL)", "config")
    code = code.replace('"tcp://127.0.0.1:6555"', repr(url)).replace('"http://127.0.0.1:8099"', "HTTP")
    code = code.replace("budget=2048", f"budget={BUDGET}").replace("sdk.qcache.connect(**SERVER)", "QUERIES")
    asked = []

    def post_completion(prompt_ids, sampling, salt):
        asked.append(list(prompt_ids))
        yield sdk.request.TokenEvent(token_id=7, text="x")

    known = {
        "HTTP": f"{pages}/kv",
        "QUERIES": contexts[1],
        "config": model.config,
        "post_completion": post_completion,
        "prompt_ids": prompt[0].tolist(),
    }
    exec(compile(code, "docs/serving.md", "exec"), known)

    assert len(asked[0]) == BUDGET + LENGTH % CHUNK
    known["context"].close()
