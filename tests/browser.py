"""Pages in a real browser, for the tests that look at them."""

import importlib.util
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def needs_a_browser(test):
    """Marks a test that is skipped without Chromium or without Playwright, with the reason that applies."""
    without = importlib.util.find_spec("playwright") is None
    test = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")(test)
    return pytest.mark.browser(pytest.mark.skipif(without, reason="Playwright is not installed")(test))


@contextmanager
def open_page(path, width, scheme):
    """The page in a tab of that width and colour scheme; at the end it must have met no error, asked the network for nothing,
    and not be wider than the screen."""
    from playwright.sync_api import sync_playwright

    problems, asked = [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        yield tab
        assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1
        browser.close()
    assert not problems
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
