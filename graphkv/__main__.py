"""The ``graphkv`` command: every foreseen failure is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys

from . import __version__
from .core.errors import BackendUnavailableError
from .core.extras import needs

__all__ = ["PACKAGES", "main"]

BROKEN_PIPE = 1
MODEL = ("torch", "transformers", "safetensors", "accelerate", "platformdirs", "rich")
# The extra of each command, and the packages that some step of it imports: looked for before the first one.
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("demo", (*MODEL, "matplotlib")),
    "inspect": ("demo", (*MODEL, "matplotlib")),
    "eval": ("eval", (*MODEL, "rapidfuzz")),
    "report": ("eval", ("markdown_it", "matplotlib")),
    "tune": ("tune", (*MODEL, "cma", "rapidfuzz", "tomli_w")),
    "policies": ("demo", ()),
}
if sys.version_info < (3, 11):
    PACKAGES |= {name: (extra, (*found, "tomli")) for name, (extra, found) in PACKAGES.items() if found}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 nobody reads on, 2 refused, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"graphkv {__version__}")
        return 0
    command = next((argument for argument in arguments if argument in PACKAGES), "")
    try:
        with needs(f"graphkv {command}" if command else "the command line", PACKAGES.get(command, ("demo",))[0]):
            from .cli import run  # noqa: PLC0415 - an extra, which is named where it is missing
        return run(arguments)
    except BackendUnavailableError as error:
        print(f"graphkv: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does. What is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
