"""Copies and files of a cache go on as the cache itself would; what is no cache of ours is refused by name."""

import copy
import dataclasses
import io
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM, cache_utils

import graphkv
from graphkv import (
    CAKE,
    H2O,
    AdaKV,
    ArgumentError,
    ArgumentTypeError,
    Degree,
    GraphKV,
    KeyDiff,
    KNorm,
    PageRank,
    PerLayer,
    Policy,
    PyramidKV,
    RoCo,
    SnapKV,
)
from graphkv.backends.numpy import SPARSE
from graphkv.integrations.transformers import EvictingCache, EvictingLayer, observing, storage
from graphkv.integrations.transformers.queries import Queries
from graphkv.integrations.transformers.rotary import Rotation
from graphkv.integrations.transformers.settings import Settings
from graphkv.integrations.transformers.slots import Slots
from graphkv.integrations.transformers.source import Source
from graphkv.integrations.transformers.versions import with_cache
from tests.integrations.tiny import FAMILIES, SIZES, tiny, tiny_gemma3, tiny_llama

ROOT = Path(__file__).parents[2]
N = 40
SNAPKV = SnapKV(budget=14, window=6, kernel_size=3)
# Name to (policy, options of the cache, model).
CASES = {
    "no policy": (None, {"num_queries": 7}, "llama"),
    "once": (SNAPKV, {}, "llama"),
    "a window that reaches back": (GraphKV(SNAPKV), {"every": 4}, "llama"),
    "records of numpy": (GraphKV(SNAPKV), {"every": 4, "record": True, "backend": "numpy"}, "llama"),
    "records of torch": (GraphKV(SNAPKV), {"every": 4, "record": True, "backend": "torch"}, "llama"),
    "sums": (H2O(budget=12), {"every": 4}, "llama"),
    "sums of numpy": (RoCo(budget=14, num_sinks=1, num_recent=3), {"every": 4, "backend": "numpy"}, "llama"),
    "heads of different size": (AdaKV(SNAPKV), {"every": 4, "record": True}, "llama"),
    "heads with sums": (AdaKV(H2O(budget=12)), {"every": 4}, "llama"),
    "rows of different size": (CAKE(budget=14, window=6, kernel_size=3), {"every": 4, "record": True}, "llama"),
    "layers of different size": (PyramidKV(budget=14, window=6, kernel_size=3, beta=4), {"every": 4}, "llama"),
    "two policies": (PerLayer(SNAPKV, policies=[SNAPKV, GraphKV(SNAPKV, Degree())]), {"every": 4}, "llama"),
    "turned keys": (SNAPKV, {"every": 4, "rerotate": True}, "llama"),
    "keys turned back": (GraphKV(KNorm(budget=12), Degree(), unrotated=True), {"every": 4, "rerotate": True}, "llama"),
    "sliding and full layers": (GraphKV(SNAPKV, PageRank()), {"every": 4}, "gemma3-mixed"),
    "sliding layers": (H2O(budget=12), {"every": 4}, "mistral-sliding"),
    "a protected prompt": (KNorm(budget=48), {"every": 4, "protect_prompt": True}, "llama"),
    "a share": (KNorm(budget=0.5), {"every": 4}, "qwen3"),
    "learned positions": (KeyDiff(budget=12), {"every": 4}, "gpt2"),
}
if hasattr(cache_utils, "LinearAttentionLayer"):
    CASES |= {
        "layers of linear attention": (H2O(budget=12), {"every": 4}, "lfm2"),
        "layers with a state space": (SNAPKV, {"every": 4}, "falcon-h1"),
        "layers without a cache": (KNorm(budget=12), {"every": 4}, "gemma3n"),
    }
STATE_SPACE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
SHARED = {"num_kv_shared_layers": 1, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
OTHER_FAMILIES = {
    "lfm2": lambda: tiny(
        transformers.Lfm2ForCausalLM, transformers.Lfm2Config, **SIZES, layer_types=["conv", "full_attention", "conv"]
    ),
    "falcon-h1": lambda: tiny(
        transformers.FalconH1ForCausalLM, transformers.FalconH1Config, **SIZES, **STATE_SPACE, mamba_chunk_size=8
    ),
    "gemma3n": lambda: tiny(
        transformers.Gemma3nForCausalLM, transformers.Gemma3nTextConfig, **SIZES, **SHARED,
        layer_types=["full_attention"] * 3, activation_sparsity_pattern=[0.0] * 3, laurel_rank=4,
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)
MODELS = {}


def of(case):
    policy, options, family = CASES[case]
    if family not in MODELS:
        MODELS[family] = (FAMILIES | OTHER_FAMILIES)[family]()
    return policy, options, MODELS[family]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, N + 18), generator=torch.Generator().manual_seed(4))


def read(model, cache, ids, calls):
    """Feed two rows, the second with 5 tokens of padding, from where the cache stands; give the logits."""
    seen, logits = cache.get_seq_length(), []
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with observing(model), torch.inference_mode():
        for number in calls:
            seen, begin = seen + number, seen
            logits.append(model(ids[:, begin:seen], attention_mask=mask[:, :seen], **with_cache(model, cache)).logits)
    return torch.cat(logits, dim=1)


def in_the_middle(case, ids):
    """A cache after a prompt and several evictions, some tokens after the last."""
    policy, options, model = of(case)
    cache = EvictingCache(policy, **options)
    read(model, cache, ids, [N, 1, 1, 3, 1])
    return model, cache


def by_torch(cache, path):
    path = path.with_suffix(".pt")  # by its name, torch would take it for safetensors
    torch.save(cache, path)
    return torch.load(path, weights_only=False)


def by_file(cache, path, **options):
    cache.save(path)
    return EvictingCache.load(path, **options)


COPIES = {
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "deepcopy": lambda cache, path: copy.deepcopy(cache),
    "torch.save": by_torch,
    "save": by_file,
}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())


def stored(cache):
    """All that a cache stores, as plain values."""
    layers = [
        [layer.keys.tolist(), layer.values.tolist(), layer.true_positions.tolist(), layer.num_seen, layer.budget]
        for layer in cache.attention_layers
    ]
    states = [getattr(layer, name, {}) for layer in cache.layers for name in storage.LINEAR_TENSORS]
    return layers, [[None if each is None else each.tolist() for each in state.values()] for state in states]


@each_copy
@each_case
def test_a_copy_goes_on_as_the_cache_itself(case, copied, ids, tmp_path):
    model, cache = in_the_middle(case, ids)
    made = copied(cache, tmp_path / "cache.safetensors")
    assert made.settings == cache.settings
    assert made.report().splitlines()[:2] == cache.report().splitlines()[:2]
    calls = [1, 1, 1, 1, 3]

    assert torch.equal(read(model, made, ids, calls), read(model, cache, ids, calls))
    assert stored(made) == stored(cache)
    evictions = [layer.num_evictions for layer in made.attention_layers]
    assert evictions == [layer.num_evictions for layer in cache.attention_layers]
    assert max(evictions) == (0 if CASES[case][0] is None else 1 if "every" not in CASES[case][1] else 4)


@each_copy
def test_a_copy_is_independent(copied, ids, tmp_path):
    model, cache = in_the_middle("heads with sums", ids)
    before = stored(cache)
    made = copied(cache, tmp_path / "cache.safetensors")
    for layer in made.layers:
        for tensor in (layer.keys, layer.values, layer.positions, layer.valid, *layer.state.values()):
            tensor.zero_()
    read(model, made, ids, [6])

    assert stored(cache) == before


@pytest.mark.parametrize("copied", list(COPIES.values())[:3], ids=list(COPIES)[:3])
def test_records_are_copied(copied, ids, tmp_path):
    _, cache = in_the_middle("records of numpy", ids)
    made = copied(cache, tmp_path / "cache.pt")

    assert made.report() == cache.report()
    (old,), (new,) = (each.layers[1].record.decisions for each in (cache, made))
    assert new.backend is old.backend
    assert new.kept.tolist() == old.kept.tolist()
    assert new.kept is not old.kept
    assert "suppressed" in made.report()


def test_records_are_not_saved_and_the_next_eviction_makes_new_ones(ids, tmp_path):
    model, cache = in_the_middle("records of numpy", ids)
    made = by_file(cache, tmp_path / "cache")
    assert [layer.record for layer in made.layers] == [None] * 3
    read(model, made, ids, [4])
    read(model, cache, ids, [4])

    assert made.layers[0].record.decisions[0].kept.tolist() == cache.layers[0].record.decisions[0].kept.tolist()


def test_records_of_jax_are_copied(ids):
    pytest.importorskip("jax")
    model = tiny_llama()
    cache = EvictingCache(KNorm(budget=12), every=4, record=True, backend="jax")
    read(model, cache, ids, [N])
    for made in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert made.settings.backend is cache.settings.backend
        assert made.layers[0].record.decisions[0].kept.tolist() == cache.layers[0].record.decisions[0].kept.tolist()


GO_ON = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from tests.integrations.test_storage import EvictingCache, go_on

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
cache = EvictingCache.load(folder / "cache", model=model)
print(go_on(model, cache, torch.load(folder / "prompt.pt"), int(sys.argv[2])))
"""


def run(program, *arguments):
    """Run a program in another process; give what it printed."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.strip()


def go_on(model, cache, prompt, beams, num_new=9):
    """Generate after what the cache has seen; give the tokens and how often it was evicted."""
    options = {"attention_mask": torch.ones_like(prompt), "num_beams": beams, "do_sample": False}
    with observing(model):
        out = model.generate(prompt, max_new_tokens=num_new, **options, **with_cache(model, cache))
    return out.tolist(), [layer.num_evictions for layer in cache.layers]


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_goes_on_from_a_file_in_another_process(beams, ids, tmp_path):
    """Token for token, as the cache at hand would."""
    model = tiny_llama()
    cache = EvictingCache(GraphKV(H2O(budget=12)), every=4)
    turn, _ = go_on(model, cache, ids[:1, :N], 1, 6)
    prompt = torch.cat([torch.tensor(turn), ids[1:, :5]], dim=1)
    torch.save(prompt, tmp_path / "prompt.pt")
    model.save_pretrained(tmp_path / "model")
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    cache.save(tmp_path / "cache")
    found = run(GO_ON, tmp_path, beams)
    tokens, evictions = go_on(model, cache, prompt, beams)

    assert found == str((tokens, evictions))
    assert evictions == [evictions[0]] * 3
    assert evictions[0] > 3


def test_beams_are_saved(ids, tmp_path):
    """Rows that are repeated and put in another order stay so."""
    model, cache = in_the_middle("rows of different size", ids)
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([2, 0, 1, 5, 3, 3]))
    made = by_file(cache, tmp_path / "cache", model=model)

    assert stored(made) == stored(cache)
    assert made.layers[1].row_budgets.tolist() == cache.layers[1].row_budgets.tolist()
    assert made.layers[0].keys.shape[0] == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_is_saved(dtype, ids, tmp_path):
    model = tiny_llama().to(dtype)
    cache = EvictingCache(H2O(budget=12), every=4)
    read(model, cache, ids, [N, 2])
    made = by_file(cache, tmp_path / "cache", model=model)

    assert made.layers[0].keys.dtype == made.layers[0].values.dtype == dtype
    assert {each.dtype for each in made.layers[0].state.values()} == {
        each.dtype for each in cache.layers[0].state.values()
    }
    assert torch.equal(read(model, made, ids, [5]), read(model, cache, ids, [5]))


def test_tensors_that_share_memory_or_have_gaps_are_saved(ids, tmp_path):
    """The values are the keys, and both are parts of larger ones: as after a crop, or in models that share them."""
    _, cache = in_the_middle("no policy", ids)
    for layer in cache.layers:
        layer.keys = layer.values = torch.cat([layer.keys] * 2, dim=2)[:, :, : layer.num_stored]
    made = by_file(cache, tmp_path / "cache")

    assert stored(made) == stored(cache)
    assert (tmp_path / "cache").stat().st_size < 3 * 2 * cache.layers[0].keys.nbytes + 3 * 10_000
    made.layers[0].keys.zero_()
    assert made.layers[0].values.any()


def test_what_waits_for_a_crop_waits_after_loading(ids, tmp_path):
    model = tiny_llama()
    cache = EvictingCache(SNAPKV, every=4)
    cache.activate_past_recording()
    read(model, cache, ids, [N, 6])
    made = by_file(cache, tmp_path / "cache", model=model)
    assert made.layers[0].due_at == cache.layers[0].due_at == N + 6
    for each in (cache, made):
        each.crop(-3)

    assert stored(made) == stored(cache)
    assert made.layers[0].num_evictions == 1
    assert torch.equal(read(model, made, ids, [4]), read(model, cache, ids, [4]))
    assert made.layers[0].due_at is not None


def test_a_cache_without_a_policy_is_evicted_after_loading(ids, tmp_path):
    model, cache = in_the_middle("no policy", ids)
    for policy in (KNorm(budget=9), GraphKV(KNorm(budget=9), unrotated=True)):
        made, twin = by_file(cache, tmp_path / "cache", model=model), cache.copy()
        made.evict(policy)
        twin.evict(policy)
        assert stored(made) == stored(twin)


def test_keys_are_turned_after_loading_without_a_model(ids, tmp_path):
    model, cache = in_the_middle("no policy", ids)
    policy = GraphKV(KNorm(budget=9), unrotated=True)
    made = by_file(cache, tmp_path / "cache")
    # Saved again without ever having met the model, it is still checked against it.
    made.save(tmp_path / "again")
    again = EvictingCache.load(tmp_path / "again", model=model)
    for each in (cache, made, again):
        each.evict(policy)
    assert stored(made) == stored(again) == stored(cache)


@pytest.mark.parametrize(
    "change",
    [
        {"first": [0, 99, 1, 2]},
        {"columns": [0, 1, 2, 8]},
        {"second": [4, 5, 6]},
        {"second": [0, 5, 6, 7]},
        {"frequencies": [[1.0, 0.1], [1.0]]},
        {"frequencies": [["1.0"] * 8]},
        {"scaling": 0.0},
        {"refusal": 7},
    ],
    ids=str,
)
def test_a_rotation_that_cannot_be_is_refused(ids, tmp_path, change):
    _, cache = in_the_middle("no policy", ids)
    cache.layers[1].rotation = dataclasses.replace(cache.layers[1].rotation, **change)
    cache.save(tmp_path / "cache")
    with pytest.raises(ArgumentError, match=r"its layers\.1\.rotation must hold pairs of a head of 8"):
        EvictingCache.load(tmp_path / "cache")


def test_an_empty_cache_and_one_that_was_reset_are_saved(ids, tmp_path):
    model, cache = in_the_middle("sums", ids)
    expected = EvictingCache(cache.policy, every=4)
    cache.reset()
    for each in (cache, EvictingCache(cache.policy, every=4)):
        made = by_file(each, tmp_path / "cache", model=model)
        assert made.get_seq_length() == 0
        assert torch.equal(read(model, made, ids, [N, 3]), read(model, expected, ids, [N, 3]))
        expected = EvictingCache(cache.policy, every=4)


def test_the_warning_of_growth_is_not_given_again(ids, tmp_path):
    model = tiny_llama()
    cache = EvictingCache(KNorm(budget=4))
    with pytest.warns(graphkv.GraphKVWarning, match="have come since the only eviction"):
        read(model, cache, ids, [N, 6])
    # Warnings are errors here.
    read(model, by_file(cache, tmp_path / "cache"), ids, [2])


# ------------------------------------------------------------------------------------------------- what is in the file


@each_case
def test_every_attribute_of_a_layer_is_saved_or_listed_as_not_saved(case, ids):
    _, cache = in_the_middle(case, ids)
    inside = {*(each.name for each in dataclasses.fields(Slots)), *Queries._fields}
    tables = [set(storage.TENSORS) - inside, set(storage.VALUES), storage.OTHERS, storage.NOT_SAVED]
    linear = [set(storage.LINEAR), set(storage.LINEAR_TENSORS), storage.LINEAR_OTHERS, storage.LINEAR_NOT_SAVED]
    expected = {"EvictingLayer": set.union(*tables), "LinearAttentionLayer": set.union(*linear)}
    expected["HybridEvictingLayer"] = set.union(*tables, *linear)
    expected["DummyLayer"] = {"is_initialized", "keys", "values", "dtype"}  # nothing is in there

    assert inside <= {*storage.TENSORS, "state"}
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert sum(map(len, linear)) == len(set.union(*linear))
    assert set(expected) == set(storage.LAYERS)
    for layer in cache.layers:
        # Releases of transformers before 5.24 note the dtype.
        assert set(vars(layer)) | {"dtype"} == expected[type(layer).__name__]


def test_every_setting_and_every_field_of_a_source_is_saved():
    assert {each.name for each in dataclasses.fields(Settings)} == {
        *storage.SETTINGS, "policy", "backend", "is_probing",
    }  # fmt: skip
    assert {each.name for each in dataclasses.fields(Source)} == {*storage.SOURCE, "kind", "config", "layer_kinds"}


def test_every_attribute_of_a_cache_is_saved_or_follows():
    follows = {"settings", "layers", "layer_class_to_replicate", "offloading", "_latest"}

    assert set(vars(EvictingCache())) == {*storage.CACHE, "history", *follows}
    assert set(vars(EvictingCache().history)) == {"num_summed", "sums", "recent", "num_recent"}


def test_loading_gives_every_saved_attribute_back(ids, tmp_path):
    """Each set to something that no other has and no fresh layer would have."""
    model, cache = in_the_middle("rows of different size", ids)
    for number, name in enumerate(name for name, kinds in storage.CACHE.items() if name != "num_seen"):
        setattr(cache, name, True if storage.CACHE[name] == (bool,) else 30 + number)
    cache.history.num_summed, cache.history.sums = 6, torch.tensor([2**62, -5])
    cache.history.recent = [torch.randint(97, (2, length)) for length in (3, 1)]
    for layer in cache.layers:
        stored, rows = layer.num_stored, layer.keys.shape[:2]
        layer.budget, layer.num_evictions, layer.num_dropped, layer.bytes_freed, layer.seconds = 21, 22, 23, 24, 2.5
        layer.num_new, layer.sliding_window, layer.evicts, layer.due_at, layer.record_past = 26, 27, False, 28, True
        layer.certain, layer.has_holes = 29, True
        layer.held = layer.held._replace(asked=torch.arange(layer.held.num_queries).repeat(2, 1))
        layer.num_hidden = torch.tensor([0, 3])
        layer.slots = dataclasses.replace(
            layer.slots,
            places=torch.arange(100, 100 + stored).expand(*rows, stored)[..., None],
            pinned=(torch.arange(stored) % 3 == 0).expand(*rows, stored),
            mass=1 + torch.rand(*rows, stored),
            absorbed=torch.randint(9, (*rows, stored), dtype=torch.int32),
            state={"a.b": torch.rand(*rows, stored - 1, 3), "c": torch.rand(*rows, stored)},
        )
        layer.layer_state = {"d.e": torch.rand(2, 3), "f": torch.tensor([1, 2])}
        layer.rotation = Rotation(
            first=(0, 5), second=(3, 2), columns=(1, 0), frequencies=((0.5, 0.25),), scaling=2.0, refusal="as it is"
        )
        layer.source = dataclasses.replace(layer.source, has_all_heads=False, has_whole_groups=False)
    made = by_file(cache, tmp_path / "cache", model=model)

    assert [getattr(made, name) for name in storage.CACHE] == [getattr(cache, name) for name in storage.CACHE]
    assert made.history.num_summed == 6
    assert made.history.sums.tolist() == [2**62, -5]
    assert [each.tolist() for each in made.history.recent] == [each.tolist() for each in cache.history.recent]
    assert len(made.history) == 6 + 3 + 1
    for layer, copied in zip(cache.layers, made.layers, strict=True):
        assert copied.queries is not None
        assert_same_tensors(vars(copied.slots), vars(layer.slots))
        assert_same_tensors(copied.held._asdict(), layer.held._asdict())
        for name, value in vars(layer).items():
            if name in {"settings", "record", "_slots", "_held"}:
                continue
            found = getattr(copied, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value), name
            elif name == "layer_state":
                assert_same_tensors(found, value)
            else:
                assert found == value, name
                assert type(found) is type(value), name


def assert_same_tensors(one, other):
    """In every field, and all of them are there."""
    assert one.keys() == other.keys()
    for name, value in other.items():
        found = one[name]
        if name == "state":
            assert found.keys() == value.keys()
            assert all(torch.equal(found[each], value[each]) for each in value)
        else:
            assert torch.equal(found, value), name


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[storage.HEADER])


def test_the_header_says_what_wrote_it(ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    cache.save(tmp_path / "cache")
    header = header_of(tmp_path / "cache")

    assert (header["version"], header["graphkv"]) == (1, graphkv.__version__)
    assert header["policy"]["class"] == "SnapKV"
    assert header["model"]["attention"] == "LlamaAttention"


# ------------------------------------------------------------------------------------------------------ whole or not


def test_a_failing_disk_leaves_what_was_there(ids, tmp_path):
    """Files may not become as large as the cache for a while."""
    resource = pytest.importorskip("resource", reason="this system cannot limit the size of files")
    _, cache = in_the_middle("once", ids)
    path = tmp_path / "cache"
    EvictingCache(SNAPKV).save(path)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(before), limits[1]))
    try:
        with pytest.raises(ArgumentError, match=f"path {path} cannot be written: .*too large"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == before


def test_a_cache_replaces_an_older_one_and_can_be_read_by_whom_the_umask_says(ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    path = tmp_path / "cache"
    path.write_text("something older")
    cache.save(str(path))
    (tmp_path / "other").touch()

    assert stored(EvictingCache.load(str(path))) == stored(cache)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "words"), [("no/folder", "No such file"), (".", "directory"), ("a" * 300, "too long"), ("a\0b", "null")]
)
def test_a_path_that_cannot_be_written_is_named(name, words, tmp_path):
    with pytest.raises(ArgumentError, match=f"path .* cannot be written: .*{words}"):
        EvictingCache().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentError, match="cannot be written: Permission denied"):
        EvictingCache().save(tmp_path / "cache")


def test_what_is_no_path_is_refused():
    with pytest.raises(ArgumentTypeError, match="path must be a path; got int"):
        EvictingCache().save(3)
    with pytest.raises(ArgumentTypeError, match="path must be a path; got BytesIO"):
        EvictingCache.load(io.BytesIO())


def test_a_broken_off_forward_pass_is_not_saved(ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    cache.layers[1].awaits_queries = True
    with pytest.raises(ArgumentError, match="the cache must come from a finished forward pass"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_loaded_cache_does_not_hang_on_its_file(ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    made = by_file(cache, tmp_path / "cache")
    with (tmp_path / "cache").open("r+b") as file:
        file.write(bytes((tmp_path / "cache").stat().st_size))

    assert stored(made) == stored(cache)


# ------------------------------------------------------------------------------------------------- policies and models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oldest(Policy):
    """A policy of the user's own."""

    step: int = 1

    def score(self, layer, memory):
        return -layer.xp.cumulative_sum(layer.xp.ones_like(layer.keys[..., 0]), axis=-1)


class Jealous(CAKE):
    """A policy of the user's own that shares budgets out."""


def test_a_policy_of_ones_own_is_handed_to_load(ids, tmp_path):
    model, policy, path = tiny_llama(), GraphKV(Oldest(budget=9, step=3)), tmp_path / "cache"
    cache = EvictingCache(policy, every=4)
    read(model, cache, ids, [N])
    cache.save(path)
    with pytest.raises(ArgumentError, match=r"cache cannot be loaded: policy must be given, .*'Oldest', .*'step': 3"):
        EvictingCache.load(path)
    for other in (KNorm(budget=9), GraphKV(Oldest(budget=9)), Oldest(budget=9, step=3)):
        with pytest.raises(ArgumentError, match="policy must be the one that it was saved with"):
            EvictingCache.load(path, policy=other)
    made = EvictingCache.load(path, policy=policy)

    assert made.policy is policy
    assert torch.equal(read(model, made, ids, [9]), read(model, cache, ids, [9]))


def test_another_policy_than_that_of_the_file_is_refused(ids, tmp_path):
    """What an earlier budget dropped cannot come back."""
    _, cache = in_the_middle("once", ids)
    cache.save(tmp_path / "cache")

    assert EvictingCache.load(tmp_path / "cache", policy=SNAPKV).policy == SNAPKV
    for other in (dataclasses.replace(SNAPKV, budget=15), KNorm(budget=14)):
        with pytest.raises(ArgumentError, match="policy must be the one that it was saved with"):
            EvictingCache.load(tmp_path / "cache", policy=other)
    with pytest.raises(ArgumentTypeError, match="policy must be a Policy; got str"):
        EvictingCache.load(tmp_path / "cache", policy="snapkv")


def test_budgets_that_a_policy_of_ones_own_shared_out(ids, tmp_path):
    """The cache's own is found again; another one would be lost, and with it the budgets."""
    model, policy = tiny_llama(), Jealous(budget=14, window=6, kernel_size=3)
    cache = EvictingCache(policy, every=4)
    read(model, cache, ids, [N])
    made = by_file(cache, tmp_path / "cache", policy=policy)
    assert made.layers[0].shared_by == policy
    assert torch.equal(read(model, made, ids, [9]), read(model, cache, ids, [9]))

    without = EvictingCache(num_queries=6)
    read(model, without, ids, [N])
    without.evict(policy)
    with pytest.raises(ArgumentError, match=r"shared out by a policy of your own, .*; got Jealous"):
        without.save(tmp_path / "other")


def test_a_backend_of_ones_own_is_handed_to_load(ids, tmp_path):
    """Also one that has the name of a shipped one: a file chooses nothing that would have to be imported."""
    model, path = tiny_llama(), tmp_path / "cache"
    for backend in (SPARSE, dataclasses.replace(SPARSE, name="numpy")):
        cache = EvictingCache(KNorm(budget=9), every=4, backend=backend)
        read(model, cache, ids, [N])
        cache.save(path)
        with pytest.raises(ArgumentError, match=rf"backend must be given, .*; got {backend.name} \(not built in\)"):
            EvictingCache.load(path)
        assert EvictingCache.load(path, backend=backend).settings.backend is backend
    assert EvictingCache.load(path, backend="torch").settings.backend.name == "torch"


OTHER_MODELS = {
    "another number of layers": (lambda: tiny_llama(num_hidden_layers=2), "num_hidden_layers=3 and not 2"),
    "another number of KV heads": (lambda: tiny_llama(num_key_value_heads=3), "num_key_value_heads=2 and not 3"),
    "another head size": (lambda: tiny_llama(head_dim=16), "head_dim=8 and not 16"),
    "another base of the rotary embedding": (
        lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        "rope_parameters=.*10000.* and not .*500",
    ),
    "another kind": (lambda: tiny(Qwen3ForCausalLM, Qwen3Config, **SIZES, head_dim=8), "LlamaAttention; .* has none"),
    "no model of transformers": (lambda: torch.nn.Linear(3, 3), "LlamaAttention; Linear has none"),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_another_model_is_refused(other, ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    cache.save(tmp_path / "cache")
    make, words = OTHER_MODELS[other]
    with pytest.raises(ArgumentError, match=f"cache cannot be loaded: model must be the one .*{words}"):
        EvictingCache.load(tmp_path / "cache", model=make())


def test_a_model_inside_another_one_and_its_base_model_are_found(ids, tmp_path):
    model, cache = in_the_middle("sliding and full layers", ids)
    cache.save(tmp_path / "cache")
    for each in (model, model.model, torch.nn.ModuleList([torch.nn.Linear(2, 2), model])):
        made = EvictingCache.load(tmp_path / "cache", model=each)
        assert [layer.source.kind for layer in made.layers] == [layer.source.kind for layer in cache.layers]
        assert all(layer.source.config is model.config for layer in made.layers)
    with pytest.raises(ArgumentTypeError, match="model must be a Module; got LlamaConfig"):
        EvictingCache.load(tmp_path / "cache", model=LlamaConfig())


def test_tensors_go_where_they_are_sent(ids, tmp_path):
    _, cache = in_the_middle("heads with sums", ids)
    made = by_file(cache, tmp_path / "cache", device="meta")

    for layer in made.layers:
        tensors = [layer.keys, layer.values, layer.positions, layer.valid, *layer.state.values()]
        assert {each.device.type for each in tensors} == {layer.device.type} == {"meta"}


# ------------------------------------------------------------------------------------------------------ strange files


def test_files_that_are_not_ours_are_refused(ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    path = tmp_path / "cache"
    cache.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:200], whole[:-1], whole + b"x", b"x" * 5000, pickle.dumps(cache)):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=f"path {path} cannot be loaded: it must be a whole safetensors file"):
            EvictingCache.load(path)
    save_file({"keys": torch.ones(3)}, path)
    with pytest.raises(ArgumentError, match="cache cannot be loaded: it must be a cache that graphkv saved"):
        EvictingCache.load(path)
    with pytest.raises(ArgumentError, match="none cannot be loaded: No such file"):
        EvictingCache.load(tmp_path / "none")
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        EvictingCache.load(tmp_path)


def tampered(path, change):
    """Write a file again after `change(header, tensors)`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[storage.HEADER])
    text = change(header, tensors)
    save_file(tensors, path, metadata={storage.HEADER: text if isinstance(text, str) else json.dumps(header)})


def at(*keys, value):
    """A change of one place in the header; a number after "layers" is a layer."""

    def change(header, tensors):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def tensor(name, function):
    def change(header, tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return change


def without(name, named=False):
    def change(header, tensors):
        del tensors[name]
        if not named:
            header["tensors"].remove(name)

    return change


def renamed(name, other):
    def change(header, tensors):
        tensors[other] = tensors.pop(name)
        header["tensors"] = sorted(tensors)

    return change


DEEP = "[" * 5000 + "]" * 5000
NESTED = '{"class": "GraphKV", "base": ' * 400 + "3" + "}" * 400
TAMPERED = {
    "no JSON": (lambda header, tensors: "{", "its header must be JSON"),
    "no object": (lambda header, tensors: "3", "its format must be version 1, .*; got None"),
    "deep": (lambda header, tensors: DEEP, "its header"),
    "nested": (
        lambda header, tensors: json.dumps(header | {"policy": "here"}).replace('"here"', NESTED),
        "nested too deeply|GraphKV must be right",
    ),
    "a later version": (at("version", value=2), rf"version 1, which graphkv {graphkv.__version__} reads; got 2"),
    "a surplus field": (at("surplus", value=2), r"its header must hold .*; got .*'surplus'"),
    "a missing setting": (lambda header, tensors: header["settings"].clear(), "its settings must hold every"),
    "a setting of another type": (at("settings", "every", value="4"), "its settings must have every of type int"),
    "a setting out of range": (at("settings", "every", value=0), "every must be at least 1"),
    "a bool for a number": (at("layers", 0, "attention", "values", "num_seen", value=True), "num_seen of type int"),
    "a negative number": (at("layers", 1, "attention", "values", "num_new", value=-1), "not below 0; got '-1'"),
    "not a number": (at("layers", 1, "attention", "values", "seconds", value=float("nan")), "seconds of type float"),
    "layers of different age": (at("layers", 1, "attention", "values", "num_seen", value=90), "finished forward pass"),
    "tokens never seen": (at("layers", 0, "attention", "values", "num_seen", value=9), "positions must ascend"),
    "an unknown policy": (at("policy", value={"class": "os.system"}), "policy must be one of .*AdaKV.*got 'os.system'"),
    "a foreign policy": (at("policy", value={"foreign class": "x"}), "policy must be given"),
    "an unknown option": (at("policy", "sink", value=3), "SnapKV must be its own; it has no sink"),
    "no policy but an option": (at("policy", value={}), "policy must be given"),
    "an unknown backend": (at("backend", value="os"), "backend must be given, .*; got os"),
    "no layer": (at("layers", 0, value=3), "its layers.0 must hold"),
    "a layer less": (lambda header, tensors: header["layers"].pop(), r"no more tensors .*layers\.2\.keys"),
    "no model": (at("model", value=None), "its model must be described"),
    "half a model": (lambda header, tensors: header["model"].pop("head_dim"), "must be described by at"),
    "a layer that the model lacks": (at("layers", 0, "attention", "source", "index", value=3), "as index; got 3"),
    "no list of tensors": (at("tensors", value=["x", ["y"]]), "it must hold the tensors that its header names"),
    "an attribute that is no tensor": (renamed("layers.0.keys", "layers.0.update"), "must have keys and values"),
    "a missing tensor": (without("layers.1.values", named=True), r"its header names; .*\['layers\.1\.values'\]"),
    "a tensor that a layer needs": (without("layers.1.values"), "layers.1 must have keys and values; got .*'keys'"),
    "a surplus tensor": (lambda header, tensors: tensors.update(x=torch.ones(1)), r"its header names; .* \['x'\]"),
    "a tensor of no layer": (renamed("layers.2.queries", "layers.20.queries"), r"no more tensors .*layers\.20"),
    "another class": (at("layers", 0, "kind", value="DynamicCache"), "must be EvictingLayer, .*; got 'DynamicCache'"),
    "a kind without its part": (at("layers", 0, "kind", value="DummyLayer"), "parts of its kind; got 'DummyLayer'"),
    "ids of other rows": (tensor("history.recent.0", lambda x: x[:1]), "its history must hold integers for each of 2"),
    "ids that are no integers": (tensor("history.recent.0", lambda x: x * 0.5), "its history must hold integers"),
    "a sum of nothing": (at("num_summed", value=3), "its history must hold integers for each of 2 rows, of no more"),
    "another batch": (tensor("layers.1.keys", lambda x: x[:1]), r"layers.1.keys must have shape \(2, kv_heads, stored"),
    "fewer values": (tensor("layers.1.values", lambda x: x[:, :, 1:]), r"layers.1.values must have shape \(2, 2, 20"),
    "fewer positions": (tensor("layers.0.positions", lambda x: x[..., 1:]), r"positions must have shape \(2, 2, 20"),
    "keys of three axes": (tensor("layers.0.keys", lambda x: x[0]), "layers.0.keys must have shape"),
    "whole keys": (tensor("layers.0.keys", lambda x: x.long()), "keys must be of dtype float; got torch.int64"),
    "positions of no queries": (
        lambda header, tensors: (tensors.update(x=torch.zeros(2, 3).long()), tensors.pop("layers.0.queries"))
        and renamed("x", "layers.0.asked")(header, tensors),
        "must have queries with its asked",
    ),
    "query heads that do not fit": (tensor("layers.0.queries", lambda x: x[:, 1:]), "query heads for each of 2 KV"),
    "positions that are floats": (tensor("layers.0.positions", lambda x: x.float()), "must be of dtype torch.int64"),
    "positions in disorder": (tensor("layers.0.positions", lambda x: x.flip(-1)), "layers.0.positions must ascend"),
    "unused slots that are not masked": (tensor("layers.0.positions", lambda x: x * 0 - 1), "positions must ascend"),
    "no positions": (without("layers.0.positions"), "must store 46 tokens, or .*; it stores 20"),
    "budgets of other rows": (at("layers", 0, "attention", "row_budgets", value=[3]), "must be a count for each row"),
    "budgets that are no counts": (at("layers", 0, "attention", "row_budgets", value=[3, "4"]), "must be a count"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_is_refused_by_what_is_wrong(name, ids, tmp_path):
    _, cache = in_the_middle("once", ids)
    cache.layers[0].slots = dataclasses.replace(cache.layers[0].slots, valid=None)
    cache.history.num_summed, cache.history.sums, cache.history.recent = 0, None, [ids[:, : cache.num_seen]]
    for layer in cache.layers:
        layer.held = Queries(queries=torch.ones(2, 6, 3, 8))
    path, (change, words) = tmp_path / "cache", TAMPERED[name]
    cache.save(path)
    tampered(path, change)
    with pytest.raises(ArgumentError, match=words) as caught:
        EvictingCache.load(path)
    assert str(caught.value).startswith(f"path {path} cannot be loaded: ")


def test_sums_of_the_wrong_shape_are_refused(ids, tmp_path):
    _, cache = in_the_middle("sums", ids)
    path = tmp_path / "cache"
    for change in (lambda x: x[:, :1], lambda x: torch.cat([x, x], dim=2), lambda x: x.long()):
        cache.save(path)
        tampered(path, tensor("layers.0.state.attention", change))
        with pytest.raises(ArgumentError, match=r"its layers\.0\.state\.attention must be sums of at most 1\d tokens"):
            EvictingCache.load(path)


def test_sizes_that_the_model_does_not_have_are_refused(ids, tmp_path):
    """A file that agrees with itself, and says that it is of this model."""
    model, cache = in_the_middle("once", ids)
    for layer in cache.layers:
        layer.keys = layer.keys[..., :4]
    cache.save(tmp_path / "cache")
    with pytest.raises(ArgumentError, match=r"layers\.0\.keys must have 16 numbers per token, .* got 2 heads of 4"):
        EvictingCache.load(tmp_path / "cache", model=model)


def test_layers_of_another_kind_are_refused(tmp_path):
    class Other(EvictingLayer):
        pass

    cache = EvictingCache()
    cache.layers.append(Other(cache.settings))
    with pytest.raises(ArgumentError, match=r"layers must be EvictingLayer, .*; got Other"):
        cache.save(tmp_path / "cache")


LINEAR_FAULTS = {
    "rows of another batch": (
        tensor("layers.2.conv_states.0", lambda x: x[:1]),
        "conv_states.0 must be floats of 2 rows",
    ),
    "states that are no floats": (
        tensor("layers.0.conv_states.0", lambda x: x.long()),
        "must be floats of 2 rows; got",
    ),
    "half a state": (at("layers", 0, "linear", "states", value=[{}]), "linear.states must hold conv_kernel_size"),
    "a state too many": (renamed("layers.0.conv_states.0", "layers.0.conv_states.1"), r"no more tensors .*states\.1"),
    "no list of states": (at("layers", 0, "linear", "states", value=9), "linear must have states of type list"),
    "an attention of no kind": (
        at("layers", 0, "kind", value="EvictingLayer"),
        "parts of its kind; got 'EvictingLayer'",
    ),
}


@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="this release has no such layers")
@pytest.mark.parametrize("name", LINEAR_FAULTS)
def test_a_tampered_state_is_refused(name, ids, tmp_path):
    model, cache = in_the_middle("layers of linear attention", ids)
    path, (change, words) = tmp_path / "cache", LINEAR_FAULTS[name]
    cache.save(path)
    EvictingCache.load(path, model=model)
    tampered(path, change)
    with pytest.raises(ArgumentError, match=words):
        EvictingCache.load(path, model=model)


def test_a_layer_that_this_release_lacks_is_refused(ids, tmp_path, monkeypatch):
    if not hasattr(cache_utils, "LinearAttentionLayer"):
        pytest.skip("this release has no such layers to save")
    _, cache = in_the_middle("layers of linear attention", ids)
    cache.save(tmp_path / "cache")
    monkeypatch.delattr(cache_utils, "LinearAttentionLayer")
    with pytest.raises(ArgumentError, match=r"layers\.0 must be of a kind that this release of transformers has"):
        EvictingCache.load(tmp_path / "cache")


def test_gemma_layers_keep_their_windows(ids, tmp_path):
    model = tiny_gemma3()
    cache = EvictingCache(SNAPKV, every=4)
    read(model, cache, ids, [N])
    made = by_file(cache, tmp_path / "cache", model=model)

    assert [layer.num_stored for layer in made.layers] == [11, 14, 11, 14]
    assert [layer.sliding_window for layer in made.layers] == [12, None, 12, None]
