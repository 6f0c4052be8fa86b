# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
"""PowerNorm against a step-by-step account of the method, and what its statistics must and must not do."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from headway.norms.layer import LayerNorm
from headway.norms.power import GroupScaling, PowerNorm, group_scaling
from headway.surgery import Site

STATE = ("running_phi", "ema_gz", "iters")


class StepByStep:
    """The training pass after the group scaling, as written down, with plain Python branches."""

    def __init__(self, c, warmup, grad_scale, clamp, af=0.8, ab=0.7, eps=1e-5):
        self.warmup, self.grad_scale, self.clamp, self.af, self.ab, self.eps = warmup, grad_scale, clamp, af, ab, eps
        self.phi, self.ema, self.t = torch.ones(c).double(), torch.zeros(c).double(), 0

    def step(self, u, weight, bias, gy, pad, count_padding):
        self.t = t = self.t + 1
        q = (u[~pad] ** 2).mean(0)
        square = q if t <= self.warmup else self.phi
        z = u / torch.sqrt(square + self.eps)
        if t < self.warmup:
            self.phi = self.phi * (t - 1) / t + q / t
        self.phi = self.af * self.phi + (1 - self.af) * q
        counted = torch.ones_like(pad) if count_padding else ~pad
        a = gy * weight - (1 - self.ab) * self.ema * torch.where(counted[..., None], z, 0)
        g_part, factor = (gy * weight * z)[counted].mean(0), (1 - self.ab) * (z**2)[counted].mean(0)
        self.ema = self.ema + g_part - (factor.clamp(max=1) if self.clamp else factor) * self.ema
        grad_u = a / torch.sqrt((q if self.grad_scale == "batch" else square) + self.eps)
        return weight * z + bias, grad_u, (gy * z).sum((0, 1)), gy.sum((0, 1))


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("grad_scale", ["running", "batch"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_outputs_gradients_and_statistics_equal_the_steps_written_down(count_padding, grad_scale, clamp, groups):
    torch.manual_seed(0)
    account = StepByStep(6, 5, grad_scale, clamp)
    layer = PowerNorm(6, 1e-5, 0.8, 0.7, 5, groups, "running", grad_scale, count_padding, clamp).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    for step in range(14):
        x = torch.randn(3, 7, 6).double() * (5 if step == 9 else 1)
        gy, pad = torch.randn(3, 7, 6).double(), torch.rand(3, 7) < 0.3
        x.requires_grad_()
        y = layer(x, pad)
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), gy)
        u = x
        if groups is not None:
            parts = x.reshape(3, 7, groups, 6 // groups)
            u = (parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + 1e-5)).reshape(3, 7, 6)
        wanted = account.step(u.detach(), layer.weight.detach(), layer.bias.detach(), gy, pad, count_padding)
        grad_x = torch.autograd.grad(u, x, wanted[1])[0] if groups is not None else wanted[1]
        expected = (wanted[0], grad_x, *wanted[2:])
        torch.testing.assert_close((y.detach(), *grads), expected, rtol=1e-10, atol=1e-10)
        statistics = [account.phi, account.ema]
        torch.testing.assert_close([layer.running_phi, layer.ema_gz], statistics, rtol=1e-10, atol=1e-10)


def test_one_group_in_evaluation_is_rms_norm():
    layer, x = PowerNorm(8, alpha_fwd=1).double().eval(), torch.randn(5, 8).double()
    wanted = torch.nn.functional.rms_norm(x, (8,), eps=1e-5) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_alpha_bkw_1_passes_the_gradient_straight_through():
    layer = PowerNorm(4, alpha_bkw=1, warmup_iters=0, group_num=None).double()
    for _ in range(3):
        phi, x, gy = layer.running_phi.clone(), torch.randn(8, 4).double().requires_grad_(), torch.randn(8, 4).double()
        layer(x).backward(gy)
        torch.testing.assert_close(x.grad, gy / torch.sqrt(phi + 1e-5))


def test_stationary_stream_makes_the_gradient_orthogonal_to_the_output():
    layer = PowerNorm(4, warmup_iters=0, group_num=None).double()
    x, gy = torch.randn(32, 4).double(), torch.randn(32, 4).double()
    overlaps = []
    for _ in range(500):
        data = x.clone().requires_grad_()
        z = layer(data)
        grad = torch.autograd.grad(z, data, gy)[0]
        overlaps.append((grad * z.detach()).mean(0).abs().max())
    z = z.detach()
    assert overlaps[-1] <= 1e-6 * overlaps[0]
    torch.testing.assert_close(0.1 * layer.ema_gz, (gy * z).mean(0) / z.square().mean(0))


@pytest.mark.parametrize("groups", [None, 2])
def test_variant_v_has_the_exact_gradient(groups):
    layer = PowerNorm(4, variant="v", group_num=groups).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    pad = torch.tensor([[False, False, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, pad), (x, layer.weight, layer.bias))
    assert layer.iters > 0


def test_running_variant_differs_from_finite_differences_once_nu_is_not_0():
    layer = PowerNorm(4, warmup_iters=0, group_num=None).double()
    layer(torch.randn(8, 4).double().requires_grad_()).square().sum().backward()
    x = torch.randn(8, 4).double().requires_grad_()
    with layer.freeze_statistics():  # every call starts from the same state
        assert not torch.autograd.gradcheck(layer, x, raise_exception=False)
        layer.ema_gz.zero_()
        assert torch.autograd.gradcheck(layer, x)


def test_both_updates_of_phi_happen_during_warm_up():
    layer, x = PowerNorm(1, warmup_iters=10, group_num=None).double(), torch.full((3, 1), 2.0).double()
    layer(x)
    torch.testing.assert_close(layer.running_phi, torch.tensor([4.0]).double())
    layer(3 * x)  # q = 36: first (4 + 36) / 2 = 20, then 0.9 * 20 + 0.1 * 36
    torch.testing.assert_close(layer.running_phi, torch.tensor([21.6]).double())
    layer(x)  # (2 * 21.6 + 4) / 3, then 0.9 * that + 0.1 * 4
    torch.testing.assert_close(layer.running_phi, torch.tensor([0.9 * 47.2 / 3 + 0.4]).double())


def test_contents_of_padding_change_nothing():
    pad = torch.arange(6)[None] >= torch.tensor([6, 2, 4])[:, None]
    x = torch.randn(3, 6, 4).double()
    gy = torch.where(pad[..., None], 0, torch.randn_like(x))
    other = torch.where(pad[..., None], 100.0 * torch.randn_like(x), x)
    for variant in ("running", "v"):
        results = []
        for data in (x.clone(), other.clone()):
            layer = PowerNorm(4, warmup_iters=2, variant=variant).double()
            for _ in range(5):
                y = layer(data.requires_grad_(), pad)
                grad = torch.autograd.grad(y, data, gy)[0]
            results.append((y[~pad], grad[~pad], [getattr(layer, n) for n in STATE]))
        torch.testing.assert_close(*results)


def test_time_major_and_flat_input_equal_batch_first():
    x, pad = torch.randn(3, 6, 4).double(), torch.rand(3, 6) < 0.3
    first, major = PowerNorm(4).double(), PowerNorm(4, batch_first=False).double()
    torch.testing.assert_close(first(x, pad), major(x.transpose(0, 1), pad).transpose(0, 1))
    torch.testing.assert_close(first.running_phi, major.running_phi)
    flat, batched = PowerNorm(4).double(), PowerNorm(4).double()
    torch.testing.assert_close(flat(x[0], pad[0])[None], batched(x[:1], pad[:1]))


@pytest.mark.parametrize("variant", ["running", "v"])
@pytest.mark.parametrize("bad", ["nan", "inf", "empty", "padding alone"])
def test_unusable_batch_moves_no_statistic(bad, variant):
    layer = PowerNorm(4, warmup_iters=2, variant=variant)
    for _ in range(4):
        layer(torch.randn(8, 4, requires_grad=True)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0 if bad == "empty" else 8, 4)
    if bad in ("nan", "inf"):
        x[3, 1] = float(bad)
    y = layer(x.requires_grad_(), torch.ones(8, dtype=torch.bool) if bad == "padding alone" else None)
    y.backward(torch.ones_like(y))
    assert y.shape == x.shape and y.isfinite().all() == (bad not in ("nan", "inf"))
    assert all(torch.equal(before[n], getattr(layer, n)) for n in STATE)


@pytest.mark.parametrize("clamp", [False, True])
def test_recursion_diverges_on_a_lagging_statistic_unless_clamped(clamp):
    layer = PowerNorm(4, warmup_iters=0, group_num=None, alpha_fwd=1, clamp_gamma=clamp).double()
    for _ in range(100):
        x = 6 * torch.randn(64, 4).double()  # mean z^2 = 36
        layer(x.requires_grad_()).backward(torch.randn(64, 4).double())
    assert (layer.ema_gz.abs().max() < 100) == clamp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_float32_for_half_precision_and_float64_for_double(dtype):
    layer = PowerNorm(4).to(dtype)
    y = layer(torch.randn(8, 4, dtype=dtype, requires_grad=True))
    y.sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype and layer.running_phi.dtype == layer.ema_gz.dtype == wide
    assert layer.weight.grad.dtype == dtype and layer.eval()(y).dtype == dtype


def test_checkpointed_training_equals_plain_training():
    plain, results = PowerNorm(4, warmup_iters=2).double(), []
    saving, data = copy.deepcopy(plain), torch.randn(6, 8, 4).double()
    for layer in (plain, saving):
        for x in data:
            x = x.clone().requires_grad_()
            contexts = lambda layer=layer: (layer.freeze_statistics(), nullcontext())  # noqa: E731
            y = layer(x) if layer is plain else checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
            (y**3).sum().backward()
        results.append((y.detach(), x.grad, [getattr(layer, n) for n in STATE]))
    torch.testing.assert_close(*results)


def test_frozen_pass_moves_nothing_and_reset_starts_afresh():
    layer, fresh = PowerNorm(4), PowerNorm(4).state_dict()
    with layer.freeze_statistics():
        y = layer(torch.randn(8, 4, requires_grad=True))
    y.square().sum().backward()
    assert all(torch.equal(fresh[n], getattr(layer, n)) for n in STATE)
    layer(torch.randn(8, 4, requires_grad=True)).square().sum().backward()
    assert layer.iters == 1 and layer.ema_gz.ne(0).any()
    layer.reset_statistics()
    assert all(torch.equal(fresh[n], getattr(layer, n)) for n in STATE)


def test_scale_shift_is_the_whole_layer_in_evaluation_without_groups():
    layer, x = PowerNorm(4, group_num=None), torch.randn(5, 4)
    layer(3 * x)
    scale, shift = layer.eval().scale_shift()
    torch.testing.assert_close(layer(x), scale * x + shift)


def test_group_scaling_is_exact_and_scales_each_group():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    y = GroupScaling(2)(x)
    torch.testing.assert_close(
        y.unflatten(-1, (2, 3)).square().mean(-1), torch.ones(3, 2).double(), rtol=1e-3, atol=1e-3
    )
    assert torch.autograd.gradcheck(lambda x: group_scaling(x, 3), x)
    with pytest.raises(ValueError, match="must divide"):
        group_scaling(x, 4)


def test_stands_in_for_layer_norm_with_the_heads_of_the_model():
    for old in (nn.LayerNorm(8), LayerNorm(8)):
        model = nn.Sequential(old)
        model.config = SimpleNamespace(num_attention_heads=4)
        new = PowerNorm.from_module(old, site=Site(old, "0", model, model), group_num="heads")
        assert new is not None and new.group_num == 4 and new.weight is old.weight and new.bias is old.bias
    assert PowerNorm.from_module(nn.LayerNorm([3, 4])) is None and PowerNorm.from_module(LayerNorm(4, dims=1)) is None
    with pytest.raises(ValueError, match="num_attention_heads"):
        PowerNorm.from_module(nn.LayerNorm(8), group_num="heads")


@pytest.mark.parametrize(
    "settings", [{"alpha_fwd": 1.1}, {"alpha_bkw": -0.1}, {"group_num": 3}, {"variant": "x"}, {"grad_scale": "x"}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PowerNorm(4, **settings)


def test_input_and_mask_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the input must"):
        PowerNorm(4)(torch.randn(3, 5))
    with pytest.raises(ValueError, match="pad_mask"):
        PowerNorm(4)(torch.randn(2, 3, 4), torch.zeros(2, 3))
