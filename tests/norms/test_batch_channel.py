# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportOptionalSubscript=false
# pyright: reportUnusedExpression=false
"""Batch-channel normalisation against the method written down step by step, and the oracles that follow from its equations."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import headway as hw
from headway.norms.batch_channel import (
    BatchChannelNorm2d,
    EstBatchNorm1d,
    EstBatchNorm2d,
    EstBatchNorm3d,
    set_moving_speed,
)
from headway.norms.microbatch import MicroBatch, convert_microbatch, dead_channel_report
from headway.weights.standardised import WSConv2d

DOUBLE = torch.float64


def randomised(layer):
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double()


def written_down(x, mean, var, weight, bias, eps=1e-5):
    def channel(v):
        return v[:, None, None]

    return channel(weight) * (x - channel(mean)) / channel(var + eps).sqrt() + channel(bias)


def step_estimates(x, mean, var, r):
    m, q = x.mean((0, 2, 3)), (x - mean[:, None, None]).square().mean((0, 2, 3))
    return mean + r * (m - mean), var + r * (q - var)


def second_stage(z, groups, gain, offset, eps=1e-5):
    n, c = z.shape[:2]
    parts = z.reshape(n, groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    gain, offset = (v.repeat_interleave(c // v.numel())[:, None, None] for v in (gain, offset))
    return parts.reshape(z.shape) * gain + offset


def test_five_steps_of_the_estimates_equal_the_method_written_down():
    torch.manual_seed(0)
    layer = randomised(EstBatchNorm2d(6, 0.3))
    mean, var = torch.zeros(6, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    for _ in range(5):
        x = (torch.randn(2, 6, 3, 4, dtype=DOUBLE) * 2 + 1).requires_grad_()
        gy = torch.randn_like(x)
        mean, var = step_estimates(x.detach(), mean, var, 0.3)
        wanted = written_down(x, mean, var, layer.weight, layer.bias)
        y, leaves = layer(x), (x, layer.weight, layer.bias)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        grads = [torch.autograd.grad(out, leaves, gy) for out in (y, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), written_down(x, mean, var, layer.weight, layer.bias))


@pytest.mark.parametrize("affine", ["group", "channel"])
@pytest.mark.parametrize("estimate", [False, True])
def test_batch_and_micro_form_equal_the_two_stages_written_down(estimate, affine):
    torch.manual_seed(0)
    layer = randomised(BatchChannelNorm2d(6, 3, estimate, 0.2, channel_affine=affine))
    mean, var = torch.zeros(6, dtype=DOUBLE), torch.ones(6, dtype=DOUBLE)
    for _ in range(3):
        x = (torch.randn(2, 6, 3, 4, dtype=DOUBLE) * 2 + 1).requires_grad_()
        gy = torch.randn_like(x)
        first = layer.batch
        if estimate:
            mean, var = step_estimates(x.detach(), mean, var, 0.2)
            z = written_down(x, mean, var, first.weight, first.bias)
        else:
            z = F.batch_norm(x, mean, var, first.weight, first.bias, True, 0.1)
        wanted = second_stage(z, 3, layer.group_weight, layer.group_bias)
        y, leaves = layer(x), (x, *layer.parameters())
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(y, leaves, gy), torch.autograd.grad(wanted, leaves, gy), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close((first.running_mean, first.running_var), (mean, var), rtol=1e-10, atol=1e-10)
    layer.eval()
    z = written_down(x, mean, var, layer.batch.weight, layer.batch.bias)
    torch.testing.assert_close(
        layer(x), second_stage(z, 3, layer.group_weight, layer.group_bias), rtol=1e-10, atol=1e-10
    )


# oracle 6
def test_one_channel_a_group_cancels_the_first_stage_and_leaves_instance_norm():
    torch.manual_seed(0)
    layer, x = BatchChannelNorm2d(8, 8), torch.randn(3, 8, 9, 9) * 3 + 2
    nn.init.normal_(layer.group_weight), nn.init.normal_(layer.group_bias)
    wanted = F.instance_norm(x) * layer.group_weight[:, None, None] + layer.group_bias[:, None, None]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


# oracle 7
@pytest.mark.parametrize("estimate", [False, True])
def test_the_second_stage_has_mean_0_and_variance_v_over_v_plus_eps_whatever_the_first_one_is(estimate):
    torch.manual_seed(0)
    layer, x = BatchChannelNorm2d(8, 2, estimate).double(), torch.randn(3, 8, 5, 5, dtype=DOUBLE) * 4 - 1
    nn.init.normal_(layer.batch.weight, std=0.01), nn.init.normal_(layer.batch.bias, std=0.01)
    y = layer(x).reshape(3, 2, -1)
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    if estimate:
        mean, var = layer.batch.running_mean, layer.batch.running_var
    v = written_down(x, mean, var, layer.batch.weight, layer.batch.bias).reshape(3, 2, -1).var(2, unbiased=False)
    assert y.mean(2).abs().max() < 1e-6
    torch.testing.assert_close(y.var(2, unbiased=False), v / (v + 1e-5), rtol=1e-6, atol=1e-6)
    assert (v / (v + 1e-5) < 0.99).any()  # eps is seen


# oracle 8
def test_moving_speed_1_on_a_repeated_batch_is_batch_norm_with_the_gradient_of_a_scale():
    torch.manual_seed(0)
    layer = EstBatchNorm2d(4, 1.0).double()
    x = (torch.randn(3, 4, 5, 5, dtype=DOUBLE) * 3 + 2).requires_grad_()
    layer(x)
    y = layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True), rtol=1e-6, atol=1e-6)
    gy = torch.randn_like(y)
    scale = (layer.running_var + 1e-5).rsqrt()[:, None, None]
    torch.testing.assert_close(torch.autograd.grad(y, x, gy)[0], gy * scale, rtol=1e-12, atol=1e-12)


# oracle 9
def test_estimated_batch_norm_is_affine_in_its_input_within_a_steps_statistics():
    torch.manual_seed(0)
    layer = randomised(EstBatchNorm2d(4)).eval()
    layer.running_var.uniform_(0.5, 2), layer.running_mean.normal_()
    a, b = torch.randn(2, 2, 4, 3, 3, dtype=DOUBLE)
    scale = (layer.weight * (layer.running_var + 1e-5).rsqrt())[:, None, None]
    torch.testing.assert_close(layer(a) - layer(b), scale * (a - b), rtol=1e-13, atol=1e-13)
    layer.train()
    with layer.freeze_statistics():  # twice from the same state
        torch.testing.assert_close(layer(a), layer(a.clone()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "shape, kind", [((4, 6), EstBatchNorm1d), ((4, 6, 5), EstBatchNorm1d), ((2, 6, 2, 3, 2), EstBatchNorm3d)]
)
def test_other_dimensions_are_the_same_layer(shape, kind):
    torch.manual_seed(0)
    x, layer, flat = torch.randn(shape), kind(6), EstBatchNorm2d(6)
    wanted = flat(x.reshape(shape[0], 6, -1, 1)).reshape(shape)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.state_dict(), flat.state_dict())


def test_nan_and_empty_batches_move_nothing():
    for layer in (EstBatchNorm2d(4), BatchChannelNorm2d(4, 2, True), BatchChannelNorm2d(4, 2)):
        layer(torch.randn(2, 4, 3, 3))
        first = getattr(layer, "batch", layer)
        before = (first.running_mean.clone(), first.running_var.clone())
        assert torch.isnan(layer(torch.full((1, 4, 3, 3), torch.nan))).any()
        x = torch.randn(0, 4, 3, 3, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape and all(float(p.grad.abs().sum()) == 0 for p in layer.parameters())
        assert torch.equal(first.running_mean, before[0]) and torch.equal(first.running_var, before[1])


def test_one_image_of_one_pixel():
    x = torch.randn(1, 8, 1, 1)
    assert torch.isfinite(EstBatchNorm2d(8)(x)).all()
    assert torch.isfinite(BatchChannelNorm2d(8, 2, True)(x)).all()
    with pytest.raises(ValueError, match="use estimate=True"):
        BatchChannelNorm2d(8, 2)(x)


@pytest.mark.parametrize("estimate", [False, True])
def test_checkpointing_moves_the_estimates_once(estimate):
    torch.manual_seed(0)
    layer, x = BatchChannelNorm2d(4, 2, estimate), torch.randn(2, 4, 3, 3, requires_grad=True)
    plain = copy.deepcopy(layer)
    wanted = torch.autograd.grad(plain(x).pow(3).sum(), x)[0]
    contexts = lambda: (layer.batch.freeze_statistics(), nullcontext())  # noqa: E731
    y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    got = torch.autograd.grad(y.pow(3).sum(), x)[0]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("estimate", [False, True])
def test_gradcheck_of_both_forms(estimate):
    torch.manual_seed(0)
    layer = randomised(BatchChannelNorm2d(4, 2, estimate))
    x = torch.randn(2, 4, 2, 3, dtype=DOUBLE, requires_grad=True)
    with layer.batch.freeze_statistics():  # every call starts from the same state
        assert torch.autograd.gradcheck(layer.eval() if estimate else layer, x)
        layer.train()
        names = [n for n, _ in layer.named_parameters()]
        call = lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), x.detach())  # noqa: E731
        assert torch.autograd.gradcheck(call, tuple(layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_keeps_its_statistics(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5) * 3 + 20
    full, half = BatchChannelNorm2d(8, 2, True), BatchChannelNorm2d(8, 2, True).to(dtype)
    torch.testing.assert_close(half(x.to(dtype)).float(), full(x.to(dtype).float()), rtol=1e-2, atol=1e-2)
    assert half.batch.running_mean.dtype == torch.float32
    assert EstBatchNorm2d(8).to(dtype).eval()(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half.batch.running_mean, full.batch.running_mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(full(x.to(dtype))).all()


def test_compiled_layer_equals_the_eager_one():
    torch.manual_seed(0)
    layer, x = BatchChannelNorm2d(4, 2, True), torch.randn(2, 4, 3, 3, requires_grad=True)
    other = copy.deepcopy(layer)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, z = layer(x), fast(x)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(z.square().sum(), x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("stage", ["bn", "pbn"])
def test_released_state_is_understood(stage):
    layer = BatchChannelNorm2d(4, 2, True)
    state = {k.replace("batch.", f"{stage}."): torch.rand_like(v) for k, v in layer.batch.named_parameters("batch")}
    state |= {f"{stage}.running_mean": torch.rand(4), f"{stage}.running_var": torch.rand(4)}
    state |= {f"{stage}.num_batches_tracked": torch.tensor(7), f"{stage}.estbn_moving_speed": torch.zeros(1)}
    state |= {"weight": torch.rand(1, 2, 1), "bias": torch.rand(1, 2, 1)}
    model = nn.Sequential(layer)
    model.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert torch.equal(layer.group_weight, state["weight"].flatten())
    assert torch.equal(layer.batch.running_var, state[f"{stage}.running_var"])
    with pytest.raises(RuntimeError, match="moving_speed is 0"):
        layer(torch.randn(1, 4, 2, 2))
    set_moving_speed(layer, 0.5)(torch.randn(1, 4, 2, 2))
    large = {key: value for key, value in state.items() if "speed" not in key}
    BatchChannelNorm2d(4, 2).load_state_dict(large)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="must divide the 6 channels"):
        BatchChannelNorm2d(6, 4)
    assert BatchChannelNorm2d(6, 4, strict=False).num_groups == 3
    for speed in (0, 1.5):
        with pytest.raises(ValueError, match="moving_speed"):
            EstBatchNorm2d(4, speed)
    with pytest.raises(ValueError, match="channel_affine"):
        BatchChannelNorm2d(4, 2, channel_affine="layer")
    with pytest.raises(ValueError, match="shape"):
        BatchChannelNorm2d(4, 2)(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match="4 channels"):
        EstBatchNorm2d(4)(torch.randn(2, 3, 2, 2))
    with pytest.raises(ValueError, match="no EstBatchNorm"):
        set_moving_speed(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="norm is"):
        MicroBatch(norm="ln")


def net():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["bcn", "gn", "estbn"])
def test_one_call_makes_a_batch_norm_net_ready_for_single_images(norm):
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 1, 6, 6)
    model(x).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, running = copy.deepcopy(model).eval()(x), model[1].running_mean.clone()
    assert len(hw.plan(model, MicroBatch(norm=norm)).rows) == 4
    changed = hw.apply(model, MicroBatch(norm=norm), optimizer=optimizer)
    assert isinstance(changed[0], WSConv2d)
    if norm != "gn":
        first = changed[1].batch if norm == "bcn" else changed[1]
        assert torch.equal(first.running_mean, running)
    assert {id(p) for p in changed.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    changed.train()(x[:1]).sum().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in changed.parameters())
    hw.undo(changed)
    assert type(changed[0]) is nn.Conv2d and type(changed[1]) is nn.BatchNorm2d
    assert before.shape == changed.eval()(x).shape


@pytest.mark.parametrize(
    "norm, groups, warns", [("bcn", 32, True), ("gn", 8, True), ("bcn", 4, False), ("estbn", 32, False)]
)
def test_groups_of_one_channel_each_bring_a_warning(norm, groups, warns, recwarn):
    hw.apply(net()[:6], MicroBatch(norm=norm, num_groups=groups, ws=False))
    said = [str(w.message) for w in recwarn if "one channel each" in str(w.message)]
    assert len(said) == warns and all("narrowest has 8" in words for words in said)


def test_without_batch_norms_there_is_nothing_to_change():
    with pytest.raises(hw.NothingToChange, match="BatchNorm2d"):
        convert_microbatch(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_dead_channels_are_counted_where_batch_norm_tells_them_apart():
    torch.manual_seed(0)
    model, x = net(), torch.randn(64, 1, 6, 6)
    model(x)
    with torch.no_grad():
        model[1].momentum = model[4].momentum = 1.0
        model[1].bias[:3], model[1].weight[:3] = -5.0, 0.5  # ratio bias / weight = -10
        model.train()(x)
    found = dead_channel_report(model, [x[:32], (x[32:],)])
    assert found.layers == {"1": 0.25, "4": 0.0} and found.share == pytest.approx(3 / 20)
    torch.testing.assert_close(found.ratios["1"][:3].float(), torch.full((3,), -10.0), rtol=0.02, atol=0)
    assert model.training
    with pytest.raises(ValueError, match="no norm"):
        dead_channel_report(nn.Linear(2, 2), [torch.randn(1, 2)])
