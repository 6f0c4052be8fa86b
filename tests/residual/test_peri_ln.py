import pytest
import torch
from model_families import IDS, build
from torch import nn

import headway as hw
from headway.residual.peri_ln import PeriNorm, convert_checkpoint_names


def test_peri_norm_adds_the_normalised_output_and_passes_other_outputs_through():
    class Branch(nn.Module):
        def forward(self, x, scale):
            return scale * x, "kept"

    module, x = PeriNorm(Branch(), 8), torch.randn(2, 8)
    y, kept = module(x, 7.0)
    assert kept == "kept"
    assert torch.allclose((y - x).square().mean(-1).sqrt(), torch.ones(2), atol=1e-4)


def test_peri_norm_with_gain_zero_is_the_identity():
    x = torch.randn(2, 8)
    assert torch.equal(PeriNorm(nn.Linear(8, 8), 8, output_gain=0.0)(x), x)


def test_peri_norm_refuses_a_single_channel_under_a_layer_norm():
    with pytest.raises(ValueError, match="at least 2 under a layer norm"):
        PeriNorm(nn.Identity(), 1, norm="layernorm")


def test_a_gemma2_block_and_a_llama_with_peri_ln_compute_the_same():
    gemma, llama = build("gemma2"), hw.apply(build("llama"), hw.PeriLN())
    ours, theirs = llama.model.layers[0], gemma.model.layers[0]
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    renamed = convert_checkpoint_names({f"layers.0.{k}": v for k, v in theirs.state_dict().items()})
    ours.load_state_dict({k.removeprefix("layers.0."): v for k, v in renamed.items()})
    # attention differs between the families (soft capping), so the branches are compared where they read and write
    x = torch.randn(2, 5, 32)
    mlp = nn.Linear(32, 32)
    gemma_added = theirs.post_feedforward_layernorm(mlp(theirs.pre_feedforward_layernorm(x)))
    ours_added = ours.mlp_output_norm(mlp(ours.post_attention_layernorm(x)))
    assert torch.allclose(ours_added, gemma_added, atol=1e-5)
    gemma_added = theirs.post_attention_layernorm(mlp(theirs.input_layernorm(x)))
    assert torch.allclose(ours.attention_output_norm(mlp(ours.input_layernorm(x))), gemma_added, atol=1e-5)


def test_checkpoint_names_make_the_round_trip_bitwise():
    # halves of small integers survive the shift by one exactly
    state = {k: (v * 4).round() / 2 if "norm" in k else v for k, v in build("gemma2").state_dict().items()}
    there = convert_checkpoint_names(state)
    back = convert_checkpoint_names(there, "library", "gemma2")
    assert there.keys() != state.keys() and back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ValueError, match="between 'gemma2' and 'library'"):
        convert_checkpoint_names(state, "llama", "gemma2")


def test_an_all_zero_branch_output_stays_zero():
    model = hw.apply(build("llama"), hw.PeriLN())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    assert model(IDS).logits.isfinite().all()
