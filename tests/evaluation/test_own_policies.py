"""A policy of the user's own by ``module:NAME``: made, refused in one line, and taken by every command."""

import json
import os
import subprocess
import sys

import pytest

from graphkv import CAOTE, AdaKV, ArgumentError, GraphKV, KNorm, LayerBudgets, PerLayer, SnapKV
from graphkv.__main__ import main
from graphkv.evaluation.records import read_records
from graphkv.naming.policies import make_policy, with_budget

MODULE = """
from graphkv import AdaKV, KNorm, SnapKV

POLICY = KNorm(budget=5)
WRAPPED = AdaKV(KNorm(budget=5), floor=0.5)
NUMBER = 7


class Half(KNorm):
    def layer_budget(self, num_tokens, layer, num_layers, /):
        return super().layer_budget(num_tokens, layer, num_layers) // 2


class Holder:
    HELD = POLICY


def make(budget, window=4):
    return SnapKV(budget=budget, window=window)


def number(budget):
    return budget


def blind(tokens):
    return KNorm(budget=tokens)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The file of a module `mine`, which can be imported."""
    path = tmp_path / "modules" / "mine.py"
    path.parent.mkdir()
    path.write_text(MODULE)
    (path.parent / "broken.py").write_text("import not_there\n")
    (path.parent / "faulty.py").write_text("x = 1 / 0\n")
    monkeypatch.syspath_prepend(path.parent)
    yield path
    for name in ("mine", "broken", "faulty"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("First paragraph of some text.\n\nSecond one, naïve and short.\n\nThird one.\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mine:POLICY", KNorm(budget=64)),
        ("mine:Holder.HELD", KNorm(budget=64)),
        ("mine:WRAPPED", AdaKV(KNorm(budget=64), floor=0.5)),
        ("mine:make", SnapKV(budget=64, window=4)),
        (" mine:make(window=8) + graphkv + adakv", AdaKV(GraphKV(SnapKV(budget=64, window=8)))),
        ("mine:POLICY+caote", CAOTE(KNorm(budget=64))),
        ("graphkv.adapters:SnapKV(window=8)", SnapKV(budget=64, window=8)),
    ],
)
def test_a_module_and_a_name_are_a_policy_of_the_budget(mine, name, expected):
    assert make_policy(name, 64, sinks=4) == expected


def test_a_budget_is_replaced_under_all_wrappers_and_budgets_of_layers_stay():
    base, changed = KNorm(budget=5), KNorm(budget=0.5)
    assert with_budget(PerLayer(base, (base, GraphKV(base))), 0.5) == PerLayer(changed, (changed, GraphKV(changed)))
    assert with_budget(LayerBudgets(base, (7, 9)), 0.5) == LayerBudgets(changed, (7, 9))


BAD = [
    ("nowhere:POLICY", "nowhere:POLICY must be package.module:NAME; nowhere cannot be imported: ModuleNotFoundError: "),
    ("broken:POLICY", "broken cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    ("faulty:POLICY", "faulty cannot be imported: ZeroDivisionError: division by zero"),
    ("mine:NOTHING", "mine:NOTHING must be package.module:NAME; there is no 'NOTHING' in mine"),
    ("mine:NUMBER", "must be a Policy, or a callable with a parameter budget that returns one; got int"),
    (
        "mine:number",
        "must be a Policy, or a callable with a parameter budget that returns one; got one that returns int",
    ),
    ("mine:blind", "must be a Policy, or a callable with a parameter budget that returns one; got function"),
    ("mine:NUMBER+adakv", "--policy mine:NUMBER+adakv must be a Policy"),
    ("mine:POLICY+mine:POLICY", "must be one of full, snapkv"),
    ("mine:POLICY+ada", "must be one of full, snapkv"),
    ("mine:POLICY(budget=4)", "must have no options, because mine:POLICY is a policy; got ['budget']"),
    ("mine:make(size=4)", "mine:make(size=4): got an unexpected keyword argument 'size'; there are window"),
    ("mine:make(window=0)", "mine:make(window=0): window must be at least 1; got 0"),
    ("mine:", "must be a base and its wrappers, such as snapkv(window=8)+graphkv; got 'mine:'"),
    (":POLICY", "must be a base and its wrappers, such as snapkv(window=8)+graphkv; got ':POLICY'"),
    ("builtins:dict", "got one that returns dict"),
    ("os:path", "must be a Policy, or a callable with a parameter budget that returns one; got module"),
]


@pytest.mark.parametrize(("name", "message"), BAD)
def test_anything_else_is_refused(mine, name, message):
    with pytest.raises(ArgumentError) as caught:
        make_policy(name, 64)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine:NUMBER", "nowhere:POLICY", "kvpress:KnormPress+degree", "full+degree"])
@pytest.mark.parametrize("command", ["demo", "inspect", "eval", "tune"])
def test_every_command_refuses_it_in_one_line(mine, tmp_path, capsys, command, name):
    if command == "tune":
        pytest.importorskip("cma", reason="the search needs graphkv[tune]")
    option = "--base" if command == "tune" else "--policy"

    assert main([command, option, name, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert name in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "more"), [("demo", ("--policy", "full")), ("inspect", ("--layer", 0))])
def test_demo_and_inspect_take_it(mine, tiny, text, tmp_path, command, more):
    arguments = ("--model", tiny, "--text", text, "--budget", 21, "--policy", "mine:make+degree", *more)

    assert main([command, *map(str, arguments), "--output", str(tmp_path / "out")]) == 0


def evaluate(tiny, output, *more):
    command = ["eval", "--model", tiny, "--task", "needle", "--length", 240, "--budget", 64, "--mode", "agnostic"]
    return main([*map(str, (*command, "--prompts", 2, "--threads", 1, *more, "--output", output))])


def test_eval_measures_it_and_the_report_tells_its_size(mine, tiny, tmp_path, capsys):
    policies = ("--policy", "knorm", "--policy", "mine:POLICY", "--policy", "mine:Half")
    assert evaluate(tiny, tmp_path / "run", *policies) == 0

    assert "needle, agnostic, 240 tokens, 4 sinks: tokens kept per KV head" in " ".join(capsys.readouterr().out.split())
    sizes = {record.policy: (record.budget, record.tokens_kept) for record in read_records(tmp_path / "run")}
    assert sizes == {"full": (None, 240), "knorm": (64, 64), "mine:POLICY": (64, 64), "mine:Half": (64, 32)}
    assert main(["report", str(tmp_path / "run"), "--metric", "nll"]) == 0
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "Caches of `mine:Half` kept another number of tokens, see *Measured sizes*" in report
    assert "| `mine:Half` | 240 | 64 | 32.0 | 0.012 | 13.3% |" in report
    assert "| `mine:POLICY` | 240 | 64 | 64.0 | 0.025 | 26.7% |" in report

    # Other code under the same name is another run.
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(header["modules"]) == {"mine"}
    mine.write_text(MODULE + "\n")
    assert evaluate(tiny, tmp_path / "run", *policies) == 2
    assert "holds another run: mine is" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_have_it_too(mine, tiny, tmp_path):
    for workers in (1, 2):
        assert evaluate(tiny, tmp_path / str(workers), "--policy", "mine:make+adakv", "--workers", workers) == 0

    one, two = ((tmp_path / str(workers) / "records.jsonl").read_bytes() for workers in (1, 2))
    assert one == two


def test_tune_takes_it_as_a_base(mine, tiny, tmp_path):
    pytest.importorskip("cma", reason="the search needs graphkv[tune]")
    pytest.importorskip("tomli_w", reason="presets are written with tomli-w, of graphkv[tune]")
    options = ("--base", "mine:make(window=8)", "--budget", 48, "--task", "needle", "--length", 240, "--prompts", 1)
    options = (*options, "--held-out", 2, "--evaluations", 4, "--graph-groups", 1, "--group-size", 0, "--threads", 1)

    assert main([*map(str, ("tune", "--model", tiny, *options, "--output", tmp_path / "out"))]) == 0
    assert 'base = "mine:make(window=8)"' in (tmp_path / "out" / "preset.toml").read_text()


def test_a_module_in_the_current_folder_is_found(mine, tmp_path):
    code = (
        "import sys; sys.path.remove(''); from graphkv.naming.policies import make_policy; "
        "print(make_policy('mine:POLICY', 9).budget)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=mine.parent, capture_output=True, text=True, check=True, env=os.environ
    )

    assert done.stdout.strip() == "9"
