"""KV-cache eviction that knows about near-duplicates: the GraphKV method (arXiv:2509.00388) on any array library.

Importing this package imports no array library; the first call imports the one of its arrays.
"""

import typing as _typing

# What is public there is public here: neither the steps nor the policies are listed twice.
from .adapters import *  # noqa: F403
from .core import *  # noqa: F403

__version__ = "0.1.0"

# Type checkers take the names from the imports, see `graphkv.adapters`.
if not _typing.TYPE_CHECKING:
    __all__ = sorted([*adapters.__all__, *core.__all__])  # noqa: F405, PLE0605
