"""The report, opened in a real browser where there is one."""

import shutil

import pytest

from headway.trials.compare import compare
from headway.trials.report import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    comparison = compare(
        "stdlib-text(depth=4, dim=32)",
        ["baseline", "peri-ln"],
        seeds=2,
        budget="6 steps",
        store=folder / "runs.sqlite",
        progress=False,
    )
    return comparison, write(comparison, folder / "report.html")


def test_the_page_is_self_contained_and_tells_everything(page):
    comparison, path = page
    text = path.read_text()
    assert "<script src=" not in text and '<link rel="stylesheet"' not in text
    for words in (
        "Summary",
        "Learning curves",
        "Signal and gradient by depth",
        "Speed and memory",
        "Machine and versions",
    ):
        assert words in text
    assert "prefers-color-scheme" in text and 'name="viewport"' in text
    assert comparison.command.split()[0] in text and "TransformerBlock" in text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_browser_draws_the_plots_without_an_error_and_hover_works(page, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    _, path = page
    problems, asked = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace path.js-line", state="attached")
        plots = tab.query_selector_all(".js-plotly-plot")
        assert len(plots) == 3
        plots[0].scroll_into_view_if_needed()
        box = plots[0].bounding_box()
        for share in range(2, 19):
            tab.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * share / 20, steps=2)
            if tab.query_selector(".hoverlayer .hovertext"):
                break
        tab.evaluate("Plotly.Fx.hover(document.querySelector('.js-plotly-plot'), [{curveNumber: 0, pointNumber: 1}])")
        assert tab.query_selector(".hoverlayer .hovertext") is not None
        assert tab.evaluate("document.documentElement.scrollWidth") <= width + 1
        browser.close()
    assert not problems
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
