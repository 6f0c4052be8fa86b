# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""Region normalisation against the method written down, the oracles that follow from its equations, and the ways a mask arrives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headway as hw
from headway.functional import region_norm
from headway.norms import RegionNormB2d, RegionNormL2d, region_mask
from headway.norms.region_convert import RegionNorm, convert_region_norm

DOUBLE = torch.float64
BOTH = pytest.mark.parametrize("stats", ["instance", "batch"])


def case(b=3, c=4, h=5, w=6, share=0.4, dtype=DOUBLE, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(b, c, h, w, generator=draw, dtype=DOUBLE) * 2 + 3
    return x.to(dtype), torch.rand(b, 1, h, w, generator=draw) < share


def randomised(layer):
    torch.manual_seed(1)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer.double()


def by_filling(x, hole, eps=1e-5):
    """The released way: fill the other region with the mean, batch norm, times sqrt(S / N)."""
    total = 0
    for region in (hole.double(), 1 - hole.double()):
        pixels = region.sum().clamp(min=1)
        mean = (x * region).sum((0, 2, 3)) / pixels
        filled = x * region + (1 - region) * mean[:, None, None]
        total = total + F.batch_norm(filled, None, None, training=True, eps=eps) * (pixels / hole.numel()).sqrt()
    return total


def channel(v):
    return v[:, None, None]


# the oracles of the method


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_golden_rn_b_as_released_is_filling_batch_norm_and_both_offsets_everywhere(share):
    x, hole = case(share=share)
    layer = randomised(RegionNormB2d(4, "batch", eps_mode="released", affine_mode="released"))
    n, m = by_filling(x, hole), hole.double()
    wanted = n * m * channel(1 + layer.hole_gamma) + channel(layer.hole_beta)
    wanted = wanted + n * (1 - m) * channel(1 + layer.valid_gamma) + channel(layer.valid_beta)
    torch.testing.assert_close(layer(x, m), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_golden_rn_l_as_released(kernel_size):
    x = case()[0] - 3
    layer = randomised(RegionNormL2d(4, 0.5, kernel_size, "batch", eps_mode="released"))
    pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    importance = torch.sigmoid(layer.importance_conv(pooled))
    region = importance >= 0.5
    wanted = by_filling(x, region) * (1 + layer.gamma_conv(importance)) + layer.beta_conv(importance)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(layer.last_region, region) and 0 < region.double().mean() < 1


def test_golden_numbers_worked_by_hand():
    """Four pixels, hole (1, 3): mean 2, variance 1; valid (10, 16): mean 13, variance 9; eps 7, so that the roots are 8 and 16."""
    x = torch.tensor([1.0, 10, 3, 16], dtype=DOUBLE).reshape(1, 1, 2, 2)
    hole = torch.tensor([1, 0, 1, 0]).reshape(1, 2, 2)
    plain = torch.tensor([-1 / 8**0.5, -3 / 4, 1 / 8**0.5, 3 / 4], dtype=DOUBLE).reshape(x.shape)
    torch.testing.assert_close(region_norm(x, hole, eps=7.0), plain, rtol=1e-14, atol=1e-14)
    # half the pixels each: released, eps counts twice
    released = torch.tensor([-1 / 15**0.5, -3 / 23**0.5, 1 / 15**0.5, 3 / 23**0.5], dtype=DOUBLE).reshape(x.shape)
    torch.testing.assert_close(region_norm(x, hole, eps=7.0, eps_mode="released"), released, rtol=1e-14, atol=1e-14)
    layer = RegionNormB2d(1, eps=7.0).double()
    with torch.no_grad():
        for p, value in zip(layer.parameters(), (1.0, 0.5, -0.5, 2.0), strict=True):
            p.fill_(value)
    wanted = torch.tensor([-2 / 8**0.5 + 0.5, -3 / 8 + 2, 2 / 8**0.5 + 0.5, 3 / 8 + 2], dtype=DOUBLE).reshape(x.shape)
    torch.testing.assert_close(layer(x, hole), wanted, rtol=1e-14, atol=1e-14)
    layer.affine_mode = "released"
    torch.testing.assert_close(
        layer(x, hole), wanted + (2.5 - torch.where(hole == 1, 0.5, 2.0)), rtol=1e-14, atol=1e-14
    )


@BOTH
@pytest.mark.parametrize("value", [False, True])
def test_region_norm_equals_the_ordinary_norm_when_nothing_or_everything_is_masked(stats, value):
    x, hole = case()
    wanted = F.instance_norm(x) if stats == "instance" else F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(region_norm(x, torch.full_like(hole, value), stats=stats), wanted, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("affine", ["paper", "released"])
def test_swapping_hole_and_valid_with_their_parameters_changes_nothing(stats, affine):
    x, hole = case()
    layer = randomised(RegionNormB2d(4, stats, affine_mode=affine))
    other = copy.deepcopy(layer)
    other.hole_gamma, other.valid_gamma = layer.valid_gamma, layer.hole_gamma
    other.hole_beta, other.valid_beta = layer.valid_beta, layer.hole_beta
    torch.testing.assert_close(layer(x, hole), other(x, ~hole), rtol=1e-14, atol=1e-14)
    flipped = copy.deepcopy(layer)
    flipped.hole_value = 0
    assert torch.equal(flipped(x, ~hole), layer(x, hole))


@BOTH
def test_each_region_has_mean_0_and_variance_v_over_v_plus_eps(stats):
    x, hole = case(8, 3, 9, 9)
    x = x * 3e-3  # eps is seen
    y = region_norm(x, hole, stats=stats)
    for region in (hole, ~hole):
        for n in range(8) if stats == "instance" else [slice(None)]:
            at = region[n].expand(x[n].shape).transpose(0, -3)
            before, after = (t[n].transpose(0, -3)[at].reshape(3, -1) for t in (x, y))
            v = before.var(1, correction=0)
            assert after.mean(1).abs().max() < 1e-6
            torch.testing.assert_close(after.var(1, correction=0), v / (v + 1e-5), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("value", [0.0, -1e4, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_in_the_hole_reaches_no_valid_pixel(stats, value, dtype):
    x, hole = case(dtype=dtype)
    layer = randomised(RegionNormB2d(4, stats)).to(dtype)
    other = torch.where(hole, value, x)
    mine, theirs = layer(x, hole), layer(other, hole)
    valid = (~hole).expand(x.shape)
    assert torch.equal(mine[valid], theirs[valid]) and torch.isfinite(theirs[valid]).all()
    other.requires_grad_()
    layer(other, hole)[valid].sum().backward()
    assert torch.isfinite(other.grad).all() and not other.grad[~valid].any()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@BOTH
@pytest.mark.parametrize("eps_mode", ["plain", "released"])
@pytest.mark.parametrize("affine", ["paper", "released"])
def test_gradcheck_of_rn_b(stats, eps_mode, affine):
    x, hole = case(2, 2, 3, 3)
    layer = randomised(RegionNormB2d(2, stats, 0.1, eps_mode, affine))
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *p):
        return torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x, hole))

    leaves = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(call, leaves)
    if (eps_mode, affine) == ("plain", "paper"):
        assert torch.autograd.gradgradcheck(call, leaves)


@BOTH
def test_gradcheck_of_rn_l_away_from_the_threshold(stats):
    x = case(2, 2, 3, 3)[0] - 3
    layer = randomised(RegionNormL2d(2, 0.5, 3, stats, 0.1))
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *p):
        return torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))

    layer(x)
    assert 0 < layer.last_region.double().mean() < 1
    leaves = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@BOTH
@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_rn_l_that_flags_everything_or_nothing_is_the_ordinary_norm_with_a_gain_and_offset_a_pixel(stats, threshold):
    x, _ = case()
    layer = randomised(RegionNormL2d(4, threshold, stats=stats))
    n = F.instance_norm(x) if stats == "instance" else F.batch_norm(x, None, None, training=True)
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    importance = torch.sigmoid(layer.importance_conv(pooled))
    wanted = n * (1 + layer.gamma_conv(importance)) + layer.beta_conv(importance)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)
    assert layer.last_region.all() if threshold == 0 else not layer.last_region.any()


@BOTH
def test_released_eps_is_plain_with_eps_times_all_pixels_over_the_regions(stats):
    x, hole = case(share=0.3)
    found = region_norm(x, hole, stats=stats, eps=0.1, eps_mode="released")
    for n in range(3) if stats == "instance" else [slice(None)]:
        for region in (hole[n], ~hole[n]):
            eps = 0.1 * region.numel() / int(region.sum())
            part = (x[n][None], hole[n][None]) if stats == "instance" else (x, hole)
            plain = region_norm(*part, stats=stats, eps=eps)
            at = region.expand(x[n].shape)
            torch.testing.assert_close(found[n][at], plain.reshape(x[n].shape)[at], rtol=1e-12, atol=1e-12)


def test_a_sample_is_the_same_alone_and_in_a_batch_with_its_own_statistics_and_not_with_the_batchs():
    x, hole = case(dtype=torch.float32)
    for stats, same in (("instance", True), ("batch", False)):
        together = region_norm(x, hole, stats=stats)
        assert torch.equal(together[1:2], region_norm(x[1:2], hole[1:2], stats=stats)) is same
    for layer in (RegionNormB2d(4), RegionNormL2d(4)):
        call = (lambda t, m: layer(t, m)) if isinstance(layer, RegionNormB2d) else (lambda t, _: layer(t))  # noqa: B023
        assert torch.equal(call(x, hole), (layer.eval(), call(x, hole))[1])
        torch.testing.assert_close(call(x, hole)[1:2], call(x[1:2], hole[1:2]), rtol=1e-5, atol=1e-6)


@BOTH
def test_a_hole_that_is_lost_by_downsampling_leaves_finite_numbers_and_gradients(stats):
    x, _ = case(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 1, 1] = 1  # nearest neighbour takes even rows and columns
    mask[1, :, :4] = 1
    layer = randomised(RegionNormB2d(4, stats, eps_mode="released"))
    y = layer(x.requires_grad_(), mask)
    y.square().sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    torch.testing.assert_close(y, layer(x, mask[:, :, ::2, ::2]))


# shapes, types, states


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["plain", "released"]),
)
def test_any_shape_equals_the_two_passes_written_down(b, c, h, w, batch, eps_mode):
    x, hole = case(b, c, h, w)
    n, dims = torch.zeros_like(x), (0, 2, 3) if batch else (2, 3)
    for region in (hole, ~hole):
        r = region.double()
        pixels = r.sum(dims, keepdim=True)
        count = pixels.clamp(min=1)
        mean = (r * x).sum(dims, keepdim=True) / count
        var = (r * (x - mean).square()).sum(dims, keepdim=True) / count
        e = 0.1 * ((b if batch else 1) * h * w / count if eps_mode == "released" else 1)
        n = n + r * (x - mean) / (var + e).sqrt()
    found = region_norm(x, hole, stats="batch" if batch else "instance", eps=0.1, eps_mode=eps_mode)
    assert found.shape == x.shape
    torch.testing.assert_close(found, n, rtol=1e-9, atol=1e-9)


def test_one_pixel_of_a_region_is_0_and_an_empty_batch_stays_empty():
    x, hole = torch.randn(2, 3, 4, 4) + 100, torch.zeros(2, 4, 4, dtype=torch.bool)
    hole[:, 1, 2] = True
    assert not region_norm(x, hole)[:, :, 1, 2].any()
    for layer in (RegionNormB2d(3), RegionNormL2d(3)):
        empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
        y = layer(empty, hole[:0]) if isinstance(layer, RegionNormB2d) else layer(empty)
        y.sum().backward()
        assert y.shape == empty.shape and empty.grad.shape == empty.shape
        assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_a_large_common_mean_costs_no_digits():
    x, hole = case(dtype=torch.float32)
    far = x + 1e4
    torch.testing.assert_close(region_norm(far, hole), region_norm(far.double(), hole).float(), rtol=2e-3, atol=2e-3)
    constant = torch.where(hole, 12345.678, x)  # a filled hole: variance 0
    assert not region_norm(constant, hole)[hole.expand(x.shape)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, hole = case(dtype=dtype)
    b, l = RegionNormB2d(4), RegionNormL2d(4)
    wanted = b(x.float(), hole)
    assert b(x, hole).dtype == dtype
    torch.testing.assert_close(b(x, hole).float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(b.to(dtype)(x, hole.to(dtype)).float(), wanted, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = l(x.float().requires_grad_())
        y.sum().backward()
        assert y.dtype == torch.float32 and torch.isfinite(y).all()
    assert l.to(dtype)(x).dtype == dtype


def test_scale_and_shift_of_every_kind():
    x, hole = case()
    n = region_norm(x, hole)
    one, two, per_pixel, full = (torch.randn(s, dtype=DOUBLE) for s in ((4,), (2, 4), (3, 1, 5, 6), (3, 4, 1, 1)))

    def of(v):
        if v.dim() == 4:
            return v
        return torch.where(hole, channel(v[0]), channel(v[1])) if v.dim() == 2 else channel(v)

    for scale in (None, one, two, per_pixel, full):
        for shift in (None, two, per_pixel, full):
            wanted = (n if scale is None else n * of(scale)) + (0 if shift is None else of(shift))
            torch.testing.assert_close(region_norm(x, hole, scale, shift), wanted)


def test_soft_masks_weigh_the_same_formulas():
    x, hole = case(2, 3, 3, 4)
    layer = randomised(RegionNormB2d(3, eps=0.1, soft=True))
    exact = copy.deepcopy(layer)
    exact.soft = False
    torch.testing.assert_close(layer(x, hole.double()), exact(x, hole), rtol=1e-12, atol=1e-12)
    weight = torch.rand(2, 1, 3, 4, dtype=DOUBLE)
    n = 0
    for r in (weight, 1 - weight):
        mean = (r * x).sum((2, 3), keepdim=True) / r.sum((2, 3), keepdim=True)
        var = (r * (x - mean).square()).sum((2, 3), keepdim=True) / r.sum((2, 3), keepdim=True)
        n = n + r * (x - mean) / (var + 0.1).sqrt()
    gain = weight * channel(1 + layer.hole_gamma) + (1 - weight) * channel(1 + layer.valid_gamma)
    offset = weight * channel(layer.hole_beta) + (1 - weight) * channel(layer.valid_beta)
    torch.testing.assert_close(layer(x, weight), n * gain + offset, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda t: layer(t, weight), x.requires_grad_())


def test_masks_are_never_differentiated():
    x, hole = case()
    mask = hole.double().requires_grad_()
    y = RegionNormB2d(4).double()(x.requires_grad_(), mask)
    assert torch.autograd.grad(y.square().sum(), mask, allow_unused=True, retain_graph=True)[0] is None
    layer = RegionNormL2d(4, 0.5).double()
    layer(x).sum().backward()
    assert layer.importance_conv.weight.grad.abs().sum() > 0  # through the gain and the offset


def test_released_state_is_understood():
    layer, theirs = RegionNormB2d(3), {}
    for name in ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta"):
        theirs[name] = torch.randn(3)
    layer.load_state_dict(theirs)
    assert torch.equal(layer.hole_gamma, theirs["foreground_gamma"]) and torch.equal(
        layer.valid_beta, theirs["background_beta"]
    )
    found, state = RegionNormL2d(3), RegionNormL2d(3).state_dict()
    names = {"importance_conv": "sa.conv1", "gamma_conv": "sa.gamma_conv", "beta_conv": "sa.beta_conv"}
    found.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in state.items()})
    torch.testing.assert_close(found.state_dict(), state, rtol=0, atol=0)


def test_copies_and_pickles_leave_the_pass_behind():
    x, hole = case(dtype=torch.float32)
    layer, found = RegionNormB2d(4), RegionNormL2d(4)
    found(x)
    with region_mask(layer, hole):
        other = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="no mask"):
        other(x)
    again = pickle.loads(pickle.dumps(found))
    assert again.last_region is None
    torch.testing.assert_close(again(x), found(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["rn-b", "rn-l"])
def test_compiled_layers_equal_the_eager_ones(kind):
    x, hole = case(dtype=torch.float32)
    x.requires_grad_()
    layer = randomised(RegionNormB2d(4, "batch") if kind == "rn-b" else RegionNormL2d(4, 0.5)).float()
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    args = (x, hole.float()) if kind == "rn-b" else (x,)  # a mask of numbers is checked in the graph
    for part in (args, (x[:, :, 1:], *(m[:, :, 1:] for m in args[1:]))):
        y, z = layer(*part), fast(*part)
        torch.testing.assert_close(y, z)
        grads = [torch.autograd.grad(out.square().sum(), (x, *layer.parameters())) for out in (y, z)]
        torch.testing.assert_close(*grads)


# how a mask arrives


def test_the_context_hands_the_mask_to_every_layer_and_resizes_it_once_a_size(monkeypatch):
    from headway.norms import holes

    x, hole = case(2, 4, 8, 8, dtype=torch.float32)
    layers = RegionNormB2d(4), RegionNormB2d(4), nn.AvgPool2d(2), RegionNormB2d(4), RegionNormB2d(4)
    model = randomised(nn.Sequential(*layers)).float()
    calls, resize = [], holes.resize
    monkeypatch.setattr(holes, "resize", lambda h, size: calls.append(size) or resize(h, size))
    with region_mask(model, hole.float()):
        y = model(x)
        with region_mask(model, ~hole):  # the inner one counts
            inner = model(x)
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert calls == [(8, 8), (4, 4)] * 2 and not torch.equal(y, inner)
    a = model[1](model[0](x, hole), hole)
    torch.testing.assert_close(y, model[4](model[3](model[2](a), hole), hole), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="region_mask"):
        model(x)
    with region_mask(nn.Linear(1, 1), hole):
        pass


@pytest.mark.parametrize("mask", [torch.zeros(2, 3, 4, 4), torch.zeros(4, 4), torch.zeros(2, 1, 1, 4, 4)])
def test_masks_of_another_shape_are_refused(mask):
    with pytest.raises(ValueError, match=r"\(B, H, W\) or \(B, 1, H, W\)"):
        RegionNormB2d(3)(torch.randn(2, 3, 4, 4), mask)


def test_bad_input_is_met_with_one_sentence():
    x, layer = torch.randn(2, 3, 4, 4), RegionNormB2d(3)
    half = torch.full((2, 4, 4), 0.5)
    for mask, soft in ((half, False), (half * torch.nan, False), (half * 3, True), (half * torch.nan, True)):
        with pytest.raises(ValueError, match="a mask holds"):
            region_norm(x, mask, soft=soft)
    with pytest.raises(ValueError, match="3 samples and the input of 2"):
        layer(x, torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="no pixel"):
        layer(x, torch.zeros(2, 0, 4))
    for wrong in (torch.randn(2, 4, 4, 4), torch.randn(3, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.int64)):
        for norm in (lambda t: layer(t, torch.zeros(2, 4, 4)), RegionNormL2d(3)):
            with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
                norm(wrong)
    for scale in (torch.ones(5), torch.ones(2, 3, 1, 4, 4), torch.ones(1, 2, 4, 4)):
        with pytest.raises(ValueError, match="scale and shift"):
            region_norm(x, torch.zeros(2, 4, 4), scale)
    for settings_, match in (
        ({"stats": "layer"}, "stats is"), ({"eps_mode": "big"}, "eps_mode"), ({"eps": 0}, "eps is above 0"),
        ({"affine_mode": "both"}, "affine_mode"), ({"hole_value": 2}, "hole_value"), ({"sync": True}, "sync=True"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            RegionNormB2d(3, **settings_)
    for settings_, match in (({"kernel_size": 5}, "kernel_size 3 or 7"), ({"sync": True}, "sync=True")):
        with pytest.raises(ValueError, match=match):
            RegionNormL2d(3, **settings_)


# one call on a model


def net(norm=nn.BatchNorm2d):
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU()),
            "middle": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4)),
            "decoder": nn.Sequential(norm(4), nn.Conv2d(4, 1, 3, padding=1)),
            "head": nn.Sequential(norm(1)),
        }
    )


def run(model, x):
    return model["decoder"](model["middle"](model["encoder"](x)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_one_call_puts_rn_b_into_the_encoder_and_rn_l_behind_it(norm):
    torch.manual_seed(0)
    model, x, hole = net(norm), torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) < 0.3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert len(hw.plan(model, RegionNorm()).rows) == 3
    changed = hw.apply(model, RegionNorm(), optimizer=optimizer)
    kinds = [type(changed[name][i]) for name, i in (("encoder", 1), ("middle", 1), ("decoder", 0))]
    assert kinds == [RegionNormB2d, RegionNormL2d, RegionNormL2d] and not isinstance(changed["head"][0], RegionNormB2d)
    assert {id(p) for p in changed.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    with region_mask(changed, hole):
        run(changed, x).sum().backward()
    optimizer.step()
    hw.undo(changed)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), net(norm).modules(), strict=True))


@pytest.mark.parametrize("affine", ["paper", "released"])
def test_gain_and_offset_go_on_in_both_regions(affine):
    torch.manual_seed(0)
    x, old = torch.randn(2, 4, 6, 6), nn.InstanceNorm2d(4, eps=1e-3, affine=True)
    nn.init.normal_(old.weight), nn.init.normal_(old.bias)
    new = RegionNormB2d.from_module(old, affine_mode=affine)
    torch.testing.assert_close(new(x, torch.zeros(2, 6, 6)), old(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new(x, torch.ones(2, 6, 6)), old(x), rtol=1e-4, atol=1e-5)


def test_rn_l_says_whose_gain_it_loses_and_other_parts_can_be_named():
    model = net()
    nn.init.normal_(model["middle"][1].weight)
    with pytest.warns(UserWarning, match="middle.1 lose theirs"):
        convert_region_norm(model)
    model = hw.apply(net(), RegionNorm(early=("*",), late=(), source=(nn.BatchNorm2d,), stats="batch", eps=1e-3))
    norms = [m for m in model.modules() if isinstance(m, RegionNormB2d)]
    assert len(norms) == 4 and all((m.stats, m.eps) == ("batch", 1e-3) for m in norms)
    with pytest.raises(hw.NothingToChange, match=r"nn.BatchNorm2d in the submodules encoder, middle, decoder"):
        convert_region_norm(nn.Sequential(nn.BatchNorm2d(2)))
    assert isinstance(hw.apply(nn.Sequential(nn.BatchNorm2d(2)), RegionNormB2d)[0], RegionNormB2d)
