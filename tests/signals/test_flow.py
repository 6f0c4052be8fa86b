"""The report: table, law of growth, findings, comparison, plain data, picture and page."""

import json
import math

import pytest
import torch
from torch import nn

import headway as hw
from headway.signals.findings import Traits, findings
from headway.signals.flow import Flow
from headway.signals.growth import growth
from headway.signals.row import Row


def rows(variances, cos=0.1, grads=None, kind="stream"):
    grads = grads or [1.0] * len(variances)
    return [
        Row(
            f"h.{i}",
            kind,
            i,
            (8, 4),
            var=v,
            rms=math.sqrt(v),
            absmax=2 * math.sqrt(v),
            cos=cos,
            grad_norm=g,
            samples=8,
            stable_rank=4.0,
        )
        for i, (v, g) in enumerate(zip(variances, grads, strict=True))
    ]


def test_the_law_of_growth_is_read_from_the_better_fit():
    doubling = growth(rows([2.0**i for i in range(9)]))
    assert doubling.law == "exponential" and doubling.factor == pytest.approx(2) and doubling.explosion == 256
    steady = growth(rows([1.0 + i for i in range(9)]))
    assert steady.law == "linear" and steady.slope == pytest.approx(1)
    assert growth(rows([1.0, 1.01, 0.99, 1.0, 1.02, 1.0])).law == "flat"
    assert growth(rows([1.0] * 6)).law == "flat"


def test_fewer_than_six_rows_are_too_shallow_for_a_law():
    law = growth(rows([10.0**i for i in range(5)]))
    assert law.law == "too shallow" and "too shallow" in str(law)


def test_a_signal_beyond_any_square_is_still_fitted():
    law = growth(rows([1e300, 1e301, 1e302, 1e303, 1e304, 1e305]))
    assert law.law == "exponential" and law.factor == pytest.approx(10)


def problems(*arguments, **settings):
    return {f.problem: f for f in findings(*arguments, **settings)}


def test_findings_carry_the_number_and_name_the_answer():
    series = rows([2.0**i for i in range(20)])
    found = problems(series, growth(series), Traits(attention=True))["explosion"]
    assert found.severity == "critical" and found.value == 2.0**19 and found.techniques == ("peri-ln", "residual-depth")
    series = rows([1.0] * 6, grads=[0.01, 0.02, 0.1, 0.2, 0.5, 1.0])
    fading = problems(series, growth(series), Traits(attention=True))["vanishing gradient"]
    assert fading.value == pytest.approx(0.01) and "mix-ln" in fading.techniques
    series = rows([1.0] * 6, cos=0.97)
    assert problems(series, growth(series), Traits())["collapse"].where == "h.0"
    assert "collapse" not in problems(series, growth(series, 0.99), Traits(), collapse_at=0.99)
    assert problems(rows([1.0]), growth(rows([1.0])), Traits(placement="pre", layer_norms=5))["cheaper norm"].value == 5


def test_a_healthy_signal_has_no_findings():
    series = rows([1.0, 1.1, 1.0, 0.9, 1.0, 1.0])
    assert findings(series, growth(series), Traits()) == []


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(7)])
    return hw.probe(model, torch.randn(12, 16), loss=lambda out: out.square().mean())


def test_the_table_is_aligned_and_the_text_names_the_law(flow):
    lines = flow.table().splitlines()
    assert len(lines) == len(flow) + 1 and lines[0].split()[0] == "name"
    assert str(flow.growth) in str(flow) and flow.verdict is flow.findings
    assert flow.table(("name", "weight_norm"), kinds=("pre",)).count("\n") == len(flow.of("pre"))


def test_plain_data_survives_json(flow):
    data = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    back = Flow.from_dict(data)
    assert [row.name for row in back.rows] == [row.name for row in flow.rows]
    assert back.rows[0].rms == flow.rows[0].rms and back.rows[0].shape == flow.rows[0].shape
    assert back.growth == flow.growth and back.findings == flow.findings


def test_rows_are_found_by_name_and_a_wrong_name_gets_near_ones(flow):
    assert flow["0.0"].kind == "pre"
    with pytest.raises(KeyError, match="near"):
        flow["0.99"]


def test_pandas_gets_one_line_a_row(flow):
    pytest.importorskip("pandas")
    frame = flow.to_pandas()
    assert len(frame) == len(flow) and "grad_rms" in frame.columns


def test_two_flows_are_compared_row_by_row(flow):
    other = Flow.from_dict(flow.to_dict())
    other.rows = [row for row in other.rows if row.name != "0.0"]
    other.rows[0].rms *= 2
    compared = flow.compare(other)
    assert compared.only_here == ["0.0"] and not compared.only_there
    assert compared.rows[0][1]["rms"][1] == pytest.approx(2 * compared.rows[0][1]["rms"][0])
    assert "ratio" in str(compared)


def test_the_picture_has_a_panel_for_signal_gradient_likeness_and_memory(flow):
    titles = {a.text for a in flow.plot().layout.annotations}
    assert {"<b>Signal</b>", "<b>Gradient</b>", "<b>Likeness of samples</b>", "<b>Kept for backward</b>"} <= titles


def test_the_page_is_one_file_that_needs_no_network_and_leaves_no_partial_file(flow, tmp_path):
    path = flow.save(tmp_path / "flow.html")
    text = path.read_text()
    assert "<script src" not in text and "viewport" in text and "prefers-color-scheme" in text
    assert [p.name for p in tmp_path.iterdir()] == ["flow.html"]
    assert all(row.name in text for row in flow.rows)


def test_the_page_of_a_watched_run_is_written(flow, tmp_path):
    model = nn.Linear(4, 4)
    with hw.watch(model, every=1) as log:
        for _ in range(3):
            model(torch.randn(5, 4)).sum().backward()
    assert len(log.plot().data) == 3
    assert "watched steps" in log.save(tmp_path / "watch.html").read_text()
