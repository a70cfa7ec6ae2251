"""``graphkv report`` on records whose effects are known."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from graphkv import ArgumentError
from graphkv.__main__ import main
from graphkv.evaluation import statistics
from graphkv.evaluation.records import Record, Run
from graphkv.evaluation.report import make_report, plots

ROOT = Path(__file__).parents[2]
LENGTHS, BUDGETS, MODES = (64, 128), (16, 32, 64), ("aware", "agnostic")
# What the graph takes from the likelihood of the answer: it helps one base and harms another, alike in both modes.
EFFECTS = {"snapkv": 0.0, "snapkv+graphkv": -0.5, "knorm": 1.0, "knorm+graphkv": 1.5, "h2o": 0.7, "h2o+graphkv": 0.7}
FEW = {name: EFFECTS[name] for name in ("snapkv", "snapkv+graphkv")}
POLICIES = ("full", "random", *EFFECTS)
CONFIG = {
    "tasks": ["needle"], "lengths": LENGTHS, "budgets": BUDGETS, "policies": POLICIES, "modes": MODES, "sinks": [4],
    "prompts": 12, "split": "held-out", "data": None,
}  # fmt: skip
HEADER = {
    "config": CONFIG,
    "model": {"name": "a model", "sha256": "0" * 64},
    "sessions": [{"started": "2026-01-01", "commit": None, "versions": {"graphkv": "1"}, "machine": {"cores": 2}}],
}


def make_records(prompts=12, modes=MODES, split="held-out", effects=EFFECTS, noise=0.2):
    """Records of a run whose graph has the given effects, with noise that is a policy's own."""
    rng = np.random.default_rng(0)
    records = []
    for length, seed, mode in product(LENGTHS, range(prompts), modes):
        hardness = rng.normal(3, 1)
        for policy, budget in [("full", None), *product(["random", *effects], BUDGETS)]:
            if budget is not None and budget >= length:
                continue
            nll = hardness + {"full": -1, "random": 2}.get(policy, effects.get(policy, 0)) + rng.normal(0, noise)
            records.append(
                Record(
                    prompt=f"needle/{length}/{seed}", task="needle", kind="word", question=0, length=length,
                    num_tokens=length, depth=(seed % 10 + 0.5) / 10, split=split, seed=seed, mode=mode, policy=policy,
                    budget=budget, sinks=None if budget is None else 4, answer_tokens=3, nll=nll, kl=0.1,
                    match=nll < 2.5, metric="substring_all", redundancy=0.5 - 0.05 * ("+" in policy),
                )
            )  # fmt: skip
    return records


@pytest.fixture(scope="module")
def drawn():
    """A report with its figures."""
    return make_report(make_records(), HEADER)


@pytest.fixture(scope="module")
def markdown(drawn):
    return drawn[0]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of the time: leave them empty where only words matter."""
    for name in ("draw_diversity", "draw_gains", "draw_heat_maps", "draw_quality", "draw_sizes"):
        monkeypatch.setattr(plots, name, lambda *_, **__: b"<svg/>")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on disk with its report."""
    folder = tmp_path_factory.mktemp("run")
    Run(folder, HEADER, HEADER["sessions"][0]).append(make_records(prompts=4, effects=FEW))
    assert main(["report", str(folder), "--metric", "nll", "--effect", "0.2"]) == 0
    return folder


def section(markdown, title):
    """The text from a heading to the next one of its level."""
    level = title.split()[0]
    return re.split(rf"^#{{1,{len(level)}}} ", markdown.split(f"{title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text, first_column="policy"):
    """The tables of a text that begin with a column, as dicts by their heads."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        names, _, *lines = ([cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines())
        if names[0] == first_column:
            found += [dict(zip(names, cells, strict=True)) for cells in lines]
    return found


def gains(markdown, mode="aware"):
    return [row for row in rows(section(markdown, f"### needle, 4 sinks, query-{mode}")) if "gain" in row]


def interval(cell):
    mean, low, high = map(float, re.fullmatch(r"\**([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\]\**", cell).groups())
    return mean, low, high


@pytest.mark.parametrize("mode", MODES)
def test_gains_have_the_sign_and_size_that_was_planted(markdown, mode):
    found = [row for row in gains(markdown, mode) if row["for 0.1"] != "2"][:15]
    assert len(found) == 3 * (2 + 3)
    for row in found:
        name = row["policy"].strip("`")
        truth = EFFECTS[name.partition("+")[0]] - EFFECTS[name]
        mean, low, high = interval(row["gain"])
        # An interval of 95 % may miss the truth now and then, but by little.
        assert low - 0.1 <= truth <= high + 0.1
        assert abs(mean - truth) < 0.25
        assert row["prompts"] == "12"
        if truth:
            assert row["verdict"] == ("better" if truth > 0 else "worse")
            assert row["gain"].startswith("**")
            assert float(row["p"].lstrip("< ")) <= 0.01
            assert float(row["q"].lstrip("< ")) <= 0.02


def test_intervals_cover_what_was_planted(markdown):
    found = [row for mode in MODES for row in gains(markdown, mode)[:15]]
    covered = 0
    for row in found:
        name = row["policy"].strip("`")
        _, low, high = interval(row["gain"])
        covered += low <= EFFECTS[name.partition("+")[0]] - EFFECTS[name] <= high
    assert len(found) == 30
    assert covered >= 25


def test_the_summary_counts_losses_like_gains(markdown):
    found = {
        (row["mode"], row["policy"]): row for row in rows(section(markdown, "## Summary")) if row["metric"] == "nll"
    }
    for mode in MODES:
        assert (found[mode, "`snapkv+graphkv`"]["better"], found[mode, "`snapkv+graphkv`"]["worse"]) == ("5", "0")
        assert (found[mode, "`knorm+graphkv`"]["better"], found[mode, "`knorm+graphkv`"]["worse"]) == ("0", "5")
        assert found[mode, "`knorm+graphkv`"]["adjusted worse"] == "5"
        assert int(found[mode, "`h2o+graphkv`"]["open"]) >= 3


def test_bold_needs_an_interval_that_excludes_zero(markdown):
    bold = re.findall(r"\*\*(.*?)\*\*", markdown)
    assert len(bold) >= 20
    for text in bold:
        _, low, high = interval(text)
        assert low > 0 or high < 0


def test_one_prompt_has_no_interval_and_nothing_bold(undrawn):
    markdown, _ = make_report(make_records(prompts=1), HEADER)

    assert "**" not in markdown
    assert all("(1 prompt)" in row["gain"] and row["verdict"] == "open" for row in gains(markdown))


def test_a_partial_run_says_so_and_a_missing_cell_is_missing(undrawn):
    records = [
        record
        for record in make_records(prompts=3, modes=("aware",))
        if (record.policy, record.budget, record.length) != ("h2o+graphkv", 32, 128)
    ]
    markdown, _ = make_report(records, HEADER)

    assert "This run is not finished: 6 of 24 prompts have been answered." in markdown
    quality = rows(section(markdown, "### needle, 4 sinks, query-aware"))
    (row,) = [
        row for row in quality if row["policy"] == "`h2o+graphkv`" and row["prompt"] == "128" and "budget 32" in row
    ][:1]
    assert row["budget 32"] == "missing"
    assert row["budget 16"] != "missing"
    (row,) = [row for row in gains(markdown) if (row["policy"], row["prompt"], row["budget"])
              == ("`h2o+graphkv`", "128", "32")][:1]  # fmt: skip
    assert row["gain"] == "missing"
    # A budget of the whole prompt was never to be measured.
    (row,) = [row for row in quality if row["policy"] == "`snapkv`" and row["prompt"] == "64" and "budget 64" in row][
        :1
    ]
    assert row["budget 64"] == "\N{EN DASH}"


def test_a_finished_run_does_not_say_that_it_is_partial(markdown):
    assert "not finished" not in markdown


def test_a_missing_cell_is_written_into_its_figure():
    gains = [plots.Gain("snapkv", "graphkv", budget, None) for budget in (16, 32)]
    found = statistics.interval([0.1, 0.2, 0.4])
    whole = plots.draw_gains([gains[0], gains[1]._replace(found=found)], ["graphkv"], label="gain")
    lacking = plots.draw_gains(gains, ["graphkv"], label="gain")

    assert (whole.count(b"<!-- missing -->"), lacking.count(b"<!-- missing -->")) == (1, 2)


def test_splits_and_modes_never_mix(undrawn):
    better = {name: effect - 5 * ("+" in name) for name, effect in EFFECTS.items()}
    records = make_records(prompts=5) + make_records(prompts=5, modes=("aware",), split="tuning", effects=better)
    markdown, _ = make_report(records, HEADER)

    held_out = section(markdown, "## Held-out split, query-aware")
    tuning = section(markdown, "## Tuning split, query-aware")
    assert "## Tuning split, query-agnostic" not in markdown
    mean = {}
    for name, text in (("held-out", held_out), ("tuning", tuning)):
        found = [row for row in rows(text) if "gain" in row and row["policy"] == "`snapkv+graphkv`"]
        mean[name] = interval(found[0]["gain"])[0]
        assert {row["prompts"] for row in found} == {"5"}
    assert mean["tuning"] - mean["held-out"] == pytest.approx(5, abs=0.5)


def test_equal_runs_have_equal_reports():
    records = make_records(prompts=2, modes=("aware",), effects=FEW)

    assert make_report(records, HEADER) == make_report(records, HEADER)


def test_the_first_figure_comes_before_all_tables_and_shows_both_modes(markdown):
    front, _, rest = markdown.partition("## Summary")

    assert front.count("![") == 1
    assert "query-aware left, query-agnostic right, prompts of 128 tokens" in front
    assert "|" not in front.partition("![")[0]
    assert "001.svg" in front
    assert "001.svg" not in rest


def test_every_figure_is_a_picture_that_follows_the_screen(drawn):
    markdown, pictures = drawn

    # The first one; and per mode 2 metrics x 2 lengths of quality and of gains, 3 bases of needles, 2 lengths of
    # diversity.
    assert len(pictures) == 1 + 2 * (4 + 4 + 3 + 2)
    for path, picture in pictures.items():
        root = ElementTree.fromstring(picture)
        assert root.tag.endswith("svg")
        assert f"]({path})" in markdown
        assert b"prefers-color-scheme:dark" in picture
        assert b"http" not in picture.replace(b"http://www.w3.org/", b"").split(b"</metadata>")[1]
        # Neither the day nor the release of matplotlib: a figure that shows the same is the same file.
        assert b"<dc:date>" not in picture
        assert b"<dc:creator>" not in picture


def test_every_figure_says_below_it_what_it_shows_and_how_to_read_it(drawn):
    markdown, pictures = drawn
    captions = re.findall(
        r"^!\[(.+)\]\(figures/(\d+)\.svg\)\n\*Figure (\d+)\. (.+)\*\n\n", markdown, flags=re.MULTILINE
    )

    assert len(captions) == len(pictures)
    for title, file, number, caption in captions:
        assert int(file) == int(number)
        assert caption.startswith(f"{title}. ")
        assert "is better" in caption
        assert "12 prompts" in caption
    assert "Lower is better" in next(caption for title, *_, caption in captions if title.startswith("NLL"))
    assert "Higher is better" in next(caption for title, *_, caption in captions if title.startswith("Share"))


def test_captions_of_an_unfinished_run_say_over_how_many_prompts(undrawn):
    some = make_records(prompts=3, modes=("aware",), effects=FEW)
    found, _ = make_report(
        [record for record in some if record.length == 64 and (record.seed or record.budget)], HEADER
    )

    assert "means over 2 to 3 prompts" in found


DRAW = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_report import FEW, HEADER, make_records, make_report
markdown, pictures = make_report(make_records(prompts=2, modes=("aware",), effects=FEW), HEADER)
print(hashlib.sha256(repr((markdown, sorted(pictures.items()))).encode()).hexdigest())
"""


def test_another_process_with_settings_of_its_own_draws_the_same_bytes(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.linewidth: 3\nsvg.hashsalt: other\n", encoding="utf-8")
    found = set()
    for seed, folder in (("1", tmp_path), ("2", Path(__file__).parent)):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-c", DRAW, Path(__file__).parent]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)

    assert len(found) == 1


class Page(HTMLParser):
    """Checks that tags are closed in their order, and takes note of what a page holds."""

    VOID = ("meta", "img", "link", "br", "hr", "source")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.bold = [], [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [values[name] for name in ("src", "href", "srcset") if name in values]
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "img":
            assert values["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "strong" in self.open or "b" in self.open:
            self.bold.append(data)


def test_the_page_is_one_file_that_needs_no_network(run):
    html = (run / "report" / "report.html").read_text()
    page = Page()
    page.feed(html)
    page.close()

    assert page.open == []
    assert page.tags.count("img") == len(list((run / "report" / "figures").glob("*.svg"))) > 10
    assert re.findall(r'<td[^>]* data-head="([^"]*)"', html)[:5] == ["policy", "mode", "task", "metric", "better"]
    assert html.count("<td") == html.count(' data-head="') > 50
    assert page.tags.count("figcaption") == page.tags.count("figure") == page.tags.count("img")
    inside = {link.removeprefix("#") for link in page.links if link.startswith("#")}
    assert inside
    assert inside <= page.ids
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert "script" not in page.tags
    assert "url(" not in html
    assert "@import" not in html
    assert page.bold
    for text in page.bold:
        interval(text)


def test_the_command_writes_what_was_asked_for(run, tmp_path, capsys):
    markdown = (run / "report" / "report.md").read_text()

    assert "| for 0.2 |" in markdown
    assert "share of right answers" not in markdown
    for image in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (run / "report" / image).is_file()
    assert main(["report", str(run), "--output", str(tmp_path / "elsewhere"), "--metric", "match"]) == 0
    assert "share of right answers" in (tmp_path / "elsewhere" / "report.md").read_text()
    assert "elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "speed"), "metric must be one of"),
        (("--effect", "0"), "effect must be above 0; got 0"),
    ],
)
def test_wrong_options_are_refused(run, capsys, arguments, message):
    assert main(["report", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_run_no_records_and_a_damaged_header_are_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} must be the folder of a run of graphkv eval; it has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(HEADER))
    assert main(["report", str(tmp_path)]) == 2
    assert "must be the folder of a run of graphkv eval; it has no records.jsonl" in capsys.readouterr().err
    (tmp_path / "records.jsonl").write_text("")
    (tmp_path / "run.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json is damaged" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(HEADER))
    assert main(["report", str(tmp_path)]) == 2
    assert "must have at least one record" in capsys.readouterr().err


def test_a_run_without_any_graph_and_without_needles_is_reported(undrawn):
    records = [
        Record(**{**vars(record), "task": "continuation", "depth": None, "metric": "none", "redundancy": None})
        for record in make_records(prompts=2)
        if "+" not in record.policy
    ]
    markdown, _ = make_report(records, {})

    assert "no policy with wrappers" in markdown
    for absent in ("Gain over the base", "Needles by length", "Diversity", "share of right"):
        assert absent not in markdown


def test_rows_of_a_data_set_have_no_length_and_no_split(undrawn):
    with pytest.raises(ArgumentError, match="at least one record"):
        make_report([], HEADER)
    records = [
        Record(**{**vars(record), "length": None, "split": None, "task": "qasper", "depth": None, "score": 0.25})
        for record in make_records(prompts=2)
        if record.length == 128
    ]
    markdown, _ = make_report(records, HEADER)

    assert "## Query-aware" in markdown
    assert "Score of the generated answers, higher is better" in markdown


def sized(records, sizes, a_token=384):
    """Records whose caches were measured: tokens per policy as a share of the budget, bytes as a multiple of those."""
    result = []
    for record in records:
        share, padding = sizes.get(record.policy, (1, 1))
        kept = record.num_tokens if record.budget is None else record.budget * share
        changes = {"tokens_kept": float(kept), "cache_bytes": int(kept * padding * a_token)}
        result.append(Record(**{**vars(record), **changes}))
    return result


def test_sizes_are_shown_only_where_they_differ(undrawn):
    records = make_records(prompts=2, modes=("aware",), effects=FEW)
    equal, _ = make_report(sized(records, {}), HEADER)
    smaller, _ = make_report(sized(records, {"snapkv+graphkv": (0.5, 1)}), HEADER)
    padded, _ = make_report(sized(records, {"snapkv+graphkv": (1, 1.5)}), HEADER)

    assert "All caches that were measured kept that number of tokens." in equal
    assert "Measured sizes" not in equal
    assert "Caches of `snapkv+graphkv` kept another number of tokens, see *Measured sizes*" in smaller
    found = {(row["policy"], row["prompt"], row["budget"]): row for row in rows(smaller) if "tokens kept" in row}
    assert found["`snapkv+graphkv`", "128", "32"] == {
        "policy": "`snapkv+graphkv`", "prompt": "128", "budget": "32", "tokens kept": "16.0", "MB": "0.006",
        "of the full cache": "12.5%",
    }  # fmt: skip
    assert found["`snapkv`", "128", "32"]["of the full cache"] == "25.0%"
    assert found["`full`", "128", "32"]["tokens kept"] == "128.0"
    assert "All caches that were measured kept that number of tokens." in padded
    found = {(row["policy"], row["prompt"], row["budget"]): row for row in rows(padded) if "tokens kept" in row}
    assert found["`snapkv+graphkv`", "128", "32"]["tokens kept"] == found["`snapkv`", "128", "32"]["tokens kept"]
    assert found["`snapkv+graphkv`", "128", "32"]["MB"] == "0.018"


def test_a_policy_that_finds_its_budget_stands_where_its_cache_was_measured():
    """The figure has it where its tokens are, and the table is in the order of sizes."""
    records = make_records(prompts=2, modes=("aware",), effects=FEW)
    equal, _ = make_report(sized(records, {"snapkv+graphkv": (1, 1.5)}), HEADER, metrics=["nll"])
    found, pictures = make_report(sized(records, {"snapkv+graphkv": (0.5, 1)}), HEADER, metrics=["nll"])
    moved, others = make_report(sized(records, {"snapkv+graphkv": (0.25, 1)}), HEADER, metrics=["nll"])

    title = "#### Quality against tokens kept"
    assert title not in equal
    table = [row for row in rows(section(found, title)) if row["prompt"] == "128"]
    assert [float(row["kept"]) for row in table] == sorted(float(row["kept"]) for row in table)
    (row,) = [row for row in table if row["policy"] == "`snapkv+graphkv`" and row["budget"] == "32"]
    assert row["kept"] == "16.0"
    quality = [row for row in rows(found) if row["policy"] == "`snapkv+graphkv`" and row.get("prompts")]
    assert row["NLL per answer token (nats)"] in {row.get("budget 32") for row in quality}
    figure = next(line for line in found.splitlines() if "against tokens kept per KV head" in line)
    path = figure[figure.rindex("(") + 1 : figure.rindex(")")]
    assert pictures[path] != others[path]
    assert pictures[path].startswith(b"<?xml")
    assert title in moved


def test_a_size_that_changes_from_prompt_to_prompt_has_a_range(undrawn):
    records = sized(make_records(prompts=2, modes=("aware",), effects=FEW), {})
    changed = [
        Record(**{**vars(record), "tokens_kept": record.tokens_kept / (record.seed + 1)})
        if record.policy == "snapkv"
        else record
        for record in records
    ]
    markdown, _ = make_report(changed, HEADER)

    found = {(row["policy"], row["prompt"], row["budget"]): row for row in rows(markdown) if "tokens kept" in row}
    assert found["`snapkv`", "128", "32"]["tokens kept"] == "24.0 (16.0 to 32.0)"


def test_records_without_sizes_are_said_to_have_none(undrawn):
    records = make_records(prompts=2, modes=("aware",), effects=FEW)
    evicted = sum(record.policy != "full" for record in records)
    unmeasured, _ = make_report(records, HEADER)
    mixed, _ = make_report([*sized(records[:1] + records[-1:], {}), *records[1:-1]], HEADER)

    assert f"All {evicted} records of evicted caches were made without measuring the caches." in unmeasured
    assert "All caches that were measured" not in unmeasured
    assert f"{evicted - 1} of {evicted} records of evicted caches were made without" in mixed
    assert "Measured sizes" not in unmeasured + mixed


def test_variants_are_named_by_all_wrappers_of_a_policy(undrawn):
    effects = {"snapkv": 0.0, "snapkv+degree(exponent=8)": -0.5, "snapkv+degree(exponent=8)+adakv": -0.6}
    markdown, _ = make_report(make_records(prompts=3, modes=("aware",), effects=effects), {})

    assert {row["policy"] for row in gains(markdown)} == {f"`{name}`" for name in effects if "+" in name}
