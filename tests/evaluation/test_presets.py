"""A whole policy in a file: read, written, refused by name, and taken by every command."""

import json

import numpy as np
import pytest

from graphkv import AdaKV, ArgumentError, Decay, GraphKV, LayerShares, PerLayer, SnapKV, evict
from graphkv.__main__ import main
from graphkv.naming.policies import make_policy
from graphkv.naming.presets import Preset, load_preset, write_preset

FULL = Preset(
    base="snapkv(window=8, pooling=max)",
    sinks=2,
    graph=("graphkv(neighbors=3, strength=0.5)", ""),
    layer_budgets=(30, 20, 13),
    about={"model": "tiny", "value": 1.5, "lengths": [64, 128]},
)


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("tomli_w", reason="presets are written with tomli-w, of graphkv[tune]")
    write_preset(tmp_path / "preset.toml", FULL)
    return tmp_path / "preset.toml"


def test_a_preset_comes_back_as_it_was_written(path):
    assert load_preset(path) == FULL
    write_preset(path, Preset(base="knorm"))
    assert load_preset(path) == Preset(base="knorm")
    assert path.read_text() == 'base = "knorm"\n'
    assert [file.name for file in path.parent.iterdir()] == ["preset.toml"]


def test_a_preset_is_the_policy_that_it_names(path):
    base = SnapKV(budget=21, window=8, pooling="max", num_sinks=2)
    graphs = (GraphKV(base, Decay(neighbors=3, strength=0.5)), base)
    expected = LayerShares(PerLayer(base, graphs), (30, 20, 13))

    assert make_policy(str(path), 21) == expected
    assert [expected.layer_budget(100, layer, 3) for layer in range(3)] == [30, 20, 13]
    keys = np.random.default_rng(0).normal(size=(1, 2, 60, 8)).astype(np.float32)
    for layer in range(3):
        found = evict(make_policy(str(path), 21), keys, queries=keys[:, :, -8:], layer=layer, num_layers=3)
        assert found.kept.shape[-1] == FULL.layer_budgets[layer]


def test_sinks_of_the_command_come_first(path):
    assert make_policy(str(path), 21, sinks=0).base.base.num_sinks == 0
    assert make_policy(str(path), 21).base.base.num_sinks == 2


def test_parts_that_are_not_there_change_nothing(tmp_path):
    (tmp_path / "plain.toml").write_text('base = "h2o"')
    (tmp_path / "graph.toml").write_text('base = "h2o"\ngraph = ["graphkv(rounds=2)+adakv"]\n')
    (tmp_path / "none.toml").write_text('base = "h2o"\ngraph = [""]\n')

    assert make_policy(str(tmp_path / "plain.toml"), 9) == make_policy("h2o", 9)
    assert make_policy(str(tmp_path / "graph.toml"), 9) == make_policy("h2o+graphkv(rounds=2)+adakv", 9)
    assert isinstance(make_policy(str(tmp_path / "graph.toml"), 9), AdaKV)
    assert make_policy(str(tmp_path / "none.toml"), 9) == make_policy("h2o", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base = 1", "base must be a string; got 1"),
        ("sinks = 4", "must have the field base"),
        ('base = "best"', "base must be one of snapkv, defensivekv"),
        ('base = "snapkv"\nbudget = 4', "unknown fields: budget; known: base, sinks"),
        ('base = "snapkv"\nsinks = -1', "sinks must be at least 0; got -1"),
        ('base = "snapkv"\nsinks = "four"', "sinks must be"),
        ('base = "snapkv(windows=8)"', "base: got an unexpected keyword argument 'windows'"),
        ('base = "snapkv(window=0)"', "base: window must be"),
        ('base = "snapkv+graphkv"', r"base must be one of snapkv.*; got 'snapkv\+graphkv'"),
        ('base = "snapkv"\n[options]\nwindow = 8', "unknown fields: options; known: base"),
        ('base = "snapkv"\ngraph = ["", "graphkv(strength=2)"]', r"graph\[1\]: strength must lie in \[0, 1\]"),
        ('base = "snapkv"\ngraph = ["graphkv(strengths=1)"]', r"graph\[0\]: got an unexpected keyword .* 'strengths'"),
        ('base = "snapkv"\ngraph = ["graph"]', r"graph\[0\] must be wrappers such as graphkv, .*; got 'graph'"),
        ('base = "snapkv"\n[[graph]]\nrounds = 1', r"graph\[0\] must be a string; got"),
        ('base = "snapkv"\n[graph]\nrounds = 1', "graph must be an array of strings"),
        ('base = "snapkv"\nlayer_budgets = [1, -2]', r"layer_budgets\[1\] must be finite and at least 0"),
        ('base = "snapkv"\nlayer_budgets = 4', "layer_budgets must be an array of numbers; got 4"),
        ("base = ", "must be TOML"),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path, content, message):
    (tmp_path / "preset.toml").write_text(content)
    with pytest.raises(ArgumentError, match=message) as caught:
        make_policy(str(tmp_path / "preset.toml"), 16)
    assert "preset.toml" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"none\.toml cannot be read: No such file"):
        make_policy(str(tmp_path / "none.toml"), 16)


@pytest.mark.parametrize(("command", "extra"), [("demo", ("--policy", "full")), ("inspect", ())])
def test_commands_take_a_preset(command, extra, tiny, path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("First paragraph of some text.\n\nSecond one, naïve and short.\n\nThird one.\n", encoding="utf-8")
    arguments = ("--model", tiny, "--text", text, "--budget", 21, "--policy", path, *extra)

    assert main([command, *map(str, arguments), "--output", str(tmp_path / "out")]) == 0


def test_eval_takes_a_preset_and_keeps_what_it_was(tiny, path, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["eval", "--model", tiny, "--task", "needle", "--length", 240, "--budget", 21, "--mode", "agnostic"]
    command += ["--prompts", 2, "--threads", 1, "--policy", "snapkv(window=8, pooling=max)", "--policy", path]
    command = [str(word) for word in (*command, "--output", run)]

    assert main(command) == 0
    header = json.loads((run / "run.json").read_text())
    assert Preset(**header["presets"][str(path)]) == FULL
    assert main(["report", str(run), "--metric", "nll"]) == 0
    report = (run / "report" / "report.md").read_text()
    assert report.count(f"| `{path}` | 240 | 21 |") == 1
    # Another file under the same name is another run.
    write_preset(path, Preset(base="knorm"))
    capsys.readouterr()
    assert main(command) == 2
    assert "holds another run: " in capsys.readouterr().err
