"""The probe sees what long skips carry, says so where it adds up, and names what scales them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headway as hw
from headway.claims.scale_long import SumSkips
from headway.residual import ScaleLong
from headway.signals.long_skips import carried, long_skips
from headway.signals.row import Row
from headway.tasks.unets import UNet, UViT


def said(flow):
    return [finding for finding in flow.findings if "scale-long" in finding.techniques]


def images(channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(4, channels, 8, 8), torch.rand(4)


class ResNet(nn.Module):
    """Residual blocks, and no skip longer than one."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return x + self.two(self.norm(self.one(x)).relu())

    def __init__(self, enlarges: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(6)))
        self.head = nn.Linear(8, 2)
        self.enlarges = enlarges

    def forward(self, x):
        x = self.blocks(self.stem(x))
        if self.enlarges:
            x = F.interpolate(x, scale_factor=2.0)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def test_a_sum_of_skips_is_reported_with_its_second_moment_and_scaling_silences_it():
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    found = said(hw.probe(SumSkips(12, 128, "none"), x))
    assert [finding.problem for finding in found] == ["long skips"]
    # 1 + N for blocks that keep the variance; the gradient of skip i has passed the N - i + 1 sums inside of it
    assert found[0].value == pytest.approx(13, rel=0.35) and found[0].severity == "warning"
    row = {row.name: row for row in hw.probe(SumSkips(12, 128, "none"), x).rows}
    assert row["skips#12"].kind == "skip"
    assert row["skips#12"].grad_norm / row["skips#1"].grad_norm == pytest.approx(math.sqrt(13 / 2), rel=0.35)
    assert not said(hw.probe(SumSkips(12, 128, "cs", 0.7), x)) and not said(hw.probe(SumSkips(3, 128, "none"), x))


@pytest.mark.parametrize("build", [lambda: UNet(3, (8, 12), 3), lambda: UViT(8, 3, 2, 16, 2, 6)], ids=["unet", "u-vit"])
def test_a_unet_is_reported_by_what_its_encoder_hands_over(build):
    torch.manual_seed(0)
    model, inputs, kept = build(), images(), {}
    for name in long_skips(model):
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: kept.update({name: out.detach().square().mean().item()})
        )
    flow = hw.probe(model, *inputs)
    (found,) = said(flow)
    assert len(kept) == 6 and found.where == next(iter(kept))
    assert found.value == pytest.approx(1 + sum(kept.values()) / list(kept.values())[-1], rel=1e-5)
    assert "6 long skips" in found.message and f"{found.value:.3g}" in found.message
    assert not said(hw.probe(hw.apply(model, ScaleLong("ls", example_inputs=inputs)), *inputs))


@pytest.mark.parametrize("enlarges", [False, True])
def test_a_residual_network_has_no_long_skips_to_report(enlarges):
    torch.manual_seed(0)
    model = ResNet(enlarges)
    assert long_skips(model) == () and not said(hw.probe(model, images()[0]))


def test_too_few_skips_and_rows_that_are_missing_say_nothing():
    assert not said(hw.probe(UNet(3, (8, 12), 1), *images()))
    assert not said(hw.probe(UNet(3, (8, 12), 3), *images(), layers="up.*"))
    assert math.isnan(carried([Row("a", "skip", 0, (1,), rms=1.0)], ("a", "b"))[0])
    assert math.isnan(carried([Row("a", "skip", 0, (1,), rms=0.0)], ("a",))[0])


class Keeper(UNet):
    """Its forward pass leaves things behind."""

    def __init__(self) -> None:
        super().__init__(3, (8, 12), 2)
        self.register_buffer("passes", torch.zeros(()))
        self.seen: list = []
        self.last = None

    def forward(self, x, t):
        self.passes.add_(1)
        self.last = x
        self.seen.append(x)
        torch.rand(1)
        return super().forward(x, t)


def test_looking_for_skips_runs_no_code_on_the_model_itself():
    torch.manual_seed(0)
    model, before = Keeper(), torch.get_rng_state()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    assert len(long_skips(model)) == 4
    assert model.passes == 0 and model.last is None and not model.seen and not calls
    assert torch.equal(torch.get_rng_state(), before)
    copy.deepcopy(model)


def test_a_watched_training_step_reports_them_too():
    torch.manual_seed(0)
    model, inputs = UNet(3, (8, 12), 3), images()
    with hw.watch(model, every=1) as log:
        model(*inputs).square().mean().backward()
    assert said(log.records[-1][1])
