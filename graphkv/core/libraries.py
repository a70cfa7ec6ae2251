"""The array libraries with a built-in backend, and how an array is recognized as one of theirs."""

from __future__ import annotations

from typing import Any

__all__ = ["BUILT_IN", "library_of"]

# Names, not modules: importing graphkv must not import an array library.
BUILT_IN = {
    "cupy": "graphkv.backends.cupy",
    "jax": "graphkv.backends.jax",
    "mlx": "graphkv.backends.mlx",
    "numpy": "graphkv.backends.numpy",
    "torch": "graphkv.backends.torch",
}


def library_of(array: Any) -> str:
    """Return the library of an array: the root module of its type, or of the first known ancestor."""
    kind = type(array)
    if not _looks_like_array(array):
        return kind.__module__.partition(".")[0] if kind.__module__ != "builtins" else f"builtins.{kind.__name__}"
    # A mixin of NumPy's gives a class NumPy's operators, but its objects are not NumPy arrays.
    family = [ancestor for ancestor in kind.__mro__ if "Mixin" not in ancestor.__name__]
    roots = [ancestor.__module__.partition(".")[0] for ancestor in family]
    # The arrays of older releases of jax (0.4.35, say) have no ancestor in jax itself.
    roots = ["jax" if root == "jaxlib" else root for root in roots]
    return next((root for root in roots if root in BUILT_IN), roots[0])


def _looks_like_array(array: Any) -> bool:
    try:
        return hasattr(array, "shape") and hasattr(array, "dtype")
    except RuntimeError:
        return True  # a nested tensor has no single shape, and raises
