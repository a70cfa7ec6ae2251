"""Sphinx configuration. Build: ``python -m sphinx -n -W -b html docs docs/_build/html``. Needs no network."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from numpydoc import xref
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import reading
import reports

import graphkv
from graphkv.adapters.catalog import ENTRIES
from graphkv.core.values import Value

MATHML = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", MATHML)

# numpydoc links words such as "int" to pages that are not part of this build.
xref.DEFAULT_LINKS.clear()

project = "graphkv"
author = "The graphkv authors"
copyright = author
version = release = graphkv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
exclude_patterns = ["_build", "*.inc.md"]
templates_path = ["_templates"]
nitpicky = True
# Pages of Python and of NumPy are not fetched, so that a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(numpy|scipy|pytest)(\..*)?")]
default_role = "name"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# kvpress needs a transformers of its own age: make test-kvpress.
autodoc_mock_imports = ["kvpress"]
autodoc_typehints = "none"  # dtypes and shapes stand in the docstrings
autodoc_member_order = "bysource"
# The tables of api.md make a page per object in docs/api; that of the policies is made from the catalog.
POLICIES = Path(__file__).parent / "api-policies.inc.md"
POLICIES.write_text(
    "```{eval-rst}\n.. currentmodule:: graphkv\n\n.. autosummary::\n   :nosignatures:\n   :toctree: api\n\n"
    + "".join(f"   {entry.policy.__name__}\n" for entry in ENTRIES)
    + "```\n",
    encoding="utf-8",
)
autosummary_generate = ["api.md", POLICIES.name]
autosummary_generate_overwrite = True
# The members that a page shows, where there are any: of a policy, what it has beside the stages and its options.
OWN = {"epicache", "load", "official", "pyramid_infer", "rocketkv", "share_out", "wants"}
INTEGRATION = "graphkv.integrations"
VALUES = ("Choice", "Cost", "Eviction", "Graph", "Layer", "Memory", "Merge", "Policy", "Protection", "Signal")
autosummary_context = {
    "members_of": {
        **{f"graphkv.{entry.policy.__name__}": ", ".join(sorted(OWN & vars(entry.policy).keys())) for entry in ENTRIES},
        **{f"graphkv.{name}": " " for name in VALUES},
        f"{INTEGRATION}.transformers.EvictingCache": (
            "policy, evict, stats, report, crop, activate_past_recording, copy, save, load, nbytes, "
            "stacked, keep_queries, running_states, with_states, with_stored"
        ),
        f"{INTEGRATION}.transformers.EvictingLayer": "queries, evict, true_positions, num_stored, nbytes",
        f"{INTEGRATION}.kvpress.GraphKVPress": "score, compress",
        f"{INTEGRATION}.kvpress.PolicyPress": "compression_ratio, compress",
    }
}
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
# In the types of parameters, our own classes are links and all other words are words.
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {
    **{name: f"graphkv.{name}" for name in graphkv.__all__ if name[0].isupper()},
}

html_theme = "furo"
html_title = f"graphkv {release}"
html_static_path = ["_static"]
html_css_files = ["graphkv.css"]
html_math_renderer = "mathml"
# Links to a page's source, once pyproject.toml has the address of a repository.
(REPOSITORY,) = re.findall(
    r'^repository = "(.*)"$', (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)
if "example.org" not in REPOSITORY:
    html_theme_options = {
        "source_repository": f"{REPOSITORY}/",
        "source_branch": "main",
        "source_directory": "docs/",
    }

HAS_KIT = importlib.util.find_spec("graphkv.testing") is not None and (
    importlib.util.find_spec("graphkv.testing.suite") is not None
)


def _mathml(node: nodes.math | nodes.math_block, *, block: bool) -> str:
    """Turn an equation into MathML, which every browser of today shows without a script, a font or a network."""
    try:
        return _mended(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("equation: %s", error, location=node)
        return ""


def _mended(drawn: str) -> str:
    """Put the index beside an accented letter, where docutils has it below, and draw the bars of a norm no higher."""
    # XML knows a few entities only, such as &lt;.
    root = ElementTree.fromstring(re.sub(r"&(?!(?:amp|gt|lt);)\w+;", lambda name: unescape(name[0]), drawn))
    for node in list(root.iter()):
        if node.text == "\N{DOUBLE VERTICAL LINE}":
            node.set("stretchy", "false")
        if node.tag == f"{{{MATHML}}}munderover" and node[2].get("stretchy") == "false":
            letter, index, accent = node
            above = ElementTree.Element(f"{{{MATHML}}}mover", accent="true")
            above[:] = [letter, accent]
            node.tag, node[:] = f"{{{MATHML}}}msub", [above, index]
    return ElementTree.tostring(root, encoding="unicode")


def _inline_math(translator: Any, node: nodes.math) -> None:
    """Write an equation inside a line."""
    translator.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _display_math(translator: Any, node: nodes.math_block) -> None:
    """Write a displayed equation."""
    # A guess at its width in its own type, by which it shrinks where the screen is narrower.
    drawn = _mathml(node, block=True)
    width = 0.85 * len("".join(re.sub(r"<[^>]*>", "", drawn).split()))
    translator.body.append(f'<div class="math" tabindex="0" style="--width: {width:.0f}">{drawn}</div>\n')
    raise nodes.SkipNode


class _Link(SphinxRole):
    """A name in code type, with a link if there is something to link to."""

    def target(self) -> tuple[str, str] | None:
        """Return the kind and the full name of what to link to."""
        raise NotImplementedError

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the node."""
        literal = nodes.literal(self.text, self.text, classes=[self.name])
        target = self.target()
        if target is None:
            return [literal], []
        kind, name = target
        reference = addnodes.pending_xref(
            "", literal, refdomain="py", reftype=kind, reftarget=name, refdoc=self.env.docname, refwarn=True
        )
        self.set_source_info(reference)
        return [reference], []


class NameRole(_Link):
    """A name in single backquotes, as in our docstrings: a public object of graphkv, or just a name."""

    def target(self) -> tuple[str, str] | None:
        """Link to what api.md documents."""
        if self.text in graphkv.__all__:
            return "obj", f"graphkv.{self.text}"
        return ("obj", self.text) if self.text.startswith("graphkv.core.") else None


class TestedRole(SphinxRole):
    """``{tested}`folder/test_file.py::test_name``` names a test, which must exist."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Name the test."""
        path, _, name = self.text.partition("::")
        file = Path(__file__).parents[1] / "tests" / path
        if not file.is_file() or f"\ndef {name}(" not in file.read_text(encoding="utf-8"):
            logging.getLogger(__name__).warning("no such test: %s", self.text, location=self.get_location())
        return [nodes.literal(self.rawtext, name, classes=["property"])], []


class PropertyRole(_Link):
    """``{property}`test_name``` links to a property of the conformance kit, or names it where there is no kit."""

    def target(self) -> tuple[str, str] | None:
        """Link to the property."""
        return ("func", f"graphkv.testing.suite.{self.text}") if HAS_KIT else None


class PropertiesDirective(SphinxDirective):
    """``{properties}`` documents every property of the conformance kit, if it is there."""

    def run(self) -> list[nodes.Node]:
        """List them."""
        if not HAS_KIT:
            return self.parse_text_to_nodes("This build has no conformance kit, so its properties are not listed.")
        return self.parse_text_to_nodes(
            "```{eval-rst}\n.. automodule:: graphkv.testing.suite\n   :members:\n   :undoc-members:\n```\n"
        )


def _constructor(*event: Any) -> tuple[str, None] | None:
    """Write the call of a policy or signal: `__new__`, which Sphinx would show, takes anything and only refuses."""
    _, what, _, obj, *_ = event
    if what != "class" or not issubclass(obj, Value):
        return None
    return stringify_signature(inspect.signature(obj), show_annotation=False), None


def setup(app: Sphinx) -> None:
    """Add what this documentation needs beyond its extensions."""
    app.connect("autodoc-process-signature", _constructor)
    app.connect("builder-inited", lambda _: reports.build())
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.add_role("name", NameRole())
    app.add_role("property", PropertyRole())
    app.add_role("tested", TestedRole())
    app.add_directive("properties", PropertiesDirective)
    reading.setup(app)
