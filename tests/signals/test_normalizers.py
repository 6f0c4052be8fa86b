"""The normalisers of the study against their formulas, and the trends they are compared for."""

import math

import pytest
import torch

import headway as hw
from headway.signals import normalizers as N
from headway.signals.comparison import NORMALIZERS, Normalizer, plain_net, residual_net


def data():
    torch.manual_seed(0)
    return torch.randn(6, 8, 5, 5, dtype=torch.float64) * 2 + 1


# oracle 4: the formulas of the study's published layers, step by step
def test_every_normaliser_is_its_formula():
    x, eps = data(), 1e-5
    batch_var = x.var((0, 2, 3), keepdim=True, unbiased=False)
    second = x.pow(2).mean((2, 3), keepdim=True)
    wanted = {
        N.FilterResponseNorm(8): x / (second + eps).sqrt(),
        N.VarianceNorm(8): x / (batch_var + eps).sqrt(),
        N.ThresholdedLinearUnit(8): x.clamp(min=0),
        N.BiasCorrectedReLU(): math.sqrt(2 * math.pi / (math.pi - 1)) * (x.clamp(min=0) - math.sqrt(1 / (2 * math.pi))),
    }
    for layer, expected in wanted.items():
        torch.testing.assert_close(layer.double()(x), expected, rtol=1e-8, atol=1e-8, msg=type(layer).__name__)


def test_the_weight_normalisers_are_their_formulas():
    x = data()
    for layer in (N.WeightNormConv2d(8, 4, 3, padding=1).double(), N.ScaledStdConv2d(8, 4, 3, padding=1).double()):
        w = layer.weight
        if isinstance(layer, N.WeightNormConv2d):
            w = w / (w.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-5)
        else:
            flat = w.flatten(1)
            std = flat.std(1, unbiased=False).view(-1, 1, 1, 1)
            w = (w - flat.mean(1).view(-1, 1, 1, 1)) / (std + 1e-5) / math.sqrt(72)
            w = w * math.sqrt(2 * math.pi / (math.pi - 1))
        torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, w, layer.bias, padding=1))


@pytest.mark.parametrize("name", [name.replace("N", "4") for name in NORMALIZERS])
def test_six_convolutions_under_every_normaliser_report_what_layers_put_between_them_would_see(name):
    torch.manual_seed(0)
    model = plain_net(6, 16, 3)(Normalizer(name)).double().train()
    x, y = torch.randn(10, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (10,))
    flow = hw.probe(model, x, loss=torch.nn.functional.cross_entropy, targets=y)
    kept, a = {}, x
    for place, module in model.named_children():
        # a copy, so that an in-place successor spares what is looked at
        a = module(a.clone())
        a.retain_grad()
        kept[place] = a
    torch.nn.functional.cross_entropy(a, y).backward()
    assert len(flow.of("post")) == 6 and len(flow.of("pre")) == 7
    for row in flow.rows:
        a = kept[row.name].detach()
        over = (0, 2, 3) if a.dim() == 4 else (0,)
        rows = a.flatten(1) / a.flatten(1).norm(dim=1, keepdim=True)
        m = rows @ rows.T
        assert row.std == pytest.approx(float(a.std(over).mean()), rel=1e-8)
        assert row.var == pytest.approx(float(a.var(over).mean()), rel=1e-8)
        assert row.grad_norm == pytest.approx(float(kept[row.name].grad.norm()), rel=1e-8)
        assert row.cos == pytest.approx(float(((m.sum(1) - 1) / 9).mean()), abs=1e-8)
        assert row.stable_rank == pytest.approx(float(m.trace() / torch.linalg.matrix_norm(m, 2)), rel=1e-8)


def test_running_variance_is_used_in_evaluation():
    layer, x = N.VarianceNorm(8, momentum=1.0).double(), data()
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)


@pytest.mark.parametrize("name", [name.replace("N", "2") for name in NORMALIZERS])
def test_every_normaliser_of_the_list_builds_a_network_that_is_probed(name):
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    for build in (plain_net(2, 8, classes=3), residual_net(2, 8, classes=3)):
        table = hw.compare_normalizers(build, (x, y), (name,), seeds=1)
        assert -1 <= table.rows[0].cos <= 1 and table.rows[0].gradient_ratio > 0


def test_larger_groups_make_samples_alike_and_smaller_ones_raise_early_gradients():
    torch.manual_seed(0)
    x, y = torch.randn(24, 1, 8, 8), torch.randint(0, 10, (24,))
    table = hw.compare_normalizers(plain_net(8, 16), (x, y), ("layer", "group:4", "instance"), seeds=2)
    cos = [row.cos for row in table.rows]
    grad = [row.gradient_ratio for row in table.rows]
    assert cos == sorted(cos, reverse=True) and grad == sorted(grad)
    assert str(table).count("\n") == 3 and len(table.to_dict()["rows"]) == 3


def test_unknown_normalisers_are_refused():
    for name in ("groups", "group", "group:x", "batch:2"):
        with pytest.raises(ValueError, match="unknown"):
            Normalizer(name)
    with pytest.raises(ValueError, match="divisor"):
        Normalizer("group:3").norm(8)
    with pytest.raises(ValueError, match="at least one"):
        hw.compare_normalizers(plain_net(1), None, ())
