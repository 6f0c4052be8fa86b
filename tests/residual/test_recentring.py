import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headway.kernels.norms import crms_norm, rms_norm
from headway.norms.layer import LayerNorm
from headway.norms.rms import RMSNorm
from headway.residual.recentring import (
    CentreEntry,
    baked,
    finalize,
    output_axis,
    parametrized,
    recentre_embedding_,
    recentre_linear_,
    recentred,
)
from headway.residual.transformer import TransformerDecoder
from headway.surgery import Swap


def layer_norm_0(x, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("spread, mean", [(1.0, 0.0), (1e-4, 0.0), (1.0, 1e3)])
def test_rms_norm_of_the_centred_vector_is_layer_norm(spread, mean):
    x = torch.randn(64, 33, dtype=torch.float64) * spread + mean
    y = rms_norm(recentred(x, -1), (33,), None, None, 1e-5)
    torch.testing.assert_close(y, layer_norm_0(x), rtol=0, atol=1e-12 * max(1.0, mean))


def test_eps_outside_the_root_fails_on_rows_of_small_spread():
    x = torch.randn(64, 33, dtype=torch.float64) * 1e-4
    z = recentred(x, -1)
    misplaced = z / (z.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5)
    assert (misplaced - layer_norm_0(x)).abs().max() > 0.1


def test_crms_norm_is_rms_norm_without_the_last_entry():
    z = torch.randn(64, 32, dtype=torch.float64)
    full = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    whole = rms_norm(full, (33,), None, None, 1e-5)
    torch.testing.assert_close(crms_norm(z, 1e-5), whole[:, :-1], rtol=0, atol=1e-13)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_recentring_is_a_projection(outputs, inputs, bias):
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    once = recentre_linear_(linear).weight.detach().clone()
    assert once.mean(0).abs().max() < 1e-15
    torch.testing.assert_close(recentre_linear_(linear).weight.detach(), once, rtol=0, atol=1e-15)


def test_the_output_of_a_recentred_linear_layer_has_zero_mean():
    linear = recentre_linear_(nn.Linear(5, 7).double())
    assert linear(torch.randn(3, 5, dtype=torch.float64)).mean(-1).abs().max() < 1e-14


def test_a_conv1d_of_hugging_face_is_recentred_over_its_last_axis():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = recentre_linear_(pytorch_utils.Conv1D(7, 5).double())
    assert output_axis(layer) == -1
    assert layer(torch.randn(3, 5, dtype=torch.float64)).mean(-1).abs().max() < 1e-14


def test_every_row_of_a_recentred_table_has_zero_mean():
    table = recentre_embedding_(nn.Embedding(6, 5).double())
    assert table.weight.mean(-1).abs().max() < 1e-15


def test_a_writer_of_unknown_kind_is_refused():
    with pytest.raises(TypeError, match="cannot be recentred"):
        output_axis(nn.LSTM(3, 3))


def test_baking_in_bfloat16_rounds_once():
    linear = nn.Linear(16, 16).bfloat16()
    wide = linear.weight.double()
    torch.testing.assert_close(baked(linear).weight, (wide - wide.mean(0)).bfloat16(), rtol=0, atol=0)


def test_the_gradient_of_a_parametrised_weight_is_the_projected_gradient():
    linear = nn.Linear(5, 7).double()
    plain, inside = baked(linear), parametrized(linear)
    x, g = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    plain(x).backward(g)
    inside(x).backward(g)
    torch.testing.assert_close(linear.weight.grad, recentred(plain.weight.grad, 0))
    torch.testing.assert_close(linear.bias.grad, recentred(plain.bias.grad, 0))


def test_recentring_is_not_done_in_half_precision_under_autocast():
    linear = nn.Linear(5, 7)
    inside = parametrized(linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert inside.weight.dtype == torch.float32
        torch.testing.assert_close(inside.weight, recentred(linear.weight, 0))


def test_finalize_leaves_plain_weights_and_the_same_function():
    model = nn.Sequential(parametrized(nn.Linear(5, 7)))
    x = torch.randn(3, 5)
    before = model(x)
    finalize(model)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model(x), before)


def test_parametrised_training_follows_the_pre_ln_trajectory():
    torch.manual_seed(0)
    plain = TransformerDecoder(50, 16, 2, 2, max_length=16).double()
    with torch.no_grad():
        # AdamW turns the rounding of an exactly vanishing gradient into a full step, so nothing starts at zero
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.05)
    model = copy.deepcopy(plain)
    for name, module in list(model.named_modules()):
        if name.endswith(("attention.out", "mlp.down")):
            Swap(model, name, module, parametrized(module), untie=True).do()
        elif isinstance(module, LayerNorm):
            norm = RMSNorm(module.normalized_shape, module.eps, bias=True)
            norm.weight, norm.bias = module.weight, module.bias
            Swap(model, name, module, norm.double()).do()
    CentreEntry(model.blocks[0], "blocks.0").do()
    tokens, losses = torch.arange(18).view(2, 9), []
    for trained in (plain, model):
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-2)
        losses.append([])
        for _ in range(20):
            loss = F.cross_entropy(trained(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-12
    assert losses[0][0] - losses[0][-1] > 0.1
