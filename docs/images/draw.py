"""Draw the pictures of `graphkv inspect`, with the demo's model and Chromium: ``python docs/images/draw.py``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# A suppressed token with several sources.
PLACE = "#layer=16&head=0&token=1562"


def main() -> None:
    """Write inspect.png and inspect-page.png."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/images/draw.py needs Chromium")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        subprocess.run([sys.executable, "-m", "graphkv", "inspect", "--output", scratch], check=True)
        shutil.copy(out / "inspect.png", HERE / "inspect.png")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1240,760"]
        options += [f"--user-data-dir={out / 'profile'}", "--virtual-time-budget=5000"]
        picture = f"--screenshot={HERE / 'inspect-page.png'}"
        subprocess.run([browser, *options, picture, (out / "inspect.html").as_uri() + PLACE], check=True)


if __name__ == "__main__":
    main()
