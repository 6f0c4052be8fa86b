"""Identities of the paper and of its public implementations, and the smallest real workload."""

import copy

import pytest
import torch
import torch.nn.functional as F
from model_families import IDS, build
from torch import nn

import headway as hw
from headway.anatomy import describe
from headway.norms.rms import CRMSNorm, RMSNorm
from headway.residual.equivalence import output_of
from headway.residual.pre_rms import PreRMSNorm, finalize, verify_equivalence
from headway.residual.transformer import TransformerDecoder


def unsettled(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_four_forms_of_a_vision_transformer_agree_in_outputs_and_input_gradients():
    model = unsettled(build("vit").double())
    centred = hw.apply(model, PreRMSNorm(fold_affine=False), copy=True)
    # the second form of the paper: weights recentred, layer norms kept
    kept = copy.deepcopy(model)
    kept.load_state_dict(centred.state_dict())
    forms = [model, kept, centred, hw.apply(model, PreRMSNorm(compress=True), copy=True)]
    found = []
    for form in forms:
        image = torch.randn(
            2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        logits = form(pixel_values=image).logits
        logits.square().sum().backward()
        found.append((logits.detach(), image.grad))
    kinds = [{type(m) for m in form.modules()} & {nn.LayerNorm, RMSNorm, CRMSNorm} for form in forms]
    assert kinds == [{nn.LayerNorm}, {nn.LayerNorm}, {RMSNorm}, {CRMSNorm}]
    for logits, gradient in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-9, atol=1e-10)


def test_recentring_a_tied_table_with_its_head_is_visibly_wrong():
    model = unsettled(build("gpt2").double())
    wrong = hw.apply(model, PreRMSNorm(fold_affine=False), copy=True)
    assert verify_equivalence(model, wrong, IDS) < 1e-12
    wrong.lm_head.weight = wrong.transformer.wte.weight
    assert verify_equivalence(model, wrong, IDS) > 0.05
    # centring after the embedding keeps the tie, and is right
    tied = finalize(hw.apply(model, PreRMSNorm(mode="parametrized"), copy=True))
    assert tied.lm_head.weight is tied.transformer.wte.weight and verify_equivalence(model, tied, IDS) < 1e-12


def test_the_weights_are_those_of_slicegpts_layer_norm_fusion_on_opt():
    model = unsettled(build("opt").double())
    fused = hw.apply(model, PreRMSNorm(), copy=True)

    def less_mean(tensor, axis):
        return tensor - tensor.mean(axis, keepdim=True)

    decoder, other = model.model.decoder, fused.model.decoder
    for table in ("embed_tokens", "embed_positions"):
        expected = less_mean(getattr(decoder, table).weight, -1)
        torch.testing.assert_close(getattr(other, table).weight, expected, rtol=0, atol=1e-14)
    for old, new in zip(decoder.layers, other.layers, strict=True):
        pairs = [(old.self_attn_layer_norm, f"self_attn.{key}_proj") for key in "qkv"] + [(old.final_layer_norm, "fc1")]
        for norm, name in pairs:
            linear, folded = old.get_submodule(name), new.get_submodule(name)
            torch.testing.assert_close(folded.weight, linear.weight * norm.weight, rtol=0, atol=1e-14)
            torch.testing.assert_close(folded.bias, linear.bias + linear.weight @ norm.bias, rtol=0, atol=1e-13)
        for name in ("self_attn.out_proj", "fc2"):
            linear, baked = old.get_submodule(name), new.get_submodule(name)
            torch.testing.assert_close(baked.weight, less_mean(linear.weight, -2), rtol=0, atol=1e-14)
            torch.testing.assert_close(baked.bias, less_mean(linear.bias, 0), rtol=0, atol=1e-14)
    final, head = decoder.final_layer_norm, model.lm_head.weight
    torch.testing.assert_close(fused.lm_head.weight, head * final.weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(fused.lm_head.bias, head @ final.bias, rtol=0, atol=1e-13)
    assert other.final_layer_norm.weight is None


@pytest.mark.parametrize("settings", [None, {}, {"compress": True}, {"mode": "parametrized"}], ids=str)
def test_a_constant_on_every_writers_bias_changes_no_prediction(settings):
    model = unsettled(build("gpt2").double())
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(describe(shifted).blocks):
            for part in block.sublayers:
                shifted.get_submodule(part.writer).bias.add_(0.7 + i)
        shifted.transformer.wpe.weight.add_(3.0)
    if settings is not None:
        hw.apply(shifted, PreRMSNorm(**settings))
    assert verify_equivalence(model, shifted, IDS) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_is_converted_as_exactly_as_it_computes(dtype):
    exact = unsettled(build("headway").double())
    half = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(half).double()
    truth = output_of(exact, IDS)
    before = (output_of(half, IDS).double() - truth).abs().mean()
    converted = hw.apply(half, PreRMSNorm(example_inputs=None), copy=True)
    after = (output_of(converted, IDS).double() - truth).abs().mean()
    assert converted.blocks[0].mlp.down.weight.dtype == dtype and after < 2.5 * before


def test_a_nan_fills_its_row_as_under_layer_norm_and_empty_batches_stay_empty():
    model = build("torch pre")
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    x = torch.randn(2, 3, 32)
    x[0, 0, 5] = float("nan")
    with torch.no_grad():
        assert torch.equal(model(x).isnan(), converted(x).isnan())
        decoder = hw.apply(build("headway"), PreRMSNorm())
        assert decoder(IDS[:0]).shape == (0, 9, 50) and decoder(IDS[:1, :1]).shape == (1, 1, 50)


def test_the_converted_model_compiles_to_one_graph():
    from torch._dynamo.testing import CompileCounter

    model = hw.apply(build("headway"), PreRMSNorm(compress=True))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.fixture(scope="module")
def character_gpt():
    """A small GPT that has learned the characters of Python's own help texts for a few seconds, and a piece held out."""
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(letter) for letter in text[:60000]])
    torch.manual_seed(0)
    model = TransformerDecoder(len(letters), 64, 3, 4, max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        starts = torch.randint(50000, (16, 1))
        batch = codes[starts + torch.arange(65)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 3.0
    return model.eval(), codes[50000:].unfold(0, 65, 65)[:100]


def held_out_loss(model, pieces):
    with torch.no_grad():
        return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1).double(), pieces[:, 1:].flatten()).item()


def generate(model, start, count):
    found = start
    with torch.no_grad():
        for _ in range(count):
            found = torch.cat([found, model(found[:, -64:])[:, -1:].argmax(-1)], 1)
    return found


@pytest.mark.parametrize("settings", [{}, {"compress": True}], ids=str)
def test_a_trained_character_gpt_keeps_its_loss_and_every_one_of_200_greedy_characters(character_gpt, settings):
    model, pieces = character_gpt
    converted = hw.apply(model, PreRMSNorm(example_inputs=(pieces[:4, :-1],), **settings), copy=True)
    assert abs(held_out_loss(model, pieces) - held_out_loss(converted, pieces)) < 1e-6
    start = pieces[:1, :20]
    assert torch.equal(generate(model, start, 200), generate(converted, start, 200))


def test_a_trained_character_gpt_jumps_in_loss_when_norms_are_dropped_in_without_surgery(character_gpt):
    model, pieces = character_gpt
    wrong = copy.deepcopy(model)
    for name, module in list(wrong.named_modules()):
        if isinstance(module, nn.LayerNorm):
            owner, _, key = name.rpartition(".")
            norm = RMSNorm(64, module.eps, bias=True)
            norm.weight, norm.bias = module.weight, module.bias
            setattr(wrong.get_submodule(owner), key, norm)
    # the streams have little mean yet after a few seconds of training; the surgery moves the loss by less than 1e-6
    assert held_out_loss(wrong, pieces) > held_out_loss(model, pieces) + 1e-3


def test_training_goes_on_from_a_character_gpt_as_it_would_have(character_gpt):
    model, pieces = character_gpt
    model = copy.deepcopy(model).double()
    converted = hw.apply(model, PreRMSNorm(mode="parametrized"), copy=True)
    runs = []
    for trained in (model, converted):
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
        runs.append([])
        for i in range(15):
            batch = pieces[4 * i : 4 * i + 4]
            loss = F.cross_entropy(trained(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            runs[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-9
