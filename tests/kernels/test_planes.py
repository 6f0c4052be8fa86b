# pyright: reportArgumentType=false, reportCallIssue=false
"""The fused plane norms against their plain bodies, in every number type, and against the method's own derivative."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from headway.kernels import planes
from headway.kernels.planes import plane_norm, reference

ops = torch.ops.headway


def case(dtype, samples=3, channels=6, space=5, groups=2):
    torch.manual_seed(0)
    x, gy = (torch.randn(samples, channels, space, dtype=torch.float64) * 2 + 3 for _ in range(2))
    x, gy = x.to(dtype), gy.to(dtype)
    weight, bias = (torch.randn(channels, dtype=torch.float64) for _ in range(2))
    gain, offset = (torch.randn(groups, dtype=torch.float64) for _ in range(2)) if groups else (None, None)
    shares = torch.rand(samples, dtype=torch.float64) / samples
    moments = reference.plane_moments(x)
    statistics = reference.plane_statistics(moments, shares, None)
    return x, gy, moments, statistics, shares, weight, bias, gain, offset


@pytest.mark.parametrize("groups", [0, 2, 6])
@pytest.mark.parametrize("space", [1, 5, 4099])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_native_bodies_equal_the_plain_ones(dtype, space, groups):
    x, gy, moments, statistics, shares, weight, bias, gain, offset = case(dtype, space=space, groups=groups)
    close = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 4e-2)
    to = {"rtol": close, "atol": close}
    torch.testing.assert_close(ops.plane_moments(x), moments, rtol=1e-6, atol=1e-6)
    for centre in (None, torch.randn(6)):
        for given in (None, shares):
            args = moments, given, centre
            torch.testing.assert_close(ops.plane_statistics(*args), reference.plane_statistics(*args))
    settings = (groups, 1e-5, 1e-5)
    stage = x, moments, statistics, weight, bias, gain, offset, *settings
    torch.testing.assert_close(ops.plane_norm(*stage), reference.plane_norm(*stage), **to)
    pull = torch.randn(2, 6, dtype=torch.float64)
    whole = torch.cat([torch.randn(24, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)])
    for part, extra, everywhere in (
        (shares, pull, None),
        (shares, None, None),
        (shares, None, whole),
        (None, None, None),
    ):
        args = gy, x, moments, statistics, part, weight, bias, gain, offset, extra, everywhere, *settings
        ours, plain = ops.plane_norm_backward(*args), reference.plane_norm_backward(*args)
        torch.testing.assert_close(ours, plain, rtol=close, atol=close * space**0.5)


@pytest.mark.parametrize("moves", [True, False])
def test_statistics_move_alike_and_not_at_all_on_nan(moves):
    for now in (torch.randn(2, 4, dtype=torch.float64), torch.tensor([[0, 1, torch.nan, 2]] * 2, dtype=torch.float64)):
        stays = not moves or bool(torch.isnan(now).any())
        running = [torch.randn(4), torch.rand(4), torch.tensor(0.3, dtype=torch.float64)]
        for kept in (2, 3):
            one, two = [r.clone() for r in running], [r.clone() for r in running]
            rate = (None,) if kept == 2 else ()
            args = *rate, now, 0.25, 0.8, moves
            torch.testing.assert_close(
                ops.move_statistics(*one[:kept], *args), reference.move_statistics(*two[:kept], *args)
            )
            torch.testing.assert_close(one, two)
            assert torch.equal(one[0], running[0]) == stays
            assert torch.equal(one[2], running[2]) == (stays or kept == 2)


@pytest.mark.parametrize("groups", [0, 2])
def test_gradcheck_through_statistics_and_shares(groups):
    x, _, _, given, shares, *parameters = case(torch.float64, groups=groups)
    leaves = [t.requires_grad_() for t in (x, shares, *(p for p in parameters if p is not None))]

    def call(x, shares, weight, bias, gain=None, offset=None):
        return plane_norm(x, weight, bias, shares, groups=groups, group_weight=gain, group_bias=offset)

    def fixed(x, _, weight, bias, gain=None, offset=None):
        return plane_norm(x, weight, bias, None, given, groups=groups, group_weight=gain, group_bias=offset)[0]

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradcheck(fixed, leaves)


def test_operators_are_what_a_compiler_expects():
    x, gy, moments, statistics, shares, weight, bias, gain, offset = case(torch.float32)
    tests = ("test_schema", "test_faketensor")
    opcheck(ops.plane_moments, (x,), test_utils=tests)
    opcheck(ops.plane_statistics, (moments, shares, None), test_utils=tests)
    opcheck(ops.move_statistics, (torch.zeros(6), torch.ones(6), None, statistics, 0.1, 0.0, True), test_utils=tests)
    opcheck(ops.plane_norm, (x, moments, statistics, weight, bias, gain, offset, 2, 1e-5, 1e-5), test_utils=tests)
    args = (gy, x, moments, statistics, shares, weight, bias, gain, offset, None, None, 2, 1e-5, 1e-5)
    opcheck(ops.plane_norm_backward, args, test_utils=tests)


def test_a_large_common_mean_costs_no_digits():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 500) + 1e4
    mean, var = planes.plane_moments(x)
    torch.testing.assert_close(mean, x.double().mean(2), rtol=1e-9, atol=0)
    torch.testing.assert_close(var, x.double().var(2, unbiased=False), rtol=1e-5, atol=0)
