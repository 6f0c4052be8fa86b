# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""EvoNorm's six layers against their equations written with autograd, and what the card of each series promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headway import functional as HF
from headway import norms
from headway.signals.saved import SavedBytes

B, S = ("B0", "B1", "B2"), ("S0", "S1", "S2")
EPS = 1e-5


def layer(kind: str, channels: int = 8, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    if kind in S:
        settings.setdefault("groups", 4)
    new = getattr(norms, f"EvoNorm{kind}")(channels, **settings)
    draw = torch.Generator().manual_seed(3)
    for p in new.parameters():
        nn.init.normal_(p, generator=draw)
    return new.to(dtype)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 2 + 0.5).to(dtype)


def equation(kind: str, x, gamma, beta, v, groups=4, running=None):
    """The layer as the paper prints it, for (B, C, H, W)."""
    gamma, beta = gamma.view(1, -1, 1, 1), beta.view(1, -1, 1, 1)
    var_i = x.var((2, 3), unbiased=False, keepdim=True)
    m2_i = (x * x).mean((2, 3), keepdim=True)
    if kind in B:
        var_b = x.var((0, 2, 3), unbiased=False) if running is None else running
        left = (var_b + EPS).sqrt().view(1, -1, 1, 1).expand_as(x)
        right = {
            "B0": lambda: v.view(1, -1, 1, 1) * x + (var_i + EPS).sqrt(),
            "B1": lambda: (x + 1) * (m2_i + EPS).sqrt(),
            "B2": lambda: (m2_i + EPS).sqrt() - x,
        }[kind]()
        return gamma * x / torch.max(left, right) + beta
    parts = x.reshape(x.shape[0], groups, -1)
    square = (parts * parts).mean(2) if kind == "S2" else parts.var(2, unbiased=False)
    std = (square + EPS).sqrt()[..., None].expand_as(parts).reshape(x.shape)
    slope = v.view(1, -1, 1, 1) if kind == "S0" else 1
    return gamma * x * torch.sigmoid(slope * x) / std + beta


# oracle 1
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [*B, *S])
def test_outputs_and_gradients_are_those_of_the_equations(kind, groups):
    new, x = layer(kind, **({"groups": groups} if kind in S else {})), data(3, 8, 5, 4).requires_grad_()
    inputs = [x, *new.parameters()]
    wanted = equation(kind, x, new.weight, new.bias, new.v, groups)
    gy = data(3, 8, 5, 4, seed=1)
    y = new(x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    ours, theirs = torch.autograd.grad(y, inputs, gy), torch.autograd.grad(wanted, inputs, gy)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# oracle 1
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", B)
def test_the_running_variance_is_the_one_asked_for_and_divides_in_evaluation(kind, unbiased):
    new, running = layer(kind, unbiased_running=unbiased), torch.ones(8).double()
    for seed in range(3):
        x = data(3, 8, 5, 4, seed=seed)
        new(x)
        running = 0.9 * running + 0.1 * x.var((0, 2, 3), unbiased=unbiased)
    torch.testing.assert_close(new.running_var, running, rtol=1e-10, atol=1e-10)
    assert set(dict(new.named_buffers())) == {"running_var"}
    new.eval()
    wanted = equation(kind, x, new.weight, new.bias, new.v, running=running)
    torch.testing.assert_close(new(x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(new.running_var, running)


# oracle 1
@pytest.mark.parametrize("kind", [*B, *S])
def test_without_activation_a_layer_is_affine_or_normalises(kind):
    x = data(3, 8, 5, 4)
    plain = layer(kind, apply_act=False)
    assert plain.v is None
    torch.testing.assert_close(plain(x), plain.weight.view(1, -1, 1, 1) * x + plain.bias.view(1, -1, 1, 1))
    scaled = layer(kind, apply_act=False, linear_mode="normalize")
    if kind in B:
        std = (x.var((0, 2, 3), unbiased=False, keepdim=True) + EPS).sqrt()
    else:
        parts = x.reshape(3, 4, -1)
        square = (parts * parts).mean(2) if kind == "S2" else parts.var(2, unbiased=False)
        std = (square + EPS).sqrt()[..., None].expand_as(parts).reshape(x.shape)
    wanted = scaled.weight.view(1, -1, 1, 1) * x / std + scaled.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(scaled(x), wanted, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(scaled, (data(2, 8, 2, 2).requires_grad_(),))


# oracle 2
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", [*B, *S])
def test_first_and_second_derivatives_are_those_of_finite_differences(kind, mode):
    new = layer(kind, 4, **({"groups": 2} if kind in S else {})).train(mode == "train")
    x = data(2, 4, 3, 2).requires_grad_()

    def call(x, *parameters):
        named = dict(zip([n for n, _ in new.named_parameters()], parameters, strict=True))
        return torch.func.functional_call(new, {**named, **{n: b.clone() for n, b in new.named_buffers()}}, (x,))

    inputs = (x, *new.parameters())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_at_a_tie_each_side_of_the_maximum_takes_half_as_torch_has_it():
    new = norms.EvoNormB0(2).double()
    with torch.no_grad():
        new.v.zero_()  # and one sample: both roots are the same
    x = data(1, 2, 3, 3).requires_grad_()
    ours = torch.autograd.grad(new(x), [x, new.v], data(1, 2, 3, 3, seed=1))
    theirs = torch.autograd.grad(equation("B0", x, new.weight, new.bias, new.v), [x, new.v], data(1, 2, 3, 3, seed=1))
    torch.testing.assert_close(ours, theirs)


# oracle 3
def test_s0_with_v_0_halves_x_over_the_groups_deviation():
    new, x = layer("S0"), data(3, 8, 5, 4)
    nn.init.zeros_(new.v)
    parts = x.reshape(3, 4, -1)
    std = (parts.var(2, unbiased=False, keepdim=True) + EPS).sqrt().expand_as(parts).reshape(x.shape)
    wanted = new.weight.view(1, -1, 1, 1) * x / (2 * std) + new.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(new(x), wanted)
    centred = (parts - parts.mean(2, keepdim=True)).reshape(x.shape)
    halved = torch.nn.functional.group_norm(centred, 4, new.weight / 2, new.bias, EPS)
    torch.testing.assert_close(new(centred), halved)
    assert not torch.allclose(new(x), torch.nn.functional.group_norm(x, 4, new.weight / 2, new.bias, EPS))


# oracle 3
def test_s1_is_s0_with_v_1_and_s2_where_groups_have_zero_mean():
    s0, s1, s2, x = layer("S0"), layer("S1"), layer("S2"), data(3, 8, 5, 4)
    nn.init.ones_(s0.v)
    torch.testing.assert_close(s0(x), s1(x))
    parts = x.reshape(3, 4, -1)
    centred = (parts - parts.mean(2, keepdim=True)).reshape(x.shape)
    torch.testing.assert_close(s2(centred), s1(centred), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(s2(x), s1(x), atol=1e-3)


# oracle 4
def test_b0_with_v_0_and_one_sample_is_batch_norm_that_keeps_the_mean():
    new, x = layer("B0"), data(1, 8, 5, 4)
    nn.init.zeros_(new.v), nn.init.zeros_(new.bias), nn.init.ones_(new.weight)
    std = (x.var((2, 3), unbiased=False, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(new(x), x / std)
    batch = torch.nn.functional.batch_norm(x, None, None, training=True, eps=EPS)
    torch.testing.assert_close(new(x), batch + x.mean((2, 3), keepdim=True) / std)


# oracle 5
def test_b0_with_a_large_v_saturates_above_zero_and_is_linear_below():
    new, x = layer("B0"), data(4, 8, 5, 4)
    nn.init.constant_(new.v, 1e9), nn.init.zeros_(new.bias)
    y, gamma = new(x), new.weight.view(1, -1, 1, 1).expand_as(x)
    far = x > 1e-3
    torch.testing.assert_close(y[far] * 1e9, gamma[far], rtol=1e-4, atol=1e-4)
    left = (x.var((0, 2, 3), unbiased=False, keepdim=True) + EPS).sqrt().expand_as(x)
    torch.testing.assert_close(y[x < -1e-3], (gamma * x / left)[x < -1e-3])


# oracle 6
@pytest.mark.parametrize("kind", S)
def test_a_samples_output_is_bit_equal_alone_and_in_any_batch(kind):
    new, x = layer(kind, dtype=torch.float32), data(6, 8, 16, 16, dtype=torch.float32)
    x[3] = torch.nan
    whole = new(x)
    for i in (0, 2, 5):
        assert torch.equal(new(x[i : i + 1])[0], whole[i])
    assert whole[3].isnan().all() and torch.equal(new.eval()(x)[0], whole[0])


# oracle 7
def test_scaling_x_and_unscaling_v_leaves_s0_as_it_is_and_scaling_x_alone_does_not():
    new, x = layer("S0", eps=1e-12), data(3, 8, 5, 4)
    before = new(x)
    assert not torch.allclose(new(3 * x), before, atol=1e-2)
    with torch.no_grad():
        new.v /= 3
    torch.testing.assert_close(new(3 * x), before, rtol=1e-6, atol=1e-6)


# oracle 8
@pytest.mark.parametrize("kind", [*B, *S])
def test_bfloat16_is_near_float32(kind):
    new, x = layer(kind, 16, torch.float32), data(4, 16, 8, 8, dtype=torch.bfloat16)
    wanted, got = new(x.float()), new(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() <= 1e-2 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(new(x), got)


# oracle 8
@pytest.mark.parametrize("kind", ["B0", "S0"])
def test_the_deviation_keeps_its_digits_under_a_large_mean(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 16, 16) + 1e3
    new = layer(kind, 8, torch.float32, apply_act=False, linear_mode="normalize")
    nn.init.ones_(new.weight), nn.init.zeros_(new.bias)
    exact = copy.deepcopy(new).double()(x.double())
    assert ((new(x).double() - exact) / exact).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", [*B, *S])
def test_autograd_keeps_one_tensor_of_the_inputs_size(kind):
    new, x = layer(kind, 16, torch.float32), data(8, 16, 16, 16, dtype=torch.float32).requires_grad_()
    saved = SavedBytes()
    saved.start(new)
    new(x)
    saved.stop()
    nbytes = x.numel() * x.element_size()
    assert nbytes <= saved.total <= 1.02 * nbytes


@pytest.mark.parametrize("kind", [*B, *S])
def test_any_number_of_axes_of_space_and_2d_insists_on_two(kind):
    new, flat = layer(kind), data(3, 8, 24)
    torch.testing.assert_close(new(flat.reshape(3, 8, 2, 3, 4)).flatten(2), new(flat))
    strict = getattr(norms, f"EvoNorm2d{kind}")(8)
    for wrong in (torch.zeros(3, 8, 4), torch.zeros(3, 7, 4, 4), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match=r"takes \(B, 8, H, W\)"):
            strict(wrong)
    with pytest.raises(ValueError, match="takes"):
        new(torch.zeros(3, 8))
    last = data(3, 8, 5, 4).to(memory_format=torch.channels_last)
    torch.testing.assert_close(new(last), new(last.contiguous()))


@pytest.mark.parametrize("kind", [*B, *S])
def test_empty_batches_pass_and_move_nothing(kind):
    new, x = layer(kind), torch.zeros(0, 8, 3, 3).double().requires_grad_()
    state = copy.deepcopy(new.state_dict())
    y = new(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    torch.testing.assert_close(new.state_dict(), state)


@pytest.mark.parametrize("kind", B)
def test_a_batch_that_is_not_finite_moves_no_statistic(kind):
    new, x = layer(kind), data(3, 8, 4, 4)
    x[1, 2, 0, 0] = torch.nan
    y = new(x)
    assert torch.equal(new.running_var, torch.ones(8).double())
    assert y[:, 2].isnan().all() and y[:, 3].isfinite().all()
    x[1, 2, 0, 0] = torch.inf
    new(x)
    assert torch.equal(new.running_var, torch.ones(8).double())


def test_maps_of_one_position():
    x = data(4, 8, 1, 1)
    b0 = layer("B0")
    torch.testing.assert_close(b0(x), equation("B0", x, b0.weight, b0.bias, b0.v))
    one = layer("S0", groups=8)
    with pytest.raises(ValueError, match="fewer groups"):
        one(x)
    assert one.eval()(x).isfinite().all()
    assert layer("S2", groups=8)(x).isfinite().all()


def test_groups_are_lowered_until_they_divide_and_strict_refuses():
    assert (
        norms.EvoNorm2dS0(48).groups == 24 and norms.EvoNorm2dS0(16).groups == 16 and norms.EvoNorm2dS0(7).groups == 7
    )
    assert norms.EvoNorm2dS0(48, group_size=16).groups == 3
    for settings in ({"groups": 32, "strict": True}, {"group_size": 5}, {"groups": 0}, {"linear_mode": "none"}):
        with pytest.raises(ValueError):
            norms.EvoNorm2dS0(48, **settings)
    with pytest.raises(ValueError, match="momentum"):
        norms.EvoNorm2dB0(8, momentum=2)


def test_the_functions_are_the_layers():
    x = data(3, 8, 5, 4)
    for kind in B:
        new = layer(kind)
        torch.testing.assert_close(HF.evo_norm_b(x, kind, new.weight, new.bias, new.v), new(x))
        held = HF.evo_norm_b(x, kind, new.weight, new.bias, new.v, new.running_var)
        torch.testing.assert_close(held, new.eval()(x))
    for kind in S:
        new = layer(kind)
        torch.testing.assert_close(HF.evo_norm_s(x, kind, 4, new.weight, new.bias, new.v), new(x))
    for wrong in (
        lambda: HF.evo_norm_s(x, "S1", 4, v=torch.ones(8)),
        lambda: HF.evo_norm_s(x, "S0", 3),
        lambda: HF.evo_norm_b(x, "B1", v=torch.ones(8)),
        lambda: HF.evo_norm_b(x, "B0", v=torch.ones(7)),
        lambda: HF.evo_norm_b(x, "S0"),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("kind", ["B0", "S0"])
def test_a_half_precision_layer_keeps_wide_statistics_and_survives_copies_and_state_dicts(kind):
    new = layer(kind, dtype=torch.bfloat16)
    twin = copy.deepcopy(new)
    x = data(4, 8, 4, 4, dtype=torch.bfloat16)
    new(x)
    if kind == "B0":
        assert new.running_var.dtype == torch.float32 and not torch.equal(new.running_var, twin.running_var)
    twin.load_state_dict(new.state_dict())
    assert torch.equal(twin.eval()(x), new.eval()(x))


def test_zero_init_starts_a_branch_silent_and_the_recipe_leaves_all_vectors_out_of_decay():
    new = norms.EvoNorm2dS0(8, zero_init=True)
    assert not new(torch.randn(2, 8, 4, 4)).any()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), new, norms.EvoNorm2dB0(8), norms.EvoNorm2dB1(8))
    spared = {id(p) for p in norms.no_weight_decay_parameters(model)}
    assert spared == {id(p) for module in list(model)[1:] for p in module.parameters()} and len(spared) == 8


@pytest.mark.parametrize("kind", ["B0", "S0"])
def test_compiled_layers_equal_eager_ones(kind):
    new = layer(kind, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(new), backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = data(3, 8, 4, 4, seed=seed, dtype=torch.float32).requires_grad_()
        ours, theirs = (torch.autograd.grad(m(x).square().sum(), [x, m.weight]) for m in (compiled, new))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(list(compiled.buffers()), list(new.buffers()))


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save({kind: _train(kind, *((0, 2) if rank == 0 else (2, 6)), True) for kind in B}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _train(kind: str, first: int, last: int, sync: bool) -> dict[str, torch.Tensor]:
    new, found = layer(kind, sync=sync, unbiased_running=True), {}
    for step in range(3):
        x, gy = (data(6, 8, 3, 3, seed=2 * step + i) for i in range(2))
        # at the second step one process has nothing at all
        start, stop = (first, last) if step != 1 else (0, 0) if last == 2 else (0, 6)
        x = x[start:stop].requires_grad_()
        y = new(x)
        y.backward(gy[start:stop])
        found[f"y{step}"], found[f"gx{step}"] = y.detach(), x.grad
    return {**found, **{f"grad {n}": p.grad for n, p in new.named_parameters()}, "running": new.running_var}


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in B:
        for name, wanted in _train(kind, 0, 6, False).items():
            parts = [r[kind][name] for r in ranks]
            got = (
                torch.cat(parts)
                if name[0] in "y" or name.startswith("gx")
                else sum(parts)
                if "grad" in name
                else parts[0]
            )
            torch.testing.assert_close(
                got, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}"
            )
        assert torch.equal(ranks[0][kind]["running"], ranks[1][kind]["running"])
