"""Sphinx configuration. Build: ``python -m sphinx -n -W -b html docs docs/_build/html``. Needs no network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

sys.path.insert(0, str(Path(__file__).parents[1]))

import graphkv

project = "graphkv"
author = "The graphkv authors"
copyright = author
version = release = graphkv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
exclude_patterns = ["_build", "generated"]
nitpicky = True
# NumPy's own pages are not fetched: a build needs no network.
nitpick_ignore_regex = [("py:.*", r"numpy(\..*)?|scipy(\..*)?|pytest(\..*)?|typing\..*|signal|collections\.abc\..*")]
default_role = "autolink"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_typehints = "none"  # dtypes and shapes stand in the docstrings
autodoc_member_order = "bysource"
autosummary_generate = False  # the tables on api.md point into that page
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"graphkv {release}"
html_static_path = ["_static"]
html_css_files = ["graphkv.css"]
html_math_renderer = "mathml"

HAS_KIT = importlib.util.find_spec("graphkv.testing") is not None and (
    importlib.util.find_spec("graphkv.testing.suite") is not None
)


def _inline_math(translator: Any, node: nodes.math) -> None:
    """Write an equation as MathML: every browser of today shows it without a script, a font or a network."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _display_math(translator: Any, node: nodes.math_block) -> None:
    """Write a displayed equation, in a box that scrolls on a narrow screen."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


class PropertyRole(SphinxRole):
    """``{property}`test_name``` links to a property of the conformance kit, or names it where there is no kit."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make the link."""
        literal = nodes.literal(self.text, self.text)
        if not HAS_KIT:
            return [literal], []
        target = f"graphkv.testing.suite.{self.text}"
        reference = addnodes.pending_xref(
            "", literal, refdomain="py", reftype="func", reftarget=target, refdoc=self.env.docname, refwarn=True
        )
        self.set_source_info(reference)
        return [reference], []


class PropertiesDirective(SphinxDirective):
    """``{properties}`` documents every property of the conformance kit, if it is there."""

    def run(self) -> list[nodes.Node]:
        """List them."""
        if not HAS_KIT:
            return self.parse_text_to_nodes("This build has no conformance kit, so its properties are not listed.")
        return self.parse_text_to_nodes(
            "```{eval-rst}\n.. automodule:: graphkv.testing.suite\n   :members:\n   :undoc-members:\n```\n"
        )


def setup(app: Sphinx) -> None:
    """Add what this documentation needs beyond its extensions."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.add_role("property", PropertyRole())
    app.add_directive("properties", PropertiesDirective)
