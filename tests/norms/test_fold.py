# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
"""Folded norms are gone and the model computes what it computed; what cannot fold says why."""

from __future__ import annotations

import copy

import pytest
import torch
from model_families import build, run
from torch import nn

import headway as hw
from headway.norms.fold import ChannelAffine
from headway.norms.power import PowerNorm
from headway.norms.unified import UnifiedNorm

KINDS = {
    "unified": hw.Replace(UnifiedNorm, warmup_iters=2),
    "power": hw.Replace(PowerNorm, warmup_iters=2, group_num=None),
}


def observed(model: nn.Module, call, kind: str = "unified", dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with its layer norms replaced, their statistics moved by a few batches and their vectors made uneven."""
    hw.apply(model, KINDS[kind]).to(dtype)
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, UnifiedNorm | PowerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3), nn.init.normal_(module.bias, 0.0, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(4):
            call(model)
    return model.eval()


def double(name: str):
    def call(model: nn.Module) -> torch.Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(next(model.parameters()).dtype)  # the inputs of the families are made in it
        try:
            return run(name, model)
        finally:
            torch.set_default_dtype(before)

    return call


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, UnifiedNorm | PowerNorm)]


def reasons(plan) -> dict[str, str]:
    return {row.name: row.after for row in plan.rows if row.before.startswith(("UnifiedNorm", "PowerNorm"))}


# what of each family stays behind as two vectors, and why
LEFT = {
    "headway": {},
    "gpt2": {"transformer.ln_f": "tied weight"},
    "gpt_neox": {},
    "opt": {"model.decoder.final_layer_norm": "tied weight"},
    "phi": {},
    "vit": {},
    "timm": {},
    "torch pre": {"norm": "feeds the model's output"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", LEFT)
def test_folded_model_equals_the_model_in_evaluation(family, kind):
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        call = double(family)
        model = observed(build(family), call, kind, dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            truth = call(model)
            plan = hw.plan(model, hw.FoldNorms())
            folded = hw.apply(model, hw.FoldNorms(), copy=True)
            difference = (call(folded) - truth).abs().max() / truth.abs().max()
        assert difference <= close
        left = {name: after for name, after in reasons(plan).items() if not after.startswith("folded into")}
        assert left.keys() == LEFT[family].keys()
        assert all(LEFT[family][name] in after for name, after in left.items())
        assert not norms(folded) and norms(model)
        assert not [key for key in folded.state_dict() if "running" in key or "window" in key or "iters" in key]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_dict_of_a_wholly_folded_model_holds_no_norm():
    model = observed(build("headway"), double("headway"))
    hw.apply(model, hw.FoldNorms())
    assert not [key for key in model.state_dict() if "norm" in key]


def test_undo_brings_the_norms_and_the_weights_back():
    call = double("gpt2")
    model = observed(build("gpt2"), call)
    before, truth = copy.deepcopy(model.state_dict()), call(model)
    hw.apply(model, hw.FoldNorms())
    hw.undo(model)
    assert model.state_dict().keys() == before.keys() and len(norms(model)) == 9
    torch.testing.assert_close(call(model), truth, rtol=0, atol=0)


def test_post_norm_layers_do_not_fold_and_the_plan_says_why():
    call = double("torch post")
    model = observed(build("torch post"), call)
    truth, found = call(model), reasons(hw.plan(model, hw.FoldNorms()))
    assert len(found) == 8 and all("feeds a residual add" in after for after in found.values())
    hw.apply(model, hw.FoldNorms())
    torch.testing.assert_close(call(model), truth, rtol=1e-12, atol=1e-12)
    assert sum(isinstance(module, ChannelAffine) for module in model.modules()) == 8


def test_queries_of_cross_attention_take_in_their_norm_and_the_memory_stays():
    layer = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerDecoder(layer, 2)
    x, memory = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 16).double()
    observed(model, lambda m: m(x, memory))
    truth = model(x, memory)
    plan = hw.plan(model, hw.FoldNorms())
    assert all(after.startswith("folded into") for after in reasons(plan).values())
    hw.apply(model, hw.FoldNorms())
    torch.testing.assert_close(model(x, memory), truth, rtol=1e-12, atol=1e-12)


def stack() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(4), enable_nested_tensor=False)


class Convolutions(nn.Module):
    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.norm, self.conv, self.drop = nn.LayerNorm(4), nn.Conv1d(4, 6, kernel), nn.Dropout(0.5)
        self.image_norm, self.image_conv = nn.LayerNorm(4), nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x):
        y = self.conv(self.drop(self.norm(x)).transpose(1, 2))
        return y, self.image_conv(self.image_norm(x[:, None]).permute(0, 3, 1, 2))


class Attends(nn.Module):
    def __init__(self, self_attention: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
        self.own = self_attention

    def forward(self, x):
        y = self.norm(x)
        return self.attention(y, y, y if self.own else x, need_weights=False)[0]


class Two(nn.Module):
    """One norm, read by a linear layer and by whatever ``other`` makes of it."""

    def __init__(self, other) -> None:
        super().__init__()
        self.norm, self.linear, self.other = nn.LayerNorm(4), nn.Linear(4, 4), other

    def forward(self, x):
        y = self.norm(x)
        return self.linear(y) + self.other(self, x, y)


TRACED = {
    "linear layers": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1), nn.Linear(4, 3)), None),
    "head on torch's stack": (lambda: nn.Sequential(stack(), nn.Linear(4, 3)), None),
    "convolutions": (Convolutions, None),
    "self-attention": (lambda: Attends(True), None),
    "attention to something else": (lambda: Attends(False), "beside another input"),
    "wide convolution": (lambda: Convolutions(3), "more than one position"),
    "residual add": (lambda: Two(lambda m, x, y: x + y), "feeds a residual add"),
    "nonlinear reader": (lambda: Two(lambda m, x, y: y.relu()), "feeds relu"),
    "reader called twice": (lambda: Two(lambda m, x, y: m.linear(x)), "called more than once"),
    "output": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "feeds the model's output"),
    "the model itself": (lambda: nn.LayerNorm(4), "feeds the model's output"),
    "not traceable": (lambda: Two(lambda m, x, y: y if y.sum() > 0 else -y), "cannot trace"),
}


@pytest.mark.parametrize("what", TRACED)
def test_any_other_model_is_traced(what):
    make, reason = TRACED[what]
    x = torch.randn(2, 3, 4).double()
    root = nn.ModuleDict({"model": make()}) if what != "the model itself" else None
    model = make() if root is None else root["model"]
    if root is None:
        model = hw.apply(model, KINDS["unified"]).double()
        model(x)
        model.eval()
    else:
        observed(model, lambda m: m(x))
    truth, found = model(x), reasons(hw.plan(model, hw.FoldNorms()))
    folded = hw.apply(model, hw.FoldNorms())
    torch.testing.assert_close(folded(x), truth, rtol=1e-12, atol=1e-12)
    assert not norms(folded)
    if reason is None:
        assert all(after.startswith("folded into") for after in found.values())
    else:
        assert reason in found[next(iter(found))]


@pytest.mark.parametrize("layer", [UnifiedNorm, PowerNorm])
def test_norms_without_vectors_of_their_own_fold_too(layer):
    settings = {"group_num": None} if layer is PowerNorm else {}
    norms = [layer.from_module(nn.LayerNorm(4, elementwise_affine=False), **settings) for _ in range(2)]
    model, x = nn.Sequential(norms[0], nn.Linear(4, 4, bias=False), norms[1]).double(), torch.randn(5, 4).double()
    model(3 * x)
    truth = model.eval()(x)
    hw.apply(model, hw.FoldNorms())
    assert isinstance(model[2], ChannelAffine) and model[1].bias is None
    torch.testing.assert_close(model(x), truth, rtol=1e-12, atol=1e-12)


def test_a_tied_reader_keeps_its_weight():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    x = torch.randn(5, 4).double()
    observed(model, lambda m: m(x))
    truth = model(x)
    hw.apply(model, hw.FoldNorms())
    assert isinstance(model[0], ChannelAffine) and model[2].weight is model[1].weight
    torch.testing.assert_close(model(x), truth, rtol=1e-12, atol=1e-12)


def test_training_mode_and_unseen_statistics_are_refused():
    model = nn.Sequential(UnifiedNorm(4), nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="training mode"):
        hw.apply(model, hw.FoldNorms())
    with pytest.raises(RuntimeError, match="seen no batch"):
        hw.apply(model.eval(), hw.FoldNorms())


def test_power_norm_with_groups_is_refused_with_the_reason():
    model = nn.Sequential(PowerNorm(4, group_num=2), nn.Linear(4, 4))
    model(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="at every token"):
        hw.apply(model.eval(), hw.FoldNorms())


def test_a_norm_that_nothing_reads_is_refused():
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = UnifiedNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            self.norm(x)
            return self.linear(x)

    model = Forgetful()
    model(torch.randn(3, 4))
    with pytest.raises(ValueError, match="nothing reads norm"):
        hw.apply(model.eval(), hw.FoldNorms())


def test_where_folds_only_the_norms_it_names():
    call = double("headway")
    model = observed(build("headway"), call)
    truth = call(model)
    hw.apply(model, hw.FoldNorms(), where="blocks.0.*")
    assert len(norms(model)) == 7
    torch.testing.assert_close(call(model), truth, rtol=1e-12, atol=1e-12)


def test_a_model_without_such_norms_has_nothing_to_fold():
    with pytest.raises(hw.NothingToChange, match="UnifiedNorm"):
        hw.apply(nn.Linear(3, 3), hw.FoldNorms())


@pytest.mark.parametrize("first", [True, False])
def test_torch_encoder_layers_call_the_norms_that_were_put_in(first):
    """In evaluation torch computes a layer in one fused call that knows layer norms alone."""
    model = build("torch pre" if first else "torch post")
    x = torch.randn(3, 5, 32)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None]
    hw.apply(model, KINDS["unified"])
    for _ in range(3):
        model.train()(3 * x)
    with torch.no_grad():
        inference = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(inference[~padding], model(x, src_key_padding_mask=padding)[~padding])
    assert (inference - build("torch pre" if first else "torch post")(x)).abs().max() > 1e-2


def test_where_and_exclude_choose_what_is_replaced_and_the_plan_names_it():
    model = nn.Transformer(16, 2, 1, 1, 32)
    plan = hw.plan(model, hw.Replace(UnifiedNorm, where="encoder.*", exclude="encoder.norm"))
    assert [row.name for row in plan.rows][:2] == ["encoder.layers.0.norm1", "encoder.layers.0.norm2"]
    assert not [row.name for row in plan.rows if row.name.startswith("decoder") or row.name == "encoder.norm"]
    hw.apply(model, PowerNorm, where=["encoder.*"])
    assert isinstance(model.encoder.norm, PowerNorm) and isinstance(model.decoder.norm, nn.LayerNorm)


@pytest.mark.parametrize("family", ["gpt2", "vit", "gpt_neox"])
@pytest.mark.parametrize("kind", ["unified", "power"])
def test_a_changed_and_folded_model_is_saved_and_loaded_again_bitwise(tmp_path, family, kind):
    model = build(family)
    layer, settings = (UnifiedNorm, {}) if kind == "unified" else (PowerNorm, {"group_num": None})
    hw.apply(model, hw.Replace(layer, warmup_iters=1, **settings))
    with torch.no_grad():
        for _ in range(3):
            run(family, model.train())
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = hw.load_pretrained(tmp_path / "trained")
    assert len(norms(loaded)) == len(norms(model)) > 0
    assert torch.equal(run(family, loaded), run(family, model))
    hw.apply(model, hw.FoldNorms())
    model.save_pretrained(tmp_path / "folded")
    folded = hw.load_pretrained(tmp_path / "folded")
    assert not norms(folded)
    assert torch.equal(run(family, folded), run(family, model))


def test_a_layer_of_ones_own_is_not_noted_in_the_configuration():
    class Mine(nn.LayerNorm):
        @classmethod
        def from_module(cls, module, *, site):
            return cls(module.normalized_shape) if type(module) is nn.LayerNorm else None

    model = build("gpt2")
    hw.apply(model, Mine)
    assert not getattr(model.config, "headway", [])
