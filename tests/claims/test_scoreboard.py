"""The scoreboard of claims: the page, opened in a real browser where there is one, and what the command line tells."""

import json
import math
import sys
import types

import pytest
from browser import needs_a_browser, open_page

from headway import cli
from headway.claims.evidence import Evidence, verdict
from headway.claims.measure import System, measure_all
from headway.claims.scoreboard import scoreboard

LONG = (
    "a long sentence about what was measured, at three sizes and with five seeds each, with all its units and settings"
)
EVIDENCE = [
    Evidence("peri-ln", "claims <this>", "2x", "1.9x", "torch", "holds", "as published", rows=[
        {"rate": 0.03, "seed": 1, "shape": [4, 128], "diverged": False, "loss": math.nan, "share": None},
        {"rate": 0.01, "seed": 2, "extra": 65504},
    ]),
    Evidence("peri-ln", "claims that", "2x", "0.9x", LONG, "does not hold here", "one core", limit="copy 20 GB/s"),
    Evidence("peri-ln", LONG, LONG, LONG, "torch", "partly", LONG),
]  # fmt: skip
SYSTEMS = [System("peri-ln", EVIDENCE, 12.34), System("mix-ln", seconds=0.5, error="ValueError: no <text> here")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return scoreboard(
        SYSTEMS, tmp_path_factory.mktemp("board") / "s.html", quick=True, command="headway claims --quick"
    )


def test_the_scoreboard_holds_every_verdict_and_what_stands_behind_it(page):
    text = page.read_text()
    for words in ("claims &lt;this&gt;", "does not hold here", "copy 20 GB/s", "12.3 s", "2 measurements", "0.03", "65,504",
                  "arXiv 2502.02732", "headway claims peri-ln --quick", "Machine and versions", "processor",
                  "no &lt;text&gt; here"):  # fmt: skip
        assert words in text, words
    assert text.index("<table>") < text.index('class="finding claim')
    assert "<script src=" not in text and '<link rel="stylesheet"' not in text and "prefers-color-scheme" in text


@needs_a_browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_browser_shows_the_board_first_and_the_measurements_on_demand(page, width, scheme):
    with open_page(page, width, scheme) as tab:
        rows = tab.query_selector_all(".board tbody tr")
        assert len(rows) == 4 and "claims <this>" in rows[0].inner_text() and "holds" in rows[0].inner_text()
        assert all(row.bounding_box()["x"] + row.bounding_box()["width"] <= width for row in rows)
        rows[0].query_selector("a").click()
        details = tab.query_selector(":target details")
        details.query_selector("summary").click()
        assert details.query_selector("td").is_visible() and "0.03" in details.inner_text()
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 26)"
        assert dark == (scheme == "dark")


def test_a_verdict_is_computed_from_what_holds():
    assert [verdict(good) for good in ([True, True], [True, False], [False], [])] == [
        "holds", "partly", "does not hold here", "does not hold here"
    ]  # fmt: skip


def test_numbers_that_are_not_finite_are_none_in_json():
    rows = json.loads(json.dumps(EVIDENCE[0].to_dict(), allow_nan=False))["rows"]
    assert rows[0]["loss"] is None and rows[0]["shape"] == [4, 128]


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Two systems of the catalogue with claims that take no time, of which one fails."""
    monkeypatch.chdir(tmp_path)
    good, bad = types.ModuleType("good"), types.ModuleType("bad")
    good.measure = lambda quick: EVIDENCE

    def fail(quick):
        raise ValueError("no text here")

    bad.measure = fail
    for name, module in (("peri_ln", good), ("mix_ln", bad)):
        module.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, f"headway.claims.{name}", module)


def test_one_system_that_fails_does_not_take_the_others_with_it(made_up):
    bad, good = measure_all(["mix-ln", "peri-ln"], quick=True)
    assert bad.error == "ValueError: no text here" and not bad.evidence
    assert good.evidence == EVIDENCE and not good.error


def test_the_command_line_prints_seconds_writes_the_page_and_gives_valid_json(made_up, monkeypatch, capsys, tmp_path):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["headway", "claims", *words])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    assert call("peri-ln", "--quick", "--html", "there/board.html") == 0
    text = capsys.readouterr().out
    assert "peri-ln: 0.0 s; holds, does not hold here, partly" in text and (tmp_path / "there/board.html").exists()
    assert call("peri-ln", "mix-ln", "--json") == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [system["key"] for system in found["systems"]] == ["peri-ln", "mix-ln"] and not found["quick"]
    assert found["systems"][0]["claims"][0]["rows"][1]["extra"] == 65504 and found["versions"]["torch"]
    assert found["command"] == "headway claims peri-ln mix-ln" and found["machine"]["processor"]
    assert "mix-ln could not be measured" in captured.err and (tmp_path / "scoreboard.html").exists()
