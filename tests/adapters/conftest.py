"""The libraries of these tests, as fixtures."""

from tests.support.libraries import library, numpy_library  # noqa: F401
