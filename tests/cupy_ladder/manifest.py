"""What the real CuPy wheel offers: its public names and signatures, read without a GPU.

``manifest.json`` is the committed answer for the version named in it; the stand-in is built from that, and a test
compares it with the wheel where one is installed. To write it anew: ``python tests/cupy_ladder/manifest.py``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("manifest.json")
MODULES = ("cupy", "cupy.fft", "cupy.linalg", "cupyx")
# Special methods that decide what Python and NumPy may do with an array.
SPECIAL = (
    "__array__",
    "__array_function__",
    "__array_namespace__",
    "__array_ufunc__",
    "__bool__",
    "__cuda_array_interface__",
    "__dlpack__",
    "__float__",
    "__index__",
    "__int__",
    "__iter__",
    "__len__",
)


def build() -> dict[str, Any]:
    """Describe the CuPy that is installed."""
    cupy = importlib.import_module("cupy")
    array = [name for name in dir(cupy.ndarray) if not name.startswith("_") or name in SPECIAL]
    return {
        "version": cupy.__version__,
        "ndarray": sorted(array),
        "modules": {name: _module(importlib.import_module(name)) for name in MODULES},
    }


def _module(module: types.ModuleType) -> dict[str, Any]:
    # Submodules come and go with what was imported before, so only those count that a bare import brings.
    public = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {name: _describe(value) for name, value in sorted(public.items()) if not _is_stray(value)}


def _is_stray(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in ("cupy", "cupyx")


def _describe(value: Any) -> dict[str, Any]:
    if isinstance(value, types.ModuleType):
        return {"kind": "module"}
    if isinstance(value, type):
        return {"kind": "type"}
    if type(value).__name__ == "ufunc":
        return {"kind": "ufunc", "nin": value.nin, "nout": value.nout}
    if callable(value):
        return {"kind": "function", "signature": _signature(value)}
    return {"kind": "constant"}


def _signature(function: Any) -> list[list[Any]] | None:
    """Return [name, kind, is required] of every parameter; None where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[each.name, int(each.kind), each.default is each.empty] for each in parameters]


def text(manifest: dict[str, Any], /) -> str:
    """Write one name per line, so that a difference reads well."""
    lines = ["{", f' "version": {json.dumps(manifest["version"])},', f' "ndarray": {json.dumps(manifest["ndarray"])},']
    lines.append(' "modules": {')
    for number, (module, names) in enumerate(manifest["modules"].items()):
        lines.append(f"  {json.dumps(module)}: {{")
        lines += [f"   {json.dumps(name)}: {json.dumps(value)}," for name, value in names.items()]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  }" + ("," if number + 1 < len(manifest["modules"]) else ""))
    return "\n".join([*lines, " }", "}", ""])


if __name__ == "__main__":
    PATH.write_text(text(build()))
