import copy
import pickle

import pytest
import torch
from torch import nn

from headway.residual import seams
from headway.residual.placement_record import PlacementMismatchWarning
from headway.residual.placements import SCHEMES, placements, residual, resolve
from headway.residual.transformer import TransformerBlock, TransformerDecoder


def decoder(**options):
    torch.manual_seed(0)
    return TransformerDecoder(11, 16, 4, 2, max_length=12, **options)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("placement", [*SCHEMES, "mix"])
def test_every_placement_gives_logits_and_gradients(placement, norm):
    model = decoder(placement=placement, norm=norm)
    tokens = torch.randint(0, 11, (2, 12))
    logits = model(tokens)
    assert logits.shape == (2, 12, 11)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("placement", ["pre", "peri", "layernorm_scaling"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_fused_way_equals_the_plain_one(placement, norm, monkeypatch):
    block = TransformerBlock(16, 2, placement=placement, norm=norm, index=2).double()
    for name, p in block.named_parameters():
        if "norm" in name:
            nn.init.normal_(p)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    fused = block(x)
    monkeypatch.setattr(seams, "_NATIVE", False)
    assert torch.allclose(block(x), fused, atol=1e-12)


def test_later_tokens_do_not_change_earlier_logits():
    model = decoder()
    tokens = torch.randint(0, 11, (1, 8))
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 11
    assert torch.allclose(model(tokens)[:, :5], model(other)[:, :5], atol=1e-6)


def test_pre_and_post_agree_with_torch_layers_of_the_same_weights():
    for placement in ("pre", "post"):
        ours = TransformerBlock(16, 2, placement=placement, causal=False, hidden=32)
        theirs = nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, activation="gelu", batch_first=True, norm_first=placement == "pre"
        )
        theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = (
            ours.attention.qkv.weight,
            ours.attention.qkv.bias,
        )
        theirs.self_attn.out_proj = ours.attention.out
        theirs.linear1, theirs.linear2 = ours.mlp.up, ours.mlp.down
        x = torch.randn(3, 7, 16)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_peri_with_output_gain_zero_is_the_identity_and_passes_the_gradient():
    block = TransformerBlock(16, 2, placement="peri", norm="rmsnorm", output_gain=0.0)
    x, g = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 16)
    y = block(x)
    assert torch.equal(y, x) and torch.equal(torch.autograd.grad(y, x, g)[0], g)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_peri_is_invariant_to_the_scale_of_a_branch_and_pre_is_not(scale):
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for placement, same in (("peri", True), ("pre", False), ("post", False)):
        block = TransformerBlock(16, 2, placement=placement, norm="rmsnorm", eps=1e-12).double()
        nn.init.normal_(block.mlp.down.weight, std=5.0)
        before = block(x)
        with torch.no_grad():
            for p in block.mlp.down.parameters():
                p.mul_(scale)
        assert torch.allclose(block(x), before, rtol=1e-9, atol=1e-9) is same


def test_peri_makes_the_gradient_of_the_last_linear_orthogonal_to_it():
    block = TransformerBlock(16, 2, placement="peri", norm="rmsnorm", eps=1e-14).double()
    block(torch.randn(2, 5, 16, dtype=torch.float64)).square().sum().backward()
    linear = block.mlp.down
    inner = (linear.weight * linear.weight.grad).sum() + (linear.bias * linear.bias.grad).sum()
    assert abs(inner) < 1e-8 * linear.weight.norm() * linear.weight.grad.norm()


def test_the_term_a_peri_branch_adds_has_the_rms_of_its_gain():
    block = TransformerBlock(32, 2, placement="peri", norm="rmsnorm", output_gain=0.7)
    added = block.mlp_output_norm(block.mlp(torch.randn(2, 5, 32)))
    assert torch.allclose(added.square().mean(-1).sqrt(), torch.full((2, 5), 0.7), atol=1e-5)


@torch.no_grad()
def test_variance_grows_linearly_under_peri_and_not_at_all_under_post():
    torch.manual_seed(0)
    growth = {}
    for placement in ("peri", "pre", "post"):
        blocks = [TransformerBlock(64, 4, placement=placement, norm="rmsnorm", index=i) for i in range(48)]
        x = torch.randn(4, 32, 64)
        variances = []
        for block in blocks:
            for linear in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02)
            x = block(x)
            variances.append(x.var().item())
        depth = torch.arange(48.0)
        v = torch.tensor(variances)
        growth[placement] = (
            ((depth - depth.mean()) * (v - v.mean())).sum() / ((depth - depth.mean()) ** 2).sum()
        ).item()
    assert 1.6 <= growth["peri"] <= 2.4
    assert abs(growth["pre"]) < 0.1
    assert abs(growth["post"]) < 1e-3


def test_mix_makes_the_first_quarter_post():
    assert placements(12) == ["post"] * 3 + ["pre"] * 9
    assert placements(24) == ["post"] * 6 + ["pre"] * 18
    assert placements(10) == ["post"] * 2 + ["pre"] * 8
    assert placements(12, n_post=1, order="pre_post") == ["pre"] * 11 + ["post"]
    with pytest.warns(UserWarning, match="plain Pre-LN"):
        assert placements(3) == ["pre"] * 3


def test_mix_with_alpha_zero_is_pre_and_with_alpha_one_is_post_bitwise():
    tokens = torch.randint(0, 11, (2, 12))
    for alpha, same in ((0.0, "pre"), (1.0, "post")):
        mix, plain = decoder(placement="mix", alpha=alpha), decoder(placement=same)
        plain.load_state_dict(mix.state_dict())
        assert torch.equal(mix(tokens), plain(tokens))


@torch.no_grad()
def test_after_the_last_post_block_every_token_has_unit_rms():
    model = decoder(placement="mix", alpha=0.5, norm="rmsnorm")
    x = model.embedding(torch.randint(0, 11, (2, 12)))
    for block in model.blocks:
        x = block(x)
        rms = x.square().mean(-1).sqrt()
        if block.placement == "post":
            assert torch.allclose(rms, torch.ones_like(rms), atol=1e-5)
    assert (rms > 1.05).all()


@torch.no_grad()
def test_with_zero_output_projections_pre_is_the_identity_and_post_is_idempotent():
    x = torch.randn(2, 5, 16)
    for placement in ("pre", "post"):
        block = TransformerBlock(16, 2, placement=placement, norm="rmsnorm").double()
        for linear in (block.attention.out, block.mlp.down):
            linear.weight.zero_()
            linear.bias.zero_()
        once = block(x.double())
        if placement == "pre":
            assert torch.equal(once, x.double())
        else:
            assert torch.allclose(block(once), once, atol=1e-6)
            assert not torch.allclose(once, x.double(), atol=1e-2)


def test_loading_weights_of_another_placement_warns():
    with pytest.warns(PlacementMismatchWarning, match="'pre'"):
        decoder(placement="mix").load_state_dict(decoder(placement="pre").state_dict())


def test_deepcopy_pickle_state_and_the_environment_keep_the_placement(monkeypatch):
    model = decoder(placement="mix")
    tokens = torch.randint(0, 11, (2, 12))
    before = model(tokens)
    monkeypatch.setenv("NORM_TYPE", "pre")
    monkeypatch.setenv("POST_NUM", "4")
    assert torch.equal(copy.deepcopy(model)(tokens), before)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), decoder(placement="mix"))
    twins[-1].load_state_dict(model.state_dict())
    for twin in twins:
        assert twin.placement == ["post", "pre", "pre", "pre"] and torch.equal(twin(tokens), before)


def test_tied_head_shares_the_table():
    model = decoder(tied=True)
    assert model.head.weight is model.embedding.weight


def test_deepnorm_scales_the_stream_by_the_fourth_root_of_twice_the_depth():
    x = torch.randn(3, 8)
    y = residual(x, lambda z: z, lambda z: z, "deepnorm", num_layers=8)
    assert torch.allclose(y, 3.0 * x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: placements(4, alpha=1.5), "alpha must lie"),
        (lambda: placements(4, n_post=5), "n_post must lie"),
        (lambda: placements(4, "sideways"), "unknown placement 'sideways'"),
        (lambda: placements(4, order="up"), "order must be"),
        (lambda: placements(0), "at least 1"),
        (lambda: resolve(["pre"], 2), "one entry a layer, 2; 1 were given"),
        (lambda: resolve(["pre", "mix"], 2), "unknown placement 'mix'"),
        (lambda: TransformerBlock(10, 3), "multiple of heads"),
        (lambda: TransformerBlock(10, 2, norm="none"), "norm must be"),
        (lambda: decoder()(torch.zeros(1, 13, dtype=torch.long)), "at most max_length=12"),
    ],
)
def test_wrong_settings_get_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_safetensors_keeps_the_placement_with_the_weights(tmp_path):
    from safetensors.torch import load_file, save_model

    save_model(decoder(placement="pre"), str(tmp_path / "m.safetensors"))
    with pytest.warns(PlacementMismatchWarning):
        decoder(placement="post").load_state_dict(load_file(tmp_path / "m.safetensors"))


def test_a_branch_without_norms_given_is_placed_with_layer_norm():
    x, f = torch.randn(3, 8), nn.Linear(8, 8)
    norm = nn.LayerNorm(8, elementwise_affine=False)
    assert torch.allclose(residual(x, f, placement="pre"), x + f(norm(x)), atol=1e-6)
    assert torch.allclose(residual(x, f, placement="peri"), x + norm(f(norm(x))), atol=1e-6)
    with pytest.raises(ValueError, match="a norm of its own"):
        residual(x, f, norm, "peri")


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["pre", "post", "peri", "layernorm_scaling"])
def test_blocks_compile_without_a_break(placement):
    block = TransformerBlock(16, 2, placement=placement, index=2)
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), block(x), atol=1e-6)


def test_empty_batches_and_single_tokens_pass_and_a_nan_stays_in_its_sequence():
    for placement in SCHEMES:
        block = TransformerBlock(16, 2, placement=placement)
        assert block(torch.randn(0, 5, 16)).shape == (0, 5, 16)
        assert block(torch.randn(1, 1, 16)).isfinite().all()
        x = torch.randn(2, 5, 16)
        x[0, 3] = torch.inf
        y = block(x)
        assert y[1].isfinite().all() and not y[0, 3].isfinite().all()


def test_autocast_keeps_a_float32_stream_in_float32():
    for placement in ("pre", "peri"):
        block = TransformerBlock(16, 2, placement=placement)
        x = torch.randn(2, 5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        assert y.dtype == torch.float32 and torch.allclose(y, block(x), atol=0.1)
