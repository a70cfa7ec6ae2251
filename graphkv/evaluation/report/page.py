"""A report as one HTML file: its Markdown with the figures inside."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from itertools import pairwise
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["make_page"]


def make_page(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """Turn the Markdown of a report into a page that needs no other file.

    Parameters
    ----------
    markdown : str
        CommonMark with tables, without HTML. The first heading is the title.
    pictures : mapping of str to bytes
        SVG: what the images of the Markdown point to.

    Returns
    -------
    str
        HTML.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="table" role="region" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parser.add_render_rule("image", _image)
    tokens = parser.parse(markdown)
    contents = _name_headings(tokens)
    _frame_figures(tokens)
    _name_cells(tokens)
    body = parser.renderer.render(tokens, parser.options, {"pictures": pictures})
    template = Template((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    links = "\n".join(
        f'<li class="level{level}"><a href="#{name}">{escape(text)}</a></li>' for level, text, name in contents
    )
    title = next((text for level, text, _ in contents if level == 1), "Report")
    return template.substitute(title=escape(title), contents=links, body=body)


def _name_headings(tokens: Sequence[Token]) -> list[tuple[int, str, str]]:
    """Set an id on every heading; return level, text and id of all."""
    contents: list[tuple[int, str, str]] = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            words = re.sub(r"[^a-z0-9]+", "-", inline.content.lower()).strip("-")
            name = f"{words}-{len(contents)}"
            token.attrSet("id", name)
            contents.append((int(token.tag[1:]), inline.content, name))
    return contents


def _frame_figures(tokens: Sequence[Token]) -> None:
    """Make a figure of every paragraph of an image and its caption."""
    for before, inline, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        inside = inline.children or []
        if before.type == "paragraph_open" and inside and inside[0].type == "image":
            before.tag = after.tag = "figure"
            for token in inside:
                if token.tag == "em":
                    token.tag = "figcaption"


def _name_cells(tokens: Sequence[Token]) -> None:
    """Add to every cell the head of its column, which is beside it on a screen too narrow for the table."""
    heads: list[str] = []
    column = 0
    for token, inside in pairwise(tokens):
        if token.type == "table_open":
            heads = []
        elif token.type == "tr_open":
            column = 0
        elif token.type == "th_open":
            heads.append(inside.content)
        elif token.type == "td_open":
            token.attrSet("data-head", heads[column])
            column += 1


def _image(renderer: Any, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
    """Put a picture into the page."""
    token = tokens[place]
    source = b64encode(env["pictures"][token.attrGet("src")]).decode()
    return f'<img src="data:image/svg+xml;base64,{source}" alt="{escape(token.content)}">'
