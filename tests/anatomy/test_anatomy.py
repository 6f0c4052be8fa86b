import pytest
import torch
from model_families import MOVABLE, build
from torch import nn

from headway.anatomy import Pattern, Sublayer, UnknownFamily, describe, families, register
from headway.anatomy.families import PATTERNS


@pytest.mark.parametrize("name", [*MOVABLE, "gemma2"])
def test_every_name_in_the_description_is_a_module_of_the_model(name):
    model = build(name)
    anatomy = describe(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert anatomy.hidden_size == 32 and len(anatomy.blocks) == 4
    for block in anatomy.blocks:
        assert len(block.sublayers) == 2
        for sublayer in block.sublayers:
            assert sublayer.norm in modules and sublayer.writer in modules and sublayer.readers
            assert all(reader in modules for reader in sublayer.readers)
            assert modules[sublayer.writer].weight.shape.numel() % 32 == 0
    for module in (*anatomy.embeddings, *anatomy.heads):
        assert module in modules
    assert all(parameter in parameters for parameter in anatomy.parameters)
    if name not in ("torch post", "bert"):
        assert anatomy.final_norm in modules


@pytest.mark.parametrize(
    ("name", "placement"),
    [("torch pre", "pre"), ("torch post", "post"), ("bert", "post"), ("gemma2", "peri"), ("gpt2", "pre")],
)
def test_the_placement_of_the_norms_is_read_off_the_model(name, placement):
    assert {block.placement for block in describe(build(name)).blocks} == {placement}


def test_tied_tables_are_named():
    assert ("transformer.wte.weight", "lm_head.weight") in describe(build("gpt2")).tied


def test_a_model_inside_another_is_found_under_its_full_name():
    model = nn.ModuleDict({"inner": build("headway")})
    anatomy = describe(model)
    assert anatomy.blocks[0].name == "inner.blocks.0" and anatomy.final_norm == "inner.norm"


def test_an_unknown_model_is_answered_with_the_known_families():
    with pytest.raises(UnknownFamily, match=r"known family \(.*gpt2.*llama.*\).*built of Linear"):
        describe(nn.Sequential(nn.Linear(2, 2)))


def test_a_user_can_register_a_layer_class(monkeypatch):
    class MyBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.outer = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.outer(self.inner(self.norm(x)).relu())

    monkeypatch.setattr("headway.anatomy.PATTERNS", PATTERNS)
    register("MyBlock", Pattern("mine", "pre", (Sublayer("mlp", None, "norm", ("inner",), "outer"),)))
    try:
        model = nn.Sequential(MyBlock(), MyBlock())
        anatomy = describe(model)
        assert anatomy.family == "mine" and "mine" in families()
        assert [block.sublayers[0].writer for block in anatomy.blocks] == ["0.outer", "1.outer"]
        assert model(torch.randn(2, 8)).shape == (2, 8)
    finally:
        del PATTERNS["MyBlock"]
