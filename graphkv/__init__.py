"""KV-cache eviction that knows about near-duplicates: the GraphKV method (arXiv:2509.00388) on any array library.

Importing this package imports no array library; the first call imports the one of its arrays.
"""

import importlib as _importlib
import typing as _typing

from .core import *  # noqa: F403

__version__ = "0.1.0"

# What is public there is public here: neither the steps nor the policies are listed twice.
if _typing.TYPE_CHECKING:
    from .adapters import *  # noqa: F403
else:

    def __getattr__(name):
        """Import the policies when the first of them is asked for: they are a good part of the time of an import."""
        # Not `from . import adapters`, which asks this very function first.
        adapters, core = (_importlib.import_module(f"graphkv.{name}") for name in ("adapters", "core"))
        if name == "__all__":
            return sorted([*adapters.__all__, *core.__all__])
        if name not in adapters.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(adapters, name))

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
