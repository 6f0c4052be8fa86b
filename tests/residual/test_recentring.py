import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from headway.kernels.norms import crms_norm, rms_norm
from headway.residual.recentring import (
    Bake,
    CentreActivation,
    Parametrize,
    Recentre,
    Uncentre,
    centred,
    output_axis,
    recentre_embedding_,
    recentre_linear_,
    recentred,
)


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
    assert output_axis(nn.LSTM(3, 3)) is None
    for module in (nn.LSTM(3, 3), nn.Embedding(3, 3), nn.Bilinear(2, 2, 2)):
        with pytest.raises(TypeError, match="cannot be recentred"):
            recentre_linear_(module)


def parametrized(linear):
    Parametrize(linear, "weight", 0, "weight").do()
    Parametrize(linear, "bias", 0, "bias").do()
    return linear


def test_the_gradient_of_a_parametrised_weight_is_the_projected_gradient():
    linear = nn.Linear(5, 7).double()
    plain, inside = recentre_linear_(copy.deepcopy(linear)), parametrized(copy.deepcopy(linear))
    x, g = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    plain(x).backward(g)
    inside(x).backward(g)
    raw = inside.parametrizations
    torch.testing.assert_close(raw.weight.original.grad, recentred(plain.weight.grad, 0))
    torch.testing.assert_close(raw.bias.original.grad, recentred(plain.bias.grad, 0))


def test_recentring_inside_the_graph_passes_gradcheck():
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Recentre(0), weight) and torch.autograd.gradcheck(centred, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_recentring_is_not_done_in_half_precision_even_under_autocast(dtype):
    linear = nn.Linear(64, 64).to(dtype)
    exact = recentred(linear.weight, 0)
    inside = parametrized(linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert inside.weight.dtype == dtype
        torch.testing.assert_close(inside.weight, exact, rtol=0, atol=0 if dtype != torch.float32 else 1e-7)


def test_evaluation_keeps_the_recentred_weight_until_the_raw_one_changes():
    linear = parametrized(nn.Linear(5, 7)).eval()
    with torch.no_grad():
        first = linear.weight
        assert linear.weight is first
        linear.parametrizations.weight.original.add_(torch.randn(7, 5))
        assert linear.weight is not first and linear.weight.mean(0).abs().max() < 1e-6
        assert set(linear.state_dict()) == {"parametrizations.weight.original", "parametrizations.bias.original"}
        assert copy.deepcopy(linear).weight is not linear.weight
    assert linear.train().weight.requires_grad and linear.parametrizations.weight[0]._kept is None


def test_parametrising_is_undone_to_the_very_parameter_in_its_old_place():
    linear = nn.Linear(5, 7)
    before = list(linear.named_parameters())
    edits = [Parametrize(linear, "weight", 0, "weight"), Parametrize(linear, "bias", 0, "bias")]
    for edit in edits:
        edit.do()
    for edit in reversed(edits):
        edit.undo()
    after = list(linear.named_parameters())
    assert [name for name, _ in after] == ["weight", "bias"] and type(linear) is nn.Linear
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


def test_baking_a_tied_weight_leaves_the_other_side_of_the_tie_alone():
    linear, other = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    other.weight = linear.weight
    raw = linear.weight.detach().clone()
    Parametrize(linear, "weight", 0, "weight").do()
    assert linear.parametrizations.weight.original is other.weight
    edit = Bake(linear, "weight", "weight")
    edit.do()
    assert not parametrize.is_parametrized(linear) and linear.weight.mean(0).abs().max() < 1e-6
    assert torch.equal(other.weight, raw)
    edit.undo()
    assert parametrize.is_parametrized(linear) and linear.parametrizations.weight.original is other.weight


@pytest.mark.parametrize("cut", [False, True])
def test_activations_are_recentred_where_they_enter_and_leave(cut):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    entry, leaving = CentreActivation(model, "0", "entry", cut), CentreActivation(model, "1", "exit")
    x = 3 + torch.randn(4, 6, dtype=torch.float64)
    entry.do()
    whole = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(model(x), whole[:, :-1] if cut else whole)
    torch.testing.assert_close(model[0](input=x), model[0](x))
    entry.undo()
    leaving.do()
    torch.testing.assert_close(model(x), whole)
    off = Uncentre(model[1], "1")
    off.do()
    assert torch.equal(model(x), x)
    off.undo()
    torch.testing.assert_close(model(x), whole)
    leaving.undo()
    assert torch.equal(model(x), x)
