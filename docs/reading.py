"""What Sphinx adds to every page: captions under figures, column heads for narrow screens, links of issues."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

__all__ = ["setup"]

# Tables with more columns are set in small type, and in smaller.
WIDE, WIDER = 4, 7
# The pages that name issues of other projects, as "kvpress#250, #268", and where each project keeps them.
TRACKED = {"complaints"}
ISSUE = "https://github.com/{repository}/issues/{number}"
REPOSITORIES = {
    "DeepSpeed": "deepspeedai/DeepSpeed",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1",
    "H2O": "FMInference/H2O",
    "HeadKV": "FYYFU/HeadKV",
    "KVCache-Factory": "Zefan-Cai/KVCache-Factory",
    "LMCache": "LMCache/LMCache",
    "PurpleLlama": "meta-llama/PurpleLlama",
    "R-KV": "Zefan-Cai/R-KV",
    "Rapid-MLX": "raullenchai/Rapid-MLX",
    "ReKV": "Becomebright/ReKV",
    "SGLang": "sgl-project/sglang",
    "SnapKV": "FasterDecoding/SnapKV",
    "Sparse-vLLM": "CURRENTF/Sparse-vLLM",
    "TensorRT-LLM": "NVIDIA/TensorRT-LLM",
    "ThinK": "SalesforceAIResearch/ThinK",
    "VeloxQuant-MLX": "rajveer43/VeloxQuant-MLX",
    "buun-llama-cpp": "spiritbuun/buun-llama-cpp",
    "cold-compress": "AnswerDotAI/cold-compress",
    "ik_llama": "ikawrakow/ik_llama.cpp",
    "ik_llama.cpp": "ikawrakow/ik_llama.cpp",
    "kvpress": "NVIDIA/kvpress",
    "llama": "meta-llama/llama",
    "llama.cpp": "ggml-org/llama.cpp",
    "mistral.rs": "EricLBuehler/mistral.rs",
    "mlx-lm": "ml-explore/mlx-lm",
    "mlx-swift-lm": "ekryski/mlx-swift-lm",
    "nnsight": "ndif-team/nnsight",
    "peft": "huggingface/peft",
    "pruna": "PrunaAI/pruna",
    "sglang": "sgl-project/sglang",
    "text-generation-inference": "huggingface/text-generation-inference",
    "transformers": "huggingface/transformers",
    "trl": "huggingface/trl",
    "unsloth": "unslothai/unsloth",
    "vLLM": "vllm-project/vllm",
    "vllm-kvcompress": "IsaacRe/vllm-kvcompress",
}
MENTION = re.compile(r"(?P<project>[A-Za-z][\w.-]*)?#(?P<number>\d+)")


class Captions(SphinxTransform):
    """Make a figure of every image that stands alone, or over its caption; else its description is the caption."""

    default_priority = 200

    def apply(self, **_: Any) -> None:
        """Wrap the images."""
        for image in list(self.document.findall(nodes.image)):
            holder = image.parent
            if not isinstance(holder, nodes.paragraph) or not image.get("alt") or holder[0] is not image:
                continue
            # The reports write theirs in italics on the next line.
            caption = [nodes.Text(image["alt"])] if len(holder) == 1 else None
            if [type(node) for node in holder[1:]] == [nodes.Text, nodes.emphasis]:
                caption = holder[-1].children
            if caption is not None:
                holder.replace_self(nodes.figure("", image.deepcopy(), nodes.caption("", "", *caption)))


class Heads(SphinxTransform):
    """Add to every cell the head of its column, which is beside it on a screen too narrow for the table."""

    default_priority = 900

    def apply(self, **_: Any) -> None:
        """Mark the cells."""
        for group in self.document.findall(nodes.tgroup):
            head = next(group.findall(nodes.thead), None)
            if head is None:
                continue
            names = [entry.astext() for entry in next(head.findall(nodes.row))]
            group.parent["classes"] += [
                kind for kind, least in (("wide", WIDE), ("wider", WIDER)) if len(names) > least
            ]
            for body in group.findall(nodes.tbody):
                for row in body.findall(nodes.row):
                    for name, entry in zip(names, row, strict=False):
                        entry["head"] = name


class Issues(SphinxTransform):
    """Link the issues of other projects."""

    default_priority = 900

    def apply(self, **_: Any) -> None:
        """Replace each mention."""
        if self.env.docname not in TRACKED:
            return
        for text in list(self.document.findall(nodes.Text)):
            if "#" in text and not isinstance(text.parent, (nodes.literal, nodes.reference)):
                text.parent.replace(text, self.linked(text))

    def linked(self, text: nodes.Text) -> list[nodes.Node]:
        """Split a text at its mentions; one without a project is of the project named before it."""
        found: list[nodes.Node] = []
        project, end = None, 0
        for mention in MENTION.finditer(text):
            project = mention["project"] or project
            found.append(nodes.Text(text[end : mention.start()]))
            end = mention.end()
            if project not in REPOSITORIES:
                logging.getLogger(__name__).warning("no repository for %r", mention[0], location=text.parent)
                continue
            address = ISSUE.format(repository=REPOSITORIES[project], number=mention["number"])
            found.append(nodes.reference("", mention[0], refuri=address, internal=False))
        return [*found, nodes.Text(text[end:])]


class Notebook(SphinxDirective):
    """``{notebook} path`` shows the cells of a notebook, without what they print."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the cells."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(path))
        found: list[nodes.Node] = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                text = f"```python\n{text}\n```"
            # The page has a title of its own.
            text = text if not text.startswith("# ") else text.partition("\n")[2]
            found += self.parse_text_to_nodes(text, allow_section_headings=True)
        return found


class Translator(HTML5Translator):
    """Sphinx's own, and the heads of columns."""

    def visit_entry(self, node: nodes.Element) -> None:
        """Open a cell."""
        place = len(self.body)
        super().visit_entry(node)
        if node.get("head"):
            self.body[place] = self.body[place].replace("<td", f'<td data-head="{escape(node["head"])}"', 1)


def setup(app: Sphinx) -> None:
    """Register everything."""
    for transform in (Captions, Heads, Issues):
        app.add_transform(transform)
    app.add_directive("notebook", Notebook)
    for builder in ("html", "dirhtml"):
        app.set_translator(builder, Translator, override=True)
