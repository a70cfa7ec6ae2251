"""Draw the pictures of `graphkv inspect`, with the demo's model and Chromium: ``python docs/images/draw.py``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# A suppressed token with several sources.
PLACE = "#layer=16&amp;head=0&amp;token=1562"
WIDTH, HEIGHT = 1240, 760


def main() -> None:
    """Write inspect.png and inspect-page.png."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/images/draw.py needs Chromium")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        subprocess.run([sys.executable, "-m", "graphkv", "inspect", "--output", scratch], check=True)
        shutil.copy(out / "inspect.png", HERE / "inspect.png")
        # A frame, because Chromium takes its picture from the top of the page, wherever that has been scrolled to.
        size = f'width="{WIDTH}" height="{HEIGHT}" style="border: 0"'
        frame = f'<body style="margin: 0"><iframe src="inspect.html{PLACE}" {size}></iframe>'
        (out / "frame.html").write_text(frame)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={WIDTH},{HEIGHT}",
        ]
        options += [f"--user-data-dir={out / 'profile'}", "--virtual-time-budget=5000"]
        picture = f"--screenshot={HERE / 'inspect-page.png'}"
        subprocess.run([browser, *options, picture, (out / "frame.html").as_uri()], check=True)


if __name__ == "__main__":
    main()
