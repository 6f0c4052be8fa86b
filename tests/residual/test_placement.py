import copy
import pickle
import warnings

import pytest
import torch
from model_families import IDS, MOVABLE, build, run
from torch import nn

import headway as hw
from headway.anatomy import describe
from headway.residual.placement import Placement, PretrainedWeightsWarning
from headway.residual.placement_record import PlacementMismatchWarning
from headway.residual.rewiring import KINDS, rewire
from headway.surgery import Swap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCHEMES = ["pre", "post", "peri", "output", "deepnorm", "layernorm_scaling", "mix"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MOVABLE)
def test_every_family_takes_every_placement_and_comes_back(name, scheme):
    model = build(name)
    before = run(name, model)
    placed = {block.placement for block in describe(model).blocks}
    if placed == {scheme}:
        with pytest.raises(hw.NothingToChange):
            hw.apply(model, Placement(scheme))
        return
    hw.apply(model, Placement(scheme))
    after = run(name, model)
    assert after.isfinite().all() and not torch.equal(after, before)
    after.sum().backward()
    assert torch.equal(run(name, copy.deepcopy(model)), after)
    assert torch.equal(run(name, pickle.loads(pickle.dumps(model))), after)
    hw.undo(model)
    assert torch.equal(run(name, model), before)


@pytest.mark.parametrize("name", [name for name in MOVABLE if name != "headway"])
def test_a_layer_rewired_to_the_placement_it_has_computes_the_same_bits(name):
    model = build(name)
    before = run(name, model)
    for block in describe(model).blocks:
        layer = model.get_submodule(block.name)
        Swap(model, block.name, layer, rewire(layer, block.placement, block.index, 4)).do()
    assert torch.allclose(run(name, model), before, atol=1e-6)
    assert isinstance(model.get_submodule(block.name), type(layer)) and type(layer).__name__ in KINDS


@pytest.mark.parametrize("scheme", ["peri", "mix"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_generation_with_and_without_cache_agrees(name, scheme):
    model = hw.apply(build(name), Placement(scheme))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


def test_gradient_checkpointing_keeps_the_gradients():
    grads = []
    for checkpointing in (False, True):
        model = hw.apply(build("llama"), hw.PeriLN()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.model.layers[0].mlp.down_proj.weight.grad)
    assert torch.allclose(*grads, atol=1e-6)


def test_parameter_names_stay_and_peri_adds_only_output_norms():
    model = build("llama")
    names, keys = set(dict(model.named_parameters())), set(model.state_dict())
    hw.apply(model, hw.MixLN())
    assert set(dict(model.named_parameters())) == names
    assert set(model.state_dict()) - keys == {"model.norm_placement"}
    hw.undo(model)
    assert set(model.state_dict()) == keys
    hw.apply(model, hw.PeriLN())
    added = set(dict(model.named_parameters())) - names
    assert len(added) == 8 and all("output_norm" in name for name in added)


@pytest.mark.parametrize("name", ["torch pre", "torch post"])
def test_padding_masks_and_the_fast_path_of_torch_do_not_bypass_the_rewiring(name):
    model = build(name)
    model.enable_nested_tensor = model.use_nested_tensor = True
    hw.apply(model, hw.PeriLN())
    x, mask = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        quiet = model(x, src_key_padding_mask=mask)
    assert torch.allclose(quiet, model(x, src_key_padding_mask=mask), atol=1e-6)


def test_torch_decoder_layers_are_moved_too():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 4).eval()
    target, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    before = model(target, memory)
    hw.apply(model, hw.PeriLN())
    assert model(target, memory).isfinite().all() and not torch.equal(model(target, memory), before)
    hw.undo(model)
    hw.apply(model, hw.MixLN(alpha=0.5))
    assert [layer.norm_first for layer in model.layers[:3]] == [False, False, True]
    hw.undo(model)
    assert torch.equal(model(target, memory), before)


def test_encoder_and_decoder_are_mixed_each_by_its_own_depth():
    model = nn.Transformer(16, 2, 8, 4, 32, 0.0, batch_first=True, norm_first=True)
    hw.apply(model, hw.MixLN())
    assert [layer.norm_first for layer in model.encoder.layers] == [False] * 2 + [True] * 6
    assert [layer.norm_first for layer in model.decoder.layers] == [False] + [True] * 3


def test_mix_equals_a_torch_stack_built_layer_by_layer():
    model = build("torch pre")
    hw.apply(model, hw.MixLN(alpha=0.5))
    assert [layer.norm_first for layer in model.layers] == [False, False, True, True]
    layers = []
    for index, layer in enumerate(model.layers):
        twin = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=index >= 2)
        twin.load_state_dict(layer.state_dict())
        layers.append(twin.eval())
    x = torch.randn(2, 9, 32)
    assert torch.allclose(model(x), model.norm(nn.Sequential(*layers)(x)), atol=1e-6)


def test_a_post_norm_stack_without_final_norm_gets_one_when_its_last_layer_loses_its_own():
    model = hw.apply(build("bert"), Placement("pre"))
    assert isinstance(model.bert.encoder.layer[-1].closing_norm, nn.LayerNorm)
    stream = {}
    model.bert.encoder.layer[-1].register_forward_hook(lambda _m, _a, out: stream.update(x=out))
    model(IDS)
    assert torch.allclose(stream["x"].mean(-1), torch.zeros(2, 9), atol=1e-5)


def test_output_gain_and_the_kind_of_norm_are_settings():
    model = hw.apply(build("gpt2"), hw.PeriLN(output_gain=0.5, norm="rmsnorm", eps=1e-3))
    norm = model.transformer.h[0].mlp_output_norm
    assert isinstance(norm, hw.norms.RMSNorm) and norm.eps == 1e-3 and (norm.weight == 0.5).all()


def test_copy_gains_false_starts_the_input_norms_afresh():
    model = build("gpt2")
    nn.init.constant_(model.transformer.h[0].ln_1.weight, 3.0)
    hw.apply(model, hw.PeriLN(copy_gains=False))
    assert (model.transformer.h[0].ln_1.weight == 1).all()
    hw.undo(model)
    assert (model.transformer.h[0].ln_1.weight == 3).all()


def test_the_optimiser_receives_the_output_norms():
    model = build("headway")
    optimizer = torch.optim.AdamW(model.parameters())
    hw.apply(model, hw.PeriLN(), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_changed_hugging_face_model_survives_the_disk(tmp_path):
    for technique in (hw.PeriLN(output_gain=0.5), hw.MixLN(alpha=0.5)):
        model = hw.apply(build("llama"), technique)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.save_pretrained(tmp_path / technique.scheme)
        loaded = hw.load_pretrained(tmp_path / technique.scheme)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    tied = hw.apply(build("gpt2"), hw.PeriLN())
    tied.save_pretrained(tmp_path / "tied")
    assert torch.equal(hw.load_pretrained(tmp_path / "tied")(IDS).logits, tied(IDS).logits)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hw.load_pretrained(tmp_path)


def test_trained_weights_zero_projections_and_depth_scaled_starts_are_warned_about():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hw.apply(build("gpt2"), hw.PeriLN())
    assert any("1/sqrt(2L) smaller" in str(w.message) for w in caught)
    model = build("headway")
    nn.init.zeros_(model.blocks[0].mlp.down.weight)
    with pytest.warns(UserWarning, match="all zeros"):
        hw.apply(model, hw.PeriLN())
    model = build("llama")
    model.name_or_path = model.config._name_or_path = "someone/trained"
    with pytest.warns(PretrainedWeightsWarning, match="need training"):
        hw.apply(model, hw.MixLN())


def test_parallel_branches_and_wrong_settings_are_refused_with_a_sentence():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(TypeError, match="branches are parallel"):
        hw.apply(transformers.GPTNeoXForCausalLM(config), hw.PeriLN())
    with pytest.raises(ValueError, match="unknown placement 'sideways'"):
        Placement("sideways")
    with pytest.raises(ValueError, match="norm must be"):
        hw.PeriLN(norm="batchnorm")


@pytest.mark.parametrize("name", ["bert", "torch post", "headway"])
def test_there_and_back_gives_the_same_function_and_the_same_parameters(name):
    model = build(name)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before, names = run(name, model), set(dict(model.named_parameters()))
    home = describe(model).blocks[0].placement
    for away in ("pre", "peri"):
        if away != home:
            hw.apply(model, Placement(away))
            hw.apply(model, Placement(home))
            assert torch.allclose(run(name, model), before, atol=1e-6)
            assert set(dict(model.named_parameters())) == names


def test_hooks_on_every_norm_of_the_own_transformer_fire():
    model = hw.apply(build("headway"), hw.PeriLN())
    heard = []
    norms = [n for n, m in model.named_modules() if n.endswith("_norm")]
    for n in norms:
        model.get_submodule(n).register_forward_hook(lambda *_, n=n: heard.append(n))
    run("headway", model)
    assert sorted(heard) == sorted(norms)


def test_the_scheme_of_a_named_technique_is_fixed():
    assert hw.MixLN(0.5).alpha == 0.5
    with pytest.raises(TypeError, match="scheme"):
        hw.PeriLN(scheme="pre")


def cross_attending(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=4, n_head=4, add_cross_attention=True, resid_pdrop=0, attn_pdrop=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, is_decoder=True, add_cross_attention=True, **sizes)
    return transformers.BertLMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_cross_attention_is_a_branch_with_a_norm_of_its_own(kind):
    model, memory = cross_attending(kind), torch.randn(2, 7, 32)
    plain, crossed = model(IDS).logits, model(IDS, encoder_hidden_states=memory).logits
    for block in describe(model).blocks:
        layer = model.get_submodule(block.name)
        Swap(model, block.name, layer, rewire(layer, block.placement, block.index, 4)).do()
    assert torch.allclose(model(IDS).logits, plain, atol=1e-6)
    assert torch.allclose(model(IDS, encoder_hidden_states=memory).logits, crossed, atol=1e-6)
    model = hw.apply(cross_attending(kind), hw.PeriLN())
    norms = [name for name, _ in model.named_parameters() if "cross_attention_output_norm.weight" in name]
    assert len(norms) == 4
    model(IDS, encoder_hidden_states=memory).logits.sum().backward()
    assert model.get_parameter(norms[0]).grad.any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "torch pre"])
def test_weights_of_another_placement_do_not_load_without_a_word(name):
    plain, moved = build(name), hw.apply(build(name), hw.MixLN(alpha=0.5) if name != "bert" else Placement("pre"))
    with pytest.warns(PlacementMismatchWarning, match="no record of where their norms sat.*has its norms placed"):
        moved.load_state_dict(plain.state_dict(), strict=name != "bert")
    other = hw.apply(build(name), Placement("peri") if name == "bert" else hw.MixLN(alpha=0.75))
    with pytest.warns(PlacementMismatchWarning, match="were trained with the norms placed"):
        moved.load_state_dict(other.state_dict(), strict=False)
    twin = copy.deepcopy(moved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlacementMismatchWarning)
        twin.load_state_dict(moved.state_dict())
        pickle.loads(pickle.dumps(moved)).load_state_dict(moved.state_dict())
        moved.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="norm_placement"):
        plain.load_state_dict(moved.state_dict())
    with pytest.warns(PlacementMismatchWarning):
        twin.load_state_dict(plain.state_dict(), strict=False)
    hw.undo(moved)
    assert set(moved.state_dict()) == set(plain.state_dict())
    assert not any(module._load_state_dict_pre_hooks for module in moved.modules())


def test_where_is_kept_with_the_configuration(tmp_path):
    model = hw.apply(build("llama"), hw.PeriLN(), where=["model.layers.1", "model.layers.3*"])
    assert model.config.headway[0]["where"] == [
        f"model.layers.{i}{rest}" for i in (1, 3) for rest in (("",) if i == 1 else ("", ".*"))
    ]
    model.save_pretrained(tmp_path)
    loaded = hw.load_pretrained(tmp_path)
    assert [block.placement for block in describe(loaded).blocks] == ["pre", "peri", "pre", "peri"]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    scaled = hw.apply(build("gpt2"), hw.ScaleResiduals(0.5), where=lambda site: ".mlp" in site.name)
    scaled.save_pretrained(tmp_path / "scaled")
    assert torch.equal(hw.load_pretrained(tmp_path / "scaled")(IDS).logits, scaled(IDS).logits)
    everywhere = hw.apply(build("llama"), hw.PeriLN(), where="*")
    assert "where" not in everywhere.config.headway[0]


@pytest.mark.parametrize("name", ["gpt_neox", "vit", "gpt2"])
def test_folders_with_the_names_of_earlier_transformers_are_read(name, tmp_path):
    model = hw.apply(build(name), hw.PeriLN(output_gain=0.5))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = hw.load_pretrained(tmp_path)
    assert torch.equal(run(name, loaded), run(name, model))


def test_text_and_image_tower_of_clip_are_mixed_each_by_its_own_depth():
    model = build("clip")
    before = run("clip", model)
    hw.apply(model, hw.MixLN(alpha=0.5))
    assert [[b.placement for b in stack.blocks].count("post") for stack in describe(model).stacks] == [2, 1]
    hw.undo(model)
    assert torch.equal(run("clip", model), before)
    assert model.text_model.encoder.layers[0].__class__.__name__ == "CLIPEncoderLayer"
    for block in describe(model).blocks:
        layer = model.get_submodule(block.name)
        Swap(model, block.name, layer, rewire(layer, "pre", block.index, 4)).do()
    assert torch.allclose(run("clip", model), before, atol=1e-5)


def by_the_equations(model, ids, n_post):
    """Hidden states and logits of a Llama whose first layers are Post-LN, written out."""
    inner = model.model
    x = inner.embed_tokens(ids)
    angles = inner.rotary_emb(x, torch.arange(ids.shape[1])[None])
    hidden = [x]
    for i, layer in enumerate(inner.layers):
        first, second = layer.input_layernorm, layer.post_attention_layernorm

        def attend(y, layer=layer):
            return layer.self_attn(hidden_states=y, position_embeddings=angles, attention_mask=None)[0]

        if i < n_post:
            x = first(x + attend(x))
            x = second(x + layer.mlp(x))
        else:
            x = x + attend(first(x))
            x = x + layer.mlp(second(x))
        hidden.append(x)
    return hidden, model.lm_head(inner.norm(x))


@pytest.mark.parametrize("n_post", [0, 1, 2, 4])
def test_hidden_states_logits_loss_and_gradients_are_those_of_the_equations(n_post):
    def loss_of(logits):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    plain, model = build("llama"), build("llama")
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            q.copy_(p.add_(0.1 * torch.randn_like(p)))
    if n_post:
        hw.apply(model, hw.MixLN(n_post=n_post))
    hidden, logits = by_the_equations(plain, IDS, n_post)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    ours = model(IDS).logits
    for a, b in zip([*hidden[1:], logits], [*seen, ours], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    theirs, mine = loss_of(logits), loss_of(ours)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    theirs.backward()
    mine.backward()
    gradients = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, p.grad, rtol=1e-5, atol=1e-5)


def test_the_environment_does_not_move_norms_of_a_living_model(monkeypatch):
    model = hw.apply(build("llama"), hw.MixLN(alpha=0.5))
    before = run("llama", model)
    monkeypatch.setenv("NORM_TYPE", "pre")
    monkeypatch.setenv("POST_NUM", "4")
    assert torch.equal(run("llama", model), before)
    assert [block.placement for block in describe(pickle.loads(pickle.dumps(model))).blocks] == ["post"] * 2 + [
        "pre"
    ] * 2


def test_fewer_than_four_layers_have_no_post_layer_and_say_so():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(16), enable_nested_tensor=False)
    with pytest.warns(UserWarning, match="3 layers gives no Post-LN layer"):
        hw.apply(model, hw.MixLN())
    assert all(layer.norm_first for layer in model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "torch pre"])
def test_rewired_layers_compile_without_a_break(name):
    model = hw.apply(build(name), hw.PeriLN())
    layer = model.model.layers[0] if name == "llama" else model.layers[0]
    x = torch.randn(2, 5, 32)
    more = {"position_embeddings": model.model.rotary_emb(x, torch.arange(5)[None])} if name == "llama" else {}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, **more), layer(x, **more), atol=1e-5)


@pytest.mark.parametrize("name", ["headway", "torch pre", "gpt2", "llama", "bert", "vit"])
def test_deepnorm_starts_values_outputs_and_the_mlp_smaller_if_asked(name):
    model = build(name)
    before = run(name, model)
    hw.apply(model, Placement("deepnorm", deepnorm_start=True))
    gain = (8 * 4) ** -0.25
    for part in (part for block in describe(model).blocks for part in block.sublayers):
        weight = model.get_submodule(part.writer).weight
        xavier = (2 / sum(weight.shape)) ** 0.5
        assert abs(weight.std().item() / (gain * xavier) - 1) < 0.15
        for reader in part.readers:
            module = model.get_submodule(reader)
            weight = getattr(module, "in_proj_weight", None) if hasattr(module, "in_proj_weight") else module.weight
            if part.kind == "mlp" or reader.endswith(("v_proj", "value")):
                pieces = [(weight, gain)]
            elif weight.shape in ((96, 32), (32, 96)):
                wide = 0 if weight.shape[0] == 96 else 1
                pieces = list(zip(weight.chunk(3, wide), (1, 1, gain), strict=True))
            else:
                pieces = [(weight, 1)]
            for piece, wanted in pieces:
                assert abs(piece.std().item() / (wanted * (2 / sum(piece.shape)) ** 0.5) - 1) < 0.15
    assert run(name, model).isfinite().all()
    hw.undo(model)
    assert torch.equal(run(name, model), before)


def test_the_start_of_deepnorm_is_refused_where_it_does_not_belong_or_is_not_known():
    with pytest.raises(ValueError, match="belongs to the scheme 'deepnorm'"):
        Placement("post", deepnorm_start=True)
    with pytest.raises(ValueError, match="order that DeepNorm's start does not know"):
        hw.apply(build("gpt_neox"), Placement("deepnorm", deepnorm_start=True))
