# pyright: reportArgumentType=false, reportCallIssue=false
"""The fused plane norms against their plain bodies, in every number type, and against the method's own derivative."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from headway.kernels import planes
from headway.kernels.library import below_autograd
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


TASKS = torch.tensor([0.5, -40.0, 900.0, 0.1]), torch.tensor([0, 2, 0]), torch.tensor([2, 0, 1, 0])


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shares_of_tasks_and_their_gradient_equal_the_plain_ones(dtype, renormalize):
    weight, *rest = TASKS[0].to(dtype), *TASKS[1:], 3, renormalize
    torch.testing.assert_close(ops.task_shares(weight, *rest), reference.task_shares(weight, *rest))
    pull = torch.randn(3, dtype=torch.float64)
    ours, plain = ops.task_shares_backward(pull, weight, *rest), reference.task_shares_backward(pull, weight, *rest)
    torch.testing.assert_close(ours, plain)
    assert ours.dtype == torch.promote_types(dtype, torch.float32) and ours.shape == (4,)
    leaf = weight.float().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.task_shares(leaf, *rest), leaf, pull)
    with below_autograd():  # where the operators' bodies run
        torch.testing.assert_close(reference.task_shares_backward(pull, weight, *rest).float(), wanted)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize(
    "estimate, unbiased, tasks", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("kept", [False, True])
def test_a_whole_step_equals_its_parts(kept, estimate, unbiased, tasks, groups):
    x, *_, weight, bias, gain, offset = case(torch.float32, groups=groups)
    omega = TASKS if tasks else (None, None, None)
    args = (x, weight, bias, gain, offset, *omega)
    settings = (0.3, 0.8, 3, True, estimate, unbiased, False, groups, 1e-5, 1e-5)
    found = []
    for body in (ops.plane_step, reference.plane_step):
        running = [torch.full((6,), 0.5), torch.ones(6), torch.tensor(0.4, dtype=torch.float64) if kept else None]
        found.append([*body(*args, *running, *settings), *running[: 2 + kept]])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
    assert not torch.equal(found[0][5], torch.full((6,), 0.5))
    nowhere = ops.plane_step(*args, None, None, None, *settings[:4], False, *settings[5:])
    torch.testing.assert_close(nowhere[3], nowhere[4])


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
    opcheck(ops.task_shares, (*TASKS, 3, False), test_utils=tests)
    opcheck(ops.task_shares_backward, (shares, *TASKS, 3, False), test_utils=tests)
    running = torch.zeros(6), torch.ones(6), torch.ones((), dtype=torch.float64)
    settings = (0.0, 0.8, 3, True, False, False, False, 2, 1e-5, 1e-5)
    opcheck(ops.plane_step, (x, weight, bias, gain, offset, *TASKS, *running, *settings), test_utils=tests)


def test_what_a_step_has_moved_cannot_be_used_by_an_older_backward():
    x, running = torch.randn(2, 6, 5, requires_grad=True), (torch.zeros(6), torch.ones(6))
    older = torch.nn.functional.batch_norm(x, *running, torch.ones(6, requires_grad=True))
    planes.plane_step(x, None, None, running, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        older.sum().backward()


def test_a_large_common_mean_costs_no_digits():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 500) + 1e4
    mean, var = planes.plane_moments(x)
    torch.testing.assert_close(mean, x.double().mean(2), rtol=1e-9, atol=0)
    torch.testing.assert_close(var, x.double().var(2, unbiased=False), rtol=1e-5, atol=0)
