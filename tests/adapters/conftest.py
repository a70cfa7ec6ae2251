"""The libraries of these tests, as fixtures."""

from tests.support.libraries import libraries, library, numpy_library  # noqa: F401
