"""LayerNorm: nn.LayerNorm over the last axes, and the same over named axes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import headway as hw
from headway.norms.layer import LayerNorm, layer_norm_dims


def test_last_axis_layer_equals_nn_layer_norm_with_the_same_state():
    theirs = nn.LayerNorm((3, 10))
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours = LayerNorm((3, 10))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
def test_channel_axis_equals_the_last_axis_layer_after_permutes(layout):
    x = torch.randn(3, 8, 5, 7).to(memory_format=layout).requires_grad_()
    layer = LayerNorm(8, dims=(1,))
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    wanted = F.layer_norm(x.permute(0, 2, 3, 1), (8,), layer.weight, layer.bias).permute(0, 3, 1, 2)
    y = layer(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(wanted)
    inputs = (x, layer.weight, layer.bias)
    pairs = zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(wanted, inputs, g), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (1, 2), (0, 2), (-1, 0), (0, 1, 2)])
def test_any_axes_equal_the_equation(dims):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    axes = sorted(d % 3 for d in dims)
    centred = x - x.mean(axes, keepdim=True)
    wanted = centred / torch.sqrt((centred**2).mean(axes, keepdim=True) + 1e-5)
    weight = torch.rand([x.shape[d] for d in dims], dtype=torch.float64)
    ascending = weight.permute([[d % 3 for d in dims].index(d) for d in axes])
    spread = ascending.reshape([x.shape[d] if d in axes else 1 for d in range(3)])
    torch.testing.assert_close(layer_norm_dims(x, dims, weight), wanted * spread)


def test_gradcheck_and_gradgradcheck_of_the_layer():
    for layer, shape in ((LayerNorm(4), (3, 4)), (LayerNorm(4, dims=1), (2, 4, 3))):
        layer = layer.double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(layer, x) and gradgradcheck(layer, x)


def test_rescaling_or_recentring_all_weights_changes_nothing_and_scaling_one_row_does():
    torch.manual_seed(0)
    w, x = torch.randn(32, 16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    layer = LayerNorm(32, eps=1e-12, elementwise_affine=False)
    y = layer(x @ w.T)
    torch.testing.assert_close(layer(x @ (3 * w).T), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x @ (w + torch.randn(16, dtype=torch.float64)).T), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer((7 * x) @ w.T), y, rtol=1e-5, atol=1e-5)
    one = w.clone()
    one[0] *= 3
    assert (layer(x @ one.T) - y).abs().max() > 1e-2


def test_apply_puts_it_in_place_and_keeps_the_very_same_parameters():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, eps=1e-3), nn.LayerNorm(6, bias=False)).eval()
    before, x = list(model.parameters()), torch.randn(4, 6)
    wanted = model(x)
    hw.apply(model, LayerNorm)
    assert [type(m) for m in model][1:] == [LayerNorm, LayerNorm] and not model[1].training
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    hw.undo(model)
    assert type(model[1]) is nn.LayerNorm


def test_a_deep_copy_and_an_empty_batch_work():
    layer = copy.deepcopy(LayerNorm(5, dims=(1,)))
    assert layer.dims == (1,) and layer(torch.empty(0, 5, 3, 3)).shape == (0, 5, 3, 3)


def test_axes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="as many axes"):
        LayerNorm((3, 4), dims=(1,))
    with pytest.raises(ValueError, match=r"must have the sizes \(8,\)"):
        LayerNorm(8, dims=(1,))(torch.randn(2, 7, 3))
    with pytest.raises(ValueError, match="different axes"):
        layer_norm_dims(torch.randn(2, 3), (1, -1))
    with pytest.raises(ValueError, match="weight must have the shape"):
        layer_norm_dims(torch.randn(2, 3), (1,), torch.ones(4))


def test_layer_norm_over_the_last_axis_equals_torch():
    x = torch.randn(3, 4, 10)
    ours, theirs = LayerNorm(10), nn.LayerNorm(10)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.parametrize("dims", [(1,), (0,), (1, 3), (-1,), (2, 1)])
def test_named_axes_equal_torch_after_permutation(dims):
    x = torch.randn(2, 5, 3, 4)
    axes = [d % 4 for d in dims]
    shape = [x.shape[d] for d in axes]
    w, b = torch.randn(shape), torch.randn(shape)
    order = [d for d in range(4) if d not in axes] + axes
    truth = nn.functional.layer_norm(x.permute(order), shape, w, b).permute([order.index(d) for d in range(4)])
    assert torch.allclose(layer_norm_dims(x, dims, w, b), truth, atol=1e-6)


def test_rescaling_or_recentring_all_weights_of_a_layer_changes_nothing():
    norm = LayerNorm(16, elementwise_affine=False).double()
    x, w = torch.randn(4, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    shift = torch.randn(8, dtype=torch.float64)
    base = norm(x @ w.T)
    assert torch.allclose(norm(x @ (3.0 * w).T), base, atol=1e-5)
    assert torch.allclose(norm(x @ (w + shift).T), base, atol=1e-5)
    scaled = w.clone()
    scaled[0] *= 5
    assert not torch.allclose(norm(x @ scaled.T), base, atol=1e-2)
    assert torch.allclose(norm((7.0 * x) @ w.T), base, atol=1e-5)


def test_each_case_is_normalised_for_itself():
    norm, x = LayerNorm(12), torch.randn(6, 12)
    assert torch.allclose(norm(x)[2:3], norm(x[2:3]), atol=1e-6)


def test_apply_puts_it_in_the_place_of_torch_and_keeps_the_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=1e-3), nn.LayerNorm(4, elementwise_affine=False))
    x = torch.randn(2, 4)
    before, weight = model(x), model[1].weight
    hw.apply(model, LayerNorm)
    assert model[1].weight is weight and model[1].eps == 1e-3 and model[2].weight is None
    assert torch.allclose(model(x), before, atol=1e-6)


def test_state_dict_and_deepcopy_round_trip():
    norm = LayerNorm((3, 4), dims=(1, 2))
    nn.init.normal_(norm.weight)
    other = LayerNorm((3, 4), dims=(1, 2))
    other.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(other(x), norm(x)) and torch.equal(copy.deepcopy(norm)(x), norm(x))


def test_bfloat16_autocast_runs_and_keeps_the_type():
    model = nn.Sequential(nn.Linear(8, 8), LayerNorm(8))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


def test_wrong_axes_get_one_sentence():
    with pytest.raises(ValueError, match="must name different axes"):
        layer_norm_dims(torch.randn(2, 3), (1, 1))
    with pytest.raises(ValueError, match="must name as many axes"):
        LayerNorm(3, dims=(1, 2))
    with pytest.raises(ValueError, match="must have the sizes"):
        LayerNorm(3, dims=(1,))(torch.randn(2, 4, 5))


def test_empty_batch_and_a_single_number():
    assert LayerNorm(4)(torch.empty(0, 4)).shape == (0, 4)
    norm = LayerNorm(1)
    nn.init.constant_(norm.bias, 2.0)
    assert torch.equal(norm(torch.randn(3, 1)), torch.full((3, 1), 2.0))
