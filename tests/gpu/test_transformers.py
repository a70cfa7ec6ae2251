"""The cache of transformers on the device, with a random model: against a model on the CPU, and against NumPy."""

from __future__ import annotations

import pytest

from graphkv import H2O, Absorb, AdaKV, BackendUnavailableError, Degree, GraphKV, SnapKV

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from graphkv.integrations.transformers import EvictingCache, evicting, observing  # noqa: E402
from graphkv.integrations.transformers.versions import with_cache  # noqa: E402
from tests.gpu.conftest import no_waiting, torch_device  # noqa: E402
from tests.integrations.reference import SlowReference, attending  # noqa: E402
from tests.integrations.tiny import tiny_llama  # noqa: E402

pytestmark = pytest.mark.gpu
N = 40
CALLS = [N, 1, 1, 1, 1, 3, 2, 7, 1, 3]
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
POLICIES = {
    "snapkv": SNAPKV,
    "the paper": GraphKV(SNAPKV),
    "degree": GraphKV(SNAPKV, Degree()),
    "h2o": H2O(budget=12),
    "heads": AdaKV(SNAPKV),
    # Loose, so that random keys are near enough.
    "merges": Absorb(SNAPKV, threshold=0.2),
}
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# Its name is that of the library, so that -k finds it.
@pytest.fixture(scope="module", params=["torch-cuda"])
def device():
    try:
        return torch_device()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, sum(CALLS)), generator=torch.Generator().manual_seed(4))


def on(device, cache):
    return {x.device.type for layer in cache.layers for x in (layer.keys, layer.values)} == {device}


@torch.inference_mode()
def read(model, cache, ids, calls=CALLS):
    logits, seen = [], 0
    for length in calls:
        logits.append(model(ids[:, seen : seen + length], **with_cache(model, cache)).logits)
        seen += length
    return torch.cat(logits, dim=1)


@each_policy
@torch.inference_mode()
def test_logits_are_those_of_the_slow_reference(device, ids, policy):
    """Which runs on the CPU, over the same weights: a prompt, then an eviction whenever 4 tokens have come."""
    slow = SlowReference(policy, CALLS, every=4)
    model = tiny_llama()
    with attending(model, slow):
        wanted = model(ids, use_cache=False).logits
    model = tiny_llama().to(device)
    with observing(model):
        cache = EvictingCache(policy, every=4)
        logits = read(model, cache, ids.to(device))

    assert on(device, cache)
    torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    for layer in cache.attention_layers:
        assert [[p for p in row if p >= 0] for row in layer.true_positions[0].tolist()] == slow.kept[layer.index]


@each_policy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_device_keeps_what_numpy_keeps_of_the_same_keys(device, ids, policy, dtype):
    model = tiny_llama().to(device, getattr(torch, dtype))
    with observing(model):
        whole = EvictingCache(num_queries=N)
        read(model, whole, ids.to(device), [N])
    kept = []
    for backend in ("torch", "numpy"):
        cache = whole.copy()
        cache.evict(policy, backend=backend)
        kept.append([layer.true_positions.tolist() for layer in cache.attention_layers])

    assert kept[0] == kept[1]


@each_policy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_stays_at_its_budget(device, ids, policy, dtype):
    model = tiny_llama().to(device, getattr(torch, dtype))
    with evicting(model, policy, every=4) as run:
        output = model.generate(
            ids[:, :N].to(device), attention_mask=torch.ones_like(ids[:, :N]).to(device), max_new_tokens=12,
            min_new_tokens=12, do_sample=False,
        )  # fmt: skip

    assert output.shape == (1, N + 12)
    assert on(device, run.cache)
    kept = [(layer.true_positions >= 0).sum().item() for layer in run.cache.attention_layers]
    # Two heads; 11 of the new tokens were read, and the last three came after the last eviction.
    assert kept == [2 * (policy.budget + 3)] * 3


def test_a_decoding_step_does_not_wait_only_on_a_device(device, ids):
    model = tiny_llama().to(device)
    with observing(model), torch.inference_mode():
        cache = EvictingCache(GraphKV(SNAPKV, Degree()), every=4)
        read(model, cache, ids.to(device), [N, 1, 1, 1, 1])
        token, options = ids[:, :1].to(device), with_cache(model, cache)
        with no_waiting():
            for _ in range(4):
                model(token, **options)

    assert cache.get_seq_length() == N + 8
