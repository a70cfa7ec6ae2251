"""The ``graphkv`` command: every foreseen failure is one line on stderr and exit code 2."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 refused, 130 interrupted."""
    try:
        from .cli import run  # noqa: PLC0415 - an extra, which is named where it is missing
    except ImportError as error:
        print(f"graphkv: the command line needs: pip install 'graphkv[demo]' ({error})", file=sys.stderr)
        return 2
    return run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
