"""Metadata that the build makes: links from one address, and a README whose links lead somewhere elsewhere, too.

The address is ``repository`` under ``[tool.hatch.metadata.hooks.custom]`` in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Markdown links and images to a file of the repository.
RELATIVE = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<path>(?!https?:|#)[^)]+)\)")


def absolute(readme: str, repository: str) -> str:
    """Make the links of a README absolute; pictures are asked for as files, the rest as pages."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["before"].startswith("!") else "blob"
        return f"{found['before']}{repository}/{kind}/main/{found['path']})"

    return RELATIVE.sub(link, readme).replace("https://example.org/graphkv", repository)


class LinksHook(MetadataHookInterface):
    """Fill in what pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set readme and urls."""
        root = Path(self.root)
        repository = self.config["repository"]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute((root / "README.md").read_text(encoding="utf-8"), repository),
        }
        metadata["urls"] = {
            "Homepage": repository,
            "Documentation": f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
            "Paper": "https://arxiv.org/abs/2509.00388",
        }
