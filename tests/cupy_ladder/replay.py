"""Make recorded calls on the real CuPy wheel, on a machine without a GPU: ``python replay.py calls.json``.

Arrays of CuPy are laid over host memory. A call that CuPy itself accepts then ends at the driver; one that it does not
(an unknown parameter, a dtype, a shape) raises something else. So this tells what the wheel accepts, and nothing about
results. Prints one JSON object; exits with 1 if any call was rejected. Never for a machine with a GPU: there, kernels
would run on host addresses.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from cupy.cuda.memory import MemoryPointer, UnownedMemory, set_allocator

_alive: list[np.ndarray] = []  # the buffers must outlive the arrays


def host_block(num_bytes: int) -> MemoryPointer:
    """Return host memory where CuPy expects the memory of a device."""
    buffer = np.ones(max(num_bytes, 1), np.uint8)
    _alive.append(buffer)
    return MemoryPointer(UnownedMemory(buffer.ctypes.data, buffer.nbytes, buffer, device_id=0), 0)


def decode(coded: list[Any]) -> Any:
    """Rebuild an argument from what `standin.encode` made of it."""
    kind, *rest = coded
    if kind == "array":
        shape, dtype = tuple(rest[0]), np.dtype(rest[1])
        return cupy.ndarray(shape, dtype, memptr=host_block(math.prod(shape) * dtype.itemsize))
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](decode(each) for each in rest[0])
    simple = {
        "host": lambda: np.ones(rest[0], rest[1]),
        "scalar": lambda: np.dtype(rest[0]).type(rest[1]),
        "dtype": lambda: np.dtype(rest[0]),
        "type": lambda: {"bool": bool, "int": int, "float": float}[rest[0]],
        "slice": lambda: slice(*rest[0]),
        "ellipsis": lambda: Ellipsis,
        "value": lambda: rest[0],
    }
    return simple[kind]()


def verdict(module: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Make one call and say what became of it."""
    given = [decode(each) for each in args]
    named = {key: decode(value) for key, value in kwargs.items()}
    try:
        if module == "operator":
            getattr(operator, name)(*given)
        elif module == "ndarray":
            getattr(given[0], name)(*given[1:], **named)
        else:
            reduce(getattr, name.split("."), cupy)(*given, **named)
    except cupy.cuda.runtime.CUDARuntimeError:
        return "accepted, stopped at the driver"
    except ImportError:
        return "needs a library of CUDA"
    except Exception as error:
        return f"rejected: {type(error).__name__}: {error}"
    return "ran"


def main(path: str, /) -> int:
    """Replay a file of calls."""
    if cupy.is_available():
        raise SystemExit("there is a GPU: run tests/gpu instead")
    set_allocator(host_block)
    counts: Counter[str] = Counter()
    rejected = []
    for call in json.loads(Path(path).read_text()):
        found = verdict(*call)
        counts[found.partition(":")[0]] += 1
        if found.startswith("rejected"):
            rejected.append([found, call])
        _alive.clear()
    print(json.dumps({"cupy": cupy.__version__, "calls": counts.total(), **counts, "what was rejected": rejected}))
    return int(bool(rejected))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
