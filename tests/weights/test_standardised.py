# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false
# pyright: reportUnusedExpression=false
"""Weight standardisation: its two released forms written down, what the gradient must be, and a cache that must not be stale."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import headway as hw
from headway.weights.standardised import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    standardize,
    weight_standardization,
)
from headway.weights.standardising import StandardiseWeights

DOUBLE = torch.float64
FORMS = [(False, "var"), (True, "var"), (True, "std"), (False, "std")]


def written_down(v, unbiased, eps_mode, eps=1e-5):
    rows = v.flatten(1)
    centred, n = rows - rows.mean(1, keepdim=True), rows.shape[1]
    var = centred.square().sum(1, keepdim=True) / (n - 1 if unbiased else n)
    return (centred / ((var + eps).sqrt() if eps_mode == "var" else var.sqrt() + eps)).reshape(v.shape)


@pytest.mark.parametrize("unbiased, eps_mode", FORMS)
def test_each_released_form_equals_itself_written_down_with_its_gradient(unbiased, eps_mode):
    torch.manual_seed(0)
    v = (torch.randn(4, 3, 3, 3, dtype=DOUBLE) * 0.02).requires_grad_()
    g, n, eps = torch.randn_like(v), 27, 1e-5
    w, wanted = standardize(v, eps, unbiased, eps_mode), written_down(v, unbiased, eps_mode)
    torch.testing.assert_close(w, wanted, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out, v, g)[0] for out in (w, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
    std = v.detach().flatten(1).var(1, unbiased=unbiased, keepdim=True).sqrt()
    s = (std.square() + eps).sqrt() if eps_mode == "var" else std + eps
    rows, along = w.detach().flatten(1), g.flatten(1)
    last = (along * rows).sum(1, keepdim=True) / (n - 1 if unbiased else n) * (1 if eps_mode == "var" else s / std)
    equation = (along - along.mean(1, keepdim=True) - rows * last) / s
    torch.testing.assert_close(grads[0].flatten(1), equation, rtol=1e-8, atol=1e-8)


# oracle 2
def test_every_filter_has_mean_0_and_variance_1():
    torch.manual_seed(0)
    v = torch.randn(8, 4, 3, 3, dtype=DOUBLE) * 3 + 5
    for unbiased, var in ((False, 1.0), (True, 35 / 36)):
        rows = standardize(v, unbiased=unbiased).flatten(1)
        assert rows.mean(1).abs().max() < 1e-6
        torch.testing.assert_close(rows.var(1, unbiased=False), torch.full((8,), var, dtype=DOUBLE), rtol=1e-5, atol=0)


# oracle 3
def test_the_output_does_not_see_scale_and_shift_of_a_filter():
    torch.manual_seed(0)
    layer, x = WSConv2d(4, 6, 3, padding=1, groups=2).double(), torch.randn(2, 4, 8, 8, dtype=DOUBLE)
    nn.init.normal_(layer.weight)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(6, 1, 1, 1) * 3 + 1).add_(torch.randn(6, 1, 1, 1))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


# oracle 4
def test_the_gradient_sums_to_0_over_a_filter_and_stands_upright_on_it():
    torch.manual_seed(0)
    layer, x = WSConv2d(4, 6, 3).double(), torch.randn(2, 4, 8, 8, dtype=DOUBLE)
    nn.init.normal_(layer.weight)
    layer(x).pow(3).sum().backward()
    v, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    assert (g.sum(1) / g.abs().sum(1)).abs().max() < 1e-5
    along = ((v - v.mean(1, keepdim=True)) * g).sum(1) / (v.norm(dim=1) * g.norm(dim=1))
    assert along.abs().max() < 1e-5


# oracle 10
def test_evaluation_sees_a_weight_that_was_changed_in_place():
    torch.manual_seed(0)
    layer, x = WSConv2d(3, 4, 3).eval(), torch.randn(1, 3, 5, 5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    with torch.no_grad():
        before = layer(x)
        assert layer.standardised_weight() is layer.standardised_weight()  # it is kept
    layer(x).square().sum().backward()
    optimizer.step()
    changes = [lambda: None, lambda: layer.weight.mul_(-1), lambda: setattr(layer.weight, "data", torch.randn(4, 3, 3, 3)),
               lambda: layer.load_state_dict(WSConv2d(3, 4, 3).state_dict())]  # fmt: skip
    with torch.no_grad():
        for change in changes:
            change()
            wanted = F.conv2d(x, written_down(layer.weight, False, "var"), layer.bias)
            torch.testing.assert_close(layer(x), wanted)
            assert not torch.allclose(wanted, before)
            before = wanted
        twin = copy.deepcopy(layer)
        twin.weight.mul_(-1)
        torch.testing.assert_close(twin(x) - twin.bias[:, None, None], layer.bias[:, None, None] - layer(x))


@pytest.mark.parametrize("ours, plain, size", [
    (WSConv1d(4, 6, 3, groups=2), nn.Conv1d, (2, 4, 7)), (WSConv3d(4, 6, 2), nn.Conv3d, (2, 4, 5, 5, 5)),
    (WSConvTranspose2d(4, 6, 3, 2, groups=2), nn.ConvTranspose2d, (2, 4, 5, 5)),
])  # fmt: skip
def test_other_convolutions_standardise_the_entries_of_one_output_channel(ours, plain, size):
    torch.manual_seed(0)
    x, w = torch.randn(size), ours.standardised_weight().detach()
    twin = plain(ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, groups=ours.groups)
    twin.load_state_dict({"weight": w, "bias": ours.bias.detach()})
    torch.testing.assert_close(ours(x), twin(x))
    for o in range(6):  # the output channel's own entries
        own = w[:, o % 3][o // 3 * 2 : o // 3 * 2 + 2] if ours.transposed else w[o]
        assert abs(float(own.mean())) < 1e-6 and abs(float(own.var(unbiased=False)) - 1) < 2e-2


def test_parametrisation_computes_the_same_and_compiles():
    torch.manual_seed(0)
    layer, x = WSConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    other = nn.Conv2d(3, 4, 3)
    other.load_state_dict(layer.state_dict())
    weight_standardization(other)
    assert parametrize.is_parametrized(other)
    torch.testing.assert_close(other(x), layer(x))
    for module in (layer, other):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


def test_half_precision_standardises_in_float32():
    torch.manual_seed(0)
    v = (torch.randn(4, 512, 3, 3) + 10).bfloat16()
    torch.testing.assert_close(standardize(v).float(), written_down(v.float(), False, "var"), rtol=1e-2, atol=1e-2)


def test_gradcheck_of_the_layer_and_a_constant_filter_has_no_slope():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 4, dtype=DOUBLE)
    for unbiased, mode in FORMS:
        layer = WSConv2d(2, 2, 3, unbiased=unbiased, eps_mode=mode).double()
        call = lambda w, layer=layer: torch.func.functional_call(layer, {"weight": w}, x)  # noqa: E731
        assert torch.autograd.gradcheck(call, layer.weight)
        v = torch.ones(1, 2, 3, 3, requires_grad=True)
        standardize(v, unbiased=unbiased, eps_mode=mode).sum().backward()
        assert torch.isfinite(v.grad).all()


def test_bad_settings_are_refused():
    for make in (lambda: WSConv2d(4, 4, 1, groups=4), lambda: weight_standardization(nn.Conv2d(4, 4, 1, groups=4))):
        with pytest.raises(ValueError, match="filters of one entry"):
            make()
    with pytest.raises(ValueError, match="eps_mode"):
        WSConv2d(4, 4, 3, eps_mode="root")
    with pytest.raises(ValueError, match="no weight"):
        weight_standardization(nn.ReLU())
    with pytest.raises(hw.NothingToChange, match="in front of a norm"):
        hw.apply(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), StandardiseWeights)
