# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
"""UnifiedNorm against a step-by-step account of the method, and what its statistics must and must not do."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headway as hw
from headway.norms.layer import LayerNorm
from headway.norms.unified import UnifiedNorm

STATE = ("running_var", "ema_gz", "forward_window", "backward_window", "iters", "skip_counter")


class StepByStep:
    """The training pass of the paper's released code as written down, with plain Python branches."""

    def __init__(self, c, windows, warmup, filtration, compensation=1000, eps=1e-5, momentum=0.9):
        self.windows, self.warmup, self.filtration, self.compensation = windows, warmup, filtration, compensation
        self.eps, self.m = eps, momentum
        self.psi_hat, self.nu = torch.ones(c).double(), torch.zeros(c).double()
        self.A, self.Gb = torch.zeros(windows[0], c).double(), torch.zeros(windows[1], c).double()
        self.t = self.skipped = 0

    def step(self, x, weight, bias, gy, pad, count_padding):
        self.t = t = self.t + 1
        mf, mb = self.windows
        q = (x[~pad] ** 2).mean(0)
        spread = self.A.sqrt().flatten().var() if self.A.numel() > 1 else torch.tensor(0.0)
        self.A[t % mf] = q
        skip = mf <= 1
        if self.filtration and t >= self.warmup:
            gap = self.A.mean(0) - self.A.log().mean(0).exp()
            if (gap > mf * spread).any():
                self.A[t % mf] = self.psi_hat
                skip, self.skipped = True, self.skipped + 1
        psi = q if t <= mf or t < self.warmup or skip else self.A.log().mean(0).exp()
        r = torch.ones_like(q)
        if t > max(self.compensation, self.warmup) and not skip:
            r = (torch.sqrt(psi + self.eps) / torch.sqrt(self.psi_hat + self.eps)).clamp(0.2, 5)
        z = x / torch.sqrt(psi + self.eps)
        self.psi_hat = self.m * self.psi_hat + (1 - self.m) * psi
        g = gy * weight * r
        s_now = (g * z).reshape(-1, x.shape[-1]).mean(0) if count_padding else (g * z)[~pad].mean(0)
        self.Gb[t % mb] = self.nu if skip else s_now
        s = s_now if t <= mb or t < self.warmup or skip else self.Gb.mean(0)
        self.nu = self.m * self.nu + (1 - self.m) * s
        pull = (s if skip else self.nu) * z
        if not count_padding:
            pull = torch.where(pad[..., None], 0, pull)
        grad_x = (g - pull) / torch.sqrt(psi + self.eps)
        grad_weight, grad_bias = (gy * r * z).flatten(0, 1).sum(0), gy.flatten(0, 1).sum(0)
        return weight * z + bias, grad_x, grad_weight, grad_bias


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("windows", [(4, 4), (3, 5), (5, 2), (1, 1), (1, 4)])
@pytest.mark.parametrize("filtration", [False, True])
def test_outputs_gradients_and_statistics_equal_the_steps_written_down(count_padding, windows, filtration):
    torch.manual_seed(0)
    c = 5
    account = StepByStep(c, windows, 6, filtration, compensation=10)
    layer = UnifiedNorm(c, windows, 6, filtration, compensation_warmup=10, count_padding=count_padding).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    scale = torch.linspace(0.5, 3, c).double()
    for step in range(30):
        x = torch.randn(3, 7, c).double() * scale * (6 if step == 20 else 1 + step / 30)
        gy, pad = torch.randn(3, 7, c).double(), torch.rand(3, 7) < 0.3
        x.requires_grad_()
        y = layer(x, pad)
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), gy)
        wanted = account.step(x.detach(), layer.weight.detach(), layer.bias.detach(), gy, pad, count_padding)
        torch.testing.assert_close((y.detach(), *grads), wanted, rtol=1e-10, atol=1e-10)
        state = (account.psi_hat, account.nu, account.A, account.Gb)
        torch.testing.assert_close([getattr(layer, n) for n in STATE[:4]], list(state), rtol=1e-10, atol=1e-10)
    assert layer.iters == 30 and layer.skip_counter == account.skipped
    assert account.skipped > 0 or not filtration or windows[0] == 1


def test_window_1_is_the_exact_quadratic_mean_norm_and_passes_gradcheck():
    layer = UnifiedNorm(3, window_size=1, warmup_iters=0).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), x * torch.rsqrt((x**2).mean((0, 1)) + 1e-5))
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_smoothed_gradient_is_not_the_derivative_of_the_forward_pass():
    layer = UnifiedNorm(3, warmup_iters=2).double()
    for _ in range(12):
        layer(torch.randn(8, 3, dtype=torch.float64, requires_grad=True)).square().sum().backward()
    state = copy.deepcopy(layer.state_dict())

    def loss(x):
        layer.load_state_dict(state)
        return (layer(x) * gy).sum()

    x, gy = torch.randn(8, 3).double().requires_grad_(), torch.randn(8, 3).double()
    (ours,) = torch.autograd.grad(loss(x), x)
    differences = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            step = torch.zeros(x.numel()).double()
            step[i] = 1e-6
            differences.view(-1)[i] = (loss(x + step.view_as(x)) - loss(x - step.view_as(x))) / 2e-6
    assert (ours - differences).norm() / differences.norm() > 1e-2


def test_constant_stream_brings_every_statistic_to_its_limit():
    layer = UnifiedNorm(4, warmup_iters=5, compensation_warmup=10).double()
    x, gy = 1.5 * torch.randn(32, 4).double(), torch.randn(32, 4).double()
    for _ in range(400):
        y = layer(x.requires_grad_())
        y.backward(gy)
    q = x.detach().square().mean(0)
    torch.testing.assert_close(layer.forward_window, q.expand(4, 4))
    torch.testing.assert_close(layer.running_var, q)
    torch.testing.assert_close(layer.ema_gz, (gy * x.detach() * torch.rsqrt(q + 1e-5)).mean(0))
    weight_grad = torch.autograd.grad(layer(x), layer.weight, gy)[0]
    torch.testing.assert_close(weight_grad, (gy * y.detach()).sum(0))  # r is 1


def test_evaluation_is_a_scale_and_a_shift_and_moves_nothing():
    layer = UnifiedNorm(4)
    nn.init.normal_(layer.bias)
    layer(torch.randn(9, 4) * 3)
    layer.eval()
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 5, 4)
    scale, shift = layer.scale_shift()
    torch.testing.assert_close(layer(x), x * scale + shift)
    torch.testing.assert_close(layer(7 * x) - shift, 7 * (layer(x) - shift), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[n], layer.state_dict()[n]) for n in before)


def test_training_at_window_1_ignores_the_scale_of_the_input():
    x = torch.randn(16, 4).double()
    layers = [UnifiedNorm(4, window_size=1, eps=1e-14).double() for _ in range(2)]
    torch.testing.assert_close(layers[0](x), layers[1](50 * x))


@pytest.mark.parametrize("filtration", [True, False])
def test_outlier_batch_is_left_out_with_the_filter_and_stays_for_the_window_without(filtration):
    torch.manual_seed(0)
    scale = torch.logspace(-1, 1, 6).double()  # between-channel spread, so that ordinary batches pass the filter
    layer = UnifiedNorm(6, warmup_iters=4, outlier_filtration=filtration).double()
    for _ in range(80):  # until the running statistic, which takes the place of the outlier, has left its start at 1
        layer(torch.randn(2000, 6).double() * scale)
    largest, before = layer.forward_window.max(0).values, int(layer.skip_counter)
    assert before == 0
    outlier, after = torch.randn(2000, 6).double() * scale, torch.randn(2000, 6).double() * scale
    spared = copy.deepcopy(layer)
    spared(outlier)
    outlier[:, 5] *= 40
    layer(outlier)
    held = []
    for step in range(5):
        held.append(bool((layer.forward_window > 2 * largest).any()))
        y = layer(after)
        if step == 0:  # psi of the batch after the outlier, held against that of a layer that never saw it
            change = (spared(after) / y)[0] - 1
            assert (change.abs().max() < 0.05) == filtration
    assert held == ([False] * 5 if filtration else [True] * 4 + [False])
    assert layer.skip_counter == int(filtration)


def test_contents_of_padding_change_nothing():
    pad = torch.arange(6)[None] >= torch.tensor([6, 2, 4])[:, None]
    x, gy = torch.randn(3, 6, 4).double(), torch.randn(3, 6, 4).double()
    other = torch.where(pad[..., None], 100.0 * torch.randn_like(x), x)
    other[1, 5, 0] = torch.nan
    gy = torch.where(pad[..., None], 0, gy)
    results = []
    for data in (x, other):
        layer = UnifiedNorm(4, warmup_iters=2).double()
        for _ in range(7):
            y = layer(data.requires_grad_(), pad)
            grad = torch.autograd.grad(y, data, gy)[0]
        results.append((y[~pad], grad[~pad], [getattr(layer, n) for n in STATE]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("bad", ["nan", "inf", "empty", "padding alone"])
def test_unusable_batch_moves_no_statistic(bad):
    layer = UnifiedNorm(4, warmup_iters=2, outlier_filtration=True)
    for _ in range(6):
        layer(torch.randn(8, 4, requires_grad=True)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0 if bad == "empty" else 8, 4)
    if bad in ("nan", "inf"):
        x[3, 1] = float(bad)
    y = layer(x.requires_grad_(), torch.ones(8, dtype=torch.bool) if bad == "padding alone" else None)
    y.backward(torch.ones_like(y))
    assert y.shape == x.shape and y.isfinite().all() == (bad not in ("nan", "inf"))
    assert all(torch.equal(before[n], getattr(layer, n)) for n in STATE)


def test_gradient_with_nan_moves_no_gradient_statistic():
    layer = UnifiedNorm(4)
    layer(torch.randn(8, 4, requires_grad=True)).backward(torch.full((8, 4), torch.nan))
    assert layer.ema_gz.eq(0).all() and layer.backward_window.eq(0).all() and layer.iters == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_float32_for_half_precision_and_float64_for_double(dtype):
    layer = UnifiedNorm(4).to(dtype)
    y = layer(torch.randn(8, 4, dtype=dtype, requires_grad=True))
    y.sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert y.dtype == dtype and all(getattr(layer, n).dtype == wide for n in STATE[:4])
    assert layer.weight.grad.dtype == dtype and layer.eval()(y).dtype == dtype


def test_dead_channel_and_single_token_give_finite_numbers():
    layer = UnifiedNorm(4, warmup_iters=0)
    for _ in range(8):
        x = torch.randn(1, 4)
        x[:, 2] = 0
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_equals_plain_training(reentrant):
    torch.manual_seed(0)
    plain = UnifiedNorm(4, warmup_iters=2, compensation_warmup=3).double()
    saving, results = copy.deepcopy(plain), []
    data = torch.randn(10, 8, 4).double()
    for layer in (plain, saving):
        for x in data:
            x = x.clone().requires_grad_()
            if layer is plain:
                y = layer(x)
            elif reentrant:
                with layer.freeze_statistics():
                    y = checkpoint(layer, x, use_reentrant=True)
            else:
                context = lambda layer=layer: (layer.freeze_statistics(), nullcontext())  # noqa: E731
                y = checkpoint(layer, x, use_reentrant=False, context_fn=context)
            (y**3).sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, [getattr(layer, n) for n in STATE]))
    torch.testing.assert_close(*results)


def test_frozen_pass_moves_nothing_and_reset_starts_afresh():
    layer, fresh = UnifiedNorm(4, warmup_iters=2), UnifiedNorm(4).state_dict()
    with layer.freeze_statistics():
        y = layer(torch.randn(8, 4, requires_grad=True))
    y.sum().backward()
    assert all(torch.equal(fresh[n], getattr(layer, n)) for n in STATE)
    for _ in range(5):
        layer(torch.randn(8, 4, requires_grad=True)).square().sum().backward()
    assert layer.iters == 5
    layer.reset_statistics()
    assert all(torch.equal(fresh[n], getattr(layer, n)) for n in STATE)


def test_stands_in_for_layer_norm_over_the_last_axis_alone():
    for old in (nn.LayerNorm(4), LayerNorm(4), LayerNorm(4, dims=-1), nn.LayerNorm(4, bias=False)):
        new = UnifiedNorm.from_module(old.eval(), warmup_iters=7)
        assert new is not None and new.weight is old.weight and new.bias is old.bias
        assert new.warmup_iters == 7 and not new.training
        assert new.train()(torch.randn(3, 4)).shape == (3, 4)
    bare = UnifiedNorm.from_module(nn.LayerNorm(4, elementwise_affine=False))
    assert bare is not None and not list(bare.parameters())
    bare(torch.randn(3, 4, requires_grad=True)).square().sum().backward()
    for other in (nn.LayerNorm((3, 4)), LayerNorm(4, dims=1), nn.BatchNorm1d(4)):
        assert UnifiedNorm.from_module(other) is None
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    hw.apply(model, hw.Replace(UnifiedNorm, warmup_iters=9))
    assert isinstance(model[0], UnifiedNorm) and model[0].warmup_iters == 9


@pytest.mark.parametrize(
    "settings", [{"window_size": 0}, {"window_size": (4, 0)}, {"momentum": 1.0}, {"momentum": 0.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        UnifiedNorm(4, **settings)


def test_input_and_mask_that_do_not_fit_are_refused():
    layer = UnifiedNorm(4)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 4\)"):
        layer(torch.randn(3, 5))
    for mask in (torch.zeros(3), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="pad_mask"):
            layer(torch.randn(3, 4), mask)
