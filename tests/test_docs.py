"""Every code block of the documentation runs, every picture is current, and the pages build without a warning."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
RUN, SHOWN = "python", {"shell", "text", "toml"}


def blocks(page):
    """Return (line, language, body) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield text.count("\n", 0, found.start()) + 2, found["language"].strip(), found["body"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, monkeypatch):
    if "array_api_strict" in page.read_text(encoding="utf-8"):
        pytest.importorskip("array_api_strict")
    if page.stem == "kvpress":
        pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"__name__": f"docs_{page.stem}"}
    # A dataclass looks its module up.
    monkeypatch.setitem(sys.modules, namespace["__name__"], type(sys)(namespace["__name__"]))

    for line, language, body in blocks(page):
        if language == RUN:
            exec(compile("\n" * (line - 1) + body, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    languages = {language for _, language, _ in blocks(page)}

    assert {x for x in languages if not x.startswith("{")} <= {RUN} | SHOWN
    # An indented fence or a bare one would escape the pattern above.
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(list(blocks(page)))


def test_pages_with_code_are_found():
    counts = {page.stem: sum(language == RUN for _, language, _ in blocks(page)) for page in PAGES}

    assert {"index", "specification", "policies", "porting", "vectors", "design"} <= {k for k, n in counts.items() if n}


def test_specification_names_every_property_of_the_kit():
    suite = pytest.importorskip("graphkv.testing.suite", reason="no conformance kit in this tree")
    properties = {name for name in vars(suite) if name.startswith("test_")}
    text = (DOCS / "specification.md").read_text(encoding="utf-8")

    assert set(re.findall(r"\{property\}`(\w+)`", text)) == properties


def test_pictures_are_current():
    done = subprocess.run([sys.executable, DOCS / "figures" / "draw.py", "--check"], check=False)

    assert done.returncode == 0


def check_script(name, *, on=DOCS):
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, on / name, "--check"], check=False, env=environment, capture_output=True, text=True
    )


def run_script(name, *, on=DOCS):
    return check_script(name, on=on).returncode


@pytest.mark.parametrize("name", ["support.py", "names.py", "performance.py", "results.py"])
def test_tables_are_what_their_script_makes(name):
    if name == "results.py":
        pytest.importorskip("graphkv.evaluation.report", reason="graphkv eval needs graphkv[eval]")

    assert run_script(name) == 0


def test_a_table_that_is_not_current_is_found(tmp_path):
    for name in ("support.py", "marked.py", "policies.md"):
        shutil.copy(DOCS / name, tmp_path)
    page = tmp_path / "policies.md"
    assert run_script("support.py", on=tmp_path) == 0

    page.write_text(page.read_text(encoding="utf-8").replace("| {py:class}`graphkv.KNorm` |", "| KNorm |"))
    assert run_script("support.py", on=tmp_path) == 1


def test_results_that_the_records_do_not_give_are_found(tmp_path):
    pytest.importorskip("graphkv.evaluation.report", reason="graphkv eval needs graphkv[eval]")
    assert run_script("results.py") == 0  # the reports are there now, and are copied
    for name in ("results.py", "reports.py", "claims.py", "marked.py"):
        shutil.copy(DOCS / name, tmp_path)
    shutil.copytree(DOCS / "results", tmp_path / "results")
    page, figure = tmp_path / "results" / "index.md", tmp_path / "results" / "aware.svg"
    text = page.read_text(encoding="utf-8")
    assert "better in 59 of 88 cells" in text
    page.write_text(text.replace("59 of 88 cells", "60 of 88 cells"), encoding="utf-8")
    figure.write_bytes(figure.read_bytes().replace(b"z\n", b"\n", 1))
    digests = tmp_path / "results" / "reports.sha256"
    first, second, *rest = digests.read_text(encoding="utf-8").splitlines(keepends=True)
    digests.write_text("".join([first, second.replace(second[:8], "01234567"), *rest]), encoding="utf-8")

    done = check_script("results.py", on=tmp_path)

    assert done.returncode == 1
    assert "index.md does not say what the records say: better in 59 of 88 cells" in done.stdout
    files = next(line for line in done.stdout.splitlines() if "reports.sha256" in line).partition(": ")[2].split(", ")
    # Where other versions are installed, the check says so and compares no file.
    assert files == [second.split()[-1], "aware.svg"] or "not compared" in done.stdout


def test_pages_build_without_a_warning_and_need_no_network(tmp_path):
    for module, version in (
        ("sphinx", "9"),
        ("docutils", "0.22"),
        ("myst_parser", "5"),
        ("furo", "0"),
        ("numpydoc", "1"),
        ("matplotlib", "3"),
    ):
        pytest.importorskip(module, minversion=version)
    build = [sys.executable, "-m", "sphinx", "-n", "-W", "-q", "-b", "html", "-d", tmp_path / "trees", DOCS, tmp_path]

    done = subprocess.run(build, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    loaded = r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*rel=\"stylesheet\"[^>]*href=\"(?:https?:)?//"
    pages = {page.name: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    assert [name for name, html in pages.items() if re.search(loaded, html)] == []
    assert "<math" in pages["specification.html"]
    # Reports are built from the records, and can be reached.
    results = tmp_path / "results"
    for run in ("baselines", "standard"):
        assert f'href="{run}/report.html"' in (results / "index.html").read_text(encoding="utf-8")
        shown = re.findall(
            r'<img [^>]*src="\.\./\.\./(_images/\w+\.svg)"', (results / run / "report.html").read_text("utf-8")
        )
        assert len(shown) == len(list((DOCS / "results" / run / "figures").iterdir())) > 0
        assert all((tmp_path / path).is_file() for path in shown)
