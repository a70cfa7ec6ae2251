"""pytest, with the stand-in in the place of CuPy: ``python tests/cupy_ladder/run.py [arguments of pytest]``.

For example the whole kit::

    python tests/cupy_ladder/run.py --pyargs graphkv.testing.suite --graphkv-backend cupy

With ``--calls FILE`` as first argument, the distinct calls that reached the stand-in are written there for the replay.
"""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import standin

KIT = "graphkv.testing.plugin"


class ThisRun:
    """Write at the top of the report what this run is, and draw few examples."""

    def pytest_configure(self) -> None:
        """Draw few: the values are NumPy's, with which the kit runs in full elsewhere; here the calls count."""
        from hypothesis import settings  # not before pytest, which rewrites it

        settings.register_profile("standin", max_examples=8, deadline=None, database=None, derandomize=True)
        settings.load_profile("standin")

    def pytest_report_header(self) -> str:
        """Return the line."""
        return f"CuPy: stand-in over NumPy with the names of {standin.MANIFEST['version']}; nothing runs on a GPU"


def main(arguments: list[str], /) -> int:
    """Run pytest and write the calls."""
    calls = None
    if arguments[:1] == ["--calls"]:
        calls, arguments = Path(arguments[1]), arguments[2:]
    standin.install()
    brought = {each.value for each in metadata.entry_points(group="pytest11")}
    if any(each.startswith("--graphkv-backend") for each in arguments) and KIT not in brought:
        arguments = ["-p", KIT, *arguments]  # graphkv is on the path but not installed
    code = pytest.main(arguments, plugins=[ThisRun()])
    if calls is not None:
        calls.write_text("[" + ",\n".join(standin.CALLS) + "]\n")
    print(f"CuPy stand-in: {len(standin.CALLS)} distinct calls")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
