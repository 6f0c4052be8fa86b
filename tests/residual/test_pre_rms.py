import copy
import pickle

import pytest
import torch
from model_families import IDS, SMALL, build, run
from torch import nn

import headway as hw
from headway.checkpoints import load_pretrained
from headway.norms.rms import RMSNorm
from headway.residual.equivalence import output_of
from headway.residual.pre_rms import (
    NotPreNormError,
    PreRMSNorm,
    finalize,
    recentre_embedding_,
    recentre_linear_,
    verify_equivalence,
)
from headway.residual.transformer import TransformerDecoder

FAMILIES = [
    "headway",
    "torch pre",
    "gpt2",
    "gpt_neox",
    "gpt_neox parallel",
    "vit",
    "gptj",
    "opt",
    "phi",
    "clip",
    "whisper",
    "timm",
]


def sample(name):
    """A model of a family whose weights all have a mean, its norms a gain and a bias."""
    if name == "gpt_neox parallel":
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=64)).eval()
    else:
        model = build(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(name, model):
    """What the model is called with, by name of the argument."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    if name == "whisper":
        return {
            "input_features": torch.randn(2, 8, 18, generator=generator).to(dtype),
            "decoder_input_ids": IDS[:, :5],
        }
    if name.startswith("torch"):
        return {"src": (3 + torch.randn(2, 9, 32, generator=generator)).to(dtype)}
    return {
        "vit": {"pixel_values": images},
        "timm": {"image": images},
        "clip": {"input_ids": IDS, "pixel_values": images},
        "headway": {"tokens": IDS},
    }.get(name, {"input_ids": IDS})


def test_layer_norm_is_the_rms_norm_of_the_recentred_vector():
    x = torch.randn(64, 48, dtype=torch.float64)
    x[:16] *= 1e-4
    x[16:32] += 1e3
    x[32:40] = 7.0
    norm, rms = nn.LayerNorm(48).double(), RMSNorm(48).double()
    assert (norm(x) - rms(x - x.mean(-1, keepdim=True))).abs().max() < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_converted_model_predicts_the_same(name, dtype, tolerance):
    model = sample(name).to(dtype)
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    x = inputs(name, model)
    scale = max(1.0, output_of(model, **x).abs().max().item())
    assert verify_equivalence(model, converted, **x) < tolerance * scale
    kept = {name for name, module in converted.named_modules() if isinstance(module, nn.LayerNorm)}
    # what norms an embedding itself reads no stream of the layers
    assert kept == ({"vision_model.pre_layrnorm"} if name == "clip" else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_pickles_of_a_converted_model_predict_the_same(name):
    model = hw.apply(sample(name), PreRMSNorm())
    x = inputs(name, model)
    assert torch.equal(output_of(copy.deepcopy(model), **x), output_of(model, **x))
    assert torch.equal(output_of(pickle.loads(pickle.dumps(model)), **x), output_of(model, **x))


def test_a_drop_in_without_surgery_is_visibly_wrong():
    model = sample("headway").double()
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        for key in ("attention_norm", "mlp_norm"):
            old = getattr(block, key)
            new = RMSNorm(32, old.eps, bias=True).double()
            new.weight, new.bias = old.weight, old.bias
            setattr(block, key, new)
    assert verify_equivalence(model, wrong, IDS) > 0.05


@pytest.mark.parametrize("name", ["gpt2", "headway tied"])
def test_a_tied_head_keeps_the_old_table(name):
    if name == "gpt2":
        model = sample("gpt2").double()
        table, head = model.transformer.wte.weight, lambda m: (m.transformer.wte.weight, m.lm_head.weight)
    else:
        model = TransformerDecoder(50, 32, 2, 4, max_length=16, tied=True).double().eval()
        table, head = model.embedding.weight, lambda m: (m.embedding.weight, m.head.weight)
    original = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    hw.apply(model, PreRMSNorm(fold_affine=False), optimizer=optimizer)
    fresh, kept = head(model)
    assert kept is table and fresh is not table
    assert fresh.mean(-1).abs().max() < 1e-15
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert verify_equivalence(original, model, IDS) < 1e-10


def test_recentring_is_a_projection_and_keeps_the_type():
    linear, table = nn.Linear(5, 7).double(), nn.Embedding(6, 5).double()
    conv = nn.Conv2d(3, 8, 2).double()
    for module, recentre in ((linear, recentre_linear_), (table, recentre_embedding_), (conv, recentre_linear_)):
        assert recentre(module) is module
        once = module.weight.detach().clone()
        recentre(module)
        assert (module.weight - once).abs().max() < 1e-15
    assert linear.weight.mean(0).abs().max() < 1e-15 and linear.bias.mean().abs() < 1e-15
    assert table.weight.mean(-1).abs().max() < 1e-15 and conv.weight.mean(0).abs().max() < 1e-15
    assert recentre_linear_(nn.Linear(5, 7).bfloat16()).weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="Bilinear"):
        recentre_linear_(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_converting_a_converted_model_changes_nothing(name):
    model = hw.apply(sample(name), PreRMSNorm())
    with pytest.raises(hw.NothingToChange):
        hw.apply(model, PreRMSNorm())


@pytest.mark.parametrize("name", FAMILIES)
def test_undo_restores_every_bit(name):
    model = sample(name)
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {key: value.detach().clone() for key, value in before.items()}
    x = inputs(name, model)
    output = output_of(model, **x)
    hw.apply(model, PreRMSNorm())
    assert hw.undo(model) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[key] is before[key] and torch.equal(after[key], values[key]) for key in before)
    assert after.keys() == before.keys() and torch.equal(output_of(model, **x), output)


def test_norms_keep_their_parameters_and_eps_unless_folded():
    model = sample("gpt2")
    old = model.transformer.h[0].ln_1
    hw.apply(model, PreRMSNorm(fold_affine=False))
    new = model.transformer.h[0].ln_1
    assert new.weight is old.weight and new.bias is old.bias and new.eps == old.eps and not new.training


def test_the_plan_names_what_changes_and_leaves_the_model_alone():
    model = sample("gpt2")
    before = run("gpt2", model)
    plan = hw.plan(model, PreRMSNorm())
    names = {row.name for row in plan.rows}
    assert {"transformer.wte", "transformer.wpe", "transformer.h.3.mlp.c_proj", "transformer.ln_f"} <= names
    assert "bias=True) recentred" in str(hw.plan(sample("headway"), PreRMSNorm()))
    assert "untied from lm_head" in str(plan) and "RMSNorm" in str(plan)
    # the head's own table and the bias it gets, less the gains and biases of nine norms
    assert plan.parameters_after - plan.parameters_before == 50 * 32 + 50 - 9 * 64
    assert torch.equal(run("gpt2", model), before)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "vit"])
@pytest.mark.parametrize("form", ["baked", "compressed", "parametrized", "finalized"])
def test_a_converted_model_comes_back_from_disk(name, form, tmp_path):
    model = sample(name)
    if name == "gpt2":
        # the usual dropout is in the configuration, and loading builds the model in training mode
        model.config.resid_pdrop = 0.1 if form in ("baked", "compressed") else 0.0
    trained = form in ("parametrized", "finalized")
    hw.apply(model, PreRMSNorm(mode="parametrized") if trained else PreRMSNorm(compress=form == "compressed"))
    if form == "finalized":
        finalize(model)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(run(name, load_pretrained(tmp_path)), run(name, model))


def test_torchs_fused_path_is_right_for_padded_batches_without_gradients():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False).eval()
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    x, padding = 3 + torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.no_grad():
        a, b = (m(x, src_key_padding_mask=padding)[~padding] for m in (model, converted))
    assert (a - b).abs().max() < 1e-5


def test_an_encoder_and_a_decoder_stack_are_converted_together():
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True, norm_first=True).double().eval()
    converted = hw.apply(model, PreRMSNorm(), copy=True)
    x, y = 2 + torch.randn(2, 5, 32).double(), 2 + torch.randn(2, 4, 32).double()
    assert not any(isinstance(module, nn.LayerNorm) for module in converted.modules())
    assert verify_equivalence(model, converted, x, y) < 1e-10


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: build("bert"), "encoder.layer.0 places its norms 'post'"),
        (lambda: build("torch post"), "layers.0"),
        (lambda: build("llama"), "input_layernorm"),
        (lambda: TransformerDecoder(50, 32, 2, 4, "peri"), "blocks.0"),
        (lambda: TransformerDecoder(50, 32, 2, 4, dropout=0.1).train(), "blocks.0.drop"),
        (lambda: nn.TransformerEncoderLayer(32, 4, 64, norm_first=True).eval(), "final norm"),
        (lambda: TransformerDecoder(50, 32, 2, 4).blocks, "final norm|no embedding"),
    ],
    ids=["bert", "post", "llama", "peri", "dropout", "one layer", "no embedding"],
)
def test_models_that_cannot_be_converted_are_refused_by_name(make, named):
    model = make()
    state = dict(model.named_parameters())
    with pytest.raises(NotPreNormError, match=named):
        hw.apply(model, PreRMSNorm())
    assert all(state[key] is value for key, value in model.named_parameters())


def test_dropout_in_evaluation_mode_or_on_request_is_no_obstacle():
    model = TransformerDecoder(50, 32, 2, 4, dropout=0.1, max_length=16)
    eager = hw.apply(model, PreRMSNorm(refuse_dropout=False), copy=True)
    late = hw.apply(model.eval(), PreRMSNorm(), copy=True)
    assert verify_equivalence(model, eager, IDS) < 1e-5 and verify_equivalence(eager, late, IDS) == 0


def test_half_a_conversion_is_refused():
    with pytest.raises(ValueError, match="where="):
        hw.apply(build("headway"), PreRMSNorm(), where="blocks.0*")
