"""Makes the pictures of the guides: ``python docs/pictures.py [page ...]``. Needs a Chromium.

The code of the pages is run as it stands, and what it wrote is photographed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

from blocks import run_python

DOCS = Path(__file__).resolve().parent
# page -> (file that its code writes, picture, width and height of it in pixels)
PICTURES = {
    "guides/see.md": [
        ("flow.html", "guides/explosion.png", 1080, 940),
        ("watch.html", "guides/watch.png", 900, 545),
    ],
    "guides/prove.md": [("report.html", "guides/compare.png", 900, 1225)],
}


def main() -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.chdir(folder)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page in sys.argv[1:] or PICTURES:
            module = sys.modules["page"] = types.ModuleType("page")
            for block, printed in run_python(DOCS / page, vars(module)):
                print(f"{page}:{block.line}", printed, sep="\n")
            for written, picture, width, height in PICTURES[page]:
                tab = browser.new_page(viewport={"width": width, "height": 800})
                tab.goto(Path(written).resolve().as_uri())
                tab.wait_for_timeout(1500)
                clip = {"x": 0, "y": 0, "width": width, "height": height}
                tab.screenshot(path=DOCS / picture, full_page=True, clip=clip)
                print(f"{picture}: {(DOCS / picture).stat().st_size / 1000:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()
