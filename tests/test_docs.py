"""Every code block of the documentation runs, and the pages build without a warning: `make docs` runs this."""

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Not the reports, which are made from records and have no code.
PAGES = sorted(
    page for folder in (".", "gallery", "guide") for page in (DOCS / folder).glob("*.md") if ".inc" not in page.name
)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
RUN, SHOWN = "python", {"shell", "text", "toml"}


def blocks(page):
    """Return (line, language, body) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield text.count("\n", 0, found.start()) + 2, found["language"].strip(), found["body"]


def name_of(page):
    """Name a page by its path: ``kvpress`` or ``guide/chats``."""
    return page.relative_to(DOCS).with_suffix("").as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run_in_order(page, monkeypatch, request):
    text = page.read_text(encoding="utf-8")
    if not any(language == RUN for _, language, _ in blocks(page)):
        pytest.skip("the page has no code")
    # Pages load a model from its hub, for which there is no network here.
    model = request.getfixturevalue("default_model") if HUB_ID in text else HUB_ID
    if "array_api_strict" in text:
        pytest.importorskip("array_api_strict")
    if page.stem == "kvpress":
        pytest.importorskip("kvpress", reason="kvpress lives in an environment of its own: make test-kvpress")
    if name_of(page) == "serving":
        pytest.skip("its code needs LMCache and its server: tests/lmcache runs it")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"__name__": f"docs_{page.stem}"}
    # A dataclass looks its module up.
    monkeypatch.setitem(sys.modules, namespace["__name__"], type(sys)(namespace["__name__"]))

    for line, language, body in blocks(page):
        if language == RUN:
            exec(compile("\n" * (line - 1) + body.replace(HUB_ID, model), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    languages = {language for _, language, _ in blocks(page)}

    assert {x for x in languages if not x.startswith("{")} <= {RUN} | SHOWN
    # An indented fence or a bare one would escape the pattern above.
    text = page.read_text(encoding="utf-8")
    # A block's line is that of its body.
    fenced = [line for line, _, _ in blocks(page) if text.splitlines()[line - 2].startswith("```")]
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(fenced)


def test_memory_has_one_unit_everywhere():
    """MB are 10^6 bytes, as `report` and the command line print them."""
    shown = [ROOT / "README.md", *DOCS.rglob("*.md"), *DOCS.glob("*.py"), *(ROOT / "graphkv").rglob("*.py")]

    assert [path.name for path in shown if re.search(r"\b[KMG]iB\b", path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("sheet", ["docs/_static/graphkv.css", "graphkv/evaluation/report/page.html"])
def test_paper_is_no_telephone(sheet):
    """It is as narrow, but rows as cards would fill dozens of pages."""
    text = (ROOT / sheet).read_text(encoding="utf-8")
    assert re.findall(r"@media.*max-width: 48.*", text)[0].startswith("@media screen and")
    assert "@media print {" in text


def test_pages_with_code_are_found():
    counts = {page.stem: sum(language == RUN for _, language, _ in blocks(page)) for page in PAGES}

    assert {"index", "quickstart", "chats", "specification", "policies", "porting", "vectors", "design"} <= {
        k for k, n in counts.items() if n
    }


def test_specification_names_every_property_of_the_kit():
    suite = pytest.importorskip("graphkv.testing.suite", reason="no conformance kit in this tree")
    properties = {name for name in vars(suite) if name.startswith("test_")}
    text = (DOCS / "specification.md").read_text(encoding="utf-8")

    assert set(re.findall(r"\{property\}`(\w+)`", text)) == properties


def check_script(name, *, on=DOCS):
    environment = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, on / name, "--check"], check=False, env=environment, capture_output=True, text=True
    )


def run_script(name, *, on=DOCS):
    return check_script(name, on=on).returncode


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


@pytest.fixture(scope="module")
def site():
    """The built pages; a warning is an error."""
    for module, version in (
        ("sphinx", "9"),
        ("docutils", "0.22"),
        ("myst_parser", "5"),
        ("furo", "0"),
        ("numpydoc", "1"),
        ("matplotlib", "3"),
    ):
        pytest.importorskip(module, minversion=version)
    # Where `make docs` builds them: after it, only what has changed is built.
    out = DOCS / "_build" / "html"
    out.mkdir(parents=True, exist_ok=True)
    build = [sys.executable, "-m", "sphinx", "-n", "-W", "-q", "-b", "html", DOCS, out]
    with (out.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def pages_of(site):
    return {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}


def test_pages_need_no_network(site):
    loaded = r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*rel=\"stylesheet\"[^>]*href=\"(?:https?:)?//"

    assert [name for name, html in pages_of(site).items() if re.search(loaded, html)] == []


def test_reports_are_built_and_can_be_reached(site):
    for run in ("baselines", "standard"):
        assert f'href="{run}/report.html"' in (site / "results" / "index.html").read_text(encoding="utf-8")
        shown = re.findall(
            r'<img [^>]*src="\.\./\.\./(_images/\w+\.svg)"', (site / "results" / run / "report.html").read_text("utf-8")
        )
        assert len(shown) == len(list((DOCS / "results" / run / "figures").iterdir())) > 0
        assert all((site / path).is_file() for path in shown)


def test_formulas_show_no_markup(site):
    formulas = [
        (name, formula)
        for name, html in pages_of(site).items()
        for formula in re.findall(r"<math.*?</math>", html, re.DOTALL)
    ]

    assert len(formulas) > 50
    # The index of an accented letter is beside it, and a norm is as high as the text.
    assert [
        name for name, text in formulas if re.search(r'<mo stretchy="false">[^<]*</mo>\s*</munderover>', text)
    ] == []
    assert any('<mo stretchy="false">\N{DOUBLE VERTICAL LINE}</mo>' in text for _, text in formulas)
    assert [name for name, text in formulas if "<mo>\N{DOUBLE VERTICAL LINE}" in text] == []
    # What a reader sees has no backslash, and no dollar sign is left in a text.
    assert [(name, text) for name, text in formulas if "\\" in re.sub(r"<[^>]*>", "", text)] == []
    assert [name for name, html in pages_of(site).items() if re.search(r"<p>[^<]*\$[^$<]+\$", html)] == []


def test_every_picture_has_a_caption_and_every_cell_its_head(site):
    articles = {
        name: html.partition("<article")[2].partition("</article>")[0]
        for name, html in pages_of(site).items()
        # Its images are buttons.
        if name != "py-modindex.html"
    }

    images = {name: html.count("<img ") for name, html in articles.items()}
    assert sum(images.values()) > 20 + images["results/standard/report.html"] > 70
    assert {name: html.count("<figcaption>") for name, html in articles.items()} == images
    assert 'data-head="budget"' in articles["results/index.html"]


def test_issues_of_other_projects_are_links(site):
    html = (site / "complaints.html").read_text(encoding="utf-8")
    mentions = re.findall(r"#\d+", (DOCS / "complaints.md").read_text(encoding="utf-8"))

    assert len(mentions) > 60
    assert len(re.findall(r'<a [^>]*href="https://github.com/[\w.-]+/[\w.-]+/issues/\d+">', html)) == len(mentions)


def test_every_public_object_has_a_page(site):
    import graphkv

    assert [
        name for name in graphkv.__all__ if name[0] != "_" and not (site / f"api/graphkv.{name}.html").is_file()
    ] == []


def test_the_page_of_a_policy_shows_its_options(site):
    """Not those of `__new__`, which takes anything."""
    html = (site / "api/graphkv.Random.html").read_text(encoding="utf-8")
    call = re.sub(r"<[^>]*>", "", html.partition('<dt class="sig')[2].partition("</dt>")[0])

    assert "graphkv.Random(*, budget, num_sinks=0, seed=0)" in call


def test_pictures_follow_a_dark_screen():
    drawn = [*DOCS.glob("figures/*.svg"), *DOCS.glob("gallery/*.svg"), *DOCS.glob("results/*.svg")]

    assert len(drawn) > 14
    assert [path.name for path in drawn if "prefers-color-scheme:dark" not in path.read_text(encoding="utf-8")] == []
