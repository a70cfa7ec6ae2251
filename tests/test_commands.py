"""The command line as a whole: what is missing, what cannot be written, what help says, and who reads the output."""

import ast
import gzip
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

import graphkv
from graphkv.__main__ import PACKAGES, main
from graphkv.cli import REASONING, RULER, TASKS
from graphkv.evaluation.prompts import reasoning, riddles, ruler
from graphkv.evaluation.records import read_records
from graphkv.evaluation.runs.config import Config
from graphkv.naming.listing import list_policies, policy_names
from graphkv.naming.policies import BASES, LOADED, LOADED_WRAPPERS, WRAPPERS
from graphkv.workbench.files import check_folder
from tests.integrations.tiny import save_tiny_llama

ROOT = Path(graphkv.__file__).parent
# Where each command begins.
MODULES = {
    "demo": "demo/app.py",
    "inspect": "demo/inspect.py",
    "eval": "evaluation/runs/command.py",
    "report": "evaluation/report/command.py",
    "tune": "evaluation/tuning/command.py",
}
ARGUMENTS = {"report": ["run"]}
# What graphkv itself brings, what comes with those of PACKAGES, and what one option asks for and names by itself.
AT_HAND = {"numpy", "scipy", "array_api_compat", "typer", "graphkv"}
FOR_AN_OPTION = {"kvpress", "gguf", "safetensors", "tomllib", "tomli", "long_context_eval", "yaml"}
# In files that all share: for type checkers, and to write a preset.
ELSEWHERE = {"typing_extensions", "tomli_w"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


def one_line(capsys):
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("command", "package"), [(command, package) for command, (_, found) in PACKAGES.items() for package in found]
)
def test_a_missing_package_is_one_line_before_any_work(command, package, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As if it were not installed, whether or not somebody has imported it by now.
    monkeypatch.setitem(sys.modules, package, None)

    assert main([command, *ARGUMENTS.get(command, [])]) == 2
    extra = PACKAGES[command][0]
    line = one_line(capsys)
    assert line.startswith(f"graphkv: graphkv {command} needs: pip install 'graphkv[{extra}]'")
    assert line.endswith(f"(No module named {package!r})")
    assert list(tmp_path.iterdir()) == []


def imported_by(path, seen):
    """The packages that a file imports, early or late, with those of all files of ours that it imports."""
    seen.add(path)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found |= {name.partition(".")[0] for name in names}
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inner = [folder, *(folder / alias.name for alias in node.names)]
            files = [
                file for each in inner for file in (each.with_suffix(".py"), each / "__init__.py") if file.exists()
            ]
            found |= set().union(*(imported_by(file, seen) for file in files if file not in seen))
    return found


@pytest.mark.parametrize("command", MODULES)
def test_every_package_that_a_command_imports_is_looked_for(command):
    found = imported_by(ROOT / MODULES[command], set())
    # Backends import their own library and are asked for by name.
    needed = found - sys.stdlib_module_names - AT_HAND - FOR_AN_OPTION
    assert needed - ELSEWHERE <= {*PACKAGES[command][1]}, command
    assert "tomli_w" in PACKAGES["tune"][1]
    assert {"torch", "transformers"} <= needed or command == "report"


@pytest.mark.parametrize(
    ("module", "extra", "hidden"),
    [
        ("graphkv.integrations.transformers", "transformers", "torch"),
        ("graphkv.integrations.transformers", "transformers", "transformers"),
        ("graphkv.integrations.kvpress", "kvpress", "kvpress"),
        ("graphkv.integrations.kvpress", "kvpress", "torch"),
        ("graphkv.testing.suite", "testing", "hypothesis"),
    ],
)
def test_python_entries_name_the_extra_that_they_lack(module, extra, hidden):
    code = (
        f"import sys; sys.modules[{hidden!r}] = None\ntry: import {module}\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{module} needs: pip install 'graphkv[{extra}]'"), done.stdout + done.stderr
    assert hidden in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_the_command_line_itself_names_the_extra_of_its_command():
    code = "import sys; sys.modules['typer'] = None; from graphkv.__main__ import main; sys.exit(main({!r}))"
    for arguments, extra in ((["eval", "--suite", "quick"], "eval"), (["tune"], "tune"), (["--help"], "demo")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert f"pip install 'graphkv[{extra}]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, "-c", code.format(["--version"])], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"graphkv {graphkv.__version__}\n"


def test_a_mistake_of_our_own_is_not_taken_for_a_missing_package():
    from graphkv.core.extras import needs

    with pytest.raises(ImportError, match="cannot import name") as found, needs("this", "demo"):
        from graphkv.core.layer import nothing_of_that_name  # noqa: F401
    assert not isinstance(found.value, graphkv.BackendUnavailableError)
    with pytest.raises(graphkv.BackendUnavailableError, match="this needs: pip install"), needs("this", "demo"):
        raise ImportError("a library of C is damaged")


def test_an_installed_copy_tells_where_it_came_from(monkeypatch):
    from graphkv.core import extras

    class Copy:
        def read_text(self, name):
            return '{"url": "file:///home/me/graphkv", "dir_info": {}}'

    monkeypatch.setattr(extras, "distribution", lambda name: Copy())
    expected = "pip install 'graphkv[eval]', or 'graphkv[eval] @ file:///home/me/graphkv', where this one came from"
    assert extras.install("eval") == expected


def test_version_and_help_have_their_usual_names(capsys):
    for arguments in (["--version"], ["--version", "demo"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"graphkv {graphkv.__version__}\n"
    shown = []
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        shown.append(captured.out)
    assert len(set(shown)) == 1
    assert main(["eval", "-h"]) == 0


def text_of_help(capsys, command):
    assert main([command, "--help"]) == 0
    # Without the frame, and with words that were broken at its edge put together again.
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("command", MODULES)
def test_help_says_the_default_of_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    text = text_of_help(capsys, command)
    options = re.split(r"(?= --[a-z-]+ )", text.partition("Options")[2])
    for option in options[1:]:
        name = option.split()[0]
        is_first_of_pair = f"--no-{name[2:]}" in text
        if name not in ("--help", "--show-completion", "--install-completion") and not is_first_of_pair:
            assert "efault:" in option, option


def test_the_defaults_of_eval_are_those_of_its_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    text = text_of_help(capsys, "eval")
    defaults = {entry.name: entry.default for entry in fields(Config)}
    for option, name in (("length", "lengths"), ("budget", "budgets"), ("task", "tasks"), ("prompts", "prompts"),
                         ("split", "split"), ("seed", "seed"), ("batch", "batch"), ("sinks", "sinks")):  # fmt: skip
        default = defaults[name]
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert re.search(rf"--{option} .*?Default: {re.escape(shown)}\.", text), option
    assert f"Default: full, {', '.join(defaults['policies'])}." in text
    assert TASKS.split(", ") == list(riddles.TASKS)
    assert RULER.split(", ") == list(ruler.RULER)
    assert REASONING.split(", ") == list(reasoning.REASONING)


def test_policies_lists_every_name_on_a_line_of_its_own(capsys):
    assert main(["policies"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "arXiv", "needs", "ranks", "tokens", "by"]
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(["full", *BASES, *LOADED, *(f"+{name}" for name in [*WRAPPERS, *LOADED_WRAPPERS])])
    assert "2404.14469" in next(line for line in lines if line.startswith("snapkv "))
    assert "`" not in "".join(lines)
    assert all(line.what for line in list_policies())


def test_names_of_policies_are_completed():
    assert policy_names("snapkv+deg") == ["snapkv+degree"]
    assert "streaming-llm" in policy_names("s")
    environment = {
        **os.environ,
        "_GRAPHKV_COMPLETE": "complete_bash",
        "COMP_WORDS": "graphkv demo --policy h2",
        "COMP_CWORD": "3",
    }
    code = "from graphkv.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["h2o"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    for command in ("demo", "inspect", "eval", "tune"):
        assert main([command, "--output", str(tmp_path / "a" / "b"), "--model", "no/such"]) == 2
        assert "a/b cannot be written: " in one_line(capsys)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(graphkv.ArgumentError, match="file is a file"):
        check_folder(tmp_path / "file" / "inside")
    check_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_what_was_found_is_printed_though_the_disk_is_full(tiny, tmp_path, capsys, monkeypatch, command):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphkv.workbench.files.write_file", full)
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother one.\n")
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--budget", "60"]
    assert main([command, *options, "--output", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "60" in captured.out
    assert "snapkv" in captured.out.lower()
    assert captured.err.splitlines()[-1].endswith("cannot be written: No space left on device")


def test_a_conversion_on_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    from graphkv.workbench import model

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "_packaged_gguf", lambda: tmp_path)
    monkeypatch.setattr(model, "_check_sha256", lambda path: None)
    monkeypatch.setattr(model, "_convert", full)
    monkeypatch.setattr(model.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line
    assert "XDG_CACHE_HOME" in line


def test_progress_off_a_terminal_is_a_line_for_each_step(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother one.\n")
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--budget", "60", "--policy", "snapkv"]
    assert main(["demo", *options, "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    for step in ("Loading", "Reading", "Answering with snapkv", "Drawing"):
        assert re.search(rf"^{step}.*: \d+\.\d s$", captured.err, re.MULTILINE), step
    assert "Reading" not in captured.out


def test_output_that_nobody_reads_on_ends_quietly(tmp_path):
    code = "from graphkv.__main__ import main; import sys; sys.exit(main(['policies']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


def test_no_color_leaves_no_escapes_and_pipes_no_trailing_spaces(tiny, tmp_path, capsys, monkeypatch):
    from graphkv.workbench import progress

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    progress.table_console().print("[bold]bold[/bold] [red]red[/red]")
    assert capsys.readouterr().out == "bold red\n"
    monkeypatch.undo()
    (tmp_path / "text.txt").write_text("One paragraph.\n\nAnother one.\n")
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--budget", "60", "--policy", "snapkv"]
    main(["demo", *options, "--output", str(tmp_path / "out")])
    assert not re.search(r" $", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", ["demo", "inspect", "eval"])
def test_bfloat16_on_the_cpu(tiny, tmp_path, capsys, command):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {number} of some text." for number in range(60)))
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--budget", "30%"]
    if command == "eval":
        options[-1] = "25%"
        options += ["--task", "continuation", "--length", "240", "--prompts", "1", "--policy", "snapkv+degree"]
    elif command == "demo":
        options += ["--policy", "snapkv+degree"]
    runs = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        assert main([command, *options, "--dtype", dtype, "--device", "cpu", "--output", str(out)]) == 0
        runs[dtype] = capsys.readouterr().out
    assert runs["float32"] != runs["bfloat16"]
    if command == "eval":
        found = {dtype: read_records(tmp_path / dtype) for dtype in runs}
        assert {record.budget for record in found["bfloat16"]} == {None, 60}
        assert [record.cache_bytes for record in found["bfloat16"]] == [
            record.cache_bytes // 2 for record in found["float32"]
        ]


def test_our_warnings_are_one_line_too(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One paragraph of some text.\n\nAnother one of other text.\n\n")
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--budget", "20", "--policy", "snapkv"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["demo", *options, "--output", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "kept before all others" in line]
    assert line.startswith("graphkv: warning: 32 newest tokens are kept before all others")


@pytest.mark.slow
def test_an_interrupt_ends_all_workers_in_one_line(tiny, tmp_path, request):
    # A shell's background jobs ignore the signal and hand that on; a process with a handler does not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {number} of some text." for number in range(900)))
    options = ["--model", tiny, "--text", tmp_path / "text.txt", "--task", "continuation", "--length", "1800"]
    options += ["--prompts", "60", "--budget", "64", "--workers", "2", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "graphkv", "eval", *map(str, options)]
    # As a terminal does: the signal goes to the whole group. Once while the workers load, once while they answer.
    for wait_for_records in (False, True):
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            records = tmp_path / "out" / "records.jsonl"
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if records.exists() and (records.stat().st_size or not wait_for_records):
                    break
                time.sleep(0.02)
            time.sleep(0 if wait_for_records else 1.5)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err.decode()
        assert b"Traceback" not in err
        assert err.decode().strip().splitlines()[-1] == "graphkv: interrupted"


def test_packed_records_are_read_and_not_continued(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {number} of some text." for number in range(60)))
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--task", "continuation", "--length", "240"]
    options += ["--prompts", "2", "--budget", "64", "--policy", "snapkv", "--policy", "snapkv+degree"]
    run = tmp_path / "run"
    assert main(["eval", *options, "--output", str(run)]) == 0
    shown = capsys.readouterr().out
    assert (
        "continuation, agnostic, 240 tokens, 4 sinks: NLL per answer token (lower is better), 95 % intervals" in shown
    )
    assert "Gain over the base alone, prompt by prompt (above 0 is better)" in shown
    assert "budget 64" in shown
    gains = shown.partition("Gain over")[2]
    assert re.search(r"snapkv\+degree +│ +[+-]\d\.\d{3} \([+-]\d\.\d\d to [+-]\d\.\d\d\) (better|worse|open)", gains)
    records = read_records(run)
    path = run / "records.jsonl"
    (run / "records.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_records(str(run)) == records
    assert main(["report", str(run), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.md").exists()
    capsys.readouterr()
    assert main(["eval", *options, "--output", str(run)]) == 2
    assert "holds records.jsonl.gz; unpack it to continue the run" in capsys.readouterr().err
    (run / "records.jsonl.gz").write_bytes(b"no gzip")
    assert main(["report", str(run)]) == 2
    assert "records.jsonl.gz cannot be read" in one_line(capsys)


def test_a_budget_without_a_choice_is_said_before_the_run(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {number} of some text." for number in range(60)))
    options = ["--model", str(tiny), "--text", str(tmp_path / "text.txt"), "--task", "continuation", "--length", "240"]
    assert main(["eval", *options, "--prompts", "1", "--budget", "10%", "--output", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert "Warning: sinks, recents and window of snapkv take up the budget of 24: no score matters there" in shown
