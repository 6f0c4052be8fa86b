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


def gemma2_without_soft_caps():
    """Gemma 2 attends like Llama but for soft caps on its logits and a local window, which are switched off here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    same = {"head_dim": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    config = transformers.Gemma2Config(
        **sizes, **same, hidden_activation="silu", query_pre_attn_scalar=8, attn_logit_softcapping=None,
        final_logit_softcapping=None, layer_types=["full_attention"] * 2, attn_implementation="eager",
    )  # fmt: skip
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    plain = transformers.LlamaConfig(**sizes, **same, attn_implementation="eager")
    llama = hw.apply(transformers.LlamaForCausalLM(plain), hw.PeriLN()).eval()
    with torch.no_grad():
        for p in gemma.parameters():
            p.normal_(std=0.2)
    return gemma, llama


def test_a_llama_with_peri_ln_is_gemma2_s_decoder_layer_forward_and_backward():
    gemma, llama = gemma2_without_soft_caps()
    missing, unexpected = llama.load_state_dict(convert_checkpoint_names(gemma.state_dict()), strict=False)
    assert not unexpected and not [name for name in missing if name != "model.norm_placement"]
    x, results = torch.randn(2, 7, 32), []
    angles = llama.model.rotary_emb(x, torch.arange(7)[None])
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    for model in (gemma.model, llama.model):
        stream = x.clone().requires_grad_()
        y = stream
        for layer in model.layers:
            y = layer(y, position_embeddings=angles, attention_mask=mask)
        y.square().sum().backward()
        weights = [layer.mlp.down_proj.weight.grad for layer in model.layers]
        gains = [layer.input_layernorm.weight.grad for layer in model.layers]
        results.append([y.detach(), stream.grad, *weights, *gains])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_a_gemma2_state_dict_is_run_saved_and_loaded_again_bitwise(tmp_path):
    gemma, llama = gemma2_without_soft_caps()
    llama.load_state_dict(convert_checkpoint_names(gemma.state_dict()), strict=False)
    ids = torch.arange(14).view(2, 7)
    before = llama(ids).logits
    llama.save_pretrained(tmp_path)
    loaded = hw.load_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in llama.state_dict().items())
    loaded.set_attn_implementation("eager")
    assert torch.equal(loaded(ids).logits, before)


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
