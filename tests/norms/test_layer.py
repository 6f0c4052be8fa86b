import copy

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms.layer import LayerNorm, layer_norm_dims


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
