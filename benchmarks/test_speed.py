"""The same calls under pytest-benchmark: ``python -m pytest benchmarks/test_speed.py``, not part of ``make test``."""

from __future__ import annotations

from typing import Any

import pytest

from .contests import contests


@pytest.mark.parametrize("side", [0, 1], ids=["of", "to"])
@pytest.mark.parametrize("name", [name for name in contests() if not name.startswith("kvpress")])
def test_speed(benchmark: Any, name: str, side: int) -> None:
    """One side of one row."""
    benchmark.group = name

    benchmark(contests()[name].make(False)[side])
