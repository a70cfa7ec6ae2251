"""The pytest option that runs the kit on a backend: ``--graphkv-backend``.

pytest loads this file wherever graphkv is installed, so it imports nothing heavy and does nothing at all until the
option is used.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from ..core.backend import Backend, load
from .subject import describe, label, variants

__all__ = ["pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option."""
    group = parser.getgroup("graphkv", "conformance of graphkv backends")
    group.addoption(
        "--graphkv-backend",
        action="append",
        default=[],
        dest="graphkv_backend",
        metavar="MODULE:NAME",
        help="run the properties on this backend: a value in a module, or a known name such as torch (repeatable)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load what was asked for, or fail: a missing backend must not look like a passing one."""
    asked: list[str] = config.getoption("graphkv_backend")
    if asked:
        config.pluginmanager.register(_kit([each for name in asked for each in variants(_load(name))]), "graphkv-kit")


def _load(name: str) -> Backend:
    """Return the backend ``MODULE:NAME``, or the one of a known name."""
    try:
        if ":" not in name:
            return load(name)
        module, _, attribute = name.partition(":")
        backend = getattr(importlib.import_module(module), attribute)
    except (AttributeError, ImportError, TypeError) as error:
        raise pytest.UsageError(f"--graphkv-backend {name}: {error}") from error
    if not isinstance(backend, Backend):
        raise pytest.UsageError(f"--graphkv-backend {name}: must be a graphkv.Backend; got {type(backend).__name__}")
    return backend


def _kit(backends: list[Backend]) -> ModuleType:
    """Make a plugin with the fixture and the header. A module or conftest with a fixture of that name overrides it."""

    def backend(request: pytest.FixtureRequest) -> Any:
        """Return each backend that was asked for, with and without its overrides."""
        return request.param

    def pytest_report_header(config: pytest.Config) -> str:
        return describe(backends)

    kit = ModuleType("graphkv_kit")
    vars(kit).update(
        backend=pytest.fixture(scope="session", params=backends, ids=label)(backend),
        pytest_report_header=pytest_report_header,
    )
    return kit
