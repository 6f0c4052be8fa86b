"""Pre-CRMSNorm: the stream without its last channel, and the modules it needs."""

import copy

import pytest
import torch
from model_families import IDS, build
from torch import nn

import headway as hw
from headway.kernels.norms import rms_norm
from headway.norms.rms import CRMSNorm
from headway.residual.crms import CompletingRMSNorm, NarrowAttention, narrow_attention
from headway.residual.equivalence import output_of
from headway.residual.pre_rms import PreRMSNorm, verify_equivalence
from headway.residual.transformer import TransformerDecoder


def sample(name):
    model = build(name).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(name):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 8, 8, generator=generator).double()
    return {
        "vit": {"pixel_values": images},
        "clip": {"input_ids": IDS, "pixel_values": images},
        "whisper": {
            "input_features": torch.randn(2, 8, 18, generator=generator).double(),
            "decoder_input_ids": IDS[:, :5],
        },
        "torch pre": {"src": 3 + torch.randn(2, 9, 32, generator=generator).double()},
        "headway": {"tokens": IDS},
    }.get(name, {"input_ids": IDS})


FAMILIES = ["headway", "torch pre", "gpt2", "gpt_neox", "vit", "gptj", "opt", "phi", "clip", "whisper"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_compressed_model_predicts_the_same(name):
    model = sample(name)
    converted = hw.apply(model, PreRMSNorm(compress=True), copy=True)
    x = inputs(name)
    assert verify_equivalence(model, converted, **x) < 1e-12
    assert any(isinstance(module, CRMSNorm) for module in converted.modules())
    narrower = sum(p.numel() for p in converted.parameters()) < sum(p.numel() for p in model.parameters())
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False) and name in ("gpt2", "opt", "whisper")
    assert narrower or tied
    assert torch.equal(output_of(copy.deepcopy(converted), **x), output_of(converted, **x))
    with pytest.raises(hw.NothingToChange):
        hw.apply(converted, PreRMSNorm(compress=True))
    hw.undo(converted)
    assert verify_equivalence(model, converted, **x) == 0


def test_head_count_and_head_size_stay_and_only_the_stream_shrinks():
    model = hw.apply(sample("gpt2"), PreRMSNorm(compress=True))
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.head_dim) == (4, 8)
    assert attention.c_attn.weight.shape == (31, 96) and attention.c_proj.weight.shape == (32, 31)
    assert (attention.c_proj.nx, attention.c_proj.nf) == (32, 31)
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (50, 31)
    assert model.transformer.wte.embedding_dim == 31


def test_a_compressed_model_generates_the_same_text_with_its_cache():
    model = sample("gpt2")
    converted = hw.apply(model, PreRMSNorm(compress=True), copy=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **settings), converted.generate(IDS, **settings))


def test_what_gives_out_its_stream_gives_the_full_width_again():
    model = sample("torch pre")
    converted = hw.apply(model, PreRMSNorm(compress=True), copy=True)
    assert isinstance(converted.norm, CompletingRMSNorm) and torch.equal(converted.norm.weight, model.norm.weight)
    x = inputs("torch pre")["src"]
    assert converted(x).shape == x.shape and isinstance(converted.layers[0].self_attn, NarrowAttention)


def test_encoder_and_decoder_of_torch_are_compressed_together():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True, norm_first=True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.1 * torch.randn_like(parameter))
    converted = hw.apply(model, PreRMSNorm(compress=True), copy=True)
    x, y = 2 + torch.randn(2, 5, 32).double(), 2 + torch.randn(2, 4, 32).double()
    causal = nn.Transformer.generate_square_subsequent_mask(4).double()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = {"tgt_mask": causal, "tgt_is_causal": True, "src_key_padding_mask": padding}
    given["memory_key_padding_mask"] = padding
    assert verify_equivalence(model, converted, x, y, **given) < 1e-12
    cross = converted.decoder.layers[0].multihead_attn
    assert cross.q_proj.in_features == 31 and cross.k_proj.in_features == 32 and cross.out_proj.out_features == 31


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}], ids=str)
def test_the_narrow_attention_is_torchs_on_a_stream_of_mean_zero(batch_first, need_weights, extra):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, **extra).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    narrow = narrow_attention(
        attention,
        lambda name: getattr(attention, name),
        (True, True, True),
        (
            attention.out_proj.weight.detach(),
            None if attention.out_proj.bias is None else attention.out_proj.bias.detach(),
        ),
    )
    x = torch.randn(2, 2, 12, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    masks = {"attn_mask": torch.tensor([[False, True], [False, False]]), "need_weights": need_weights}
    masks["key_padding_mask"] = torch.tensor([[False, False], [False, True]])
    wide, wide_weights = attention(x, x, x, **masks)
    short, short_weights = narrow(x[..., :-1], x[..., :-1], x[..., :-1], **masks)
    torch.testing.assert_close(short, wide, rtol=1e-12, atol=1e-12)
    assert (short_weights is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(short_weights, wide_weights, rtol=1e-12, atol=1e-12)
    alone, _ = narrow(x[0][..., :-1], x[0][..., :-1], x[0][..., :-1], need_weights=need_weights)
    torch.testing.assert_close(alone, attention(x[0], x[0], x[0])[0], rtol=1e-12, atol=1e-12)


def test_the_completing_norm_gives_every_channel_of_the_whole_vector():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    whole = x - x.mean(-1, keepdim=True)
    weight, bias = nn.Parameter(torch.randn(9).double()), nn.Parameter(torch.randn(9).double())
    norm = CompletingRMSNorm(9, 1e-5, weight, bias)
    expected = rms_norm(whole, (9,), weight, bias, 1e-5)
    torch.testing.assert_close(norm(whole[:, :-1]), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(norm, (whole[:, :-1].detach().requires_grad_(),))
    assert norm(torch.zeros(0, 8).double()).shape == (0, 9)


def test_both_norms_pass_gradcheck_and_gradgradcheck():
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for norm in (CRMSNorm(7), hw.norms.RMSNorm(7, elementwise_affine=False)):
        assert torch.autograd.gradcheck(norm, (z,)) and torch.autograd.gradgradcheck(norm, (z,))


def test_the_gradient_of_crms_follows_the_papers_equation():
    z, g = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    CRMSNorm(7, 1e-5)(z).backward(g)
    s = z.detach().sum(-1, keepdim=True)
    r = ((z.detach().pow(2).sum(-1, keepdim=True) + s * s) / 8 + 1e-5).rsqrt()
    expected = r * g - r**3 / 8 * (g * z.detach()).sum(-1, keepdim=True) * (z.detach() + s)
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-12)


def test_compression_needs_the_gains_folded_and_two_channels():
    with pytest.raises(ValueError, match="fold_affine"):
        PreRMSNorm(compress=True, fold_affine=False)
    with pytest.raises(ValueError, match="no gain"):
        CRMSNorm(7, elementwise_affine=True)
    with pytest.raises(ValueError, match="one channel"):
        hw.apply(TransformerDecoder(5, 1, 1, 1).eval(), PreRMSNorm(compress=True))


def test_one_channel_is_normed_to_its_bias_before_and_after():
    torch.manual_seed(0)
    model = TransformerDecoder(5, 1, 2, 1, max_length=16).double().eval()
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    assert verify_equivalence(model, converted, ids) < 1e-12
    assert converted(ids[:0]).shape == (0, 5, 5)


def test_a_compressed_model_comes_back_from_disk(tmp_path):
    from headway.checkpoints import load_pretrained

    model = hw.apply(sample("gpt2").float(), PreRMSNorm(compress=True))
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(load_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
