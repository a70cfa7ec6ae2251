"""``graphkv tune``: finds what was planted, goes on where it stopped, and reports on prompts that it never saw."""

import json
from dataclasses import replace
from math import log

import numpy as np
import pytest

pytest.importorskip("cma", reason="the search needs graphkv[tune]")
pytest.importorskip("tomli_w", reason="presets are written with tomli-w, of graphkv[tune]")

from graphkv.__main__ import main
from graphkv.core.budgets import allocate, cut_again
from graphkv.evaluation import statistics
from graphkv.evaluation.records import read_records
from graphkv.evaluation.tuning.objective import name_of
from graphkv.evaluation.tuning.search import BudgetSpace, GraphSpace, search
from graphkv.naming.names import parse
from graphkv.naming.policies import make_preset
from graphkv.naming.presets import Preset, load_preset

BUDGET, LAYERS = 64, 12
START = Preset(base="snapkv", layer_budgets=(BUDGET,) * LAYERS)
# The first half of the layers wants many tokens and a strong graph, the second half few and none.
WANTED = [96] * 6 + [32] * 6


def budget_loss(preset):
    return sum(log(found / wanted) ** 2 for found, wanted in zip(preset.layer_budgets, WANTED, strict=True))


def graph_loss(preset):
    if not preset.graph:
        return 3.0
    first, second = (parse(wrapper)[0] if wrapper else (None, {}) for wrapper in preset.graph)
    kind, found = first
    if "source_ratio" not in found:
        return 3.0
    # Options that a signal lacks are as far off as can be.
    loss = abs(found["source_ratio"] - 0.7) + abs(log(found["neighbors"] / 4)) + abs(found.get("strength", 1) - 0.4)
    loss += (kind != "graphkv") + abs(found.get("rounds", 1) - 1)
    return loss + (second[1].get("rounds", 1) if second[0] else 0)


def run_search(seed=0, evaluations=600, loss=lambda preset: budget_loss(preset) + graph_loss(preset), **options):
    seen = []

    def evaluate(presets):
        seen.extend(presets)
        return [loss(preset) for preset in presets]

    bounds = {"num_layers": LAYERS, "budget": BUDGET, "least": 8, "most": 200}
    found = search(
        evaluate, START, **bounds, evaluations=evaluations, seed=seed, **{"graph_groups": 2, "group_size": 4} | options
    )
    return *found, seen


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_optimum_is_found(seed):
    loss, best, seen = run_search(seed, evaluations=1000)

    assert (
        loss
        == budget_loss(best) + graph_loss(best)
        == min(map(lambda each: budget_loss(each) + graph_loss(each), seen))
    )
    assert np.allclose(best.layer_budgets, WANTED, rtol=0.2)
    ((kind, options),) = parse(best.graph[0])
    assert kind == "graphkv"
    assert options["source_ratio"] == pytest.approx(0.7, abs=0.15)
    assert options["strength"] == pytest.approx(0.4, abs=0.15)
    assert options["neighbors"] in (3, 4, 5)
    assert (options["rounds"], best.graph[1]) == (1, "")
    assert 900 <= len(seen) <= 1000


def test_every_candidate_keeps_exactly_the_budget_within_its_bounds():
    _, _, seen = run_search(evaluations=200)

    assert len({each.layer_budgets for each in seen}) > 50
    for each in seen:
        assert sum(each.layer_budgets) == LAYERS * BUDGET
        assert all(isinstance(tokens, int) and 8 <= tokens <= 200 for tokens in each.layer_budgets)
        policy = make_preset(each, BUDGET)
        tokens = [policy.layer_budget(200, layer, LAYERS) for layer in range(LAYERS)]
        assert sum(tokens) == LAYERS * BUDGET


def test_the_same_seed_gives_the_same_search_and_touches_no_other_random_numbers():
    np.random.seed(3)  # noqa: NPY002 - the generator that must not be touched
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = run_search(5, 120), run_search(5, 120), run_search(6, 120)

    assert first == again
    assert first[2] != other[2]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_nothing_is_chosen_that_is_worse_than_the_start():
    loss, best, seen = run_search(evaluations=60, loss=lambda preset: float(preset != START))

    assert (loss, best) == (0.0, START)
    assert seen[0] == START


@pytest.mark.parametrize(
    ("options", "graphs", "alike"), [({"graph_groups": 0}, 0, False), ({"group_size": 0}, 2, True)]
)
def test_either_search_can_be_left_out(options, graphs, alike):
    _, best, seen = run_search(evaluations=120, **options)

    assert len(best.graph) == graphs
    assert {each.layer_budgets == START.layer_budgets for each in seen[1:]} >= {alike}
    assert (best.layer_budgets == START.layer_budgets) == alike


def test_the_start_of_the_graph_is_the_degree():
    space = GraphSpace(groups=1)
    assert make_preset(space.place(START, space.start()), 9) == make_preset(replace(START, graph=("degree",)), 9)


@pytest.mark.parametrize("value", [0.0, 0.2, 0.999, 1.0])
def test_every_point_of_the_cube_is_a_policy(value):
    preset = GraphSpace(groups=3).place(START, [value] * 21)
    space = BudgetSpace(layers=range(4, 8), budget=BUDGET, least=8, most=200)
    policy = make_preset(space.place(preset, [value, 1 - value, value, 0.5]), BUDGET)

    assert sum(policy.layer_budget(200, layer, LAYERS) for layer in range(LAYERS)) == LAYERS * BUDGET


OPTIONS = [
    "--base", "snapkv(window=8)", "--budget", 48, "--task", "needle-number", "--length", 240, "--mode", "agnostic",
    "--prompts", 2, "--held-out", 3, "--evaluations", 24, "--group-size", 2, "--graph-groups", 2, "--threads", 1,
]  # fmt: skip


def tune(tiny, output, *more):
    return main([str(word) for word in ("tune", "--model", tiny, *OPTIONS, *more, "--output", output)])


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    assert tune(tiny, folder) == 0
    return folder


def test_the_preset_is_the_best_candidate_of_the_tuning_split(tuned):
    preset = load_preset(tuned / "preset.toml")
    records = read_records(tuned / "tuning")
    means = {}
    for policy in {record.policy for record in records} - {"full"}:
        mine = [record for record in records if record.policy == policy]
        assert {record.prompt for record in mine} == {"needle-number/240/0", "needle-number/240/1"}
        means[policy] = np.mean([record.nll for record in mine])
    name = name_of(replace(preset, about={}))

    assert {record.split for record in records} == {"tuning"}
    assert len(means) > 10
    assert means[name] == min(means.values()) == pytest.approx(preset.about["value"])
    assert sum(preset.layer_budgets) == 3 * 48
    assert (preset.base, preset.sinks, preset.about["split"]) == ("snapkv(window=8)", 4, "tuning")


def test_it_is_reported_on_prompts_that_it_was_not_tuned_on(tuned, capsys):
    records = read_records(tuned / "held-out")
    header = json.loads((tuned / "held-out" / "run.json").read_text())
    path = str(tuned / "preset.toml")

    assert {record.split for record in records} == {"held-out"}
    assert {record.policy for record in records} == {
        "full", "snapkv(window=8)", "snapkv(window=8)+graphkv", "snapkv(window=8)+degree", path
    }  # fmt: skip
    assert header["presets"][path]["layer_budgets"] == list(load_preset(tuned / "preset.toml").layer_budgets)
    assert len(statistics.compare(records, "nll", {path: "snapkv(window=8)"})) == 1
    assert main(["report", str(tuned / "held-out")]) == 0
    assert f"| `{path}` | 240 | 48 |" in (tuned / "held-out" / "report" / "report.md").read_text()


def test_a_finished_search_asks_no_model_again(tuned, tiny, monkeypatch, capsys):
    before = {name: (tuned / name).read_bytes() for name in ("preset.toml", "tuning/records.jsonl")}
    monkeypatch.setattr("graphkv.evaluation.tuning.objective.Candidates.answer", None)

    assert tune(tiny, tuned) == 0
    assert {name: (tuned / name).read_bytes() for name in before} == before
    assert "compared with" in capsys.readouterr().out


def test_an_interrupted_search_goes_on_and_ends_alike(tuned, tiny, tmp_path, monkeypatch):
    from graphkv.evaluation.records import Run

    calls, append = [], Run.append

    def break_off(self, records):
        calls.append(records)
        if len(calls) == 3:
            # In the middle of a generation.
            append(self, list(records)[: len(records) // 2])
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Run, "append", break_off)
    assert tune(tiny, tmp_path) == 130
    assert not (tmp_path / "preset.toml").exists()
    monkeypatch.undo()
    assert tune(tiny, tmp_path) == 0
    assert (tmp_path / "preset.toml").read_bytes() == (tuned / "preset.toml").read_bytes()
    ours, theirs = (set((folder / "tuning" / "records.jsonl").read_text().splitlines()) for folder in (tmp_path, tuned))
    assert ours == theirs


def test_another_search_does_not_continue_this_one(tuned, tiny, capsys):
    assert tune(tiny, tuned, "--seed", 1) == 2
    assert "holds another run: seed is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--metric", "redundancy"), "metric must be one of"),
        (("--budget", "240"), "--budget must be below every --length, 240; got 240"),
        (("--base", "snapkv+graphkv"), "--base must be a policy without a graph"),
        (("--base", "full"), "base must be one of snapkv"),
        (("--start", "top"), "--start must be base, pyramid-infer or a preset, a .toml file; got 'top'"),
        (("--start", "pyramid-infer", "--group-size", "0"), "--start must be base with --group-size 0"),
        (("--base", "best"), "--policy must be one of full, snapkv"),
    ],
)
def test_wrong_options_are_refused(tiny, tmp_path, capsys, more, message):
    assert tune(tiny, tmp_path / "none", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_search_of_budgets_starts_where_it_is_told():
    shares = tuple(allocate(cut_again(LAYERS, 0.5), LAYERS * BUDGET, 200, 8))
    start = replace(START, layer_budgets=shares)
    space = BudgetSpace(layers=range(4), budget=BUDGET, least=8, most=200, first=shares[:4])

    assert sum(shares) == LAYERS * BUDGET
    placed = space.place(start, space.start()).layer_budgets
    assert all(abs(ours - theirs) <= 1 for ours, theirs in zip(placed, shares, strict=True))
    assert BudgetSpace(layers=range(4), budget=BUDGET, least=8, most=200).start() == [0.5] * 4
    assert BudgetSpace(layers=range(2), budget=BUDGET, least=0, most=2000, first=(0, 1999)).start() == [0, 1]


@pytest.mark.parametrize("name", ["pyramid-infer", "shares.toml"])
def test_the_command_starts_from_named_budgets(tiny, tmp_path, name, capsys):
    path = tmp_path / "shares.toml"
    path.write_text('base = "knorm"\nlayer_budgets = [4, 3, 1]\n')
    start = name if name == "pyramid-infer" else str(path)

    assert tune(tiny, tmp_path / "out", "--start", start, "--evaluations", 1, "--graph-groups", 0) == 0

    first = json.loads((tmp_path / "out" / "tuning" / "run.json").read_text())
    found = next(each for each in walk(first) if isinstance(each, dict) and "start" in each)["start"]
    shares = [4, 3, 1] if name == "shares.toml" else cut_again(3)
    assert found == allocate(shares, 3 * 48, 240, 12)
    capsys.readouterr()
    path.write_text('base = "knorm"\nlayer_budgets = [4, 3]\n')
    assert tune(tiny, tmp_path / "none", "--start", str(path)) == 2
    assert "--start must have layer_budgets for each of the model's 3 layers" in capsys.readouterr().err


def walk(value):
    """All values inside a value."""
    yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from walk(each)
