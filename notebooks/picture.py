"""A picture of a page that page.py wrote: the note, the labels, what the models write.

    python notebooks/picture.py page.html page.png

Needs Chromium and playwright (tests/requirements.txt).
"""

import shutil
import sys
from pathlib import Path

BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
CHROMIUM = next(filter(None, BROWSERS), None)


def take(page: Path, picture: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 860, "height": 1200})
        tab.goto(page.resolve().as_uri())
        top = tab.locator("#place").bounding_box()["y"] - 10  # from the note on
        bottom = tab.get_by_role("article").last.bounding_box()
        height = bottom["y"] + bottom["height"] - top + 10
        clip = {"x": 0, "y": top, "width": 860, "height": height}
        tab.screenshot(path=picture, clip=clip)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
