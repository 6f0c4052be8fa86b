import pytest
import torch
from torch import nn

import headway as hw
from headway.norms.layer import LayerNorm
from headway.norms.rms import CRMSNorm, RMSNorm


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
