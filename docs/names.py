"""Write the list of what graphkv uses of an array library into porting.md, from the calls that the kit tries.

``python docs/names.py`` rewrites the list between its two marks, ``--check`` only says whether it is current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from marked import renew

from graphkv.testing.namespace import CALLS

PAGE = Path(__file__).parent / "porting.md"


def listing() -> str:
    """Render the calls as one block of text."""
    return "\n".join(["```text", *CALLS, "```", ""])


if __name__ == "__main__":
    sys.exit(renew(PAGE, {"names": listing()}))
