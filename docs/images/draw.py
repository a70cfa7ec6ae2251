"""Draw the pictures of the commands, with the demo's model and Chromium: ``python docs/images/draw.py``."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# What the picture of the demo shows: SnapKV alone, with what we recommend, with the paper's graph and with our power.
POLICIES = ("snapkv", "snapkv+degree(fusion=max_rank,unrotated=True)", "snapkv+graphkv", "snapkv+degree")
WIDTH, HEIGHT = 1240, 760


def place(page: str) -> str:
    """Return where to look first: in the layer and head that the page opens, the token with the most sources."""
    data = json.loads(page.partition('type="application/json" id="data">')[2].partition("</script>")[0])
    start, token = (
        np.frombuffer(base64.b64decode(data["edges"][name]["base64"]), "<u4") for name in ("start", "token")
    )
    row = data["layer"] * data["heads"] + data["head"]
    tokens, counts = np.unique(token[start[row] : start[row + 1]], return_counts=True)
    return f"#layer={data['layer']}&amp;head={data['head']}&amp;token={tokens[counts.argmax()]}"


def main() -> None:
    """Write kept.png, inspect.png and inspect-page.png."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/images/draw.py needs Chromium")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        options = [each for policy in POLICIES for each in ("--policy", policy)]
        subprocess.run([sys.executable, "-m", "graphkv", "demo", *options, "--output", scratch], check=True)
        shutil.copy(out / "kept.png", HERE / "kept.png")
        subprocess.run([sys.executable, "-m", "graphkv", "inspect", "--output", scratch], check=True)
        shutil.copy(out / "inspect.png", HERE / "inspect.png")
        # A frame, because Chromium takes its picture from the top of the page, wherever that has been scrolled to.
        size = f'width="{WIDTH}" height="{HEIGHT}" style="border: 0"'
        page = (out / "inspect.html").read_text(encoding="utf-8")
        frame = f'<body style="margin: 0"><iframe src="inspect.html{place(page)}" {size}></iframe>'
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
