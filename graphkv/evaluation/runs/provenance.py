"""The provenance of a run: what its numbers depend on, and what each session worked with."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import graphkv

from ...naming.names import is_own, is_preset, is_press, parse
from ...naming.policies import own_module
from ...naming.presets import load_preset
from ...workbench.model import DEFAULT_MODEL
from ...workbench.text import Text
from ..prompts.ruler import is_ruler, ruler_versions
from .config import Config

__all__ = ["identity_of", "session_now"]

PACKAGES = ("numpy", "scipy", "tokenizers", "torch", "transformers")


def identity_of(
    config: Config, model: Any, text: Text, skipped: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Return what the numbers depend on: it must stay the same in every session of a run."""
    data = None if config.data is None else _hash_of_file(Path(config.data))
    presets = {name: load_preset(Path(name)).as_toml() for name in config.policies if is_preset(name)}
    named = [preset["base"] for preset in presets.values()]
    named += [name for name in config.policies if not is_preset(name) and not is_press(name)]
    modules = [own_module(kind, name) for name in named if is_own(kind := parse(name)[0][0])]
    return {
        "config": config.as_json(),
        "model": {"name": config.model or DEFAULT_MODEL, "sha256": _hash_of_model(model), "dtype": str(model.dtype)},
        "text": {"name": text.name, "sha256": text.sha256()},
        "data": {"sha256": data}
        | ({"skipped": {why: len(lines) for why, lines in skipped.items()}} if skipped else {}),
        **({"ruler": ruler_versions()} if data is None and any(map(is_ruler, config.tasks)) else {}),
        "threads": torch.get_num_threads(),
        **({"presets": presets} if presets else {}),
        **({"modules": {module.__name__: _hash_of_module(module) for module in modules}} if modules else {}),
    }


def _hash_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash_of_module(module: Any) -> str | None:
    """Return the SHA-256 of the file of a module with a policy of the user's own; None without a file."""
    path = getattr(module, "__file__", None)
    return None if path is None else _hash_of_file(Path(path))


def _hash_of_model(model: Any) -> str:
    """Return the SHA-256 of all parameters, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def session_now() -> dict[str, Any]:
    """Return what this session works with: versions, commit, machine and time."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"graphkv": graphkv.__version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
            if sys.platform != "win32"
            else None,
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """Return the commit of a checkout, marked where files differ from it; None for an installed package."""
    package = Path(graphkv.__file__).resolve().parent
    # An installed package may be inside the checkout of something else.
    if _git(package, "rev-parse", "--show-toplevel") != str(package.parent):
        return None
    return _git(package, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
