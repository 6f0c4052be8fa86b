import pytest
import torch
from model_families import IDS, build
from torch import nn

from headway.anatomy import UnknownFamily
from headway.residual.depth_report import depth_report
from headway.residual.expansion import Tower
from headway.residual.transformer import TransformerDecoder


def test_unscaled_towers_grow_exponentially_and_scaled_ones_do_not():
    torch.manual_seed(0)
    branches = [nn.Linear(64, 64, bias=False) for _ in range(32)]
    for branch in branches:
        nn.init.normal_(branch.weight, std=64**-0.5)
    x = torch.randn(256, 64, dtype=torch.float64)
    wild, tame = (depth_report(Tower(branches, scale).double(), x) for scale in (1.0, "1/n"))
    assert wild.law == "exponential" and wild.factor == pytest.approx(2, rel=0.1)
    assert wild.predicted == pytest.approx(2**32) and len(wild.variance) == 33
    assert tame.ratio == pytest.approx(1, abs=0.2)


def test_linear_growth_is_recognised():
    class Shift(nn.Module):
        def forward(self, x):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    generator = torch.Generator().manual_seed(0)
    report = depth_report(Tower([Shift() for _ in range(20)], 1.0), torch.randn(4096, 16, generator=generator))
    assert report.law == "linear" and report.slope == pytest.approx(1, rel=0.1)


def test_known_layers_are_measured_and_unknown_models_named():
    report = depth_report(TransformerDecoder(50, 32, 3, 4), torch.randint(0, 50, (2, 8)))
    assert len(report.names) == 3 and report.predicted is None
    with pytest.raises(UnknownFamily):
        depth_report(nn.Linear(3, 3), torch.randn(2, 3))


def test_one_stream_of_several_is_measured_at_a_time():
    model, ids = build("t5"), {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    reports = [depth_report(model, ids, stack) for stack in (0, 1)]
    assert [len(report.variance) for report in reports] == [5, 3]
    assert reports[1].names == ("decoder.block.0", "decoder.block.1")
    with pytest.raises(ValueError, match="0 to 1"):
        depth_report(model, ids, 2)
