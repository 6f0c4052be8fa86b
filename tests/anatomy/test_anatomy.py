import pytest
import torch
from model_families import DESCRIBED, MOVABLE, TimmViT, build, run
from torch import nn

from headway.anatomy import Pattern, Sublayer, UnknownFamily, describe, families, register
from headway.anatomy.families import PATTERNS


@pytest.mark.parametrize("name", [*MOVABLE, *DESCRIBED])
def test_every_name_in_the_description_is_a_module_of_the_model(name):
    model = build(name)
    anatomy = describe(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    assert anatomy.hidden_size == 32 and len(anatomy.stacks[0].blocks) == 4
    for stack in anatomy.stacks:
        assert [block.index for block in stack.blocks] == list(range(len(stack.blocks)))
        for block in stack.blocks:
            assert [part.kind for part in block.sublayers] in (
                ["attention", "mlp"],
                ["attention", "cross_attention", "mlp"],
            )
            for part in block.sublayers:
                assert part.norm in modules and part.writer in modules and part.readers
                assert all(reader in modules for reader in (*part.readers, *part.memory_readers, *part.dropouts))
                assert (part.kind == "cross_attention") == bool(part.memory_readers)
                assert modules[part.writer].weight.shape.numel() % stack.hidden_size == 0
                for rate in part.dropout_rates:
                    owner, _, attribute = rate.rpartition(".")
                    assert isinstance(getattr(modules[owner], attribute), float)
        for module in (*stack.embeddings, *stack.heads, *stack.bent, *stack.dropouts):
            assert module in modules
        assert all(parameter in parameters for parameter in stack.parameters)
        if name not in ("torch post", "bert", "opt 350m"):
            assert stack.final_norm in modules


@pytest.mark.parametrize("name", [*MOVABLE, *DESCRIBED])
def test_the_writers_and_embeddings_listed_are_all_that_is_added_to_the_stream(name):
    """Zeroing every writer, embedding and token leaves a stream of zeros in front of each final norm."""
    if name.startswith("torch") or name == "whisper":
        pytest.skip("their stream starts outside the description: the caller's input, or a bent convolution")
    model = build(name)
    anatomy = describe(model)
    with torch.no_grad():
        for stack in anatomy.stacks:
            writers = [part.writer for block in stack.blocks for part in block.sublayers]
            norms = [part.output_norm or part.norm for block in stack.blocks for part in block.sublayers]
            shifts = norms if stack.blocks[0].placement in ("post", "output", "peri") else []
            for module in (*stack.embeddings, *writers, *filter(None, [*shifts, stack.embedding_norm])):
                for parameter in model.get_submodule(module).parameters():
                    parameter.zero_()
            for parameter in stack.parameters:
                model.get_parameter(parameter).zero_()
    streams = []
    for stack in anatomy.stacks:
        for block in stack.blocks:
            model.get_submodule(block.name).register_forward_hook(
                lambda _m, _a, out: streams.append(out[0] if isinstance(out, tuple) else out)
            )
    run(name, model)
    assert len(streams) == len(anatomy.blocks) and not any(stream.any() for stream in streams)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip"])
def test_each_stack_has_its_own_depth_embedding_final_norm_and_heads(name):
    first, second = describe(build(name)).stacks
    expected = {
        "t5": (
            ("encoder", 4, ("encoder.embed_tokens",), "encoder.final_layer_norm", ()),
            ("decoder", 2, ("decoder.embed_tokens",), "decoder.final_layer_norm", ("lm_head",)),
        ),
        "whisper": (
            ("model.encoder", 4, ("model.encoder.embed_positions",), "model.encoder.layer_norm", ()),
            (
                "model.decoder",
                2,
                ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
                "model.decoder.layer_norm",
                ("proj_out",),
            ),
        ),
        "clip": (
            (
                "text_model.encoder",
                4,
                ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"),
                "text_model.final_layer_norm",
                ("text_projection",),
            ),
            (
                "vision_model.encoder",
                3,
                ("vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding"),
                "vision_model.post_layernorm",
                ("visual_projection",),
            ),
        ),
    }[name]
    for stack, wanted in zip((first, second), expected, strict=True):
        assert (stack.name, len(stack.blocks), stack.embeddings, stack.final_norm, stack.heads) == wanted
    if name == "whisper":
        assert first.bent == ("model.encoder.conv2",) and not second.bent
        assert first.dropout_rates == ("model.encoder.dropout",)
    if name == "clip":
        assert (first.hidden_size, second.hidden_size) == (32, 24)
        assert second.embedding_norm == "vision_model.pre_layrnorm" and first.embedding_norm is None
        assert second.parameters == ("vision_model.embeddings.class_embedding",)


def test_encoder_and_decoder_of_a_torch_transformer_are_two_stacks():
    model = nn.Transformer(16, 2, 4, 2, 32, batch_first=True)
    encoder, decoder = describe(model).stacks
    assert (encoder.name, len(encoder.blocks), encoder.final_norm) == ("encoder", 4, "encoder.norm")
    assert (decoder.name, len(decoder.blocks), decoder.final_norm) == ("decoder", 2, "decoder.norm")
    assert [part.kind for part in decoder.blocks[0].sublayers] == ["attention", "cross_attention", "mlp"]


def test_lists_of_two_towers_in_one_list_are_two_stacks_and_wrapped_layers_are_one():
    towers = nn.ModuleList([build("headway"), build("headway")])
    assert [stack.name for stack in describe(towers).stacks] == ["0", "1"]
    assert [stack.final_norm for stack in describe(towers).stacks] == ["0.norm", "1.norm"]
    wrapped = nn.Sequential(*(nn.ModuleDict({"inner": block}) for block in build("headway").blocks))
    (stack,) = describe(wrapped).stacks
    assert [block.name for block in stack.blocks] == [f"{i}.inner" for i in range(4)]


def test_a_parallel_block_with_one_norm_shares_it_between_its_branches():
    for name, norm in (("gptj", "transformer.h.0.ln_1"), ("phi", "model.layers.0.input_layernorm")):
        block = describe(build(name)).blocks[0]
        assert block.placement == "parallel" and {part.norm for part in block.sublayers} == {norm}


def test_what_opt_projects_into_its_stream_is_the_writer_and_not_the_narrow_table():
    small, wide = describe(build("opt 350m")).stacks[0], describe(build("opt")).stacks[0]
    assert small.embeddings == ("model.decoder.project_in", "model.decoder.embed_positions")
    assert small.heads == ("model.decoder.project_out",) and small.final_norm is None
    assert wide.embeddings == ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    assert wide.heads == ("lm_head",)


def test_layer_scale_gains_are_named():
    part = describe(TimmViT(scale=True)).blocks[1].sublayers[1]
    assert (part.gain, describe(TimmViT()).blocks[1].sublayers[1].gain) == ("blocks.1.ls2", None)


def test_a_class_of_the_same_name_that_is_built_otherwise_is_not_taken_for_a_known_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.gate = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    with pytest.raises(UnknownFamily):
        describe(nn.Sequential(Block()))
    gated = TimmViT()
    gated.blocks[0].gamma_1 = nn.Parameter(torch.ones(32))
    assert len(describe(gated).blocks) == 3


def test_cross_attention_of_a_decoder_is_described_where_the_layer_has_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    kinds = [part.kind for part in describe(transformers.GPT2LMHeadModel(config)).blocks[0].sublayers]
    assert kinds == ["attention", "cross_attention", "mlp"]


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("torch pre", "pre"),
        ("torch post", "post"),
        ("bert", "post"),
        ("gemma2", "peri"),
        ("gpt2", "pre"),
        ("opt", "pre"),
        ("opt 350m", "post"),
        ("olmo2", "output"),
        ("phi", "parallel"),
        ("t5", "pre"),
    ],
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
    with pytest.raises(
        UnknownFamily,
        match=r"known family \(.*clip.*gpt2.*gptj.*llama.*opt.*phi.*t5.*timm_vit.*whisper\).*built of Linear",
    ):
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
