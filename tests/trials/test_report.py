"""The report, opened in a real browser where there is one."""

import pytest
from browser import needs_a_browser, open_page

from headway.trials.compare import compare
from headway.trials.report import write


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


@needs_a_browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_browser_draws_the_plots_without_an_error_and_hover_works(page, width, scheme):
    with open_page(page[1], width, scheme) as tab:
        tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace path.js-line", state="attached")
        plots = tab.query_selector_all(".js-plotly-plot")
        assert len(plots) == 2 + 4 + 2
        first, second = (plot.bounding_box() for plot in plots[:2])  # side by side, and below each other on a phone
        assert (first["y"] == second["y"]) == (width > 640) and second["x"] + second["width"] <= width
        plots[0].scroll_into_view_if_needed()
        box = plots[0].bounding_box()
        for share in range(2, 19):
            tab.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] * share / 20, steps=2)
            if tab.query_selector(".hoverlayer .hovertext"):
                break
        tab.evaluate("Plotly.Fx.hover(document.querySelector('.js-plotly-plot'), [{curveNumber: 0, pointNumber: 1}])")
        assert tab.query_selector(".hoverlayer .hovertext") is not None


@needs_a_browser
def test_a_key_hides_and_shows_its_arm_in_every_panel_beside_it(page):
    seen = "[...document.querySelectorAll('section')].map(s => [...s.querySelectorAll('.js-plotly-plot')].map(p => p.data.filter("
    seen += "t => t.legendgroup === 'peri-ln' && t.visible !== false).length))"
    with open_page(page[1], 1100, "light") as tab:
        tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace path.js-line", state="attached")
        before = tab.evaluate(seen)
        assert all(count > 0 for section in before for count in section)
        key = tab.locator("section").first.locator("button", has_text="peri-ln")
        key.click()
        assert key.get_attribute("aria-pressed") == "false"
        assert tab.evaluate(seen) == [[0, 0], *before[1:]]
        key.click()
        assert tab.evaluate(seen) == before
