"""RMSNorm in the conventions of torch, Llama and Gemma, and CRMSNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headway as hw
from headway.norms.layer import LayerNorm
from headway.norms.rms import CRMSNorm, RMSNorm


def rms0(a, eps):
    return a / torch.sqrt((a * a).mean(-1, keepdim=True) + eps)


def layer0(a, eps):
    centred = a - a.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (1e-4, 0.0), (1.0, 1e3)])
def test_rms_of_the_recentred_vector_is_the_layer_norm(scale, mean):
    x = torch.randn(20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale + mean
    recentred = x - x.mean(-1, keepdim=True)
    norm = RMSNorm(48, eps=1e-5, elementwise_affine=False)
    torch.testing.assert_close(norm(recentred), layer0(x, 1e-5), rtol=1e-9, atol=1e-12)


def test_crms_equals_the_first_entries_of_rms_of_the_completed_vector():
    z = torch.randn(8, 31, dtype=torch.float64)
    whole = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(CRMSNorm(31, eps=1e-6)(z), rms0(whole, 1e-6)[:, :31], rtol=1e-13, atol=1e-13)


def test_weight_bias_and_gain_offset_follow_the_equation():
    x = torch.randn(5, 12, dtype=torch.float64)
    for offset in (0, 1):
        norm = RMSNorm(12, bias=True, gain_offset=offset, dtype=torch.float64)
        assert torch.equal(norm.weight, torch.full((12,), 1.0 - offset, dtype=torch.float64))
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        torch.testing.assert_close(norm(x), rms0(x, 1e-5) * (offset + norm.weight) + norm.bias)


@pytest.mark.parametrize("shape", [16, (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_it_stands_in_for_nn_rms_norm(shape, dtype, eps):
    theirs = nn.RMSNorm(shape, eps=eps, dtype=dtype)
    nn.init.normal_(theirs.weight)
    ours = RMSNorm.from_module(theirs)
    assert ours is not None and ours.weight is theirs.weight
    x = torch.randn(3, *theirs.normalized_shape).to(dtype)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(ours(x), theirs(x), rtol=rounding, atol=rounding)


class EarlyCast(nn.Module):
    """The Llama convention: round, then multiply."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x):
        a = x.float()
        return self.weight * (a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class LateCast(nn.Module):
    """The Gemma convention: multiply by one plus the weight, then round."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) - 0.5)
        self.eps = 1e-6

    def forward(self, x):
        a = x.float()
        y = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


@pytest.mark.parametrize(("kind", "offset", "early"), [(EarlyCast, 0, True), (LateCast, 1, False)])
def test_conventions_are_recognised_by_what_is_computed(kind, offset, early):
    theirs = kind(40)
    ours = RMSNorm.from_module(theirs)
    assert ours is not None and (ours.gain_offset, ours.cast_before_gain) == (offset, early)
    assert ours.weight is theirs.weight
    for dtype, rounding in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(6, 40).to(dtype)
        mine, true = copy.deepcopy(ours).to(dtype)(x), copy.deepcopy(theirs).to(dtype)(x)
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true, rtol=rounding, atol=rounding)


def test_what_computes_something_else_is_left_alone():
    class Other(EarlyCast):
        def forward(self, x):
            return super().forward(x) + 1

    assert RMSNorm.from_module(Other(8)) is None
    assert RMSNorm.from_module(nn.LayerNorm(8)) is None
    assert RMSNorm.from_module(RMSNorm(8)) is None


def test_the_classes_of_hugging_face_models_are_recognised():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    for kind, offset, early in ((llama.LlamaRMSNorm, 0, True), (gemma.Gemma2RMSNorm, 1, False)):
        ours = RMSNorm.from_module(kind(24))
        assert ours is not None and (ours.gain_offset, ours.cast_before_gain) == (offset, early)


def test_apply_replaces_every_rms_norm_and_undo_takes_it_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), EarlyCast(8))
    x = torch.randn(3, 8)
    wanted = model(x)
    hw.apply(model, RMSNorm)
    assert [type(m) for m in model][1:] == [RMSNorm, RMSNorm]
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    hw.undo(model)
    assert type(model[2]) is EarlyCast


def test_state_goes_through_a_round_trip_and_a_deep_copy():
    norm = RMSNorm(6, bias=True)
    nn.init.normal_(norm.weight)
    other = RMSNorm(6, bias=True)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(other(x), norm(x)) and torch.equal(copy.deepcopy(norm)(x), norm(x))


def test_a_zero_vector_of_one_entry_gives_zero_and_bad_settings_are_named():
    assert torch.equal(RMSNorm(1)(torch.zeros(3, 1)), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="gain_offset"):
        RMSNorm(4, gain_offset=2)
    for shape in (0, (3, 4)):
        with pytest.raises(ValueError, match="one axis"):
            CRMSNorm(shape)
    with pytest.raises(ValueError, match="must end in"):
        CRMSNorm(4)(torch.randn(2, 5))


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_it_stands_in_for_torch(eps):
    model, x = nn.Sequential(nn.RMSNorm(12, eps=eps)), torch.randn(3, 12)
    before = model(x)
    hw.apply(model, RMSNorm)
    assert isinstance(model[0], RMSNorm) and torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_it_stands_in_for_the_norms_of_llama_and_gemma(family, dtype):
    pytest.importorskip("transformers")
    if family == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Theirs
    else:
        from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm as Theirs
    theirs = Theirs(24).to(dtype)
    nn.init.normal_(theirs.weight)
    ours = RMSNorm.from_module(theirs)
    assert ours.weight is theirs.weight
    x = torch.randn(5, 24).to(dtype)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_on_zero_mean_input_it_equals_layer_norm_eps_included():
    x = torch.randn(6, 10, dtype=torch.float64) * torch.tensor([1e-4, 1, 1, 1e3, 1, 1], dtype=torch.float64)[:, None]
    x = x - x.mean(-1, keepdim=True)
    rms, layer = RMSNorm(10, bias=True).double(), LayerNorm(10).double()
    for name in ("weight", "bias"):
        nn.init.normal_(getattr(layer, name))
    rms.load_state_dict(layer.state_dict())
    assert torch.allclose(rms(x), layer(x), atol=1e-12)


def test_crms_has_no_gain_and_takes_one_axis():
    assert CRMSNorm(4)(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match="no gain"):
        CRMSNorm(4, elementwise_affine=True)
    with pytest.raises(ValueError, match="one axis"):
        CRMSNorm((2, 3))
    with pytest.raises(ValueError, match="one axis"):
        CRMSNorm(0)
    with pytest.raises(ValueError, match="4 channels"):
        CRMSNorm(4)(torch.randn(2, 5))


def test_gain_offset_starts_at_an_effective_gain_of_one():
    norm, x = RMSNorm(8, gain_offset=1.0), torch.randn(2, 8)
    assert torch.equal(norm.weight, torch.zeros(8)) and torch.allclose(norm(x), RMSNorm(8)(x), atol=1e-6)
